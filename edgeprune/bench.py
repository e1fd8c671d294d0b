"""Measure an artifact on this machine: speed and peak memory, as records and as llama-bench rows."""

from __future__ import annotations

import datetime
import re
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune import registry
from edgeprune.records import BenchProtocol, BenchResult, Environment, LaunchFlags, MemoryResult


def bench_artifact(
    path: Path,
    *,
    sha256: str,
    flags: LaunchFlags,
    protocol: BenchProtocol,
    threads: int | None,
    device_name: str,
    key: str,
    runtime: str = "llama-cpp",
    device: str = "local",
    timeout_s: float = 1800.0,
) -> BenchResult:
    """Time prefill and decode apart in a fresh process; with `threads` None the thread count is swept first.

    `runtime` and `device` name plug-ins; `device_name` is what the record calls the machine, whose
    state is the one before the run. Raises StageError when the runtime fails.
    """
    engine = registry.load("runtimes", runtime, "RUNTIME")
    machine = registry.load("devices", device, "DEVICE")
    environment = machine.environment()
    began = datetime.datetime.now(datetime.timezone.utc)
    started, own = time.monotonic(), own_s()
    times = engine.bench(
        path,
        flags=flags,
        n_prompt=protocol.prompt_tokens,
        n_gen=protocol.new_tokens,
        repeats=protocol.repeats,
        threads=threads,
        sweep=thread_counts(machine.available_threads()) if threads is None else (),
        timeout_s=timeout_s,
    )
    found = doubts(
        environment,
        machine.environment(),
        elapsed_s=time.monotonic() - started,
        own_s=own_s() - own,
        spread=relative_spread(protocol.new_tokens, times.decode_ns),
    )
    return BenchResult(
        artifact_sha256=sha256,
        device=device_name,
        runtime=engine.name,
        runtime_version=engine.version(),
        simulated=False,
        n_threads=times.threads,
        flags=flags,
        n_prompt=protocol.prompt_tokens,
        n_gen=protocol.new_tokens,
        prefill_ns=times.prefill_ns,
        decode_ns=times.decode_ns,
        load_ns=times.load_ns,
        thread_sweep=times.sweep,
        environment=environment,
        key=key,
        model_type=times.model_type,
        model_bytes=times.model_bytes,
        model_params=times.model_params,
        n_batch=times.n_batch,
        build_commit=times.build_commit,
        test_time=began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        doubts=found,
    )


def measure_memory(
    path: Path,
    *,
    sha256: str,
    flags: LaunchFlags,
    device_name: str,
    key: str,
    threads: int = 1,
    runtime: str = "llama-cpp",
    timeout_s: float = 1800.0,
) -> MemoryResult:
    """Peak memory with the whole context filled, in a fresh process that does nothing else."""
    engine = registry.load("runtimes", runtime, "RUNTIME")
    peak = engine.memory(path, flags=flags, threads=threads, timeout_s=timeout_s)
    return MemoryResult(
        artifact_sha256=sha256,
        device=device_name,
        flags=flags,
        peak_bytes=peak.peak_bytes,
        before_bytes=peak.before_bytes,
        tokens_filled=peak.tokens_filled,
        load_ns=peak.load_ns,
        key=key,
    )


def thread_counts(available: int) -> tuple[int, ...]:
    """Thread counts worth trying: every one up to 8, then every second, and all of them."""
    counts = [n for n in range(1, available + 1) if n <= 8 or n % 2 == 0]
    return tuple(dict.fromkeys([*counts, available]))


# ---------------------------------------------------------------- statistics


def rates(n_tokens: int, ns: Sequence[int]) -> tuple[float, ...]:
    """Tokens per second of each repeat."""
    return tuple(n_tokens * 1e9 / t for t in ns)


def median_tps(n_tokens: int, ns: Sequence[int]) -> float:
    return statistics.median(rates(n_tokens, ns))


def mean_tps(n_tokens: int, ns: Sequence[int]) -> float:
    return statistics.fmean(rates(n_tokens, ns))


def stdev_tps(n_tokens: int, ns: Sequence[int]) -> float:
    """Sample standard deviation of tokens per second; 0 for a single repeat."""
    return statistics.stdev(rates(n_tokens, ns)) if len(ns) > 1 else 0.0


# decode times that spread wider say more about the machine's other load than about the file
QUIET_SPREAD = 0.10


# processors that other programs may take meanwhile, as a share of those that are there
OTHER_LOAD = 0.10


def spread(result: BenchResult) -> float:
    """Standard deviation of the decode speed over its median."""
    return relative_spread(result.n_gen, result.decode_ns)


def relative_spread(n_tokens: int, ns: Sequence[int]) -> float:
    return stdev_tps(n_tokens, ns) / median_tps(n_tokens, ns)


def own_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in both)


def doubts(
    before: Environment, after: Environment, *, elapsed_s: float, own_s: float, spread: float | None = None
) -> tuple[str, ...]:
    """Why what was timed between two states may not be the machine's own speed; () when nothing speaks
    against it.

    `own_s` is what the measurement itself took of the processors within `elapsed_s`; the rest was others.
    What a system does not tell (None) raises no doubt.
    """
    out = []
    bits = [int(e.throttled, 16) & 0xF for e in (before, after) if e.throttled and _is_hex(e.throttled)]
    counts = (before.throttle_count, after.throttle_count)
    if any(bits) or (counts[0] is not None and counts[1] is not None and counts[1] > counts[0]):
        out.append("the processor was throttled")
    if before.on_battery or after.on_battery:
        out.append("on battery")
    for name, first, last in (
        ("power mode", before.power_mode, after.power_mode),
        ("governor", before.governor, after.governor),
    ):
        if first != last:
            out.append(f"the {name} changed from {first} to {last}")
    if before.busy_s is not None and after.busy_s is not None and elapsed_s > 0:
        others = (after.busy_s - before.busy_s - own_s) / elapsed_s
        if others > OTHER_LOAD * max(1, before.n_cpus):
            out.append(f"other programs used {others:.1f} of {before.n_cpus} processors")
    if spread is not None and spread > QUIET_SPREAD:
        out.append(f"the repeats spread by {spread:.0%}")
    return tuple(out)


def _is_hex(text: str) -> bool:
    return re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text) is not None


def other_builds(results: Sequence[BenchResult]) -> dict[str, str]:
    """A doubt for each result (by key) that another build of the runtime gave than the latest one."""
    if not results:
        return {}
    last = max(results, key=lambda r: r.test_time)
    return {
        r.key: f"timed with {_build(r)}, others with {_build(last)}"
        for r in results
        if _build(r) != _build(last)
    }


def _build(result: BenchResult) -> str:
    return f"{result.runtime} {result.runtime_version} (build {result.build_commit or 'unknown'})"


# ---------------------------------------------------------------- llama-bench rows


def to_llama_bench(result: BenchResult, *, model_filename: str) -> list[dict[str, Any]]:
    """The result as llama-bench's JSON has it: one row for the prompt, one for decoding.

    Decoding was timed behind the prompt, which llama-bench calls `n_depth`.
    """
    return [
        _row(result, model_filename, n_prompt=result.n_prompt, n_gen=0, n_depth=0, ns=result.prefill_ns),
        _row(
            result,
            model_filename,
            n_prompt=0,
            n_gen=result.n_gen,
            n_depth=result.n_prompt,
            ns=result.decode_ns,
        ),
    ]


def _row(
    result: BenchResult, model_filename: str, *, n_prompt: int, n_gen: int, n_depth: int, ns: Sequence[int]
) -> dict[str, Any]:
    n_tokens = n_prompt + n_gen
    return {
        "build_commit": result.build_commit,
        "build_number": 0,
        "cpu_info": result.environment.cpu,
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": model_filename,
        "model_type": result.model_type,
        "model_size": result.model_bytes,
        "model_n_params": result.model_params,
        "n_batch": result.n_batch,
        "n_ubatch": result.flags.ubatch,
        "n_threads": result.n_threads,
        "type_k": result.flags.kv_type,
        "type_v": result.flags.kv_type,
        "n_gpu_layers": 0,
        "flash_attn": int(result.flags.flash_attention),
        "use_mmap": result.flags.mmap,
        "load_mode": "mmap" if result.flags.mmap else "none",
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "test_time": result.test_time,
        "avg_ns": round(statistics.fmean(ns)),
        "stddev_ns": round(statistics.stdev(ns)) if len(ns) > 1 else 0,
        "avg_ts": mean_tps(n_tokens, ns),
        "stddev_ts": stdev_tps(n_tokens, ns),
        "doubts": list(result.doubts),
        "samples_ns": list(ns),
        "samples_ts": list(rates(n_tokens, ns)),
    }
