"""Llama 1 to 3.x, SmolLM2, TinyLlama and others of `model_type: llama` (arXiv:2302.13971)."""

from __future__ import annotations

from typing import Any

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import Family, check_layers, config_float, config_int, config_layers
from edgeprune.records import LayerShape, ModelDims


def read_dims(config: dict[str, Any]) -> ModelDims:
    hidden = config_int(config, "hidden_size")
    n_heads = config_int(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden % n_heads:
        raise UnsupportedModelError(f"config.json: {n_heads} heads do not divide the hidden size {hidden}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: activation '{config['hidden_act']}' is not silu")
    dense = LayerShape(
        n_heads=n_heads,
        n_kv_heads=config_int(config, "num_key_value_heads", n_heads),
        n_ff=config_int(config, "intermediate_size"),
    )
    layers = config_layers(config, config_int(config, "num_hidden_layers"), dense)
    check_layers(layers)
    bias = bool(config.get("attention_bias", False))
    return ModelDims(
        family="llama",
        vocab=config_int(config, "vocab_size"),
        hidden=hidden,
        head_dim=config_int(config, "head_dim", hidden // n_heads),
        max_context=config_int(config, "max_position_embeddings", 2048, most=1 << 30),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        rms_eps=config_float(config, "rms_norm_eps", 1e-6),
        layers=layers,
    )


FAMILY = Family(
    model_type="llama",
    summary="Llama 1-3.x, SmolLM2, TinyLlama",
    reference="arXiv:2302.13971",
    read_dims=read_dims,
    roles={
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "attn_norm": "model.layers.{l}.input_layernorm",
        "q": "model.layers.{l}.self_attn.q_proj",
        "k": "model.layers.{l}.self_attn.k_proj",
        "v": "model.layers.{l}.self_attn.v_proj",
        "o": "model.layers.{l}.self_attn.o_proj",
        "ffn_norm": "model.layers.{l}.post_attention_layernorm",
        "gate": "model.layers.{l}.mlp.gate_proj",
        "up": "model.layers.{l}.mlp.up_proj",
        "down": "model.layers.{l}.mlp.down_proj",
    },
    gguf_arch="llama",
    gguf_carrier="deci",
    gguf_permute_qk=True,
)
