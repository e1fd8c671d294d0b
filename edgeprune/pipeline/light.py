"""Stages that need no torch: inspect a model, plan from saved scores, bench a file, choose again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgeprune import bench, graph, locate, planner, quality, records, registry, rundir, selection, tokenizer
from edgeprune.config import budget as budgets
from edgeprune.config.targets import load_target, with_detected
from edgeprune.costs.gguf_header import KeyValue, read_header
from edgeprune.costs.memory import KV_ELEMENT_BYTES
from edgeprune.devices import local
from edgeprune.errors import ConfigError, InfeasibleError, UnsupportedModelError
from edgeprune.exporters import gguf
from edgeprune.families.base import Family
from edgeprune.gguf_source import GgufSource
from edgeprune.pipeline import costing
from edgeprune.records import (
    Axis,
    BenchProtocol,
    BenchResult,
    Budget,
    Candidate,
    Constraints,
    DeviceTarget,
    ImportanceScores,
    LaunchFlags,
    Limit,
    MemoryResult,
    ModelGraph,
    PairedKL,
    Profile,
    PrunePlan,
    QualityResult,
    Selection,
    TokenSet,
    UnitRule,
    Workload,
    make_key,
    to_plain,
)
from edgeprune.report import build as report_build
from edgeprune.report.answers import answers
from edgeprune.units import format_bytes

# ---------------------------------------------------------------- headers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeader:
    """What can be known about a model without reading a weight."""

    name: str
    path: Path
    config: Mapping[str, Any]
    graph: ModelGraph
    family: Family
    tokenizer_kvs: Sequence[KeyValue]
    license_name: str | None
    bytes_by_type: Mapping[str, int] | None  # of a GGUF file
    untold: UnsupportedModelError | None = None  # why GGUF has no words for the tokenizer

    def gguf_tokenizer(self) -> Sequence[KeyValue]:
        """Raises UnsupportedModelError where GGUF cannot describe the tokenizer: no file, no file's bytes."""
        if self.untold is not None:
            raise self.untold
        return self.tokenizer_kvs


def open_header(model: str | None, *, with_tokenizer: bool = True) -> ModelHeader:
    """Open a folder, a hub id or a GGUF file. Raises ConfigError or UnsupportedModelError.

    Without a tokenizer file bytes cannot be predicted, and its library is not needed. One that GGUF cannot
    describe is refused only when it is asked for: the model can still be cut, and exported to ONNX.
    """
    path = locate.resolve_model(model)
    if path.is_file():
        source = GgufSource(path)
        name, license_name = locate.gguf_labels(source.general, path)
        totals: dict[str, int] = {}
        for tensor in source.header.tensors:
            totals[tensor.type.name] = totals.get(tensor.type.name, 0) + tensor.n_bytes
        return ModelHeader(
            name=name,
            path=path,
            config=source.config,
            graph=graph.build(source.config),
            family=source.family,
            tokenizer_kvs=source.tokenizer_kvs,
            license_name=license_name,
            bytes_by_type=totals,
        )
    config = locate.read_config(path)
    built = graph.build(config)
    tensors = locate.find_tensors(path)
    locate.check_tensors(path, {name: shape for name, (_, shape, _) in tensors.items()}, built)
    kvs: Sequence[KeyValue] = ()
    untold = None
    try:
        kvs = tokenizer.kvs_from_hf(path) if with_tokenizer else ()
    except UnsupportedModelError as error:
        untold = error
    return ModelHeader(
        name=model if model and not Path(model).exists() else path.resolve().name,
        path=path,
        config=config,
        graph=built,
        family=graph.find_family(built.dims.family),
        tokenizer_kvs=kvs,
        license_name=locate.license_of(path),
        bytes_by_type=None,
        untold=untold,
    )


def inspect(model: str | None) -> dict[str, Any]:
    """Sizes, prunable axes, legal GGUF shapes and exact dense GGUF bytes of a model, as plain values."""
    header = open_header(model)
    built, dims = header.graph, header.graph.dims
    outside = built.total_params - built.decoder_params
    rows: list[dict[str, Any]] = []
    refused = None
    try:
        rows = [_gguf_row(header, q) for q in gguf.EXPORTER.quantizations]
    except UnsupportedModelError as error:
        refused = error.message
    return {
        "model": header.name,
        "path": str(header.path),
        "family": dims.family,
        "license": header.license_name,
        "parameters": built.total_params,
        "decoder_parameters": built.decoder_params,
        "embedding_parameters": outside,
        "embedding_share": outside / built.total_params,
        "layers": len(dims.layers),
        "hidden": dims.hidden,
        "heads": [s.n_heads for s in dims.layers],
        "kv_heads": [s.n_kv_heads for s in dims.layers],
        "head_dim": dims.head_dim,
        "ffn_width": [s.n_ff for s in dims.layers],
        "vocabulary": dims.vocab,
        "tied": dims.tied,
        "max_context": dims.max_context,
        "bytes_by_type": dict(header.bytes_by_type) if header.bytes_by_type else None,
        "axes": [
            {
                "unit": unit,
                "axes": len(axes),
                "units": sum(a.n_units for a in axes),
                "params_per_unit": axes[0].unit_params,
                "share_of_decoder": sum(a.n_units * a.unit_params for a in axes) / built.decoder_params,
            }
            for unit in ("kv", "ffn")
            if (axes := [a for a in built.axes if a.unit == unit])
        ],
        "gguf": rows,
        "gguf_refused": refused,
    }


def _gguf_row(header: ModelHeader, quantization: str) -> dict[str, Any]:
    dims = header.graph.dims
    rules = gguf.constraints(header.family, dims, quantization)
    return {
        "quantization": quantization,
        "file_bytes": _files(header, has_imatrix=False).file_bytes(dims, quantization),
        "file_bytes_imatrix": _files(header, has_imatrix=True).file_bytes(dims, quantization),
        "ffn_multiple": rules.ffn.multiple_of,
        "kv_multiple": rules.kv.multiple_of,
        "uniform_across_layers": rules.ffn.uniform_across_layers,
        "reasons": list(rules.reasons),
    }


def _files(header: ModelHeader, *, has_imatrix: bool) -> gguf.FileCost:
    return gguf.FileCost(
        header.family,
        header.config,
        header.gguf_tokenizer(),
        name=header.name,
        license_name=header.license_name,
        has_imatrix=has_imatrix,
    )


# ---------------------------------------------------------------- scores and plans


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFile:
    """The record beside a score file: which model was scored, how and on what."""

    kind: ClassVar[str] = "score_file"
    model: str
    graph_key: str
    seed: int
    tokens: TokenSet | None  # None: the metric looks at weights only
    scores: ImportanceScores


def record_path(scores: Path) -> Path:
    """Where the record of FILE.safetensors lies: FILE.json."""
    return scores.with_suffix(".json")


def load_scores(path: Path) -> tuple[ScoreFile, dict[str, np.ndarray]]:
    """Read what `edgeprune score` wrote. Raises ConfigError when it is missing or damaged."""
    beside = record_path(path)
    for part in (path, beside):
        if not part.is_file():
            raise ConfigError(f"score file {part} does not exist", "write it with: edgeprune score")
    record = records.loads(ScoreFile, _read_text(beside), where=str(beside))
    if rundir.sha256_file(path) != record.scores.arrays_sha256:
        raise ConfigError(f"{path} is not the file that {beside} describes", "run edgeprune score again")
    try:
        return record, load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}", "run edgeprune score again") from None


def hand_constraints(width_multiple: int) -> Constraints:
    """Free widths per layer, FFN in steps of `width_multiple`: for research, no export looked at."""
    return Constraints(
        format="none",
        ffn=UnitRule(
            uniform_across_layers=False,
            multiple_of=width_multiple,
            min_keep=width_multiple,
            fixed=False,
            whole=True,
        ),
        kv=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False, whole=True),
        q=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
        reasons=(f"FFN width in steps of {width_multiple}: asked for",),
    )


def protected_layers(n_layers: int, first: int, last: int) -> frozenset[int]:
    """Indices of the layers that stay whole."""
    return frozenset(range(min(first, n_layers))) | frozenset(range(max(0, n_layers - last), n_layers))


def plan(
    model: str | None,
    scores: Path,
    *,
    allocator: str,
    ratio: float | None = None,
    budget_bytes: int | None = None,
    quantization: str | None = None,
    context_tokens: int | None = None,
    target: str = "laptop-cpu",
    width_multiple: int = 32,
    protect_first: int = 0,
    protect_last: int = 0,
) -> tuple[PrunePlan, ModelGraph]:
    """Plan from saved scores: for a ratio, or the weakest cut that fits a memory budget.

    Returns the plan and the graph it cuts. Widths are those the quantization's blocks fill, or, without
    one, multiples of `width_multiple`.
    Raises InfeasibleError when the ratio or the budget cannot be reached, ConfigError for other scores,
    UnsupportedModelError for a budget when GGUF cannot describe the tokenizer.
    """
    planner.check_allocator(allocator)
    header = open_header(model, with_tokenizer=budget_bytes is not None)
    if header.untold is not None:
        raise UnsupportedModelError(
            f"memory is predicted for GGUF files, and {header.name} cannot be one: {header.untold.message}",
            "give --ratio instead of --budget; prune and export --format onnx take this model",
        )
    record, arrays = load_scores(scores)
    header = dataclasses.replace(header, graph=graph.like(header.graph, arrays))
    _check_scores(header, scores, record, arrays)
    rules = hand_constraints(width_multiple)
    if quantization is not None:
        rules = gguf.constraints(header.family, header.graph.dims, quantization)
    space = planner.PlanSpace(
        graph=header.graph,
        scores=arrays,
        poolable=record.scores.poolable,
        constraints=rules,
        metric=record.scores.metric,
        protected=protected_layers(len(header.graph.dims.layers), protect_first, protect_last),
        scores_key=record.scores.key,
    )
    if ratio is not None:
        return planner.plan_ratio(space, allocator, ratio), header.graph
    assert budget_bytes is not None and quantization is not None
    context = context_tokens or min(2048, header.graph.dims.max_context)
    cost = _memory_cost(header, target, budget_bytes, context)
    found = planner.weakest_fit(space, allocator, quantization, cost)
    if found is None:
        smallest = planner.plan_ratio(space, allocator, planner.highest_ratio(space))
        need = cost(smallest.dims, quantization).peak_bytes
        raise InfeasibleError(
            f"no plan fits {format_bytes(budget_bytes)} at {quantization} and a context of {context} tokens: "
            f"the smallest, ratio {smallest.ratio:.3f}, is predicted to need {format_bytes(need)}",
            "raise --budget, shorten --context, or choose a smaller --quantization",
        )
    return found, header.graph


def _check_scores(
    header: ModelHeader, path: Path, record: ScoreFile, arrays: Mapping[str, np.ndarray]
) -> None:
    wanted = {axis.name: (axis.n_units,) for axis in header.graph.axes}
    found = {name: value.shape for name, value in arrays.items()}
    if record.graph_key != header.graph.key or found != wanted:
        raise ConfigError(f"{path} holds scores of {record.model}, not of {header.name}", "score this model")
    bad = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if bad:
        raise ConfigError(f"{path}: scores of {bad[0]} are not finite", "run edgeprune score again")


def _memory_cost(header: ModelHeader, target: str, budget_bytes: int, context: int) -> costing.CostModel:
    if context > header.graph.dims.max_context:
        raise ConfigError(
            f"--context {context} is beyond the {header.graph.dims.max_context} tokens "
            f"that {header.name} was trained for"
        )
    device, _ = load_target(target, memory_bytes=budget_bytes)
    if device.local:
        facts = local.detect(probe_seconds=0.0)
        device = with_detected(device, {n: facts[n] for n in ("arch", "isa") if facts.get(n)})
    return costing.CostModel(
        files=_files(header, has_imatrix=True),
        target=device,
        budget=Budget(
            memory_bytes=Limit(value=float(budget_bytes), unit="bytes", source=budgets.COMMAND_LINE),
            file_bytes=None,
            decode_tps=None,
            first_token_ms=None,
            kl=None,
            key=make_key("budget", budget_bytes),
        ),
        workload=Workload(prompt_tokens=context, new_tokens=0, context_tokens=context),
        speed=None,
        tokenizer=costing.tokenizer_kind(header.gguf_tokenizer()),
    )


def load_plan(path: Path, of: ModelGraph) -> PrunePlan:
    """Read a plan and hold it against a model. Raises ConfigError when it was made for another one."""
    if not path.is_file():
        raise ConfigError(f"plan file {path} does not exist", "write it with: edgeprune plan")
    found = records.loads(PrunePlan, _read_text(path), where=str(path))
    of = graph.like(of, found.kept)
    axes = {axis.name: axis for axis in of.axes}
    for name, units in found.kept.items():
        axis = axes.get(name)
        legal = axis is not None and len(units) <= axis.n_units and _even(units, axis)
        if not legal or list(units) != sorted({u for u in units if 0 <= u < axis.n_units}):  # type: ignore[union-attr]
            raise ConfigError(f"{path}: '{name}' does not list units of this model", "plan for this model")
    expected = graph.prune_dims(of, found.kept)
    if found.compensation == "bias":
        expected = dataclasses.replace(expected, qkv_bias=True, o_bias=True, mlp_bias=True)
    if expected != found.dims:
        raise ConfigError(f"{path} was made for another model: the sizes differ", "plan for this model")
    return found


def _even(units: Sequence[int], axis: Axis) -> bool:
    """Every run of an axis keeps as many units; query heads would be read by the wrong KV head."""
    each = axis.n_units // axis.groups
    counts = {sum(u // each == g for u in units) for g in range(axis.groups)}
    return axis.groups == 1 or (len(counts) == 1 and 0 not in counts)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def describe_plan(made: PrunePlan, before: ModelGraph) -> dict[str, Any]:
    """The figures of a plan that are printed: ratios, parameters and widths."""
    after = graph.graph_of(graph.find_family(made.dims.family), made.dims)
    return {
        "plan": made.id,
        "metric": made.metric,
        "allocator": made.allocator,
        "requested_ratio": made.requested_ratio,
        "ratio": made.ratio,
        "ratio_all": made.ratio_all,
        "uniform": made.uniform,
        "binding": made.binding,
        "parameters_before": before.total_params,
        "parameters": after.total_params,
        "layers": [[s.n_heads, s.n_kv_heads, s.n_ff] for s in made.dims.layers],
        "layers_before": [[s.n_heads, s.n_kv_heads, s.n_ff] for s in before.dims.layers],
    }


def describe_scores(made: ImportanceScores) -> dict[str, Any]:
    """How scores came about, as plain values: metric, switches, seeds and rank stability between them."""
    return {
        "metric": made.metric,
        "metric_options": dict(made.options),
        "poolable": made.poolable,
        "seeds": list(made.seeds),
        "rank_stability": [
            {"unit": s.unit, "axes": s.axes, "mean": s.mean, "minimum": s.minimum} for s in made.stability
        ],
    }


# ---------------------------------------------------------------- bench


def bench_file(
    path: Path,
    *,
    n_prompt: int,
    n_gen: int,
    repeats: int,
    threads: int | None,
    context_tokens: int | None,
    ubatch: int,
    kv_type: str,
    mmap: bool,
    with_memory: bool,
) -> tuple[BenchResult, MemoryResult | None]:
    """Time a GGUF file or an ONNX folder here and, if asked, measure its peak memory with a full context.

    An ONNX folder runs in onnxruntime-genai; the type of its cache is decided by the file. Raises ConfigError
    for bad figures or a damaged file, StageError when the runtime fails.
    """
    context = context_tokens or max(n_prompt + n_gen, 32)
    problems = []
    if context < n_prompt + n_gen:
        problems.append(f"--context {context} is shorter than --prompt {n_prompt} and --new {n_gen} together")
    if kv_type not in KV_ELEMENT_BYTES:
        known = ", ".join(KV_ELEMENT_BYTES)
        guess = registry.suggest(kv_type, KV_ELEMENT_BYTES)
        problems.append(f"unknown KV cache type '{kv_type}'{guess}; known: {known}")
    if problems:
        raise ConfigError(problems)
    runtime = "llama-cpp"
    if path.is_dir():
        runtime, kv_type, sha256 = _open_onnx(path)
    elif path.is_file():
        read_header(path)
        sha256 = rundir.sha256_file(path)
    else:
        raise ConfigError(f"file {path} does not exist", "give a file or folder made by edgeprune export")
    flags = LaunchFlags(context_tokens=context, ubatch=ubatch, kv_type=kv_type, mmap=mmap)
    protocol = BenchProtocol(prompt_tokens=n_prompt, new_tokens=n_gen, repeats=repeats)
    device = local.environment().cpu
    timed = bench.bench_artifact(
        path,
        sha256=sha256,
        flags=flags,
        protocol=protocol,
        threads=threads,
        device_name=device,
        runtime=runtime,
        key=make_key("bench_result", sha256, flags, protocol, threads),
    )
    memory = None
    if with_memory:
        memory = bench.measure_memory(
            path,
            sha256=sha256,
            flags=flags,
            device_name=device,
            threads=timed.n_threads,
            runtime=runtime,
            key=make_key("memory_result", sha256, flags),
        )
    return timed, memory


def _open_onnx(folder: Path) -> tuple[str, str, str]:
    """(runtime, type of the cache, digest) of an ONNX folder. Raises ConfigError when it is damaged."""
    # an optional format; GGUF needs none of this
    from edgeprune.exporters import onnx
    from edgeprune.runtimes import onnx_genai

    kv_type = onnx_genai.kv_type(folder)
    return onnx_genai.RUNTIME.name, kv_type, onnx.sha256_folder(folder)


# ---------------------------------------------------------------- finished runs

_REPORT_KEYS = (
    "model",
    "target",
    "profile",
    "budget",
    "candidates",
    "selected",
    "headline",
    "ties",
    "launch",
    "evaluation",
    "dense_perplexity",
    "digest",
)
_LIMIT_FIELDS = {
    "memory": "memory_bytes",
    "file": "file_bytes",
    "decode_speed": "decode_tps",
    "first_token": "first_token_ms",
    "kl": "kl",
    "energy": "energy_j",
    "agreement": "agreement",
}


def label_of(run_dir: Path, target: str | None) -> str | None:
    """How a run of several targets names the report of one. Raises ConfigError when it has none of it."""
    report = load_report(run_dir)
    if target is None or target == report["target"]["name"]:
        return None
    known = {row["target"]: row["report"] for row in report.get("targets") or ()}
    if target not in known:
        names = ", ".join(known) or report["target"]["name"]
        raise ConfigError(
            f"{run_dir} has no target '{target}'{registry.suggest(target, known)}", f"it has {names}"
        )
    return str(known[target]).removeprefix("report-").removesuffix(".json")


def load_report(run_dir: Path, label: str | None = None) -> dict[str, Any]:
    """Read report.json of a finished run. Raises ConfigError when it is missing or damaged."""
    path = run_dir / report_build.file_name(label)
    if not run_dir.is_dir():
        raise ConfigError(f"run folder {run_dir} does not exist")
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} has no {report_build.FILE_NAME}: no run has finished there",
            "run the same command again to finish it",
        )
    report = locate.read_json(path)
    if report.get("kind") != "report" or report.get("schema") != records.SCHEMA:
        raise ConfigError(f"{path} is not a report of schema {records.SCHEMA}")
    missing = [key for key in _REPORT_KEYS if key not in report]
    if missing:
        raise ConfigError(f"{path}: missing key '{missing[0]}'", "the file is damaged; run the command again")
    _candidates(report, path)
    records.from_plain(DeviceTarget, report["target"], where=f"{path}: target")
    records.from_plain(Profile, report["profile"], where=f"{path}: profile")
    if report["digest"] != report_build.digest(report):
        raise ConfigError(
            f"{path} was changed after the run wrote it: its digest is another",
            "run the same command again: what is finished is kept, and the report is written anew",
        )
    return report


def reselect(
    run_dir: Path,
    *,
    memory_bytes: int | None = None,
    file_bytes: int | None = None,
    min_tps: float | None = None,
    max_kl: float | None = None,
    max_first_token_ms: float | None = None,
    max_energy_j: float | None = None,
    min_agreement: float | None = None,
    objective: str | None = None,
) -> dict[str, Any]:
    """Choose again from what a finished run measured, under other limits; the report with the new answer.

    Nothing is written. A limit or objective that is not given stays the run's; a given limit replaces it,
    and is still held against target and profile.
    """
    report = load_report(run_dir)
    given = {
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "decode_tps": min_tps,
        "first_token_ms": max_first_token_ms,
        "kl": max_kl,
        "energy_j": max_energy_j,
        "agreement": min_agreement,
    }
    try:
        return _reselect(run_dir, report, given, objective or report.get("objective", "quality"))
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, ValueError) as error:
        path = run_dir / report_build.FILE_NAME
        raise ConfigError(
            f"{path} cannot be read: {error!r:.100}", "the file is damaged; run the command again"
        ) from None


def _reselect(
    run_dir: Path, report: dict[str, Any], given: Mapping[str, float | None], objective: str
) -> dict[str, Any]:
    path = run_dir / report_build.FILE_NAME
    budget = _other_budget(report, path, given, objective)
    changed = any(value is not None for value in given.values())
    candidates = [
        dataclasses.replace(
            c,
            meets=selection.check_limits(budget, c),
            reason=_unmeasured(budget, c) if changed and c.measured is None else c.reason,
        )
        for c in _candidates(report, path)
    ]
    chosen: Selection = selection.select(budget, candidates, _tie(run_dir, candidates))
    picked = next((c for c in candidates if c.id == chosen.selected), None)
    launch = None
    if picked is not None and picked.artifact is not None and picked.measured and picked.measured.flags:
        launch = report_build.launch_line(picked.artifact.path, picked.measured.flags)
    judged = {c.id: c for c in candidates if c.quality is not None}
    again = {
        **report,
        "budget": {
            name: {"value": limit.value, "unit": limit.unit, "from": limit.source}
            for name, field in _LIMIT_FIELDS.items()
            if (limit := getattr(budget, field)) is not None
        },
        "objective": budget.objective,
        "candidates": [
            to_plain(dataclasses.replace(c, reason=chosen.reasons.get(c.id, c.reason))) for c in candidates
        ],
        "selected": chosen.selected,
        "headline": chosen.headline,
        "ties": list(chosen.ties),
        "nearest": chosen.nearest,
        "missed": list(chosen.missed),
        "launch": launch,
        "against_selected": to_plain(
            against_selected(candidates, chosen.selected, _kl_arrays(run_dir, list(judged.values())))
        ),
        # predicted for the file that the run selected
        "power_modes": report.get("power_modes", []) if chosen.selected == report["selected"] else [],
    }
    return report_build.sealed({**again, "answers": answers(again)})


def _candidates(report: Mapping[str, Any], path: Path) -> list[Candidate]:
    rows = report["candidates"]
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: 'candidates' is not a list")
    return [records.from_plain(Candidate, c, where=f"{path}: candidates[{i}]") for i, c in enumerate(rows)]


def _other_budget(
    report: Mapping[str, Any], path: Path, given: Mapping[str, float | None], objective: str
) -> Budget:
    target = records.from_plain(DeviceTarget, report["target"], where=f"{path}: target")
    profile = records.from_plain(Profile, report["profile"], where=f"{path}: profile")
    fresh = budgets.resolve_budget(target, profile, **given)  # type: ignore[arg-type]
    limits: dict[str, Limit | None] = {}
    for name, field in _LIMIT_FIELDS.items():
        if given.get(field) is not None:
            limits[field] = getattr(fresh, field)
        elif name in report["budget"]:
            plain = dict(report["budget"][name])
            plain["source"] = plain.pop("from", None)
            limits[field] = records.from_plain(Limit, plain, where=f"{path}: budget.{name}")
        else:
            limits[field] = None
    budgets.check_objective(objective, floor=bool(limits["kl"] or limits["agreement"]))
    key = make_key("budget", to_plain(limits), objective)
    return dataclasses.replace(fresh, key=key, objective=objective, **limits)  # type: ignore[arg-type]


def _unmeasured(budget: Budget, candidate: Candidate) -> str:
    missed = [text for text, _ in selection.misses(budget, candidate)]
    if missed:
        return "not measured; misses " + "; ".join(missed)
    return "not measured in this run; predicted to meet these limits: run the job again with them"


def against_selected(
    candidates: Sequence[Candidate], selected: str | None, arrays: Mapping[str, np.ndarray]
) -> dict[str, PairedKL]:
    """KL of every judged candidate less the selected one's, token by token where both arrays are known."""
    chosen = next((c for c in candidates if c.id == selected), None)
    if chosen is None or chosen.quality is None:
        return {}
    out = {}
    for c in candidates:
        if c.quality is None or c.id == chosen.id or c.error is not None:
            continue
        a, b = arrays.get(c.id), arrays.get(chosen.id)
        if a is not None and b is not None and a.shape == b.shape:
            pair = quality.paired_difference(a, b)
            # one window has no spread: its t interval is not finite
            if math.isfinite(pair.low) and math.isfinite(pair.high):
                out[c.id] = PairedKL(difference=pair.difference, low=pair.low, high=pair.high, paired=True)
                continue
        difference = c.quality.kl - chosen.quality.kl
        half = 1.96 * math.hypot(c.quality.kl_stderr, chosen.quality.kl_stderr)
        out[c.id] = PairedKL(
            difference=difference, low=difference - half, high=difference + half, paired=False
        )
    return out


def _tie(run_dir: Path, candidates: Sequence[Candidate]) -> selection.Tie:
    """Paired by token where the run's arrays are still there, else by overlapping 95% intervals."""
    by_id = {c.id: c for c in candidates}
    arrays = _kl_arrays(run_dir, candidates)

    def tie(a: str, b: str) -> bool:
        if a in arrays and b in arrays and arrays[a].shape == arrays[b].shape:
            return quality.paired_difference(arrays[a], arrays[b]).tie
        first, second = by_id[a].quality, by_id[b].quality
        assert first is not None and second is not None
        return abs(first.kl - second.kl) <= 1.96 * (first.kl_stderr + second.kl_stderr)

    return tie


def _kl_arrays(run_dir: Path, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
    wanted = {(c.artifact.sha256, c.quality.kl): c.id for c in candidates if c.artifact and c.quality}
    out = {}
    for path in sorted((run_dir / "records").glob(f"{QualityResult.kind}-*.json")):
        try:
            record = records.from_plain(QualityResult, json.loads(path.read_text(encoding="utf-8")))
            name = wanted.get((record.artifact_sha256, record.kl))
            if name is not None:
                out[name] = load_file(run_dir / "arrays" / Path(record.kl_arrays).name)["kl"]
        except (ConfigError, SafetensorError, OSError, ValueError, KeyError):
            continue  # intervals are used instead
    return out
