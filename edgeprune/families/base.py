"""What a family has to say about itself: names, couplings, index rules. No weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import UnsupportedModelError
from edgeprune.records import Axis, LayerShape, ModelDims, TensorSlice

# Larger sizes than any published decoder; a config beyond them is damaged or hostile.
_MOST = {"vocab_size": 2_000_000, "hidden_size": 131_072, "num_hidden_layers": 1_024}
_MOST_WIDTH = 1_048_576

LAYER_LIST_KEY = (
    "edgeprune_layers"  # [n_heads, n_kv_heads, n_ff] per layer, in config.json of a non-uniform model
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One decoder family.

    Attributes:
        model_type: `model_type` of config.json.
        read_dims: config.json (as a dict) to ModelDims; raises UnsupportedModelError.
        roles: role to Hugging Face module name; `{l}` is the layer index.
        gguf_arch: architecture name that llama.cpp knows uniform models by.
        gguf_carrier: architecture that loads per-layer widths with equal logits, or None.
        gguf_permute_qk: llama.cpp stores Q and K rows in NORM rotary order for this family.
        qk_norm: queries and keys pass a norm per head, so their signed Taylor sums are about zero.
    """

    model_type: str
    summary: str
    reference: str
    read_dims: Callable[[dict[str, Any]], ModelDims]
    roles: dict[str, str]
    gguf_arch: str
    gguf_carrier: str | None
    gguf_permute_qk: bool
    qk_norm: bool = False

    def tensor(self, role: str, layer: int | None = None, suffix: str = "weight") -> str:
        """Hugging Face tensor name of a role ('q', 'down', 'embed', …)."""
        return f"{self.roles[role].format(l=layer)}.{suffix}"

    def layer_shapes(self, dims: ModelDims, layer: int) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes of one decoder layer, [out, in] for matrices."""
        shape, d, dh = dims.layers[layer], dims.hidden, dims.head_dim
        out: dict[str, tuple[int, ...]] = {}
        if shape.n_kv_heads:
            q, kv = shape.n_heads * dh, shape.n_kv_heads * dh
            out[self.tensor("attn_norm", layer)] = (d,)
            for role, rows, cols in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
                out[self.tensor(role, layer)] = (rows, cols)
                if dims.o_bias if role == "o" else dims.qkv_bias:
                    out[self.tensor(role, layer, "bias")] = (rows,)
        if shape.n_ff:
            out[self.tensor("ffn_norm", layer)] = (d,)
            for role, rows, cols in (
                ("gate", shape.n_ff, d),
                ("up", shape.n_ff, d),
                ("down", d, shape.n_ff),
            ):
                out[self.tensor(role, layer)] = (rows, cols)
                if dims.mlp_bias:
                    out[self.tensor(role, layer, "bias")] = (rows,)
        return out

    def global_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        """Tensors outside the decoder layers."""
        out: dict[str, tuple[int, ...]] = {self.tensor("embed"): (dims.vocab, dims.hidden)}
        out[self.tensor("final_norm")] = (dims.hidden,)
        if not dims.tied:
            out[self.tensor("head")] = (dims.vocab, dims.hidden)
        return out

    def layer_axes(self, dims: ModelDims, layer: int) -> tuple[Axis, ...]:
        """The prunable axes of one layer: KV groups and FFN channels."""
        shape, dh = dims.layers[layer], dims.head_dim
        axes = []
        if shape.n_kv_heads:
            g = shape.n_heads // shape.n_kv_heads
            slices = [
                TensorSlice(tensor=self.tensor("q", layer), dim=0, block=g * dh),
                TensorSlice(tensor=self.tensor("k", layer), dim=0, block=dh),
                TensorSlice(tensor=self.tensor("v", layer), dim=0, block=dh),
                TensorSlice(tensor=self.tensor("o", layer), dim=1, block=g * dh),
            ]
            params = (2 + 2 * g) * dims.hidden * dh
            if dims.qkv_bias:
                slices += [
                    TensorSlice(tensor=self.tensor(role, layer, "bias"), dim=0, block=block)
                    for role, block in (("q", g * dh), ("k", dh), ("v", dh))
                ]
                params += (g + 2) * dh
            axes.append(
                Axis(
                    name=f"layers.{layer}.kv",
                    unit="kv",
                    layer=layer,
                    n_units=shape.n_kv_heads,
                    unit_params=params,
                    slices=tuple(slices),
                )
            )
        if shape.n_ff:
            slices = [
                TensorSlice(tensor=self.tensor("gate", layer), dim=0, block=1),
                TensorSlice(tensor=self.tensor("up", layer), dim=0, block=1),
                TensorSlice(tensor=self.tensor("down", layer), dim=1, block=1),
            ]
            params = 3 * dims.hidden
            if dims.mlp_bias:
                slices += [
                    TensorSlice(tensor=self.tensor(role, layer, "bias"), dim=0, block=1)
                    for role in ("gate", "up")
                ]
                params += 2
            axes.append(
                Axis(
                    name=f"layers.{layer}.ffn",
                    unit="ffn",
                    layer=layer,
                    n_units=shape.n_ff,
                    unit_params=params,
                    slices=tuple(slices),
                )
            )
        return tuple(axes)


def config_int(
    config: dict[str, Any], key: str, default: int | None = None, *, most: int | None = None
) -> int:
    """Read a positive integer of config.json. Raises UnsupportedModelError naming the key."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedModelError(f"config.json has no '{key}'", "is this a complete model folder?")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"config.json: '{key}' is {value!r:.60}, expected a positive integer")
    limit = most or _MOST.get(key, _MOST_WIDTH)
    if value > limit:
        raise UnsupportedModelError(
            f"config.json: '{key}' is {value}, beyond {limit}", "the file looks damaged"
        )
    return value


def config_float(config: dict[str, Any], key: str, default: float) -> float:
    """Read a positive number of config.json. Raises UnsupportedModelError naming the key."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"config.json: '{key}' is {value!r:.60}, expected a positive number")
    return float(value)


def config_layers(config: dict[str, Any], n_layers: int, dense: LayerShape) -> tuple[LayerShape, ...]:
    """Per-layer widths: edgeprune's own list if the model was pruned unevenly, else the same everywhere."""
    rows = config.get(LAYER_LIST_KEY)
    if rows is None:
        return (dense,) * n_layers
    good = isinstance(rows, list) and len(rows) == n_layers
    layers = []
    for row in rows if good else ():
        if not (isinstance(row, list) and len(row) == 3 and all(type(v) is int and v >= 0 for v in row)):
            good = False
            break
        layers.append(LayerShape(n_heads=row[0], n_kv_heads=row[1], n_ff=row[2]))
    if not good:
        raise UnsupportedModelError(
            f"config.json: '{LAYER_LIST_KEY}' must list [heads, kv heads, ffn width] "
            f"for each of {n_layers} layers"
        )
    return tuple(layers)


def check_layers(layers: tuple[LayerShape, ...]) -> None:
    """Raises UnsupportedModelError when query heads do not divide evenly over KV heads."""
    for index, shape in enumerate(layers):
        if (shape.n_kv_heads == 0) != (shape.n_heads == 0) or (
            shape.n_kv_heads and shape.n_heads % shape.n_kv_heads
        ):
            raise UnsupportedModelError(
                f"layer {index}: {shape.n_heads} query heads cannot be shared by {shape.n_kv_heads} KV heads"
            )


def write_config(config: dict[str, Any], dims: ModelDims) -> dict[str, Any]:
    """config.json of a pruned model; stock transformers reads uniform ones, edgeprune.load all."""
    out = dict(config)
    out.pop(LAYER_LIST_KEY, None)
    first = dims.layers[0]
    out.update(
        vocab_size=dims.vocab,
        num_hidden_layers=len(dims.layers),
        num_attention_heads=first.n_heads,
        num_key_value_heads=first.n_kv_heads,
        intermediate_size=first.n_ff,
        head_dim=dims.head_dim,
    )
    if any(layer != first for layer in dims.layers) or not first.n_kv_heads or not first.n_ff:
        out.update(
            num_attention_heads=max(s.n_heads for s in dims.layers),
            num_key_value_heads=max(s.n_kv_heads for s in dims.layers),
            intermediate_size=max(s.n_ff for s in dims.layers),
        )
        out[LAYER_LIST_KEY] = [[s.n_heads, s.n_kv_heads, s.n_ff] for s in dims.layers]
    return out
