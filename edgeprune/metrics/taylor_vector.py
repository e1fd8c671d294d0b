"""First-order Taylor score of whole channels: sum over matrices of |sum_k G W| (arXiv:2305.11627).

Equal to the size of the loss's derivative with respect to a gate on the channel, so no weight gradient
is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric, Need, fold, n_units, vector_roles


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    total = np.zeros(n_units(view, unit))
    for role in vector_roles(view, unit):
        mean = view.role_stat(Need.SAMPLE_VECTOR, role).mean(axis=0, dtype=np.float64)
        total += fold(view, unit, np.abs(mean))
    return total


METRIC = Metric(
    name="taylor-vector",
    summary="first-order loss change of whole channels",
    reference="arXiv:2305.11627",
    needs=lambda options: frozenset((Need.SAMPLE_VECTOR,)),
    score=score,
    poolable=lambda options: True,
)
