"""A little of benchmarks/disturb.py: what is disturbed comes out as if it had not been."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
disturb = pytest.importorskip("disturb", reason="the benchmarks are not part of the source distribution")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"
)


@pytest.mark.slow
def test_a_few_disturbances(tmp_path: Path) -> None:
    found = disturb.campaign(tmp_path, ["kill", "ctrl-c-twice", "second"], most=4, seed=1)
    assert found["injected"] >= 6 and found["runs_compared"] >= 2
    assert disturb.clean(found), {k: found[k] for k in ("different", "records_lost", "wrong_exits")}
    assert {row["kind"] for row in found["disturbances"]} >= {"kill", "second"}
    assert found["expected"]["selected"].startswith("uniform-") and found["expected"]["recovered"]


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """The harness tells a lost record, a stage done twice, another file and a leftover."""
    bench = disturb.Bench(tmp_path, [], 0)
    folder = tmp_path / "run"
    (folder / "records").mkdir(parents=True)
    (folder / "a.gguf").write_bytes(b"x")
    (folder / "b.part").write_bytes(b"")
    candidate = {"id": "a", "artifact": {"path": "a.gguf", "sha256": "0"}, "quality": None, "error": None}
    report = {"selected": "a", "ties": [], "candidates": [candidate], "recoveries": {}}
    (folder / "report.json").write_text(disturb.json.dumps(report))
    line = disturb.json.dumps({"event": "done", "stage": "score", "key": "k"})
    (folder / "log.jsonl").write_text(f"{line}\n{line}\n{line[:20]}")
    bench.calm = disturb.outcome(folder)
    assert "is not what the report says" in bench.calm["candidates"]["a"][0]
    bench.compare(folder, "same")
    assert (bench.different, bench.twice, bench.scrap) == ([], ["same: score"], ["same: b.part"])
    (folder / "a.gguf").write_bytes(b"y")
    bench.compare(folder, "other")
    assert [row["what"] for row in bench.different] == ["candidates"]
    assert not disturb.clean({"kinds": [], **disturb.summary(bench, {})})
