"""Do the three ways of scoring agree with each other, and with lm-evaluation-harness itself?

    .venv/bin/python benchmarks/eval_paths.py --data ../shared/data --model FOLDER harness --items 100
    .venv/bin/python benchmarks/eval_paths.py --data ../shared/data --model FOLDER paths --items 500
    .venv/bin/python benchmarks/eval_paths.py --data ../shared/data --model FOLDER perplexity --tokens 65536

harness: our torch path against the harness's HFLM, same folder and items. paths: GGUF F16 and ONNX fp32
against torch; an answer is the choice with the highest log-likelihood. perplexity: WikiText-2 test, one
window, on all three. The GGUF file is scored twice: as it ships, and with its weights widened to float32
('gguf exact', what `edgeprune eval --exact` does). Exports and finished items lie in --work, where a stopped
run goes on. Tasks are those of which the data folder has a file. Rows go to
benchmarks/results/eval_paths.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from _common import RESULTS, machine

from edgeprune.evaluation import harness, localdata, suites, texts
from edgeprune.evaluation.engines import Engine, Settings, open_engine
from edgeprune.evaluation.groups import Store
from edgeprune.evaluation.harness import Answers
from edgeprune.pipeline import stages
from edgeprune.progress import Lines

# name -> format, quantization, how it is run
PATHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gguf exact": ("gguf", "F16", {"exact": True}),
    "onnx": ("onnx", "fp32", {}),
    "gguf": ("gguf", "F16", {}),
    # what each rounding of the last one does alone
    "gguf f32 cache": ("gguf", "F16", {"kv_type": "f32"}),
    "gguf f32 weights": ("gguf", "F32", {}),
}


def export(model: Path, work: Path, form: str, quantization: str) -> Path:
    """The folder in another format, made once."""
    suffix = ".gguf" if form == "gguf" else "-onnx"
    out = work / f"model-{quantization.lower()}{suffix}"
    if not out.exists():
        stages.export(
            *(str(model), out),
            format_name=form,
            quantization=quantization,
            imatrix_text=None,
            check=False,
            seed=0,
            threads=None,
            progress=Lines(sys.stderr),
        )
    return out


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = Settings(threads=args.threads)

    def engines(self) -> dict[str, Engine]:
        """Those asked for, by the name that rows have; torch, which they are compared with, first."""
        out = {"torch": open_engine(self.args.model, self.settings)}
        for name in self.args.paths:
            form, quantization, how = PATHS[name]
            file = export(self.args.model, self.args.work, form, quantization)
            out[name] = open_engine(file, dataclasses.replace(self.settings, **how))
        return out

    @contextlib.contextmanager
    def stage(self, n: int) -> Iterator[Any]:
        with Lines(sys.stderr).stage("scoring", n) as bar:
            yield bar

    def store(self, engine: Engine, what: str) -> Store:
        return Store(self.args.work / "items" / engine.key / f"{what}.jsonl")

    def answer(self, engine: Engine, task: str) -> tuple[Answers, float]:
        began = time.monotonic()
        made = harness.answer(
            engine,
            harness.open_task(task, self.args.data),
            self.store(engine, task),
            items=self.args.items,
            seed=self.args.seed,
            stage=self.stage,
        )
        return made, time.monotonic() - began


def against_harness(bench: Bench, task: str) -> dict[str, Any]:
    """Same folder, same items, same type; the harness's own batches."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    args = bench.args
    ours, seconds = bench.answer(open_engine(args.model, bench.settings), task)
    lm = HFLM(pretrained=str(args.model), device="cpu", dtype="float32", batch_size=8)
    opened = harness.open_task(task, args.data)
    began = time.monotonic()
    found = evaluator.evaluate(
        lm, {"tasks": {task: opened}}, samples={task: list(ours.docs)}, bootstrap_iters=0
    )
    their_seconds = time.monotonic() - began
    assert found is not None
    rows = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    ll = [tuple(float(r[0]) for r in s["filtered_resps"]) for s in rows]
    same = {
        m: int(sum(a == float(s[m]) for a, s in zip(v, rows, strict=True))) for m, v in ours.right.items()
    }
    return {
        "check": "harness",
        "task": task,
        "items": len(ours.docs),
        "same": same,
        "largest_ll_difference": max(
            abs(x - y) for p, q in zip(ours.ll, ll, strict=True) for x, y in zip(p, q, strict=True)
        ),
        "acc": ours.metrics["acc"][0],
        "acc_harness": float(np.mean([s["acc"] for s in rows])),
        "seconds": round(seconds, 1),
        "seconds_harness": round(their_seconds, 1),
    }


def against_torch(bench: Bench, task: str, engines: dict[str, Engine]) -> Iterator[dict[str, Any]]:
    dense, _ = bench.answer(engines["torch"], task)
    for name in bench.args.paths:
        got, seconds = bench.answer(engines[name], task)
        same = sum(int(np.argmax(x) == np.argmax(y)) for x, y in zip(got.ll, dense.ll, strict=True))
        apart = [abs(x - y) for p, q in zip(got.ll, dense.ll, strict=True) for x, y in zip(p, q, strict=True)]
        yield {
            "check": "paths",
            "path": name,
            "task": task,
            "items": len(got.docs),
            "same_answer": same / len(got.docs),
            "acc": got.metrics["acc"][0],
            "acc_torch": dense.metrics["acc"][0],
            "largest_ll_difference": max(apart),
            "mean_ll_difference": float(np.mean(apart)),
            "share_within_1e-2": float(np.mean(np.array(apart) <= 1e-2)),
            "seconds": round(seconds, 1),
        }


def perplexities(bench: Bench, engines: dict[str, Engine]) -> Iterator[dict[str, Any]]:
    args = bench.args
    text, source = texts.read("wikitext2", args.data)
    dense = None
    for name, engine in engines.items():
        began = time.monotonic()
        got = texts.perplexity(
            *(engine, "wikitext2", text, source, args.window),
            bench.store(engine, f"wikitext2-{args.window}"),
            tokens=args.tokens,
            stage=bench.stage,
        )
        dense = dense or got.value
        yield {
            "check": "perplexity",
            "path": name,
            "window": args.window,
            "tokens": got.tokens,
            "perplexity": got.value,
            "relative_to_torch": got.value / dense - 1,
            "seconds": round(time.monotonic() - began, 1),
        }


def keep(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Replace rows of the same question by the new ones; fewer items do not replace more."""
    same = ("model", "check", "path", "task", "window", "tokens")
    stored = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    rows = [{"model": args.model.resolve().name, "seed": args.seed, **r} for r in rows]
    for row in rows:
        print(json.dumps(row), flush=True)

    def worse(old: dict[str, Any], new: dict[str, Any]) -> bool:
        return all(old.get(k) == new.get(k) for k in same) and old.get("items", 0) <= new.get("items", 0)

    stored = [r for r in stored if not any(worse(r, new) for new in rows)]
    rows = [r for r in rows if not any(worse(r, old) for old in stored)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), "rows": [*stored, *rows]}, indent=1) + "\n")
    os.replace(part, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("check", choices=["harness", "paths", "perplexity"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--work", type=Path, default=Path("edgeprune-runs/eval-paths"))
    parser.add_argument("--tasks", nargs="*", default=list(suites.TASKS), choices=suites.TASKS)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--paths", nargs="*", default=list(PATHS)[:3], choices=PATHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "eval_paths.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    tasks = [t for t in args.tasks if localdata.task_file(args.data, t) is not None]
    if not tasks and args.check != "perplexity":
        raise SystemExit(f"{args.data} has no file of any of these tasks")
    if args.check == "harness":
        for task in tasks:
            keep(args, [against_harness(bench, task)])
        return
    engines = bench.engines()
    if args.check == "perplexity":
        for row in perplexities(bench, engines):
            keep(args, [row])
        return
    for task in tasks:
        for row in against_torch(bench, task, engines):
            keep(args, [row])


if __name__ == "__main__":
    main()
