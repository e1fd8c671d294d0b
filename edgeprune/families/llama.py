"""Llama 1 to 3.x, SmolLM2, TinyLlama and others of `model_type: llama` (arXiv:2302.13971)."""

from __future__ import annotations

from typing import Any

from edgeprune.families.base import Family, GgufArch, check_activation, layer_roles, read_common
from edgeprune.records import ModelDims

_ALL_BIASES = frozenset(("qkv", "o", "mlp"))
LLAMA_ARCH = GgufArch(name="llama", norm_order=True, biases=_ALL_BIASES)
# the same function with widths per layer
DECI_ARCH = GgufArch(name="deci", norm_order=True, per_layer=True, no_attention=True, biases=_ALL_BIASES)


def read_dims(config: dict[str, Any]) -> ModelDims:
    check_activation(config, "hidden_act", ("silu", "swish"))
    bias = bool(config.get("attention_bias", False))
    mlp = bool(config.get("mlp_bias", False))
    return read_common(config, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=mlp)


FAMILY = Family(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    summary="Llama 1-3.x, SmolLM2, TinyLlama",
    reference="arXiv:2302.13971",
    read_dims=read_dims,
    roles=layer_roles(),
    gguf=(LLAMA_ARCH, DECI_ARCH),
)
