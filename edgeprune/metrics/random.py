"""Random scores from a seed: the sanity row every table needs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    n = view.shape.n_ff if unit == "ffn" else view.shape.n_kv_heads
    rng = np.random.default_rng([seed, view.layer, zlib.crc32(unit.encode())])
    return rng.random(n)


METRIC = Metric(
    name="random",
    summary="random scores from the seed",
    reference="baseline",
    needs=lambda options: frozenset(),
    score=score,
    poolable=lambda options: True,
)
