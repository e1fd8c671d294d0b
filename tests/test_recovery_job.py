"""Recovery inside `prune` and the main job, on tiny models."""

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
pytest.importorskip("peft")

from builders import tiny_model_with_tokenizer
from candidates import small_profile

PROFILE = small_profile(quantizations=["F16"])
RECOVERY = (
    *("--recovery-mix", "1"),
    *("--recovery", "full", "--recovery-tokens", "4096", "--recovery-length", "32"),
    *("--recovery-samples", "48", "--recovery-rate", "1e-3"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(
        tmp_path_factory.mktemp("job") / "tiny", hidden=128, heads=4, kv_heads=2, ff=256, layers=3
    )


def test_the_main_job_recovers_what_it_prunes(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_text(PROFILE)
    asked = (
        "--target",
        "laptop-cpu",
        "--budget",
        "100MB",
        "--model",
        model,
        "--profile",
        tmp_path / "p.toml",
    )
    common = (*asked, "--threads", "1", "--format", "json")
    plain = run_cli(*common, "--out", tmp_path / "plain")
    ran = run_cli(*common, "--out", tmp_path / "recovered", *RECOVERY)
    assert (plain.code, ran.code) == (0, 0), ran.err
    before, after = json.loads(plain.out), json.loads(ran.out)
    assert before["recoveries"] == {}
    (name, said), *none_more = after["recoveries"].items()
    assert not none_more
    assert said["method"] == "full"
    assert said["kept"] is True
    assert said["kl_after"] < said["kl_before"]
    # the finalist stands beside itself before training, as the run without training measured it
    cut = name.removesuffix("-full")
    assert name == f"{cut}-full" and cut.startswith("uniform-")
    two = next(c for c in after["candidates"] if c["plan"] == name)
    one, plainly = (next(c for c in r["candidates"] if c["plan"] == cut) for r in (after, before))
    assert one["quality"] == plainly["quality"] and one["quantization"] == two["quantization"]
    assert two["verify"]["passed"]
    # measured through the runtime on other text than the training's: closer to the dense parent
    assert two["quality"]["kl"] < one["quality"]["kl"]
    dense = [next(c for c in r["candidates"] if c["plan"] == "dense") for r in (before, after)]
    assert dense[0]["quality"]["kl"] == dense[1]["quality"]["kl"]
    # a second call finds everything and says the same
    again = run_cli(*common, "--out", tmp_path / "recovered", *RECOVERY)
    assert json.loads(again.out)["recoveries"] == after["recoveries"]
    events = [json.loads(line) for line in (tmp_path / "recovered" / "log.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "done" and e["stage"] == "recover full" for e in events) == 1


def test_prune_recovers_in_one_command(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    cut = ("prune", model, "--ratio", "0.25", "--samples", "4", "--compensation", "none", "--format", "json")
    ran = run_cli(*cut, "--out", tmp_path / "out", *RECOVERY)
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["recovery"]["kept"] is True
    assert said["ratio"] == pytest.approx(0.25, abs=0.03)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    record = json.loads((tmp_path / "out" / "edgeprune_recovery.json").read_text())
    assert record["kl_after"] == said["recovery"]["kl_after"]


def test_recovery_trains_on_the_calibration_text(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"The lazy dog number {i} jumps over fox {7 * i % 31} again." for i in range(200))
    )
    cut = (
        "prune",
        model,
        "--ratio",
        "0.25",
        "--compensation",
        "none",
        "--calibration",
        text,
        "--samples",
        "4",
    )
    ran = run_cli(*cut, "--format", "json", "--out", tmp_path / "out", *RECOVERY)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["recovery"]["text"] == str(text)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            ("--recovery", "group", "--recovery-tokens", "9"),
            "--recovery group trains through one quantization",
        ),
        (("--recovery", "fulll"), "unknown recovery 'fulll' (did you mean 'full'?)"),
    ],
)
def test_the_main_job_refuses_at_once(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path, more: tuple[str, ...], problem: str
) -> None:
    ran = run_cli("--target", "laptop-cpu", "--model", model, "--out", tmp_path / "out", *more)
    assert ran.code == 2
    assert problem in ran.err
    assert not (tmp_path / "out").exists()
