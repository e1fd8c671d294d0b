"""One list of all units by score per parameter; a single threshold decides."""

from __future__ import annotations

import numpy as np

from edgeprune.allocators.base import Allocator, PlanSpace, Widths, check_free_widths, held
from edgeprune.errors import ConfigError
from edgeprune.records import Axis


def check(space: PlanSpace) -> None:
    if not space.poolable:
        raise ConfigError(
            f"scores of {space.metric} do not share one scale across layers, so they cannot be pooled",
            "use --allocator uniform, or a poolable form (llm-bip: --metric-option form=A or form=C)",
        )
    check_free_widths(space, "global")


def global_widths(space: PlanSpace, ratio: float) -> Widths:
    """Units with the lowest score per cost go until the ratio is nearest; widths snap upwards."""
    check(space)
    graph = space.graph
    free = [axis for axis in graph.axes if space.free(axis)]
    per_cost = {
        axis.name: np.sort(np.asarray(space.scores[axis.name], dtype=np.float64) / space.unit_cost(axis))
        for axis in free
    }
    thresholds = np.unique(np.concatenate([*per_cost.values(), [0.0]])) if free else np.zeros(1)
    dense = space.dense()

    def at(index: int) -> Widths:
        limit = thresholds[index]
        widths = dict(dense)
        for axis in free:
            removed = int(np.searchsorted(per_cost[axis.name], limit, side="right"))
            widths[axis.name] = space.snap(axis, axis.n_units - removed)
        return widths

    if ratio <= 0:
        return dense
    low, high = 0, len(thresholds) - 1
    target = space.target(ratio)
    while low < high:
        middle = (low + high) // 2
        if space.removed(at(middle)) < target:
            low = middle + 1
        else:
            high = middle
    above = at(low)
    below = at(low - 1) if low else dense
    return below if target - space.removed(below) < space.removed(above) - target else above


def why(space: PlanSpace, widths: Widths, axis: Axis) -> str:
    found = held(space, axis)
    if found is not None:
        return found
    worst = float(np.sort(np.asarray(space.scores[axis.name], dtype=np.float64))[0]) / space.unit_cost(axis)
    gone = axis.n_units - widths[axis.name]
    return f"{gone} of its units lie under the common threshold; its lowest score per cost is {worst:.3g}"


ALLOCATOR = Allocator(
    name="global",
    summary="one threshold on score per parameter over all layers",
    widths=global_widths,
    check=check,
    why=why,
)
