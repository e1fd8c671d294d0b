"""One model for several targets: one run folder, so what does not depend on the target is done once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from edgeprune import rundir
from edgeprune.config.targets import load_target
from edgeprune.errors import ConfigError, EdgepruneError, InfeasibleError, StageError
from edgeprune.pipeline import light
from edgeprune.pipeline.main import RunOptions, run
from edgeprune.progress import Progress
from edgeprune.report import build as report_build
from edgeprune.report import page


def run_all(options: RunOptions, targets: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Run the job for each target in turn in `options.out`; the first target's report, with a row for each.

    Every target has its report, page and bundle; those of the first have the plain names, the others'
    end in the target's. Raises ConfigError before any work, InfeasibleError behind all of it when a target
    has no answer.
    """
    labels = _check(options, targets)
    reports: list[tuple[str | None, dict[str, Any]]] = []
    failed: list[EdgepruneError] = []
    for name, label in zip(targets, labels, strict=True):
        progress.say(f"target {name}")
        try:
            report = run(dataclasses.replace(options, target=name, label=label), progress)
        except (InfeasibleError, StageError) as error:
            failed.append(type(error)(f"{name}: {error.message}", error.hint))
            report = light.load_report(options.out, label)
        reports.append((label, report))
    rows = [_row(label, report) for label, report in reports]
    with rundir.RunDir(options.out) as folder:
        written = []
        for label, report in reports:
            written.append(report_build.write(folder, {**report, "targets": rows}, label))
            page.write(folder.root, written[-1], label, say=progress.say)
    if failed:
        raise failed[0]
    return written[0]


def _check(options: RunOptions, targets: Sequence[str]) -> list[str | None]:
    """The label of each target. Raises ConfigError with every problem."""
    problems: list[str] = []
    labels: list[str] = []
    for name in targets:
        try:
            load_target(name, memory_bytes=options.budget_bytes)
        except ConfigError as error:
            problems += error.problems
        labels.append(rundir.slug(name))
    twice = sorted({label for label in labels if labels.count(label) > 1})
    problems += [f"--target {label} is given twice" for label in twice]
    if options.device != "local":
        problems.append("--device measures on one board; with several --target nothing else is at hand")
    if options.mode is not None:
        problems.append("--mode belongs to one target; leave it out with several --target")
    if problems:
        raise ConfigError(problems)
    return [None, *labels[1:]]


def _row(label: str | None, report: dict[str, Any]) -> dict[str, Any]:
    """One line of the matrix; `selected` is the candidate as in `candidates`."""
    chosen = next((c for c in report["candidates"] if c["id"] == report["selected"]), None)
    return {
        "target": report["target"]["name"],
        "title": report["target"]["title"],
        "report": report_build.file_name(label),
        "page": page.file_name(label),
        "headline": report["headline"],
        "budget": report["budget"],
        "selected": chosen,
        "missed": report["missed"],
    }
