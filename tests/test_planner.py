"""Plans: legal, nested, within budget, and the numbers that can be worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from candidates import FLAGS, dims
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import graph, planner
from edgeprune.errors import ConfigError, InfeasibleError
from edgeprune.planner import Cost, PlanSpace
from edgeprune.records import Constraints, ModelDims, ModelGraph, PrunePlan, UnitRule
from edgeprune.search import SearchSpace

LLAMA = graph.find_family("llama")


def rules(ffn: int = 1, kv: int = 1, *, uniform: bool = False, fixed_kv: bool = False) -> Constraints:
    return Constraints(
        format="test",
        ffn=UnitRule(uniform_across_layers=uniform, multiple_of=ffn, min_keep=ffn, fixed=False),
        kv=UnitRule(uniform_across_layers=uniform, multiple_of=kv, min_keep=kv, fixed=fixed_kv),
        reasons=(),
    )


def space(built: ModelGraph, *, seed: int = 0, **over: Any) -> PlanSpace:
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "graph": built,
        "scores": {a.name: rng.random(a.n_units) for a in built.axes},
        "poolable": True,
        "constraints": rules(),
        "metric": "test",
        **over,
    }
    return PlanSpace(**values)


def measured(base: PlanSpace, *, seed: int = 0, measure: bool = True) -> PlanSpace:
    """The same space with made-up damage curves, convex as real ones are, and a measure that sums them."""
    rng = np.random.default_rng(seed)
    weights = {a.name: float(rng.uniform(0.1, 2.0)) for a in base.graph.axes}

    def damage(name: str, width: int, n: int) -> float:
        return weights[name] * ((n - width) / n) ** 2

    curves = {
        a.name: [(w, damage(a.name, w, a.n_units)) for w in sorted({0, a.n_units // 2, a.n_units})]
        for a in base.graph.axes
    }
    by_name = {a.name: a.n_units for a in base.graph.axes}

    def total(widths: dict[str, int]) -> float:
        return sum(damage(name, w, by_name[name]) for name, w in widths.items())

    return dataclasses.replace(base, curves=curves, measure=total if measure else None)


def smol(**over: Any) -> PlanSpace:
    return space(graph.graph_of(LLAMA, dims()), **over)


def small(layers: int = 3, **over: Any) -> PlanSpace:
    built = graph.graph_of(
        LLAMA, dims(hidden=64, heads=4, kv_heads=2, ff=64, layers=layers, vocab=96, head_dim=16)
    )
    return space(built, **over)


# ---------------------------------------------------------------- by hand


def test_smollm2_parameters() -> None:
    built = smol().graph
    kv, ffn = built.axes[0], built.axes[1]
    assert (kv.unit_params, ffn.unit_params) == (8 * 576 * 64, 3 * 576)  # q: 3 heads, k, v, o: 3 heads
    assert built.decoder_params == 30 * (3 * 294_912 + 1536 * 1728 + 2 * 576) == 106_202_880
    assert built.total_params == 106_202_880 + 49_152 * 576 + 576


def test_uniform_fifth_of_smollm2() -> None:
    # a layer loses 708,019 of 3,540,096: a fifth of 3 groups is less than one, so FFN gives all of it
    plan = planner.plan_ratio(smol(), "uniform", 0.2)
    assert {(s.n_heads, s.n_kv_heads, s.n_ff) for s in plan.dims.layers} == {(9, 3, 1126)}
    assert plan.uniform
    assert plan.ratio == pytest.approx(410 * 1728 / 3_540_096, abs=1e-12)
    assert plan.ratio_all == pytest.approx(30 * 410 * 1728 / 134_515_008, abs=1e-12)
    assert plan.binding is None


def test_uniform_third_of_smollm2_takes_a_kv_group() -> None:
    # 35%: 1.05 of 3 groups, so one goes (294,912) and FFN gives 944,122: 546.4 channels
    plan = planner.plan_ratio(smol(), "uniform", 0.35)
    assert {(s.n_heads, s.n_kv_heads, s.n_ff) for s in plan.dims.layers} == {(6, 2, 990)}
    assert plan.ratio == pytest.approx((294_912 + 546 * 1728) / 3_540_096, abs=1e-12)


def test_exactly_a_third_of_three_groups_is_one() -> None:
    built = smol().graph
    free = 3 * 294_912 + 1536 * 1728
    widths = planner.uniform_widths(smol(), 30 * free / 3 / built.decoder_params)
    assert (widths["layers.0.kv"], widths["layers.0.ffn"]) == (2, 1024)


def test_highest_ratio_by_hand() -> None:
    # one group and one block of 32 channels stay
    most = (2 * 294_912 + (1536 - 32) * 1728) / 3_540_096
    assert planner.highest_ratio(smol(constraints=rules(32))) == pytest.approx(most, abs=1e-12)
    assert most == pytest.approx(0.9007, abs=1e-4)
    half = planner.highest_ratio(smol(constraints=rules(32), protected=frozenset(range(15))))
    assert half == pytest.approx(most / 2, abs=1e-12)


def test_the_highest_ratio_can_be_planned() -> None:
    top = planner.highest_ratio(smol(constraints=rules(32)))
    plan = planner.plan_ratio(smol(constraints=rules(32)), "uniform", top)
    assert plan.ratio == pytest.approx(top, abs=1e-12)
    assert {(s.n_heads, s.n_kv_heads, s.n_ff) for s in plan.dims.layers} == {(3, 1, 32)}


def test_unreachable_ratio() -> None:
    with pytest.raises(InfeasibleError) as caught:
        planner.plan_ratio(smol(constraints=rules(32)), "uniform", 0.95)
    assert caught.value.message == "ratio 0.950 cannot be reached: the highest reachable is 0.901"
    assert caught.value.hint == "ask for less"
    with pytest.raises(InfeasibleError) as caught:
        planner.plan_ratio(smol(constraints=rules(32), protected=frozenset(range(15))), "uniform", 0.5)
    assert caught.value.message == (
        "ratio 0.500 cannot be reached with 15 protected layers: the highest reachable is 0.450"
    )
    assert caught.value.hint == "ask for less, or protect fewer layers"
    with pytest.raises(InfeasibleError, match=r"with 1 protected layer: "):
        planner.plan_ratio(smol(protected=frozenset([0])), "uniform", 0.98)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_ratio(ratio: float) -> None:
    with pytest.raises(ConfigError) as caught:
        planner.plan_ratio(small(), "uniform", ratio)
    assert caught.value.message == f"ratio {ratio} is not between 0 and 1"


def test_unknown_allocator() -> None:
    with pytest.raises(ConfigError) as caught:
        planner.plan_ratio(small(), "unifrom", 0.2)
    assert caught.value.message == "unknown allocator 'unifrom' (did you mean 'uniform'?)"
    assert caught.value.hint == "known: global, inner, search, sensitivity, uniform"


def test_scores_that_share_no_scale_are_not_pooled() -> None:
    with pytest.raises(ConfigError, match="scores of test do not share one scale across layers"):
        planner.plan_ratio(small(poolable=False), "global", 0.2)
    with pytest.raises(ConfigError, match="every layer its own width, which this export cannot load"):
        planner.plan_ratio(small(constraints=rules(uniform=True)), "global", 0.2)


def test_ratio_zero_is_the_dense_model() -> None:
    for allocator in planner.ALLOCATORS:
        plan = planner.plan_ratio(small(), allocator, 0.0)
        assert (plan.id, plan.kept, plan.ratio, plan.ratio_all) == ("dense", {}, 0.0, 0.0)
        assert plan.dims == small().graph.dims


def test_the_best_units_stay_and_ties_keep_the_lower_index() -> None:
    base = small(layers=1)
    scores = {"layers.0.kv": np.array([1.0, 2.0]), "layers.0.ffn": np.zeros(64)}
    scores["layers.0.ffn"][[5, 60]] = 3.0
    kept = planner.kept_indices(
        dataclasses.replace(base, scores=scores), {"layers.0.kv": 1, "layers.0.ffn": 4}
    )
    assert kept == {"layers.0.kv": (1,), "layers.0.ffn": (0, 1, 5, 60)}


def test_global_takes_the_weakest_units_wherever_they_are() -> None:
    base = small(layers=2)
    scores = {a.name: np.full(a.n_units, 1e6) for a in base.graph.axes}
    scores["layers.1.ffn"][:16] = np.arange(16) * 1e-3  # all that is weak is in layer 1
    unit = base.graph.axes[1].unit_params
    ratio = 10 * unit / base.graph.decoder_params
    plan = planner.plan_ratio(dataclasses.replace(base, scores=scores), "global", ratio)
    assert plan.kept == {"layers.1.ffn": tuple(range(10, 64))}
    assert not plan.uniform


def test_fixed_units_stay() -> None:
    base = measured(small(constraints=rules(fixed_kv=True)))
    for allocator in planner.ALLOCATORS:
        plan = planner.plan_ratio(base, allocator, 0.3)
        assert all(name.endswith(".ffn") for name in plan.kept)
        assert {s.n_kv_heads for s in plan.dims.layers} == {2}


# ---------------------------------------------------------------- properties


@st.composite
def spaces(draw: st.DrawFn) -> PlanSpace:
    kv = draw(st.integers(1, 4))
    group = draw(st.integers(1, 3))
    multiple = draw(st.sampled_from([1, 4, 8, 32]))
    layers = draw(st.integers(1, 4))
    shape = dims(
        hidden=32,
        heads=kv * group,
        kv_heads=kv,
        ff=multiple * draw(st.integers(1, 12)),
        layers=layers,
        vocab=50,
        head_dim=8,
    )
    return measured(
        space(
            graph.graph_of(LLAMA, shape),
            seed=draw(st.integers(0, 1000)),
            constraints=rules(multiple),
            protected=frozenset(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))),
        )
    )


def check_legal(room: PlanSpace, plan: PrunePlan) -> None:
    for axis in room.graph.axes:
        kept = plan.kept.get(axis.name, tuple(range(axis.n_units)))
        assert list(kept) == sorted(set(kept))
        assert kept[0] >= 0 and kept[-1] < axis.n_units
        if axis.name in plan.kept:
            assert axis.layer not in room.protected
            assert len(kept) % room.rule(axis).multiple_of == 0
            assert len(kept) >= room.floor(axis)


@settings(max_examples=40, deadline=None)
@given(spaces(), st.sampled_from(planner.ALLOCATORS))
def test_a_ladder_is_legal_and_nested(room: PlanSpace, allocator: str) -> None:
    field = SearchSpace(
        plans={32: room},
        allocators=(allocator,),
        quantizations=("Q8_0",),
        price=lambda *_: pytest.fail("a ladder needs no prices"),
        rows=lambda *_: (),
        caches=1,
    )
    rungs = [field.dense, *field.ladder(allocator, 32)]
    plans = [field.make(rung) for rung in rungs]
    assert plans[0].id == "dense" and plans[0].kept == {}
    assert len({p.id for p in plans}) == len(plans)
    for rung, plan in zip(rungs, plans, strict=True):
        check_legal(room, plan)
        after = graph.graph_of(LLAMA, plan.dims)
        assert plan.ratio == pytest.approx(1 - after.decoder_params / room.graph.decoder_params)
        assert rung.ratio == pytest.approx(plan.ratio) and rung.dims == plan.dims
        assert field.find(rung.id, rung.allocator, rung.block) == rung
    for weak, strong in itertools.pairwise(plans):
        assert weak.ratio < strong.ratio
        for axis in room.graph.axes:
            everything = tuple(range(axis.n_units))
            assert set(strong.kept.get(axis.name, everything)) <= set(weak.kept.get(axis.name, everything))


@settings(max_examples=60, deadline=None)
@given(spaces(), st.floats(0, 1), st.sampled_from(planner.ALLOCATORS))
def test_reached_ratio_is_within_one_step(room: PlanSpace, part: float, allocator: str) -> None:
    asked = part * planner.highest_ratio(room)
    plan = planner.plan_ratio(room, allocator, asked)
    steps = [room.rule(a).multiple_of * a.unit_params for a in room.graph.axes]
    # uniform cuts move all layers at once, a threshold at most one unit of each axis
    assert abs(plan.ratio - asked) * room.graph.decoder_params <= sum(steps) + 1e-6


def table_cost(room: PlanSpace, limit: float) -> planner.CostOf:
    """Bytes are parameters times bits; everything below the limit fits."""
    bits = {"Q8_0": 8, "Q4_0": 4}

    def cost(shape: ModelDims, quantization: str) -> Cost:
        n = graph.graph_of(LLAMA, shape).total_params * bits[quantization] // 8
        fits = n <= limit
        return Cost(
            file_bytes=n,
            peak_bytes=n,
            decode_tps=None,
            decode_tps_low=None,
            decode_tps_high=None,
            flags=FLAGS,
            fits=fits,
            misses=() if fits else ("memory",),
        )

    return cost


@settings(max_examples=40, deadline=None)
@given(spaces(), st.floats(0, 1.1), st.sampled_from(planner.ALLOCATORS))
def test_the_weakest_fit_is_within_budget(room: PlanSpace, part: float, allocator: str) -> None:
    total, removable = room.graph.total_params, planner.highest_ratio(room) * room.graph.decoder_params
    limit = total - part * removable
    plan = planner.weakest_fit(room, allocator, "Q8_0", table_cost(room, limit))
    if plan is None:
        assert total - removable > limit - 1e-6
        return
    check_legal(room, plan)
    left = graph.graph_of(LLAMA, plan.dims).total_params
    assert left <= limit
    # and it does not cut much more than it must
    steps = sum(room.rule(a).multiple_of * a.unit_params for a in room.graph.axes)
    assert left >= limit - 2 * steps - removable / 2**11 or plan.ratio == 0


def test_what_fits_dense_is_not_cut() -> None:
    room = small()
    plan = planner.weakest_fit(room, "uniform", "Q8_0", table_cost(room, 1e9))
    assert plan is not None and plan.id == "dense"
    assert planner.weakest_fit(room, "uniform", "Q8_0", table_cost(room, 10)) is None
