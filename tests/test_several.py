"""Several targets in one run: shared work is done once, each target has its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from builders import tiny_model_with_tokenizer
from test_api import PROFILE

ROOT = Path(__file__).resolve().parents[1]
PI = "raspberry-pi-5-8gb"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    tiny_model_with_tokenizer(folder / "tiny", hidden=64, heads=4, kv_heads=2, ff=256, layers=2)
    (folder / "seconds.toml").write_text(PROFILE)
    text = (ROOT / "targets" / f"{PI}.toml").read_text(encoding="utf-8")
    (folder / "too-small.toml").write_text(re.sub(r"(?m)^usable = .*$", 'usable = "2MB"', text))
    return folder


def command(place: Path, *targets: str | Path, more: tuple[str, ...] = ()) -> list[str]:
    named = [part for target in targets for part in ("--target", str(target))]
    given = ["--model", place / "tiny", "--profile", place / "seconds.toml", "--out", place / "run"]
    return [*named, *map(str, given), "--threads", "1", "--max-candidates", "2", *more]


def events(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]


def report_of(place: Path, name: str = "report.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / name).read_text())
    return found


@pytest.mark.slow
def test_a_second_target_added_to_a_finished_run(run_cli: Callable[..., Any], place: Path) -> None:
    ran = run_cli(*command(place, "laptop-cpu"))
    assert ran.code == 0, ran.err
    alone, was = report_of(place), len(events(place))

    ran = run_cli(*command(place, "laptop-cpu", PI))
    assert ran.code == 0, ran.err
    # nothing but the second target's own: how its budget is held, and memory under flags of its own
    begun = {e["stage"].split(" ")[0] for e in events(place)[was:] if e["event"] == "start"}
    assert begun <= {"memory", "hold"}
    first, second = report_of(place), report_of(place, f"report-{PI}.json")
    rows = first.pop("targets")
    assert second.pop("targets") == rows
    assert {k: v for k, v in first.items() if v != alone[k]} == {
        name: first[name] for name in ("command", "digest")
    }
    assert (first["target"]["name"], second["target"]["name"]) == ("laptop-cpu", PI)
    assert [(r["target"], r["report"], r["page"]) for r in rows] == [
        ("laptop-cpu", "report.json", "report.html"),
        (PI, f"report-{PI}.json", f"report-{PI}.html"),
    ]
    for row, report in zip(rows, (first, second), strict=True):
        assert row["selected"]["id"] == report["selected"] == "dense@Q8_0"
        assert row["headline"] == report["headline"] and row["budget"] == report["budget"]
    here, board = (r["selected"]["measured"]["decode_tps"] for r in rows)
    assert here > 0 and board is None  # the board is not here: its speed is predicted only
    assert second["budget"]["memory"]["from"] == f"target {PI}"

    # each has its page and its bundle
    assert (place / "run" / "bundle" / "manifest.json").is_file()
    own = json.loads((place / "run" / f"bundle-{PI}" / "manifest.json").read_text())
    assert own["target"]["name"] == PI
    pages = [(place / "run" / r["page"]).read_text(encoding="utf-8") for r in rows]
    assert f'<a href="report-{PI}.html">{PI}</a>' in pages[0] and '<a href="report.html">' in pages[1]
    assert "<code>bundle/</code>" in pages[0] and f"<code>bundle-{PI}/</code>" in pages[1]

    # the terminal has the matrix first, predicted and measured speed apart
    lines = ran.out.splitlines()
    assert lines[0].split() == [
        "target",
        "selected",
        "memory",
        "limit",
        *("MB", "meas.", "t/s", "pred.", "t/s", "meas.", "KL"),
    ]
    assert lines[2].split()[:2] == [PI, "dense@Q8_0"] and lines[2].split()[-2] == "-"

    was = len(events(place))
    assert run_cli(*command(place, "laptop-cpu", PI)).code == 0
    assert [e["stage"] for e in events(place)[was:] if e["event"] == "start"] == []

    for name, target in (("laptop-cpu", "laptop-cpu"), (PI, PI)):
        ran = run_cli("report", place / "run", "--target", name, "--format", "json")
        assert json.loads(ran.out)["target"]["name"] == target
    ran = run_cli("report", place / "run", "--target", "raspbery-pi-5-8gb")
    assert (ran.code, ran.out) == (2, "")
    assert "has no target 'raspbery-pi-5-8gb' (did you mean 'raspberry-pi-5-8gb'?)" in ran.err
    ran = run_cli("report", place / "run", "--target", PI, "--html")
    assert ran.out == f"{place / 'run' / f'report-{PI}.html'}\n"


@pytest.mark.slow
def test_a_second_target_repeats_no_recovery(run_cli: Callable[..., Any], place: Path) -> None:
    training = ("--recovery", "full", "--recovery-tokens", "2048", "--recovery-length", "32")
    training += ("--recovery-batch", "4", "--recovery-samples", "24", "--out", str(place / "trained"))
    ran = run_cli(*command(place, "laptop-cpu", more=training))
    assert ran.code == 0, ran.err
    log = place / "trained" / "log.jsonl"
    was = len(log.read_text().splitlines())
    ran = run_cli(*command(place, "laptop-cpu", PI, more=training))
    assert ran.code == 0, ran.err
    both = [json.loads(line) for line in log.read_text().splitlines()]
    trained = [e["event"] for e in both[:was] if e["stage"] == "recover full"]
    assert trained == ["start", "done"]
    again = [e["event"] for e in both[was:] if e["stage"] == "recover full"]
    assert set(again) <= {"skip"}
    first, second = (
        json.loads((place / "trained" / name).read_text()) for name in ("report.json", f"report-{PI}.json")
    )
    (name,) = first["recoveries"]
    assert name.endswith("-full") and first["recoveries"] == second["recoveries"]
    rows = [next(c for c in r["candidates"] if c["plan"] == name) for r in (first, second)]
    assert rows[0]["artifact"] == rows[1]["artifact"] and rows[0]["quality"] == rows[1]["quality"]


@pytest.mark.slow
def test_one_target_without_an_answer_leaves_the_others_theirs(
    run_cli: Callable[..., Any], place: Path
) -> None:
    ran = run_cli(*command(place, place / "too-small.toml", "laptop-cpu"))
    assert ran.code == 3
    assert f"Error: {place / 'too-small.toml'}: Nothing fits the budget. Nearest: " in ran.err
    nothing, fine = report_of(place)["targets"]
    assert nothing["selected"] is None and nothing["missed"]
    assert fine["selected"]["id"] == "dense@Q8_0" == report_of(place, "report-laptop-cpu.json")["selected"]
    table = run_cli("report", place / "run").out.splitlines()
    assert table[1].split()[1:3] == ["nothing", "fits"]
    assert '<td class="left">nothing fits</td>' in (place / "run" / "report.html").read_text(encoding="utf-8")


def test_what_several_targets_cannot_have(run_cli: Callable[..., Any], place: Path) -> None:
    more = ("--device", "ssh://me@board", "--mode", "25W")
    ran = run_cli(*command(place, PI, PI, "laptop-cqu", more=more))
    assert (ran.code, ran.out) == (2, "")
    found = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert [line.split(" ")[1] for line in found] == ["unknown", "--target", "--device", "--mode"]
    assert found[1] == f"Error: --target {PI} is given twice"
