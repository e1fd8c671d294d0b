"""Phi-3 and Phi-3.5 mini, Phi-4: q, k, v in one matrix, gate and up in another (arXiv:2404.14219).

llama.cpp fixes the head count and knows no sliding window here: the context ends where the window does.
The 128k models (`longrope`) and partial rotary embeddings can be scored and pruned, not written to GGUF.
"""

from __future__ import annotations

from typing import Any

from edgeprune.families.base import (
    Family,
    GgufArch,
    check_activation,
    layer_roles,
    read_common,
    sliding_window,
)
from edgeprune.records import ModelDims

_QKV = "self_attn.qkv_proj"
_GATE_UP = "mlp.gate_up_proj"


def read_dims(config: dict[str, Any]) -> ModelDims:
    check_activation(config, "hidden_act", ("silu", "swish"))
    window = sliding_window(config, switch=False)
    return read_common(config, "phi3", context=4096, most_context=window, eps=1e-5)


FAMILY = Family(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    summary="Phi-3, Phi-3.5, Phi-4",
    reference="arXiv:2404.14219",
    read_dims=read_dims,
    roles=layer_roles(q=_QKV, k=_QKV, v=_QKV, gate=_GATE_UP, up=_GATE_UP),
    gguf=(
        GgufArch(
            name="phi3",
            fewer_heads=False,
            fused={"attn_qkv": ("q", "k", "v"), "ffn_up": ("gate", "up")},
        ),
    ),
)
