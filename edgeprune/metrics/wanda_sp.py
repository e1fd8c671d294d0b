"""Structured Wanda: mean over outputs of |W_ij|, times the input's norm (arXiv:2306.11695, arXiv:2312.11983).

Scores o_proj and down_proj columns; the pruned output of a layer feeds the next one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric, Need, fold, sequential_option


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    role, need = ("down", Need.DOWN_IN_SQUARES) if unit == "ffn" else ("o", Need.O_IN_SQUARES)
    size = np.abs(view.weight(role)).mean(axis=0, dtype=np.float64)  # [columns]
    return fold(view, unit, size * np.sqrt(view.stat(need)))


METRIC = Metric(
    name="wanda-sp",
    summary="weight size x input norm, layer after layer",
    reference="arXiv:2312.11983",
    needs=lambda options: frozenset((Need.DOWN_IN_SQUARES, Need.O_IN_SQUARES)),
    score=score,
    poolable=lambda options: False,
    options={"sequential": sequential_option("yes", "paper")},
)
