"""`prune` with everything around the metric: compensation, small steps, curves, whole blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import edgeprune
from edgeprune import checkpoint, graph, planner, rundir, surgery, tokenizer
from edgeprune.cli.main import cli
from edgeprune.errors import EdgepruneError
from edgeprune.pipeline import prepare, refine
from edgeprune.pipeline.parent import open_parent
from edgeprune.progress import Silent
from tests import builders

WORDS = "the cat sat on a mat and the dog ran to the old red house by the sea "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.tiny_model_with_tokenizer(tmp_path_factory.mktemp("refine") / "m")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(WORDS.split(), size=6000)))
    return path


def prune(model: Path, out: Path, text: Path, *more: str) -> dict[str, Any]:
    args = ["prune", str(model), "--out", str(out), "--calibration", str(text), "--samples", "8"]
    if "--allocator" not in more:
        args += ["--allocator", "uniform"]
    if "--compensation" not in more:
        args += ["--compensation", "none"]
    args += ["--length", "32", "--width-multiple", "8", "--compensation-samples", "8", "--format", "json"]
    done = CliRunner().invoke(cli, [*args, *more], obj=(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads((out / "edgeprune_plan.json").read_text())


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 96, (4, 32)))
    with torch.no_grad():
        return edgeprune.load(folder)(tokens, use_cache=False).logits


def test_ridge_changes_o_and_down_only(model: Path, text: Path, tmp_path: Path) -> None:
    plain = prune(model, tmp_path / "a", text, "--ratio", "0.3")
    ridge = prune(model, tmp_path / "b", text, "--ratio", "0.3", "--compensation", "ridge")
    assert (plain["compensation"], ridge["compensation"]) == ("none", "ridge")
    assert plain["kept"] == ridge["kept"] and plain["key"] != ridge["key"]
    a, b = (checkpoint.SafetensorsSource(tmp_path / n) for n in "ab")
    changed = {n for n in a.names() if not torch.equal(a.tensor(n), b.tensor(n))}
    cut = {"down_proj": "ffn", "o_proj": "kv"}
    expected = {
        n
        for n in a.names()
        for k, u in cut.items()
        if k in n and f"layers.{n.split('.')[2]}.{u}" in plain["kept"]
    }
    assert changed == expected and changed


def test_the_default_recipe(model: Path, text: Path, tmp_path: Path) -> None:
    args = [
        "prune",
        str(model),
        "--ratio",
        "0.25",
        "--calibration",
        str(text),
        "--samples",
        "8",
        "--length",
        "32",
    ]
    args += ["--width-multiple", "8", "--compensation-samples", "8"]
    spelled = ["--metric", "llm-bip", "--allocator", "inner"]
    for name, more in (("a", []), ("b", [*spelled, "--compensation", "ridge", "--steps", "1"])):
        done = CliRunner().invoke(cli, [*args, *more, "--out", str(tmp_path / name)], obj=())
        assert done.exit_code == 0, done.output
    first, second = ((tmp_path / n / "edgeprune_plan.json").read_text() for n in "ab")
    assert first == second
    plan = json.loads(first)
    assert (plan["allocator"], plan["compensation"]) == ("inner", "ridge")
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


def test_ratio_zero_with_everything_on_is_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    prune(
        model, tmp_path / "a", text, "--ratio", "0", "--compensation", "ridge",
        "--allocator", "sensitivity", "--steps", "3", "--blocks",
    )  # fmt: skip
    assert torch.equal(logits(tmp_path / "a"), logits(model))


def test_bias_is_wired_and_exported(model: Path, text: Path, tmp_path: Path) -> None:
    made = prune(model, tmp_path / "a", text, "--ratio", "0.3", "--compensation", "bias", "--metric", "flap")
    assert made["dims"]["o_bias"] and made["dims"]["mlp_bias"]
    source = checkpoint.SafetensorsSource(tmp_path / "a")
    assert float(source.tensor("model.layers.1.mlp.down_proj.bias").abs().max()) > 0
    assert float(source.tensor("model.layers.1.mlp.gate_proj.bias").abs().max()) == 0
    prune(model, tmp_path / "b", text, "--ratio", "0.3", "--metric", "flap")
    whole = logits(model)
    assert not torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    assert torch.isfinite(whole).all()
    # a plan with biases can be cut along again, without them
    done = CliRunner().invoke(
        cli, ["prune", str(model), "--plan", str(tmp_path / "a" / "edgeprune_plan.json"), "--out",
              str(tmp_path / "c")], obj=(), catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    assert torch.equal(logits(tmp_path / "c"), logits(tmp_path / "b"))


@pytest.mark.parametrize("allocator", ["sensitivity", "search"])
def test_measured_allocators(model: Path, text: Path, tmp_path: Path, allocator: str) -> None:
    made = prune(
        model, tmp_path / "a", text, "--ratio", "0.25", "--allocator", allocator, "--compensation", "ridge"
    )
    assert made["allocator"] == allocator
    assert made["ratio"] == pytest.approx(0.25, abs=0.03)
    assert all("KL" in why for why in made["why"].values())
    again = prune(
        model, tmp_path / "b", text, "--ratio", "0.25", "--allocator", allocator, "--compensation", "ridge"
    )
    assert again["kept"] == made["kept"]


def test_steps_reach_the_same_widths_with_other_units(model: Path, text: Path, tmp_path: Path) -> None:
    once = prune(model, tmp_path / "a", text, "--ratio", "0.5")
    thrice = prune(model, tmp_path / "b", text, "--ratio", "0.5", "--steps", "3", "--compensation", "ridge")
    assert thrice["steps"] == 3
    assert {k: len(v) for k, v in once["kept"].items()} == {k: len(v) for k, v in thrice["kept"].items()}
    assert once["kept"] != thrice["kept"]
    assert once["dims"] == thrice["dims"]


def test_units_chosen_again(model: Path, text: Path, tmp_path: Path) -> None:
    # the metric says nothing, so what is chosen comes from the inputs
    args = ("--ratio", "0.5", "--metric", "random", "--compensation", "ridge")
    once = prune(model, tmp_path / "a", text, *args)
    again = prune(model, tmp_path / "b", text, *args, "--rechoose")
    other = prune(model, tmp_path / "c", text, *args, "--rechoose", "--calibration-seeds", "2")
    assert {k: len(v) for k, v in once["kept"].items()} == {k: len(v) for k, v in again["kept"].items()}
    assert once["kept"] != again["kept"] == other["kept"]
    whole = torch.log_softmax(logits(model), dim=-1)
    far = {n: float((whole - torch.log_softmax(logits(tmp_path / n), dim=-1)).square().mean()) for n in "ab"}
    assert far["b"] < far["a"]


def test_one_step_is_no_step(model: Path, text: Path, tmp_path: Path) -> None:
    once = prune(model, tmp_path / "a", text, "--ratio", "0.5")
    one = prune(model, tmp_path / "b", text, "--ratio", "0.5", "--steps", "1")
    assert once["kept"] == one["kept"] and once["key"] == one["key"]


def test_block_influence_removes_whole_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    made = prune(
        model, tmp_path / "a", text, "--ratio", "0.3", "--metric", "block-influence",
        "--allocator", "global", "--blocks",
    )  # fmt: skip
    layers = made["dims"]["layers"]
    assert {(s["n_heads"], s["n_kv_heads"]) for s in layers} <= {(4, 2), (0, 0)}
    assert {s["n_ff"] for s in layers} <= {0, 128}
    assert any(s["n_ff"] == 0 or s["n_heads"] == 0 for s in layers)
    assert layers[0]["n_heads"] == 4
    assert torch.isfinite(logits(tmp_path / "a")).all()
    # removed is what zeroing the block would do
    source = checkpoint.SafetensorsSource(model)
    dense = graph.build(source.config)
    kept = {k: tuple(v) for k, v in made["kept"].items()}
    assert set(map(len, kept.values())) == {0}
    whole = checkpoint.assemble(source, dense.dims)
    for name in kept:
        layer = whole.model.layers[int(name.split(".")[1])]
        matrix = layer.mlp.down_proj if name.endswith("ffn") else layer.self_attn.o_proj
        matrix.weight.data = torch.zeros_like(matrix.weight)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 96, (4, 32)))
    with torch.no_grad():
        assert torch.allclose(whole(tokens, use_cache=False).logits, logits(tmp_path / "a"), atol=1e-5)


def test_a_layer_that_lost_everything(model: Path, tmp_path: Path) -> None:
    source = checkpoint.SafetensorsSource(model)
    dense = graph.build(source.config)
    kept: dict[str, tuple[int, ...]] = {"layers.1.kv": (), "layers.1.ffn": ()}
    pruned = surgery.PrunedSource(source, dense, kept)
    dims = graph.prune_dims(dense, kept)
    surgery.save(tmp_path / "a", pruned, graph.graph_of(graph.find_family("llama"), dims).shapes)
    assert torch.isfinite(logits(tmp_path / "a")).all()


def test_what_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    args = ["prune", str(model), "--out", str(tmp_path / "x"), "--ratio", "0.2", "--calibration", str(text)]
    done = CliRunner().invoke(
        cli, [*args, "--steps", "2", "--metric", "wanda-sp", "--metric-option", "sequential=yes"], obj=()
    )
    assert isinstance(done.exception, EdgepruneError)
    assert "scores in one pass" in done.exception.message
    assert not (tmp_path / "x").exists()


def test_every_allocator_is_named_in_the_help() -> None:
    text = CliRunner().invoke(cli, ["prune", "--help"]).output
    for name in planner.ALLOCATORS:
        assert name in text


def test_where_training_follows_the_end_of_the_text_is_not_solved_on(model: Path, tmp_path: Path) -> None:
    # the last tenth is of another word, which a recovery would be validated on
    path = tmp_path / "t.txt"
    path.write_text("cat " * 3600 + "sea " * 400)
    with rundir.RunDir(tmp_path / "run") as run:
        parent = open_parent(str(model), run)
        tokens = prepare.Tokens(run, parent, Silent())
        last = set(tokenizer.encode(parent.folder, "sea ")) - set(tokenizer.encode(parent.folder, "cat "))
        assert last

        def windows(trained_on: bool) -> np.ndarray:
            found = refine.text_for(
                tokens, parent, str(path), samples=10_000, length=32, seed=0, trained_on=trained_on
            )
            return found.windows

        whole, spared = windows(False), windows(True)
    assert np.isin(whole, list(last)).any()
    assert not np.isin(spared, list(last)).any()
    assert spared.size / whole.size == pytest.approx(0.85, abs=0.02)
