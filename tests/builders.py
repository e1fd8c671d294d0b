"""Tiny random models for tests. Nothing is downloaded; everything is saved to the given folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from edgeprune import checkpoint, graph, surgery
from edgeprune.families.base import LAYER_LIST_KEY, Family
from edgeprune.records import ModelGraph

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """One family as tests see it. Adding a family is its file and a row of FAMILIES."""

    model_type: str
    over: dict[str, Any]  # config.json values beside the common ones
    arch: str  # in GGUF, all layers alike
    carrier: str | None = None  # in GGUF, widths per layer
    fewer: str | None = None  # in GGUF, fewer heads in every layer; None: not loaded
    drops: int = 1  # a layer that may leave


_GEMMA_KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "layer_types": _GEMMA_KINDS,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
FAMILIES: dict[str, Case] = {
    "llama": Case("llama", {}, "llama", "deci", "llama"),
    "mistral": Case("mistral", {"head_dim": 32, "sliding_window": None}, "llama", "deci", "llama"),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}, "qwen2", "deci", "deci"),
    "qwen3": Case("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, "qwen3", "openelm", "qwen3"),
    "qwen3 untied": Case("qwen3", {"head_dim": 32}, "qwen3", None, "qwen3"),
    "gemma3": Case("gemma3_text", _GEMMA | {"tie_word_embeddings": True}, "gemma3", None, "gemma3"),
    "smollm3": Case("smollm3", {"tie_word_embeddings": True}, "smollm3", None, "smollm3", drops=3),
    "phi3": Case("phi3", {}, "phi3"),
}


def family_config(name: str, **over: Any) -> dict[str, Any]:
    """config.json values of a tiny model of a family: four layers, two KV heads, 128 channels."""
    common = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    case = FAMILIES[name]
    return {"model_type": case.model_type, **common, **case.over, **over}


def tiny_family(folder: Path, name: str, *, seed: int = 0, **over: Any) -> Path:
    """A tiny random model of any family, as `save_pretrained` writes it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family_config(name, **over)))
    _randomise_(model, seed)
    model.tie_weights()
    model.float().save_pretrained(folder)
    return folder


Kept = dict[str, tuple[int, ...]]
SHAPES = ("dense", "uniform", "fewer heads", "per layer", "layer dropped")


def cut(shape: str, name: str) -> Kept:
    """Units kept per axis that give a model of `tiny_family` one of SHAPES."""
    ffn: Kept = {f"layers.{i}.ffn": tuple(range(32, 128)) for i in range(4)}
    gone = FAMILIES[name].drops
    shapes: dict[str, Kept] = {
        "dense": {},
        "uniform": ffn,
        "fewer heads": ffn | {f"layers.{i}.kv": (i % 2,) for i in range(4)},
        "per layer": {
            "layers.0.ffn": tuple(range(64)),
            "layers.1.kv": (1,),
            "layers.2.ffn": tuple(range(0, 128, 4)),
            "layers.3.kv": (0,),
        },
        "layer dropped": ffn | {f"layers.{gone}.kv": (), f"layers.{gone}.ffn": ()},
    }
    return shapes[shape]


def gguf_architecture(shape: str, name: str) -> str | None:
    """What carries the shape in GGUF, or None where nothing does."""
    case = FAMILIES[name]
    return {"per layer": case.carrier, "fewer heads": case.fewer}.get(shape, case.arch)


def opened(folder: Path) -> tuple[checkpoint.SafetensorsSource, ModelGraph]:
    """The weights of a folder, and their graph."""
    source = checkpoint.SafetensorsSource(folder)
    found = graph.build(source.config)
    source.check(found)
    return source, found


def pruned(folder: Path, kept: Kept) -> tuple[Any, surgery.PrunedSource, ModelGraph, Family]:
    """A folder cut in memory: torch model, weights, graph, family."""
    source, whole = opened(folder)
    cut_source = surgery.PrunedSource(source, whole, kept)
    dims = graph.prune_dims(whole, kept)
    family = graph.find_family(dims.family)
    return checkpoint.assemble(cut_source, dims), cut_source, graph.graph_of(family, dims), family


class _Nothing(torch.nn.Module):
    """Stands for an attention or FFN block that was removed."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


def tiny_config(
    *,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ff: int = 128,
    layers: int = 3,
    vocab: int = 96,
    head_dim: int | None = None,
    tied: bool = False,
    bias: bool = False,
    mlp_bias: bool = False,
    rope: dict[str, Any] | None = None,
    context: int = 512,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope) if rope else {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=mlp_bias,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )


def _randomise_(model: torch.nn.Module, seed: int) -> None:
    # larger than the usual init, so that a wrong weight shows in the logits
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and "norm" in name:
                p.copy_(("Gemma" not in type(model).__name__) + 0.2 * noise)
            else:
                p.copy_(noise * (0.1 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5))


def uneven_model(
    layers: Sequence[tuple[int, int, int]], *, seed: int = 0, **over: Any
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A LlamaForCausalLM whose layers have (n_heads, n_kv_heads, n_ff) each, and its config.json.

    Zero heads: no attention. Zero n_ff: no FFN.
    """
    widest = (max(s[0] for s in layers), max(s[1] for s in layers), max(s[2] for s in layers))
    over.setdefault("head_dim", over.get("hidden", 64) // 4)
    over.update(heads=widest[0], kv_heads=widest[1], ff=widest[2], layers=len(layers))
    if over.get("hidden", 64) % widest[0]:
        raise ValueError("transformers wants the widest head count to divide the hidden size")
    config = tiny_config(**over)
    model = LlamaForCausalLM(config)
    for index, (heads, kv_heads, ff) in enumerate(layers):
        own = tiny_config(**(over | {"heads": heads or 1, "kv_heads": kv_heads or 1, "ff": ff or 1}))
        layer = LlamaDecoderLayer(own, index)
        if not heads:
            layer.self_attn = _Nothing(attention=True)
            layer.input_layernorm = torch.nn.Identity()
        if not ff:
            layer.mlp = _Nothing(attention=False)
            layer.post_attention_layernorm = torch.nn.Identity()
        model.model.layers[index] = layer
    _randomise_(model, seed)
    model.tie_weights()
    plain = json.loads(config.to_json_string(use_diff=False))
    plain["model_type"] = "llama"
    if len(set(layers)) > 1 or 0 in layers[0]:
        plain[LAYER_LIST_KEY] = [list(s) for s in layers]
    return model.float().eval(), plain


def save_model(model: torch.nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """config.json and model.safetensors with exactly the tensors that the graph lists."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = graph.build(config).shapes
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k in shapes}
    assert set(state) == set(shapes)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = dict(config, architectures=["LlamaForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tiny_llama(tmp_path: Path, *, seed: int = 0, **over: Any) -> Path:
    """A stock tiny Llama in `tmp_path`, loadable by AutoModelForCausalLM; see `tiny_config` for options."""
    model = LlamaForCausalLM(tiny_config(**over))
    _randomise_(model, seed)
    model.tie_weights()
    model.float().save_pretrained(tmp_path)
    return tmp_path


def uneven_llama(
    tmp_path: Path, layers: Sequence[tuple[int, int, int]], *, seed: int = 0, **over: Any
) -> Path:
    """As `tiny_llama`, but each layer has its own (n_heads, n_kv_heads, n_ff); stock loaders refuse it."""
    return save_model(*uneven_model(layers, seed=seed, **over), tmp_path)


def tiny_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE of `vocab` tokens at most, split as GPT-2 does, with three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["the quick brown fox jumps over the lazy dog again and again"] * 4, trainer)
    tok.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def tiny_model_with_tokenizer(tmp_path: Path, *, seed: int = 0, **over: Any) -> Path:
    """A stock tiny Llama of 300 tokens with a tokenizer beside it: complete, as if from the hub."""
    over.setdefault("vocab", 300)
    tiny_llama(tmp_path, seed=seed, **over)
    tiny_tokenizer(tmp_path, over["vocab"])
    return tmp_path


def logits(model: torch.nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """[n_tokens, vocab] float32."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()


class HalfGelu(torch.nn.Module):
    """GELU from a table of half floats, as ggml's CPU code has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
