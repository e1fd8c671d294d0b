"""Gemma 3, text: norms around each block and on queries and keys; sliding layers (arXiv:2503.19786).

Norms multiply by 1 + weight, embeddings by sqrt(hidden), the gate's activation is GELU by tanh. Five of six
layers attend within a window and have a rotary base of their own; which ones is `layer_types` by index.
A multimodal model (`model_type: gemma3`) counts as its text part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import (
    Family,
    GgufArch,
    check_activation,
    config_float,
    config_int,
    layer_roles,
    read_common,
    text_config,
)
from edgeprune.records import ModelDims

_PATTERN = 6
_LOCAL_THETA = 10_000.0
_SLIDING, _FULL = "sliding_attention", "full_attention"
_LAYERS_27B = 62  # llama.cpp takes a model of so many layers for the 27B one


def read_dims(config: dict[str, Any]) -> ModelDims:
    config = text_config(config)
    check_activation(config, "hidden_activation", ("gelu_pytorch_tanh",))
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias"):
        if config.get(key):
            raise UnsupportedModelError(f"config.json: Gemma 3 with '{key}' is not covered")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("config.json: an encoder ('use_bidirectional_attention') is no decoder")
    layer_types(config)
    return read_common(
        config,
        "gemma3_text",
        heads=8,
        kv_heads=4,
        head_dim=256,
        context=131_072,
        tied=True,
        vocab=262_208,
    )


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """Kind of attention of every layer. Raises UnsupportedModelError for a list that does not fit."""
    n_layers = config_int(dict(config), "num_hidden_layers")
    given = config.get("layer_types")
    if given is None:
        step = config_int(dict(config), "sliding_window_pattern", _PATTERN)
        return [_SLIDING if (i + 1) % step else _FULL for i in range(n_layers)]
    if not isinstance(given, list) or len(given) != n_layers or not set(given) <= {_SLIDING, _FULL}:
        raise UnsupportedModelError(f"config.json: 'layer_types' must name {n_layers} layers")
    return given


def _local_theta(config: Mapping[str, Any]) -> float:
    nested = config.get("rope_parameters")
    if isinstance(nested, Mapping) and isinstance(nested.get(_SLIDING), Mapping):
        return config_float(dict(nested[_SLIDING]), "rope_theta", _LOCAL_THETA)
    return config_float(dict(config), "rope_local_base_freq", _LOCAL_THETA)


def keys(config: Mapping[str, Any], dims: ModelDims, layers: Sequence[int]) -> list[KeyValue]:
    """The pattern is written layer by layer, so that it survives layers that leave."""
    kinds = layer_types(config)
    sliding = tuple(kinds[old] == _SLIDING for old in layers)
    if not any(sliding):
        return []
    return [
        KeyValue("attention.sliding_window", "UINT32", config_int(dict(config), "sliding_window", 4096)),
        KeyValue("attention.sliding_window_pattern", "ARRAY", sliding, "BOOL"),
        KeyValue("rope.freq_base_swa", "FLOAT32", _local_theta(config)),
    ]


def _runtime_scalar(hidden: int, n_heads: int, head_dim: int, n_layers: int) -> int:
    """What llama.cpp divides attention scores by the root of; it depends on the number of layers."""
    return hidden // n_heads if n_layers == _LAYERS_27B else head_dim


def q_norm_factor(config: Mapping[str, Any], dims: ModelDims, n_layers: int) -> float:
    wanted = config_int(dict(config), "query_pre_attn_scalar", 256)
    has = _runtime_scalar(dims.hidden, dims.layers[0].n_heads, dims.head_dim, n_layers)
    return math.sqrt(has / wanted)


def read_gguf(values: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    n_layers = config["num_hidden_layers"]
    window = values.get("attention.sliding_window")
    pattern = values.get("attention.sliding_window_pattern", _PATTERN)
    if not window:
        kinds = [_FULL] * n_layers
    elif isinstance(pattern, tuple | list):
        kinds = [_SLIDING if bool(v) else _FULL for v in pattern]
    else:
        kinds = [
            _SLIDING if type(pattern) is int and pattern and (i + 1) % pattern else _FULL
            for i in range(n_layers)
        ]
    theta = values.get("rope.freq_base_swa", _LOCAL_THETA)
    full = config.pop("rope_parameters")
    for key in ("hidden_act", "mlp_bias"):
        config.pop(key, None)
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        layer_types=kinds,
        sliding_window=window or 4096,
        query_pre_attn_scalar=_runtime_scalar(config["hidden_size"], heads, head_dim, n_layers),
        rope_parameters={
            _FULL: full,
            _SLIDING: {"rope_type": "default", "rope_theta": float(theta)},
        },
        final_logit_softcapping=values.get("final_logit_softcapping") or None,
    )
    return config


FAMILY = Family(
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    summary="Gemma 3, text",
    reference="arXiv:2503.19786",
    read_dims=read_dims,
    roles=layer_roles(
        ffn_norm="pre_feedforward_layernorm",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        attn_post_norm="post_attention_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
    ),
    gguf=(GgufArch(name="gemma3", keys=keys, q_norm_factor=q_norm_factor),),
    read_gguf=read_gguf,
    qk_norm=True,
    activation="gelu_tanh",
    norm_offset=1.0,
    scaled_embedding=True,
    rope_theta=1_000_000.0,
)
