"""Texts to ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune import registry
from edgeprune.errors import ConfigError


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the library says of a damaged file, as ConfigError."""
    try:
        yield
    except BaseException as error:  # it raises plain Exception, and panics, which are none
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ConfigError(f"{path}: {error!s:.120}") from None


def load(path: Path) -> Any:
    """The `tokenizers` object of a tokenizer.json. Raises ConfigError for a damaged file."""
    library = registry.library("tokenizers", "torch")
    with _told(path):
        return library.Tokenizer.from_file(str(path))


def ids_of(path: Path, text: str, *, add_special: bool) -> list[int]:
    """Token ids of a text by a tokenizer.json. Raises ConfigError for a damaged file."""
    encoder = load(path)
    with _told(path):  # some damage is met by the first text only
        return list(encoder.encode(text, add_special_tokens=add_special).ids)


def encode(folder: str | Path, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids of a text; special tokens written in it become their ids. `add_special` adds bos or eos."""
    root = Path(folder)
    if (root / "tokenizer.json").is_file():
        return ids_of(root / "tokenizer.json", text, add_special=add_special)
    auto = registry.library("transformers", "torch").AutoTokenizer
    tokenizer = auto.from_pretrained(str(root), trust_remote_code=False)
    return list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
