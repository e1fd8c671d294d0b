"""GGUF metadata as the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune import rundir
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.tokenizer import byte_level, sentencepiece, unigram
from edgeprune.tokenizer.base import CONTROL, NORMAL, SPECIAL_IDS, UNKNOWN, UNUSED, USER_DEFINED, texts_of


def write_hf(kvs: Sequence[KeyValue], folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json that AutoTokenizer loads offline.

    Raises UnsupportedModelError for a kind of tokenizer we cannot write, ConfigError for damaged metadata.
    """
    root = Path(folder)
    values = {kv.key.removeprefix("tokenizer.ggml."): kv.value for kv in kvs}
    kind = values.get("model")
    if kind not in ("gpt2", "llama", "t5"):
        raise UnsupportedModelError(f"GGUF tokenizer {kind!r:.40} is not supported", "known: gpt2, llama, t5")
    tokens = texts_of(values, "tokens")
    kinds = list(values.get("token_type") or [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise ConfigError(f"tokenizer metadata: {len(tokens)} tokens, but {len(kinds)} token types")
    for name in SPECIAL_IDS.values():
        value = values.get(f"{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise ConfigError(f"tokenizer metadata: {name}_token_id is {value!r:.40} of {len(tokens)} tokens")
    if kind == "gpt2":
        data = byte_level.json_of(values, tokens)
    elif kind == "llama":
        data = sentencepiece.json_of(values, tokens, kinds)
    else:
        data = unigram.json_of(values, tokens, kinds)
    data["added_tokens"] = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[i] != USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if kinds[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    # rows that only fill up the embedding are no tokens
    vocab = data["model"]["vocab"]
    for i, token in reversed(list(enumerate(tokens))):
        if kinds[i] == UNUSED and token == f"[PAD{i}]" and (kind != "t5" or i == len(vocab) - 1):
            del vocab[i if kind == "t5" else token]
    data["post_processor"] = _post_processor(values, tokens, kind)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    for name, key in SPECIAL_IDS.items():
        if values.get(f"{key}_token_id") is not None:
            settings[f"{name}_token"] = tokens[values[f"{key}_token_id"]]
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    with rundir.friendly_disk_errors(root):
        rundir.write_text(root / "tokenizer.json", json.dumps(data, ensure_ascii=False))
        rundir.write_text(root / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=1))


def _post_processor(values: Mapping[str, Any], tokens: list[str], kind: str) -> dict[str, Any] | None:
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    used: dict[str, Any] = {}
    # llama.cpp's own defaults where the file says nothing
    on = {
        "bos": kind == "llama" or values.get("pre") in ("llama-bpe", "llama3", "llama-v3"),
        "eos": kind == "t5",
    }
    for name in ("bos", "eos"):
        value = values.get(f"{name}_token_id")
        if value is None or not values.get(f"add_{name}_token", on[name]):
            continue
        token = tokens[value]
        entry = {"SpecialToken": {"id": token, "type_id": 0}}
        single = [entry, *single] if name == "bos" else [*single, entry]
        used[token] = {"id": token, "ids": [value], "tokens": [token]}
    if not used:
        return None
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": used}
