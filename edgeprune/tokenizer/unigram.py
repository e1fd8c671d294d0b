"""SentencePiece unigram without byte fallback, GGUF model 't5'."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import registry
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.tokenizer.base import BYTE, NORMAL, SPACE, UNKNOWN, fill_up, flat_steps, token_rows
from edgeprune.tokenizer.sentencepiece_file import Normalization

_SPACES, _LAST_SPACES = " {2,}", " +$"  # how tokenizer.json finds runs of spaces, and those at the end


def _spaces_only(charsmap: bytes) -> bool:
    """Does it leave no white space but spaces? `Strip` takes line ends too, llama.cpp only spaces."""
    if not charsmap:
        return False
    normalizer = registry.library("tokenizers", "torch").normalizers.Precompiled(charsmap)
    return not normalizer.normalize_str("\n\t\r").strip(" ")


def kvs_of_json(path: Path, data: dict[str, Any], size: int | None) -> list[KeyValue]:
    """`data` has its vocabulary as a mapping to ids, and the scores beside it."""
    model = data["model"]
    charsmap, merge, end = b"", False, False
    odd = []
    for step in flat_steps(data.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Precompiled":
            try:
                charsmap = base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
            except binascii.Error:
                raise ConfigError(f"{path}: damaged: precompiled_charsmap is not base64") from None
        elif (kind == "Strip" and step.get("strip_right") and _spaces_only(charsmap)) or (
            kind == "Replace" and step["pattern"] == {"Regex": _LAST_SPACES} and step["content"] == ""
        ):
            end = True
        elif kind == "Replace" and step["pattern"] == {"Regex": _SPACES} and step["content"] in (" ", SPACE):
            merge = True
        else:
            odd.append(f"normalizer {kind}")
    before = flat_steps(data.get("pre_tokenizer"), "pretokenizers")
    odd += [f"pre-tokenizer {s.get('type')}" for s in before if s.get("type") != "Metaspace"]
    if odd or len(before) != 1 or merge is not end:
        raise UnsupportedModelError(
            f"{path}: unigram with {odd[0] if odd else 'spaces handled unlike SentencePiece'}",
            "llama.cpp cannot be told that; ONNX takes any tokenizer",
        )
    scheme = before[0].get("prepend_scheme", "always")
    if scheme == "first":
        raise UnsupportedModelError(
            f"{path}: unigram with a space before the first piece of a text only",
            "llama.cpp puts one behind special tokens too; ONNX takes any tokenizer",
        )
    tokens, kinds = token_rows(path, data, size)
    scores = [model["scores"].get(t, -10000.0) for t in tokens]
    if isinstance(model.get("unk_id"), int) and 0 <= model["unk_id"] < len(kinds):
        kinds[model["unk_id"]] = UNKNOWN
    if model.get("byte_fallback"):
        kinds = [
            BYTE if k == NORMAL and len(t) == 6 and t.startswith("<0x") else k
            for t, k in zip(tokens, kinds, strict=True)
        ]
    across = any(SPACE in t[1:] for t, k in zip(tokens, kinds, strict=True) if k == NORMAL)
    if across and before[0].get("split", True):
        raise UnsupportedModelError(
            f"{path}: unigram with pieces across spaces, cut at spaces all the same",
            "llama.cpp would use those pieces; ONNX takes any tokenizer",
        )
    return kvs_of(path, tokens, scores, kinds, Normalization(charsmap, scheme == "always", merge), size)


def kvs_of(
    path: Path,
    tokens: list[str],
    scores: list[float],
    kinds: list[int],
    how: Normalization,
    size: int | None,
) -> list[KeyValue]:
    """GGUF metadata of pieces with their scores and types. Raises UnsupportedModelError."""
    if BYTE in kinds:
        raise UnsupportedModelError(
            f"{path}: unigram with byte fallback",
            "llama.cpp's unigram has none and would write <unk> instead; ONNX takes any tokenizer",
        )
    if UNKNOWN not in kinds:
        raise UnsupportedModelError(f"{path}: unigram without an unknown token", "llama.cpp needs one")
    # with one and without the other its texts differ at their ends
    if how.prefix is not how.merge:
        raise UnsupportedModelError(
            f"{path}: unigram that {'adds a space' if how.prefix else 'merges spaces'} and does not "
            f"{'merge spaces' if how.prefix else 'add one'}",
            "llama.cpp treats the ends of such a text in another way; ONNX takes any tokenizer",
        )
    fill_up(path, tokens, scores, kinds, size)
    made = [
        KeyValue("tokenizer.ggml.model", "STRING", "t5"),
        KeyValue("tokenizer.ggml.pre", "STRING", "default"),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(tokens), "STRING"),
        KeyValue("tokenizer.ggml.scores", "ARRAY", tuple(scores), "FLOAT32"),
        KeyValue("tokenizer.ggml.token_type", "ARRAY", tuple(kinds), "INT32"),
        KeyValue("tokenizer.ggml.add_space_prefix", "BOOL", how.prefix),
        KeyValue("tokenizer.ggml.remove_extra_whitespaces", "BOOL", how.merge),
    ]
    if how.charsmap:
        made.append(KeyValue("tokenizer.ggml.precompiled_charsmap", "ARRAY", tuple(how.charsmap), "UINT8"))
    return made


def json_of(values: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """tokenizer.json of GGUF metadata. Raises ConfigError or UnsupportedModelError."""
    scores = values.get("scores")
    if not isinstance(scores, tuple | list) or len(scores) != len(tokens):
        raise ConfigError("tokenizer metadata: 'scores' is missing or of another length than 'tokens'")
    prefix, merge = values.get("add_space_prefix", False), values.get("remove_extra_whitespaces", False)
    if prefix is not merge:
        raise UnsupportedModelError(
            "GGUF tokenizer 't5' that adds a space without merging runs of them, or merges without adding"
        )
    charsmap = values.get("precompiled_charsmap") or ()
    try:
        packed = bytes(b % 256 for b in charsmap)
    except TypeError:
        raise ConfigError(
            "tokenizer metadata: 'precompiled_charsmap' holds something that is no byte"
        ) from None
    steps: list[dict[str, Any]] = []
    if packed:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(packed).decode()})
    if merge:
        steps.append({"type": "Replace", "pattern": {"Regex": _LAST_SPACES}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": _SPACES}, "content": SPACE})
    across = any(SPACE in t[1:] for t, k in zip(tokens, kinds, strict=True) if k == NORMAL)
    space = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": not across,
    }
    unknown = values.get("unknown_token_id", 2)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": space,
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "byte_fallback": False,
            "vocab": [[t, float(s)] for t, s in zip(tokens, scores, strict=True)],
        },
    }
