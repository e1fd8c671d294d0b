"""Token windows for calibration and evaluation: sampled from the model itself, or cut from a given text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.errors import ConfigError
from edgeprune.locate import hub_reason
from edgeprune.progress import Progress, Silent

_TOP_K = 100


def sample_from_model(
    model: Any, *, n_samples: int, n_tokens: int, seed: int, progress: Progress | None = None
) -> np.ndarray:
    """Text the model writes itself, [n_samples, n_tokens] int32; no data set needed."""
    return sample_sets(model, [(n_samples, seed)], n_tokens=n_tokens, progress=progress)[0]


def sample_sets(
    model: Any, sets: Sequence[tuple[int, int]], *, n_tokens: int, progress: Progress | None = None
) -> list[np.ndarray]:
    """Several sets of (rows, seed) in one pass over the weights; each [rows, n_tokens] int32.

    Even rows start at the model's first token (for a chat model: a conversation), odd rows at a random
    token, for variety. Each row has its own random stream, so a row does not depend on how many there are.
    Temperature 1, the 100 most likely tokens.
    """
    vocab = model.config.vocab_size
    start = model.config.bos_token_id
    start = int(start) if isinstance(start, int) and 0 <= start < vocab else 0
    rows = [(row, seed) for n_samples, seed in sets for row in range(n_samples)]
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row, seed in rows]
    first = [
        start if row % 2 == 0 else int(torch.randint(vocab, (1,), generator=g))
        for (row, _), g in zip(rows, generators, strict=True)
    ]
    tokens = torch.tensor(first)[:, None]
    out = [tokens]
    cache = None
    with torch.inference_mode(), (progress or Silent()).stage("sample text", n_tokens - 1) as bar:
        for _ in range(n_tokens - 1):
            result = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            logits, ids = result.logits[:, -1].float().topk(min(_TOP_K, vocab), dim=-1)
            # Gumbel maximum: exact sampling with one uniform number per candidate and row
            noise = torch.stack([torch.rand(logits.shape[1], generator=g) for g in generators])
            gumbel = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
            tokens = ids.gather(1, (logits + gumbel).argmax(dim=-1, keepdim=True))
            out.append(tokens)
            bar.advance()
    written = torch.cat(out, dim=1).numpy().astype(np.int32)
    return np.split(written, np.cumsum([n for n, _ in sets])[:-1])


def read_text(source: str) -> str:
    """Text of a .txt, .jsonl ('text' per line) or .json file, or of a data set on the hub.

    Raises ConfigError when it is neither, is empty, or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8", errors="strict")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read text file {path}: {error}") from None
        if path.suffix == ".jsonl":
            text = "\n\n".join(_jsonl_texts(path, text))
        if not text.strip():
            raise ConfigError(f"text file {path} is empty")
        return text
    if path.exists() or source.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl", ".raw"):
        raise ConfigError(f"text file {source} does not exist or is not a file")
    return _hub_text(source)


def _jsonl_texts(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"{path}:{number}: not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ConfigError(f"{path}:{number}: no 'text' string", 'each line must be like {"text": "…"}')
        texts.append(row["text"])
    return texts


@functools.lru_cache(maxsize=2)
def _hub_text(name: str, *, characters: int = 8_000_000) -> str:
    parts: list[str] = []
    for row in hub_rows(name, characters=characters):
        text = row.get("text")
        if not isinstance(text, str):
            raise ConfigError(f"data set '{name}' has no 'text' column", "give a text file instead")
        parts.append(text)
    return "\n\n".join(parts)


def hub_rows(name: str, *, characters: int = 8_000_000) -> list[dict[str, Any]]:
    """Rows of a data set on the hub, split 'train', until their strings have that many characters.

    Raises ConfigError when it cannot be read, MissingExtraError without the library.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        from edgeprune.errors import MissingExtraError

        raise MissingExtraError("datasets", "data") from None
    import logging

    from huggingface_hub import HfApi

    # these libraries report every retry on stderr; what went wrong is said once, below
    for noisy in ("huggingface_hub", "datasets", "fsspec", "httpx"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        HfApi().dataset_info(name, timeout=10)  # says at once that there is no network or no such data set
        for row in load_dataset(name, split="train", streaming=True):
            rows.append(row)
            size += sum(len(value) for value in row.values() if isinstance(value, str))
            if size > characters:
                break
    except Exception as error:  # the hub client raises many unrelated classes
        raise ConfigError(
            f"'{name}' is not a file here and could not be read as a data set: {hub_reason(error)}",
            "check the name and the network, or give a .txt or .jsonl file",
        ) from None
    return rows


def windows(
    text: str, encode: Callable[[str], list[int]], *, n_samples: int, n_tokens: int, seed: int, where: str
) -> np.ndarray:
    """Cut `n_samples` windows that do not overlap, drawn with `seed`; [n_samples, n_tokens] int32.

    Raises ConfigError when the text is too short.
    """
    ids = np.asarray(encode(text), dtype=np.int32)
    available = len(ids) // n_tokens
    if available < n_samples:
        raise ConfigError(
            f"{where} has {len(ids)} tokens, {n_samples} windows of {n_tokens} need {n_samples * n_tokens}",
            "give a longer text or ask for fewer samples",
        )
    offset = len(ids) - available * n_tokens
    rng = np.random.default_rng(seed)
    start = int(rng.integers(offset + 1))
    chosen = np.sort(rng.choice(available, size=n_samples, replace=False))
    return np.stack([ids[start + i * n_tokens : start + (i + 1) * n_tokens] for i in chosen])
