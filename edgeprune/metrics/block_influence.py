"""Block influence: 1 - cos(input, output) of a layer, an attention block or an FFN block (arXiv:2403.03853).

A whole block is the unit. On the axes of channels and groups every unit carries an equal part of its
block's influence by cost, so a pooled list takes whole blocks, the least influential first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric, Need, Option, n_units, present_units, unit_params

_PLACE = {"layer": 0, "attention": 1, "kv": 1, "ffn_block": 2, "ffn": 2}


def influence(view: LayerView, block: str) -> float:
    """1 - cos of 'layer', 'attention' (or 'kv'), 'ffn_block' (or 'ffn')."""
    return max(0.0, 1.0 - float(view.stat(Need.BLOCK_COSINE)[_PLACE[block]]))


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    n = n_units(view, unit)
    if options["scope"] == "block":
        return np.full(n, influence(view, unit) / n)
    # both blocks of a layer leave together: the same influence per parameter
    params = sum(n_units(view, kind) * unit_params(view, kind) for kind in present_units(view))
    return np.full(n, influence(view, "layer") * unit_params(view, unit) / params)


METRIC = Metric(
    name="block-influence",
    summary="how far a block turns the stream; removes blocks",
    reference="arXiv:2403.03853",
    needs=lambda options: frozenset((Need.BLOCK_COSINE,)),
    score=score,
    poolable=lambda options: True,
    options={
        "scope": Option(
            default="block",
            choices=("block", "layer"),
            help="block: attention and FFN blocks on their own; layer: whole layers, as the paper",
            origin="paper",
        ),
    },
)
