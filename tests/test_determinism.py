"""The same command twice gives the same bytes: in one process, in a fresh one, with more threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from builders import tiny_model_with_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# score with a calibration of its own text, plan, prune, export: every file that two runs must agree on
STEPS = (
    ("score", "MODEL", "--metric", "wanda-sp", "--samples", "4", "--length", "32", "--out", "s.safetensors"),
    ("plan", "MODEL", "--scores", "s.safetensors", "--ratio", "0.2", "--out", "plan.json"),
    ("prune", "MODEL", "--plan", "plan.json", "--out", "pruned"),
    ("export", "pruned", "--quantization", "Q8_0", "--out", "a.gguf", "--no-verify"),
)
FILES = ("s.safetensors", "s.json", "plan.json", "pruned/model.safetensors", "pruned/config.json", "a.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


def work(model: Path, folder: Path, run: Callable[[list[str]], int]) -> dict[str, bytes]:
    folder.mkdir()
    back = Path.cwd()
    os.chdir(folder)
    try:
        for step in STEPS:
            assert run([str(model) if word == "MODEL" else word for word in step]) == 0
    finally:
        os.chdir(back)
    return {name: (folder / name).read_bytes() for name in FILES}


def fresh(threads: int) -> Callable[[list[str]], int]:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONHASHSEED": str(threads),
    }

    def run(args: list[str]) -> int:
        done = subprocess.run([sys.executable, "-m", "edgeprune", *args], env=env, capture_output=True)
        return done.returncode

    return run


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from edgeprune.cli.main import run

    return work(model, tmp_path_factory.mktemp("first") / "run", run)


def test_again_in_the_same_process(model: Path, first: dict[str, bytes], tmp_path: Path) -> None:
    from edgeprune.cli.main import run

    again = work(model, tmp_path / "run", run)
    assert [name for name in FILES if again[name] != first[name]] == []


def test_in_fresh_processes_and_with_other_threads(
    model: Path, first: dict[str, bytes], tmp_path: Path
) -> None:
    """Cold, with another hash seed, and on two threads: the plan and every artifact are the same."""
    import torch

    cold = work(model, tmp_path / "cold", fresh(torch.get_num_threads()))
    assert [name for name in FILES if cold[name] != first[name]] == []
    more = work(model, tmp_path / "more", fresh(torch.get_num_threads() + 1))
    plans: list[Any] = [json.loads(found["plan.json"])["kept"] for found in (first, more)]
    assert plans[0] == plans[1]
    assert more["a.gguf"] == first["a.gguf"]
