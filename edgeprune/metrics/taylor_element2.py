"""Second-order Taylor score with a diagonal Fisher: sum W^2 mean_n g_n^2 (arXiv:2305.11627)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import ROLES, Array, LayerView, Metric, Need, fold, n_units


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    total = np.zeros(n_units(view, unit))
    for role in ROLES[unit]:
        total += fold(view, unit, view.role_stat(Need.ELEMENT_SECOND, role))
    return total


METRIC = Metric(
    name="taylor-element2",
    summary="second-order loss change, weight by weight",
    reference="arXiv:2305.11627",
    needs=lambda options: frozenset((Need.ELEMENT_SECOND,)),
    score=score,
    poolable=lambda options: True,
)
