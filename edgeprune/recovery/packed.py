"""Exact blocks of quantized tensors beside a model folder, so that export copies them instead of rounding.

They lie in a folder of their own: every *.safetensors file beside config.json would be taken for weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgeprune import rundir
from edgeprune.costs.gguf_types import TYPES
from edgeprune.errors import ConfigError
from edgeprune.recovery.methods.base import Packed

FOLDER = "edgeprune_packed"
_SHARD_BYTES = 1 << 29


def save(folder: Path, packed: Mapping[str, Packed]) -> None:
    """Write the blocks into a model folder, in place of older ones. Nothing is written for none."""
    target = folder / FOLDER
    part = folder / f".{FOLDER}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    with rundir.friendly_disk_errors(folder):
        try:
            if packed:
                part.mkdir()
                _write(part, packed)
            shutil.rmtree(target, ignore_errors=True)
            if packed:
                os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write(part: Path, packed: Mapping[str, Packed]) -> None:
    held: dict[str, np.ndarray] = {}
    meta: dict[str, str] = {}
    size = shard = 0

    def flush() -> None:
        nonlocal held, meta, size, shard
        if held:
            save_file(held, part / f"blocks-{shard:05d}.safetensors", metadata=meta)
            held, meta, size, shard = {}, {}, 0, shard + 1

    for name in packed:
        tensor = packed[name]
        if size + tensor.data.nbytes > _SHARD_BYTES:
            flush()
        held[name] = np.ascontiguousarray(tensor.data)
        meta[name] = json.dumps({"type": tensor.type, "shape": list(tensor.shape)})
        size += tensor.data.nbytes
    flush()


class PackedFolder(Mapping[str, Packed]):
    """The blocks of a model folder, read one tensor at a time. Raises ConfigError for damaged files."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[Path, str, tuple[int, int]]] = {}
        for path in sorted((folder / FOLDER).glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as f:
                    meta = f.metadata() or {}
                    for name in f.keys():  # noqa: SIM118
                        entry = json.loads(meta[name])
                        rows, columns = (int(n) for n in entry["shape"])
                        kind = TYPES[entry["type"]]
                        stored = tuple(f.get_slice(name).get_shape())
                        if stored != (rows, kind.row_bytes(columns)):
                            raise ValueError(f"{name} has {stored} bytes")
                        self._where[name] = path, kind.name, (rows, columns)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise _damaged(path, error) from None

    def __getitem__(self, name: str) -> Packed:
        path, kind, shape = self._where[name]
        try:
            with safe_open(path, framework="numpy") as f:
                data = f.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return Packed(type=kind, shape=shape, data=data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} is damaged: {error!s:.120}", f"recover again, or delete {path.parent} to round anew"
    )


def load(folder: Path) -> Mapping[str, Packed]:
    """The exact blocks of a model folder; empty where there are none."""
    return PackedFolder(folder)
