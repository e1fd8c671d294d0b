"""The choice among measured candidates, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from candidates import budget, candidate, limit

from edgeprune import selection
from edgeprune.records import Budget, Candidate, Selection


def never(a: str, b: str) -> bool:
    return False


def always(a: str, b: str) -> bool:
    return True


def choose(limits: Budget, found: list[Candidate], tie: selection.Tie = never) -> Selection:
    checked = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in found]
    return selection.select(limits, checked, tie)


def test_best_quality_among_those_that_meet_every_limit() -> None:
    found = [
        candidate("too-big", memory=210_000_000, kl=0.001),
        candidate("good", ratio=0.1, kl=0.05),
        candidate("worse", ratio=0.3, kl=0.5, tps=500.0),
    ]
    chosen = choose(budget(200e6), found)
    assert chosen.selected == "good"
    assert chosen.ties == ()
    assert chosen.reasons == {
        "too-big": "misses memory: 210 MB measured, 10.0 MB over 200 MB",
        "good": "selected: best measured quality among those that meet every limit",
        "worse": "meets every limit; KL 0.5000, 10.0x that of good",
    }
    assert chosen.headline == (
        "Prune 10.0% of the decoder layers and quantize to Q4_0 (KL 0.0500; no dense model fits the budget)."
    )


def test_the_answer_can_be_not_to_prune() -> None:
    found = [candidate("dense", kl=0.02), candidate("pruned", ratio=0.2, kl=0.3)]
    chosen = choose(budget(), found)
    assert chosen.selected == "dense"
    assert chosen.headline == (
        "Do not prune: the dense model at Q4_0 is the best that fits "
        "(KL 0.0200; the best pruned candidate, pruned, reaches 0.3000)."
    )


def test_every_limit_counts() -> None:
    limits = budget(
        200e6,
        file_bytes=limit(90e6),
        decode_tps=limit(40.0, "tokens/s"),
        kl=limit(0.2, "nats/token"),
    )
    assert selection.check_limits(limits, candidate("a", file=90_000_000, tps=40.0, kl=0.2)) == {
        "memory": True,
        "file": True,
        "decode_speed": True,
        "kl": True,
    }
    assert selection.check_limits(
        limits, candidate("b", memory=200_000_001, file=90_000_001, tps=39.9, kl=0.21)
    ) == {
        "memory": False,
        "file": False,
        "decode_speed": False,
        "kl": False,
    }


def test_ties_go_to_the_clearly_faster() -> None:
    found = [candidate("best", kl=0.10, tps=50.0), candidate("fast", kl=0.11, tps=60.0)]
    chosen = choose(budget(), found, always)
    assert chosen.selected == "fast"
    assert chosen.ties == ("best",)
    assert chosen.reasons["fast"] == (
        "selected: quality cannot be told from the best (best), "
        "and it decodes faster (60 against 50 tokens/s)"
    )
    assert choose(budget(), found, never).selected == "best"


def test_speeds_within_the_noise_are_one_speed() -> None:
    # 10% of 55 is 5.5, so 50 is not slower than 55
    found = [candidate("best", kl=0.10, tps=50.0), candidate("other", kl=0.11, tps=55.0)]
    chosen = choose(budget(), found, always)
    assert chosen.selected == "best"
    assert chosen.reasons["best"] == (
        "selected: best measured quality; others tie with it and none is clearly faster"
    )
    assert chosen.reasons["other"] == (
        "tie: quality cannot be told from best on this text, but it is not faster"
    )


def test_nothing_fits_names_the_nearest_and_the_limit() -> None:
    found = [
        candidate("far", memory=300_000_000),
        candidate("near", ratio=0.4, memory=160_000_000),
        candidate("never measured", memory=None, predicted_memory=400_000_000),
    ]
    chosen = choose(budget(150e6), found)
    assert chosen.selected is None
    assert chosen.nearest == "near"
    assert chosen.missed == ("memory: 160 MB measured, 10.0 MB over 150 MB",)
    assert chosen.headline == (
        "Nothing fits the budget. Nearest: near; missed memory: 160 MB measured, 10.0 MB over 150 MB."
    )
    assert chosen.reasons["never measured"] == "planned"


def test_what_was_not_measured_is_not_the_nearest() -> None:
    """Its quality is unknown: it cannot be said to have missed anything."""
    found = [candidate("unknown", memory=None, kl=None), candidate("tried", kl=0.5)]
    limits = budget(kl=limit(0.1, "nats/token"))
    assert selection.misses(limits, found[0]) == []
    chosen = choose(limits, found)
    assert (chosen.nearest, chosen.missed) == ("tried", ("quality: KL 0.500, limit 0.1",))
    assert chosen.headline == "Nothing fits the budget. Nearest: tried; missed quality: KL 0.500, limit 0.1."


def test_when_everything_failed_the_first_failure_is_named() -> None:
    found = [candidate("a", error="differs from torch"), candidate("b", error="crashed")]
    chosen = choose(budget(), found)
    assert (chosen.selected, chosen.nearest, chosen.missed) == (None, None, ())
    assert chosen.headline == "No candidate could be measured. 2 failed, the first, a: differs from torch."


def test_misses_say_measured_or_predicted() -> None:
    limits = budget(100e6, file_bytes=limit(50e6), decode_tps=limit(60.0, "tokens/s"))
    measured = [text for text, _ in selection.misses(limits, candidate("a"))]
    assert measured == [
        "memory: 150 MB measured, 50.0 MB over 100 MB",
        "file: 100 MB measured, 50.0 MB over 50.0 MB",
        "decode speed: 50.0 tokens/s measured, limit 60 tokens/s",
    ]
    predicted = selection.misses(limits, candidate("b", memory=None))
    assert [text for text, _ in predicted] == [
        "memory: 149 MB predicted, 49.0 MB over 100 MB",
        "file: 100 MB predicted, 50.0 MB over 50.0 MB",
        "decode speed: 48.0 tokens/s predicted, limit 60 tokens/s",
    ]
    assert [far for _, far in predicted] == pytest.approx([0.49, 1.0, 0.2])


def test_predicted_speed_is_used_off_the_board() -> None:
    limits = budget(decode_tps=limit(45.0, "tokens/s"))
    assert (
        selection.check_limits(limits, candidate("a", tps=None, predicted_tps=48.0))["decode_speed"] is True
    )
    assert (
        selection.check_limits(limits, candidate("a", tps=None, predicted_tps=44.0))["decode_speed"] is False
    )
    assert (
        selection.check_limits(limits, candidate("a", tps=44.0, predicted_tps=48.0))["decode_speed"] is False
    )
    found = [
        candidate("slow", kl=0.1, tps=None, predicted_tps=50.0),
        candidate("fast", kl=0.1, tps=None, predicted_tps=80.0),
    ]
    assert choose(limits, found, always).selected == "fast"


def test_a_failed_candidate_is_never_chosen() -> None:
    found = [candidate("broken", kl=0.0001, error="differs from torch"), candidate("fine", kl=0.2)]
    chosen = choose(budget(), found)
    assert chosen.selected == "fine"
    assert chosen.reasons["broken"] == "failed: differs from torch"


def test_the_boards_own_runtime_counts_against_the_limit() -> None:
    found = candidate("a", memory=150_000_000)
    found = dataclasses.replace(
        found, predicted=dataclasses.replace(found.predicted, runtime_bytes=60_000_000)
    )
    limits = budget(memory=200e6)
    assert selection.check_limits(limits, found)["memory"] is False
    assert selection.check_limits(budget(memory=210e6), found)["memory"] is True
    [(text, share)] = selection.misses(limits, found)
    assert text == (
        "memory: 150 MB measured and 60.0 MB predicted for the target's runtime, 10.0 MB over 200 MB"
    )
    assert share == pytest.approx(0.05)


# ---------------------------------------------------------------- energy, agreement, first token


def test_energy_and_agreement_are_limits() -> None:
    limits = budget(energy_j=limit(0.5, "J/token"), agreement=limit(0.8, "of tokens"))
    assert selection.check_limits(limits, candidate("a", joules=0.5, agreement=0.8)) == {
        "memory": True,
        "energy": True,
        "agreement": True,
    }
    over = candidate("b", joules=0.6, agreement=0.6)
    assert selection.check_limits(limits, over) == {"memory": True, "energy": False, "agreement": False}
    found = selection.misses(limits, over)
    assert [text for text, _ in found] == [
        "energy: 0.6 J/token measured, limit 0.5 J/token",
        "quality: first choice of the dense model at 60.0% of the tokens, limit 80%",
    ]
    assert [far for _, far in found] == pytest.approx([0.2, 0.25])


def test_what_nothing_measures_is_not_said_to_be_met() -> None:
    limits = budget(energy_j=limit(0.5, "J/token"), first_token_ms=limit(900.0, "ms"))
    chosen = choose(limits, [candidate("a")])
    assert selection.check_limits(limits, candidate("a")) == {"memory": True}
    assert chosen.selected == "a"
    assert chosen.reasons["a"] == (
        "selected: best measured quality among those that meet every limit; "
        "the limit on first token and energy could not be checked"
    )
    known = choose(limits, [candidate("a", joules=0.4, first_token_ms=800.0)])
    assert known.reasons["a"] == "selected: best measured quality among those that meet every limit"
    late = choose(limits, [candidate("a", joules=0.4, first_token_ms=990.0)])
    assert late.missed == ("first token: 990 ms measured, limit 900 ms",)


# ---------------------------------------------------------------- objectives

FLOOR = limit(0.2, "nats/token")


def test_speed_takes_the_fastest_that_keeps_the_floor() -> None:
    found = [
        candidate("best", kl=0.01, tps=50.0),
        candidate("fast", ratio=0.1, kl=0.15, tps=80.0),
        candidate("broken", ratio=0.5, kl=0.9, tps=200.0),
    ]
    chosen = choose(budget(kl=FLOOR, objective="speed"), found)
    assert (chosen.selected, chosen.ties) == ("fast", ())
    assert chosen.headline == (
        "Prune 10.0% of the decoder layers and quantize to Q4_0 (80.0 tokens/s measured, KL 0.1500; "
        "the fastest dense model that fits, Q4_0, reaches 50.0 tokens/s measured, KL 0.0100)."
    )
    assert chosen.reasons == {
        "best": "meets every limit; 0.62x the speed of fast: 50.0 tokens/s measured, KL 0.0100",
        "fast": "selected: fastest decode among those that meet every limit",
        "broken": "misses quality: KL 0.900, limit 0.2",
    }
    # the same candidates by quality
    assert choose(budget(kl=FLOOR), found).selected == "best"


def test_speeds_within_the_noise_are_decided_by_quality() -> None:
    # 10% of 80 is 8: 73 and 80 are one speed, 71 is slower
    found = [
        candidate("top", kl=0.15, tps=80.0),
        candidate("near", kl=0.10, tps=73.0),
        candidate("slow", kl=0.01, tps=71.0),
    ]
    chosen = choose(budget(kl=FLOOR, objective="speed"), found)
    assert (chosen.selected, chosen.ties) == ("near", ())
    assert chosen.reasons["near"] == (
        "selected: best measured quality among the 2 fastest, whose speeds are one within 10%"
    )
    assert chosen.reasons["top"] == (
        "meets every limit; as fast as near within 10%, but worse: 80.0 tokens/s measured, KL 0.1500"
    )
    assert chosen.headline == (
        "Do not prune: the dense model at Q4_0 is the fastest that meets every limit "
        "(73.0 tokens/s measured, KL 0.1000)."
    )
    tied = choose(budget(kl=FLOOR, objective="speed"), found, always)
    assert (tied.selected, tied.ties) == ("near", ("top",))
    assert tied.reasons["top"] == "tie: neither speed, within 10%, nor quality can be told from near"


def test_speed_is_predicted_off_the_board() -> None:
    found = [
        candidate("slow", kl=0.01, tps=None, predicted_tps=50.0),
        candidate("fast", kl=0.10, tps=None, predicted_tps=80.0),
        candidate("unknown", kl=0.001, tps=None, predicted_tps=None),
    ]
    limits = budget(kl=FLOOR, objective="speed")
    chosen = choose(limits, found)
    assert chosen.selected == "fast" and "(80.0 tokens/s predicted, KL 0.1000)" in chosen.headline
    none = choose(limits, found[2:])
    assert none.selected == "unknown"
    assert none.reasons["unknown"] == (
        "selected: no speed is known, measured or predicted, so best measured quality"
    )


def test_size_takes_the_smallest_file_that_keeps_the_floor() -> None:
    found = [
        candidate("best", kl=0.01, file=150_000_000),
        candidate("small", kl=0.15, file=90_000_000, tps=10.0),
        candidate("same", kl=0.18, file=90_000_000, tps=99.0),
        candidate("pruned", ratio=0.1, kl=0.19, file=90_000_001),
        candidate("broken", ratio=0.6, kl=0.9, file=40_000_000),
    ]
    limits = budget(kl=FLOOR, objective="size")
    chosen = choose(limits, found)
    assert (chosen.selected, chosen.ties) == ("small", ())
    assert chosen.headline == (
        "Do not prune: the dense model at Q4_0 is the smallest that meets every limit "
        "(a file of 90.0 MB, KL 0.1500; the smallest pruned candidate, pruned, "
        "takes 90.0 MB, KL 0.1900)."
    )
    assert chosen.reasons["same"] == "meets every limit; a file of the same size, but worse: KL 0.1800"
    assert chosen.reasons["best"] == (
        "meets every limit; a file of 150 MB, KL 0.0100, 1.67x the bytes of small"
    )
    # sizes are exact: a byte more is more, whatever the quality
    assert choose(limits, found, always).ties == ("same",)


def test_a_floor_of_agreement_serves_an_objective() -> None:
    found = [candidate("good", agreement=0.9, tps=50.0), candidate("bad", agreement=0.5, tps=500.0)]
    limits = budget(agreement=limit(0.8, "of tokens"), objective="speed")
    assert choose(limits, found).selected == "good"


def test_nothing_fits_under_an_objective() -> None:
    # both are 10% beyond the limit on memory
    found = [
        candidate("slow", memory=220_000_000, tps=50.0, file=80_000_000),
        candidate("fast", memory=220_000_000, tps=90.0, file=120_000_000),
    ]
    by_speed = choose(budget(kl=FLOOR, objective="speed"), found)
    assert (by_speed.selected, by_speed.nearest) == (None, "fast")
    assert by_speed.headline == (
        "Nothing fits the budget, so there is no fastest. Nearest: fast; "
        "missed memory: 220 MB measured, 20.0 MB over 200 MB."
    )
    assert choose(budget(kl=FLOOR, objective="size"), found).nearest == "slow"
    assert choose(budget(kl=FLOOR), found).headline.startswith("Nothing fits the budget. Nearest: slow;")
