"""A SentencePiece file, tokenizer.model: its pieces, their types, and what is done to a text first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import registry
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.tokenizer.base import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

UNIGRAM = 1  # in SentencePiece's `trainer_spec.model_type`


def fields_of(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message; stops where it is damaged."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data):
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
        elif kind in (1, 2, 5):
            size = varint() if kind == 2 else 8 if kind == 1 else 4
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            return


def model_type(path: Path) -> int | None:
    """`trainer_spec.model_type` of a SentencePiece file: 1 unigram, 2 BPE, 3 words, 4 characters."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    for number, spec in fields_of(data):
        if number == 2 and isinstance(spec, bytes):
            # the field is left out for the format's default, unigram
            return next((v for n, v in fields_of(spec) if n == 3 and isinstance(v, int)), 1)
    return None


def read_pieces(path: Path) -> tuple[list[str], list[float], list[int], bool]:
    """Pieces, scores, types, and whether a space is put before the text."""
    if model_type(path) not in (None, UNIGRAM, 2):
        raise UnsupportedModelError(
            f"{path}: a SentencePiece model of words or characters", "GGUF has BPE and unigram"
        )
    library = registry.library("sentencepiece", "torch")
    processor = library.SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path}: not a SentencePiece model: {error!s:.80}") from None
    size = range(processor.GetPieceSize())
    tokens = [processor.IdToPiece(i) for i in size]
    scores = [processor.GetScore(i) for i in size]
    # the types have GGUF's numbers; the library does not tell which pieces are the user's own
    pieces = [
        spec for number, spec in fields_of(path.read_bytes()) if number == 1 and isinstance(spec, bytes)
    ]
    kinds = [next((v for n, v in fields_of(p) if n == 3 and isinstance(v, int)), NORMAL) for p in pieces]
    if len(kinds) != len(tokens) or not all(NORMAL <= k <= BYTE for k in kinds):
        raise ConfigError(f"{path}: not a SentencePiece model: pieces of unknown types")
    prefix = bool(processor.EncodeAsPieces("a")) and processor.EncodeAsPieces("a")[0].startswith(SPACE)
    return tokens, scores, kinds, prefix


def apply_added(tokens: list[str], scores: list[float], kinds: list[int], settings: dict[str, Any]) -> None:
    """Put the tokens that tokenizer_config.json adds into pieces, scores and types."""
    added = settings.get("added_tokens_decoder") or {}
    for key in sorted(added, key=int):
        i, token = int(key), added[key]
        while len(tokens) <= i < len(added) + len(scores) + 1024:
            tokens.append(f"[PAD{len(tokens)}]")
            scores.append(-10000.0)
            kinds.append(UNUSED)
        if i < len(tokens) and kinds[i] != UNKNOWN:
            tokens[i] = token["content"]
            kinds[i] = CONTROL if token.get("special") else USER_DEFINED


@dataclass(frozen=True, slots=True)
class Normalization:
    """What SentencePiece does to a text before it is cut."""

    charsmap: bytes = b""  # compiled replacements, empty where there are none
    prefix: bool = True  # a space goes before the text
    merge: bool = True  # runs of spaces become one, those at the ends go


def normalization(path: Path) -> Normalization:
    """`normalizer_spec` of a SentencePiece file. Raises UnsupportedModelError for what GGUF cannot say."""
    out = Normalization()
    for number, spec in fields_of(path.read_bytes()):
        found = dict(fields_of(spec)) if isinstance(spec, bytes) and number in (2, 3) else {}
        if (number == 2 and found.get(24)) or (number == 3 and not found.get(5, 1)):
            raise UnsupportedModelError(
                f"{path}: unigram with spaces behind words, or kept as they are",
                "llama.cpp knows spaces before words only; ONNX takes any tokenizer",
            )
        if number == 3:
            charsmap = found.get(2)
            out = Normalization(
                charsmap if isinstance(charsmap, bytes) else b"",
                prefix=bool(found.get(3, 1)),
                merge=bool(found.get(4, 1)),
            )
    return out
