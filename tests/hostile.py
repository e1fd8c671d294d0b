"""Files made to do harm, built by code, and a guard that says what reading one may cost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_SECONDS = 10.0  # of this process's own time: how busy the machine is does not count
HANG_SECONDS = 60.0  # of the clock
MOST_BYTES = 512 << 20  # more than the process held before

_FORMATS = {
    "UINT8": (0, "B"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "UINT64": (10, "Q"),
}


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return u64(len(raw)) + raw


def value(kind: str, of: Any) -> bytes:
    """A GGUF value with its type number; `kind` as in the file, arrays as 'UINT32[]'."""
    if kind.endswith("[]"):
        item = kind[:-2]
        body = [value(item, v)[4:] for v in of]
        number = 8 if item == "STRING" else _FORMATS[item][0]
        return u32(9) + u32(number) + u64(len(of)) + b"".join(body)
    if kind == "STRING":
        return u32(8) + text(of)
    return u32(_FORMATS[kind][0]) + struct.pack("<" + _FORMATS[kind][1], of)


@dataclass
class Gguf:
    """A llama of one layer as GGUF, every field of it open to change before it is written."""

    version: int = 3
    n_tensors: int | None = None  # None: as many as there are
    n_metadata: int | None = None
    alignment: int = 32
    metadata: dict[str, bytes] = field(default_factory=dict)  # key -> value with its type
    tensors: list[list[Any]] = field(default_factory=list)  # name, dims, type number, offset
    more: bytes = b""  # behind the metadata, before the tensors
    n_data: int = 0  # bytes behind the header

    def __post_init__(self) -> None:
        if self.metadata:
            return
        tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(29))]
        self.metadata = {
            "general.architecture": value("STRING", "llama"),
            "general.name": value("STRING", "small"),
            "llama.block_count": value("UINT32", 1),
            "llama.context_length": value("UINT32", 128),
            "llama.embedding_length": value("UINT32", 32),
            "llama.feed_forward_length": value("UINT32", 64),
            "llama.attention.head_count": value("UINT32", 2),
            "llama.attention.head_count_kv": value("UINT32", 2),
            "llama.attention.layer_norm_rms_epsilon": value("FLOAT32", 1e-5),
            "llama.rope.freq_base": value("FLOAT32", 1e4),
            "tokenizer.ggml.model": value("STRING", "gpt2"),
            "tokenizer.ggml.pre": value("STRING", "gpt-2"),
            "tokenizer.ggml.tokens": value("STRING[]", tokens),
            "tokenizer.ggml.merges": value("STRING[]", []),
            "tokenizer.ggml.token_type": value("INT32[]", [1] * 32),
        }
        shapes = {"token_embd": [32, 32], "output_norm": [32], "output": [32, 32]}
        shapes |= {f"blk.0.{n}": [32] for n in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.0.attn_{n}": [32, 32] for n in ("q", "k", "v", "output")}
        shapes |= {"blk.0.ffn_gate": [32, 64], "blk.0.ffn_up": [32, 64], "blk.0.ffn_down": [64, 32]}
        at = 0
        for name, dims in shapes.items():
            self.tensors.append([f"{name}.weight", dims, 0, at])
            at += 4 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        self.n_data = at

    def row(self, name: str) -> list[Any]:
        return next(t for t in self.tensors if t[0] == f"{name}.weight")

    def bytes(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_metadata = len(self.metadata) if self.n_metadata is None else self.n_metadata
        out = b"GGUF" + u32(self.version) + u64(n_tensors) + u64(n_metadata)
        out += b"".join(text(k) + v for k, v in self.metadata.items()) + self.more
        for name, dims, number, offset in self.tensors:
            out += text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(number) + u64(offset)
        out += bytes(-len(out) % self.alignment)
        return out + bytes(self.n_data)


def safetensors(header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return u64(len(raw) if length is None else length) + raw + data


# ---------------------------------------------------------------- the guard


class TooLong(BaseException):
    """A case ran into its time limit; no `except Exception` may hide it."""


@dataclass
class Cost:
    seconds: float = 0.0
    bytes: int = 0
    written: list[str] = field(default_factory=list)  # paths outside the allowed folder


_watching: list[tuple[Cost, str]] = []
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    paths: Sequence[Any] = ()
    if event == "open":
        mode, flags = args[1], args[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & _WRITES
        ):
            paths = args[:1]
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = args[1:2]
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
        paths = args[:1]
    cost, allowed = _watching[-1]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            full = os.path.realpath(os.fsdecode(path))
            if not full.startswith(allowed) and full != os.devnull:
                cost.written.append(f"{event} {full}")


sys.addaudithook(_audit)  # for the life of the process; without a watch it does nothing


def _size() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def guarded(allowed: Path, *, seconds: float = HANG_SECONDS, n_bytes: int = MOST_BYTES) -> Iterator[Cost]:
    """Raise TooLong after `seconds`, MemoryError past `n_bytes` more, and note writes outside `allowed`."""
    cost = Cost()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def alarm(_number: int, _frame: object) -> None:
        raise TooLong(f"more than {seconds:g} s")

    old = signal.signal(signal.SIGALRM, alarm)
    began = time.process_time()
    dont, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _watching.append((cost, os.path.realpath(allowed)))
    resource.setrlimit(resource.RLIMIT_AS, (_size() + n_bytes, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield cost
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _watching.pop()
        sys.dont_write_bytecode = dont
        signal.signal(signal.SIGALRM, old)
        cost.seconds = time.process_time() - began
        cost.bytes = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
