"""Byte-level BPE, GGUF model 'gpt2'.

Splitting rules are those llama.cpp knows by name (facts: `src/llama-vocab.cpp`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.tokenizer.base import bpe_json, flat_steps, texts_of, token_rows

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPELLED_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut before merging: patterns one after the other, then bytes."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token as a whole is taken as it is


LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_SPLITTINGS: Mapping[str, _Splitting] = {
    "gpt-2": _Splitting((_GPT2,)),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": _Splitting((LLAMA3,), ignore_merges=True),
    "smaug-bpe": _Splitting((LLAMA3,)),
    "qwen2": _Splitting((QWEN2,)),
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_SAME_AS: Mapping[str, str] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"
    ),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "modern-bert"), "gpt-2"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "kormo", "hunyuan", "megrez"), "qwen2"),
    "dbrx": "smaug-bpe",
}


def ends_in_bytes(data: dict[str, Any]) -> bool:
    """Does a tokenizer.json work on bytes, as this kind does?"""
    steps = flat_steps(data.get("pre_tokenizer"), "pretokenizers")
    return bool(steps) and steps[-1].get("type") == "ByteLevel"


def _recognise(path: Path, data: dict[str, Any]) -> str:
    """Name llama.cpp gives to the splitting of a byte-level tokenizer."""
    patterns: list[str] = []
    for step in flat_steps(data.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                patterns.append(_GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "Split" and "Regex" in step["pattern"] and step.get("behavior") == "Isolated":
            patterns.append(step["pattern"]["Regex"].replace(_SPELLED_OUT, _CONTRACTIONS))
        else:
            raise UnsupportedModelError(f"{path}: pre-tokenizer {kind} {step!r:.80} has no GGUF name")
    # trailing '|\s+' changes nothing: what no pattern takes is a piece of its own
    cut = tuple(p if p in (LLAMA3, QWEN2) else p.removesuffix(r"|\s+") for p in patterns)
    ignore = bool(data["model"].get("ignore_merges"))
    for name, splitting in _SPLITTINGS.items():
        if splitting.patterns == cut and splitting.ignore_merges == ignore:
            return name
    raise UnsupportedModelError(
        f"{path}: no GGUF name is known for this pre-tokenizer: {' then '.join(patterns)!r:.200}",
        f"known: {', '.join(_SPLITTINGS)}",
    )


def kvs_of_json(path: Path, data: dict[str, Any], size: int | None) -> list[KeyValue]:
    """GGUF metadata of a tokenizer.json. Raises UnsupportedModelError for another splitting."""
    name = _recognise(path, data)
    odd = [s.get("type") for s in flat_steps(data.get("normalizer"), "normalizers") if s.get("type") != "NFC"]
    if odd:
        raise UnsupportedModelError(f"{path}: normalizer {odd[0]} is not one of llama.cpp's")
    tokens, kinds = token_rows(path, data, size)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"])
    return [
        KeyValue("tokenizer.ggml.model", "STRING", "gpt2"),
        KeyValue("tokenizer.ggml.pre", "STRING", name),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(tokens), "STRING"),
        KeyValue("tokenizer.ggml.token_type", "ARRAY", tuple(kinds), "INT32"),
        KeyValue("tokenizer.ggml.merges", "ARRAY", merges, "STRING"),
    ]


def json_of(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json of GGUF metadata. Raises UnsupportedModelError for an unknown splitting."""
    name = values.get("pre", "default")
    splitting = _SPLITTINGS.get(_SAME_AS.get(name, name)) if isinstance(name, str) else None
    if splitting is None:
        raise UnsupportedModelError(
            f"GGUF pre-tokenizer {name!r:.40} is not supported", f"known: {', '.join(_SPLITTINGS)}"
        )
    merges = []
    for merge in texts_of(values, "merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ConfigError(f"tokenizer metadata: merge {merge!r:.40} is not a pair")
        merges.append([left, right])
    data = bpe_json(
        {
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": splitting.ignore_merges,
        }
    )
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in splitting.patterns
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, to_bytes]}
    data["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return data
