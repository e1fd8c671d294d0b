"""report.html: what is on it, what a stranger's strings can do to it, and how Chromium draws it."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import pytest
from candidates import budget, candidate, dims, limit

from edgeprune import graph, selection
from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target
from edgeprune.records import (
    LayerShape,
    MemoryParts,
    ModeSpeed,
    PairedKL,
    PrunePlan,
    SampleSet,
    SampleText,
    TokenSet,
    to_plain,
)
from edgeprune.report import build as report_build
from edgeprune.report import charts, page

drawn = pytest.mark.skipif(not charts.available(), reason="vl-convert-python is not installed")
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e\x1b[31m"


def plan(name: str, ratio: float, n_ff: int) -> PrunePlan:
    shapes = tuple(LayerShape(n_heads=9, n_kv_heads=3, n_ff=n_ff - (i % 2) * 64) for i in range(30))
    return PrunePlan(
        id=name,
        metric="llm-bip",
        allocator="inner",
        requested_ratio=ratio,
        ratio=ratio,
        ratio_all=0.8 * ratio,
        uniform=False,
        kept={} if ratio == 0 else {"layers.0.ffn": (0,)},
        dims=dims() if ratio == 0 else _with(shapes),
        binding=None,
        key=f"plan-{name}",
    )


def _with(shapes: tuple[LayerShape, ...]) -> Any:
    import dataclasses

    return dataclasses.replace(dims(), layers=shapes)


def made(**over: Any) -> dict[str, Any]:
    """A report with a dense line, two pruned candidates, one only planned, samples and power modes."""
    import dataclasses

    parts = MemoryParts(
        weights_bytes=100_000_000,
        copies_bytes=0,
        kv_bytes=25_000_000,
        compute_bytes=4_000_000,
        runtime_bytes=20_000_000,
        target_bytes=0,
    )
    rows = [
        candidate("dense@Q8_0", memory=194_000_000, file=145_000_000, kl=0.005, tps=50.0),
        candidate("dense@Q4_0", memory=178_000_000, file=92_000_000, kl=0.19, tps=70.0, stderr=0.007),
        candidate("uniform-20.0@Q8_0", ratio=0.2, memory=170_000_000, file=120_000_000, kl=0.7, tps=60.0),
        candidate("uniform-40.0@Q8_0", ratio=0.4, memory=140_000_000, kl=None, error="differs from torch"),
        candidate("uniform-30.0@Q4_0", ratio=0.3, memory=None, predicted_memory=150_000_000),
    ]
    rows = [
        dataclasses.replace(c, predicted=dataclasses.replace(c.predicted, memory=parts), quantization=q)
        for c, q in zip(rows, ("Q8_0", "Q4_0", "Q8_0", "Q8_0", "Q4_0"), strict=True)
    ]
    limits = budget(200e6, decode_tps=limit(20.0, "tokens/s"), file_bytes=limit(150e6))
    rows = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in rows]
    chosen = selection.select(limits, rows, lambda a, b: False)
    rows = [dataclasses.replace(c, reason=chosen.reasons[c.id]) for c in rows]
    outputs = [
        SampleSet(
            source=source,
            chat=True,
            rows=(SampleText(prompt="What is up?", text=text, tokens=3, ended=False),),
            key="k",
        )
        for source, text in (("dense F16", "The sky."), ("uniform-20.0@Q8_0", "The the the."))
    ]
    evaluation = TokenSet(
        origin="sampled from the model",
        seed=7,
        n_samples=16,
        n_tokens=256,
        sha256="a" * 64,
        path="x",
        key="e",
    )
    target, _ = load_target("jetson-orin-nano-8gb")
    given: dict[str, Any] = {
        "command": ("edgeprune", "--target", target.name),
        "seed": 3,
        "target": target,
        "profile": load_profile("chat-2k"),
        "budget": limits,
        "name": "org/model",
        "graph": graph.graph_of(graph.find_family("llama"), dims()),
        "license_name": "apache-2.0",
        "parent_key": "parent",
        "candidates": rows,
        "chosen": chosen,
        "context": {
            "plans": [plan("dense", 0.0, 1536), plan("uniform-20.0", 0.2, 1216)],
            "samples": outputs,
            "evaluation": evaluation,
            "dense_perplexity": 9.85,
            "power_modes": [
                ModeSpeed(mode="15W", current=True, decode_tps=30, decode_tps_low=25, decode_tps_high=36),
                ModeSpeed(mode="25W", current=False, decode_tps=60, decode_tps_low=50, decode_tps_high=72),
            ],
            "against_selected": {
                "dense@Q4_0": PairedKL(difference=0.185, low=0.17, high=0.2, paired=True),
                "uniform-20.0@Q8_0": PairedKL(difference=0.695, low=0.6, high=0.8, paired=True),
            },
        },
    }
    report = report_build.build(**{**given, **over})
    # as it is read back
    return json.loads(json.dumps(report))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables:
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ---------------------------------------------------------------- what is on it


@drawn
def test_the_page_says_everything_once_over() -> None:
    report = made()
    text = page.render(report)
    assert len(text.encode()) < page.MOST_BYTES
    found = Tags(text)
    heads = [a for t, a in found.tags if t == "h1"]
    assert len(heads) == 1 and report["headline"] in found.text
    assert report["headline"].startswith("Do not prune: the dense model at Q8_0")
    for part in (
        "limit memory: 200 MB",
        "194 MB",
        "0.005 nats/token",
        "The board would decode 2.0x as fast in power mode 25W",
        "dense F16 The sky. …",
        "uniform-20.0@Q8_0 The the the. …",
        "20.0% of the decoder layers' parameters, 16.0% of all",
        "failed: differs from torch",
        "1 more were planned and not measured",
        "llama-server -m artifacts/dense@Q8_0.gguf",
        "edgeprune --target jetson-orin-nano-8gb",
        "KL +0.1850 against the selected one (95% interval +0.1700 to +0.2000)",
        "seed 7",
    ):
        assert part.lower() in found.text.lower(), part
    # memory, speed, file, two of layers, parts: each for wide and narrow screens
    assert sum(t == "svg" for t, _ in found.tags) == 12


@drawn
def test_nothing_on_the_page_can_run_or_ask_for_anything() -> None:
    found = Tags(page.render(made()))
    names = {t for t, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "img", "base", "use", "image"}
    assert [a["href"] for t, a in found.tags if t == "link"] == ["data:,"]
    for tag, attributes in found.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")
        ]
        if "href" in attributes and tag == "a":
            assert (attributes["href"] or "").startswith("#")
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/]{43}='; img-src data:; "
        r"base-uri 'none'; form-action 'none'",
        policy,
    )


def hostile(value: Any) -> Any:
    """Every string of a report that may come from outside, replaced."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


@drawn
def test_strings_of_strangers_stay_strings() -> None:
    report = made()
    for part in ("model", "samples", "headline", "launch", "command", "versions", "answers", "missed"):
        report[part] = hostile(report[part])
    report["target"]["title"] += HOSTILE
    report["profile"]["name"] += HOSTILE
    report["evaluation"]["origin"] += HOSTILE
    for mode in report["power_modes"]:
        mode["mode"] += HOSTILE
    for c in report["candidates"]:
        for name in ("id", "quantization", "reason"):
            c[name] += HOSTILE
        if c["measured"]:
            c["measured"]["on"] += HOSTILE
    report["selected"] += HOSTILE
    text = page.render(report)
    assert "<script" not in text and "<img" not in text and "onerror=alert" in text
    calm, found = Tags(page.render(made())), Tags(text)
    assert {t for t, _ in found.tags} == {t for t, _ in calm.tags}
    assert not [1 for _, a in found.tags for name in a if name.startswith("on")]
    # what a terminal would obey, and what turns text around
    assert "\x1b" not in text and "\u202e" not in text


def test_predicted_and_measured_share_no_column() -> None:
    table = next(t for t in Tags(page.render(made())).tables if "removed," in t[0][1])
    head = [cell.strip() for cell in table[1]]
    assert head == [
        *("file, MB", "memory, MB", "decode, t/s"),
        *("file, MB", "memory, MB", "decode, t/s", "KL, nats/token", "perplexity"),
    ]
    first = [cell.strip() for cell in table[2]]
    assert first[0].startswith("dense@Q8_0") and first[2:5] == ["145.0", "149.0", "38 to 58"]
    assert first[5:10] == ["145.0", "194.0", "50.0±0.5", "0.0050±0.0010", "20.00±1.00"]
    planned = next(
        row
        for t in Tags(page.render(made())).tables
        for row in t
        if row[0] == "uniform-30.0@Q4_0" and len(row) == 10
    )
    assert [cell.strip() for cell in planned[5:10]] == ["-"] * 5


def test_without_the_library_the_page_has_tables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with_charts = page.digest(made())
    monkeypatch.setattr(charts, "available", lambda: False)
    text = page.render(made())
    assert "<svg" not in text and "pip install 'edgeprune[report]'" in Tags(text).text
    assert "KV cache, whole context" in text
    if charts.importlib.util.find_spec("vl_convert"):
        assert page.digest(made()) != with_charts  # so that it is drawn once the library is there


BY_SIGNAL = "was ended by signal 6, as happens when memory is refused to it"


def starved(folder: Path, kib: int) -> str:
    """A Python whose processes may not map more than this."""
    path = folder / "starved"
    path.write_text(f'#!/bin/sh\nulimit -v {kib} || exit 9\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@drawn
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on mapped memory")
def test_a_page_is_written_when_drawing_has_no_memory(
    run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drawing library ends its whole process then: not this one."""
    (tmp_path / "report.json").write_text(json.dumps(report_build.sealed(made())), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", starved(tmp_path, 250_000))
        ran = run_cli("report", tmp_path, "--html")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'report.html'}\n")
    why = r"the program that draws them was ended by signal \d+, as happens when memory is refused to it"
    assert re.fullmatch(rf"report\.html has no charts: {why}\n", ran.err), ran.err
    found = Tags((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert re.search(rf"Charts are left out: {why}\. Every figure is in the tables\.", found.text)
    assert not [t for t, _ in found.tags if t == "svg"] and "KV cache, whole context" in found.text
    # the same report later, with memory: the page is made again
    again = run_cli("report", tmp_path, "--html")
    assert (again.code, again.out, again.err) == (0, ran.out, "")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") == 12


@drawn
def test_a_page_is_written_when_drawing_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "PATIENCE_S", 0.01)
    said: list[str] = []
    text = page.write(tmp_path, made(), say=said.append).read_text(encoding="utf-8")
    assert said == ["report.html has no charts: drawing them took more than 0.01 s"]
    assert "Charts are left out: drawing them took more than 0.01 s. Every" in text and "<svg" not in text


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo '[]'", "the program that draws them gave no drawings"),
        ("echo nonsense", "the program that draws them gave no drawings"),
        ("echo 'a\033[2Jb' >&2; exit 3", "the program that draws them ended with exit code 3: a\ufffd[2Jb"),
        ("kill -6 $$", f"the program that draws them {BY_SIGNAL}"),
        (None, "the program that draws them did not start (No such file or directory)"),
    ],
)
def test_why_nothing_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str
) -> None:
    program = tmp_path / "python"
    if script is not None:
        program.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(charts.CannotDraw) as raised:
        charts.draw([charts.Sheet({}, "a chart")])
    assert str(raised.value) == why


def test_a_run_that_found_nothing_has_a_page() -> None:
    limits = budget(10e6)
    rows = [candidate("dense@Q4_0", memory=None, predicted_memory=149_000_000)]
    chosen = selection.select(limits, rows, lambda a, b: False)
    report = made(budget=limits, candidates=rows, chosen=chosen, context={})
    found = Tags(page.render(report)).text
    assert "Nothing fits the budget. Nearest: dense@Q4_0" in found
    assert "No candidate was measured: every one was predicted to miss a limit." in found
    assert "The smallest candidate, dense@Q4_0, needs 149 MB (predicted)." in found


def test_sections_of_later_work_appear_when_the_report_has_them() -> None:
    report = made()
    text = Tags(page.render(report)).text
    assert "Recovery" not in text and "Texts and tasks" not in text
    report["recoveries"] = {
        "uniform-20.0": {
            **{"method": "lora", "objective": "kl", "text": "made up", "steps": 100, "tokens": 51200},
            **{"seconds": 90.0, "stopped": "time", "validation_tokens": 2048, "kept": True, "note": "so so"},
            **{"kl_before": 0.7, "kl_after": 0.5},
        }
    }
    pair = {"reference": 0.7, "difference": -0.02, "low": -0.05, "high": 0.01, "p_value": 0.2}
    report["benchmarks"] = {
        "path": "artifacts/x.gguf",
        "texts": [{"text": "wikitext2", "window": 2048, "tokens": 8192, "value": 24.1, "stderr": 0.5}],
        "tasks": [
            {
                **{"task": "piqa", "items": 200, "of": 1838},
                "metrics": {"acc": {"value": 0.68, "stderr": 0.03}},
            }
        ],
        "against": {
            "path": "dense",
            "texts": [{"text": "wikitext2", "window": 2048, "reference": 21.8}],
            "tasks": [{"task": "piqa", "metrics": {"acc": pair}}],
        },
    }
    text = Tags(page.render(report)).text
    assert "Recovery" in text and "uniform-20.0 lora kl 51200 1.5 0.7000 0.5000 yes so so" in text
    assert "wikitext2, windows of 2048 tokens: perplexity 8192 24.10±0.50 21.80 - -" in text
    assert "piqa: acc, % 200 68.00±3.00 70.00 -2.000 points -5.000 to +1.000" in text
    report["benchmarks"]["against"] = None
    assert "piqa: acc, % 200 68.00±3.00 - - -" in Tags(page.render(report)).text


def test_the_page_is_written_once_per_report(tmp_path: Path) -> None:
    report = made()
    path = page.write(tmp_path, report)
    before = path.stat().st_mtime_ns
    assert page.write(tmp_path, report).stat().st_mtime_ns == before
    changed = {**report, "headline": "Another answer."}
    page.write(tmp_path, changed)
    assert "Another answer." in path.read_text(encoding="utf-8")


def test_the_verb_writes_the_page_anew(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report_build.sealed(made())), encoding="utf-8")
    ran = run_cli("report", tmp_path, "--html")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'report.html'}\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    broken = made()
    del broken["model"]["parameters"]
    (tmp_path / "report.json").write_text(json.dumps(report_build.sealed(broken)), encoding="utf-8")
    ran = run_cli("report", tmp_path, "--html")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"Error: {tmp_path / 'report.json'} cannot be shown: ")


def test_reports_of_older_versions_are_shown() -> None:
    report = made()
    for name in ("scores", "answers", "samples", "power_modes", "against_selected", "threads", "vocabulary"):
        report.pop(name, None)
    for c in report["candidates"]:
        c["predicted"].pop("memory")
    assert report["headline"] in Tags(page.render(report)).text


# ---------------------------------------------------------------- charts


def point(name: str, **over: Any) -> charts.Point:
    return charts.Point(**{"name": name, "label": name, "dense": True, "x": 100.0, "y": 0.1, **over})


def test_a_logarithmic_axis_has_few_ticks() -> None:
    assert charts.y_ticks(charts._Scale(0.5, 6.0, log=True)) == [0.5, 1.0, 2.0, 5.0]
    assert charts.y_ticks(charts._Scale(1e-4, 3.0, log=True)) == [1e-4, 1e-3, 1e-2, 0.1, 1.0]


def test_the_dense_line_joins_what_nothing_beats() -> None:
    rows = [{"x": 1.0, "y": 5.0}, {"x": 2.0, "y": 6.0}, {"x": 3.0, "y": 1.0}]
    assert charts._front(rows, more_is_better=False) == [rows[0], rows[2]]
    assert charts._front(rows, more_is_better=True) == [rows[2]]


def test_a_limit_far_away_is_not_drawn() -> None:
    points = [point("a"), point("b", x=120.0), point("c", x=900.0, y=None)]
    assert charts.in_view(points, 130.0) == (points[:2], True)
    assert charts.in_view(points, 6000.0) == (points[:2], False)
    assert charts.in_view(points[2:], 130.0) == ([], False)
    assert charts.quality_chart(points[2:], x_title="x", x_unit="MB", width=charts.WIDE) is None


@drawn
def test_predicted_points_are_drawn_hollow_with_their_interval() -> None:
    points = [point("a"), point("b", x=120.0, x_low=80.0, x_high=160.0, x_measured=False, y=0.3)]
    spec = charts.quality_chart(points, x_title="x", x_unit="tokens/s", width=charts.WIDE)
    assert spec is not None
    (svg,) = charts.draw([charts.Sheet(spec, "a chart")])
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert titles == [
        "a: 100 tokens/s measured, KL 0.1000 measured",
        "b: 120 tokens/s predicted (80 to 160), KL 0.3000 measured",
    ]
    hollow = svg[svg.index("b: 120") - 400 : svg.index("b: 120")]
    assert 'fill="var(--card)" stroke="var(--dense)"' in hollow
    assert 'stroke-dasharray="2,3"' in svg


def test_only_shapes_and_text_come_through() -> None:
    raw = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9" '
        'height="5"><style>*{}</style><script>x()</script><g onclick="x()"><path d="M0.123456,1" '
        'fill="url(#a)" style="x" stroke="var(--ink)"/></g><image xlink:href="http://x/"/>'
        '<a href="javascript:x"><text>t</text></a>'
        '<text fill="red;x">a&lt;b</text><foreignObject><p>p</p></foreignObject></svg>'
    )
    assert charts.clean(raw, 'say "this"') == (
        '<svg role="img" aria-label="say &quot;this&quot;" viewBox="0 0 9 5">'
        '<g><path d="M0.1,1" stroke="var(--ink)" /></g><text>a&lt;b</text></svg>'
    )


# ---------------------------------------------------------------- in a browser

BROWSER = chromium.find()
CONTRAST = """
(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = c => { const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const under = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.tagName === 'title') continue;
    const s = getComputedStyle(e), ink = parse(e instanceof SVGElement ? s.fill : s.color);
    const a = light(ink), b = light(under(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${e.tagName} '${e.textContent.trim().slice(0, 30)}' ${ratio.toFixed(2)}`);
  }
  return bad;
})()
"""
# what is wider than the window and does not scroll in a region of its own
WIDER = """
[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length
  && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll'))
  .map(e => e.tagName + '.' + e.className)
"""
FOCUS = (
    "document.activeElement.tagName + ' ' + (document.activeElement.getAttribute('href')"
    " || document.activeElement.getAttribute('aria-label')"
    " || document.activeElement.textContent.slice(0, 40))"
)


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    if BROWSER is None:
        pytest.skip("no Chromium: install it (Debian: apt install chromium), or set CHROMIUM to its path")
    if not charts.available():
        pytest.skip("vl-convert-python is not installed")
    with chromium.open_page(BROWSER) as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    page.write(folder, made())
    return folder / page.FILE_NAME


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_chromium_draws_it(tab: chromium.Page, place: Path, width: int, scheme: str) -> None:
    tab.problems.clear()
    tab.requests.clear()
    tab.look(width, scheme=scheme)
    tab.open(place)
    tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.problems == []
    assert tab.requests == [place.as_uri()]
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run(WIDER) == []
    assert tab.run(CONTRAST) == []
    sizes = tab.run(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())"
        ".filter(r => r.width).map(r => [r.width, r.height])"
    )
    assert len(sizes) == 6 and all(w > 250 and h > 80 for w, h in sizes)
    # text in a chart is as large as it says: the drawing is not shrunk
    scale = tab.run(
        "[...document.querySelectorAll('svg')].filter(s => s.getClientRects().length)"
        ".map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert all(0.9 < s < 1.2 for s in scale)
    # the colours arrive: marks are painted with the scheme's own
    blue = tab.run(
        "getComputedStyle([...document.querySelectorAll('svg path')].find(p =>"
        " p.getAttribute('fill') === 'var(--dense)' && p.getClientRects().length)).fill"
    )
    assert blue == {"light": "rgb(47, 85, 180)", "dark": "rgb(143, 176, 255)"}[scheme]


def test_everything_is_reached_with_the_keyboard(tab: chromium.Page, place: Path) -> None:
    tab.look(1440)
    tab.open(place)
    seen: list[str] = []
    for _ in range(60):
        tab.press("Tab", 9)
        now = tab.run(FOCUS)
        if now.startswith("BODY") or (seen and now == seen[0]):
            break
        seen.append(now)
    assert seen[0] == "A #answer"
    links = tab.run("[...document.querySelectorAll('nav a')].map(a => 'A ' + a.getAttribute('href'))")
    assert seen[1 : 1 + len(links)] == links and "A #samples" in links
    assert [s for s in seen if s.startswith("SUMMARY Figures")] == ["SUMMARY Figures of this chart"] * 3
    assert "DIV Measured candidates" in seen and "DIV Memory by part" in seen
    # a summary opens with the keyboard, and its table can then be scrolled with it
    tab.run("document.querySelector('summary').focus()")
    tab.press("Enter", 13)
    tab.call("Input.dispatchKeyEvent", type="char", text="\r")
    assert tab.run("document.querySelector('details').open") is True
    tab.press("Tab", 9)
    assert tab.run(FOCUS) == "DIV Figures of the chart: Quality against memory"
    # what has the focus shows it
    assert float(tab.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")) >= 2


def test_a_hostile_report_in_chromium(tab: chromium.Page, tmp_path: Path) -> None:
    report = made()
    for part in ("model", "samples", "headline", "answers"):
        report[part] = hostile(copy.deepcopy(report[part]))
    for c in report["candidates"]:
        c["quantization"] += HOSTILE
    tab.problems.clear()
    tab.requests.clear()
    tab.look(390)
    tab.open(page.write(tmp_path, report))
    assert tab.problems == [] and len(tab.requests) == 1
    assert tab.run("document.documentElement.scrollWidth") == 390
    assert to_plain(tab.run("document.querySelectorAll('script, img').length")) == 0
