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
    found = disturb.campaign(tmp_path, ["kill", "write", "ctrl-c-twice", "second"], most=3, seed=1)
    assert found["injected"] >= 8 and found["runs_compared"] >= 3
    # what was planned was met
    assert found["stage_boundaries"] - len(found["stage_boundaries_not_killed_at"]) == 3
    assert found["by_kind"]["write"]["stages_hit"] == 3 and found["writes"] > 20
    assert disturb.clean(found), {k: found[k] for k in ("different", "records_lost", "wrong_exits")}
    assert {row["kind"] for row in found["disturbances"]} >= {"kill", "write", "second"}
    assert found["expected"]["selected"].startswith("uniform-") and found["expected"]["recovered"]


JOB = """
import json, os, sys

folder = sys.argv[-1]
os.makedirs(folder, exist_ok=True)
known = [json.loads(x) for x in open(folder + "/log.jsonl")] if os.path.exists(folder + "/log.jsonl") else []

def log(event, stage, key):
    with open(folder + "/log.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps({"event": event, "stage": stage, "key": key}) + "\\n")

for stage, key in (("one thing", "a"), ("one thing", "b"), ("two", "c")):
    if any(row["event"] == "done" and row["key"] == key for row in known):
        log("skip", stage, key)
        continue
    log("start", stage, key)
    with open(folder + "/.part", "w") as f:
        f.write(key)
    os.replace(folder + "/.part", folder + "/" + key)
    os.replace(folder + "/" + key, folder + f"/.x.{os.getpid()}.part-" + key)
    log("done", stage, key)
"""


def test_a_run_stops_at_every_boundary_and_write(tmp_path: Path) -> None:
    """Killed there one after the other, each stage is seen at its start, before its file, and at its end."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    bench = disturb.Bench(tmp_path, [disturb.sys.executable, str(script)], 0)
    stages = (("one thing", "a"), ("one thing", "b"), ("two", "c"))
    bench.steps = [(event, *stage) for stage in stages for event in ("start", "done")]
    bench.places = ["a", "b", ".x.PID.part-b", "c"]
    found = disturb.plans(bench, None)
    kills, writes = next(found)[1], next(found)[1]
    assert [m for _, m in kills] == [0, 1, 2, 3, 4, 5] and [m for _, m in writes] == bench.places
    for series, plan in (("kill", kills), ("write", writes)):
        folder = tmp_path / series
        for _, moment in plan:
            process, _ = bench.start(folder, stop_at=moment)
            assert bench.until(process, folder, moment, stops=True)
            if isinstance(moment, str):
                key = moment[-1]
                assert disturb.boundaries(folder)[-1] == ("start", *stages["abc".index(key)])
                there = folder / (".part" if moment == key else key)
                assert not (folder / moment).exists() and there.read_text() == key
            else:
                assert disturb.boundaries(folder)[-1] == bench.steps[moment]
            process.kill()
            process.communicate()
        process, _ = bench.start(folder)
        assert process.wait(timeout=60) == 0 and not bench.until(process, folder, 0, stops=True)
        process.communicate()
        assert [row for row in disturb.events(folder) if row[0] == "done"] == bench.steps[1::2]


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
