"""Two models on the same items: McNemar's exact test and a bootstrap interval of the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedAccuracy:
    """Accuracy of a less that of b on `n` common items."""

    n: int
    difference: float
    low: float  # 95% interval, bootstrap over items
    high: float
    only_a: int  # items that only a has right
    only_b: int
    p_value: float  # McNemar, exact, two-sided


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value: the discordant items fall either way with probability one half."""
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    # exact in integers, so that thousands of discordant items do not underflow
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def accuracy(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> PairedAccuracy:
    """Compare right (1) and wrong (0) answers to the same items."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"paired answers must have one length, got {first.shape} and {second.shape}")
    n = first.size
    only_a, only_b = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    # an item differs by -1, 0 or 1, so drawing items is drawing counts
    counts = np.random.default_rng(seed).multinomial(
        n, [only_a / n, only_b / n, max(0.0, 1 - (only_a + only_b) / n)], size=_DRAWS
    )
    drawn = (counts[:, 0] - counts[:, 1]) / n
    low, high = np.quantile(drawn, [0.025, 0.975])
    return PairedAccuracy(
        n=n,
        difference=float(first.mean() - second.mean()),
        low=float(low),
        high=float(high),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
    )
