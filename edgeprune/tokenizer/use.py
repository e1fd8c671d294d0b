"""Texts to ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune import registry
from edgeprune.errors import ConfigError


def load(path: Path) -> Any:
    """The `tokenizers` object of a tokenizer.json. Raises ConfigError for a damaged file."""
    library = registry.library("tokenizers", "torch")
    try:
        return library.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises plain Exception, and panics, which are none
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ConfigError(f"{path}: {error!s:.120}") from None


def encode(folder: str | Path, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids of a text; special tokens written in it become their ids. `add_special` adds bos or eos."""
    root = Path(folder)
    if (root / "tokenizer.json").is_file():
        return list(load(root / "tokenizer.json").encode(text, add_special_tokens=add_special).ids)
    auto = registry.library("transformers", "torch").AutoTokenizer
    tokenizer = auto.from_pretrained(str(root), trust_remote_code=False)
    return list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
