"""Least summed damage for what has to go: measured curves per axis, solved as an integer program.

Each axis brings the damage (KL of the whole model to the dense one, in nats per token) measured when it
alone is cut to a few widths. Every legal width of every axis is one binary variable; HiGHS picks one per
axis so that the summed damage is least and enough is removed (a multiple-choice knapsack).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from edgeprune.allocators.base import Allocator, Array, Curve, PlanSpace, Widths, held
from edgeprune.errors import ConfigError, InfeasibleError
from edgeprune.records import Axis

_BEYOND = 10.0  # times the last measured slope
_GAP = 2e-3  # of the summed damage: less than a measurement can tell


def damages(space: PlanSpace, axis: Axis) -> tuple[list[int], Array]:
    """Every legal width and its damage, by monotone interpolation of the axis's curve."""
    from scipy.interpolate import PchipInterpolator

    widths = space.legal_widths(axis)
    curve: Curve = space.curves.get(axis.name, ())
    points = {axis.n_units: 0.0, **{int(w): float(d) for w, d in curve}}
    known = sorted(points)
    # noise may make a narrower width look better than a wider one
    values = np.maximum.accumulate(np.array([points[w] for w in reversed(known)]))[::-1]
    values = np.maximum(values, 0.0)
    if len(known) == 1:
        return widths, np.zeros(len(widths))
    inside = PchipInterpolator(known, values, extrapolate=False)
    found = np.asarray(inside(np.array(widths, dtype=np.float64)))
    # below the narrowest measured width curves bend upwards: go there only where nothing else is left
    slope = _BEYOND * (values[0] - values[1]) / (known[1] - known[0])
    below = np.array(widths) < known[0]
    found[below] = values[0] + slope * (known[0] - np.array(widths)[below])
    return widths, found


def _tolerance(space: PlanSpace) -> float:
    """Half the smallest step: the reached ratio is then the nearest one, as with the other allocators."""
    steps = [space.rule(a).multiple_of * space.unit_cost(a) for a in space.graph.axes if space.free(a)]
    return min(steps, default=0.0) / 2


def sensitivity_widths(space: PlanSpace, ratio: float) -> Widths:
    """The widths with the least summed damage.

    Raises ConfigError without curves, InfeasibleError when the ratio is out of reach.
    """
    if ratio <= 0:
        return space.dense()
    if not space.curves:
        raise ConfigError(
            "the sensitivity allocator has to run the model, which planning from saved scores cannot",
            "use it with 'edgeprune prune' or the main job",
        )
    target = space.target(ratio) - _tolerance(space)
    tables = {a.name: damages(space, a) for a in space.graph.axes if space.free(a)}
    if space.constraints.ffn.uniform_across_layers or space.constraints.kv.uniform_across_layers:
        return _same_everywhere(space, tables, target)
    axes = [a for a in space.graph.axes if a.name in tables]
    chosen = _solve(space, axes, tables, target)
    return {**space.dense(), **{a.name: tables[a.name][0][i] for a, i in zip(axes, chosen, strict=True)}}


def _solve(
    space: PlanSpace, axes: list[Axis], tables: Mapping[str, tuple[list[int], Array]], target: float
) -> list[int]:
    """For each axis the index of its chosen width."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    owner = np.concatenate([np.full(len(tables[a.name][0]), i) for i, a in enumerate(axes)])
    damage = np.concatenate([tables[a.name][1] for a in axes])
    gone = np.concatenate(
        [(a.n_units - np.array(tables[a.name][0], dtype=np.float64)) * space.unit_cost(a) for a in axes]
    )
    n = len(damage)
    scale = max(target, 1.0)
    one_each = csr_matrix((np.ones(n), (owner, np.arange(n))), shape=(len(axes), n))
    # a hair of cost for removing more than was asked, so that ties go to the larger model
    solved = milp(
        damage / max(float(damage.max()), 1e-12) + 1e-7 * gone / scale,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_matrix(gone / scale), target / scale, np.inf),
        ],
        options={"mip_rel_gap": _GAP, "node_limit": 1000},
    )
    if solved.x is None:
        raise InfeasibleError("no widths remove that much", "ask for less, or protect fewer layers")
    starts = np.cumsum([0, *(len(tables[a.name][0]) for a in axes)])
    return [int(np.argmax(solved.x[s:e])) for s, e in itertools.pairwise(starts)]


def _same_everywhere(
    space: PlanSpace, tables: Mapping[str, tuple[list[int], Array]], target: float
) -> Widths:
    """One width per kind of unit: few enough to look at every pair."""
    kinds: dict[str, list[Axis]] = {}
    for axis in space.graph.axes:
        if axis.name in tables:
            kinds.setdefault(axis.unit, []).append(axis)
    choices = [range(min(len(tables[a.name][0]) for a in group)) for group in kinds.values()]
    best: tuple[float, Widths] | None = None
    for picks in itertools.product(*choices):
        widths, damage = space.dense(), 0.0
        for group, pick in zip(kinds.values(), picks, strict=True):
            for axis in group:
                widths[axis.name] = tables[axis.name][0][pick]
                damage += float(tables[axis.name][1][pick])
        if space.removed(widths) >= target and (best is None or damage < best[0]):
            best = (damage, widths)
    if best is None:
        raise InfeasibleError("no widths remove that much", "ask for less, or protect fewer layers")
    return best[1]


def why(space: PlanSpace, widths: Widths, axis: Axis) -> str:
    found = held(space, axis)
    if found is not None:
        return found
    table = dict(zip(*damages(space, axis), strict=True))
    width = widths[axis.name]
    text = f"alone it costs KL {table.get(width, 0.0):.4f}"
    narrower = [w for w in table if w < width]
    if narrower:
        text += f"; at {max(narrower)} it would cost {table[max(narrower)]:.4f}"
    return text


ALLOCATOR = Allocator(
    name="sensitivity",
    summary="least summed KL, each axis measured at several widths",
    widths=sensitivity_widths,
    check=lambda space: None,
    why=why,
    curves=True,
)
