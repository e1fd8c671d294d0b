"""What could be made and what is measured next: bytes, features and choices worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from candidates import FLAGS, dims

from edgeprune import damage, graph, search
from edgeprune.costs import gguf_types
from edgeprune.errors import ConfigError
from edgeprune.exporters import gguf
from edgeprune.planner import Cost, Lane, PlanSpace
from edgeprune.records import Constraints, ModelDims, QualityResult, UnitRule
from edgeprune.search import Goal, Option, SearchSpace

LLAMA = graph.find_family("llama")
SHAPE = dims(hidden=64, heads=4, kv_heads=2, ff=256, layers=4, vocab=512, head_dim=16)
NAMES = ("Q8_0", "Q4_0", "Q4_0+embedding=Q4_0", "Q4_0+embedding=Q8_0")
CACHES = ("f16", "q8_0", "q4_0")
CACHE_BYTES = (80_000, 40_000, 10_000)


def rows(shape: ModelDims, quantization: str) -> list[search.Row]:
    config: dict[str, Any] = {"rms_norm_eps": 1e-5}
    table = gguf.tensor_table(LLAMA, shape, config)
    kinds = gguf.file_types(LLAMA, shape, quantization, table, has_imatrix=True)
    return [(n, s, kinds[n], gguf_types.tensor_bytes(kinds[n], s)) for n, s, _ in table]


def prices(limit: float) -> search.PriceOf:
    """Peak memory is weights and cache; the best cache that fits is taken."""

    def price(shape: ModelDims, quantization: str, caches: int) -> Cost:
        weights = sum(n for *_, n in rows(shape, quantization))
        peak, flags = 0, FLAGS
        for kind, size in list(zip(CACHES, CACHE_BYTES, strict=True))[:caches]:
            peak, flags = weights + size, dataclasses.replace(FLAGS, kv_type=kind)
            if peak <= limit:
                break
        return Cost(
            file_bytes=weights,
            peak_bytes=peak,
            decode_tps=1e9 / weights,
            decode_tps_low=None,
            decode_tps_high=None,
            flags=flags,
            fits=peak <= limit,
            misses=() if peak <= limit else ("memory",),
        )

    return price


def field_of(limit: float, names: tuple[str, ...] = NAMES, **over: Any) -> SearchSpace:
    built = graph.graph_of(LLAMA, SHAPE)
    rng = np.random.default_rng(0)
    rule = UnitRule(uniform_across_layers=False, multiple_of=32, min_keep=32, fixed=False)
    heads = dataclasses.replace(rule, multiple_of=1, min_keep=1)
    space = PlanSpace(
        graph=built,
        scores={a.name: rng.random(a.n_units) for a in built.axes},
        poolable=True,
        constraints=Constraints(format="test", ffn=rule, kv=heads, reasons=()),
        metric="test",
    )
    given: dict[str, Any] = {
        "plans": {32: space},
        "allocators": ("uniform",),
        "quantizations": names,
        "price": prices(limit),
        "rows": rows,
        "caches": 3,
        **over,
    }
    return SearchSpace(**given)


def bytes_of(name: str) -> int:
    return sum(n for *_, n in rows(SHAPE, name))


def test_features_by_hand() -> None:
    found = search.features_of(rows(SHAPE, "Q4_0+embedding=Q8_0+attention=Q5_1"), "q8_0")
    error = gguf_types.relative_error
    assert found["embedding"] == pytest.approx(error("Q8_0"))
    assert found["attention"] == pytest.approx(error("Q5_1"))
    # llama.cpp has no early exception in 4 layers: an eighth of them is none
    assert found["ffn"] == pytest.approx(error("Q4_0"))
    assert found["cache"] == error("Q8_0") and found["activations"] == 1.0


def test_a_float_file_with_a_float_cache_loses_nothing() -> None:
    found = search.features_of(rows(SHAPE, "F16"), "f16")
    assert found["cache"] == found["activations"] == 0.0
    assert max(found["embedding"], found["attention"], found["ffn"]) < 1e-6


def test_what_fits_dense_is_not_cut() -> None:
    field = field_of(bytes_of("Q8_0") + CACHE_BYTES[0])
    found = field.options()
    assert {o.rung.id for o in found} == {"dense"}
    assert {o.cost.flags.kv_type for o in found} == {"f16"}
    # the third name gives every tensor the types of another one or not: each set of types counts once
    kinds = {tuple(r[2] for r in rows(SHAPE, o.quantization)) for o in found}
    assert len(kinds) == len(found)


def test_the_weakest_rung_that_fits_once_per_cache() -> None:
    limit = bytes_of("Q4_0") + CACHE_BYTES[2] - 1
    field = field_of(limit, ("Q4_0",))
    found = field.options()
    assert found and all(o.cost.fits and o.rung.ratio > 0 for o in found)
    rungs = field.ladder("uniform", 32)
    for option in found:
        at = [r.id for r in rungs].index(option.rung.id)
        caches = 1 + CACHES.index(option.cost.flags.kv_type)
        if at:
            assert not prices(limit)(rungs[at - 1].dims, "Q4_0", caches).fits
    ratios = [o.rung.ratio for o in found]
    assert ratios == sorted(ratios)
    # a leaner cache leaves more of the layers
    by_cache = {o.cost.flags.kv_type: o.rung.ratio for o in reversed(found)}
    assert by_cache["q4_0"] < by_cache["f16"]


def test_stronger_cuts_where_less_is_wanted() -> None:
    limit = bytes_of("Q8_0") + CACHE_BYTES[0]
    plain, more = field_of(limit).options(), field_of(limit).options(stronger=True)
    assert {o.id for o in plain} < {o.id for o in more}
    assert any(o.rung.ratio > 0.5 for o in more)


def test_nothing_fits_a_budget_of_nothing() -> None:
    assert field_of(10).options() == []
    assert search.propose([], damage.fit(search.PRIORS, []), Goal(objective="quality"), None) is None


def test_mixes_are_canonical_and_include_their_bases() -> None:
    found = search.mixes(("Q8_0", "Q4_0"), ("Q5_0",))
    assert found == [
        *("Q8_0", "Q4_0"),
        *("Q8_0+attention=Q5_0", "Q8_0+embedding=Q5_0", "Q8_0+embedding=Q5_0+attention=Q5_0"),
        *("Q4_0+attention=Q5_0", "Q4_0+embedding=Q5_0", "Q4_0+embedding=Q5_0+attention=Q5_0"),
    ]
    for name in search.mixes(search.BASES):
        assert gguf_types.canonical(name) == name
    with pytest.raises(ConfigError):
        search.mixes(("F16",), ("Q5_0",))


# ---------------------------------------------------------------- what next


def options_by_hand(field: SearchSpace, *errors: float) -> list[Option]:
    dense = field.dense
    cost = prices(1e9)(SHAPE, "Q8_0", 3)
    return [
        Option(
            rung=dense,
            quantization=f"type{i}",
            cost=dataclasses.replace(cost, file_bytes=1000 - 100 * i, decode_tps=100.0 + 10 * i),
            features={"ffn": e},
        )
        for i, e in enumerate(errors)
    ]


def model_of(value: float, stderr: float) -> damage.Model:
    return damage.fit([damage.Term(name="ffn", value=value, stderr=stderr)], [])


def test_the_least_expected_loss_comes_first() -> None:
    found = options_by_hand(field_of(1e9), 0.03, 0.01, 0.02)
    first = search.propose(found, model_of(10, 1), Goal(objective="quality"), None)
    assert (
        first is not None
        and first.option.quantization == "type1"
        and first.predicted.kl == pytest.approx(0.1)
    )
    again = search.propose(found, model_of(10, 1), Goal(objective="quality"), 0.12)
    assert again is not None and again.option.quantization == "type1"
    assert again.gain == pytest.approx(again.predicted.gain(0.12) / 0.12)


def test_the_search_ends_when_little_is_to_be_gained() -> None:
    found = options_by_hand(field_of(1e9), 0.03, 0.04)
    assert search.propose(found, model_of(10, 1), Goal(objective="quality"), 0.02) is None
    assert search.propose(found, model_of(10, 1), Goal(objective="quality"), 0.5) is not None


def test_size_below_a_floor_of_quality() -> None:
    # the smaller the file the more it loses: type3 is far beyond the floor, type2 just below it
    found = options_by_hand(field_of(1e9), 0.001, 0.005, 0.012, 0.2)
    goal = Goal(objective="size", most_kl=0.2)
    taken = search.propose(found, model_of(10, 1), goal, 1000.0)
    assert taken is not None and taken.option.quantization == "type2"
    assert search.propose(found[:1], model_of(10, 1), goal, 1000.0) is None


def test_speed_below_a_floor_of_quality() -> None:
    found = options_by_hand(field_of(1e9), 0.001, 0.005, 0.012, 0.2)
    best = 1 / 50  # seconds a token
    taken = search.propose(found, model_of(10, 1), Goal(objective="speed", most_kl=0.2), best)
    assert taken is not None and taken.option.quantization in ("type1", "type2")
    assert taken.gain == pytest.approx(
        taken.predicted.below(0.2) * (best - 1 / taken.option.cost.decode_tps) / best  # type: ignore[operator]
    )


# ---------------------------------------------------------------- rounds


def search_of(field: SearchSpace, goal: Goal, **over: Any) -> Any:
    """A search whose lanes are never run: only what it makes of results is asked."""
    pytest.importorskip("torch")
    from edgeprune.pipeline import searching
    from edgeprune.progress import Silent

    given: dict[str, Any] = {
        **dict.fromkeys(("run", "shop", "compared", "seconds")),
        "space": field,
        "goal": goal,
        "first": (),
        "plan_of": field.make,
        "value_of": lambda result: None if result.quality is None else result.quality.kl,
        "most": 9,
        "key": "search",
        "progress": Silent(),
        **over,
    }
    return searching.Search(**given)


def judged(field: SearchSpace, rung: search.Rung, kl: float, agreement: float) -> Any:
    from edgeprune.pipeline.lane import LaneResult

    option = field.option(rung, "Q8_0")
    lane = Lane(
        plan=field.make(rung), quantization=option.quantization, cost=option.cost, measure=True, why=""
    )
    quality = QualityResult(
        artifact_sha256="",
        text="",
        tokens=100,
        kl=kl,
        kl_stderr=0.01,
        perplexity=10.0,
        perplexity_stderr=0.1,
        agreement=agreement,
        dense_perplexity=9.0,
        kl_arrays="",
        key="",
    )
    return LaneResult(lane=lane, quality=quality)


def test_a_floor_of_agreement_becomes_one_of_kl() -> None:
    field = field_of(1e9)
    rungs = field.ladder("uniform", 32)
    made = search_of(field, Goal(objective="size", least_agreement=0.9))
    # nothing measured: 1 - agreement is taken to be 0.55 times the root of the KL
    assert made._goal().most_kl == pytest.approx((0.1 / 0.55) ** 2)
    for rung, kl, agreement in zip(rungs, (0.04, 0.16, 0.25), (0.92, 0.80, 0.65), strict=False):
        result = judged(field, rung, kl, agreement)
        made.results[result.lane.id] = result
    # slopes 0.4, 0.5 and 0.7: the middle one counts
    assert made._goal().most_kl == pytest.approx((0.1 / 0.5) ** 2)
    made.goal = dataclasses.replace(made.goal, most_kl=0.01)
    assert made._goal().most_kl == 0.01


def test_finalists_are_the_best_two_plans() -> None:
    field = field_of(1e9)
    rungs = field.ladder("uniform", 32)
    made = search_of(field, Goal(objective="quality"))
    for rung, kl in [(field.dense, 0.1), *zip(rungs, (0.2, 0.24, 0.3), strict=False)]:
        result = judged(field, rung, kl, 0.9)
        made.results[result.lane.id] = result
    assert [r.lane.plan.id for r in made.finalists()] == [rungs[0].id, rungs[1].id]
    # what was made of a plan stands for that plan
    better = judged(field, rungs[0], 0.15, 0.9)
    plan = dataclasses.replace(better.lane.plan, id="better", key="better")
    better = dataclasses.replace(better, lane=dataclasses.replace(better.lane, plan=plan))
    made.results[better.lane.id] = better
    made._made_of["better"] = field.make(rungs[0]).key
    assert [r.lane.plan.id for r in made.finalists()] == ["better", rungs[1].id]


@pytest.mark.parametrize(("dense", "solved"), [(0.05, 0), (0.145, 1), (0.155, 2)])
def test_solving_must_be_able_to_win(dense: float, solved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    field = field_of(1e9)
    made = search_of(field, Goal(objective="quality"))
    rungs = field.ladder("uniform", 32)
    for rung, kl in [(field.dense, dense), *zip(rungs, (0.2, 0.24), strict=False)]:
        result = judged(field, rung, kl, 0.9)
        made.results[result.lane.id] = result
    # the model is made up: a share of the layers costs 1 nat per token, so a rung its own ratio
    model = damage.fit([damage.Term(name="cut uniform", value=1.0, stderr=1.0)], [])
    monkeypatch.setattr(type(made), "model", lambda self: model)
    steps = [made._step(field.option(r, "Q8_0"), None, 1, "") for r in rungs[:2]]
    made.log = dataclasses.replace(made.log, steps=tuple(steps))
    worth = [r.lane.plan.id for r in made.worth_solving()]
    by_hand = [
        r.id for r, kl in zip(rungs, (0.2, 0.24), strict=False) if kl - 0.5 * r.ratio <= min(dense, 0.2)
    ]
    assert worth == by_hand and len(worth) == solved
