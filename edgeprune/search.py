"""Sparsity, types and cache together: what could be made, and what is worth measuring next. No model is run.

An option is a mix of types on a rung of a plan ladder with the mildest launch flags that fit. For the best
quality only the rung that removes least and fits matters, once for each type the cache may have; for the
smallest file or the highest speed above a floor of quality the stronger ones do too. Measured candidates
teach a model of damage what each class of matrices and each cut costs, and the option that is expected to
improve most on the best one measured comes next (expected improvement; Mockus 1978).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgeprune import damage, planner
from edgeprune.costs import gguf_types
from edgeprune.graph import prune_dims
from edgeprune.planner import Cost, PlanSpace, Widths
from edgeprune.records import ModelDims, PrunePlan

RUNGS = 64  # of a ladder, before those with equal widths go
STRONGER = 12  # rungs beyond the one that just fits, where less is wanted than the limits allow
ENOUGH = 0.02  # expected gain, of the best so far, below which the search ends
DENSE = "dense"

# what a mix may give to the embedding and to attention, beside what its base does
MIXED = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "IQ4_NL", "Q4_0", "Q3_K")
# bases of mixes: what the FFN and everything else gets
BASES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K_M")

# Nats per token for a relative squared error of 1, and for a share of 1. Wide: what is measured decides.
# Values are of the order found on SmolLM2-135M (benchmarks/main_job.py).
PRIORS = (
    damage.Term(name="embedding", value=12.0, stderr=12.0),
    damage.Term(name="attention", value=12.0, stderr=12.0),
    damage.Term(name="ffn", value=15.0, stderr=15.0),
    damage.Term(name="cache", value=15.0, stderr=15.0),
    damage.Term(name="activations", value=0.003, stderr=0.003),  # rounded to 8 bits beside quantized weights
)
CUT = (2.5, 2.0)  # value and standard error, per allocator
CUT_SQUARED = (3.0, 3.0)

Row = tuple[str, tuple[int, ...], str, int]  # name, shape, type, bytes
PriceOf = Callable[[ModelDims, str, int], Cost]  # with the first n types of the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One plan of a ladder, not made yet: widths, the ratio they come to, dims and the plan's name."""

    id: str
    allocator: str
    block: int  # elements that its widths are legal for
    ratio: float
    widths: Mapping[str, int]
    dims: ModelDims


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A rung at a quantization, with its predicted cost and the features of its damage."""

    rung: Rung
    quantization: str
    cost: Cost
    features: Mapping[str, float]

    @property
    def id(self) -> str:
        return f"{self.rung.id}@{self.quantization}"


@dataclass(slots=True, kw_only=True)
class SearchSpace:
    """Ladders of every allocator, and prices of their rungs.

    Attributes:
        plans: block size of a type to the space whose widths fill its blocks.
        quantizations: names and mixes that may be used, in order of preference among equals.
        price: predicted cost of (dims, quantization) with the first n types of the cache.
        rows: every tensor of (dims, quantization).
        caches: how many types the cache may have.
        finish: dims of a cut model to those of what is exported, where compensation adds biases.
    """

    plans: Mapping[int, PlanSpace]
    allocators: Sequence[str]
    quantizations: Sequence[str]
    price: PriceOf
    rows: Callable[[ModelDims, str], Sequence[Row]]
    caches: int
    finish: Callable[[ModelDims], ModelDims] = lambda dims: dims
    _ladders: dict[tuple[str, int], list[Rung]] = field(default_factory=dict)
    _named: dict[str, ModelDims] = field(default_factory=dict)

    @property
    def scores_key(self) -> str:
        return next(iter(self.plans.values())).scores_key

    @property
    def dense(self) -> Rung:
        space = next(iter(self.plans.values()))
        return Rung(id=DENSE, allocator="", block=0, ratio=0.0, widths=space.dense(), dims=space.graph.dims)

    def priors(self) -> tuple[damage.Term, ...]:
        cuts = []
        for name in self.allocators:
            cuts.append(damage.Term(name=f"cut {name}", value=CUT[0], stderr=CUT[1]))
            cuts.append(damage.Term(name=f"cut {name} squared", value=CUT_SQUARED[0], stderr=CUT_SQUARED[1]))
        return (*PRIORS, *cuts)

    def ladder(self, allocator: str, block: int) -> list[Rung]:
        """Rungs from weak to strong, nested; the dense model is none of them."""
        found = self._ladders.get((allocator, block))
        if found is None:
            found = self._ladders[allocator, block] = self._climb(allocator, block)
        return found

    def _climb(self, allocator: str, block: int) -> list[Rung]:
        space = self.plans[block]
        top = planner.highest_ratio(space)
        load = planner.load_allocator(allocator)
        floor: Widths = space.dense()
        out: list[Rung] = []
        for step in range(1, RUNGS + 1):
            if top <= 0:
                break
            wanted = load.widths(space, top * step / RUNGS)
            widths = {name: min(floor[name], width) for name, width in wanted.items()}
            if widths == floor:
                continue
            floor = widths
            out.append(self._rung(space, allocator, block, widths))
        return out

    def _rung(self, space: PlanSpace, allocator: str, block: int, widths: Widths) -> Rung:
        less = {a.name: range(widths[a.name]) for a in space.graph.axes if widths[a.name] < a.n_units}
        dims = self.finish(prune_dims(space.graph, less))
        gone = sum((a.n_units - widths[a.name]) * a.unit_params for a in space.graph.axes)
        ratio = gone / space.graph.decoder_params
        name, again = f"{allocator}-{100 * ratio:.1f}", 1
        while self._named.get(name, dims) != dims:
            again += 1
            name = f"{allocator}-{100 * ratio:.1f}.{again}"
        self._named[name] = dims
        return Rung(id=name, allocator=allocator, block=block, ratio=ratio, widths=widths, dims=dims)

    def make(self, rung: Rung, requested: float | None = None) -> PrunePlan:
        """The plan of a rung."""
        if not rung.allocator:
            return planner.plan_ratio(next(iter(self.plans.values())), "uniform", 0.0)
        plan = planner.make_plan(
            self.plans[rung.block],
            rung.allocator,
            rung.ratio if requested is None else requested,
            dict(rung.widths),
        )
        return dataclasses.replace(plan, id=rung.id)

    def find(self, plan: str, allocator: str, block: int) -> Rung | None:
        """A rung by its plan's name."""
        if plan == DENSE:
            return self.dense
        if allocator not in self.allocators or block not in self.plans:
            return None
        return next((rung for rung in self.ladder(allocator, block) if rung.id == plan), None)

    def first_rung(self, quantization: str, ratio: float) -> Rung | None:
        """The weakest rung of the first allocator that removes at least this share."""
        rungs = self.ladder(self.allocators[0], self._block(quantization))
        return next((rung for rung in rungs if rung.ratio >= ratio - 0.5 / RUNGS), None)

    def option(self, rung: Rung, quantization: str, caches: int | None = None) -> Option:
        cost = self.price(rung.dims, quantization, self.caches if caches is None else caches)
        features = features_of(self.rows(rung.dims, quantization), cost.flags.kv_type)
        if rung.allocator:
            features |= {
                f"cut {rung.allocator}": rung.ratio,
                f"cut {rung.allocator} squared": rung.ratio**2,
            }
        return Option(rung=rung, quantization=quantization, cost=cost, features=features)

    def options(self, *, stronger: bool = False) -> list[Option]:
        """Everything worth a thought: mixes that give the same types to every tensor count once.

        With `stronger`, rungs that remove more than the limits ask for as well.
        """
        out: list[Option] = []
        seen: set[tuple[str, ...]] = set()
        dense = self.dense
        for quantization in self.quantizations:
            types = tuple(row[2] for row in self.rows(dense.dims, quantization))
            if types in seen:
                continue
            seen.add(types)
            whole = self.option(dense, quantization)
            if whole.cost.fits:
                out.append(whole)
            if whole.cost.fits and not stronger:
                continue  # a cut at the same types can only be worse
            for allocator in self.allocators:
                rungs = self.ladder(allocator, self._block(quantization))
                chosen = self._weakest(rungs, quantization)
                if stronger and rungs:
                    first = min(chosen, default=len(rungs))
                    chosen |= set(range(first, len(rungs), max(1, (len(rungs) - first) // STRONGER)))
                out += [self.option(rungs[i], quantization) for i in sorted(chosen)]
        return out

    def _block(self, quantization: str) -> int:
        wanted = gguf_types.block_size(quantization)
        return wanted if wanted in self.plans else min(self.plans)

    def _weakest(self, rungs: Sequence[Rung], quantization: str) -> set[int]:
        """The first rung that fits with each choice of the cache's type."""
        found = set()
        for caches in range(1, self.caches + 1):
            low, high = 0, len(rungs)
            while low < high:
                middle = (low + high) // 2
                if self.price(rungs[middle].dims, quantization, caches).fits:
                    high = middle
                else:
                    low = middle + 1
            if low < len(rungs):
                found.add(low)
        return found


def mixes(bases: Sequence[str], extra: Sequence[str] = MIXED) -> list[str]:
    """Each base as it is, then with other types for the embedding and for attention."""
    out = list(bases)
    for base in bases:
        for embedding in (None, *extra):
            for attention in (None, *extra):
                given = {"embedding": embedding, "attention": attention}
                named = "".join(f"+{k}={v}" for k, v in given.items() if v is not None)
                out.append(gguf_types.canonical(base + named))
    return list(dict.fromkeys(out))


def features_of(rows: Sequence[Row], kv_type: str) -> dict[str, float]:
    """Mean relative squared error of each class of matrices, of the cache, and whether inputs are rounded."""
    error: dict[str, float] = {}
    size: dict[str, int] = {}
    rounded = False
    for name, shape, kind, _ in rows:
        group = gguf_types.tensor_class(name)
        if group is None:
            continue
        n = math.prod(shape)
        size[group] = size.get(group, 0) + n
        error[group] = error.get(group, 0.0) + n * gguf_types.relative_error(kind)
        rounded = rounded or kind not in gguf_types.FLOATS
    out = {group: error[group] / size[group] for group in error}
    return {**out, "cache": cache_error(kv_type), "activations": float(rounded)}


def cache_error(kv_type: str) -> float:
    """Relative squared error of the cache's type; f16 is what the dense parent is read with."""
    return 0.0 if kv_type in ("f16", "f32") else gguf_types.relative_error(kv_type.upper())


# ---------------------------------------------------------------- what next


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What makes a candidate better: `quality`, `speed` or `size`, the latter two with a KL not to exceed."""

    objective: str
    most_kl: float | None = None
    least_agreement: float | None = None

    def value(self, kl: float, cost: Cost) -> float:
        """Smaller is better."""
        if self.objective == "size":
            return float(cost.file_bytes)
        if self.objective == "speed":
            return 1.0 / cost.decode_tps if cost.decode_tps else float(cost.file_bytes)
        return kl


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    option: Option
    predicted: damage.Estimate
    gain: float  # expected, as a share of the best so far


def propose(
    options: Sequence[Option], model: damage.Model, goal: Goal, best: float | None
) -> Proposal | None:
    """The option expected to gain most on `best`, the goal's value so far; None when none is worth it.

    Without a best one, the likeliest to be good: whatever it brings, something fits.
    """
    found: Proposal | None = None
    for option in options:
        if not option.cost.fits:
            continue
        predicted = model.predict(option.features)
        gain = _gain(option, predicted, goal, best)
        if found is None or (gain, -predicted.kl) > (found.gain, -found.predicted.kl):
            found = Proposal(option=option, predicted=predicted, gain=gain)
    if found is None or (best is not None and found.gain < ENOUGH):
        return None
    return found


def _gain(option: Option, predicted: damage.Estimate, goal: Goal, best: float | None) -> float:
    if goal.objective == "quality":
        return -predicted.kl if best is None else predicted.gain(best) / max(best, damage.FLOOR)
    likely = 1.0 if goal.most_kl is None else predicted.below(goal.most_kl)
    if best is None:
        return likely
    return likely * max(0.0, best - goal.value(predicted.kl, option.cost)) / best
