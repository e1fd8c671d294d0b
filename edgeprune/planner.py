"""From scores, costs, budget and constraints to plans. Arithmetic only, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from edgeprune import registry
from edgeprune.allocators.base import Allocator, PlanSpace, Widths, best_units
from edgeprune.allocators.uniform import uniform_widths
from edgeprune.errors import ConfigError, InfeasibleError
from edgeprune.graph import find_family, graph_of, prune_dims
from edgeprune.records import LaunchFlags, MemoryParts, ModelDims, PrunePlan, make_key

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
