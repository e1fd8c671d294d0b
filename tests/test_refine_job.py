"""The main job with measured allocation and compensation, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from builders import tiny_model_with_tokenizer
from candidates import small_profile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(
        tmp_path_factory.mktemp("job") / "tiny", hidden=128, heads=4, kv_heads=2, ff=256, layers=3
    )


def run_job(run_cli: Callable[..., Any], model: Path, folder: Path, kind: str, *more: str) -> dict[str, Any]:
    profile = folder / f"{kind}.toml"
    profile.write_text(
        small_profile(
            compensation=kind,
            allocators=["sensitivity"],
            quantizations=["F16", "Q4_0"],
            max_measured=3,
            compensation_samples=8,
            compensation_tokens=64,
        )
    )
    ran = run_cli(
        *("--target", "laptop-cpu", "--budget", "100MB", "--model", model, "--profile", profile),
        *("--out", folder / kind, "--threads", "1", "--format", "json", *more),
    )
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


@pytest.mark.parametrize("kind", ["ridge", "bias"])
def test_compensated_candidates_are_verified(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path, kind: str
) -> None:
    report = run_job(run_cli, model, tmp_path, kind)
    pruned = [c for c in report["candidates"] if c["ratio"] > 0 and c["measured"]]
    assert pruned
    for c in pruned:
        assert c["error"] is None and c["verify"]["passed"]
        assert c["artifact"]["bytes"] == c["predicted"]["file_bytes"]
    lines = [row["why"] for row in report["plans"] if row["ratio"] > 0]
    assert lines and all("KL" in text for why in lines for text in why.values())
    assert {row["compensation"] for row in report["plans"] if row["ratio"] > 0} == {kind}
    again = run_job(run_cli, model, tmp_path, kind)
    assert again["candidates"] == report["candidates"]
    events = [json.loads(line) for line in (tmp_path / kind / "log.jsonl").read_text().splitlines()]
    made = [e["stage"] for e in events if e["event"] == "done"]
    assert made.count("sensitivity") == 1
    exports = [name for name in made if name.startswith("export")]
    assert len(exports) == len(set(exports))
    if kind == "ridge":
        assert [name for name in made if name.startswith("compensate")] == [f"compensate {pruned[0]['plan']}"]


def test_only_finalists_are_solved_anew(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    profile = tmp_path / "p.toml"
    recipe = {"finalists": "ridge", "compensation_samples": 8, "compensation_tokens": 64, "max_measured": 4}
    profile.write_text(small_profile(quantizations=["Q8_0", "Q4_0"], ratios=[0.1], **recipe))
    # the dense Q4_0 file has 0.66 MB: below that something has to go, at either type
    asked = (
        *("--target", "laptop-cpu", "--budget", "100MB", "--model", model, "--profile", profile),
        *("--out", tmp_path / "run", "--threads", "1", "--format", "json"),
    )
    dense = json.loads(run_cli(*asked, "--max-candidates", "1").out)
    smallest = min(c["predicted"]["file_bytes"] for c in dense["candidates"] if c["ratio"] == 0)
    tight = (*asked, "--max-file", f"{smallest - 20_000}B")
    report = json.loads(run_cli(*tight).out)
    measured = [c for c in report["candidates"] if c["measured"]]
    plain = [c for c in measured if not c["plan"].endswith("-ridge")]
    solved = [c for c in measured if c["plan"].endswith("-ridge")]
    assert 1 <= len(solved) <= 2 and plain and all(c["ratio"] > 0 for c in measured)
    pairs = {(c["plan"].removesuffix("-ridge"), c["quantization"]) for c in solved}
    assert pairs <= {(c["plan"], c["quantization"]) for c in plain}
    # the best before is among those that were solved anew, and files keep their size
    best = min(plain, key=lambda c: c["quality"]["kl"])
    assert (best["plan"], best["quantization"]) in pairs
    for c in solved:
        twin = next(p for p in plain if (p["plan"], p["quantization"]) == (c["plan"][:-6], c["quantization"]))
        assert c["artifact"]["bytes"] == twin["artifact"]["bytes"] == c["predicted"]["file_bytes"]
        assert c["artifact"]["sha256"] != twin["artifact"]["sha256"]
    kinds = {row["id"]: row["compensation"] for row in report["plans"]}
    assert {kinds[c["plan"]] for c in solved} == {"ridge"} and {kinds[c["plan"]] for c in plain} == {"none"}
    assert report["search"]["measured"] == len(measured)
    again = json.loads(run_cli(*tight).out)
    assert again["candidates"] == report["candidates"] and again["selected"] == report["selected"]


def test_search_is_refused(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    ran = run_cli(
        *("--target", "laptop-cpu", "--budget", "100MB", "--model", model, "--out", tmp_path / "x"),
        *("--allocator", "search"),
    )
    assert ran.code == 2
    assert "the search allocator runs the model many times for each plan" in ran.err
    assert not (tmp_path / "x").exists()
