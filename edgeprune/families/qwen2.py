"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v (arXiv:2407.10671).

llama.cpp's `qwen2` fixes the head count; `deci` computes the same once Q and K, weights and biases, are
in its rotary order. It knows no sliding window: where one is used the context ends with it.
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
from edgeprune.families.llama import DECI_ARCH
from edgeprune.records import ModelDims


def read_dims(config: dict[str, Any]) -> ModelDims:
    check_activation(config, "hidden_act", ("silu", "swish"))
    window = sliding_window(config, switch=True)
    return read_common(config, "qwen2", qkv_bias=True, context=32_768, most_context=window)


FAMILY = Family(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    summary="Qwen2, Qwen2.5",
    reference="arXiv:2407.10671",
    read_dims=read_dims,
    roles=layer_roles(),
    gguf=(GgufArch(name="qwen2", fewer_heads=False, biases=frozenset(("qkv",))), DECI_ARCH),
)
