"""Token windows: cut from a text, or sampled from a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from builders import tiny_llama

import edgeprune
from edgeprune import data
from edgeprune.errors import ConfigError


def count(text: str) -> list[int]:
    """One id per character: 0, 1, 2, …"""
    return list(range(len(text)))


def cut(n: int, **over: Any) -> np.ndarray:
    values: dict[str, Any] = {"n_samples": 4, "n_tokens": 8, "seed": 0, "where": "text.txt", **over}
    return data.windows("x" * n, count, **values)


def test_windows_do_not_overlap() -> None:
    for seed in range(20):
        found = cut(75, n_samples=9, seed=seed)  # 9 windows of 8 is all that fits
        assert found.shape == (9, 8)
        assert found.dtype == np.int32
        assert len(np.unique(found)) == 72
        assert (np.diff(found, axis=1) == 1).all()  # each is a run of the text


def test_windows_follow_the_seed() -> None:
    assert np.array_equal(cut(4000, seed=3), cut(4000, seed=3))
    assert not np.array_equal(cut(4000, seed=3), cut(4000, seed=4))


def test_a_text_that_is_just_long_enough() -> None:
    assert np.array_equal(cut(32), np.arange(32).reshape(4, 8))


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(ConfigError) as caught:
        cut(31)
    assert caught.value.message == "text.txt has 31 tokens, 4 windows of 8 need 32"
    assert caught.value.hint == "give a longer text or ask for fewer samples"


# ---------------------------------------------------------------- files


def test_text_and_jsonl_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo\n", encoding="utf-8")
    assert data.read_text(str(tmp_path / "a.txt")) == "héllo\n"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n', encoding="utf-8")
    assert data.read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"


LINE = 'each line must be like {"text": "…"}'


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "{path}:2: not JSON", None),
        (
            "a.jsonl",
            b'{"txt": "x"}\n',
            "{path}:1: no 'text' string",
            LINE,
        ),
        ("a.jsonl", b"[1]\n", "{path}:1: no 'text' string", LINE),
        ("a.jsonl", b"\n\n", "text file {path} is empty", None),
        ("a.txt", b" \n\t", "text file {path} is empty", None),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str, hint: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        data.read_text(str(path))
    assert caught.value.message == message.format(path=path)
    assert caught.value.hint == hint


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"cannot read text file {path}: 'utf-8' codec"):
        data.read_text(str(path))


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/file", "missing.jsonl"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        data.read_text(name)
    assert caught.value.message == f"text file {name} does not exist or is not a file"


# ---------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return edgeprune.load(tiny_llama(tmp_path_factory.mktemp("model")))


def sample(model: Any, n: int, *, seed: int = 0, tokens: int = 12) -> np.ndarray:
    return data.sample_from_model(model, n_samples=n, n_tokens=tokens, seed=seed)


def test_sampling_is_deterministic(model: Any) -> None:
    first = sample(model, 4)
    assert first.shape == (4, 12)
    assert first.dtype == np.int32
    assert first.min() >= 0 and first.max() < 96
    assert np.array_equal(first, sample(model, 4))
    assert not np.array_equal(first, sample(model, 4, seed=1))


def test_a_row_does_not_depend_on_how_many_there_are(model: Any) -> None:
    assert np.array_equal(sample(model, 6)[:2], sample(model, 2))
    assert np.array_equal(sample(model, 3), sample(model, 3, tokens=20)[:, :12])


def test_even_rows_start_as_a_conversation(model: Any) -> None:
    found = sample(model, 8)
    assert (found[::2, 0] == model.config.bos_token_id).all()
    assert len(set(found[1::2, 0].tolist())) > 1
    assert len({tuple(row) for row in found.tolist()}) == 8  # rows differ even from the same start
