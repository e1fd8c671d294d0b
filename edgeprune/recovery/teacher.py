"""The dense parent's most likely tokens for training rows: worked out when needed, kept on disk if asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.recovery.objective import top_log_probs

TOP = 64  # tokens kept per position
CACHE_BYTES = 2 << 30

Targets = tuple[torch.Tensor, torch.Tensor]  # ids int32 and log-probabilities float32, [n, T, k]


class Cache:
    """Targets of numbered rows in two mapped files, `done` marking rows that are there.

    Memory stays bounded by the page cache; rows beyond `most_bytes` are not kept. Space on the disk is taken
    before a row is written, for a full disk under a mapped file ends the program; then an OSError is raised.
    """

    def __init__(
        self, folder: Path, n_rows: int, n_tokens: int, k: int, *, most_bytes: int = CACHE_BYTES
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = min(n_rows, max(0, most_bytes // (n_tokens * k * 8)))
        shape = (max(self.rows, 1), n_tokens, k)

        self._open: dict[str, Any] = {}

        def mapped(name: str, kind: Any, size: tuple[int, ...]) -> Any:
            path = folder / name
            fresh = not path.is_file() or path.stat().st_size != int(np.prod(size)) * np.dtype(kind).itemsize
            self._open[name] = path.open("wb+" if fresh else "rb+")
            if fresh:
                self._open[name].truncate(int(np.prod(size)) * np.dtype(kind).itemsize)
            return np.memmap(self._open[name], dtype=kind, mode="r+", shape=size)

        self._ids = mapped("parent-ids.bin", np.int32, shape)
        self._values = mapped("parent-values.bin", np.float32, shape)
        self._done = mapped("parent-done.bin", np.uint8, shape[:1])
        self._row_bytes = n_tokens * k * 4
        self._reserve("parent-done.bin", 0, shape[0])

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Of these rows, those to work out."""
        inside = rows < self.rows
        known = np.zeros(len(rows), dtype=bool)
        known[inside] = self._done[rows[inside]] == 1
        return rows[~known]

    def put(self, rows: np.ndarray, targets: Targets) -> None:
        inside = rows < self.rows
        for row in rows[inside].tolist():
            for name in ("parent-ids.bin", "parent-values.bin"):
                self._reserve(name, row * self._row_bytes, self._row_bytes)
        self._ids[rows[inside]] = targets[0][torch.from_numpy(inside)].numpy()
        self._values[rows[inside]] = targets[1][torch.from_numpy(inside)].numpy()
        self._done[rows[inside]] = 1

    def _reserve(self, name: str, start: int, n_bytes: int) -> None:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(self._open[name].fileno(), start, n_bytes)

    def get(self, rows: np.ndarray) -> Targets:
        return torch.from_numpy(self._ids[rows]), torch.from_numpy(self._values[rows])


class Teacher:
    """Gives targets of rows; `cache` keeps what was worked out. `model` None: only what the cache holds."""

    def __init__(
        self, model: nn.Module | None, *, k: int = TOP, cache: Cache | None = None, micro: int = 8
    ) -> None:
        self._model, self._k, self._cache, self._micro = model, k, cache, micro

    def compute(self, tokens: np.ndarray) -> Targets:
        """Targets of [n, T] token ids, on the CPU."""
        assert self._model is not None
        device = next(self._model.parameters()).device
        ids, values = [], []
        with torch.no_grad():
            for start in range(0, len(tokens), self._micro):
                part = torch.from_numpy(np.ascontiguousarray(tokens[start : start + self._micro])).long()
                found = top_log_probs(self._model(part.to(device), use_cache=False).logits, self._k)
                ids.append(found[0].cpu())
                values.append(found[1].cpu())
        return torch.cat(ids), torch.cat(values)

    def targets(self, rows: np.ndarray, tokens: np.ndarray) -> Targets:
        """Targets of rows numbered `rows` [n] that hold `tokens` [n, T]."""
        if self._cache is None:
            return self.compute(tokens)
        missing = self._cache.missing(rows)
        if not len(missing):
            return self._cache.get(rows)
        where = np.isin(rows, missing)
        fresh = self.compute(tokens[where])
        self._cache.put(rows[where], fresh)
        out = (torch.empty((*tokens.shape, fresh[0].shape[-1]), dtype=torch.int32),)
        ids, values = out[0], torch.empty((*tokens.shape, fresh[1].shape[-1]))
        chosen = torch.from_numpy(where)
        ids[chosen], values[chosen] = fresh
        if not where.all():
            ids[~chosen], values[~chosen] = self._cache.get(rows[~where])
        return ids, values

    def release(self) -> None:
        """Let go of the parent's weights; from now on only cached rows can be asked for."""
        self._model = None
