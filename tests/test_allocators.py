"""Allocators: the exact one is exact, the refined one never worse, each obeys what the others obey."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from test_planner import measured, rules, small, smol

from edgeprune import planner, registry
from edgeprune.allocators import inner, search, sensitivity
from edgeprune.allocators.base import Allocator, PlanSpace
from edgeprune.errors import ConfigError
from edgeprune.records import Constraints, UnitRule


@pytest.mark.parametrize("name", registry.names("allocators"))
def test_contract(name: str) -> None:
    found = planner.load_allocator(name)
    assert isinstance(found, Allocator)
    assert found.name == name
    base = measured(small(constraints=rules(8), protected=frozenset([1])))
    found.check(dataclasses.replace(base, scores={}))
    for ratio in (0.0, 0.1, 0.3, 0.4):
        widths = found.widths(base, ratio)
        assert set(widths) == {a.name for a in base.graph.axes}
        for axis in base.graph.axes:
            assert widths[axis.name] in base.legal_widths(axis)
        assert (widths["layers.1.kv"], widths["layers.1.ffn"]) == (2, 64)
        largest = max(8 * base.graph.axes[1].unit_params, base.graph.axes[0].unit_params)
        assert base.removed(widths) >= base.target(ratio) - largest
    plan = planner.plan_ratio(base, name, 0.3)
    assert set(plan.why) == {a.name for a in base.graph.axes}
    assert plan.why["layers.1.kv"] == "its layer is protected"
    assert all(plan.why.values())


def test_names_load_without_scipy() -> None:
    code = (
        "import sys; from edgeprune import planner; planner.load_allocator('search');"
        "print('scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def brute_force(space: PlanSpace, ratio: float) -> float:
    target = space.target(ratio) - sensitivity._tolerance(space)
    tables = [list(zip(*sensitivity.damages(space, a), strict=True)) for a in space.graph.axes]
    best = np.inf
    for pick in itertools.product(*tables):
        widths = {a.name: w for a, (w, _) in zip(space.graph.axes, pick, strict=True)}
        if space.removed(widths) >= target:
            best = min(best, sum(d for _, d in pick))
    return best


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sensitivity_is_the_least_summed_damage(ratio: float, seed: int) -> None:
    base = measured(small(layers=2, constraints=rules(8)), seed=seed)
    widths = sensitivity.sensitivity_widths(base, ratio)
    found = 0.0
    for axis in base.graph.axes:
        legal, damage = sensitivity.damages(base, axis)
        found += damage[legal.index(widths[axis.name])]
    assert found == pytest.approx(brute_force(base, ratio), rel=3e-3, abs=1e-9)


def test_the_harmless_axis_goes_first() -> None:
    base = small(layers=2, constraints=rules(8))
    curves = {a.name: [(8, 1.0), (32, 0.3)] for a in base.graph.axes if a.unit == "ffn"}
    curves |= {a.name: [(1, 5.0)] for a in base.graph.axes if a.unit == "kv"}
    curves["layers.1.ffn"] = [(8, 1e-4), (32, 1e-5)]
    base = dataclasses.replace(base, curves=curves)
    unit = base.graph.axes[1].unit_params
    widths = sensitivity.sensitivity_widths(base, 56 * unit / base.graph.decoder_params)
    assert widths == {"layers.0.kv": 2, "layers.0.ffn": 64, "layers.1.kv": 2, "layers.1.ffn": 8}


def test_curves_are_read_as_monotone_and_go_through_their_points() -> None:
    base = small(layers=1)
    axis = base.graph.axes[1]
    noisy = dataclasses.replace(base, curves={axis.name: [(16, 0.5), (32, 0.1), (48, 0.2)]})
    widths, damage = sensitivity.damages(noisy, axis)
    assert widths == list(range(1, 65))
    assert damage[-1] == 0.0
    assert (np.diff(damage) <= 1e-12).all()
    # 32 measured better than 48: read as no worse than 48
    assert damage[widths.index(48)] == damage[widths.index(32)] == pytest.approx(0.2)
    assert damage[widths.index(16)] == pytest.approx(0.5)
    assert damage[0] > damage[widths.index(16)]


def test_bytes_instead_of_parameters() -> None:
    base = measured(small(layers=2, constraints=rules(8)))
    dear = {a.name: a.unit_params * (4.0 if a.layer == 0 else 1.0) for a in base.graph.axes}
    dear_space = dataclasses.replace(base, unit_costs=dear)
    widths = sensitivity.sensitivity_widths(dear_space, 0.3)
    assert dear_space.removed(widths) >= dear_space.target(0.3) - sensitivity._tolerance(dear_space)
    plain = sensitivity.sensitivity_widths(base, 0.3)
    assert widths["layers.0.ffn"] < plain["layers.0.ffn"]


def test_one_width_for_all_layers_where_the_export_wants_it() -> None:
    base = measured(small(constraints=rules(8, uniform=True)))
    widths = sensitivity.sensitivity_widths(base, 0.3)
    assert len({w for name, w in widths.items() if name.endswith("ffn")}) == 1
    assert len({w for name, w in widths.items() if name.endswith("kv")}) == 1
    assert base.removed(widths) >= base.target(0.3) - sensitivity._tolerance(base)


def test_search_is_never_worse_and_keeps_the_budget() -> None:
    base = measured(smol(constraints=rules(32)))
    # the truth differs from the curves: layers 0 to 9 matter ten times more together than alone
    summed = base.measure
    assert summed is not None
    calls = []

    def truth(widths: dict[str, int]) -> float:
        calls.append(1)
        early = {k: w for k, w in widths.items() if int(k.split(".")[1]) < 10}
        return summed(widths) + 9 * summed(early)

    given = dataclasses.replace(base, measure=truth)
    start = sensitivity.sensitivity_widths(given, 0.2)
    found = search.search_widths(given, 0.2)
    assert truth(found) < truth(start)
    assert abs(base.removed(found) - base.removed(start)) < 0.01 * base.graph.decoder_params
    assert len(calls) <= search.TRIES + 3
    assert found == search.search_widths(given, 0.2)


def test_what_needs_the_model_says_so() -> None:
    for name in ("sensitivity", "search"):
        with pytest.raises(ConfigError, match="has to run the model") as caught:
            planner.plan_ratio(small(), name, 0.2)
        assert "edgeprune prune" in (caught.value.hint or "")


def whole(*, uniform: bool = False) -> Constraints:
    rule = UnitRule(uniform_across_layers=uniform, multiple_of=1, min_keep=1, fixed=False, whole=True)
    return Constraints(format="test", ffn=rule, kv=rule, reasons=())


def test_whole_blocks_leave_but_not_the_first_attention() -> None:
    base = small(constraints=whole(), blocks=True)
    floors = {a.name: base.floor(a) for a in base.graph.axes}
    assert floors == {
        "layers.0.kv": 1, "layers.0.ffn": 0, "layers.1.kv": 0, "layers.1.ffn": 0,
        "layers.2.kv": 0, "layers.2.ffn": 0,
    }  # fmt: skip
    for other in (
        small(constraints=whole()),
        small(blocks=True),
        small(constraints=whole(uniform=True), blocks=True),
    ):
        assert all(other.floor(a) == 1 for a in other.graph.axes)
    scores = {a.name: np.full(a.n_units, 1.0 * a.unit_params) for a in base.graph.axes}
    scores["layers.1.kv"][:] = scores["layers.2.ffn"][:] = 0.0
    goal = 2 * base.graph.axes[0].unit_params + 64 * base.graph.axes[1].unit_params
    plan = planner.plan_ratio(
        dataclasses.replace(base, scores=scores), "global", goal / base.graph.decoder_params
    )
    assert plan.kept == {"layers.1.kv": (), "layers.2.ffn": ()}
    assert [(s.n_kv_heads, s.n_ff) for s in plan.dims.layers] == [(2, 64), (0, 64), (2, 0)]


def test_inner_spares_the_ends_and_attention_until_the_channels_are_spent() -> None:
    assert inner.ends(32) == {0, 1, 31} and inner.ends(30) == {0, 1, 29} and inner.ends(4) == frozenset()
    base = smol(constraints=rules(1))
    # 27 layers lose the same: 0.2 * 106,202,880 parameters / (27 * 1728) = 455.3 channels each
    widths = inner.inner_widths(base, 0.2)
    assert {widths[f"layers.{i}.ffn"] for i in range(2, 29)} == {1536 - 455}
    assert all(widths[f"layers.{i}.ffn"] == 1536 for i in (0, 1, 29))
    assert all(widths[f"layers.{i}.kv"] == 3 for i in range(30))
    # a quarter of the channels is left everywhere inside, and still it is not enough
    widths = inner.inner_widths(base, 0.7)
    assert base.removed(widths) >= base.target(0.7)
    assert max(widths[f"layers.{i}.ffn"] for i in range(2, 29)) <= 384
    assert widths["layers.0.ffn"] < 1536 and widths["layers.0.kv"] < 3
    alike = dataclasses.replace(base, constraints=rules(1, uniform=True))
    assert inner.inner_widths(alike, 0.2) == planner.load_allocator("uniform").widths(alike, 0.2)
