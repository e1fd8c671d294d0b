"""Score an artifact on a suite, resumably, and compare it with another one item by item."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import quality, rundir
from edgeprune.errors import ConfigError
from edgeprune.evaluation import engines, harness, paired, texts
from edgeprune.evaluation.engines import Settings
from edgeprune.evaluation.groups import Store
from edgeprune.evaluation.harness import Answers
from edgeprune.evaluation.suites import Suite
from edgeprune.evaluation.texts import Perplexity
from edgeprune.progress import Progress, Stage

SCHEMA = 1
FILE_NAME = "eval.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Everything that was scored of one artifact."""

    path: str
    kind: str
    key: str
    texts: tuple[Perplexity, ...]
    tasks: tuple[Answers, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Texts and tasks, opened once for all artifacts."""

    texts: Mapping[str, tuple[str, str]]
    tasks: Mapping[str, Any]


def open_sources(suite: Suite, data: Path | None) -> Sources:
    """Find all data before anything is computed. Raises ConfigError naming everything that is missing."""
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data} is no folder")
    if suite.tasks:
        harness.check()
    problems: list[str] = []
    found: dict[str, tuple[str, str]] = {}
    tasks: dict[str, Any] = {}
    for name in suite.names:
        try:
            if name in suite.texts:
                found[name] = texts.read(name, data)
            else:
                tasks[name] = harness.open_task(name, data)
        except ConfigError as error:
            problems += error.problems
    if problems:
        have = ",".join([*found, *tasks])
        hint = "give a folder with the official files: --data DIR" if data is None else "add the files"
        raise ConfigError(problems, f"{hint}; or score what is there: --tasks {have}" if have else hint)
    return Sources(texts=found, tasks=tasks)


@contextlib.contextmanager
def _stage(progress: Progress, name: str, n: int) -> Iterator[Stage]:
    with progress.stage(name, n) as bar:
        yield bar


def score(
    path: Path,
    suite: Suite,
    sources: Sources,
    folder: rundir.RunDir,
    *,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> Evaluated:
    """Score one artifact. Finished items lie in the run folder under the artifact's key and are kept."""
    engine = engines.open_engine(path, settings)
    name = path.name

    def store(what: str) -> Store:
        return Store(folder.root / "arrays" / "eval" / engine.key / f"{what}.jsonl")

    with rundir.friendly_disk_errors(folder.root):
        read = tuple(
            texts.perplexity(
                engine,
                text,
                *sources.texts[text],
                window,
                store(f"{text}-{window}"),
                tokens=suite.tokens,
                stage=functools.partial(_stage, progress, f"{name}: {text}, windows of {window}"),
            )
            for text in suite.texts
            for window in suite.windows
        )
        asked = tuple(
            harness.answer(
                engine,
                sources.tasks[task],
                store(task),
                items=suite.items,
                seed=seed,
                stage=functools.partial(_stage, progress, f"{name}: {task}"),
            )
            for task in suite.tasks
        )
    return Evaluated(path=str(path), kind=engine.kind, key=engine.key, texts=read, tasks=asked)


def describe(done: Evaluated) -> dict[str, Any]:
    """Plain values: every figure with its standard error, count and source."""
    tasks = [
        {
            "task": a.task,
            "items": len(a.docs),
            "of": a.total,
            "version": a.version,
            "metrics": {m: {"value": v, "stderr": s} for m, (v, s) in a.metrics.items()},
        }
        for a in done.tasks
    ]
    return {
        "path": done.path,
        "kind": done.kind,
        "key": done.key,
        "texts": [
            {k: v for k, v in dataclasses.asdict(t).items() if k != "nll"} | {"windows": len(t.nll)}
            for t in done.texts
        ],
        "tasks": tasks,
        "averages": averages(done.tasks),
    }


def averages(tasks: tuple[Answers, ...]) -> dict[str, float] | None:
    """Mean over the tasks: of plain accuracy, and with the length-normalised one where a task has it."""
    if not tasks:
        return None
    return {
        "tasks": len(tasks),
        "acc": float(np.mean([a.metrics["acc"][0] for a in tasks])),
        "acc_norm_where_defined": float(
            np.mean([a.metrics.get("acc_norm", a.metrics["acc"])[0] for a in tasks])
        ),
    }


def compare(a: Evaluated, b: Evaluated, *, seed: int) -> dict[str, Any]:
    """a against b on the same windows and items; windows of other tokens cannot be paired."""
    out_texts = []
    for mine, other in zip(a.texts, b.texts, strict=True):
        row: dict[str, Any] = {"text": mine.text, "window": mine.window, "reference": other.value}
        if len(mine.nll) == len(other.nll) and mine.tokens == other.tokens:
            d = quality.paired_difference(np.array(mine.nll)[:, None], np.array(other.nll)[:, None])
            row |= {"nll_difference": d.difference, "stderr": d.stderr}
            # a single window gives no interval
            if math.isfinite(d.low):
                row |= {"low": d.low, "high": d.high}
        out_texts.append(row)
    out_tasks = []
    for mine, other in zip(a.tasks, b.tasks, strict=True):
        if mine.docs != other.docs:
            raise ConfigError(f"task {mine.task}: the two were asked other items", "use the same --seed")
        out_tasks.append(
            {
                "task": mine.task,
                "metrics": {
                    m: {
                        "reference": other.metrics[m][0],
                        **dataclasses.asdict(paired.accuracy(mine.right[m], other.right[m], seed=seed)),
                    }
                    for m in mine.metrics
                },
            }
        )
    return {"path": b.path, "kind": b.kind, "key": b.key, "texts": out_texts, "tasks": out_tasks}


def evaluate(
    path: Path,
    suite: Suite,
    out: Path,
    *,
    data: Path | None,
    against: Path | None,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score `path`, and `against` on the same items; eval.json and the items go to `out`."""
    for artifact in (path, against):
        if artifact is not None:
            engines.kind_of(artifact)
    sources = open_sources(suite, data)
    with rundir.RunDir(out) as folder:
        mine = score(path, suite, sources, folder, settings=settings, seed=seed, progress=progress)
        other = None
        if against is not None:
            other = score(against, suite, sources, folder, settings=settings, seed=seed, progress=progress)
        result = report(mine, other, suite, seed)
        rundir.write_text(out / FILE_NAME, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def report(mine: Evaluated, other: Evaluated | None, suite: Suite, seed: int) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "schema": SCHEMA,
        "seed": seed,
        "suite": dataclasses.asdict(suite),
        "lm_eval": harness.version() if suite.tasks else None,
        **describe(mine),
        "against": None if other is None else compare(mine, other, seed=seed),
    }
