"""Tasks through lm-evaluation-harness: our answers against its own HFLM, item by item."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from edgeprune.errors import ConfigError
from edgeprune.evaluation import harness, localdata, suites
from edgeprune.evaluation.engines import Settings
from tests.builders import tiny_model_with_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "again", "and"]


def phrase(rng: np.random.Generator, n: int) -> str:
    return " ".join(WORDS[int(i)] for i in rng.integers(0, len(WORDS), n))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task in its official layout, twelve items each."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def put(relative: str, rows: list[Any]) -> None:
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))

    def p(n: int) -> str:
        return phrase(rng, n)

    def question(i: int, n: int) -> dict[str, Any]:
        choices = [{"text": p(1 + int(rng.integers(4))), "label": "ABCDE"[c]} for c in range(n)]
        return {"id": str(i), "question": {"stem": p(6), "choices": choices}, "answerKey": "ABCDE"[i % n]}

    n = range(12)
    put("boolq/val.jsonl", [{"question": p(4), "passage": p(20), "idx": i, "label": i % 3 == 0} for i in n])
    put("piqa/valid.jsonl", [{"goal": p(5), "sol1": p(4), "sol2": p(7)} for _ in n])
    put("piqa/valid-labels.lst", [str(i % 2) for i in n])
    lines = [[f"Cooking: {p(5)}. {p(3)}", str(i % 4), p(3), p(4), p(2), p(5)] for i in n]
    put("hellaswag/hellaswag_val_full.txt", [x for item in lines for x in item])
    winogrande = [
        {"sentence": f"{p(3)} _ {p(4)}.", "option1": "fox", "option2": "lazy dog", "answer": str(1 + i % 2)}
        for i in n
    ]
    put("winogrande/dev.jsonl", winogrande)
    put("arc/ARC-Easy-Test.jsonl", [question(i, 4) for i in n])
    put("arc/ARC-Challenge-Test.jsonl", [question(i, 3 + i % 3) for i in n])
    put("openbookqa/test.jsonl", [question(i, 4) for i in n])
    put("wikitext-2/wiki.test.raw", [p(40) for _ in n])
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(tmp_path_factory.mktemp("model"))


def theirs(folder: Path, task: Any, docs: list[int]) -> list[dict[str, Any]]:
    """The harness's own model class on the same folder."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    name = task.config.task
    found = evaluator.evaluate(lm, {"tasks": {name: task}}, samples={name: docs}, bootstrap_iters=1000)
    assert found is not None
    rows = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    return [*rows, found["results"][name]]


@pytest.mark.parametrize("name", suites.TASKS)
def test_items_are_answered_as_by_the_harness_itself(
    name: str, folder: Path, data: Path, tmp_path: Path
) -> None:
    from edgeprune.evaluation.engines import open_engine
    from edgeprune.evaluation.groups import Store
    from tests.test_eval import _quiet

    engine = open_engine(folder, Settings())
    task = harness.open_task(name, data)
    got = harness.answer(engine, task, Store(tmp_path / "s.jsonl"), items=10, seed=1, stage=_quiet)
    *rows, result = theirs(folder, harness.open_task(name, data), list(got.docs))
    assert (len(got.docs), got.total) == (10, 12)
    assert [s["doc_id"] for s in rows] == list(got.docs)
    for metric, values in got.right.items():
        assert list(values) == [float(s[metric]) for s in rows]
        assert got.metrics[metric] == pytest.approx(
            (result[f"{metric},none"], result[f"{metric}_stderr,none"]), abs=1e-9
        )
    for ll, sample in zip(got.ll, rows, strict=True):
        assert ll == pytest.approx([r[0] for r in sample["filtered_resps"]], abs=1e-3)
    assert ("acc_norm" in got.right) == (name not in ("boolq", "winogrande"))


def test_a_smaller_draw_lies_inside_a_larger_one() -> None:
    small, large = (set(harness.chosen_docs(1000, n, seed=3)) for n in (50, 200))
    assert len(small) == 50 and small < large
    assert harness.chosen_docs(1000, 50, seed=4) != sorted(small)
    assert harness.chosen_docs(10, None, seed=0) == harness.chosen_docs(10, 99, seed=0) == list(range(10))


def test_the_verb_scores_tasks_names_metrics_apart_and_pairs(
    run_cli: Callable[..., Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    other = tiny_model_with_tokenizer(tmp_path / "other", seed=9)
    args = ("eval", folder, "--suite", "papers", "--data", data, "--tasks", "piqa,boolq", "--compare", other)
    shown = run_cli(*args, "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    table = [line.split() for line in shown.out.splitlines()]
    assert [row[:2] for row in table[1:4]] == [["boolq", "acc"], ["piqa", "acc"], ["piqa", "acc_norm"]]
    assert shown.out.splitlines()[-1].startswith("mean of 2 tasks: ")
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    for mine, pair in zip(found["tasks"], found["against"]["tasks"], strict=True):
        for metric, p in pair["metrics"].items():
            assert p["difference"] == pytest.approx(mine["metrics"][metric]["value"] - p["reference"])
            assert p["difference"] == pytest.approx((p["only_a"] - p["only_b"]) / 12)
            assert p["low"] <= p["difference"] <= p["high"]
    plain = [t["metrics"]["acc"]["value"] for t in found["tasks"]]
    assert found["averages"]["acc"] == pytest.approx(sum(plain) / 2)
    more = run_cli(*args, "--out", tmp_path / "out")
    assert more.out == shown.out and ": piqa" not in more.err


def test_missing_files_of_several_tasks_are_named_at_once(tmp_path: Path) -> None:
    from edgeprune.evaluation import run

    suite = suites.Suite(tasks=("piqa", "winogrande"))
    with pytest.raises(ConfigError) as caught:
        run.open_sources(suite, tmp_path)
    assert caught.value.problems == (
        f"{tmp_path} has no piqa/valid.jsonl",
        f"{tmp_path} has no winogrande/dev.jsonl",
    )


@pytest.mark.shared
@pytest.mark.skipif(not DATA.is_dir(), reason="the data folder is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "count"), [("boolq", 3270), ("piqa", 1838), ("arc_easy", 2376), ("arc_challenge", 1172)]
)
def test_the_harness_reads_every_gold_of_the_local_data(name: str, count: int) -> None:
    task = harness.open_task(name, DATA)
    path = localdata.task_file(DATA, name)
    assert path is not None
    docs = list(task.eval_docs)
    rows = localdata.read_task(path, name)
    golds = [r["choices"]["label"].index(r["answerKey"]) if "choices" in r else int(r["label"]) for r in rows]
    assert len(docs) == count
    assert [int(task.doc_to_target(d)) for d in docs] == golds
