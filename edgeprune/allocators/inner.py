"""FFN channels of the inner layers first; the outer layers and attention give when those are spent.

The first layers feed every other one and the last ones have nothing after them to mend their errors: leaving
them whole is LLM-Pruner's choice (arXiv:2305.11627, first 4 and last 2 of 32). Half as many are enough on the
models measured here, and leave the others wider. Where an export wants all layers alike this is `uniform`.
"""

from __future__ import annotations

from edgeprune.allocators.base import Allocator, PlanSpace, Widths, held
from edgeprune.allocators.uniform import uniform_widths
from edgeprune.records import Axis

CHANNELS_LEFT = 1 / 4  # of a layer, before its attention is touched


def ends(n_layers: int) -> frozenset[int]:
    """The first two and the last of 32 layers, scaled to the depth."""
    first, last = int(n_layers / 16 + 0.5), int(n_layers / 32 + 0.5)
    return frozenset((*range(first), *range(n_layers - last, n_layers)))


def inner_widths(space: PlanSpace, ratio: float) -> Widths:
    """Channels of the inner layers down to a quarter; what is missing then comes from all layers alike."""
    if space.constraints.ffn.uniform_across_layers or space.constraints.kv.uniform_across_layers:
        return uniform_widths(space, ratio)
    kept = ends(len(space.graph.dims.layers)) | space.protected
    channels = [
        axis
        for axis in space.graph.axes
        if axis.unit == "ffn" and axis.layer not in kept and not space.rule(axis).fixed
    ]
    target, widths = space.target(ratio), space.dense()
    room = sum(axis.n_units * space.unit_cost(axis) for axis in channels)
    if room:
        part = min(1 - CHANNELS_LEFT, target / room)
        for axis in channels:
            step = space.rule(axis).multiple_of
            widths[axis.name] = space.snap(axis, round(axis.n_units * (1 - part) / step) * step)
        short = target - space.removed(widths)
        rounding = sum(space.rule(axis).multiple_of * space.unit_cost(axis) for axis in channels) / 2
        spent = any(widths[axis.name] == space.floor(axis) for axis in channels)
        if short <= 0 or (short <= rounding and not spent):
            return widths
    # beyond that: what `uniform` takes, and never less than was taken already
    everywhere = uniform_widths(space, ratio)
    narrow = {name: min(width, everywhere[name]) for name, width in widths.items()}
    low, high = 0.0, ratio
    for _ in range(20):  # the least that `uniform` has to add
        middle = (low + high) / 2
        added = uniform_widths(space, middle)
        joined = {name: min(width, added[name]) for name, width in widths.items()}
        if space.removed(joined) >= target:
            narrow, high = joined, middle
        else:
            low = middle
    return narrow


def why(space: PlanSpace, widths: Widths, axis: Axis) -> str:
    found = held(space, axis)
    if found is not None:
        return found
    if widths[axis.name] == axis.n_units:
        at_an_end = axis.layer in ends(len(space.graph.dims.layers))
        return "the first and last layers stay whole" if at_an_end else "channels of inner layers go first"
    return "the same in every inner layer"


ALLOCATOR = Allocator(
    name="inner",
    summary="channels of the inner layers first, the first and last layers last",
    widths=inner_widths,
    check=lambda space: None,
    why=why,
)
