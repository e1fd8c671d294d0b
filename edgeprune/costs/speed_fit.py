"""From a few timed probe files to the speed model of one device. Least squares, standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.costs.speed import CACHE, REFERENCE, mix_of
from edgeprune.records import SpeedModel

_LAYER, _TOKEN = "layers", "tokens"
# how much a probe's time may differ from the model, and a parameter from its start (both relative)
_PROBE_SD, _START_SD = 0.02, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One timed file: bytes read per token by tensor type, cache bytes, layers, nanoseconds per token."""

    read: Mapping[str, float]
    cache: float
    layers: int
    ns: float

    def amounts(self) -> dict[str, float]:
        """What the time is a sum over: type -> bytes, the cache, layers, and one token."""
        kinds = {k: v for k, v in self.read.items() if k != "F32"}
        return {**kinds, CACHE: self.cache, _LAYER: float(self.layers), _TOKEN: 1.0}


def fit(probes: Sequence[Probe], start: SpeedModel) -> SpeedModel:
    """The start model moved to what was measured: rates by type, time per layer and per token.

    Types that no probe holds follow the ones that were measured by the ratio the start gives them.
    """
    guess = _start(start)
    names = sorted({n for p in probes for n in p.amounts()} & set(guess))
    rows = [p.amounts() for p in probes]
    # weighted rows: relative residuals of the probes, then relative distance from the start
    matrix = [
        [r.get(n, 0.0) * guess[n] / p.ns / _PROBE_SD for n in names]
        for r, p in zip(rows, probes, strict=True)
    ]
    right = [1 / _PROBE_SD] * len(probes)
    # memory speeds the whole device up or down, so the first guess is scaled by the data itself
    scale = _median(
        p.ns / sum(r[n] * guess[n] for n in names if n in r) for r, p in zip(rows, probes, strict=True)
    )
    for i, name in enumerate(names):
        sure = _START_SD * (4 if name == _TOKEN else 1)
        matrix.append([1 / sure if j == i else 0.0 for j in range(len(names))])
        right.append(scale / sure if name not in (_LAYER, _TOKEN) else 1 / sure)
    found = {n: x * guess[n] for n, x in zip(names, _nonnegative(matrix, right), strict=True)}
    return _model(found, guess, scale, start)


def residuals(probes: Sequence[Probe], model: SpeedModel) -> list[float]:
    """Predicted over measured time, less one, of every probe."""
    from edgeprune.costs.speed import decode_ns

    return [decode_ns(dict(p.read), p.cache, p.layers, model) / p.ns - 1 for p in probes]


def _start(model: SpeedModel) -> dict[str, float]:
    """Nanoseconds per byte, per layer and per token that a model stands for."""
    ns = 1e9 / model.bandwidth_bytes_per_s
    out = {kind: ns / factor for kind, factor in model.type_factors.items()}
    out.setdefault(CACHE, ns)
    return {**out, _LAYER: max(model.layer_ns, 1e3), _TOKEN: max(model.token_ns, 2e4)}


def _model(
    found: Mapping[str, float], guess: Mapping[str, float], scale: float, start: SpeedModel
) -> SpeedModel:
    import dataclasses

    every = {k: found.get(k, v * scale) for k, v in guess.items() if k not in (_LAYER, _TOKEN)}
    # a rate of zero nanoseconds would be infinite: the data cannot tell it from a very fast one
    every = {k: max(v, guess[k] * scale / 20) for k, v in every.items()}
    mix = mix_of(REFERENCE)
    reference = sum(share * every[kind] for kind, share in mix.items())
    return dataclasses.replace(
        start,
        bandwidth_bytes_per_s=1e9 / reference,
        layer_ns=found.get(_LAYER, start.layer_ns),
        token_ns=found.get(_TOKEN, start.token_ns),
        type_factors={kind: reference / ns for kind, ns in every.items()},
    )


def _nonnegative(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Least squares with no negative unknown, by coordinate descent; the problem is convex."""
    n = len(matrix[0])
    gram = [[sum(row[i] * row[j] for row in matrix) for j in range(n)] for i in range(n)]
    rhs = [sum(row[i] * b for row, b in zip(matrix, right, strict=True)) for i in range(n)]
    x = [1.0] * n
    for _ in range(20_000):
        change = 0.0
        for i in range(n):
            if gram[i][i] == 0:
                continue
            value = max(0.0, x[i] + (rhs[i] - sum(gram[i][j] * x[j] for j in range(n))) / gram[i][i])
            change = max(change, abs(value - x[i]))
            x[i] = value
        if change < 1e-10:
            break
    return x


def _median(values: object) -> float:
    ordered = sorted(values)  # type: ignore[call-overload]
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return float(math.sqrt(ordered[middle - 1] * ordered[middle]))
