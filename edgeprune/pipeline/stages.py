"""One stage at a time for research and scripts: score, prune, export. Plain values in, records out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import (
    calibration,
    checkpoint,
    compensation,
    data,
    planner,
    registry,
    rundir,
    surgery,
    tokenizer,
    verify,
)
from edgeprune import graph as graphs
from edgeprune.costs.gguf_types import FLOATS, canonical
from edgeprune.devices import local
from edgeprune.errors import ConfigError, StageError
from edgeprune.exporters import gguf
from edgeprune.metrics.base import Metric, is_sequential
from edgeprune.pipeline import light, prepare, refine, trimming
from edgeprune.pipeline.lane import VERIFY_TOKENS, verify_flags
from edgeprune.pipeline.parent import Parent, open_parent, with_query_heads
from edgeprune.planner import PlanSpace
from edgeprune.progress import Progress
from edgeprune.records import (
    ImportanceScores,
    ModelGraph,
    PrunePlan,
    TokenSet,
    VocabTrimming,
    dumps,
)
from edgeprune.recovery import packed
from edgeprune.runtimes import llama_cpp

PLAN_FILE = "edgeprune_plan.json"
IMATRIX_WINDOWS = 32
IMATRIX_TOKENS = 512
NO_TRIM = trimming.Trim()


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What text to calibrate on; `text` None: sampled from the model itself."""

    text: str | None
    n_samples: int
    n_tokens: int
    seed: int
    n_seeds: int = 1  # draws with seed, seed + 1, …


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A cut asked for by hand."""

    ratio: float
    allocator: str
    width_multiple: int
    protect_first: int
    protect_last: int
    blocks: bool = False  # whole attention and FFN blocks may leave
    steps: int = 1
    query_heads: bool = False  # attention gives up query heads, not KV groups
    rechoose: bool = False  # with ridge: units by what they add to the compensated model
    compensation: str = "none"
    compensation_samples: int = 64  # windows of 512 tokens
    trained_on: bool = False  # a recovery follows on the same text


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[rundir.RunDir]:
    """A run folder beside `out`, on its disk, that is gone afterwards."""
    above = out.parent
    while not above.exists():
        above = above.parent
    with rundir.friendly_disk_errors(out):
        folder = tempfile.mkdtemp(prefix=".edgeprune-", dir=above)
    try:
        with rundir.RunDir(Path(folder)) as run:
            yield run
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(made: Path, out: Path) -> None:
    with rundir.friendly_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(made, out)


# ---------------------------------------------------------------- score


def _scores(
    run: rundir.RunDir,
    parent: Parent,
    metric: Metric,
    options: dict[str, str],
    on: Calibration,
    progress: Progress,
    widths: Mapping[str, int] | None = None,
) -> tuple[TokenSet | None, ImportanceScores, dict[str, np.ndarray]]:
    """Score every axis, once per calibration seed; the tokens are those of the first.

    With `widths`, layer after layer. A metric that needs no statistics is given none, and no text is made
    for it.
    """
    seeds = range(on.seed, on.seed + on.n_seeds)
    wanted = metric.needs(options)
    together = [(on.n_samples, on.n_tokens, seed) for seed in seeds] if on.text is None else []
    tokens = prepare.Tokens(run, parent, progress, together=together if on.n_seeds > 1 else ())
    first: TokenSet | None = None
    draws = []
    for seed in seeds:
        if not wanted:
            draws.append(prepare.score_plain(run, parent, metric, options, seed=seed, progress=progress))
            continue
        chosen, windows = tokens.get(on.text, n_samples=on.n_samples, n_tokens=on.n_tokens, seed=seed)
        first = first or chosen
        if widths is not None:
            draws.append(
                prepare.score_in_order(
                    *(run, parent, metric, options, chosen, windows, widths), seed=seed, progress=progress
                )
            )
        else:
            _, record, values = prepare.calibrate(
                run, parent, metric, options, chosen, windows, seed=seed, progress=progress
            )
            draws.append((record, values))
    record, values = prepare.over_seeds(run, parent, metric, options, seeds, draws, progress)
    return first, record, values


def score(
    model: str | None,
    out: Path,
    *,
    metric_name: str,
    metric_options: Mapping[str, str],
    on: Calibration,
    query_heads: bool = False,
    progress: Progress,
) -> light.ScoreFile:
    """Score a model and write `out` (arrays by axis) and its record beside it.

    Raises ConfigError for a bad metric, text or model.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out '{out}' must end in .safetensors")
    for path in (out, light.record_path(out)):
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder")
    metric, options = prepare.load_metric(metric_name, metric_options)
    with scratch(out) as run:
        parent = open_parent(model, run)
        if query_heads:
            parent = with_query_heads(parent, metric, options)
        options = prepare.dense_options(metric, options, progress)
        tokens, record, _ = _scores(run, parent, metric, options, on, progress)
        made = light.ScoreFile(
            model=parent.name,
            graph_key=parent.graph.key,
            seed=on.seed,
            tokens=tokens,
            scores=record,
        )
        with rundir.friendly_disk_errors(out):
            rundir.write_text(light.record_path(out), dumps(made))
            os.replace(run.path(record.arrays), out)
    return made


# ---------------------------------------------------------------- prune


def _check_out_folder(out: Path, model: str | None) -> None:
    """An existing folder is replaced only when it is empty or a model that edgeprune pruned."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file", "name a new folder")
    if model is not None and out.resolve() == Path(model).resolve():
        raise ConfigError(f"--out {out} is the model itself", "name a new folder")
    if any(out.iterdir()) and not (out / PLAN_FILE).is_file():
        raise ConfigError(
            f"--out {out} exists and was not written by edgeprune prune", "name a new folder, or delete it"
        )


def prune(
    model: str | None,
    out: Path,
    *,
    metric_name: str,
    metric_options: Mapping[str, str],
    on: Calibration,
    cut: Cut,
    trim: trimming.Trim = NO_TRIM,
    progress: Progress,
) -> tuple[PrunePlan, ModelGraph, ImportanceScores | None, VocabTrimming | None]:
    """Calibrate, score, plan and cut; `out` becomes a Hugging Face folder with its plan inside.

    Returns the plan, the dense graph, the record of the scores (none for ratio 0) and of the vocabulary
    (none where it is whole). Raises InfeasibleError with the highest reachable ratio.
    """
    out = out.absolute()
    _check_out_folder(out, model)
    metric, options = prepare.load_metric(metric_name, metric_options)
    trimming.check(trim)
    with scratch(out) as run:
        parent = trimming.trim(run, open_parent(model, run), trim, progress)
        if cut.query_heads:
            parent = with_query_heads(parent, metric, options)
        space = PlanSpace(
            graph=parent.graph,
            scores={},
            poolable=metric.poolable(options),
            constraints=light.hand_constraints(cut.width_multiple),
            metric=metric.name,
            blocks=cut.blocks,
            protected=light.protected_layers(
                len(parent.graph.dims.layers), cut.protect_first, cut.protect_last
            ),
        )
        # what can be refused is refused before the slow part
        planner.check_ratio(space, cut.allocator, cut.ratio)
        refine.check_compensation(cut.compensation)
        if cut.compensation == "bias":
            compensation.compensated_dims(parent.graph.dims)
        if cut.rechoose and (cut.compensation != "ridge" or cut.steps > 1):
            raise ConfigError("--rechoose is part of --compensation ridge, in one step", "leave it out")
        if cut.steps > 1 and is_sequential(options):
            raise ConfigError(f"{metric.name} sequential=yes scores in one pass", "use --steps 1")
        if cut.ratio == 0:
            plan = planner.plan_ratio(space, "uniform", 0.0)
            _cut(run, parent, plan, out, progress)
            return plan, parent.graph, None, parent.vocabulary
        tokens = prepare.Tokens(run, parent, progress)
        text = None
        curves = planner.load_allocator(cut.allocator).curves
        if cut.ratio > 0 and (cut.compensation != "none" or curves):
            text = refine.text_for(
                *(tokens, parent, on.text),
                samples=cut.compensation_samples,
                length=refine.WINDOW if on.text is not None else refine.WRITTEN_WINDOW,
                seed=on.seed,
                trained_on=cut.trained_on,
            )
        widths = None
        if is_sequential(options):
            # how much goes has to be known while scores are made
            first = space
            if cut.allocator != "uniform":
                progress.say(
                    f"{metric.name} sequential=yes: widths from the dense model's scores, "
                    "units from the pruned one's"
                )
                dense = {**options, "sequential": "no"}
                _, known, values = _scores(run, parent, metric, dense, on, progress)
                first = dataclasses.replace(space, scores=values, scores_key=known.key)
                first = _measured(run, parent, first, cut, text, progress)
            widths = planner.widths_for(first, cut.allocator, cut.ratio)
            space = dataclasses.replace(first, scores=space.scores)
        _, record, values = _scores(run, parent, metric, options, on, progress, widths)
        space = dataclasses.replace(space, scores=values, poolable=record.poolable, scores_key=record.key)
        if widths is None:
            space = _measured(run, parent, space, cut, text, progress)
        plan = planner.plan_ratio(space, cut.allocator, cut.ratio, widths=widths)
        if cut.steps > 1 and plan.kept:
            plan = _in_steps(run, parent, space, plan, metric, options, on, cut, tokens, text, progress)
        source = None
        if cut.rechoose and plan.kept:
            assert text is not None
            kept, source = refine.rechosen(run, parent, plan, text, progress)
            wide = {a.name: len(kept.get(a.name, range(a.n_units))) for a in space.graph.axes}
            again = planner.make_plan(space, cut.allocator, cut.ratio, wide, kept=kept)
            plan = dataclasses.replace(again, binding=plan.binding)
        plan = refine.compensated_plan(plan, cut.compensation, text.key if text else "")
        source = source or refine.source_of(run, parent, plan, text, progress)
        _cut(run, parent, plan, out, progress, source)
        return plan, parent.graph, record, parent.vocabulary


def _in_steps(
    run: rundir.RunDir,
    parent: Parent,
    space: PlanSpace,
    plan: PrunePlan,
    metric: Metric,
    options: dict[str, str],
    on: Calibration,
    cut: Cut,
    tokens: prepare.Tokens,
    text: refine.Text | None,
    progress: Progress,
) -> PrunePlan:
    """The same widths as `plan`, reached in equal steps; what stays is decided by the last scores."""
    last = {a.name: len(plan.kept.get(a.name, range(a.n_units))) for a in space.graph.axes}
    between = [
        {a.name: a.n_units - (a.n_units - last[a.name]) * step // cut.steps for a in space.graph.axes}
        for step in range(1, cut.steps + 1)
    ]
    windows = np.zeros((0, 0), dtype=np.int32)
    if metric.needs(options):
        _, windows = tokens.get(on.text, n_samples=on.n_samples, n_tokens=on.n_tokens, seed=on.seed)
    kept = refine.in_steps(
        *(run, parent, space, between, metric, options, windows),
        text if cut.compensation == "ridge" else None,
        seed=on.seed,
        progress=progress,
    )
    made = planner.make_plan(space, cut.allocator, cut.ratio, last, kept=kept)
    return dataclasses.replace(made, steps=cut.steps, binding=plan.binding)


def _measured(
    run: rundir.RunDir,
    parent: Parent,
    space: PlanSpace,
    cut: Cut,
    text: refine.Text | None,
    progress: Progress,
) -> PlanSpace:
    """The space with damage curves, where the allocator wants them."""
    allocator = planner.load_allocator(cut.allocator)
    if not allocator.curves or text is None:
        return space
    return refine.with_curves(
        *(run, parent, space, text),
        compensated=cut.compensation == "ridge",
        measures=allocator.measures,
        progress=progress,
    )


def prune_to_plan(
    model: str | None, out: Path, *, plan_file: Path, progress: Progress
) -> tuple[PrunePlan, ModelGraph]:
    """Cut a model along a saved plan. Raises ConfigError when the plan is another model's."""
    out = out.absolute()
    _check_out_folder(out, model)
    with scratch(out) as run:
        parent = open_parent(model, run)
        plan = light.load_plan(plan_file, parent.graph)
        parent = dataclasses.replace(parent, graph=graphs.like(parent.graph, plan.kept))
        if plan.compensation != "none":
            progress.say(f"the plan's {plan.compensation} compensation needs calibration text: only cut here")
            dims = graphs.prune_dims(parent.graph, plan.kept)
            plan = dataclasses.replace(plan, dims=dims, compensation="none")
        _cut(run, parent, plan, out, progress)
        return plan, parent.graph


def _cut(
    run: rundir.RunDir,
    parent: Parent,
    plan: PrunePlan,
    out: Path,
    progress: Progress,
    source: checkpoint.Source | None = None,
) -> None:
    """Save the pruned model with its plan beside it; `source` has its weights, else they are only cut."""
    made = run.path("artifacts/pruned")
    with progress.stage("cut"), rundir.friendly_disk_errors(out):
        surgery.prune(parent.source, parent.graph, plan, made, extras=parent.folder, pruned=source)
    _move(made, out)


# ---------------------------------------------------------------- export


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One exported file: bytes predicted and real, and how far its logits are from torch's."""

    quantization: str
    predicted_bytes: int
    bytes: int
    sha256: str
    imatrix: bool
    verified: verify.Comparison | None
    vocabulary: VocabTrimming | None = None  # what left it on the way


def export(
    model: str | None,
    out: Path,
    *,
    format_name: str,
    quantization: str | None,
    imatrix_text: str | None,
    check: bool,
    seed: int,
    threads: int | None,
    trim: trimming.Trim = NO_TRIM,
    progress: Progress,
) -> Exported:
    """Write a model as one file, read it back and, with `check`, compare its logits with torch's.

    Without `quantization`: Q4_0 for GGUF, int4 for ONNX. A quantized file is made from an F16 one that had to
    agree with torch first. Raises StageError when the file cannot be trusted; it is then not left behind.
    """
    exporter = registry.load("exporters", format_name, "EXPORTER")
    out = out.absolute()
    if format_name == "onnx":
        name = quantization or "int4"
        return _export_onnx(model, out, name, imatrix_text, check, seed, threads, trim, progress)
    quantization = canonical(quantization or "Q4_0")
    _check_out_file(out, exporter.suffix)
    trimming.check(trim)
    threads = threads or local.available_threads()
    with scratch(out) as run:
        parent = trimming.trim(run, open_parent(model, run), trim, progress)
        parent.gguf_tokenizer()  # refused before the slow part
        imatrix = None
        if imatrix_text is not None and quantization not in FLOATS:
            stats = _imatrix_stats(parent, imatrix_text, seed, progress)
            imatrix = gguf.imatrix_names(parent.family, parent.graph.dims, stats)
        job = _Export(run=run, parent=parent, exporter=exporter, threads=threads, progress=progress)
        if check:
            job.make_reference(seed)
        name = f"out{exporter.suffix}"
        master = None
        # a BF16 file is made from F32, which the exporter writes for itself
        if check and quantization not in FLOATS:
            master, _, _ = job.make("F16", f"master{exporter.suffix}", None, None)
        made, n_bytes, compared = job.make(quantization, name, master, imatrix)
        predicted = exporter.file_cost(
            parent.family,
            parent.source.config,
            parent.gguf_tokenizer(),
            name=parent.name,
            license_name=parent.license_name,
            has_imatrix=bool(imatrix),
        ).file_bytes(parent.graph.dims, quantization)
        result = Exported(
            quantization=quantization,
            predicted_bytes=predicted,
            bytes=n_bytes,
            sha256=rundir.sha256_file(made),
            imatrix=bool(imatrix),
            verified=compared,
            vocabulary=parent.vocabulary,
        )
        _move(made, out)
    return result


def _export_onnx(
    model: str | None,
    out: Path,
    quantization: str,
    imatrix_text: str | None,
    check: bool,
    seed: int,
    threads: int | None,
    trim: trimming.Trim,
    progress: Progress,
) -> Exported:
    # the libraries of this format are optional
    from edgeprune.exporters import onnx
    from edgeprune.pipeline import onnx_export

    onnx.check_quantization(quantization)
    onnx_export.check_out(out)
    trimming.check(trim)
    with scratch(out) as run:
        parent = trimming.trim(run, open_parent(model, run), trim, progress)
        imatrix = None
        if imatrix_text is not None and quantization == "int4":
            stats = _imatrix_stats(parent, imatrix_text, seed, progress)
            imatrix = onnx.imatrix_names(parent.family, parent.graph.dims, stats)
        made = onnx_export.export(
            run,
            parent,
            quantization=quantization,
            imatrix=imatrix,
            check=check,
            seed=seed,
            threads=threads or local.available_threads(),
            progress=progress,
        )
        _move(made.path, out)
    return Exported(
        quantization=quantization,
        predicted_bytes=made.predicted_bytes,
        bytes=made.bytes,
        sha256=made.sha256,
        imatrix=imatrix is not None,
        verified=made.verified,
        vocabulary=parent.vocabulary,
    )


def _check_out_file(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise ConfigError(f"--out '{out.name}' must end in {suffix}")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder", "name a file")
    if out.is_file() and out.stat().st_size:
        with out.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise ConfigError(f"--out {out} exists and is not a GGUF file", "name another file")


def _imatrix_stats(parent: Parent, text: str, seed: int, progress: Progress) -> dict[str, np.ndarray]:
    """Mean squared inputs on up to 32 windows of the text, by layer."""
    ids = tokenizer.encode(parent.folder, data.read_text(text))
    length = min(IMATRIX_TOKENS, parent.graph.dims.max_context)
    windows = data.windows(
        text,
        lambda _: ids,
        n_samples=max(1, min(IMATRIX_WINDOWS, len(ids) // length)),
        n_tokens=length,
        seed=seed,
        where=text,
    )
    stats = calibration.collect(
        parent.source, parent.graph, windows, calibration.IMATRIX_NEEDS, progress=progress
    )
    return calibration.imatrix(stats, parent.graph, {})


@dataclass(slots=True, kw_only=True)
class _Export:
    run: rundir.RunDir
    parent: Parent
    exporter: Any
    threads: int
    progress: Progress
    window: np.ndarray | None = None  # [1, T]
    expected: np.ndarray | None = None  # [T, vocab], torch's logits

    def make_reference(self, seed: int) -> None:
        tokens = prepare.Tokens(self.run, self.parent, self.progress)
        _, self.window = tokens.get(
            None, n_samples=1, n_tokens=VERIFY_TOKENS, seed=seed + prepare.EVAL_SEED_OFFSET
        )
        self.expected = calibration.forward(self.parent.source, self.parent.graph.dims, self.window)[0]

    def make(
        self, quantization: str, name: str, master: Path | None, imatrix: dict[str, np.ndarray] | None
    ) -> tuple[Path, int, verify.Comparison | None]:
        """Write one file into the scratch folder and hold it against torch."""
        path = self.run.path(f"artifacts/{name}")
        parent = self.parent
        with self.progress.stage(f"export {quantization}"):
            n_bytes = self.exporter.export(
                path,
                family=parent.family,
                dims=parent.graph.dims,
                config=parent.source.config,
                tokenizer_kvs=parent.gguf_tokenizer(),
                read_tensor=lambda n: checkpoint.to_float32(parent.source.tensor(n)),
                quantization=quantization,
                imatrix=imatrix,
                threads=self.threads,
                name=parent.name,
                license_name=parent.license_name,
                master=master,
                packed=packed.load(parent.folder),
            )
        compared = None
        if self.window is not None and self.expected is not None:
            with self.progress.stage(f"verify {quantization}"):
                compared = self._compare(path)
            reason = compared.failure(exact=quantization in ("F16", "F32"))
            if reason is not None:
                raise StageError(reason, "report this with the model's config.json")
        return path, n_bytes, compared

    def _compare(self, path: Path) -> verify.Comparison:
        assert self.window is not None and self.expected is not None
        flags = verify_flags(self.window.shape[1])
        out = self.run.path("arrays/logits.f32")
        found = llama_cpp.logits(path, self.window, out, flags=flags, threads=self.threads)
        return verify.compare(self.expected, found[0])
