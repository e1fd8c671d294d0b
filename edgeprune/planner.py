"""From scores, costs, budget and constraints to nested plans. Arithmetic only, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeprune import registry
from edgeprune.allocators.base import Allocator, PlanSpace, Widths, best_units
from edgeprune.allocators.uniform import uniform_widths
from edgeprune.errors import ConfigError, InfeasibleError
from edgeprune.graph import find_family, graph_of, prune_dims
from edgeprune.records import LaunchFlags, MemoryParts, ModelDims, PlanLadder, PrunePlan, make_key

__all__ = ["PlanSpace", "Widths", "best_units", "uniform_widths"]

ALLOCATORS = registry.names("allocators")


def load_allocator(name: str) -> Allocator:
    """Raises ConfigError for an unknown allocator."""
    found: Allocator = registry.load("allocators", name, "ALLOCATOR")
    return found


def kept_indices(space: PlanSpace, widths: Widths) -> dict[str, tuple[int, ...]]:
    """The best `width` units of every axis that loses some, sorted; ties keep the lower index."""
    kept = {}
    for axis in space.graph.axes:
        width = widths[axis.name]
        if width < axis.n_units:
            kept[axis.name] = best_units(space.scores[axis.name], width, axis.groups)
    return kept


def protected_layers(n_layers: int) -> frozenset[int]:
    """Layers usually left whole: the first 4 and last 2 of 32, scaled to depth (arXiv:2305.11627)."""
    first, last = int(n_layers / 8 + 0.5), int(n_layers / 16 + 0.5)
    return frozenset((*range(first), *range(n_layers - last, n_layers)))


def highest_ratio(space: PlanSpace) -> float:
    """Largest share of decoder-layer parameters that can be removed at all."""
    most = {axis.name: space.floor(axis) for axis in space.graph.axes}
    gone = sum((a.n_units - most[a.name]) * a.unit_params for a in space.graph.axes)
    return gone / space.graph.decoder_params


def _is_uniform(dims: ModelDims) -> bool:
    return all(layer == dims.layers[0] for layer in dims.layers)


def _reasons(space: PlanSpace, allocator: str, widths: Widths) -> dict[str, str]:
    """One line per axis on why it got its width."""
    if allocator not in ALLOCATORS:
        return {}
    why = load_allocator(allocator).why
    return {axis.name: why(space, widths, axis) for axis in space.graph.axes}


def make_plan(
    space: PlanSpace,
    allocator: str,
    requested: float,
    widths: Widths,
    *,
    kept: dict[str, tuple[int, ...]] | None = None,
) -> PrunePlan:
    """A plan of these widths; the best units stay, or those of `kept`."""
    graph = space.graph
    kept = kept_indices(space, widths) if kept is None else kept
    dims = prune_dims(graph, kept)
    after = graph_of(find_family(dims.family), dims)
    ratio = 1 - after.decoder_params / graph.decoder_params
    tag = "dense" if not kept else f"{allocator}-{100 * ratio:.1f}"
    return PrunePlan(
        id=tag,
        metric=space.metric,
        allocator=allocator,
        requested_ratio=requested,
        ratio=ratio,
        ratio_all=1 - after.total_params / graph.total_params,
        uniform=_is_uniform(dims),
        kept=kept,
        dims=dims,
        binding=None,
        why=_reasons(space, allocator, widths) if kept else {},
        key=make_key("prune_plan", graph.key, space.scores_key, {k: list(v) for k, v in kept.items()}),
    )


def check_allocator(allocator: str) -> None:
    """Raises ConfigError for an unknown allocator."""
    load_allocator(allocator)


def check_ratio(space: PlanSpace, allocator: str, ratio: float) -> None:
    """Raise what `plan_ratio` would, without looking at scores."""
    if not 0 <= ratio < 1:
        raise ConfigError(
            f"ratio {ratio} is not between 0 and 1", "0.2 removes a fifth of the decoder layers"
        )
    load_allocator(allocator).check(space)
    rules = [space.rule(axis) for axis in space.graph.axes]
    if ratio > 0 and space.protected and any(r.uniform_across_layers and not r.fixed for r in rules):
        raise ConfigError(
            "protected layers keep widths of their own, which this export cannot load",
            "leave no layer whole, or plan without the export's --quantization",
        )
    top = highest_ratio(space)
    if ratio > top + 1e-9:
        n = len(space.protected)
        protected = f" with {n} protected layer{'s' if n > 1 else ''}" if n else ""
        raise InfeasibleError(
            f"ratio {ratio:.3f} cannot be reached{protected}: the highest reachable is {top:.3f}",
            "ask for less, or protect fewer layers" if n else "ask for less",
        )


def widths_for(space: PlanSpace, allocator: str, ratio: float) -> Widths:
    """Units that each axis keeps at a ratio; 'uniform' needs no scores. Raises what `plan_ratio` does."""
    check_ratio(space, allocator, ratio)
    return load_allocator(allocator).widths(space, ratio)


def plan_ratio(
    space: PlanSpace,
    allocator: str,
    ratio: float,
    *,
    tolerance: float = 0.05,
    widths: Widths | None = None,
) -> PrunePlan:
    """One plan for a ratio of decoder-layer parameters given by hand, with these widths when they are given.

    Raises InfeasibleError with the highest reachable ratio, ConfigError for a ratio outside 0 … 1.
    """
    if widths is None:
        widths = widths_for(space, allocator, ratio)
    else:
        check_ratio(space, allocator, ratio)
    plan = make_plan(space, allocator, ratio, widths)
    if abs(plan.ratio - ratio) > tolerance:
        return dataclasses.replace(plan, binding="widths that the export can load")
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Predicted needs of one (dims, quantization) with the launch flags that were chosen for it."""

    file_bytes: int
    peak_bytes: int
    decode_tps: float | None
    decode_tps_low: float | None
    decode_tps_high: float | None
    flags: LaunchFlags
    fits: bool
    misses: tuple[str, ...]
    memory: MemoryParts | None = None  # what `peak_bytes` is made of


CostOf = Callable[[ModelDims, str], Cost]


def weakest_fit(space: PlanSpace, allocator: str, quantization: str, cost: CostOf) -> PrunePlan | None:
    """The plan that removes least and is still predicted to fit, or None. Bisection over the ratio."""
    dense = plan_ratio(space, allocator, 0.0)
    if cost(dense.dims, quantization).fits:
        return dense
    low, high = 0.0, highest_ratio(space)

    def dims_at(ratio: float) -> tuple[Widths, ModelDims]:
        widths = load_allocator(allocator).widths(space, ratio)
        counts = {name: range(width) for name, width in widths.items()}
        return widths, prune_dims(space.graph, counts)

    # the floor itself: an allocator that rounds to legal widths may stop a step above it
    widths = {axis.name: space.floor(axis) for axis in space.graph.axes}
    dims = prune_dims(space.graph, {name: range(width) for name, width in widths.items()})
    if not cost(dims, quantization).fits:
        return None
    best, best_ratio = widths, high
    for _ in range(12):
        middle = (low + high) / 2
        widths, dims = dims_at(middle)
        if cost(dims, quantization).fits:
            best, best_ratio, high = widths, middle, middle
        else:
            low = middle
    return make_plan(space, allocator, best_ratio, best)


def ladder(plans: Sequence[PrunePlan], space: PlanSpace) -> PlanLadder:
    """Order plans weak to strong and make them nested: an axis never grows back. Duplicates go."""
    dense = plan_ratio(space, "uniform", 0.0)
    out: list[PrunePlan] = [dense]
    by_allocator: dict[str, list[PrunePlan]] = {}
    for plan in plans:
        if plan.kept:
            by_allocator.setdefault(plan.allocator, []).append(plan)
    for allocator, group in by_allocator.items():
        floor = {axis.name: axis.n_units for axis in space.graph.axes}
        for plan in sorted(group, key=lambda p: p.ratio):
            widths = {
                axis.name: min(floor[axis.name], len(plan.kept.get(axis.name, range(axis.n_units))))
                for axis in space.graph.axes
            }
            floor = widths
            nested = make_plan(space, allocator, plan.requested_ratio, widths)
            if all(nested.kept != other.kept for other in out):
                out.append(nested)
    ids: dict[str, int] = {}
    unique = []
    for plan in sorted(out, key=lambda p: (p.ratio, p.allocator)):
        ids[plan.id] = ids.get(plan.id, 0) + 1
        again = ids[plan.id]
        unique.append(plan if again == 1 else dataclasses.replace(plan, id=f"{plan.id}.{again}"))
    return PlanLadder(plans=tuple(unique), key=make_key("plan_ladder", [p.key for p in unique]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One (plan, quantization) pair with its predicted cost; `measure` says whether it will be measured."""

    plan: PrunePlan
    quantization: str
    cost: Cost
    measure: bool
    why: str

    @property
    def id(self) -> str:
        return f"{self.plan.id}@{self.quantization}"


def lanes(ladder: PlanLadder, quantizations: Sequence[str], cost: CostOf, *, most: int) -> tuple[Lane, ...]:
    """Every plan at every quantization, and which of them are worth measuring.

    In order: the dense model at every type that is predicted to fit; for the other types the plan that
    removes least and fits; then, for comparison, the mildest pruned plans of the types that fit dense.
    At least one pruned plan is measured when any fits, so that the report can say what pruning costs.
    """
    costs = {(plan.id, q): cost(plan.dims, q) for plan in ladder.plans for q in quantizations}
    dense = ladder.plans[0]
    pruned = ladder.plans[1:]
    chosen: dict[tuple[str, str], str] = {}
    dense_fit = [q for q in quantizations if costs[dense.id, q].fits]
    dense_fit.sort(key=lambda q: -costs[dense.id, q].file_bytes)
    first: list[tuple[str, str]] = [(dense.id, q) for q in dense_fit]
    mildest: list[tuple[str, str]] = []
    for q in quantizations:
        if q not in dense_fit:
            for allocator in dict.fromkeys(plan.allocator for plan in pruned):
                fitting = [p for p in pruned if p.allocator == allocator and costs[p.id, q].fits]
                if fitting:
                    mildest.append((min(fitting, key=lambda p: p.ratio).id, q))
    mildest.sort(key=lambda pair: next(p.ratio for p in pruned if p.id == pair[0]))
    extra = [(p.id, q) for p in pruned for q in dense_fit if costs[p.id, q].fits]
    room = most - 1 if (mildest or extra) and 1 < most <= len(first) else most
    for pair in first[:room]:
        chosen[pair] = "the dense model at every type that fits"
    for pair in mildest:
        if len(chosen) < most:
            chosen[pair] = "removes least among the plans that fit at this type"
    for pair in extra:
        if len(chosen) < most:
            chosen[pair] = "shows what pruning costs where the dense model fits too"
    out = []
    for plan in ladder.plans:
        for q in quantizations:
            price = costs[plan.id, q]
            if (plan.id, q) in chosen:
                why = chosen[plan.id, q]
            elif not price.fits:
                why = "predicted to miss " + ", ".join(price.misses)
            else:
                why = "not measured: a plan that removes less fits at this type"
            out.append(Lane(plan=plan, quantization=q, cost=price, measure=(plan.id, q) in chosen, why=why))
    return tuple(out)
