"""What the kinds share: types of tokens, rows of a vocabulary, pieces of tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def flat_steps(step: Any, key: str) -> list[dict[str, Any]]:
    """A tokenizer.json step as a flat list; `key` names the children of a sequence."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [p for child in step[key] for p in flat_steps(child, key)]
    return [step]


def token_rows(path: Path, data: dict[str, Any], size: int | None) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; holes and the tail up to `size` are unused tokens."""
    by_id: dict[int, tuple[str, int]] = {i: (t, NORMAL) for t, i in data["model"]["vocab"].items()}
    for token in data.get("added_tokens") or ():
        by_id[token["id"]] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    n = max(by_id) + 1
    check_size(path, n, size)
    if n > 4 * len(by_id) + 1024:
        raise ConfigError(f"{path}: token ids go up to {n - 1} for {len(by_id)} tokens")
    rows = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(max(n, size or 0))]
    return [t for t, _ in rows], [k for _, k in rows]


def check_size(path: Path, n: int, size: int | None) -> None:
    """Raises ConfigError for more tokens than the embedding has rows."""
    if isinstance(size, int) and n > size:
        raise ConfigError(
            f"{path}: has {n} tokens, but the model's embedding has {size} rows",
            "tokenizer and model do not belong together",
        )


def fill_up(path: Path, tokens: list[str], scores: list[float], kinds: list[int], size: int | None) -> None:
    """Append unused tokens for the rows of the embedding that have none."""
    check_size(path, len(tokens), size)
    for i in range(len(tokens), size or 0):
        tokens.append(f"[PAD{i}]")
        scores.append(-10000.0)
        kinds.append(UNUSED)


def texts_of(values: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts in GGUF metadata. Raises ConfigError."""
    found = values.get(key)
    if not isinstance(found, tuple | list) or not found:
        raise ConfigError(f"tokenizer metadata: '{key}' is missing")
    if not all(isinstance(t, str) for t in found):
        raise ConfigError(f"tokenizer metadata: '{key}' holds something that is no text")
    return list(found)


def bpe_json(model: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of a BPE model, without the steps around it."""
    empty = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    fixed = {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"version": "1.0", "truncation": None, "padding": None, "model": {**fixed, **empty, **model}}
