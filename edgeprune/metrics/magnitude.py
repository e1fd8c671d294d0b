"""L2 norm of all weights of a unit; the classical baseline (Han et al., arXiv:1506.02626, structured)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric, group_columns


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    if unit == "ffn":
        squares = np.square(view.weight("gate")).sum(axis=1, dtype=np.float64)
        squares += np.square(view.weight("up")).sum(axis=1, dtype=np.float64)
        squares += np.square(view.weight("down")).sum(axis=0, dtype=np.float64)
        norms: Array = np.sqrt(squares)
        return norms
    n, dh, group = view.shape.n_kv_heads, view.dims.head_dim, group_columns(view)
    squares = np.square(view.weight("q")).reshape(n, group, -1).sum(axis=(1, 2), dtype=np.float64)
    for role in ("k", "v"):
        squares += np.square(view.weight(role)).reshape(n, dh, -1).sum(axis=(1, 2), dtype=np.float64)
    squares += np.square(view.weight("o")).reshape(-1, n, group).sum(axis=(0, 2), dtype=np.float64)
    group_norms: Array = np.sqrt(squares)
    return group_norms


METRIC = Metric(
    name="magnitude",
    summary="L2 norm of the unit's weights",
    reference="arXiv:1506.02626",
    needs=lambda options: frozenset(),
    score=score,
    poolable=lambda options: False,
)
