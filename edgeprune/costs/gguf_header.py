"""The header of a GGUF v3 file: sizes by arithmetic, and a reader that trusts nothing it reads.

Layout: ggml's `docs/gguf.md`. Standard library only, so that the planner can count bytes exactly.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.costs.gguf_types import TYPES_BY_ID, GgmlType, ggml_dims
from edgeprune.errors import ConfigError

MAGIC = b"GGUF"
ALIGNMENT = 32
_MOST_ITEMS = 1 << 22  # sixteen times the largest vocabulary; Python objects cost more than their bytes

# value type -> (number in the file, struct format or None)
_VALUE_TYPES: Mapping[str, tuple[int, str]] = {
    "UINT8": (0, "B"),
    "INT8": (1, "b"),
    "UINT16": (2, "H"),
    "INT16": (3, "h"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "STRING": (8, ""),
    "ARRAY": (9, ""),
    "UINT64": (10, "Q"),
    "INT64": (11, "q"),
    "FLOAT64": (12, "d"),
}
_VALUE_NAMES = {number: name for name, (number, _) in _VALUE_TYPES.items()}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One metadata entry. `item` is the type of an array's items; strings may be str or bytes."""

    key: str
    type: str
    value: Any
    item: str | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    dims: tuple[int, ...]  # GGUF order, row length first
    type: GgmlType
    offset: int  # from the start of the file
    n_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Torch order, [rows…, columns]."""
        return tuple(reversed(self.dims))


@dataclass(frozen=True, slots=True)
class Header:
    metadata: tuple[KeyValue, ...]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_bytes: int

    def values(self) -> dict[str, Any]:
        return {kv.key: kv.value for kv in self.metadata}


def pad(n: int, alignment: int = ALIGNMENT) -> int:
    return -(-n // alignment) * alignment


def _text_bytes(text: str | bytes) -> int:
    return 8 + len(text if isinstance(text, bytes) else text.encode("utf-8"))


def _size(kind: str) -> int:
    return struct.calcsize("<" + _VALUE_TYPES[kind][1])


def key_value_bytes(kv: KeyValue) -> int:
    """Bytes of one metadata entry in the file."""
    size = _text_bytes(kv.key) + 4
    if kv.type == "STRING":
        return size + _text_bytes(kv.value)
    if kv.type == "ARRAY":
        assert kv.item is not None
        if kv.item == "STRING":
            return size + 12 + sum(_text_bytes(v) for v in kv.value)
        return size + 12 + len(kv.value) * _size(kv.item)
    return size + _size(kv.type)


def tensor_info_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of one tensor's entry in the header; llama.cpp drops trailing dimensions of 1."""
    return _text_bytes(name) + 4 + 8 * len(ggml_dims(shape)) + 4 + 8


def header_bytes(metadata: Sequence[KeyValue], table: Sequence[tuple[str, Sequence[int]]]) -> int:
    """Everything before the tensor data, padding included. `table` is (name, torch shape)."""
    size = 24 + sum(key_value_bytes(kv) for kv in metadata)
    return pad(size + sum(tensor_info_bytes(name, shape) for name, shape in table))


class _Cursor:
    """Bounds-checked reads; every length is held against what is left of the file first."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.end = data, path, 0, len(data)

    def fail(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}", "the file is damaged or incomplete; fetch it again")

    def need(self, n: int, what: str) -> None:
        if n > self.end - self.at:
            raise self.fail(f"ends inside {what}")

    def unpack(self, fmt: str, what: str) -> Any:
        size = struct.calcsize("<" + fmt)
        self.need(size, what)
        value = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += size
        return value[0] if len(value) == 1 else value

    def text(self, what: str) -> str | bytes:
        n = self.unpack("Q", what)
        self.need(n, what)
        raw = self.data[self.at : self.at + n]
        self.at += n
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def name(self, what: str) -> str:
        text = self.text(what)
        if isinstance(text, bytes) or not text or len(text) > 65535:
            raise self.fail(f"{what} is not a name")
        return text


def _read_value(cursor: _Cursor, key: str) -> KeyValue:
    number = cursor.unpack("I", f"'{key}'")
    kind = _VALUE_NAMES.get(number)
    if kind is None:
        raise cursor.fail(f"metadata '{key}' has unknown value type {number}")
    if kind == "STRING":
        return KeyValue(key, kind, cursor.text(f"'{key}'"))
    if kind != "ARRAY":
        return KeyValue(key, kind, cursor.unpack(_VALUE_TYPES[kind][1], f"'{key}'"))
    number, count = cursor.unpack("IQ", f"'{key}'")
    item = _VALUE_NAMES.get(number)
    if item is None or item == "ARRAY":
        raise cursor.fail(f"metadata '{key}' is an array of unknown value type {number}")
    if count > _MOST_ITEMS:
        raise cursor.fail(f"metadata '{key}' claims {count} items")
    if item == "STRING":
        cursor.need(8 * count, f"'{key}'")
        return KeyValue(key, kind, tuple(cursor.text(f"'{key}'") for _ in range(count)), item)
    cursor.need(_size(item) * count, f"'{key}'")
    values = struct.unpack_from(f"<{count}{_VALUE_TYPES[item][1]}", cursor.data, cursor.at)
    cursor.at += _size(item) * count
    return KeyValue(key, kind, values, item)


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GgmlType, int]:
    name = cursor.name("a tensor name")
    n_dims = cursor.unpack("I", f"tensor '{name}'")
    if not 1 <= n_dims <= 4:
        raise cursor.fail(f"tensor '{name}' has {n_dims} dimensions")
    dims = tuple(cursor.unpack("Q", f"tensor '{name}'") for _ in range(n_dims))
    number, offset = cursor.unpack("IQ", f"tensor '{name}'")
    kind = TYPES_BY_ID.get(number)
    if kind is None:
        raise cursor.fail(f"tensor '{name}' has type number {number}, which is not supported")
    if 0 in dims or dims[0] % kind.block:
        raise cursor.fail(f"tensor '{name}' of type {kind.name} has the impossible shape {dims}")
    return name, dims, kind, offset


def read_header(path: Path) -> Header:
    """Read and check a GGUF v2 or v3 header. Raises ConfigError with one line for anything wrong."""
    try:
        with path.open("rb") as f:
            if f.read(4) != MAGIC:
                raise ConfigError(f"{path}: not a GGUF file", "it does not start with 'GGUF'")
            f.seek(0)
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(_Cursor(data, path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _read_header(cursor: _Cursor) -> Header:
    cursor.at = 4
    version = cursor.unpack("I", "the header")
    if version not in (2, 3):
        hint = "a big-endian file?" if version & 0xFFFF == 0 else "versions 2 and 3 are read"
        raise ConfigError(f"{cursor.path}: GGUF version {version} is not supported", hint)
    n_tensors, n_kv = cursor.unpack("QQ", "the header")
    # the smallest entries: name of one byte, one dimension; key of one byte, one byte of value
    if n_tensors * 33 + n_kv * 14 > cursor.end:
        raise cursor.fail(f"claims {n_tensors} tensors and {n_kv} metadata entries, more than it can hold")
    metadata: dict[str, KeyValue] = {}
    for _ in range(n_kv):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata '{key}' appears twice")
        metadata[key] = _read_value(cursor, key)
    found = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    if len({name for name, *_ in found}) != len(found):
        raise cursor.fail("a tensor name appears twice")
    align = metadata.get("general.alignment")
    alignment = ALIGNMENT if align is None else align.value
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment!r:.40} is not a power of two")
    start = pad(cursor.at, alignment)
    tensors = []
    for name, dims, kind, offset in found:
        n_bytes = kind.row_bytes(dims[0]) * math.prod(dims[1:])
        if offset % alignment or start + offset + n_bytes > cursor.end:
            raise cursor.fail(f"tensor '{name}' lies beyond the end of the file")
        tensors.append(TensorInfo(name, dims, kind, start + offset, n_bytes))
    ordered = sorted(tensors, key=lambda t: t.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.n_bytes > other.offset:
            raise cursor.fail(f"tensors '{one.name}' and '{other.name}' overlap")
    return Header(tuple(metadata.values()), tuple(tensors), start, cursor.end)
