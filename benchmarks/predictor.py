"""How far off the speed predictor is on published rows, with devices and sources left out.

    python benchmarks/predictor.py --rows FILE         errors, coverage; benchmarks/results/predictor.json
    python benchmarks/predictor.py --rows FILE --fit   constants and profiles to write down after new rows

FILE is a CSV of published llama.cpp speeds with the columns src, device, mode, quant, read_MB, layers,
kv_dim, ctx_for_kv, tg_tps and, where known, pp_tps, params_B. Two questions are asked:

* facts: nothing measured on the device is known. Every device is left out in turn, the constants are fitted
  again on the others, and the width of the band comes from the others' errors too.
* profile: other rows of the same device are known. Every source is left out in turn, and for the one device
  with a single large source every model.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import write_results

from edgeprune.costs import speed
from edgeprune.costs.speed import CONSTANTS, Constants, Hardware

# prior of every constant and how sure it is (log): physics and data sheets, before any row is seen
PRIORS = {
    "memory_share": (0.70, 0.2),
    "x86": (7.0, 0.5),
    "arm": (3.5, 0.5),
    "arm_basic": (1.0, 0.5),  # four instructions for what a dot product does in one
    "apple": (20.0, 0.5),  # twice the pipes and half again the clock, caches that feed them
    "cpu_layer_ms": (0.04, 0.5),
    "gpu_share": (0.70, 0.2),
    "gpu_rate": (8.0, 0.5),
    "gpu_layer_ms": (0.085, 0.3),
    "gpu_q8": (1.5, 0.3),
}
FEWEST = 5  # devices of a kind that make a quantile; with fewer all devices do
MOST_ERROR = 0.6  # a row further off than this says no more than one that far off
DEVICE_SD, MODE_SD, SOURCE_SD, ROW_SD = 0.20, 0.10, 0.06, 0.09  # log; scatter around a device's mean


@dataclasses.dataclass(frozen=True)
class Known:
    """Data sheet figures of a published device, and which rows are the same device."""

    group: str
    hardware: Hardware


def _cpu(group: str, peak: float, threads: int, core: str) -> Known:
    return Known(group, Hardware(peak=peak, threads=threads, core=core))


def _gpu(group: str, peak: float, sm_ghz: float) -> Known:
    return Known(group, Hardware(peak=peak, threads=0, core="arm", gpu_sm_ghz=sm_ghz))


# peak GB/s from data sheets; threads are the fast cores; a power mode that is not stated is the common one
DEVICES = {
    "Pi 4B 8GB": _cpu("Raspberry Pi 4", 12.8, 4, "arm-basic"),
    "Pi 400 4GB": _cpu("Raspberry Pi 4", 12.8, 4, "arm-basic"),
    "Pi 5 8GB": _cpu("Raspberry Pi 5", 17.07, 4, "arm"),
    "Pi 5 16GB": _cpu("Raspberry Pi 5", 17.07, 4, "arm"),
    "Pi 5": _cpu("Raspberry Pi 5", 17.07, 4, "arm"),
    "Pi 500+ 16GB": _cpu("Raspberry Pi 5", 17.07, 4, "arm"),
    "Orin Nano Super 8GB 7W": _gpu("Orin Nano 8GB", 68.3, 8 * 0.408 / 2),
    "Orin Nano Super 8GB 15W": _gpu("Orin Nano 8GB", 68.3, 8 * 0.625),
    "Orin Nano Super 8GB 25W": _gpu("Orin Nano 8GB", 102.4, 8 * 0.918),
    "Orin Nano Super 8GB MAXN_SUPER": _gpu("Orin Nano 8GB", 102.4, 8 * 1.02),
    "Orin Nano 8GB ?": _gpu("Orin Nano 8GB", 68.3, 8 * 0.625),
    "Orin NX 16GB MAXN_SUPER": _gpu("Orin NX 16GB", 102.4, 8 * 1.173),
    "AGX Orin/IGX iGPU ?": _gpu("AGX Orin", 204.8, 14 * 0.930),
    "AGX Orin CPU 12t MAXN": _cpu("AGX Orin CPU", 204.8, 12, "arm"),
    "Surface Book 3 i7-1065G7": _cpu("i7-1065G7", 59.7, 4, "x86"),
    "M2 Max CPU 4t": _cpu("M2 Max", 400.0, 4, "apple"),
    "Ryzen 7 8840U (MinisForum V3)": _cpu("Ryzen 7 8840U", 102.4, 8, "x86"),
    "i7-8550U (HP Envy 17)": _cpu("i7-8550U", 38.4, 4, "x86"),
    "N100 (AWOW AK-10)": _cpu("N100", 25.6, 4, "x86"),
    "i5-9500 (OptiPlex 5070)": _cpu("i5-9500", 42.7, 6, "x86"),
    "Ryzen AI 5 340 (Framework 13)": _cpu("Ryzen AI 5 340", 89.6, 6, "x86"),
    "i7-8700 (desktop)": _cpu("i7-8700", 42.7, 6, "x86"),
    "N150 (GMKtec G3+)": _cpu("N150", 25.6, 4, "x86"),
    "Radxa Orion O6": _cpu("CIX P1", 88.0, 8, "arm"),
    "CIX CP8180 (MetaComputing FW13)": _cpu("CIX P1", 88.0, 8, "arm"),
    "Radxa Dragon Q8B": _cpu("SC8280XP", 68.3, 8, "arm"),
    "Graviton3 r7g.16xl 64t": _cpu("Graviton3", 307.2, 64, "arm"),
    "AmpereOne A192-32X": _cpu("AmpereOne", 332.8, 192, "arm"),
    "2x Xeon E5-2690v4": _cpu("2x Xeon E5-2690v4", 153.6, 28, "x86"),
    "GCP c3 Sapphire Rapids 22t": _cpu("Sapphire Rapids", 307.2, 11, "x86"),
    "Core Ultra 7 258V (Lunar Lake)": _cpu("Core Ultra 7 258V", 136.5, 8, "x86"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    source: str
    device: str
    mode: str
    model: str
    quantization: str
    read: float
    cache: float
    layers: int
    seconds: float
    known: Known

    @property
    def group(self) -> str:
        return self.known.group

    @property
    def profile(self) -> str:
        """Rows that one profile covers: a device in one power mode."""
        return f"{self.group} {self.known.hardware.gpu_sm_ghz}"


def read_rows(path: Path) -> list[Row]:
    out = []
    for raw in csv.DictReader(path.open(encoding="utf-8")):
        known = DEVICES.get(f"{raw['device']} {raw['mode']}") or DEVICES.get(raw["device"])
        if known is None:
            raise SystemExit(f"no data sheet figures for '{raw['device']}' in DEVICES")
        layers, kv_dim = int(raw["layers"]), int(raw["kv_dim"])
        out.append(
            Row(
                source=raw["src"].partition("#")[0],
                device=raw["device"],
                mode=raw["mode"],
                model=raw["model"],
                quantization=raw["quant"],
                read=1e6 * float(raw["read_MB"]),
                cache=speed.cache_bytes(layers=layers, kv_dim=kv_dim, context_tokens=int(raw["ctx_for_kv"])),
                layers=layers,
                seconds=1 / float(raw["tg_tps"]),
                known=known,
            )
        )
    return out


# ---------------------------------------------------------------- fitting


def predict(row: Row, constants: Constants) -> float:
    """Seconds per token from hardware facts."""
    hardware = row.known.hardware
    weights = hardware.rate(speed.mix_of(row.quantization), constants)
    cache = hardware.rate(speed.mix_of(speed.REFERENCE), constants)
    ns = row.read / weights + row.cache / cache + row.layers * hardware.layer_ns(constants)
    return ns / 1e9


def error(row: Row, constants: Constants) -> float:
    """Log of measured over predicted time."""
    return math.log(row.seconds / predict(row, constants))


def fit(rows: Sequence[Row]) -> Constants:
    """Maximum a posteriori, absolute errors, every device weighted by the root of its rows."""
    count = collections.Counter(r.group for r in rows)
    names = list(PRIORS)
    start = {n: math.log(PRIORS[n][0]) for n in names}

    def constants(at: dict[str, float]) -> Constants:
        return dataclasses.replace(CONSTANTS, **{n: math.exp(v) for n, v in at.items()})

    def loss(at: dict[str, float]) -> float:
        made = constants(at)
        far = sum(min(abs(error(r, made)), MOST_ERROR) / 0.15 / math.sqrt(count[r.group]) for r in rows)
        return far + sum(((at[n] - math.log(PRIORS[n][0])) / PRIORS[n][1]) ** 2 / 2 for n in names)

    at, best = start, loss(start)
    step = dict.fromkeys(names, 0.2)
    for _ in range(45):
        for name in names:
            for sign in (1, -1):
                trial = {**at, name: at[name] + sign * step[name]}
                value = loss(trial)
                if value < best:
                    at, best = trial, value
                    step[name] *= 1.3
                    break
            else:
                step[name] *= 0.6
    return constants(at)


def scale_of(known: Sequence[Row], row: Row, constants: Constants) -> tuple[float, float]:
    """(log scale of the row's device and mode, its standard deviation) from other rows of the device.

    Rows of one source share an error, modes of one device share most of theirs.
    """
    groups: dict[tuple[str, bool], list[float]] = collections.defaultdict(list)
    for other in known:
        groups[other.source, other.profile == row.profile].append(error(other, constants))
    weight, total = 1 / DEVICE_SD**2, 0.0
    for (_, same), errors in groups.items():
        variance = SOURCE_SD**2 + ROW_SD**2 / len(errors) + (0 if same else MODE_SD**2)
        weight += 1 / variance
        total += statistics.median(errors) / variance
    return total / weight, math.sqrt(1 / weight)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


# ---------------------------------------------------------------- leaving out


def leave_devices_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every device predicted by constants that never saw it."""
    out = []
    for group in sorted({r.group for r in rows}):
        constants = fit([r for r in rows if r.group != group])
        for r in rows:
            if r.group == group:
                out.append(_outcome(r, error(r, constants)))
    for row in out:
        # the band's width from the other devices of the same kind, every device counted once
        others = [o for o in out if o["device"] != row["device"] and o["gpu"] == row["gpu"]]
        if len({o["device"] for o in others}) < FEWEST:
            others = [o for o in out if o["device"] != row["device"]]
        names = {o["device"] for o in others}
        typical = [statistics.median(abs(o["log_error"]) for o in others if o["device"] == n) for n in names]
        row["band"] = quantile(typical, 0.8)
        row["inside"] = abs(row["log_error"]) <= row["band"]
    return out


def leave_sources_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every source of a device that other sources profile."""
    out = []
    for group in sorted({r.group for r in rows}):
        mine = [r for r in rows if r.group == group]
        sources = {r.source for r in mine}
        if len(sources) < 2 or len(mine) < 8:
            continue
        for source in sorted(sources):
            known = [r for r in mine if r.source != source]
            constants = fit([r for r in rows if r not in mine or r in known])
            for r in mine:
                if r.source == source:
                    out.append(_profiled(r, known, constants))
    return out


def leave_models_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every model of a device with a profile, its rows in all power modes left out together."""
    out = []
    for group in ("Orin Nano 8GB", "Raspberry Pi 4", "Raspberry Pi 5"):
        mine = [r for r in rows if r.group == group]
        for model in sorted({r.model for r in mine}):
            known = [r for r in mine if r.model != model]
            constants = fit([r for r in rows if r not in mine or r in known])
            out += [_profiled(r, known, constants) for r in mine if r.model == model]
    return out


def _profiled(row: Row, known: Sequence[Row], constants: Constants) -> dict[str, Any]:
    scale, deviation = scale_of(known, row, constants)
    out = _outcome(row, error(row, constants) - scale)
    out["band"] = 1.2816 * math.sqrt(deviation**2 + SOURCE_SD**2 + ROW_SD**2)
    out["inside"] = abs(out["log_error"]) <= out["band"]
    return out


def _outcome(row: Row, log_error: float) -> dict[str, Any]:
    return {
        "device": row.group,
        "mode": row.mode,
        "source": row.source,
        "model": row.model,
        "quantization": row.quantization,
        "gpu": row.known.hardware.gpu_sm_ghz is not None,
        "measured_tps": round(1 / row.seconds, 2),
        "predicted_tps": round(math.exp(log_error) / row.seconds, 2),
        "log_error": round(log_error, 4),
    }


def summary(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median of |predicted / measured - 1| and the share inside the 80% band."""
    off = [abs(o["predicted_tps"] / o["measured_tps"] - 1) for o in outcomes]
    by_device: dict[str, list[float]] = collections.defaultdict(list)
    inside: dict[str, list[float]] = collections.defaultdict(list)
    for o, value in zip(outcomes, off, strict=True):
        by_device[o["device"]].append(value)
        inside[o["device"]].append(o["inside"])
    return {
        "rows": len(off),
        "devices": len(by_device),
        "median_error": round(statistics.median(off), 4),
        "p90_error": round(quantile(off, 0.9), 4),
        "coverage": round(statistics.fmean(o["inside"] for o in outcomes), 4),
        "median_error_of_devices": round(
            statistics.median(statistics.median(v) for v in by_device.values()), 4
        ),
        "coverage_of_devices": round(statistics.fmean(statistics.fmean(v) for v in inside.values()), 4),
        "per_device": {
            n: [round(statistics.median(v), 3), round(statistics.fmean(inside[n]), 2)]
            for n, v in by_device.items()
        },
    }


def profiles(rows: Sequence[Row], constants: Constants) -> dict[str, dict[str, float]]:
    """What to write into the target files: bandwidth on Q4_K_M, time per layer and half width of the band."""
    out = {}
    for group in ("Raspberry Pi 4", "Raspberry Pi 5", "Orin Nano 8GB"):
        mine = [r for r in rows if r.group == group]
        for row in {r.profile: r for r in mine}.values():
            scale, deviation = scale_of(mine, row, constants)
            hardware = row.known.hardware
            out[f"{group} {row.mode}"] = {
                "bandwidth_gb_per_s": round(
                    hardware.rate(speed.mix_of(speed.REFERENCE), constants) / math.exp(scale), 2
                ),
                "layer_ms": round(hardware.layer_ns(constants) * math.exp(scale) / 1e6, 4),
                "relative_error": round(
                    math.expm1(1.2816 * math.sqrt(deviation**2 + SOURCE_SD**2 + ROW_SD**2)), 3
                ),
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True, help="CSV of published speeds")
    parser.add_argument("--fit", action="store_true", help="print the constants to write into costs/speed.py")
    given = parser.parse_args()
    rows = read_rows(given.rows)
    if given.fit:
        constants = fit(rows)
        for name in PRIORS:
            print(f"    {name}={getattr(constants, name):.4g},")
        left = leave_devices_out(rows)
        for gpu in (False, True):
            mine = [o for o in left if o["gpu"] == gpu]
            mine = mine if len({o["device"] for o in mine}) >= FEWEST else left
            typical = [
                statistics.median(abs(o["log_error"]) for o in mine if o["device"] == n)
                for n in {o["device"] for o in mine}
            ]
            print(f"    {'gpu' if gpu else 'cpu'}_error={quantile(typical, 0.8):.3g},")
        for name, entry in profiles(rows, constants).items():
            print(name, entry)
        return
    tables = {
        "facts, device left out": leave_devices_out(rows),
        "profile, source left out": leave_sources_out(rows),
        "profile, model left out": leave_models_out(rows),
    }
    summaries = {name: summary(outcomes) for name, outcomes in tables.items()}
    for name, found in summaries.items():
        print(
            f"{name}: {found['rows']} rows of {found['devices']} devices: median error "
            f"{found['median_error']:.1%} (of devices {found['median_error_of_devices']:.1%}), p90 "
            f"{found['p90_error']:.1%}, {found['coverage']:.0%} inside the 80% band (of devices "
            f"{found['coverage_of_devices']:.0%})"
        )
        for device, (off, inside) in sorted(found["per_device"].items()):
            print(f"    {device:22} {off:7.1%} {inside:6.0%}")
    results = {"constants": dataclasses.asdict(CONSTANTS), "summary": summaries, "rows": tables}
    sys.argv = [sys.argv[0], "--rows", given.rows.name]  # where it lies is nobody's business
    write_results("predictor", results)


if __name__ == "__main__":
    main()
