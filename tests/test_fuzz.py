"""A little of benchmarks/fuzz.py in every run of the suite: no traceback, nothing slow, nothing elsewhere."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import EdgepruneError

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
fuzz = pytest.importorskip("fuzz", reason="the benchmarks are not part of the source distribution")

PARSERS = fuzz.parsers()
SLOW = {"records": 40, "texts": 60, "tokenizer": 60, "tokenizer-settings": 60}
# damaged so little or so far from what matters that it may still be good; or they answer "none of mine"
GOOD = {"agent", "records", "texts", "sentencepiece", "chat-template"}


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_input(name: str) -> None:
    row = fuzz.run(name, PARSERS[name], SLOW.get(name, 150), first=2000)
    assert row["kinds"] == {} and row["written_outside"] == []
    assert row["slowest_s"] < 10
    assert name in GOOD or row["refused"] > 10


@pytest.mark.parametrize("name", PARSERS)
def test_seeds_are_good_input(name: str, tmp_path: Path) -> None:
    for seed in PARSERS[name].seeds:
        if name == "targets" and b"members" in seed:
            continue  # a family, whose members are elsewhere
        PARSERS[name].read(seed, tmp_path)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(set(PARSERS) - set(SLOW))), raw=st.binary(max_size=300))
def test_noise(name: str, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            PARSERS[name].read(raw, Path(folder))
        except fuzz.OURS as error:
            assert str(error)


def test_a_case_is_its_number() -> None:
    parser = PARSERS["manifest"]
    assert fuzz.case(parser, 217) == fuzz.case(parser, 217) != fuzz.case(parser, 218)


def test_faults_are_found() -> None:
    """The harness sees what it looks for: a traceback, and a file written outside."""

    def read(raw: bytes, folder: Path) -> None:
        if len(raw) % 2:
            raise EdgepruneError("refused")
        (folder.parent / "outside").write_text("x")
        raise KeyError("lost")

    row = fuzz.run("broken", fuzz.Parser([b"abcd"], read), 50)
    assert row["refused"] + row["tracebacks"] == 50 and 0 < row["tracebacks"] < 50
    assert [k.split(":")[0] for k in row["kinds"]] == ["KeyError at test_fuzz.py"]
    assert [Path(p).name for p in row["written_outside"]] == ["outside"]


def test_guided_goes_where_blind_damage_does_not() -> None:
    """Behind four bytes that must be right one after another lies a fault."""
    code = (
        "def read(raw, folder):\n"
        "    at = 0\n"
        "    while at < 4:\n"
        "        if len(raw) <= at or raw[at] % 16 != at:\n"
        "            return\n"
        + "".join(f"        if at == {i}:\n            pass\n" for i in range(4))
        + "        at += 1\n"
        "    raise KeyError('found')\n"
    )
    space: dict[str, Any] = {}
    exec(compile(code, str(ROOT / "edgeprune" / "maze.py"), "exec"), space)
    parser = fuzz.Parser([b"------"], space["read"])
    blind = fuzz.run("maze", parser, 30_000)
    guided = fuzz.run_guided("maze", parser, 30_000)
    assert blind["kinds"] == {}
    assert [k.split(":")[0] for k in guided["kinds"]] == ["KeyError at maze.py"]
    (fault,) = guided["kinds"].values()
    assert fault["case"] > 100 and fault["input"].startswith("b'")


@pytest.mark.parametrize("name", ["safetensors", "llama-bench", "token-runs"])
def test_guided(name: str) -> None:
    row = fuzz.run_guided(name, PARSERS[name], 150)
    assert row["kinds"] == {} and row["written_outside"] == []
    assert row["steps_seen"] > 10 and row["inputs_kept"] > len(PARSERS[name].seeds)
