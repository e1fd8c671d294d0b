"""First-order Taylor score, weight by weight: sum |G W| (arXiv:2305.11627, element-wise)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import ROLES, Array, LayerView, Metric, Need, fold, n_units


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    total = np.zeros(n_units(view, unit))
    for role in ROLES[unit]:
        total += fold(view, unit, view.role_stat(Need.MEAN_ELEMENT_ABS, role))
    return total


METRIC = Metric(
    name="taylor-element1",
    summary="first-order loss change, weight by weight",
    reference="arXiv:2305.11627",
    needs=lambda options: frozenset((Need.MEAN_ELEMENT_ABS,)),
    score=score,
    poolable=lambda options: True,
)
