"""Sequential metrics and several calibration seeds through the verbs, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from builders import tiny_model_with_tokenizer
from safetensors.numpy import load_file

from edgeprune import calibration, checkpoint, graph, planner, registry, rundir, stability, tokenizer
from edgeprune.data import windows as draw
from edgeprune.metrics.base import Metric
from edgeprune.pipeline import light, prepare
from edgeprune.pipeline.parent import open_folder
from edgeprune.progress import Silent
from edgeprune.records import PrunePlan, loads

SMALL = ("--samples", "4", "--length", "24")
# the metric alone, nothing around it
PLAIN = ("--allocator", "uniform", "--compensation", "none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"The quick brown fox jumps over dog number {i} again, {7 * i} times." for i in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def opened(model: Path) -> tuple[checkpoint.SafetensorsSource, Any]:
    source = checkpoint.SafetensorsSource(model)
    return source, graph.build(source.config)


def windows_of(model: Path, text: Path, seed: int) -> np.ndarray:
    return draw(
        text.read_text(),
        lambda t: tokenizer.encode(model, t),
        n_samples=4,
        n_tokens=24,
        seed=seed,
        where="text",
    )


def by_hand(model: Path, text: Path, seed: int, name: str = "llm-bip", **given: str) -> dict[str, np.ndarray]:
    """Scores of one draw from the dense model's statistics, without any verb."""
    source, built = opened(model)
    metric: Metric = registry.load("metrics", name, "METRIC")
    options = metric.resolve(given)
    needs = metric.needs(options) | calibration.IMATRIX_NEEDS
    arrays = calibration.collect(source, built, windows_of(model, text, seed), needs)
    return calibration.score(metric, options, source, built, arrays, seed=seed)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


def plan_in(folder: Path) -> PrunePlan:
    return loads(PrunePlan, (folder / "edgeprune_plan.json").read_text())


# ---------------------------------------------------------------- sequential


@pytest.mark.parametrize(("name", "option"), [("wanda-sp", "sequential=yes"), ("llm-bip", "sequential=yes")])
def test_prune_scores_on_the_pruned_layers(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path, name: str, option: str
) -> None:
    out = tmp_path / "out"
    # wanda-sp is sequential by default
    switch = () if name == "wanda-sp" else ("--metric-option", option)
    args = ("prune", model, "--metric", name, *switch, "--ratio", "0.4", "--width-multiple", "8", *PLAIN)
    assert run_cli(*args, "--calibration", text, *SMALL, "--protect-first", "1", "--out", out).code == 0
    source, built = opened(model)
    metric: Metric = registry.load("metrics", name, "METRIC")
    space = planner.PlanSpace(
        graph=built,
        scores={},
        poolable=False,
        constraints=light.hand_constraints(8),
        metric=name,
        protected=frozenset((0,)),
    )
    widths = planner.uniform_widths(space, 0.4)
    found = calibration.score_sequential(
        metric,
        metric.resolve({"sequential": "yes"}),
        source,
        built,
        windows_of(model, text, 0),
        lambda axis, scores: np.argsort(-scores, kind="stable")[: widths[axis.name]].tolist(),
        seed=0,
    )
    plan = plan_in(out)
    assert plan.kept == found.kept
    assert {axis.split(".")[1] for axis in plan.kept} == {"1", "2"}
    # the dense model's statistics choose other channels
    dense = tmp_path / "dense"
    off = ("--metric-option", "sequential=no")
    args = ("prune", model, "--metric", name, *off, "--ratio", "0.4", "--width-multiple", "8", *PLAIN)
    assert run_cli(*args, "--calibration", text, *SMALL, "--protect-first", "1", "--out", dense).code == 0
    assert plan_in(dense).kept != plan.kept
    assert plan_in(dense).dims == plan.dims


def test_sequential_with_one_threshold_for_all_layers(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    base = ("--metric-option", "form=C", "--ratio", "0.4", "--allocator", "global", "--width-multiple", "8")
    base = (*base, "--compensation", "none")
    rest = ("--calibration", text, *SMALL)
    assert run_cli("prune", model, *base, *rest, "--out", tmp_path / "dense").code == 0
    ran = run_cli(
        *("prune", model, *base, *rest, "--metric-option", "sequential=yes", "--out", tmp_path / "seq")
    )
    assert ran.code == 0
    assert "widths from the dense model's scores, units from the pruned one's" in ran.err
    # the same widths, filled with other units
    assert plan_in(tmp_path / "dense").dims == plan_in(tmp_path / "seq").dims
    assert plan_in(tmp_path / "dense").kept != plan_in(tmp_path / "seq").kept


def test_score_has_no_widths_and_says_so(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    ran = run_cli("score", model, "--metric", "wanda-sp", "--calibration", text, *SMALL, "--out", out)
    assert ran.code == 0
    assert "wanda-sp: sequential=yes needs one ratio" in ran.err
    assert "wanda-sp sequential=no\n" in ran.out
    assert json.loads(light.record_path(out).read_text())["scores"]["options"] == {"sequential": "no"}
    assert same(load_file(out), by_hand(model, text, 0, "wanda-sp", sequential="no"))
    # nothing to say for the others
    ran = run_cli("score", model, "--calibration", text, *SMALL, "--out", out)
    assert "sequential=yes" not in ran.err


# ---------------------------------------------------------------- seeds


def test_one_seed_is_what_it_was(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    args = ("score", model, "--calibration", text, *SMALL, "--seed", "3", "--out", out)
    ran = run_cli(*args, "--calibration-seeds", "1", "--format", "json")
    assert ran.code == 0
    assert same(load_file(out), by_hand(model, text, 3))
    found = json.loads(ran.out)
    assert (found["seeds"], found["rank_stability"]) == ([], [])
    assert "rank stability" not in run_cli(*args).out


def test_seeds_are_averaged_and_compared(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    args = ("score", model, "--calibration", text, *SMALL, "--seed", "3", "--out", out)
    ran = run_cli(*args, "--calibration-seeds", "3", "--format", "json")
    assert ran.code == 0
    draws = [by_hand(model, text, seed) for seed in (3, 4, 5)]
    got = load_file(out)
    for axis in draws[0]:  # llm-bip's form B is not poolable: each draw divided by its mean
        rows = [d[axis].astype(float) / d[axis].astype(float).mean() for d in draws]
        assert got[axis] == pytest.approx(np.mean(rows, axis=0), rel=1e-6)
    _, built = opened(model)
    want = {s.unit: s for s in stability.rank_stability(draws, built.axes)}
    found = json.loads(ran.out)
    assert found["seeds"] == [3, 4, 5]
    assert [row["unit"] for row in found["rank_stability"]] == ["ffn", "kv"]
    for row in found["rank_stability"]:
        assert row["mean"] == pytest.approx(want[row["unit"]].mean)
        assert row["minimum"] == pytest.approx(want[row["unit"]].minimum)
        assert row["axes"] == 3
    stored = json.loads(light.record_path(out).read_text())["scores"]
    assert stored["seeds"] == [3, 4, 5] and stored["stability"] == found["rank_stability"]
    table = run_cli(*args, "--calibration-seeds", "3").out
    ffn = want["ffn"]
    assert f"Spearman {ffn.mean:.3f} between 3 seeds, lowest {ffn.minimum:.3f} of 3 axes" in table
    # a plan can be made from them
    plan = ("plan", model, "--scores", out, "--ratio", "0.2", "--out", tmp_path / "plan.json")
    assert run_cli(*plan).code == 0


def test_poolable_scores_keep_their_scale(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    args = ("score", model, "--metric-option", "form=A", "--calibration", text, *SMALL, "--out", out)
    assert run_cli(*args, "--calibration-seeds", "2").code == 0
    draws = [by_hand(model, text, seed, form="A") for seed in (0, 1)]
    for axis, value in load_file(out).items():
        mean = (draws[0][axis].astype(float) + draws[1][axis]) / 2
        assert value == pytest.approx(mean, rel=1e-6)


def test_prune_over_seeds(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    base = ("--ratio", "0.3", "--width-multiple", "8", *PLAIN, "--calibration", text, *SMALL)
    ran = run_cli(
        *("prune", model, *base, "--calibration-seeds", "2", "--format", "json", "--out", tmp_path / "p")
    )
    assert ran.code == 0
    scores = json.loads(ran.out)["scores"]
    assert scores["seeds"] == [0, 1]
    assert all(-1 <= row["minimum"] <= row["mean"] <= 1 for row in scores["rank_stability"])
    mean = stability.mean_scores([by_hand(model, text, s) for s in (0, 1)], poolable=False)
    for axis, kept in plan_in(tmp_path / "p").kept.items():
        assert kept == planner.best_units(mean[axis], len(kept))
    ran = run_cli(
        *("prune", model, "--metric", "wanda-sp", *base, "--calibration-seeds", "2", "--out", tmp_path / "w")
    )
    assert ran.code == 0 and "rank stability ffn" in ran.out


def test_metrics_without_a_draw(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    def stable(metric: str) -> dict[str, float]:
        out = tmp_path / "s.safetensors"
        args = ("score", model, "--metric", metric, "--calibration-seeds", "3", "--format", "json")
        rows = json.loads(run_cli(*args, "--out", out).out)["rank_stability"]
        return {row["unit"]: row["mean"] for row in rows}

    assert stable("magnitude") == {"ffn": 1.0, "kv": 1.0}  # weights do not change with the seed
    assert abs(stable("random")["ffn"]) < 0.2


def test_self_sampled_draws_come_from_one_pass(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    ran = run_cli("score", model, *SMALL, "--calibration-seeds", "2", "--out", out)
    assert ran.code == 0
    assert ran.err.count("sample text: done") <= 1
    assert "4 x 24 tokens, sampled from the model, 2 seeds" in ran.out


def test_draws_are_found_again(model: Path, text: Path, tmp_path: Path) -> None:
    """The main job's path: every draw is a finished stage, and so is their mean."""
    metric, options = prepare.load_metric("llm-bip", {})
    said: list[str] = []

    class Saying(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    def work() -> tuple[Any, dict[str, np.ndarray]]:
        with rundir.RunDir(tmp_path / "run") as run:
            parent = open_folder(model)
            tokens = prepare.Tokens(run, parent, Saying())
            draws = []
            for seed in (0, 1):
                chosen, windows = tokens.get(str(text), n_samples=4, n_tokens=24, seed=seed)
                given = (run, parent, metric, options, chosen, windows)
                draws.append(prepare.calibrate(*given, seed=seed, progress=Saying())[1:])
            return prepare.over_seeds(run, parent, metric, options, (0, 1), draws, Saying())

    record, values = work()
    again, same_values = work()
    assert again == record and same(values, same_values)
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "done" and e["stage"] == "score" for e in events) == 3
    assert said[0] == said[1] and said[0].startswith("rank stability: Spearman between 2 seeds: ffn ")
