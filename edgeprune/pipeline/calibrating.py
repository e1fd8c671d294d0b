"""Measure a device's own speed with a few files of random weights, in less than two minutes."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeprune import bench, registry, rundir
from edgeprune.config.targets import calibration_path, load_target
from edgeprune.costs import speed as speed_costs
from edgeprune.costs import speed_fit
from edgeprune.devices import local
from edgeprune.devices._session import Session
from edgeprune.errors import ConfigError, DeviceError, StageError
from edgeprune.records import (
    DeviceCalibration,
    DeviceTarget,
    Environment,
    SpeedModel,
    dumps,
    make_key,
)

# a calibrated device: files it was not calibrated with, at 80% (benchmarks/calibration.py)
ERROR, PREFILL_ERROR = 0.10, 0.35
_FLAGS = {"ubatch": 512, "kv_type": "f16", "mmap": False, "flash_attention": True}
_PROMPT, _NEW, _REPEATS = 16, 24, 3
_CACHES, _LEAST, _MOST = 3, 48 << 20, 192 << 20
_KINDS = ("Q6_K", "Q8_0", "Q4_0", "Q5_K", "F16", "Q3_K", "Q5_0", "IQ4_NL", "Q2_K", "IQ4_XS", "Q4_1", "Q5_1")


def open_session(
    device: str,
    *,
    name: str,
    ssh_config: Path | None = None,
    python: str | None = None,
    llama_bench: str | None = None,
    keep: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Session:
    """A session on `local`, `ssh://…` or `adb://…`; connects when entered. Raises ConfigError."""
    scheme = device.partition("://")[0]
    known = registry.names("devices")
    if scheme not in known:
        raise ConfigError(
            f"device '{device}' cannot be reached{registry.suggest(scheme, known)}",
            "write local, ssh://user@host[:port] or adb://serial",
        )
    plugin = registry.load("devices", scheme, "DEVICE")
    import sys

    return Session(
        plugin.transport(device, config=ssh_config),
        name=name,
        python=python or (sys.executable if scheme == "local" else "python3"),
        llama_bench=llama_bench,
        keep=keep,
        say=say,
    )


def state_of(answer: Mapping[str, Any], *, cpu: str, threads: int) -> Environment:
    """A device's answer about its state, as a record."""
    count = answer.get("thermal_throttle_count")
    return Environment(
        cpu=cpu,
        n_cpus=threads,
        governor=answer["governor"],
        temperature_c=max(answer["temperatures_c"].values(), default=None),
        load_average=answer["load_average"],
        power_mode=answer["power_mode"],
        throttled=answer["throttled"],
        throttle_count=int(count) if count is not None and count.isdigit() else None,
        on_battery=answer["on_battery"],
        busy_s=answer["busy_s"],
    )


def calibrate(
    target_name: str,
    session: Session,
    *,
    mode: str | None,
    backend: str | None,
    threads: int | None,
    seconds: float,
    say: Callable[[str], None],
) -> tuple[DeviceCalibration, SpeedModel]:
    """Time probe files until `seconds` are over, fit, and write the user's profile of the target.

    Returns it with the speed model that was known before. Raises DeviceError when nothing could be timed,
    StageError when the power mode changed meanwhile: there is nothing such times would describe.
    """
    target, _ = load_target(target_name)
    session.preflight(arch=None if target.local else target.arch, mode=mode, disk_bytes=_MOST)
    facts = session.facts
    if target.local:
        target = _described(target)
    mode = mode or _mode_of(target, facts["power_mode"])
    before = speed_costs.speed_model(_published(target), mode=mode, backend=backend, threads=threads)
    began = time.monotonic()
    probes, samples, spreads, engine, compute = [], [], [], "", None
    doubts: dict[str, str] = {}  # each once, by its first words
    for shape, n_prompt in plan(facts["cache_bytes"]):
        spent = time.monotonic() - began
        if probes and spent + spent / len(probes) > seconds:
            break
        job = {
            "n_prompt": n_prompt,
            "n_gen": _NEW,
            "repeats": _REPEATS,
            "threads": threads,
            "sweep": [] if threads else _counts(facts["threads"]),
            "backend": before.backend,
            "flags": {**_FLAGS, "context_tokens": -(-(n_prompt + _NEW + 32) // 256) * 256},
        }
        path, made = session.probe("probe.gguf", shape)
        try:
            found = session.measure({**job, "path": path}, timeout_s=max(180.0, 2 * seconds))
        except DeviceError as error:
            if error.kind in ("lost", "runtime") or not probes:
                raise
            say(f"{shape['type']} left out: {error}")
            continue
        threads, engine = found["threads"], f"{found['engine']} {found['engine_version']}"
        depth = found["depth"] + _NEW / 2
        probe = speed_fit.Probe(
            read=made["read"],
            cache=speed_costs.cache_bytes(
                layers=shape["layers"], kv_dim=shape["kv_dim"], context_tokens=round(depth)
            ),
            layers=shape["layers"],
            ns=statistics.median(found["decode_ns"]) / _NEW,
        )
        if compute is None:
            compute = 2 * found["model_params"] * n_prompt * 1e9 / statistics.median(found["prefill_ns"])
        states = [state_of(found[w], cpu=facts["cpu"], threads=facts["threads"]) for w in ("before", "after")]
        if states[0].power_mode != states[1].power_mode:
            raise StageError(
                f"the power mode changed from {states[0].power_mode} to {states[1].power_mode} meanwhile",
                "hold one mode and calibrate again; nothing was kept",
            )
        for doubt in bench.doubts(*states, elapsed_s=found["elapsed_s"], own_s=found["own_s"]):
            doubts.setdefault(" ".join(doubt.split()[:3]), doubt)
        spreads.append(statistics.stdev(found["decode_ns"]) / statistics.median(found["decode_ns"]))
        probes.append(probe)
        samples.append({**{k: float(v) for k, v in probe.amounts().items()}, "ns": probe.ns})
        say(f"{shape['type']:7} {probe.ns / 1e6:8.2f} ms a token, {sum(made['read'].values()) / 1e6:.0f} MB")
    if not probes:
        raise StageError("no probe file could be timed within the time given", "give more with --seconds")
    noise = statistics.median(spreads)
    if noise > ERROR / 2:
        doubts["spread"] = f"the repeats spread by {noise:.0%}"
    for doubt in doubts.values():
        say(f"{doubt}: do it again on a quiet device")
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    fitted = speed_fit.fit(probes, before)
    model = dataclasses.replace(
        fitted,
        basis="calibrated",
        threads=threads if before.backend == "cpu" else None,
        compute_flops=compute,
        relative_error=max(ERROR, 2 * noise),
        prefill_error=PREFILL_ERROR,
        source=f"calibrate-device on {facts['cpu']}, {now[:10]}, {len(probes)} probe files, {engine}",
    )
    record = DeviceCalibration(
        target=target.name,
        cpu=facts["cpu"],
        device=session.transport.address,
        runtime_version=engine,
        date=now,
        speeds=_with_other_modes(target.name, facts["cpu"], model),
        samples=tuple(samples),
        key=make_key("device_calibration", target.name, facts["cpu"], now, samples),
        doubts=tuple(doubts.values()),
    )
    path = calibration_path(target.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_text(path, dumps(record))
    return record, before


def plan(cache_bytes: int) -> list[tuple[dict[str, Any], int]]:
    """(shape, prompt tokens) of the probe files, the most telling first.

    Files are several times the cache, as models are: one that fits into it decodes half again as fast.
    """
    size = min(_MOST, max(_LEAST, _CACHES * cache_bytes))
    wide = {"hidden": 1024, "head_dim": 64, "kv_dim": 256, "ffn": 3072, "vocab": 4096}
    thin = {"hidden": 256, "head_dim": 64, "kv_dim": 64, "ffn": 512, "vocab": 512}
    deep = {"hidden": 512, "head_dim": 64, "kv_dim": 512, "ffn": 512, "vocab": 512}
    out = [
        (_sized({**wide, "type": "Q4_K"}, size), 32),
        ({**thin, "type": "Q4_0", "layers": 64}, _PROMPT),
        (_sized({**wide, "type": "Q6_K"}, size), _PROMPT),
        ({**deep, "type": "Q4_0", "layers": 16}, 1024),
    ]
    return out + [(_sized({**wide, "type": kind}, size), _PROMPT) for kind in _KINDS if kind != "Q6_K"]


def _sized(shape: dict[str, Any], size: int) -> dict[str, Any]:
    from edgeprune.devices._agent import BLOCKS

    _, block, n_bytes, _ = BLOCKS[shape["type"]]
    d, layer = shape["hidden"], 2 * shape["hidden"] * (shape["hidden"] + shape["kv_dim"])
    layer += 3 * d * shape["ffn"]
    wanted = size * block / n_bytes - d * shape["vocab"]
    return {**shape, "layers": max(2, round(wanted / layer))}


def _counts(threads: int) -> list[int]:
    return sorted({1, max(1, threads // 2), max(1, threads * 3 // 4), max(1, threads - 1), threads})


def _mode_of(target: DeviceTarget, reported: str | None) -> str | None:
    """The target's mode that the device says it is in; the default one where it says nothing."""
    if reported:
        plain = reported.upper().removeprefix("MODE_")
        for mode in target.power_modes:
            if mode.name.upper() == plain:
                return mode.name
    return None


def _published(target: DeviceTarget) -> DeviceTarget:
    return dataclasses.replace(target, speeds=tuple(s for s in target.speeds if s.basis != "calibrated"))


def _described(target: DeviceTarget) -> DeviceTarget:
    return local.describe(target)


def _with_other_modes(target: str, cpu: str, model: SpeedModel) -> tuple[SpeedModel, ...]:
    """A calibration of one power mode leaves those of the others in place."""
    from edgeprune.config.targets import read_calibration

    try:
        earlier = read_calibration(target)
    except ConfigError:
        earlier = None
    if earlier is None or earlier.cpu != cpu:
        return (model,)
    others = (s for s in earlier.speeds if (s.mode, s.backend) != (model.mode, model.backend))
    return (model, *others)
