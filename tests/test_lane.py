"""The second look of verification: F16 rounding is told apart from a wrong file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")

from builders import tiny_model_with_tokenizer

from edgeprune import planner
from edgeprune.exporters import gguf
from edgeprune.pipeline.lane import Workshop
from edgeprune.pipeline.parent import open_folder
from edgeprune.records import BenchProtocol, TokenSet
from edgeprune.rundir import RunDir


@pytest.fixture
def shop(tmp_path: Path):
    parent = open_folder(tiny_model_with_tokenizer(tmp_path))
    windows = np.random.default_rng(0).integers(0, parent.graph.dims.vocab, (1, 32)).astype(np.int32)
    tokens = TokenSet(
        origin="random", seed=0, n_samples=1, n_tokens=32, sha256="0", path="none", key="tokens"
    )
    with RunDir(tmp_path / "run") as run:
        yield Workshop(
            run=run,
            parent=parent,
            stats={},
            stats_key="none",
            eval_set=tokens,
            eval_windows=windows,
            threads=1,
            protocol=BenchProtocol(prompt_tokens=8, new_tokens=4, repeats=5),
            device_name="this machine",
            measure_speed=False,
            memory_limit=1e9,
            flag_choices=[],
        )


def dense_plan(shop: Workshop) -> planner.PrunePlan:
    space = planner.PlanSpace(
        graph=shop.parent.graph,
        scores={},
        poolable=False,
        constraints=gguf.constraints(shop.parent.family, shop.parent.graph.dims, "F16"),
        metric="none",
    )
    return planner.plan_ratio(space, "uniform", 0.0)


def test_an_exact_f32_file_clears_the_f16_one(shop: Workshop) -> None:
    note = shop._blame_rounding(dense_plan(shop), shop.eval_windows, "key")
    assert note is not None and "agrees with torch at all 32 positions" in note
    assert not list(shop.run.root.rglob("*F32*"))


def test_a_file_that_computes_something_else_is_not_cleared(shop: Workshop) -> None:
    plan = dense_plan(shop)
    logits = shop._torch_logits(plan, shop.eval_windows)
    np.save(shop._logits_path(plan), np.roll(np.asarray(logits), 1, axis=2))
    assert shop._blame_rounding(plan, shop.eval_windows, "key") is None


def test_a_good_file_passes_without_a_second_look(shop: Workshop) -> None:
    plan = dense_plan(shop)
    result = shop.verify(plan, shop.artifact(plan, "F32"), exact=True)
    assert result.passed and result.note is None
    assert (result.same_argmax, result.explained_argmax, result.tokens) == (32, 0, 32)
    assert result.max_abs_diff < 1e-3 and result.kl < 1e-6
