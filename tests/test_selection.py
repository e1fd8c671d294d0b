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
