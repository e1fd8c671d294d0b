"""Qwen3, dense: queries and keys pass a norm per head (arXiv:2505.09388).

Widths per layer go through llama.cpp's `openelm`, which has the same layer but no output of its own:
tied models only (0.6B to 4B).
"""

from __future__ import annotations

from typing import Any

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import (
    Family,
    GgufArch,
    check_activation,
    layer_roles,
    read_common,
    sliding_window,
)
from edgeprune.records import ModelDims


def read_dims(config: dict[str, Any]) -> ModelDims:
    check_activation(config, "hidden_act", ("silu", "swish"))
    if config.get("attention_bias"):
        raise UnsupportedModelError("config.json: Qwen3 with 'attention_bias' is not covered")
    window = sliding_window(config, switch=True)
    return read_common(config, "qwen3", head_dim=128, context=32_768, most_context=window)


FAMILY = Family(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    summary="Qwen3, dense",
    reference="arXiv:2505.09388",
    read_dims=read_dims,
    roles=layer_roles(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    gguf=(
        GgufArch(name="qwen3"),
        GgufArch(name="openelm", per_layer=True, tied_only=True, fused={"attn_qkv": ("q", "k", "v")}),
    ),
    qk_norm=True,
)
