"""The model code that lies in a folder whose layers differ in width, for transformers without edgeprune.

Stock transformers knows one width for all layers. With `trust_remote_code=True` it takes the two classes of
the file written here, which are thin children of the family's own.
"""

from __future__ import annotations

from typing import Any

from edgeprune.families.base import LAYER_LIST_KEY, Family

FILE_NAME = "modeling_edgeprune.py"

_CODE = '''\
"""MODEL with widths of its own in every layer; written by edgeprune, Apache-2.0.

config.json lists [heads, KV heads, FFN width] of each layer under "LAYERS"; a zero means that the block
was removed. Load with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

import copy

import torch
from torch import nn
from transformers import CONFIG, MODEL

ATTENTION_NORMS = ATTENTION_LIST
FFN_NORMS = FFN_LIST


class PrunedConfig(CONFIG):
    def validate(self, *args, **kwargs):
        """Heads need not divide the hidden size: the head size is given."""

    validate_architecture = validate


class NoAttention(nn.Module):
    """Adds nothing to the stream; the cache still has to know how many tokens there were."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class PrunedForCausalLM(MODEL):
    config_class = PrunedConfig

    def __init__(self, config):
        super().__init__(config)
        layers = self.model.layers
        for index, (heads, kv_heads, width) in enumerate(config.LAYERS):
            own = copy.copy(config)
            own.num_attention_heads = heads or 1
            own.num_key_value_heads = kv_heads or 1
            own.intermediate_size = width or 1
            layer = type(layers[index])(own, index)
            if not kv_heads:
                layer.self_attn = NoAttention(index)
            if not width:
                layer.mlp = NoFeedForward()
            for name in (*(ATTENTION_NORMS if not kv_heads else ()), *(FFN_NORMS if not width else ())):
                setattr(layer, name, nn.Identity())
            layers[index] = layer
'''


def code(family: Family) -> str:
    """The text of the file for one family."""

    def norms(*roles: str) -> str:
        return repr(tuple(family.roles[r].split("{l}.", 1)[1] for r in roles if r in family.roles))

    stem = family.hf_class.removesuffix("ForCausalLM")
    values = {
        "ATTENTION_LIST": norms("attn_norm", "attn_post_norm"),
        "FFN_LIST": norms("ffn_norm", "ffn_post_norm"),
        "CONFIG": f"{stem}TextConfig" if family.model_type.endswith("_text") else f"{stem}Config",
        "MODEL": family.hf_class,
        "LAYERS": LAYER_LIST_KEY,
    }
    text = _CODE
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def auto_map() -> dict[str, Any]:
    """What config.json says about the file."""
    module = FILE_NAME.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.PrunedConfig",
        "AutoModelForCausalLM": f"{module}.PrunedForCausalLM",
    }
