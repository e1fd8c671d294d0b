"""The answers beside the headline, and the figures behind each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from candidates import budget, candidate, limit, write_report

from edgeprune import selection
from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target
from edgeprune.pipeline import light
from edgeprune.records import Budget, Candidate, PairedKL, to_plain
from edgeprune.report import build as report_build
from edgeprune.report.answers import answers, search_line


def quality(c: Candidate, **over: Any) -> Candidate:
    assert c.quality is not None
    return dataclasses.replace(c, quality=dataclasses.replace(c.quality, **over))


def report(
    rows: list[Candidate], memory: float = 200e6, limits: Budget | None = None, **more: Any
) -> dict[str, Any]:
    limits = limits or budget(memory)
    rows = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in rows]
    chosen = selection.select(limits, rows, lambda a, b: False)
    plain: dict[str, Any] = {
        "candidates": to_plain(rows),
        "selected": chosen.selected,
        "nearest": chosen.nearest,
        "budget": report_build._limits(limits),
        "objective": limits.objective,
        "dense_perplexity": 20.0,
        "target": {"name": "some-board"},
        **more,
    }
    return json.loads(json.dumps(plain))


def codes(found: list[dict[str, Any]]) -> list[str]:
    return [a["code"] for a in found]


def quantized(name: str, quantization: str, **over: Any) -> Candidate:
    return dataclasses.replace(candidate(name, **over), quantization=quantization)


def test_do_not_prune_and_what_to_use_instead() -> None:
    rows = [
        quantized("dense@Q5_K_M", "Q5_K_M", kl=0.02, file=112_000_000),
        quantized("uniform-10.0@Q8_0", "Q8_0", ratio=0.1, kl=0.3, file=134_000_000),
    ]
    found = answers(report(rows))
    assert codes(found) == ["do-not-prune", "use-quantization"]
    assert found[0]["text"] == (
        "Do not prune: dense@Q5_K_M has KL 0.0200±0.0010 nats per token; the best pruned candidate that "
        "meets the limits, uniform-10.0@Q8_0, has KL 0.3000±0.0010."
    )
    assert found[0]["figures"]["rival_kl"] == 0.3
    assert found[1]["text"] == (
        "Use Q5_K_M instead of pruning: a file of 112 MB, where uniform-10.0@Q8_0 takes 134 MB."
    )
    assert found[1]["figures"] == {
        "quantization": "Q5_K_M",
        "file_bytes": 112_000_000,
        "rival": "uniform-10.0@Q8_0",
        "rival_file_bytes": 134_000_000,
    }


def test_the_users_own_file_is_kept() -> None:
    found = answers(report([quantized("dense@Q4_1 as given", "Q4_1 as given", kl=0.003)]))
    assert codes(found) == ["do-not-prune", "keep-the-file"]
    assert found[0]["text"].endswith("No pruned candidate was measured that does.")
    assert "Q4_1 already fits" in found[1]["text"]
    assert codes(answers(report([quantized("dense@F16", "F16", kl=0.0)]))) == ["do-not-prune"]


def test_a_budget_below_what_keeps_quality() -> None:
    rows = [
        candidate("dense@IQ4_NL", memory=None, predicted_memory=141_000_000),
        quality(
            candidate("inner-40.8@Q4_0", ratio=0.408, memory=118_000_000, kl=1.49),
            perplexity=48.0,
            agreement=0.42,
        ),
    ]
    found = answers(report(rows, memory=120e6))
    assert codes(found) == ["prune", "below-quality"]
    assert found[0]["text"].endswith(
        "no dense candidate meets the limits. The smallest, dense@IQ4_NL, needs 141 MB (predicted), "
        "21.0 MB more than the limit."
    )
    assert found[1]["text"] == (
        "This budget is below what keeps quality: expect perplexity 48.00 where the dense model has 20.00 "
        "(2.4 times), and another first choice than the dense model's at 58% of the tokens. "
        "Without pruning, dense@IQ4_NL needs 141 MB of memory (predicted)."
    )
    assert found[1]["figures"]["dense_bytes"] == 141_000_000


@pytest.mark.parametrize(
    ("kl", "perplexity", "lost"), [(0.5, 30.0, False), (0.51, 20.0, True), (0.1, 30.1, True)]
)
def test_where_quality_counts_as_lost(kl: float, perplexity: float, lost: bool) -> None:
    row = quality(candidate("uniform-20.0@Q8_0", ratio=0.2, kl=kl), perplexity=perplexity)
    assert ("below-quality" in codes(answers(report([row])))) is lost


def test_pruned_may_win_where_dense_fits_too() -> None:
    rows = [candidate("dense@Q2_K", kl=0.9), candidate("uniform-10.0@Q4_0", ratio=0.1, kl=0.3)]
    found = answers(report(rows))
    assert found[0]["code"] == "prune" and found[0]["figures"]["rival"] == "dense@Q2_K"
    assert "the best dense candidate that meets the limits, dense@Q2_K, has KL 0.9000" in found[0]["text"]


def test_what_cannot_be_told_apart_is_said() -> None:
    rows = [candidate("dense@A", kl=0.1), candidate("dense@B", kl=0.101), candidate("dense@C", kl=0.9)]
    against = {
        "dense@B": PairedKL(difference=0.001, low=-0.002, high=0.004, paired=True),
        "dense@C": PairedKL(difference=0.8, low=0.7, high=0.9, paired=True),
    }
    found = answers(report(rows, against_selected=to_plain(against)))
    assert found[-1]["code"] == "cannot-tell"
    assert found[-1]["text"] == (
        "Quality of dense@A and dense@B cannot be told apart on 1000 tokens: against dense@B, "
        "KL difference +0.0010, 95% interval -0.0020 to +0.0040."
    )
    assert found[-1]["figures"]["tied"] == ["dense@B"] and found[-1]["figures"]["high"] == 0.004
    del against["dense@B"]
    found = answers(report(rows, against_selected=to_plain(against)))
    assert found[-1]["code"] == "sure"
    assert found[-1]["text"] == (
        "The nearest in quality, dense@C, is worse beyond the error on 1000 tokens: "
        "KL difference +0.8000, 95% interval +0.7000 to +0.9000."
    )


def test_a_faster_power_mode_is_named_with_its_band() -> None:
    def mode(name: str, tps: float, current: bool = False) -> dict[str, Any]:
        return {
            "mode": name,
            "current": current,
            "decode_tps": tps,
            "decode_tps_low": tps / 1.2,
            "decode_tps_high": tps * 1.2,
        }

    rows = [quantized("dense@F16", "F16", kl=0.0)]
    found = answers(report(rows, power_modes=[mode("15W", 30.0, True), mode("25W", 60.0)]))
    assert found[-1]["text"] == (
        "The board would decode 2.0x as fast in power mode 25W: 60 (50-72) tokens/s predicted, "
        "against 30 (25-36) tokens/s in 15W (80% bands)."
    )
    assert found[-1]["figures"]["times"] == 2.0 and found[-1]["figures"]["bands_overlap"] is False
    close = answers(report(rows, power_modes=[mode("15W", 30.0, True), mode("25W", 36.0)]))
    assert close[-1]["text"].endswith("The 80% bands overlap: measure before relying on it.")
    slow = report(rows, power_modes=[mode("15W", 30.0), mode("25W", 31.0, True)])
    assert codes(answers(slow)) == ["do-not-prune"]


def test_a_speed_that_was_not_measured_is_said_to_be_predicted() -> None:
    found = answers(report([quantized("dense@F16", "F16", kl=0.0, tps=None, predicted_tps=50.0)]))
    assert found[-1]["code"] == "speed-predicted"
    assert found[-1]["text"].startswith(
        "Speed was not measured on some-board: 40 to 60 tokens/s are predicted (80% band)."
    )


def test_when_nothing_fits_the_smallest_is_named() -> None:
    rows = [
        candidate("dense@Q4_0", memory=None, predicted_memory=180_000_000),
        candidate("uniform-50.0@Q4_0", ratio=0.5, memory=None, predicted_memory=120_000_000),
    ]
    found = answers(report(rows, memory=100e6))
    assert codes(found) == ["nothing-fits"]
    assert found[0]["text"] == (
        "Nothing fits the limits. The smallest candidate, uniform-50.0@Q4_0, needs 120 MB (predicted). "
        "The smallest without pruning, dense@Q4_0, needs 180 MB (predicted)."
    )


# ---------------------------------------------------------------- objectives and limits

FLOOR = limit(0.2, "nats/token")


def one(found: list[dict[str, Any]], code: str) -> dict[str, Any]:
    [answer] = [a for a in found if a["code"] == code]
    return answer


def test_what_speed_was_bought_with() -> None:
    rows = [
        quantized("dense@Q8_0", "Q8_0", kl=0.01, tps=50.0),
        quantized("dense@Q4_0", "Q4_0", kl=0.15, tps=80.0),
        quantized("inner-10.0@Q4_0", "Q4_0", ratio=0.1, kl=0.18, tps=60.0),
    ]
    found = answers(report(rows, limits=budget(kl=FLOOR, objective="speed")))
    assert codes(found) == ["do-not-prune", "use-quantization", "for-objective"]
    assert found[0]["text"] == (
        "Do not prune: dense@Q4_0 has 80.0 measured tokens/s at KL 0.1500±0.0010 nats per token; the fastest "
        "pruned candidate that meets the limits, inner-10.0@Q4_0, has 60.0 measured tokens/s "
        "at KL 0.1800±0.0010."
    )
    assert found[2]["text"] == (
        "Chosen for speed above the floor of quality (KL at most 0.2): 80.0 measured tokens/s "
        "at KL 0.1500±0.0010 nats per token. The best in quality within the same limits, dense@Q8_0, "
        "has 50.0 measured tokens/s at KL 0.0100±0.0010."
    )
    assert found[2]["figures"] == {
        **{"objective": "speed", "selected": "dense@Q4_0", "kl": 0.15, "decode_tps": 80.0},
        **{"file_bytes": 100_000_000, "best_quality": "dense@Q8_0", "best_kl": 0.01},
        **{"best_decode_tps": 50.0, "best_file_bytes": 100_000_000},
    }


def test_what_a_small_file_was_bought_with() -> None:
    rows = [
        candidate("dense@Q8_0", kl=0.01, file=145_000_000, agreement=0.95),
        candidate("inner-10.0@Q4_0", ratio=0.1, kl=0.18, file=82_000_000, agreement=0.81),
    ]
    limits = budget(agreement=limit(0.8, "of tokens"), objective="size")
    found = answers(report(rows, limits=limits))
    assert codes(found) == ["prune", "for-objective"]
    assert found[0]["text"] == (
        "Prune: inner-10.0@Q4_0 has a file of 82.0 MB at KL 0.1800±0.0010 nats per token; the smallest dense "
        "candidate that meets the limits, dense@Q8_0, has a file of 145 MB at KL 0.0100±0.0010."
    )
    assert found[1]["text"].startswith(
        "Chosen for size above the floor of quality (agreement of at least 80%): a file of 82.0 MB at KL"
    )
    alone = answers(report(rows[:1], limits=limits))
    assert one(alone, "for-objective")["text"].endswith("nats per token. It is the best in quality as well.")
    empty = answers(report([candidate("a", memory=300_000_000)], limits=limits))
    assert empty[0]["text"].startswith("Nothing fits the limits, so there is no smallest candidate.")


def test_speeds_that_cannot_be_told_apart() -> None:
    rows = [candidate("dense@A", kl=0.05, tps=76.0), candidate("dense@B", kl=0.15, tps=80.0)]
    limits = budget(kl=FLOOR, objective="speed")
    found = one(answers(report(rows, limits=limits)), "cannot-tell-speed")
    # 76 and 80 with a standard deviation of 0.5 each
    assert found["text"] == (
        "Speed of dense@A and dense@B cannot be told apart: 75.0 to 77.0 tokens/s (95% of the repeats) "
        "against 79.0 to 81.0 (95% of the repeats) of dense@B; closer than 10% counts as the same."
    )
    assert found["figures"]["tied"] == ["dense@B"]
    far = [candidate("dense@A", kl=0.05, tps=60.0), rows[1]]
    assert "cannot-tell-speed" not in codes(answers(report(far, limits=limits)))
    # off the board: 60 (48 to 72) and 80 (64 to 96) overlap
    bands = [
        candidate("dense@A", kl=0.05, tps=None, predicted_tps=60.0),
        candidate("dense@B", kl=0.15, tps=None, predicted_tps=80.0),
    ]
    shown = one(answers(report(bands, limits=limits)), "cannot-tell-speed")["text"]
    assert "64.0 to 96.0 tokens/s (80% band, predicted) against 48.0 to 72.0" in shown
    assert "cannot-tell-speed" not in codes(answers(report(rows, limits=budget(kl=FLOOR))))


def test_a_limit_that_nothing_measures_is_said_to_be_open() -> None:
    limits = budget(energy_j=limit(0.5, "J/token", "profile use"), first_token_ms=limit(900.0, "ms"))
    found = answers(report([quantized("dense@F16", "F16", kl=0.0)], limits=limits))
    assert codes(found) == ["do-not-prune", "not-checked", "not-checked"]
    assert found[1]["text"] == (
        "The limit on energy (0.5 J/token, from profile use) could not be checked: nothing on here meters "
        "it. Whether dense@F16 meets it is not known."
    )
    assert found[2]["figures"] == {"limit": "first_token", "value": 900.0, "selected": "dense@F16"}
    metered = quantized("dense@F16", "F16", kl=0.0, joules=0.4, first_token_ms=800.0)
    assert codes(answers(report([metered], limits=limits))) == ["do-not-prune"]


def test_a_floor_inside_the_error_is_said() -> None:
    limits = budget(kl=FLOOR)
    # 0.19 + 1.96 * 0.01 = 0.2096
    found = answers(report([candidate("dense@A", kl=0.19, stderr=0.01)], limits=limits))
    assert one(found, "near-the-floor")["text"] == (
        "KL of dense@A may lie beyond the limit: the 95% interval of KL 0.1900±0.0100 ends at 0.2096, "
        "the limit is 0.2."
    )
    sure = answers(report([candidate("dense@A", kl=0.19, stderr=0.005)], limits=limits))
    assert "near-the-floor" not in codes(sure)


# ---------------------------------------------------------------- the search


def guess(name: str, kl: tuple[float, float, float], **over: Any) -> Candidate:
    return candidate(name, memory=None, predicted_kl=kl, **over)


def test_candidates_that_may_be_better_are_named_with_their_interval() -> None:
    # the selected one: 0.10 ± 1.96 * 0.01, so up to 0.1196
    chosen = candidate("dense@A", kl=0.10, stderr=0.01)
    rows = [
        chosen,
        guess("dense@B", (0.115, 0.08, 0.16)),
        guess("even", (0.12, 0.08, 0.16)),  # more likely worse than better
        guess("dense@C", (0.09, 0.05, 0.15)),
        guess("clear", (0.30, 0.20, 0.40)),
        guess("too-big", (0.01, 0.001, 0.02), predicted_memory=210_000_000),
        guess("too-slow", (0.01, 0.001, 0.02), predicted_tps=10.0),
    ]
    limits = budget(decode_tps=limit(20.0, "tokens/s"))
    found = one(answers(report(rows, limits=limits)), "maybe-better")
    assert found["text"] == (
        "dense@C and dense@B were not measured and may be better: predicted for dense@C are KL 0.0900, "
        "80% interval 0.0500 to 0.1500, which overlaps dense@A (KL 0.1000±0.0100). "
        "Measuring more candidates would tell."
    )
    assert found["figures"]["rivals"] == ["dense@C", "dense@B"]
    assert found["figures"]["selected_kl_high"] == pytest.approx(0.1196)
    assert "maybe-better" not in codes(answers(report([chosen, rows[2], rows[4]], limits=limits)))


def test_what_may_be_faster_or_smaller_keeps_the_floor() -> None:
    rows = [
        candidate("dense@A", kl=0.10, tps=50.0, file=100_000_000),
        guess("faster", (0.3, 0.15, 0.6), predicted_tps=56.0, file=120_000_000),
        guess("as fast", (0.1, 0.05, 0.2), predicted_tps=54.0, file=99_000_000),
        guess("broken", (0.9, 0.5, 1.6), predicted_tps=99.0, file=20_000_000),
    ]
    by_speed = one(answers(report(rows, limits=budget(kl=FLOOR, objective="speed"))), "maybe-better")
    assert by_speed["figures"]["rivals"] == ["faster"]
    assert by_speed["text"].startswith(
        "faster was not measured and may be faster: predicted for faster are 56.0 tokens/s at KL 0.3000, "
        "80% interval 0.1500 to 0.6000."
    )
    by_size = one(answers(report(rows, limits=budget(kl=FLOOR, objective="size"))), "maybe-better")
    assert by_size["figures"]["rivals"] == ["as fast"]
    assert "may be smaller: predicted for as fast are 99.0 MB at KL 0.1000" in by_size["text"]


def test_how_the_search_went_in_one_sentence() -> None:
    search: dict[str, Any] = {
        "rounds": [{"round": 1, "proposed": ["a"], "why": "x"}, {"round": 2, "proposed": [], "why": "y"}],
        "measured": 9,
        "considered": 2310,
        "stopped": "no candidate is expected to gain more than 3%.",
        "seconds": 300.0,
        "model": None,
    }
    assert search_line({"search": search}) == (
        "Searched 2,310 candidates by prediction, measured 9 in 2 rounds; stopped because no candidate is "
        "expected to gain more than 3%."
    )
    short = {"considered": 12, "measured": 3, "rounds": search["rounds"][:1]}
    assert search_line({"search": short}) == "Searched 12 candidates by prediction, measured 3 in 1 round."
    assert search_line({}) is None and search_line({"search": None}) is None


# ---------------------------------------------------------------- differences


def test_differences_are_paired_by_token_where_both_are_known() -> None:
    rows = [candidate("a", kl=0.1), candidate("b", kl=0.2, stderr=0.03), candidate("c", kl=0.3, stderr=0.04)]
    noise = np.linspace(0, 1, 40).reshape(4, 10)
    found = light.against_selected(rows, "a", {"a": noise, "b": noise + 0.1})
    assert set(found) == {"b", "c"}
    assert found["b"].paired and found["b"].difference == pytest.approx(0.1)
    assert found["b"].high - found["b"].low < 1e-6 and not found["b"].tie
    # two standard errors: 1.96 * hypot(0.001, 0.04)
    assert not found["c"].paired and found["c"].low == pytest.approx(0.2 - 1.96 * np.hypot(0.001, 0.04))
    one = light.against_selected(rows, "a", {"a": noise[:1, :1], "b": noise[:1, :1]})
    assert not one["b"].paired  # a single token has no spread
    assert light.against_selected(rows, None, {}) == {}


def test_choosing_again_answers_again(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    target, _ = load_target("laptop-cpu")
    rows = [
        quantized("dense@Q8_0", "Q8_0", kl=0.005, memory=194_000_000, predicted_memory=193_000_000),
        quantized("dense@Q4_0", "Q4_0", kl=0.19, memory=178_000_000, predicted_memory=177_000_000),
    ]
    limits = budget(200e6)
    rows = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in rows]
    chosen = selection.select(limits, rows, lambda a, b: False)
    folder = write_report(
        tmp_path / "run",
        rows,
        target=target,
        profile=load_profile("chat-2k"),
        limits=limits,
        chosen=chosen,
    )
    before = json.loads((folder / "report.json").read_text())
    assert before["answers"][1]["figures"]["quantization"] == "Q8_0"
    ran = run_cli("select", folder, "--budget", "180MB", "--format", "json")
    again = json.loads(ran.out)
    assert again["selected"] == "dense@Q4_0"
    assert again["answers"][1]["figures"]["quantization"] == "Q4_0"
    assert set(again["against_selected"]) == {"dense@Q8_0"}
    table = run_cli("select", folder, "--budget", "180MB").out
    assert "- Use Q4_0 instead of pruning: a file of 100 MB." in table
