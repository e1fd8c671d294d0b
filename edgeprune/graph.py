"""Build the ModelGraph of a checkpoint from its config.json: names, shapes, axes. No weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgeprune import registry
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import Family
from edgeprune.records import Axis, LayerShape, ModelDims, ModelGraph, make_key


def find_family(model_type: object) -> Family:
    """Raises UnsupportedModelError with the list of known families."""
    known = registry.names("families")
    if not isinstance(model_type, str) or model_type.replace("_", "-") not in known:
        raise UnsupportedModelError(
            f"model family {model_type!r:.80} is not supported", f"known families: {', '.join(known)}"
        )
    family: Family = registry.load("families", model_type.replace("_", "-"), "FAMILY")
    return family


def build(config: Mapping[str, Any]) -> ModelGraph:
    """Read config.json (as a dict). Raises UnsupportedModelError."""
    family = find_family(config.get("model_type"))
    return graph_of(family, family.read_dims(dict(config)))


def with_query_heads(graph: ModelGraph) -> ModelGraph:
    """The same model with single query heads as units of attention; see `Family.layer_axes`."""
    return graph_of(find_family(graph.dims.family), graph.dims, query_heads=True)


def like(graph: ModelGraph, axes: Iterable[str]) -> ModelGraph:
    """The graph that has axes of these names: with query heads where one of them is such an axis."""
    return with_query_heads(graph) if any(name.endswith(".q") for name in axes) else graph


def graph_of(family: Family, dims: ModelDims, *, query_heads: bool = False) -> ModelGraph:
    shapes: dict[str, tuple[int, ...]] = {}
    axes: list[Axis] = []
    decoder = 0
    for layer in range(len(dims.layers)):
        layer_shapes = family.layer_shapes(dims, layer)
        decoder += sum(math.prod(s) for s in layer_shapes.values())
        shapes.update(layer_shapes)
        axes += family.layer_axes(dims, layer, query_heads=query_heads)
    rest = family.global_shapes(dims)
    total = decoder + sum(math.prod(s) for s in rest.values())
    return ModelGraph(
        dims=dims,
        axes=tuple(axes),
        shapes=shapes | rest,
        decoder_params=decoder,
        total_params=total,
        key=make_key("model_graph", dims, *(["query heads"] if query_heads else [])),
    )


def prune_dims(graph: ModelGraph, kept: Mapping[str, Sequence[int]]) -> ModelDims:
    """Widths after keeping only the listed units; an axis that is not listed stays whole."""
    layers = []
    for index, shape in enumerate(graph.dims.layers):
        kv = kept.get(f"layers.{index}.kv")
        q = kept.get(f"layers.{index}.q")
        ff = kept.get(f"layers.{index}.ffn")
        n_kv = shape.n_kv_heads if kv is None else len(kv)
        n_q = shape.n_heads if q is None else len(q)
        group = n_q // shape.n_kv_heads if shape.n_kv_heads else 0
        layers.append(
            LayerShape(n_heads=n_kv * group, n_kv_heads=n_kv, n_ff=shape.n_ff if ff is None else len(ff))
        )
    return dataclasses.replace(graph.dims, layers=tuple(layers))
