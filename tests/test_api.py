"""`edgeprune.fit`: the documented example runs, and gives the records of the run folder."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from candidates import budget, candidate, small_profile, write_report

import edgeprune
from edgeprune import api, selection
from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target
from edgeprune.errors import ConfigError, InfeasibleError
from edgeprune.records import to_plain

ROOT = Path(__file__).resolve().parents[1]
PROFILE = small_profile(
    bench=(16, 4, 2),
    metric="magnitude",
    calibration_samples=2,
    calibration_tokens=32,
    eval_tokens=32,
    quantizations=["Q8_0", "Q4_0"],
    max_measured=8,
)


def example() -> str:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return code


@pytest.mark.slow
def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("torch", "transformers", "gguf", "llama_cpp"):
        pytest.importorskip(library)
    from builders import tiny_model_with_tokenizer

    tiny_model_with_tokenizer(tmp_path / "my-model", hidden=64, heads=4, kv_heads=2, ff=256, layers=2)
    (tmp_path / "seconds.toml").write_text(PROFILE)
    monkeypatch.chdir(tmp_path)
    # the example's call, with a profile that a random model of two layers finishes in seconds
    code = example().replace("max_candidates=4", "max_candidates=2, profile='seconds.toml', threads=1")
    names: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, names)
    result = names["result"]
    assert isinstance(result, edgeprune.Result)
    folder = tmp_path / "edgeprune-runs" / "my-model_laptop-cpu_seconds_200MB"
    report = json.loads((folder / "report.json").read_text())
    assert result.folder == folder and result.report == report
    assert [to_plain(c) for c in result.candidates] == report["candidates"]
    assert result.selected is not None and result.selected.id == report["selected"] == "dense@Q8_0"
    assert result.file is not None and result.file.stat().st_size == result.selected.artifact.bytes
    assert result.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    lines = said.getvalue().splitlines()
    assert lines[0] == report["headline"] and lines[1] == f"- {report['answers'][0]['text']}"
    assert f"dense@Q8_0 - {result.selected.reason}" in lines
    assert report["command"] == [
        "python",
        "-c",
        "import edgeprune; edgeprune.fit(model='my-model', target='laptop-cpu', budget='200MB', "
        "profile='seconds.toml', threads=1, max_candidates=2)",
    ]
    # the same again finds everything there
    was = (folder / "log.jsonl").read_text().count('"start"')
    again = edgeprune.fit(
        tmp_path / "my-model",
        target="laptop-cpu",
        budget=200_000_000,
        profile=tmp_path / "seconds.toml",
        threads=1,
        max_candidates=2,
        out=folder,
    )
    assert again.selected == result.selected
    assert (folder / "log.jsonl").read_text().count('"start"') == was
    with pytest.raises(InfeasibleError, match="Nothing fits the budget"):
        edgeprune.fit("my-model", target="laptop-cpu", budget="1MB", profile="seconds.toml", out="none")
    nothing = api.read("none")
    assert nothing.selected is None and nothing.file is None and nothing.launch is None
    assert nothing.answers[0]["code"] == "nothing-fits"


def test_reading_a_finished_run(tmp_path: Path) -> None:
    target, _ = load_target("raspberry-pi-5-8gb")
    rows = [candidate("dense", kl=0.1), candidate("other", kl=0.1001)]
    limits = budget()
    chosen = selection.select(limits, rows, lambda a, b: True)
    given = {"target": target, "profile": load_profile("chat-2k"), "limits": limits, "chosen": chosen}
    result = api.read(write_report(tmp_path / "run", rows, **given))
    assert result.candidates == tuple(rows) and result.target == target
    assert result.selected is None and result.headline.startswith("No candidate could be measured")
    with pytest.raises(ConfigError, match="does not exist"):
        api.read(tmp_path / "nowhere")


def test_wrong_arguments_are_named_together() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ConfigError) as found:
        edgeprune.fit(target="laptop-cpu", metrik="saap", sead=1)
    assert found.value.problems == (
        "fit: unknown argument 'metrik' (did you mean 'metric'?)",
        "fit: unknown argument 'sead'",
    )
    with pytest.raises(ConfigError, match="budget"):
        edgeprune.fit(target="laptop-cpu", budget="many")


def test_the_package_loads_without_torch(run_python: Callable[..., Any]) -> None:
    ran = run_python("import sys, edgeprune; edgeprune.fit; print('torch' in sys.modules)")
    assert (ran.code, ran.out) == (0, "False\n")
