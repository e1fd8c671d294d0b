"""SmolLM3: Llama's layers, every fourth without rotary embedding (model card of HuggingFaceTB/SmolLM3-3B).

llama.cpp finds those layers by index, (i + 1) % 4 == 0, and nothing in the file can say otherwise: layers
may go only where the rest keeps to that rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import (
    Family,
    GgufArch,
    check_activation,
    config_int,
    layer_roles,
    read_common,
    sliding_window,
)
from edgeprune.records import ModelDims

_STEP = 4


def rotary(config: Mapping[str, Any]) -> list[bool]:
    """Which layers turn queries and keys. Raises UnsupportedModelError for a list of another length."""
    n_layers = config_int(dict(config), "num_hidden_layers")
    given = config.get("no_rope_layers")  # 1 where there is a rotary embedding, whatever the name says
    if given is None:
        step = config_int(dict(config), "no_rope_layer_interval", _STEP)
        return [(i + 1) % step != 0 for i in range(n_layers)]
    if not isinstance(given, list) or len(given) < n_layers:
        raise UnsupportedModelError(f"config.json: 'no_rope_layers' must list {n_layers} layers")
    return [bool(v) for v in given[:n_layers]]


def read_dims(config: dict[str, Any]) -> ModelDims:
    check_activation(config, "hidden_act", ("silu", "swish"))
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UnsupportedModelError("config.json: SmolLM3 with biases is not covered")
    rotary(config)
    window = sliding_window(config, switch=True)
    return read_common(config, "smollm3", kv_heads=4, context=32_768, tied=True, most_context=window)


def index_problem(config: Mapping[str, Any], layers: Sequence[int]) -> str | None:
    turns = rotary(config)
    for new, old in enumerate(layers):
        if turns[old] != ((new + 1) % _STEP != 0):
            return f"layer {old} would become layer {new}, whose rotary embedding is decided by its index"
    return None


FAMILY = Family(
    model_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    summary="SmolLM3",
    reference="https://huggingface.co/HuggingFaceTB/SmolLM3-3B",
    read_dims=read_dims,
    roles=layer_roles(),
    gguf=(GgufArch(name="smollm3", norm_order=True, index_problem=index_problem),),
    rope_theta=2_000_000.0,
)
