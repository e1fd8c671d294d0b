"""Measure an artifact on this machine: speed and peak memory, as records and as llama-bench rows."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune import registry
from edgeprune.records import BenchProtocol, BenchResult, LaunchFlags, MemoryResult


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


def spread(result: BenchResult) -> float:
    """Standard deviation of the decode speed over its median."""
    return stdev_tps(result.n_gen, result.decode_ns) / median_tps(result.n_gen, result.decode_ns)


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
        "samples_ns": list(ns),
        "samples_ts": list(rates(n_tokens, ns)),
    }
