"""From a parent model to scored, planned lanes: tokens, calibration, scores, costs, ladder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import edgeprune
from edgeprune import calibration, data, planner, registry, rundir, surgery, tokenizer
from edgeprune.costs import memory as memory_costs
from edgeprune.costs import speed as speed_costs
from edgeprune.costs.gguf_header import read_header
from edgeprune.exporters.gguf import FileCost
from edgeprune.metrics.base import Metric
from edgeprune.pipeline.parent import Parent
from edgeprune.planner import Cost
from edgeprune.progress import Progress
from edgeprune.records import (
    Budget,
    CalibrationStats,
    DeviceTarget,
    ImportanceScores,
    LaunchFlags,
    ModelDims,
    SpeedModel,
    TokenSet,
    Workload,
    make_key,
)

# plans are made to fit this share of a limit, because the prediction is not the measurement
HEADROOM = 0.97
UBATCHES = (512, 256, 128, 64, 32)
KV_TYPES = ("f16", "q8_0")  # best quality first; a q8_0 cache costs far less than pruning
EVAL_SEED_OFFSET = 7_919  # held-out text comes from another random stream


def save_arrays(run: rundir.RunDir, relative: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Write arrays beside the records; returns their sha256."""
    path = run.path(relative)
    with rundir.atomic_path(path) as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
    return rundir.sha256_file(path)


class Tokens:
    """Calibration and held-out windows; the model is loaded once for both when it has to write them."""

    def __init__(self, run: rundir.RunDir, parent: Parent, progress: Progress) -> None:
        self._run = run
        self._parent = parent
        self._progress = progress
        self._model: object | None = None

    def get(
        self, text: str | None, *, n_samples: int, n_tokens: int, seed: int
    ) -> tuple[TokenSet, np.ndarray]:
        """Windows [n_samples, n_tokens] from `text` (file or data set), or sampled from the model."""
        run, parent = self._run, self._parent
        origin = "sampled from the model" if text is None else text
        content = None
        if text is not None:
            content = data.read_text(text)
            key_text = rundir.sha256_bytes(content.encode())
        else:
            key_text = "self"
        n_tokens = min(n_tokens, parent.graph.dims.max_context)
        key = make_key("token_set", parent.key, key_text, n_samples, n_tokens, seed)
        relative = f"arrays/tokens-{key}.safetensors"

        def compute() -> TokenSet:
            if content is None:
                windows = data.sample_from_model(
                    self._load(), n_samples=n_samples, n_tokens=n_tokens, seed=seed, progress=self._progress
                )
            else:
                windows = data.windows(
                    content,
                    lambda t: tokenizer.encode(parent.folder, t),
                    n_samples=n_samples,
                    n_tokens=n_tokens,
                    seed=seed,
                    where=origin,
                )
            save_arrays(run, relative, {"tokens": windows})
            return TokenSet(
                origin=origin,
                seed=seed,
                n_samples=n_samples,
                n_tokens=n_tokens,
                sha256=rundir.sha256_bytes(windows.tobytes()),
                path=relative,
                key=key,
            )

        record = run.stage(TokenSet, key, compute, name="tokens", valid=lambda t: self._read(t) is not None)
        windows = self._read(record)
        assert windows is not None
        return record, windows

    def _read(self, record: TokenSet) -> np.ndarray | None:
        path = self._run.path(record.path)
        if not path.is_file():
            return None
        windows = load_file(path)["tokens"]
        return windows if rundir.sha256_bytes(windows.tobytes()) == record.sha256 else None

    def _load(self) -> object:
        if self._model is None:
            self._model = surgery.load(self._parent.folder)
        return self._model

    def close(self) -> None:
        """Drop the model; the stages after this need one layer at a time only."""
        self._model = None


def calibrate(
    run: rundir.RunDir,
    parent: Parent,
    metric: Metric,
    options: Mapping[str, str],
    tokens: TokenSet,
    windows: np.ndarray,
    *,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], ImportanceScores, dict[str, np.ndarray]]:
    """Collect statistics and score every axis; returns (statistics, record, scores by axis)."""
    needs = metric.needs(options) | calibration.IMATRIX_NEEDS
    names = tuple(sorted(n.value for n in needs))
    key = make_key("calibration_stats", parent.key, tokens.key, list(names), edgeprune.__version__)
    relative = f"arrays/calibration-{key}.safetensors"

    def collect() -> CalibrationStats:
        arrays = calibration.collect(parent.source, parent.graph, windows, needs, progress=progress)
        return CalibrationStats(
            needs=names,
            tokens=int(windows.size),
            data_sha256=tokens.sha256,
            arrays=relative,
            arrays_sha256=save_arrays(run, relative, arrays),
            key=key,
        )

    def intact(stored: CalibrationStats | ImportanceScores) -> bool:
        path = run.path(stored.arrays)
        return path.is_file() and rundir.sha256_file(path) == stored.arrays_sha256

    stats = run.stage(CalibrationStats, key, collect, name="calibrate", valid=intact)
    arrays = load_file(run.path(stats.arrays))
    score_key = make_key("importance_scores", key, metric.name, dict(options), seed)
    score_path = f"arrays/scores-{score_key}.safetensors"

    def score() -> ImportanceScores:
        values = calibration.score(
            metric, options, parent.source, parent.graph, arrays, seed=seed, progress=progress
        )
        return ImportanceScores(
            metric=metric.name,
            options=dict(options),
            poolable=metric.poolable(options),
            arrays=score_path,
            arrays_sha256=save_arrays(run, score_path, values),
            key=score_key,
        )

    record = run.stage(ImportanceScores, score_key, score, name="score", valid=intact)
    return arrays, record, load_file(run.path(record.arrays))


def load_metric(name: str, given: Mapping[str, str]) -> tuple[Metric, dict[str, str]]:
    metric: Metric = registry.load("metrics", name, "METRIC")
    return metric, metric.resolve(given)


# ---------------------------------------------------------------- costs


def speed_of(target: DeviceTarget, mode: str | None) -> SpeedModel | None:
    """The target's speed model for llama.cpp in a power mode (the default one when None)."""
    wanted = mode if mode is not None else target.default_mode
    rows = [s for s in target.speeds if s.runtime == "llama-cpp"]
    for row in rows:
        if wanted and row.mode == wanted:
            return row
    return rows[0] if rows else None


@dataclasses.dataclass(slots=True)
class CostModel:
    """Predicted bytes and speed of (dims, quantization), with the mildest launch flags that fit."""

    files: FileCost
    target: DeviceTarget
    budget: Budget
    workload: Workload
    speed: SpeedModel | None
    tokenizer: str
    _cache: dict[tuple[ModelDims, str], Cost] = dataclasses.field(default_factory=dict)

    def flag_choices(self) -> list[LaunchFlags]:
        """From the most comfortable to the leanest."""
        context = self.workload.context_tokens
        return [
            LaunchFlags(context_tokens=context, ubatch=u, kv_type=kv, mmap=False)
            for kv in KV_TYPES
            for u in UBATCHES
            if u <= context
        ]

    def stored(self, dims: ModelDims, quantization: str) -> list[memory_costs.StoredTensor]:
        return [
            memory_costs.StoredTensor(name=n, type=t, shape=s, bytes=b)
            for n, s, t, b in self.files.tensors(dims, quantization)
        ]

    def __call__(self, dims: ModelDims, quantization: str) -> Cost:
        found = self._cache.get((dims, quantization))
        if found is None:
            found = self.price(
                dims, self.files.file_bytes(dims, quantization), self.stored(dims, quantization)
            )
            self._cache[dims, quantization] = found
        return found

    def price(self, dims: ModelDims, file_bytes: int, tensors: list[memory_costs.StoredTensor]) -> Cost:
        """Cost of a file with these tensors; flags are the first choice that fits, else the leanest."""
        weights = sum(t.bytes for t in tensors)
        read = sum(t.bytes for t in tensors if dims.tied or t.name != "token_embd.weight")
        repacked = memory_costs.repacked(tensors, self.target.isa)
        limit = self.budget.memory_bytes.value * HEADROOM
        peak, flags = 0, self.flag_choices()[0]
        for flags in self.flag_choices():
            peak = memory_costs.predict_peak_memory(
                dims,
                weight_bytes=weights,
                flags=flags,
                repacked=repacked,
                tokenizer=self.tokenizer,
                overhead_bytes=self.target.runtime_overhead_bytes,
            )
            if peak <= limit:
                break
        tps = low = high = None
        if self.speed is not None:
            tps, low, high = speed_costs.predict_decode(
                dims,
                read_bytes=read,
                flags=flags,
                context_tokens=self.workload.prompt_tokens,
                speed=self.speed,
            )
        misses = []
        if peak > limit:
            misses.append("memory")
        if self.budget.file_bytes is not None and file_bytes > self.budget.file_bytes.value:
            misses.append("file")
        if self.budget.decode_tps is not None and high is not None and high < self.budget.decode_tps.value:
            misses.append("decode speed")  # even the optimistic end of the band is too slow
        return Cost(
            file_bytes=file_bytes,
            peak_bytes=peak,
            decode_tps=tps,
            decode_tps_low=low,
            decode_tps_high=high,
            flags=flags,
            fits=not misses,
            misses=tuple(misses),
        )


def tokenizer_kind(parent: Parent) -> str:
    models = {kv.key: kv.value for kv in parent.tokenizer_kvs}
    kind = models.get("tokenizer.ggml.model")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    return {"gpt2": "bpe", "llama": "spm"}.get(str(kind), "none")


def widest_constraints(
    constraints_of: Callable[..., object], parent: Parent, quantizations: tuple[str, ...]
) -> object:
    """Constraints under which every allowed quantization loads without falling back."""
    all_of = [constraints_of(parent.family, parent.graph.dims, q) for q in quantizations]
    return max(all_of, key=lambda c: (c.ffn.multiple_of, c.kv.multiple_of))  # type: ignore[attr-defined]


def plan_ladder(
    space: planner.PlanSpace,
    allocators: tuple[str, ...],
    ratios: tuple[float, ...],
    quantizations: tuple[str, ...],
    cost: planner.CostOf,
) -> planner.PlanLadder:
    """The profile's rungs, and for each quantization the plan that removes least and fits."""
    top = planner.highest_ratio(space)
    plans = []
    for allocator in allocators:
        plans += [planner.plan_ratio(space, allocator, r) for r in ratios if r <= top]
        for quantization in quantizations:
            plan = planner.weakest_fit(space, allocator, quantization, cost)
            if plan is not None:
                plans.append(plan)
    return planner.ladder(plans, space)


def stored_tensors(path: Path) -> list[memory_costs.StoredTensor]:
    """Tensors of a GGUF file as the memory model wants them."""
    return [
        memory_costs.StoredTensor(name=t.name, type=t.type.name, shape=t.shape, bytes=t.n_bytes)
        for t in read_header(path).tensors
    ]
