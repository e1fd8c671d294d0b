"""How far scores depend on the calibration draw: their mean over seeds, and their rank correlation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprune.records import Axis, RankStability

Array: TypeAlias = npt.NDArray[Any]
Scores: TypeAlias = Mapping[str, Array]  # axis -> [n_units]


def average_ranks(values: Array) -> Array:
    """Ranks 1 … n of `values` [n] as float64; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[group.reshape(-1)]
    return ranks


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two lists [n], ties by average ranks.

    A list whose values are all equal has no order: 1 when both are so, 0 when one is.
    """
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    if size == 0.0:
        return float(not x.any() and not y.any())
    return float(np.clip(x @ y / size, -1.0, 1.0))


def mean_scores(draws: Sequence[Scores], *, poolable: bool) -> dict[str, Array]:
    """Mean over draws, [n_units] float32 per axis; one draw comes back as it is.

    Poolable scores keep their scale. Others are divided by their mean size per axis and draw first, so
    that a draw with larger activations does not count for more.
    """
    if len(draws) == 1:
        return dict(draws[0])
    out = {}
    for axis in draws[0]:
        rows = np.stack([np.asarray(draw[axis], dtype=np.float64) for draw in draws])
        if not poolable:
            size = np.abs(rows).mean(axis=1, keepdims=True)
            rows = rows / np.where(size > 0, size, 1.0)
        out[axis] = rows.mean(axis=0).astype(np.float32)
    return out


def rank_stability(draws: Sequence[Scores], axes: Sequence[Axis]) -> tuple[RankStability, ...]:
    """Spearman between draws, its mean over all pairs per axis; then mean and minimum over a kind's axes.

    Axes of one unit have no order and are left out. Empty for a single draw.
    """
    found: dict[str, list[float]] = {}
    if len(draws) > 1:
        for axis in axes:
            if axis.n_units > 1:
                pairs = itertools.combinations([draw[axis.name] for draw in draws], 2)
                found.setdefault(axis.unit, []).append(float(np.mean([spearman(a, b) for a, b in pairs])))
    return tuple(
        RankStability(unit=unit, axes=len(values), mean=float(np.mean(values)), minimum=min(values))
        for unit, values in sorted(found.items())
    )
