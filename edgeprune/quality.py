"""Quality figures from per-token arrays [n_windows, n_tokens], with standard errors over windows.

Tokens of one window depend on each other, so a window is the independent unit: every standard error
is that of a ratio of window sums (cluster-robust). With a single window it falls back to tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32] | NDArray[np.float64]

# two-sided 95% quantiles of Student's t for 1..30 degrees of freedom
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its standard error and the number of independent units behind it."""

    value: float
    stderr: float
    units: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean of a - b per token, and its 95% interval from the same windows."""

    difference: float
    stderr: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """The interval holds zero: the two cannot be told apart."""
        return self.low <= 0.0 <= self.high


def mean_with_stderr(per_token: Array) -> Estimate:
    """Mean over all tokens of [n_windows, n_tokens]; the standard error is over windows.

    Windows have equal length, so this is the standard error of the mean of the window means.
    """
    values = np.asarray(per_token, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"expected a filled array [n_windows, n_tokens], got shape {values.shape}")
    units = values.mean(axis=1) if values.shape[0] > 1 else values[0]
    n = units.size
    stderr = float(units.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return Estimate(value=float(values.mean()), stderr=stderr, units=n)


def perplexity(nll: Array) -> Estimate:
    """exp of the mean negative log-likelihood; its standard error by the delta method, ppl * stderr."""
    mean = mean_with_stderr(nll)
    # beyond this exp overflows; such a model is broken, and a record holds finite numbers only
    value = math.exp(min(mean.value, 700.0))
    return Estimate(value=value, stderr=value * mean.stderr, units=mean.units)


def kl(per_token: Array) -> Estimate:
    """Mean KL divergence in nats per token; rounding may leave it a hair below zero, which reads as zero."""
    mean = mean_with_stderr(per_token)
    return Estimate(value=max(0.0, mean.value), stderr=mean.stderr, units=mean.units)


def agreement(argmax: NDArray[np.int32], parent: NDArray[np.int32]) -> Estimate:
    """Share of positions where both have the same most likely token."""
    return mean_with_stderr((np.asarray(argmax) == np.asarray(parent)).astype(np.float64))


def paired_difference(a: Array, b: Array) -> PairedDifference:
    """Compare two candidates measured on the same windows: mean(a - b) with a 95% t interval.

    Pairing removes what both find hard, so it tells apart candidates whose own intervals overlap.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired arrays must have one shape, got {first.shape} and {second.shape}")
    mean = mean_with_stderr(first - second)
    half = t95(mean.units - 1) * mean.stderr
    return PairedDifference(
        difference=mean.value, stderr=mean.stderr, low=mean.value - half, high=mean.value + half
    )


def t95(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t (1.96 in the limit)."""
    if degrees < 1:
        return math.inf
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    # first terms of the Cornish-Fisher expansion; within 0.0002 from 31 degrees up
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
