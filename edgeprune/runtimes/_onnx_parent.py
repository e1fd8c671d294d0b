"""What the two ONNX runtimes share: finding the model, starting a job, counting its parameters."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError, MissingExtraError
from edgeprune.exporters import onnx as exporter
from edgeprune.records import LaunchFlags, to_plain
from edgeprune.rundir import atomic_path
from edgeprune.runtimes import _child
from edgeprune.runtimes.base import BenchTimes, MemoryPeak

if TYPE_CHECKING:
    import numpy as np

EXTRA = "onnx"
_WORKER = "edgeprune.runtimes._onnx_worker"
_LIBRARIES = {"genai": ("onnxruntime_genai", "onnxruntime-genai"), "ort": ("onnxruntime", "onnxruntime")}
_LABELS = {"genai": "onnxruntime-genai", "ort": "ONNX Runtime"}


def available(engine: str) -> str | None:
    """None, or why the engine cannot run."""
    for module, name in (_LIBRARIES[engine], ("onnx", "onnx")):
        if importlib.util.find_spec(module) is None:
            return f"the library {name} is not installed"
    return None


def start(
    engine: str,
    job: str,
    folder: Path,
    args: dict[str, Any],
    timeout_s: float,
    poll: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run one job. Raises MissingExtraError, ConfigError for a broken folder, StageError from the job."""
    for module, name in (_LIBRARIES[engine], ("onnx", "onnx")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(name, EXTRA)
    model = exporter.find_model(folder)
    exporter.load_model(model)
    given = {**args, "engine": engine, "folder": str(folder.absolute()), "model": str(model.absolute())}
    return _child.run(_WORKER, job, given, timeout_s=timeout_s, label=_LABELS[engine], poll=poll)


def kv_type(folder: Path) -> str:
    """Type of the KV cache: decided by the file, 'f32' or 'f16'."""
    model = exporter.load_model(exporter.find_model(folder))
    cache = next(i for i in model.graph.input if i.name.startswith("past_key_values."))
    return (
        "f16" if cache.type.tensor_type.elem_type == exporter.library("onnx").TensorProto.FLOAT16 else "f32"
    )


def facts(folder: Path) -> tuple[str, int, int]:
    """(type such as 'llama int4', bytes of graph and weights, parameters)."""
    file = exporter.find_model(folder)
    model = exporter.load_model(file)
    sizes = {t.name: math.prod(t.dims) for t in model.graph.initializer if t.external_data}
    counted: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            at = {a.name: a.i for a in node.attribute}
            counted[node.input[1]] = at["N"] * at["K"]
    for name, size in sizes.items():
        if not name.startswith(("cos_", "sin_")) and not name.endswith(".scales"):
            counted.setdefault(name, size)
    kind = next((k for k in exporter.QUANTIZATIONS if exporter.model_file(k) == file.name), "of unknown type")
    n_bytes = file.stat().st_size + file.with_name(f"{file.name}_data").stat().st_size
    return f"onnx {kind}", n_bytes, sum(counted.values())


def bench(
    engine: str,
    folder: Path,
    *,
    flags: LaunchFlags,
    n_prompt: int,
    n_gen: int,
    repeats: int,
    threads: int | None,
    sweep: Sequence[int] = (),
    sweep_tokens: int = 32,
    timeout_s: float = 1800.0,
) -> BenchTimes:
    args = {
        "flags": to_plain(flags),
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "repeats": repeats,
        "threads": threads,
        "sweep": list(sweep),
        "sweep_tokens": sweep_tokens,
    }
    answer = start(engine, "bench", folder, args, timeout_s)
    kind, n_bytes, params = facts(folder)
    answer["prefill_ns"] = tuple(answer["prefill_ns"])
    answer["decode_ns"] = tuple(answer["decode_ns"])
    return BenchTimes(
        **answer, model_type=kind, model_bytes=n_bytes, model_params=params, build_commit="unknown"
    )


def memory(
    engine: str, folder: Path, *, flags: LaunchFlags, threads: int = 1, timeout_s: float = 1800.0
) -> MemoryPeak:
    args = {"flags": to_plain(flags), "threads": threads}
    return MemoryPeak(**start(engine, "memory", folder, args, timeout_s))


def greedy(
    engine: str,
    folder: Path,
    prompt: Sequence[int],
    n_new: int,
    *,
    threads: int = 1,
    timeout_s: float = 600.0,
) -> list[int]:
    flags = LaunchFlags(context_tokens=len(prompt) + n_new, ubatch=512, kv_type="f32", mmap=True)
    args = {
        "flags": to_plain(flags),
        "threads": threads,
        "prompt": [int(t) for t in prompt],
        "n_new": n_new,
    }
    return [int(t) for t in start(engine, "greedy", folder, args, timeout_s)["tokens"]]


def logits(
    folder: Path, windows: np.ndarray, out: Path, *, threads: int = 1, timeout_s: float = 1800.0
) -> np.ndarray:
    import numpy as np

    if windows.ndim != 2 or windows.size == 0:
        raise ConfigError("token windows must have the shape [n, T]")
    flags = LaunchFlags(context_tokens=windows.shape[1], ubatch=512, kv_type="f32", mmap=True)
    with atomic_path(out) as temporary, tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        tokens = Path(scratch, "tokens.i32")
        tokens.write_bytes(np.ascontiguousarray(windows, dtype="<i4").tobytes())
        args = {
            "flags": to_plain(flags),
            "threads": threads,
            "tokens": str(tokens),
            "shape": list(windows.shape),
            "out": str(temporary.absolute()),
        }
        vocab = start("ort", "logits", folder, args, timeout_s)["vocab"]
    return np.memmap(out, dtype="<f4", mode="r", shape=(*windows.shape, vocab))


def score(
    folder: Path,
    groups: Path,
    out: Path,
    *,
    threads: int = 1,
    timeout_s: float,
    poll: Callable[[], None] | None = None,
) -> None:
    """As `llama_cpp.score`, with the cache that the file has."""
    flags = LaunchFlags(context_tokens=32, ubatch=512, kv_type="f32", mmap=True)
    args = {
        "flags": to_plain(flags),
        "threads": threads,
        "groups": str(groups.absolute()),
        "out": str(out.absolute()),
    }
    start("ort", "score", folder, args, timeout_s, poll)
