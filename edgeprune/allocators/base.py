"""The contract of an allocator, and the arithmetic that all of them share. No model, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprune.errors import ConfigError
from edgeprune.records import Axis, Constraints, ModelGraph, UnitRule

Array: TypeAlias = npt.NDArray[Any]
Widths: TypeAlias = dict[str, int]  # axis name -> units kept
Curve: TypeAlias = Sequence[tuple[int, float]]  # (units kept, damage), narrowest first


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpace:
    """Everything an allocator may look at: what can be cut, how far, and what each unit is worth.

    Attributes:
        blocks: a whole attention or FFN block may leave where the constraints allow it.
        curves: axis to its measured damage at some widths; only allocators that ask for it need it.
        unit_costs: axis to what one unit costs (bytes of a quantization); empty: its parameters.
        measure: damage of the model cut to some widths, for allocators that try plans out.
    """

    graph: ModelGraph
    scores: Mapping[str, Array]  # axis -> [n_units], higher = keep
    poolable: bool
    constraints: Constraints
    metric: str
    protected: frozenset[int] = frozenset()  # layers left whole
    scores_key: str = ""
    blocks: bool = False
    curves: Mapping[str, Curve] = field(default_factory=dict)
    unit_costs: Mapping[str, float] = field(default_factory=dict)
    measure: Callable[[Widths], float] | None = None

    def rule(self, axis: Axis) -> UnitRule:
        if axis.unit != "q":
            return self.constraints.ffn if axis.unit == "ffn" else self.constraints.kv
        rule = self.constraints.q or self.constraints.kv
        # the same number in every KV group, and at least one
        step = math.lcm(rule.multiple_of, axis.groups)
        return dataclasses.replace(rule, multiple_of=step, min_keep=step, whole=False)

    def free(self, axis: Axis) -> bool:
        return not self.rule(axis).fixed and axis.layer not in self.protected

    def removable(self, axis: Axis) -> bool:
        """The whole block may go: asked for, loadable, and not the attention of the first layer."""
        rule = self.rule(axis)
        if not self.blocks or rule.uniform_across_layers or not rule.whole:
            return False
        return axis.unit == "ffn" or axis.layer > 0

    def floor(self, axis: Axis) -> int:
        """Fewest units this axis may keep."""
        if not self.free(axis):
            return axis.n_units
        if self.removable(axis):
            return 0
        return min(axis.n_units, max(self.rule(axis).min_keep, 1))

    def snap(self, axis: Axis, width: float) -> int:
        """Round a width up to a legal one; the dense width is always legal."""
        rule = self.rule(axis)
        snapped = int(np.ceil(width / rule.multiple_of - 1e-9)) * rule.multiple_of
        return min(axis.n_units, max(snapped, self.floor(axis)))

    def legal_widths(self, axis: Axis) -> list[int]:
        """Every width this axis may have, narrowest first."""
        if not self.free(axis):
            return [axis.n_units]
        step = self.rule(axis).multiple_of
        found = {self.snap(axis, width) for width in range(0, axis.n_units + step, step)}
        return sorted(found | {axis.n_units})

    def unit_cost(self, axis: Axis) -> float:
        return self.unit_costs.get(axis.name, axis.unit_params)

    def target(self, ratio: float) -> float:
        """What a ratio of the decoder layers has to remove, in the unit of `unit_cost`."""
        if not self.unit_costs:
            return ratio * self.graph.decoder_params
        return ratio * sum(axis.n_units * self.unit_cost(axis) for axis in self.graph.axes)

    def removed(self, widths: Mapping[str, int]) -> float:
        return sum((a.n_units - widths[a.name]) * self.unit_cost(a) for a in self.graph.axes)

    def dense(self) -> Widths:
        return {axis.name: axis.n_units for axis in self.graph.axes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocator:
    """One allocator.

    Attributes:
        widths: (space, ratio) to the units that each axis keeps.
        check: raises ConfigError when it cannot work in this space; must not look at scores.
        why: one line on why an axis got its width.
        curves: it needs `PlanSpace.curves`.
        measures: it needs `PlanSpace.measure`.
    """

    name: str
    summary: str
    widths: Callable[[PlanSpace, float], Widths]
    check: Callable[[PlanSpace], None]
    why: Callable[[PlanSpace, Widths, Axis], str]
    curves: bool = False
    measures: bool = False


def best_units(scores: Array, width: int, groups: int = 1) -> tuple[int, ...]:
    """Sorted indices of the `width` highest scores, as many in each of `groups` equal runs.

    Ties keep the lower index.
    """
    rows = np.asarray(scores, dtype=np.float64).reshape(groups, -1)
    if width % groups:
        raise ValueError(f"{width} units cannot be shared evenly by {groups} groups")
    order = np.argsort(-rows, axis=1, kind="stable")[:, : width // groups]
    order = order + np.arange(groups)[:, None] * rows.shape[1]
    return tuple(int(i) for i in np.sort(order.reshape(-1)))


def check_free_widths(space: PlanSpace, name: str) -> None:
    """Raises ConfigError where an export wants the same width in every layer."""
    if space.constraints.ffn.uniform_across_layers or space.constraints.kv.uniform_across_layers:
        raise ConfigError(
            f"the {name} allocator gives every layer its own width, which this export cannot load",
            "use --allocator uniform",
        )


def held(space: PlanSpace, axis: Axis) -> str | None:
    """Why an axis cannot lose anything, or None when it can."""
    if space.rule(axis).fixed:
        return f"the {space.constraints.format} export allows no other width"
    if axis.layer in space.protected:
        return "its layer is protected"
    return None
