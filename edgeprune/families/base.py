"""What a family has to say about itself: names, couplings, index rules. No weights, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import UnsupportedModelError
from edgeprune.records import Axis, LayerShape, ModelDims, TensorSlice

# Larger sizes than any published decoder; a config beyond them is damaged or hostile.
_MOST = {"vocab_size": 2_000_000, "hidden_size": 131_072, "num_hidden_layers": 1_024}
_MOST_WIDTH = 1_048_576

LAYER_LIST_KEY = (
    "edgeprune_layers"  # [n_heads, n_kv_heads, n_ff] per layer, in config.json of a non-uniform model
)


# sup |f'| of what stands between gate and up; Lipschitz constants rounded up
ACTIVATION_LIPSCHITZ: Mapping[str, float] = {"silu": 1.1, "gelu_tanh": 1.13}

# matrices of a layer in the order in which a fused tensor holds their rows
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_BIAS_KIND = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp", "down": "mlp"}


def _no_keys(config: Mapping[str, Any], dims: ModelDims, layers: Sequence[int]) -> list[KeyValue]:
    return []


def _no_factor(config: Mapping[str, Any], dims: ModelDims, n_layers: int) -> float:
    return 1.0


def _no_problem(config: Mapping[str, Any], layers: Sequence[int]) -> str | None:
    return None


def _same_config(values: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArch:
    """One architecture of llama.cpp that computes this family, and which shapes it loads.

    Attributes:
        name: `general.architecture`.
        norm_order: Q and K rows lie in NORM rotary order (pairs), not as two halves.
        per_layer: heads and FFN widths may differ from layer to layer.
        fewer_heads: heads times head size may differ from the hidden size.
        no_attention: layers other than the first may lack attention.
        tied_only: the embedding is the output.
        biases: which of 'qkv', 'o', 'mlp' are loaded.
        fused: GGUF tensor to the roles whose rows it holds one after the other.
        keys: (config, dims of the file, indices of its layers in the model) to further metadata, names
            without the architecture.
        q_norm_factor: what the query norm is multiplied by, so that attention scores keep their scale.
        index_problem: (config, indices of the layers that stay) to why they cannot be written, or None.
    """

    name: str
    norm_order: bool = False
    per_layer: bool = False
    fewer_heads: bool = True
    no_attention: bool = False
    tied_only: bool = False
    biases: frozenset[str] = frozenset()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Callable[[Mapping[str, Any], ModelDims, Sequence[int]], list[KeyValue]] = _no_keys
    q_norm_factor: Callable[[Mapping[str, Any], ModelDims, int], float] = _no_factor
    index_problem: Callable[[Mapping[str, Any], Sequence[int]], str | None] = _no_problem

    def refuses(self, dims: ModelDims) -> str | None:
        """Why layers of these sizes do not load, or None. Empty layers have to be left out before."""
        first = dims.layers[0]
        if not first.n_kv_heads:
            return "layer 0 must keep its attention"
        if not self.per_layer and any(s != first or not s.n_ff for s in dims.layers):
            return "different widths per layer"
        if not self.no_attention and any(not s.n_kv_heads for s in dims.layers):
            return "layers without attention"
        if not self.fewer_heads and any(s.n_heads * dims.head_dim != dims.hidden for s in dims.layers):
            return "fewer heads"
        if self.tied_only and not dims.tied:
            return "an output of its own"
        have = {"qkv": dims.qkv_bias, "o": dims.o_bias, "mlp": dims.mlp_bias}
        odd = [kind for kind, there in have.items() if there and kind not in self.biases]
        return f"biases of {odd[0]}" if odd else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One decoder family.

    Attributes:
        model_type: `model_type` of config.json.
        hf_class: transformers class named in config.json.
        read_dims: config.json (as a dict) to ModelDims; raises UnsupportedModelError.
        roles: role to Hugging Face module name; `{l}` is the layer index. Roles of the same module are
            rows of one fused matrix, in the order of MATRICES.
        gguf: architectures of llama.cpp, the one to prefer first.
        read_gguf: (metadata without the architecture's name, config.json so far) to config.json.
        qk_norm: queries and keys pass a norm per head, so their signed Taylor sums are about zero.
        activation: of the FFN gate, a key of ACTIVATION_LIPSCHITZ.
        norm_offset: norms multiply by weight + this.
        scaled_embedding: the stream starts with embeddings times sqrt(hidden).
        rope_theta: where config.json says nothing.
    """

    model_type: str
    hf_class: str
    summary: str
    reference: str
    read_dims: Callable[[dict[str, Any]], ModelDims]
    roles: dict[str, str]
    gguf: tuple[GgufArch, ...]
    read_gguf: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = _same_config
    qk_norm: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    rope_theta: float = 10000.0

    @property
    def post_norms(self) -> bool:
        """Attention and FFN outputs pass a norm before they join the stream."""
        return "attn_post_norm" in self.roles

    def embed_scale(self, dims: ModelDims) -> float:
        return math.sqrt(dims.hidden) if self.scaled_embedding else 1.0

    def tensor(self, role: str, layer: int | None = None, suffix: str = "weight") -> str:
        """Hugging Face tensor name of a role ('q', 'down', 'embed', …); roles of a fused one share it."""
        return f"{self.roles[role].format(l=layer)}.{suffix}"

    def fused_with(self, role: str) -> tuple[str, ...]:
        """All roles of the tensor that holds this one, in row order."""
        return tuple(r for r in self.roles if self.roles[r] == self.roles[role])

    def _rows(self, dims: ModelDims, role: str, layer: int) -> tuple[int, int]:
        """[out, in] of a matrix."""
        shape, d, dh = dims.layers[layer], dims.hidden, dims.head_dim
        q, kv = shape.n_heads * dh, shape.n_kv_heads * dh
        sizes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "down": (d, shape.n_ff)}
        return sizes.get(role, (shape.n_ff, d))

    def columns(self, dims: ModelDims, role: str, layer: int) -> int:
        return self._rows(dims, role, layer)[1]

    def part(self, dims: ModelDims, role: str, layer: int, suffix: str = "weight") -> TensorSlice:
        """Where a matrix or its bias lies: `block` rows from `offset` of a tensor."""
        offset = 0
        for other in self.fused_with(role):
            if other == role:
                break
            offset += self._rows(dims, other, layer)[0]
        return TensorSlice(
            tensor=self.tensor(role, layer, suffix),
            dim=0,
            block=self._rows(dims, role, layer)[0],
            offset=offset,
        )

    def has_bias(self, dims: ModelDims, role: str) -> bool:
        return {"qkv": dims.qkv_bias, "o": dims.o_bias, "mlp": dims.mlp_bias}[_BIAS_KIND[role]]

    def layer_roles(self, shape: LayerShape) -> tuple[str, ...]:
        """Roles that a layer of these widths has, in the order of `roles`."""
        attention = {"attn_norm", "q", "k", "v", "o", "q_norm", "k_norm", "attn_post_norm"}
        ffn = {"ffn_norm", "gate", "up", "down", "ffn_post_norm"}
        here = (attention if shape.n_kv_heads else set()) | (ffn if shape.n_ff else set())
        return tuple(role for role in self.roles if role in here)

    def layer_shapes(self, dims: ModelDims, layer: int) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes of one decoder layer, [out, in] for matrices."""
        out: dict[str, tuple[int, ...]] = {}
        for role in self.layer_roles(dims.layers[layer]):
            name = self.tensor(role, layer)
            if role not in MATRICES:
                out[name] = (dims.head_dim if role in ("q_norm", "k_norm") else dims.hidden,)
                continue
            rows, cols = self._rows(dims, role, layer)
            before = out.get(name, (0, cols))[0]
            out[name] = (before + rows, cols)
            if self.has_bias(dims, role):
                out[self.tensor(role, layer, "bias")] = (before + rows,)
        return out

    def global_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        """Tensors outside the decoder layers."""
        out: dict[str, tuple[int, ...]] = {self.tensor("embed"): (dims.vocab, dims.hidden)}
        out[self.tensor("final_norm")] = (dims.hidden,)
        if not dims.tied:
            out[self.tensor("head")] = (dims.vocab, dims.hidden)
        return out

    def _axis(self, dims: ModelDims, layer: int, unit: str, n_units: int, roles: tuple[str, ...]) -> Axis:
        """Units that own equal runs of rows of `roles`, and of columns of the last of them."""
        slices, params = [], 0
        for role in roles[:-1]:
            part = self.part(dims, role, layer)
            slices.append(dataclasses.replace(part, block=part.block // n_units))
            params += part.block // n_units * dims.hidden
        columns = self._rows(dims, roles[-1], layer)[1] // n_units
        slices.append(TensorSlice(tensor=self.tensor(roles[-1], layer), dim=1, block=columns))
        params += columns * dims.hidden
        for role in roles[:-1]:
            if self.has_bias(dims, role):
                part = self.part(dims, role, layer, "bias")
                slices.append(dataclasses.replace(part, block=part.block // n_units))
                params += part.block // n_units
        return Axis(
            name=f"layers.{layer}.{unit}",
            unit=unit,
            layer=layer,
            n_units=n_units,
            unit_params=params,
            slices=tuple(slices),
        )

    def layer_axes(self, dims: ModelDims, layer: int, *, query_heads: bool = False) -> tuple[Axis, ...]:
        """The prunable axes of one layer: KV groups (or single query heads) and FFN channels.

        With `query_heads` attention gives up query heads, the same number in every KV group, and no group
        as a whole; where a group has one query head only, the group stays the unit.
        """
        shape = dims.layers[layer]
        axes = []
        if query_heads and shape.n_heads > shape.n_kv_heads:
            heads = self._axis(dims, layer, "q", shape.n_heads, ("q", "o"))
            axes.append(dataclasses.replace(heads, groups=shape.n_kv_heads))
        elif shape.n_kv_heads:
            axes.append(self._axis(dims, layer, "kv", shape.n_kv_heads, ("q", "k", "v", "o")))
        if shape.n_ff:
            axes.append(self._axis(dims, layer, "ffn", shape.n_ff, ("gate", "up", "down")))
        return tuple(axes)


def layer_roles(**over: str) -> dict[str, str]:
    """Module names that most families share; `over` adds or replaces some, keeping MATRICES in order."""
    names = {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    } | over
    outside = ("embed", "final_norm", "head")
    return {r: n if r in outside else f"model.layers.{{l}}.{n}" for r, n in names.items()}


_MULTIMODAL = ("gemma3",)  # whose text part is a family of its own


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's own part of a multimodal config.json; a plain one as it is."""
    inner = config.get("text_config")
    if config.get("model_type") not in _MULTIMODAL or not isinstance(inner, dict):
        return config
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    shared: dict[str, Any] = {key: config[key] for key in keys if key in config}
    return {"model_type": f"{config.get('model_type')}_text"} | shared | inner


def sliding_window(config: Mapping[str, Any], *, switch: bool) -> int | None:
    """Window of sliding attention, or None; with `switch` only where `use_sliding_window` says so."""
    if switch and not config.get("use_sliding_window"):
        return None
    if config.get("sliding_window") is None:
        return None
    return config_int(dict(config), "sliding_window")


def check_activation(config: Mapping[str, Any], key: str, known: tuple[str, ...]) -> None:
    """Raises UnsupportedModelError for another activation than the family's."""
    if config.get(key, known[0]) not in known:
        raise UnsupportedModelError(f"config.json: activation '{config[key]!s:.40}' is not {known[0]}")


def read_common(config: dict[str, Any], family: str, **over: Any) -> ModelDims:
    """Sizes by the keys that most families share. `over` are fields of ModelDims the family fixes, and:

    kv_heads, head_dim: defaults where config.json says nothing. context: its default.
    tied: default of `tie_word_embeddings`.
    """
    hidden = config_int(config, "hidden_size")
    n_heads = config_int(config, "num_attention_heads", over.pop("heads", None))
    head_dim = over.pop("head_dim", None)
    if config.get("head_dim") is None and head_dim is None and hidden % n_heads:
        raise UnsupportedModelError(f"config.json: {n_heads} heads do not divide the hidden size {hidden}")
    dense = LayerShape(
        n_heads=n_heads,
        n_kv_heads=config_int(config, "num_key_value_heads", over.pop("kv_heads", None) or n_heads),
        n_ff=config_int(config, "intermediate_size"),
    )
    layers = config_layers(config, config_int(config, "num_hidden_layers"), dense)
    check_layers(layers)
    most = over.pop("most_context", None) or 1 << 30
    context = config_int(config, "max_position_embeddings", over.pop("context", 2048), most=1 << 30)
    tied = config.get("tie_word_embeddings")
    default_tied = over.pop("tied", False)
    fields: dict[str, Any] = {"qkv_bias": False, "o_bias": False, "mlp_bias": False} | over
    return ModelDims(
        family=family,
        vocab=config_int(config, "vocab_size", fields.pop("vocab", None)),
        hidden=hidden,
        head_dim=config_int(config, "head_dim", head_dim or max(1, hidden // n_heads)),
        max_context=min(context, most),
        tied=bool(default_tied if tied is None else tied),
        rms_eps=config_float(config, "rms_norm_eps", fields.pop("eps", 1e-6)),
        layers=layers,
        **fields,
    )


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
        if not (
            isinstance(row, list)
            and len(row) == 3
            and all(type(v) is int and 0 <= v <= _MOST_WIDTH for v in row)
        ):
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
