"""What a search adds to report.html: predicted quality, how the search went, long names of mixes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from candidates import budget, candidate, limit
from test_report_page import CONTRAST, HOSTILE, WIDER, Tags, drawn, hostile, made, plan, point

from edgeprune import selection
from edgeprune.records import Candidate
from edgeprune.report import charts, page
from edgeprune.report.terminal import render_table

MIX = "Q4_0+embedding=Q8_0+attention=Q5_1"
SEARCH: dict[str, Any] = {
    "rounds": [
        {"round": 1, "proposed": ["dense@Q8_0", "dense@Q4_0"], "why": "the dense model spans the types"},
        {"round": 2, "proposed": [f"inner-10.0@{MIX}"], "why": "12% expected gain"},
    ],
    "measured": 3,
    "considered": 2310,
    "stopped": "no candidate is expected to gain more than 3%",
    "seconds": 414.0,
    "model": {
        "terms": {"embedding": {"value": 3.25, "stderr": 0.5}, "cut inner": {"value": 2.0, "stderr": 1}}
    },
}


def searched(n: int = 2, *, search: Any = SEARCH, **over: Any) -> dict[str, Any]:
    """A report of three measured candidates and `n` that were only predicted."""
    rows: list[Candidate] = [
        candidate("dense@Q8_0", memory=194_000_000, file=145_000_000, kl=0.005, tps=50.0),
        candidate("dense@Q4_0", memory=178_000_000, file=92_000_000, kl=0.19, tps=70.0, stderr=0.007),
        candidate(f"inner-10.0@{MIX}", ratio=0.1, memory=182_000_000, file=99_000_000, kl=0.09, tps=68.0),
    ]
    for i in range(n):
        kl = 0.1 + 0.001 * i
        one = candidate(
            f"inner-12.{i}@{MIX}",
            ratio=0.12,
            memory=None,
            predicted_memory=170_000_000 + 10_000 * i,
            predicted_kl=(kl, kl / 2, 3 * kl),
            reason="predicted to gain less than 3%",
        )
        rows.append(dataclasses.replace(one, quantization=MIX))
    limits = budget(200e6, kl=limit(0.2, "nats/token"), energy_j=limit(0.5, "J/token"), objective="speed")
    rows = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in rows]
    chosen = selection.select(limits, rows, lambda a, b: False)
    rows = [dataclasses.replace(c, reason=chosen.reasons[c.id]) for c in rows]
    plans = [plan("dense", 0.0, 1536), plan("uniform-10.0", 0.1, 1216)]
    context = {"plans": plans, "dense_perplexity": 19.0, "search": search}
    return made(candidates=rows, budget=limits, chosen=chosen, context=context, **over)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without charts: drawing takes a second each."""
    monkeypatch.setattr(charts, "available", lambda: False)


# ---------------------------------------------------------------- the table


def test_predicted_quality_has_a_column_of_its_own(bare: None) -> None:
    found = Tags(page.render(searched()))
    first, planned = (t for t in found.tables if "removed," in t[0][1])
    assert [cell.strip() for cell in first[1]] == [
        *("file, MB", "memory, MB", "decode, t/s", "KL, nats/token"),
        *("file, MB", "memory, MB", "decode, t/s", "KL, nats/token", "perplexity"),
    ]
    measured = [cell.strip() for cell in first[2]]
    # not predicted before it was measured
    assert measured[5] == "-" and measured[9] == "0.0050±0.0010"
    guess = [cell.strip() for cell in planned[2]]
    assert guess[0] == f"inner-12.0@{MIX}"
    assert guess[5] == "0.1000 (0.0500 to 0.3000)" and guess[6:] == ["-"] * 5
    assert all(len(row) in (4, 9, 11, 1) for row in planned)


def test_without_predictions_the_table_is_as_before(bare: None) -> None:
    table = next(t for t in Tags(page.render(searched(0))).tables if "removed," in t[0][1])
    assert len(table[1]) == 8 and len(table[2]) == 10


def test_a_column_is_missing_from_old_reports_too(bare: None) -> None:
    report = searched()
    for c in report["candidates"]:
        for name in ("kl", "kl_low", "kl_high"):
            del c["predicted"][name]
    del report["search"], report["objective"]
    text = Tags(page.render(report)).text
    assert "Searched" not in text and "How the search went" not in text


# ---------------------------------------------------------------- the charts


def spec_of(points: list[charts.Point]) -> charts.Spec:
    spec = charts.quality_chart(points, x_title="x", x_unit="MB", width=charts.WIDE)
    assert spec is not None
    return spec


def marks(spec: charts.Spec, kind: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(mark, rows) of every layer of a kind."""
    return [
        (layer["mark"], layer["data"]["values"])
        for layer in spec["layer"]
        if "mark" in layer and layer["mark"]["type"] == kind
    ]


def test_predicted_quality_is_hollow_with_a_thin_bar_and_never_joined() -> None:
    guess = point("c", x=110.0, y=0.02, y_low=0.01, y_high=0.05, x_measured=False, y_measured=False)
    spec = spec_of([point("a", y_low=0.09, y_high=0.11), point("b", x=120.0, y=0.05), guess])
    [(_, line)] = marks(spec, "line")
    # b and a, although c is better than either
    assert [(r["x"], r["y"]) for r in line] == [(100.0, 0.1), (120.0, 0.05)]
    bars = {m.get("strokeWidth"): rows for m, rows in marks(spec, "rule") if "strokeDash" in m}
    assert [(r["y_low"], r["y_high"]) for r in bars[1]] == [(0.01, 0.05)]
    hollow = [rows for m, rows in marks(spec, "point") if m.get("shape") == "diamond"]
    assert [r["about"] for r in hollow[0]] == ["c: 110 MB predicted, KL 0.0200 predicted (0.0100 to 0.0500)"]
    # below what was measured
    drawn_points = [rows[0]["about"][0] for m, rows in marks(spec, "point") if "about" in rows[0]]
    assert drawn_points == ["c", "a"]


def test_a_wide_interval_ends_at_the_frame() -> None:
    guess = point("c", y=0.3, y_low=1e-5, y_high=400.0, y_measured=False)
    spec = spec_of([point("a"), guess])
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    # three times the value and room for a name above it; the measured 0.1 below
    assert (low, high) == pytest.approx((0.1 / 1.4, 0.9 * 1.8))
    row = next(r for _, rows in marks(spec, "rule") for r in rows if r.get("guessed"))
    assert (row["y_low"], row["y_high"]) == (low, high)


def test_predictions_far_from_what_was_measured_do_not_stretch_the_axis() -> None:
    points = [point("a"), point("b", x=120.0)]
    near = point("near", x=150.0, y_measured=False, x_measured=False)
    far = point("far", x=900.0, y_measured=False, x_measured=False)
    assert charts.in_view([*points, near, far], None)[0] == [*points, near]
    assert charts.in_view([far], None)[0] == [far]  # nothing was measured


def test_names_of_many_predictions_are_left_out() -> None:
    def names(n: int) -> list[str]:
        guesses = [point(f"g{i}", x=100.0 + 10 * i, y=0.01 * 3**i, y_measured=False) for i in range(n)]
        labels = spec_of([point("a"), point("b", x=130.0, y=0.5), *guesses])["layer"][-1]["layer"]
        return sorted(layer["data"]["values"][0]["text"] for layer in labels)

    assert set(names(2)) > {"a", "b"} and "g0" in names(2)
    assert names(charts.MOST_GUESSED_NAMES + 1) == ["a", "b"]


@drawn
def test_a_chart_has_no_more_predictions_than_fit() -> None:
    report = searched(400)
    text = page.render(report)
    assert len(text.encode()) < page.MOST_BYTES / 2
    drawn_once = len(set(re.findall(r"<title>(inner-12\.\d+)@", text)))
    assert drawn_once == page._MOST_GUESSED
    found = Tags(text).text
    assert "340 more with a higher KL are in the table of all candidates" in found
    assert "400 more were planned and not measured The first 300 of them; report.json has them all." in found


# ---------------------------------------------------------------- how the search went


def test_the_search_is_one_sentence_with_its_rounds_folded(bare: None) -> None:
    report = searched()
    sentence = (
        "Searched 2,310 candidates by prediction, measured 3 in 2 rounds; "
        "stopped because no candidate is expected to gain more than 3%."
    )
    found = Tags(page.render(report))
    assert sentence in found.text and sentence in render_table(report)
    rounds = next(t for t in found.tables if t[0][0] == "round")
    rounds = [[cell.strip() for cell in row] for row in rounds]
    assert rounds[1] == ["1", "dense@Q8_0dense@Q4_0", "the dense model spans the types"]
    assert rounds[2][:2] == ["2", f"inner-10.0@{MIX}"] and rounds[2][2].startswith("12% expected gain")
    terms = next(t for t in found.tables if t[0][0] == "term")
    assert [cell.strip() for cell in terms[1]] == ["embedding", "3.25", "0.5"]
    assert terms[2][:2] == ["cut inner", "2"]
    assert "It took 6.9 minutes." in found.text


@pytest.mark.parametrize("search", [None, {}, {"considered": 5, "measured": 1}])
def test_a_search_that_says_less_is_shown_too(search: Any, bare: None) -> None:
    text = Tags(page.render(searched(search=search))).text
    assert ("Searched 5 candidates by prediction, measured 1." in text) is bool(search)


def test_strings_of_a_search_stay_strings() -> None:
    report = searched()
    calm = {t for t, _ in Tags(page.render(report)).tags}
    report["search"] = hostile(report["search"])
    for c in report["candidates"]:
        c["id"] += HOSTILE
    report["selected"] += HOSTILE
    text = page.render(report)
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert {t for t, _ in Tags(text).tags} == calm


# ---------------------------------------------------------------- terminal


def test_the_terminal_marks_what_could_not_be_checked() -> None:
    text = render_table(searched())
    lines = text.splitlines()
    dense = next(i for i, line in enumerate(lines) if line.lstrip().startswith("dense@Q8_0"))
    assert lines[dense].endswith("  met ?")
    assert "? but the limit on energy could not be checked: nothing measured it" in lines
    assert "- The limit on energy (0.5 J/token, from command line) could not be checked" in text
    # every figure is whole: no column was cut for the long name
    assert "…" not in text and f"> inner-10.0@{MIX.split('+')[0]}" in " ".join(text.split())


def test_metered_energy_is_shown_with_its_meter(bare: None) -> None:
    limits = budget(energy_j=limit(0.5, "J/token"))
    rows = [candidate("dense@Q4_0", joules=0.4321), candidate("dense@Q8_0", joules=0.75, kl=0.01)]
    rows = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in rows]
    chosen = selection.select(limits, rows, lambda a, b: False)
    report = made(candidates=rows, budget=limits, chosen=chosen, context={})
    assert report["selected"] == "dense@Q4_0" and "± 0.5; 0.432 J per token by RAPL" in page.render(report)
    text = render_table(report)
    assert "dense@Q8_0 took 0.75 J per generated token by RAPL" in text and "?" not in text
    assert [c["meets"]["energy"] for c in report["candidates"]] == [True, False]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    browser = chromium.find()
    if browser is None:
        pytest.skip("no Chromium: install it (Debian: apt install chromium), or set CHROMIUM to its path")
    if not charts.available():
        pytest.skip("vl-convert-python is not installed")
    with chromium.open_page(browser) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_chromium_draws_a_searched_run(tab: chromium.Page, tmp_path: Path, width: int, scheme: str) -> None:
    tab.problems.clear()
    tab.look(width, scheme=scheme)
    tab.open(page.write(tmp_path, searched(20)))
    tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.problems == []
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run(WIDER) == [] and tab.run(CONTRAST) == []
    # a mix takes three lines rather than the width of the screen
    cell = "[...document.querySelectorAll('th .mix')].filter(e => e.getClientRects().length)[0]"
    assert tab.run(f"{cell}.closest('th').getBoundingClientRect().width") < 230
