"""`--eval` of the main job: the selected file and its dense parent on a suite of `edgeprune eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import rundir
from edgeprune.devices import local
from edgeprune.evaluation import run, suites
from edgeprune.evaluation.engines import Settings
from edgeprune.pipeline.parent import Parent
from edgeprune.progress import Progress
from edgeprune.records import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A suite with its data, opened before the slow part."""

    suite: suites.Suite
    sources: run.Sources


def open_suite(name: str | None, data: Path | None) -> Asked | None:
    """None when no suite is asked for. Raises ConfigError when it, or its data, cannot be had."""
    if name is None:
        return None
    suite = suites.find(name)
    return Asked(suite=suite, sources=run.open_sources(suite, data))


def of_selected(
    asked: Asked | None,
    folder: rundir.RunDir,
    parent: Parent,
    candidates: Sequence[Candidate],
    selected: str | None,
    *,
    seed: int,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """Scores of the selected file with the flags it ships with, against the dense parent in torch."""
    taken = next((c for c in candidates if c.id == selected), None)
    if asked is None or taken is None or taken.artifact is None:
        return None
    flags = (taken.measured.flags if taken.measured else None) or taken.predicted.flags
    settings = Settings(
        threads=threads or local.available_threads(), kv_type=flags.kv_type if flags else "f16"
    )
    scored = [
        run.score(
            *(path, asked.suite, asked.sources, folder), settings=settings, seed=seed, progress=progress
        )
        for path in (folder.path(taken.artifact.path), parent.folder)
    ]
    found = run.report(scored[0], scored[1], asked.suite, seed)
    # paths of a report are relative to the run folder, and a parent may lie anywhere
    return {**found, "path": taken.artifact.path, "against": {**found["against"], "path": parent.name}}
