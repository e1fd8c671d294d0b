"""llama.cpp on the CPU. Every job is a fresh process, so an abort in the library ends only the job."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.costs import gguf_types
from edgeprune.errors import ConfigError, MissingExtraError
from edgeprune.records import LaunchFlags, to_plain
from edgeprune.rundir import atomic_path, write_text
from edgeprune.runtimes import _child
from edgeprune.runtimes.base import BenchTimes, MemoryPeak, Runtime

if TYPE_CHECKING:
    import numpy as np


def _available() -> str | None:
    if importlib.util.find_spec("llama_cpp") is None:
        return "the library llama-cpp-python is not installed"
    return None


def _version() -> str:
    return importlib.metadata.version("llama-cpp-python")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Distributions of the dense parent on fixed token windows, stored beside `header`."""

    header: Path
    logits: Path  # uint16 [n*(T-1), vocab], steps below the row's maximum
    nll: np.ndarray  # [n, T-1] nats
    argmax: np.ndarray  # [n, T-1]
    vocab: int
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenQuality:
    """Per-token figures of a candidate on the reference's windows, each [n, T-1]."""

    kl: np.ndarray  # nats, parent || candidate, full vocabulary
    nll: np.ndarray  # nats
    argmax: np.ndarray


def bench(
    path: Path,
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
    """Time prefill (empty cache) and decode (behind the prompt) apart; one warm-up is left out.

    With `threads` None the fastest count of `sweep` is taken. Raises StageError when the job fails.
    """
    answer = _run(
        "bench",
        {
            "path": _absolute(path),
            "flags": to_plain(flags),
            "n_prompt": n_prompt,
            "n_gen": n_gen,
            "repeats": repeats,
            "threads": threads,
            "sweep": list(sweep),
            "sweep_tokens": sweep_tokens,
        },
        timeout_s,
    )
    answer["prefill_ns"] = tuple(answer["prefill_ns"])
    answer["decode_ns"] = tuple(answer["decode_ns"])
    return BenchTimes(**answer)


def memory(path: Path, *, flags: LaunchFlags, threads: int = 1, timeout_s: float = 1800.0) -> MemoryPeak:
    """Measure the peak memory of a process that opens the model, fills its context and does nothing else."""
    return MemoryPeak(
        **_run("memory", {"path": _absolute(path), "flags": to_plain(flags), "threads": threads}, timeout_s)
    )


def logits(
    path: Path,
    windows: np.ndarray,
    out: Path,
    *,
    flags: LaunchFlags,
    threads: int = 1,
    timeout_s: float = 1800.0,
) -> np.ndarray:
    """Write the logits of token windows [n, T] to `out` and return them as float32 [n, T, vocab] (mapped)."""
    import numpy as np

    with atomic_path(out) as temporary:
        answer = _run_on_windows(
            "logits",
            windows,
            {"path": _absolute(path), "out": _absolute(temporary)},
            flags,
            threads,
            timeout_s,
        )
    n, length = windows.shape
    return np.memmap(out, dtype="<f4", mode="r", shape=(n, length, answer["vocab"]))


def make_reference(
    path: Path,
    windows: np.ndarray,
    header: Path,
    *,
    flags: LaunchFlags,
    threads: int = 1,
    timeout_s: float = 3600.0,
) -> Reference:
    """Evaluate token windows [n, T] with the dense parent and store its distributions.

    `header` (JSON) is written last, so it exists only beside complete data. The logits are stored as
    uint16 steps of 24/65535 nats below each row's maximum: an error of at most 1.8e-4 nats a logit.
    """
    from edgeprune.rundir import sha256_bytes

    with (
        atomic_path(header.with_suffix(".logits.u16")) as raw,
        atomic_path(header.with_suffix(".safetensors")) as arrays,
    ):
        answer = _run_on_windows(
            "reference",
            windows,
            {"path": _absolute(path), "out": _absolute(raw), "arrays": _absolute(arrays)},
            flags,
            threads,
            timeout_s,
        )
    digest = sha256_bytes(_as_tokens(windows).tobytes())
    write_text(
        header,
        json.dumps(
            {
                "kind": "reference_logits",
                "schema": 1,
                "shape": list(windows.shape),
                "tokens_sha256": digest,
                "flags": to_plain(flags),
                **answer,
            },
            indent=1,
        )
        + "\n",
    )
    return load_reference(header)


def load_reference(header: Path) -> Reference:
    """Open a stored reference. Raises ConfigError when a part of it is missing or cut short."""
    from safetensors.numpy import load_file

    raw, arrays = header.with_suffix(".logits.u16"), header.with_suffix(".safetensors")
    try:
        facts = json.loads(header.read_text(encoding="utf-8"))
        data = load_file(arrays)
        complete = raw.stat().st_size == 2 * facts["rows"] * facts["vocab"]
    except Exception as error:  # any damage has the same remedy
        raise ConfigError(
            f"{header}: not a readable reference: {error}", "delete it and run again"
        ) from error
    if not complete:
        raise ConfigError(f"{raw}: cut short", "delete it and run again")
    return Reference(
        header=header,
        logits=raw,
        nll=data["nll"],
        argmax=data["argmax"],
        vocab=facts["vocab"],
        tokens_sha256=facts["tokens_sha256"],
    )


def quality(
    path: Path,
    windows: np.ndarray,
    reference: Reference,
    arrays: Path,
    *,
    flags: LaunchFlags,
    threads: int = 1,
    timeout_s: float = 3600.0,
) -> TokenQuality:
    """Compare a candidate with the stored parent on the same windows [n, T]; per-token arrays go to `arrays`.

    Raises StageError when the vocabularies differ, ConfigError when the windows are not the reference's.
    """
    from safetensors.numpy import load_file

    from edgeprune.rundir import sha256_bytes

    if sha256_bytes(_as_tokens(windows).tobytes()) != reference.tokens_sha256:
        raise ConfigError(f"{reference.header}: made from other tokens", "delete it and run again")
    facts = json.loads(reference.header.read_text(encoding="utf-8"))
    with atomic_path(arrays) as temporary:
        _run_on_windows(
            "quality",
            windows,
            {
                "path": _absolute(path),
                "reference": _absolute(reference.logits),
                "arrays": _absolute(temporary),
                "vocab": reference.vocab,
                "span_nats": facts["span_nats"],
                "levels": facts["levels"],
            },
            flags,
            threads,
            timeout_s,
        )
    return TokenQuality(**load_file(arrays))


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a model wrote behind one prompt; `ended`: it said so itself, else it was cut off."""

    text: str
    tokens: int
    ended: bool


def generate(
    path: Path,
    prompts: Sequence[str],
    *,
    n_new: int,
    flags: LaunchFlags,
    threads: int = 1,
    timeout_s: float = 1800.0,
) -> tuple[Continued, ...]:
    """Continue prompts greedily, each on an empty cache. Special tokens in a prompt count as such."""
    answer = _run(
        "generate",
        {
            "path": _absolute(path),
            "prompts": list(prompts),
            "n_new": n_new,
            "flags": to_plain(flags),
            "threads": threads,
        },
        timeout_s,
    )
    return tuple(Continued(**row) for row in answer["rows"])


def score(
    path: Path,
    groups: Path,
    out: Path,
    *,
    flags: LaunchFlags,
    threads: int = 1,
    timeout_s: float,
    poll: Callable[[], None] | None = None,
) -> None:
    """Append one line per group of `groups` (JSON lines) to `out`; lines written before a kill stay valid.

    A group is `h`, `prefix`, `tails`, and per tail `starts` (position whose next token is the first target)
    and `targets`. A line is `h`, `ll` (nats, summed over the targets) and `greedy`, each per tail.
    """
    _run(
        "score",
        {
            "path": _absolute(path),
            "groups": _absolute(groups),
            "out": _absolute(out),
            "flags": to_plain(flags),
            "threads": threads,
        },
        timeout_s,
        poll,
    )


def tokenize(
    path: Path, texts: Sequence[tuple[str, bool]], *, timeout_s: float = 1800.0
) -> tuple[list[list[int]], dict[str, int]]:
    """Token ids of (text, with the special tokens of its own) pairs, and `bos`, `eos`, `vocab`."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        given, out = Path(folder, "texts.json"), Path(folder, "ids.json")
        given.write_text(json.dumps([list(pair) for pair in texts]), encoding="utf-8")
        facts = _run("tokenize", {"path": _absolute(path), "texts": str(given), "out": str(out)}, timeout_s)
        return json.loads(out.read_text(encoding="utf-8")), facts


def quantize(
    master: Path,
    out: Path,
    *,
    ftype: int,
    overrides: Sequence[tuple[str, int]],
    imatrix: Path | None,
    threads: int,
    allow_requantize: bool = False,
    timeout_s: float = 7200.0,
) -> None:
    """Quantize a GGUF file into `out`.

    `overrides` are (regular expression over tensor names, ggml type); anchor them with ^ and $.
    `imatrix` is a safetensors file: GGUF tensor name -> float32 [n_columns], mean squared input.
    """
    with atomic_path(out) as temporary:
        _run(
            "quantize",
            {
                "master": _absolute(master),
                "out": _absolute(temporary),
                "ftype": ftype,
                "overrides": [list(pair) for pair in overrides],
                "imatrix": None if imatrix is None else _absolute(imatrix),
                "threads": threads,
                "allow_requantize": allow_requantize,
            },
            timeout_s,
        )


def widen(path: Path, out: Path, *, threads: int) -> None:
    """Write a file of the same values with every matrix in F32."""
    quantize(
        path,
        out,
        ftype=gguf_types.check_quantization("F32")[0],
        overrides=(),
        imatrix=None,
        threads=threads,
        allow_requantize=True,
    )


# ---------------------------------------------------------------- starting a job


def _absolute(path: Path) -> str:
    return str(Path(path).absolute())


def _as_tokens(windows: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.ascontiguousarray(windows, dtype="<i4")


def _run_on_windows(
    job: str, windows: np.ndarray, args: dict[str, Any], flags: LaunchFlags, threads: int, timeout_s: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        tokens = Path(folder, "tokens.i32")
        tokens.write_bytes(_as_tokens(windows).tobytes())
        return _run(
            job,
            {
                **args,
                "tokens": str(tokens),
                "shape": list(windows.shape),
                "flags": to_plain(flags),
                "threads": threads,
            },
            timeout_s,
        )


def _run(
    job: str, args: dict[str, Any], timeout_s: float, poll: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Run one job in a fresh process. Raises StageError with its last words when it fails."""
    if _available() is not None:
        raise MissingExtraError("llama-cpp-python", RUNTIME.extra)
    return _child.run(
        "edgeprune.runtimes._llama_worker",
        job,
        args,
        timeout_s=timeout_s,
        label="llama.cpp",
        env=_environment(job),
        poll=poll,
    )


def _environment(job: str) -> dict[str, str]:
    """What a job inherits; timings are taken with the threads waiting as a user's would."""
    timed = job == "bench"
    return {k: v for k, v in os.environ.items() if not (timed and k == "OMP_WAIT_POLICY")}


RUNTIME = Runtime(
    name="llama-cpp",
    summary="llama.cpp through its Python binding, on the CPU of this machine",
    reference="https://github.com/ggml-org/llama.cpp",
    formats=("gguf",),
    extra="gguf",
    available=_available,
    version=_version,
    bench=bench,
    memory=memory,
)
