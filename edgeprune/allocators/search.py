"""The sensitivity solution, refined by measured KL: summed damages of single axes are not the model's.

Budget moves between two axes at a time; a move stays when the whole model, cut to the new widths, is
closer to the dense one on calibration text. Deterministic: the moves come from a fixed random stream.
"""

from __future__ import annotations

import numpy as np

from edgeprune.allocators.base import Allocator, PlanSpace, Widths, held
from edgeprune.allocators.sensitivity import sensitivity_widths
from edgeprune.allocators.sensitivity import why as measured_why
from edgeprune.errors import ConfigError
from edgeprune.records import Axis

TRIES = 40
_SEED = 20_241
_FIRST_STEP = 0.125  # of an axis; halves when moves stop helping


def swap(space: PlanSpace, widths: Widths, giver: Axis, taker: Axis, part: float) -> Widths | None:
    """`taker` grows by about `part` of its units, `giver` pays for it as nearly as widths allow.

    None when either has no room or nothing would change. What is removed in all stays the same to half a
    step of the giver.
    """
    step = space.rule(taker).multiple_of
    grown = min(taker.n_units, widths[taker.name] + max(step, round(part * taker.n_units / step) * step))
    owed = (grown - widths[taker.name]) * space.unit_cost(taker)
    give_step = space.rule(giver).multiple_of
    paid = round(owed / space.unit_cost(giver) / give_step) * give_step
    width = widths[giver.name] - paid
    if paid <= 0 or grown == widths[taker.name] or width < space.floor(giver):
        return None
    return {**widths, taker.name: grown, giver.name: width}


def search_widths(space: PlanSpace, ratio: float, *, tries: int = TRIES) -> Widths:
    """Moves of budget between axes, each measured. Raises ConfigError without a way to measure."""
    if ratio <= 0:
        return space.dense()
    if space.measure is None:
        raise ConfigError(
            "the search allocator has to run the model, which planning from saved scores cannot",
            "use it with 'edgeprune prune'",
        )
    best = sensitivity_widths(space, ratio)
    damage = space.measure(best)
    rng = np.random.default_rng(_SEED)
    axes = [axis for axis in space.graph.axes if space.free(axis)]
    part, failed = _FIRST_STEP, 0
    for _ in range(tries if len(axes) > 1 else 0):
        giver, taker = (axes[int(i)] for i in rng.choice(len(axes), 2, replace=False))
        moved = swap(space, best, giver, taker, part)
        if moved is None:
            continue
        found = space.measure(moved)
        if found < damage:
            best, damage, failed = moved, found, 0
            continue
        failed += 1
        if failed == 8:
            part, failed = part / 2, 0
    return best


def why(space: PlanSpace, widths: Widths, axis: Axis) -> str:
    return held(space, axis) or f"{measured_why(space, widths, axis)}; refined by measured KL"


ALLOCATOR = Allocator(
    name="search",
    summary="the sensitivity solution, refined by measured KL",
    widths=search_widths,
    check=lambda space: None,
    why=why,
    curves=True,
    measures=True,
)
