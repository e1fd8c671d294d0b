"""SentencePiece BPE with byte fallback, GGUF model 'llama'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.tokenizer.base import (
    BYTE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    bpe_json,
    fill_up,
    flat_steps,
    token_rows,
)
from edgeprune.tokenizer.sentencepiece_file import read_pieces


def kvs_of_json(root: Path, data: dict[str, Any], size: int | None) -> list[KeyValue]:
    """GGUF metadata of `root`'s tokenizer.json, read as `data`; scores are merge ranks or the file's."""
    path = root / "tokenizer.json"
    model = data["model"]
    normal = flat_steps(data.get("normalizer"), "normalizers")
    before = flat_steps(data.get("pre_tokenizer"), "pretokenizers")
    spaces = [s for s in normal if s.get("type") == "Replace" and s.get("content") == SPACE]
    meta = [s for s in before if s.get("type") == "Metaspace"]
    odd = [s.get("type") for s in normal if s.get("type") not in ("Replace", "Prepend")]
    # Gemma cuts at spaces that the normalizer has already replaced: nothing is cut
    before = [
        s for s in before if not (spaces and s.get("type") == "Split" and s["pattern"] == {"String": " "})
    ]
    odd += [s.get("type") for s in before if s.get("type") != "Metaspace"]
    if not model.get("byte_fallback") or not (spaces or meta) or odd:
        what = f": {odd[0]}" if odd else ""
        raise UnsupportedModelError(
            f"{path}: neither byte-level BPE nor SentencePiece BPE with byte fallback{what}"
        )
    prefix = any(s.get("type") == "Prepend" for s in normal) or any(
        s.get("prepend_scheme", "always") != "never" for s in meta
    )
    tokens, kinds = token_rows(path, data, size)
    best: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        best.setdefault(left + right, rank)
    scores = [-float(best.get(t, len(best))) for t in tokens]
    for i, token in enumerate(tokens):
        if token == model.get("unk_token"):
            kinds[i] = UNKNOWN
        elif kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = BYTE
    proto = root / "tokenizer.model"
    if proto.is_file():
        pieces, real, _, _ = read_pieces(proto)
        if pieces == tokens[: len(pieces)]:
            scores[: len(real)] = real
    return kvs_of(root, tokens, scores, kinds, prefix, size)


def kvs_of(
    root: Path, tokens: list[str], scores: list[float], kinds: list[int], prefix: bool, size: int | None
) -> list[KeyValue]:
    """GGUF metadata of pieces with their scores and types."""
    fill_up(root, tokens, scores, kinds, size)
    return [
        KeyValue("tokenizer.ggml.model", "STRING", "llama"),
        KeyValue("tokenizer.ggml.pre", "STRING", "default"),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(tokens), "STRING"),
        KeyValue("tokenizer.ggml.scores", "ARRAY", tuple(scores), "FLOAT32"),
        KeyValue("tokenizer.ggml.token_type", "ARRAY", tuple(kinds), "INT32"),
        KeyValue("tokenizer.ggml.add_space_prefix", "BOOL", prefix),
    ]


def json_of(values: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """tokenizer.json of GGUF metadata. Raises ConfigError."""
    scores = values.get("scores")
    if not isinstance(scores, tuple | list) or len(scores) != len(tokens):
        raise ConfigError("tokenizer metadata: 'scores' is missing or of another length than 'tokens'")
    vocab = {t: i for i, t in enumerate(tokens)}
    mergeable = {t for t, k in zip(tokens, kinds, strict=True) if k in (NORMAL, USER_DEFINED, UNUSED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token in mergeable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    merges.sort()
    unknown = values.get("unknown_token_id")
    unk = (
        tokens[unknown]
        if unknown is not None
        else next((t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None)
    )
    data = bpe_json(
        {
            "unk_token": unk,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, _, _, left, right in merges],
        }
    )
    prefix = values.get("add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    data["normalizer"] = {"type": "Sequence", "normalizers": steps}
    data["pre_tokenizer"] = None
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    data["decoder"] = {"type": "Sequence", "decoders": decoders}
    return data
