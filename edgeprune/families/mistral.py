"""Mistral 7B and others of `model_type: mistral`: Llama's layers, some with a window (arXiv:2310.06825).

llama.cpp reads them as Llama and knows no window there, so the context ends where the window does.
"""

from __future__ import annotations

from typing import Any

from edgeprune.families.base import Family, check_activation, layer_roles, read_common, sliding_window
from edgeprune.families.llama import DECI_ARCH, LLAMA_ARCH
from edgeprune.records import ModelDims


def read_dims(config: dict[str, Any]) -> ModelDims:
    check_activation(config, "hidden_act", ("silu", "swish"))
    window = sliding_window(config, switch=False)
    return read_common(config, "mistral", kv_heads=8, context=131_072, most_context=window)


FAMILY = Family(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    summary="Mistral 7B, Ministral",
    reference="arXiv:2310.06825",
    read_dims=read_dims,
    roles=layer_roles(),
    gguf=(LLAMA_ARCH, DECI_ARCH),
)
