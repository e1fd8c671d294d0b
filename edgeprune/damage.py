"""A cheap model of quality: the KL of a candidate from what it gives up, with its uncertainty. Arrays only.

To second order the KL of small independent errors adds up. So it is taken as linear in figures that are known
before a file is made (rounding error of each class of matrices, share of the layers that is cut, …), with a
Gaussian prior on each coefficient and noise in proportion to the value. Ours: no paper has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MISFIT = 0.25  # what the sum of the terms leaves out, of the value, before anything was measured
MISFIT_WEIGHT = 2.0  # measurements that this counts as
FLOOR = 1e-3  # nats/token
BAND = 1.2816  # standard errors on either side of an 80% interval
ROUNDS = 4  # the noise depends on the fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A coefficient, in nats per token for a feature of 1, and how little is known of it."""

    name: str
    value: float
    stderr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A measured candidate: its features by term, its KL and the error of that in nats/token."""

    features: Mapping[str, float]
    kl: float
    stderr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted KL in nats/token; errors multiply: `spread` is the standard deviation of its logarithm."""

    kl: float
    spread: float

    @property
    def low(self) -> float:
        """Lower end of the 80% interval."""
        return self.kl * math.exp(-BAND * self.spread) if self.kl > FLOOR else 0.0

    @property
    def high(self) -> float:
        return max(self.kl, FLOOR) * math.exp(BAND * self.spread)

    def below(self, limit: float) -> float:
        """Probability that the KL is below a limit."""
        z = math.log(max(limit, 1e-12) / max(self.kl, FLOOR)) / self.spread
        return 0.5 * math.erfc(-z / math.sqrt(2))

    def gain(self, best: float) -> float:
        """Expected nats per token by which it is below `best`, counting nothing where it is above."""
        kl = max(self.kl, 1e-9)
        d = math.log(max(best, 1e-12) / kl) / self.spread
        mean = kl * math.exp(self.spread**2 / 2)
        inside = 0.5 * math.erfc(-(d - self.spread) / math.sqrt(2))
        return best * 0.5 * math.erfc(-d / math.sqrt(2)) - mean * inside


class Model:
    """What is known of the terms after some measurements."""

    def __init__(self, terms: Sequence[Term], covariance: np.ndarray, misfit: float = MISFIT) -> None:
        self.terms = tuple(terms)
        self.misfit = misfit
        self._values = np.array([term.value for term in self.terms])
        self._covariance = covariance  # [n_terms, n_terms]

    def predict(self, features: Mapping[str, float]) -> Estimate:
        """A candidate's KL; features that no term has count nothing."""
        row = _row(self.terms, features)
        kl = max(float(row @ self._values), 0.0)
        error = float(np.sqrt(row @ self._covariance @ row + (self.misfit * kl) ** 2 + FLOOR**2))
        return Estimate(kl=kl, spread=float(np.sqrt(np.log1p((error / max(kl, FLOOR)) ** 2))))


def fit(priors: Sequence[Term], seen: Sequence[Seen]) -> Model:
    """The terms given what was measured; none falls below zero, for nothing that is given up adds quality.

    Prior and noise are Gaussian, the noise's deviation in proportion to the predicted value, so that a
    candidate that is nearly dense says as much about its terms as one that is badly hurt. How large it is
    comes from what the fit leaves over: candidates that are alike leave less than the first guess.
    """
    means = np.array([term.value for term in priors])
    precision = 1 / np.array([term.stderr for term in priors]) ** 2
    rows = np.array([_row(priors, one.features) for one in seen]).reshape(len(seen), len(priors))
    kl = np.array([one.kl for one in seen])
    stderr = np.array([one.stderr for one in seen])
    values, covariance = means.copy(), np.diag(1 / precision)
    # the first guess of the noise is the measurement itself: a prior far off must not drown it
    expected, misfit = kl, MISFIT
    for _ in range(ROUNDS):
        weights = 1 / ((misfit * expected) ** 2 + stderr**2 + FLOOR**2)
        values, covariance = _solve(means, precision, rows, kl, weights)
        fitted = np.maximum(rows @ values, 0.0)
        expected = (fitted + kl) / 2
        left = float((((kl - fitted) / np.maximum(expected, FLOOR)) ** 2).sum())
        spent = float((weights * np.einsum("ij,jk,ik->i", rows, covariance, rows)).sum())
        free = max(0.0, len(seen) - spent)
        misfit = float(np.sqrt((MISFIT_WEIGHT * MISFIT**2 + left) / (MISFIT_WEIGHT + free)))
    terms = [
        Term(name=term.name, value=float(v), stderr=float(s))
        for term, v, s in zip(priors, values, np.sqrt(np.diag(covariance)), strict=True)
    ]
    return Model(terms, covariance, misfit)


def _solve(
    means: np.ndarray, precision: np.ndarray, rows: np.ndarray, kl: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and covariance; terms that would be negative are held at zero, one after the other."""
    free = np.ones(len(means), dtype=bool)
    while True:
        a = rows[:, free]
        posterior = np.diag(precision[free]) + (a * weights[:, None]).T @ a
        right = precision[free] * means[free] + a.T @ (weights * kl)
        found = np.linalg.solve(posterior, right)
        if found.size == 0 or found.min() >= 0:
            break
        free[np.flatnonzero(free)[found.argmin()]] = False
    values = np.zeros(len(means))
    values[free] = found
    # what is held at zero may still be a little above it: half its prior's spread
    covariance = np.diag(np.where(free, 0.0, 0.25 / precision))
    covariance[np.ix_(free, free)] = np.linalg.inv(posterior)
    return values, covariance


def _row(terms: Sequence[Term], features: Mapping[str, float]) -> np.ndarray:
    return np.array([features.get(term.name, 0.0) for term in terms])
