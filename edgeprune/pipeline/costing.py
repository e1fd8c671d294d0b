"""What a plan costs before it is made: exact bytes, predicted memory and speed. Arithmetic, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune import planner
from edgeprune.costs import memory as memory_costs
from edgeprune.costs import speed as speed_costs
from edgeprune.costs.gguf_header import KeyValue, read_header
from edgeprune.exporters.gguf import FileCost
from edgeprune.families.base import Family
from edgeprune.graph import prune_dims
from edgeprune.planner import Cost
from edgeprune.records import (
    Budget,
    Constraints,
    DeviceTarget,
    LaunchFlags,
    ModelDims,
    SpeedModel,
    Workload,
)

# plans are made to fit this share of a limit, because the prediction is not the measurement
HEADROOM = 0.97
UBATCHES = (512, 256, 128, 64, 32)
# best quality first; what a rounded cache costs is measured with every candidate that has one
KV_TYPES = ("f16", "q8_0", "q4_0")
KV_BLOCK = 32  # elements; a head has to fill whole blocks


@dataclasses.dataclass(slots=True)
class CostModel:
    """Predicted bytes and speed of (dims, quantization), with the mildest launch flags that fit."""

    files: FileCost
    target: DeviceTarget
    budget: Budget
    workload: Workload
    speed: SpeedModel | None
    tokenizer: str
    _cache: dict[tuple[ModelDims, str, int], Cost] = dataclasses.field(default_factory=dict)
    _bytes: dict[tuple[ModelDims, str], tuple[int, list[memory_costs.StoredTensor]]] = dataclasses.field(
        default_factory=dict
    )

    def flag_choices(self, caches: int = len(KV_TYPES)) -> list[LaunchFlags]:
        """From the most comfortable to the leanest, with the first `caches` types of the KV cache."""
        context = self.workload.context_tokens
        return [
            LaunchFlags(context_tokens=context, ubatch=u, kv_type=kv, mmap=False)
            for kv in KV_TYPES[:caches]
            for u in UBATCHES
            if u <= context
        ]

    def stored(self, dims: ModelDims, quantization: str) -> list[memory_costs.StoredTensor]:
        return [
            memory_costs.StoredTensor(name=n, type=t, shape=s, bytes=b)
            for n, s, t, b in self.files.tensors(dims, quantization)
        ]

    def __call__(self, dims: ModelDims, quantization: str, caches: int = len(KV_TYPES)) -> Cost:
        caches = min(caches, cache_types(dims))
        found = self._cache.get((dims, quantization, caches))
        if found is None:
            if (dims, quantization) not in self._bytes:
                rows = self.stored(dims, quantization)
                self._bytes[dims, quantization] = self.files.file_bytes(dims, quantization), rows
            found = self.price(dims, *self._bytes[dims, quantization], caches)
            self._cache[dims, quantization, caches] = found
        return found

    def price(
        self,
        dims: ModelDims,
        file_bytes: int,
        tensors: list[memory_costs.StoredTensor],
        caches: int = len(KV_TYPES),
    ) -> Cost:
        """Cost of a file with these tensors; flags are the first choice that fits, else the leanest."""
        choices = self.flag_choices(min(caches, cache_types(dims)))
        weights = sum(t.bytes for t in tensors)
        read = speed_costs.by_type([(t.name, t.type, t.bytes) for t in tensors], tied=dims.tied)
        repacked = memory_costs.repacked(tensors, self.target.isa)
        limit = self.budget.memory_bytes.value * HEADROOM
        peak, flags, parts = 0, choices[0], None
        for flags in choices:
            parts = memory_costs.predict_parts(
                dims,
                weight_bytes=weights,
                flags=flags,
                repacked=repacked,
                tokenizer=self.tokenizer,
                overhead_bytes=self.target.runtime_overhead_bytes,
            )
            peak = memory_costs.total(parts)
            if peak <= limit:
                break
        tps = low = high = None
        if self.speed is not None:
            tps, low, high = speed_costs.predict_decode(
                dims,
                read=read,
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
            memory=parts,
        )


def cache_types(dims: ModelDims) -> int:
    """How many of KV_TYPES a model's cache may have."""
    return 1 if dims.head_dim % KV_BLOCK else len(KV_TYPES)


def tokenizer_kind(kvs: Sequence[KeyValue]) -> str:
    """How the memory model calls a tokenizer: bpe, spm or none."""
    models = {kv.key: kv.value for kv in kvs}
    kind = models.get("tokenizer.ggml.model")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    return {"gpt2": "bpe", "llama": "spm"}.get(str(kind), "none")


def widest_constraints(
    constraints_of: Callable[[Family, ModelDims, str], Constraints],
    family: Family,
    dims: ModelDims,
    quantizations: Sequence[str],
) -> Constraints:
    """Constraints under which every allowed quantization loads without falling back."""
    all_of = [constraints_of(family, dims, q) for q in quantizations]
    return max(all_of, key=lambda c: (c.ffn.multiple_of, c.kv.multiple_of))


def unit_bytes(space: planner.PlanSpace, quantization: str, cost: planner.CostOf) -> dict[str, float]:
    """File bytes that one unit of each axis takes at a quantization, from one legal step less of it."""
    dense = cost(space.graph.dims, quantization).file_bytes
    out = {}
    for axis in space.graph.axes:
        step = min(space.rule(axis).multiple_of, axis.n_units)
        if not space.free(axis) or axis.n_units == step:
            out[axis.name] = float(axis.unit_params)
            continue
        less = prune_dims(space.graph, {axis.name: range(axis.n_units - step)})
        out[axis.name] = (dense - cost(less, quantization).file_bytes) / step
    return out


def stored_tensors(path: Path) -> list[memory_costs.StoredTensor]:
    """Tensors of a GGUF file as the memory model wants them."""
    return [
        memory_costs.StoredTensor(name=t.name, type=t.type.name, shape=t.shape, bytes=t.n_bytes)
        for t in read_header(path).tensors
    ]
