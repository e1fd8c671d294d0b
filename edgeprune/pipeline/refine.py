"""What is done around a metric: damage curves for allocators, small steps, compensation."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

import edgeprune
from edgeprune import (
    calibration,
    checkpoint,
    compensation,
    data,
    gradients,
    planner,
    reconstruction,
    rundir,
    sensitivity,
    surgery,
    tokenizer,
)
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.metrics.base import Metric
from edgeprune.pipeline import prepare
from edgeprune.pipeline.parent import Parent
from edgeprune.planner import PlanSpace
from edgeprune.progress import Progress
from edgeprune.records import Artifact, ModelGraph, PrunePlan, TokenSet, make_key

COMPENSATIONS = ("none", "ridge", "bias")
WINDOW = 512  # tokens of a compensation window
WRITTEN_WINDOW = 256  # when the model has to write the text itself
PROBE_TOKENS = 6144  # behind the second moments of the curves
SOLVED_SHARE = 0.85  # of a text whose last tenth validates a recovery; tokens and characters differ a little
JUDGED_TOKENS = 1024  # of these give the curves' KL


def check_compensation(name: str) -> None:
    if name not in COMPENSATIONS:
        raise ConfigError(f"unknown compensation '{name}'", f"known: {', '.join(COMPENSATIONS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Windows [N, T] that matrices are solved on, and the key of their record."""

    windows: np.ndarray
    key: str

    def first(self, n_tokens: int) -> np.ndarray:
        """The first windows with at least this many tokens, or all."""
        return self.windows[: -(-n_tokens // self.windows.shape[1])]


def text_for(
    tokens: prepare.Tokens,
    parent: Parent,
    text: str | None,
    *,
    samples: int,
    length: int,
    seed: int,
    trained_on: bool = False,
) -> Text:
    """Compensation wants far more text than scores: `samples` windows, or as many as a given text has.

    Where the text is `trained_on` as well, its end stays unread: recovery is validated there, and weights
    solved on it would look better than they are.
    """
    first = SOLVED_SHARE if trained_on else 1.0
    length = min(length, parent.graph.dims.max_context)
    if text is not None:
        whole = data.read_text(text)
        n_tokens = len(tokenizer.encode(parent.folder, whole[: round(first * len(whole))]))
        length = max(2, min(length, n_tokens // 8))  # a short text in shorter windows, not in one
        samples = max(1, min(samples, n_tokens // length))
    record: TokenSet
    record, windows = tokens.get(text, n_samples=samples, n_tokens=length, seed=seed, first=first)
    return Text(windows=windows, key=record.key)


# ---------------------------------------------------------------- curves


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    width: int
    kl: float  # nats per token


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageCurves:
    """KL of the model with one axis alone cut to some widths."""

    kind: ClassVar[str] = "damage_curves"
    curves: dict[str, tuple[CurvePoint, ...]]
    compensated: bool
    key: str


def with_curves(
    run: rundir.RunDir,
    parent: Parent,
    space: PlanSpace,
    text: Text,
    *,
    compensated: bool,
    measures: bool,
    progress: Progress,
) -> PlanSpace:
    """The space with measured damage curves of every axis that may lose something, and a way to measure."""
    axes = [axis for axis in space.graph.axes if space.free(axis)]
    widths = {a.name: sensitivity.probe_widths(space.legal_widths(a), a.n_units, a.unit) for a in axes}
    axes = [axis for axis in axes if widths[axis.name]]
    key = make_key(
        "damage_curves",
        *(parent.key, space.scores_key, text.key, {k: list(v) for k, v in widths.items()}),
        *(compensated, edgeprune.__version__),
    )
    moments = run.path(f"arrays/moments-{key}")
    probe = sensitivity.Probe(
        source=parent.source,
        graph=parent.graph,
        windows=text.first(PROBE_TOKENS),
        n_judged=len(text.first(JUDGED_TOKENS)),
        scores=space.scores,
        folder=moments,
        compensated=compensated,
        half=reconstruction.half_is_fast(),
        progress=progress,
    )

    def compute() -> DamageCurves:
        found = probe.curves(axes, widths)
        return DamageCurves(
            curves={n: tuple(CurvePoint(width=w, kl=d) for w, d in c) for n, c in found.items()},
            compensated=compensated,
            key=key,
        )

    if measures:
        # a search measures against what this pass leaves in memory
        record = compute()
    else:
        record = run.stage(DamageCurves, key, compute, name="sensitivity")
        shutil.rmtree(moments, ignore_errors=True)
    return dataclasses.replace(
        space,
        curves={name: [(p.width, p.kl) for p in points] for name, points in record.curves.items()},
        measure=probe.measure if measures else None,
    )


# ---------------------------------------------------------------- compensation


def rebuilt(
    run: rundir.RunDir, parent: Parent, plan: PrunePlan, text: Text, progress: Progress
) -> checkpoint.Source:
    """The pruned parent with o_proj and down_proj solved anew; done once per plan and text."""
    pruned = surgery.PrunedSource(parent.source, parent.graph, plan.kept)
    if not plan.kept:
        return parent.source
    kept = {name: sorted(units) for name, units in plan.kept.items()}
    key = make_key("rebuilt", parent.key, kept, text.key, reconstruction.DRIFT, edgeprune.__version__)
    relative = f"artifacts/rebuilt-{key}"
    folder = run.path(relative)

    def compute() -> Artifact:
        shutil.rmtree(folder, ignore_errors=True)
        reconstruction.rebuild(
            parent.source,
            parent.graph,
            text.windows,
            list(plan.kept),
            reconstruction.as_planned(plan.kept),
            folder,
            half=reconstruction.half_is_fast(),
            progress=progress,
        )
        return Artifact(
            path=relative,
            format="safetensors",
            quantization="F32",
            bytes=_size(folder),
            sha256="",
            made_from=plan.key,
            key=key,
        )

    run.stage(
        Artifact,
        key,
        compute,
        name=f"compensate {plan.id}",
        valid=lambda a: folder.is_dir() and _size(folder) == a.bytes,
        kind="rebuilt",
    )
    return reconstruction.RebuiltSource(pruned, folder)


def rechosen(
    run: rundir.RunDir, parent: Parent, plan: PrunePlan, text: Text, progress: Progress
) -> tuple[dict[str, tuple[int, ...]], checkpoint.Source]:
    """As many units as the plan keeps, chosen by what they add to the compensated model; and its weights."""
    made = reconstruction.rebuild(
        *(parent.source, parent.graph, text.windows, list(plan.kept)),
        reconstruction.by_loss({name: len(units) for name, units in plan.kept.items()}),
        run.path("artifacts/rechosen"),
        half=reconstruction.half_is_fast(),
        progress=progress,
    )
    pruned = surgery.PrunedSource(parent.source, parent.graph, made.kept)
    return made.kept, reconstruction.RebuiltSource(pruned, made.folder)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compensated_plan(plan: PrunePlan, kind: str, text_key: str) -> PrunePlan:
    """The same plan under a key that says how its weights are made up for."""
    if kind == "none" or not plan.kept:
        return plan
    dims = compensation.compensated_dims(plan.dims) if kind == "bias" else plan.dims
    key = make_key("prune_plan", plan.key, kind, text_key)
    return dataclasses.replace(plan, dims=dims, compensation=kind, key=key)


def with_biases(parent: Parent, plan: PrunePlan, stats: Mapping[str, np.ndarray]) -> checkpoint.Source:
    """The pruned parent with FLAP's biases; `plan` is the compensated one."""
    before = graphs.prune_dims(parent.graph, plan.kept)
    new = compensation.biases(parent.source, parent.graph, plan.kept, stats)
    pruned = surgery.PrunedSource(parent.source, parent.graph, plan.kept)
    return compensation.CompensatedSource(pruned, before, new)


def source_of(
    run: rundir.RunDir, parent: Parent, plan: PrunePlan, text: Text | None, progress: Progress
) -> checkpoint.Source:
    """The weights of a plan, made up for as the plan says."""
    if not plan.kept:
        return parent.source
    if plan.compensation == "none" or not plan.kept:
        return surgery.PrunedSource(parent.source, parent.graph, plan.kept)
    assert text is not None
    if plan.compensation == "ridge":
        return rebuilt(run, parent, plan, text, progress)
    stats = calibration.collect(
        parent.source, parent.graph, text.first(PROBE_TOKENS), compensation.NEEDS, progress=progress
    )
    return with_biases(parent, plan, stats)


# ---------------------------------------------------------------- small steps


def in_steps(
    run: rundir.RunDir,
    parent: Parent,
    space: PlanSpace,
    widths_of: Sequence[Mapping[str, int]],
    metric: Metric,
    options: Mapping[str, str],
    windows: np.ndarray,
    text: Text | None,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, tuple[int, ...]]:
    """Cut to each of the nested widths in turn, scoring what is left before the next; dense indices.

    With `text` the matrices are solved anew in between, so that scores are those of the compensated model.
    """
    left = {axis.name: np.arange(axis.n_units) for axis in space.graph.axes}
    scores = space.scores
    for step, widths in enumerate(widths_of):
        for axis in space.graph.axes:
            width = min(widths[axis.name], len(left[axis.name]))
            if width < len(left[axis.name]):
                best = planner.best_units(scores[axis.name], width, axis.groups)
                left[axis.name] = left[axis.name][list(best)]
        kept = {
            a.name: tuple(int(u) for u in left[a.name])
            for a in space.graph.axes
            if len(left[a.name]) < a.n_units
        }
        if step + 1 == len(widths_of):
            return kept
        source: checkpoint.Source = surgery.PrunedSource(parent.source, parent.graph, kept)
        if text is not None:
            folder = run.path(f"artifacts/step-{step}")
            reconstruction.rebuild(
                *(parent.source, parent.graph, text.windows[: max(1, len(text.windows) // 2)], list(kept)),
                *(reconstruction.as_planned(kept), folder),
                half=reconstruction.half_is_fast(),
                progress=progress,
            )
            source = reconstruction.RebuiltSource(source, folder)
        after = graphs.graph_of(parent.family, graphs.prune_dims(parent.graph, kept))
        scores = _score(source, after, metric, options, windows, seed, progress)
        source.close()
        if text is not None:
            shutil.rmtree(folder, ignore_errors=True)
        # an axis that is gone has no scores, and nothing left to lose
        scores = {axis.name: scores.get(axis.name, np.zeros(0)) for axis in space.graph.axes}
    return {}


def _score(
    source: checkpoint.Source,
    graph: ModelGraph,
    metric: Metric,
    options: Mapping[str, str],
    windows: np.ndarray,
    seed: int,
    progress: Progress,
) -> dict[str, np.ndarray]:
    needs = metric.needs(options)
    backward = frozenset(need for need in needs if need.gradient)
    arrays: dict[str, np.ndarray] = {}
    if needs - backward:
        arrays |= calibration.collect(source, graph, windows, needs - backward, progress=progress)
    if backward:
        arrays |= gradients.collect(source, graph, windows, backward, seed=seed, progress=progress)
    return calibration.score(metric, options, source, graph, arrays, seed=seed, progress=progress)
