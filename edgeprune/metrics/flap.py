"""FLAP: fluctuation of the input times squared weights, standardised per layer (arXiv:2312.11983).

Column j of o_proj or down_proj: Var_t(x_j) * sum_i W_ij^2. Attention scores are squared, standardised column
by column and then averaged over a group, so groups stay near zero where single channels do not. Standardised
scores form one list over all layers; `compensation` replaces what is lost on average.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric, Need, Option, fold, group_columns, unit_params


def standardise(values: Array) -> Array:
    """Zero mean and unit variance over the columns of one layer; all zero where they are equal."""
    spread = float(values.std())
    if spread <= 1e-12 * float(np.abs(values).max(initial=0.0)):
        return np.zeros_like(values)
    standard: Array = (values - values.mean()) / spread
    return standard


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    role, need = ("down", Need.DOWN_IN_VARIANCE) if unit == "ffn" else ("o", Need.O_IN_VARIANCE)
    squares = np.square(view.weight(role)).sum(axis=0, dtype=np.float64)  # [columns]
    values: Array = view.stat(need).astype(np.float64) * squares
    if unit == "kv":
        values = np.square(values)
    if options["scale"] == "standardised":
        # the paper sorts standardised scores and lets cost decide only how far down the list to go
        values = standardise(values) * unit_params(view, unit)
    return fold(view, unit, values) / group_columns(view) if unit == "kv" else values


METRIC = Metric(
    name="flap",
    summary="fluctuation of the input x squared weights",
    reference="arXiv:2312.11983",
    needs=lambda options: frozenset((Need.DOWN_IN_VARIANCE, Need.O_IN_VARIANCE)),
    score=score,
    poolable=lambda options: options["scale"] == "standardised",
    options={
        "scale": Option(
            default="standardised",
            choices=("standardised", "raw"),
            help="standardised: mean 0 and variance 1 per layer, one list for all; raw: within a layer only",
            origin="paper",
        ),
    },
)
