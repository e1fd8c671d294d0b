"""Biases that give back what removed columns added on average: b = W[:, removed] mean(x_removed).

Of FLAP (arXiv:2312.11983), for o_proj and down_proj. Llama's classes load such biases; in GGUF they exist
for three architectures only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from edgeprune import checkpoint
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.metrics.base import Array, Need
from edgeprune.records import Axis, ModelDims, ModelGraph

NEEDS = frozenset((Need.O_IN_MEAN, Need.DOWN_IN_MEAN))
FAMILIES = frozenset(("llama",))  # whose transformers class has a bias on o and down
GGUF_ARCHITECTURES = frozenset(("llama", "deci", "mistral3"))

_PLACE = {"kv": ("o", Need.O_IN_MEAN), "q": ("o", Need.O_IN_MEAN), "ffn": ("down", Need.DOWN_IN_MEAN)}


def bias(weight: Array, mean_input: Array, kept: Sequence[int]) -> Array:
    """[out] float64: what the columns that are not kept added on average. `weight` is [out, in]."""
    gone = np.setdiff1d(np.arange(weight.shape[1]), np.asarray(kept, dtype=np.int64))
    lost: Array = weight[:, gone].astype(np.float64) @ mean_input[gone].astype(np.float64)
    return lost


def kept_columns(axis: Axis, kept: Sequence[int]) -> Array:
    """Input columns of o or down that stay, sorted."""
    part = next(part for part in axis.slices if part.dim == 1)
    units = np.asarray(kept, dtype=np.int64)
    columns: Array = (part.offset + units[:, None] * part.block + np.arange(part.block)).reshape(-1)
    return columns


def biases(
    source: checkpoint.Source,
    graph: ModelGraph,
    kept: Mapping[str, Sequence[int]],
    arrays: Mapping[str, Array],
) -> dict[str, Array]:
    """Name of every new bias tensor to [d] float32: the dense bias, if any, plus the compensation.

    `arrays` are calibration statistics of the dense model with NEEDS. Raises ConfigError without them.
    """
    family = graphs.find_family(graph.dims.family)
    out: dict[str, Array] = {}
    for axis in graph.axes:
        if axis.name not in kept or len(kept[axis.name]) == axis.n_units:
            continue
        role, need = _PLACE[axis.unit]
        mean = arrays.get(f"layers.{axis.layer}.{need.value}")
        if mean is None:
            raise ConfigError(f"compensation needs the calibration statistic {need.value}")
        weight = checkpoint.to_float32(source.tensor(family.tensor(role, axis.layer)))
        total = bias(weight, mean, kept_columns(axis, kept[axis.name]))
        name = family.tensor(role, axis.layer, "bias")
        if name in graph.shapes:
            total = total + checkpoint.to_float32(source.tensor(name))
        out[name] = total.astype(np.float32)
    return out


def compensated_dims(dims: ModelDims) -> ModelDims:
    """Sizes of the model with biases everywhere. Raises UnsupportedModelError where none can be loaded."""
    if dims.family not in FAMILIES:
        raise UnsupportedModelError(
            f"family {dims.family} has no place for biases on attn_output and ffn_down",
            "prune without bias compensation",
        )
    return dataclasses.replace(dims, qkv_bias=True, o_bias=True, mlp_bias=True)


class CompensatedSource(checkpoint.View):
    """A pruned source with biases: those given, and zeros where the class wants one as well.

    Save it with the shapes of `graph_of(family, compensated_dims(dims))`.
    """

    def __init__(self, source: checkpoint.Source, dims: ModelDims, new: Mapping[str, Array]) -> None:
        """`dims` and `source` are of the pruned model without these biases; `new` is from `biases`."""
        super().__init__(source, source.config | {"attention_bias": True, "mlp_bias": True})
        self._new = new
        family = graphs.find_family(dims.family)
        self._had = graphs.graph_of(family, dims).shapes
        self._shapes = graphs.graph_of(family, compensated_dims(dims)).shapes

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._new:
            return torch.from_numpy(np.ascontiguousarray(self._new[name], dtype=np.float32))
        if name not in self._had and name in self._shapes:
            return torch.zeros(self._shapes[name])
        return super().tensor(name)
