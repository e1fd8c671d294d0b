"""The same widths in every layer: what every export can load."""

from __future__ import annotations

from edgeprune.allocators.base import Allocator, PlanSpace, Widths, held
from edgeprune.records import Axis


def uniform_widths(space: PlanSpace, ratio: float) -> Widths:
    """Same widths in every unprotected layer. Attention never loses more than its share; FFN takes the rest.

    KV groups are few, so their share moves in jumps; FFN channels make up the difference.
    """
    graph = space.graph
    target = space.target(ratio)
    widths = space.dense()
    free = [axis for axis in graph.axes if space.free(axis)]
    reachable = sum(axis.n_units * space.unit_cost(axis) for axis in free)
    share = min(1.0, target / reachable) if reachable else 0.0
    for axis in free:
        if axis.unit != "ffn":
            # the small slack keeps a share of exactly 1/3 of three groups from rounding to none
            widths[axis.name] = space.snap(axis, axis.n_units * (1 - share) - 1e-6)
    ffn = [axis for axis in free if axis.unit == "ffn"]
    rest = target - space.removed(widths)
    room = sum(axis.n_units * space.unit_cost(axis) for axis in ffn)
    if room and rest > 0:
        part = min(1.0, rest / room)
        for axis in ffn:
            # nearest legal width, not the next larger one: the reached ratio is then closest to the asked one
            step = space.rule(axis).multiple_of
            widths[axis.name] = space.snap(axis, round(axis.n_units * (1 - part) / step) * step)
        rest = target - space.removed(widths)
    step_cost = sum(space.rule(a).multiple_of * space.unit_cost(a) for a in ffn) or 1
    while rest > step_cost:
        # FFN is at its floor: take whole KV groups, one per layer, until the ratio is met or nothing is left
        kv = [a for a in free if a.unit != "ffn" and widths[a.name] > space.floor(a)]
        if not kv:
            break
        for axis in kv:
            widths[axis.name] = max(space.floor(axis), widths[axis.name] - space.rule(axis).multiple_of)
        rest = target - space.removed(widths)
    return widths


def why(space: PlanSpace, widths: Widths, axis: Axis) -> str:
    return held(space, axis) or "the same in every layer"


ALLOCATOR = Allocator(
    name="uniform",
    summary="same widths in every layer",
    widths=uniform_widths,
    check=lambda space: None,
    why=why,
)
