"""How far off predictions are on this machine after `calibrate-device`, over other files.

    python benchmarks/calibration.py                 calibrates (1 to 2 minutes), then about 15 minutes
    python benchmarks/calibration.py --small         six files, one round: does it work?

The files hold random weights: a rate depends on the bytes, not on their meaning. Shapes are those of real
models from 135M to 1.1B parameters, of pruned ones (fewer channels and KV groups) and of odd widths. Every
round times all files once, in another order, so that a drift of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import write_results

SMOL = {"hidden": 576, "head_dim": 64, "kv_dim": 192, "ffn": 1536, "layers": 30, "vocab": 49152}
SMOL_360 = {"hidden": 960, "head_dim": 64, "kv_dim": 320, "ffn": 2560, "layers": 32, "vocab": 49152}
QWEN = {"hidden": 896, "head_dim": 64, "kv_dim": 128, "ffn": 4864, "layers": 24, "vocab": 151936}
TINY = {"hidden": 2048, "head_dim": 64, "kv_dim": 256, "ffn": 5632, "layers": 22, "vocab": 32000}
LLAMA = {"hidden": 2048, "head_dim": 64, "kv_dim": 512, "ffn": 8192, "layers": 16, "vocab": 128256}


def _cases() -> list[tuple[str, dict[str, Any], int]]:
    """(name, shape, tokens in the cache before decoding)."""
    out: list[tuple[str, dict[str, Any], int]] = []

    def add(name: str, shape: dict[str, Any], kind: str, depth: int = 64, **over: Any) -> None:
        out.append(
            (
                f"{name} {kind}" + (f" behind {depth}" if depth != 64 else ""),
                {**shape, **over, "type": kind},
                depth,
            )
        )

    for kind in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "F16"):
        add("135M", SMOL, kind, head_type="Q8_0")
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        add("360M", SMOL_360, kind, head_type="Q8_0")
    add("360M", SMOL_360, "Q8_0", 768, head_type="Q8_0")
    for kind in ("Q4_0", "Q8_0"):
        add("0.5B", QWEN, kind, head_type="Q8_0")
    for kind in ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_XS", "Q4_0", "Q5_1"):
        add("1.1B", TINY, kind, head_type="Q6_K")
    add("1.1B", TINY, "Q4_K", 768, head_type="Q6_K")
    for kind in ("Q4_K", "Q4_0"):
        add("1.2B", LLAMA, kind, head_type="Q6_K")
    # pruned: channels and KV groups go, the vocabulary stays
    for kind in ("Q4_0", "Q8_0"):
        add("135M, 20% of channels gone", SMOL, kind, ffn=1216, head_type="Q8_0")
        add("360M, 40% of channels gone", SMOL_360, kind, ffn=1536, head_type="Q8_0")
        add("360M, two layers gone", SMOL_360, kind, layers=30, head_type="Q8_0")
    add("1.1B, half the channels gone", TINY, "Q4_K", ffn=2816, head_type="Q6_K")
    add("1.1B, one KV group of four gone", TINY, "Q4_K", kv_dim=192, head_type="Q6_K")
    add("1.1B, odd width 5152", TINY, "Q4_0", ffn=5152, head_type="Q6_K")
    add("1.1B, odd width 3104", TINY, "Q8_0", ffn=3104, head_type="Q6_K")
    add("360M, odd width 2336", SMOL_360, "Q5_0", ffn=2336, head_type="Q8_0")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    cases = _cases()
    if given.small:
        cases, given.rounds = cases[::6], 1
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as text:
        os.environ["XDG_DATA_HOME"] = text  # the user's own calibration stays as it is
        rows, calibration = _measure(cases, given.rounds, Path(text))
    errors = sorted(abs(r["error"]) for r in rows)
    inside = statistics.fmean(r["low"] <= r["measured_tps"] <= r["high"] for r in rows)
    summary = {
        "files": len(rows),
        "median_error": statistics.median(errors),
        "p90_error": errors[min(len(errors) - 1, round(0.9 * (len(errors) - 1)))],
        "coverage": inside,
        "pruned": _pruned(rows),
    }
    for row in rows:
        print(
            f"{row['name']:44} {row['read_mb']:7.1f} MB  measured {row['measured_tps']:7.2f}  predicted "
            f"{row['predicted_tps']:7.2f}  {row['error']:+7.1%}  spread {row['spread']:.1%}"
        )
    print(
        f"{len(rows)} files: median error {summary['median_error']:.1%}, p90 {summary['p90_error']:.1%}, "
        f"{inside:.0%} inside the 80% band"
    )
    for name, (speed_up, fewer) in summary["pruned"].items():
        print(f"{name}: {speed_up:.2f} x the speed at {fewer:.2f} x fewer bytes: {speed_up / fewer:.2f}")
    if not given.small:
        write_results("calibration", {"summary": summary, "calibration": calibration, "rows": rows})


def _measure(
    cases: list[tuple[str, dict[str, Any], int]], rounds: int, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from edgeprune import records
    from edgeprune.config.targets import load_target
    from edgeprune.costs import speed
    from edgeprune.devices import _agent, local
    from edgeprune.pipeline import calibrating
    from edgeprune.records import LaunchFlags
    from edgeprune.runtimes import llama_cpp

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with calibrating.open_session("local", name="benchmark", say=say) as session:
        record, before = calibrating.calibrate(
            "laptop-cpu", session, mode=None, backend=None, threads=None, seconds=100, say=say
        )
    device = local.describe(load_target("laptop-cpu")[0], probe_seconds=0)
    model = speed.speed_model(device)
    assert model.basis == "calibrated"
    files: list[dict[str, Any]] = []
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    read: dict[str, dict[str, float]] = {}
    for turn in range(rounds):
        for name, shape, depth in order.sample(cases, len(cases)):
            path = folder / "file.gguf"
            read[name] = _agent.probe({"shape": shape, "path": str(path)})["read"]
            flags = LaunchFlags(
                context_tokens=-(-(depth + 64) // 256) * 256, ubatch=512, kv_type="f16", mmap=False
            )
            found = llama_cpp.bench(
                path, flags=flags, n_prompt=depth, n_gen=32, repeats=5, threads=record.speeds[0].threads
            )
            path.unlink()
            times[name] += [t / 32 for t in found.decode_ns]
            say(f"round {turn + 1}: {name}: {32e9 / statistics.median(found.decode_ns):.2f} tokens/s")
    for name, shape, depth in cases:
        cache = speed.cache_bytes(layers=shape["layers"], kv_dim=shape["kv_dim"], context_tokens=depth + 16)
        value, low, high = speed.band(
            1e9 / speed.decode_ns(read[name], cache, shape["layers"], model), model.relative_error
        )
        measured = 1e9 / statistics.median(times[name])
        files.append(
            {
                "name": name,
                "read_mb": sum(read[name].values()) / 1e6,
                "measured_tps": measured,
                "predicted_tps": value,
                "low": low,
                "high": high,
                "error": value / measured - 1,
                "spread": statistics.stdev(times[name]) / statistics.median(times[name]),
                "ns": times[name],
            }
        )
    return files, {"record": records.to_plain(record), "before": records.to_plain(before)}


def _pruned(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Speed of a pruned file over its dense one, beside bytes of dense over pruned."""
    by_name = {r["name"]: r for r in rows}
    out = {}
    for name, row in by_name.items():
        dense = by_name.get(f"{name.split(',')[0]} {name.split()[-1]}")
        if " gone " in name and dense is not None:
            out[name] = (
                row["measured_tps"] / dense["measured_tps"],
                dense["read_mb"] / row["read_mb"],
            )
    return out


if __name__ == "__main__":
    main()
