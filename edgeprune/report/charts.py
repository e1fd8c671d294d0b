"""Charts of the report page: Vega-Lite specifications drawn to SVG, coloured by the page's own CSS variables.

Every colour is a CSS variable, so one drawing serves light and dark. A process of its own draws, all charts
of a page at once. What it gives back is cut down to shapes and text: no style, link or script of any kind can
come through.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Spec = dict[str, Any]

EXTRA = "report"  # the optional part of the package that draws
WIDE, NARROW = 508, 318  # CSS pixels: beside another chart, and on a phone
PATIENCE_S = 120.0  # of the clock, for all charts of a page; a second is usual
FLOOR = 1e-4  # nats per token; a logarithmic axis has no zero
MOST_GUESSED_NAMES = 6  # of points of predicted quality; with more of them none has its name beside it
_SVG = "http://www.w3.org/2000/svg"
_TAGS = {"svg", "g", "path", "line", "rect", "text", "tspan"}
_ATTRIBUTES = {
    *("d", "x", "y", "x1", "x2", "y1", "y2", "dx", "dy", "width", "height", "transform", "viewBox"),
    *("fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "fill-opacity", "opacity"),
    *("text-anchor", "font-size", "font-weight", "stroke-linejoin", "stroke-linecap", "stroke-miterlimit"),
}
_REORDER = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_PAINT = re.compile(r"var\(--[a-z0-9-]+\)|none|transparent|#[0-9a-fA-F]{3,8}|[a-z]+")


def available() -> bool:
    """Whether the drawing library is installed."""
    return importlib.util.find_spec("vl_convert") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One candidate in a chart of quality against something; `y` in nats per token."""

    name: str
    label: str  # beside the mark
    dense: bool
    x: float
    x_low: float | None = None
    x_high: float | None = None
    y: float | None = None  # None: planned only, quality not known
    y_low: float | None = None
    y_high: float | None = None
    x_measured: bool = True
    y_measured: bool = True
    marked: bool = False  # selected, or nearest when nothing fits

    @property
    def measured(self) -> bool:
        return self.x_measured and self.y_measured


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True, slots=True)
class Sheet:
    """A specification to draw; `label` is what a screen reader says instead."""

    spec: Spec
    label: str


class CannotDraw(Exception):
    """Nothing was drawn; the reason, to stand behind "charts are left out:"."""


def draw(sheets: Sequence[Sheet]) -> list[str]:
    """An inline SVG of each. Raises CannotDraw."""
    if not sheets:
        return []
    # text that XML cannot hold never reaches the renderer
    specs = json.dumps([_visible(sheet.spec) for sheet in sheets])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgeprune.report._draw"],
            input=specs.encode("ascii"),
            capture_output=True,
            cwd=Path(__file__).resolve().parents[2],  # found even when edgeprune is not installed
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CannotDraw(f"drawing them took more than {PATIENCE_S:g} s") from None
    except OSError as error:
        raise CannotDraw(f"the program that draws them did not start ({error.strerror or error})") from None
    try:
        if done.returncode != 0:
            raise ValueError
        drawn = [str(raw) for raw in json.loads(done.stdout)]
        return [clean(raw, visible(s.label)) for raw, s in zip(drawn, sheets, strict=True)]
    except (ValueError, TypeError, ElementTree.ParseError):
        raise CannotDraw(f"the program that draws them {_ending(done)}") from None


def _ending(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode == 0:
        return "gave no drawings"
    if done.returncode < 0:
        return f"was ended by signal {-done.returncode}, as happens when memory is refused to it"
    lines = [line.strip() for line in done.stderr[-4096:].decode("utf-8", "replace").splitlines()]
    said = visible([line for line in lines if line][-1])[:200] if any(lines) else ""
    return f"ended with exit code {done.returncode}" + (f": {said}" if said else "")


def _visible(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _visible(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_visible(v) for v in value]
    return visible(value) if isinstance(value, str) else value


def visible(text: str) -> str:
    """Text without what a terminal obeys, what reorders it, and what XML refuses."""
    return "".join("\ufffd" if _hidden(c) else c for c in text)


def _hidden(c: str) -> bool:
    kind = unicodedata.category(c)
    return (kind in ("Cc", "Cs", "Cn") and c not in "\n\t") or c in _REORDER


def clean(raw: str, label: str) -> str:
    """Keep shapes and text of an SVG; a mark's description becomes its tooltip."""
    root = ElementTree.fromstring(raw)
    made = _copy(root)
    assert made is not None
    made.set("role", "img")
    made.set("aria-label", label)
    for name in ("width", "height"):
        made.attrib.pop(name, None)
    width = root.get("width")
    if width is not None and "viewBox" not in made.attrib:
        made.set("viewBox", f"0 0 {width} {root.get('height')}")
    # the page is HTML5, where an inline svg element needs no namespace
    return ElementTree.tostring(made, encoding="unicode")


def _copy(node: ElementTree.Element) -> ElementTree.Element | None:
    tag = node.tag.removeprefix(f"{{{_SVG}}}")
    if tag not in _TAGS or node.get("display") == "none" or "background" in (node.get("class") or "").split():
        return None
    made = ElementTree.Element(tag)
    for name, value in node.attrib.items():
        if name in _ATTRIBUTES and not (name in ("fill", "stroke") and not _PAINT.fullmatch(value)):
            made.set(name, _short(value) if name in ("transform", "d") else value)
    made.text = node.text if tag in ("text", "tspan") else None
    about = node.get("aria-label")
    if about and node.get("aria-roledescription") in ("point", "bar", "circle"):
        ElementTree.SubElement(made, "title").text = about
    for child in node:
        copied = _copy(child)
        if copied is not None:
            made.append(copied)
    if tag == "g" and not len(made):
        return None
    return made


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a pixel."""
    return re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m.group()):.1f}", numbers)


def _config() -> Spec:
    return {
        "background": "transparent",
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--muted)",
            "titleColor": "var(--ink)",
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "gridColor": "var(--line)",
            "domainColor": "var(--axis)",
            "tickColor": "var(--axis)",
            "titlePadding": 8,
        },
    }


def _base(width: int, height: int, layers: Sequence[Spec]) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": width,
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": 4,
        "config": _config(),
        "layer": list(layers),
    }


# ---------------------------------------------------------------- quality against something


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def in_view(points: Sequence[Point], limit: float | None) -> tuple[list[Point], bool]:
    """Points that a chart of them shows, and whether it shows the limit."""
    judged = [p for p in points if p.y is not None]
    if not judged:
        return [], False
    x, near = _x_scale(judged, limit)
    return [p for p in points if x.low <= p.x <= x.high], near


def _x_scale(judged: Sequence[Point], limit: float | None) -> tuple[_Scale, bool]:
    """Room for every value and its name, and for the limit where it is near enough to be shown.

    Points of predicted quality get room where they are near those of measured quality.
    """
    sure = [p for p in judged if p.y_measured] or list(judged)
    values = [v for p in sure for v in (p.x, p.x_low, p.x_high) if v is not None]
    low, high = min(values), max(values)
    values += [p.x for p in judged if low / 1.5 <= p.x <= 1.5 * high]
    low, high = min(values), max(values)
    near = limit is not None and low / 2 <= limit <= 2 * high
    if near and limit is not None:
        low, high = min(low, limit), max(high, limit)
    pad = max(0.15 * (high - low), 0.02 * high) or 1.0
    return _Scale(max(0.0, low - pad), high + pad), near


def _y_scale(values: Sequence[float], limit: float | None) -> _Scale:
    shown = [max(FLOOR, v) for v in [*values, *([limit] if limit is not None else [])]]
    low, high = min(shown), max(shown)
    if high / low < 4:
        low, high = low / 2, high * 2
    return _Scale(max(FLOOR * 0.7, low / 1.4), high * 1.8, log=True)


def _heights(p: Point) -> list[float]:
    """Values that the axis has room for: an interval that is predicted may be wide, and ends at the frame."""
    known = [v for v in (p.y, p.y_low, p.y_high) if v is not None]
    if p.y_measured or p.y is None:
        return known
    return [min(max(v, p.y / 3), p.y * 3) for v in known]


def y_ticks(scale: _Scale, most: int = 7) -> list[float]:
    """1, 2, 5 steps of a logarithmic axis, or powers of ten where those are too many."""
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        inside = [t for t in ticks if scale.low <= t <= scale.high]
        if len(inside) <= most:
            return inside
    return inside


def quality_chart(
    points: Sequence[Point],
    *,
    x_title: str,
    x_unit: str,
    width: int,
    x_limit: float | None = None,
    x_limit_is: str = "most",
    y_limit: float | None = None,
) -> Spec | None:
    """Quality (KL, logarithmic, down is better) against bytes or speed; None without a point to show."""
    judged = [p for p in points if p.y is not None]
    if not judged:
        return None
    height = 330 if width >= WIDE else 320
    x, near = _x_scale(judged, x_limit)
    judged = [p for p in judged if x.low <= p.x <= x.high]
    y = _y_scale([v for p in judged for v in _heights(p)], y_limit)
    x_axis: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": x_title,
        "scale": {"domain": [x.low, x.high], "nice": False, "zero": False},
        "axis": {"tickCount": 5 if width >= WIDE else 4, "grid": False},
    }
    y_axis: Spec = {
        "field": "y",
        "type": "quantitative",
        "title": "KL, nats/token",
        "scale": {"type": "log", "domain": [y.low, y.high], "nice": False},
        "axis": {"values": y_ticks(y), "format": "~g", "domain": False, "ticks": False},
    }
    rows = [_row(p, x_unit, y) for p in judged]
    frame = {
        "data": {"values": [{"x": x.low, "y": y.low}]},
        "mark": {"type": "point", "opacity": 0, "aria": False},
    }
    layers: list[Spec] = [{**frame, "encoding": {"x": x_axis, "y": y_axis}}]
    layers += _limit_layers(x, y, x_limit if near else None, x_limit_is, x_unit, y_limit)
    layers += _lines(rows, x_limit_is == "least")
    layers += _marks(rows)
    rug = [_row(p, x_unit, y) for p in points if p.y is None and x.low <= p.x <= x.high]
    if rug:
        layers.append(
            {
                "data": {"values": rug},
                "mark": {**_HOLLOW, "size": 26, "stroke": "var(--predicted)", "strokeWidth": 1.2},
                "encoding": {
                    "x": {"field": "x", "type": "quantitative"},
                    "y": {"datum": y.low},
                    "description": {"field": "about"},
                },
            }
        )
    plot = (width - 62, height - 48)
    layers.append(_labels(judged, x, y, plot, x_limit if near else None))
    return _base(width, height, layers)


_HOLLOW: Spec = {"type": "point", "shape": "diamond", "filled": False, "opacity": 1}


def _row(p: Point, unit: str, y: _Scale) -> Spec:
    about = f"{p.name}: {p.x:.4g} {unit} {'measured' if p.x_measured else 'predicted'}"
    if p.x_low is not None and p.x_high is not None:
        about += f" ({p.x_low:.4g} to {p.x_high:.4g})"
    about += (
        ", quality not known"
        if p.y is None
        else f", KL {p.y:.4f} {'measured' if p.y_measured else 'predicted'}"
    )
    if not p.y_measured and p.y_low is not None and p.y_high is not None:
        about += f" ({p.y_low:.4f} to {p.y_high:.4f})"

    def clamp(v: float | None) -> float | None:
        return None if v is None else min(max(y.low, v), y.high)

    return {
        "x": p.x,
        # beside a predicted quality a second interval says little and covers much
        "x_low": p.x_low if p.y_measured else None,
        "x_high": p.x_high if p.y_measured else None,
        "y": clamp(p.y),
        "y_low": clamp(p.y_low),
        "y_high": clamp(p.y_high),
        "dense": p.dense,
        "measured": p.measured,
        "guessed": p.y is not None and not p.y_measured,
        "marked": p.marked,
        "about": about,
    }


def _limit_layers(
    x: _Scale, y: _Scale, x_limit: float | None, is_most: str, unit: str, y_limit: float | None
) -> list[Spec]:
    rule = {"type": "rule", "color": "var(--limit)", "strokeDash": [6, 4], "strokeWidth": 1.5}
    text = {"type": "text", "color": "var(--limit)", "fontSize": 12}
    out: list[Spec] = []
    if x_limit is not None:
        right = x.share(x_limit) > 0.5
        word = "limit" if is_most == "most" else "at least"
        shown = {"align": "right" if right else "left", "dx": -6 if right else 6, "baseline": "top", "dy": 2}
        data = {"values": [{"x": x_limit, "text": f"{word} {x_limit:.4g} {unit}"}]}
        place = {"x": {"field": "x", "type": "quantitative"}}
        out.append({"data": data, "mark": rule, "encoding": place})
        out.append(
            {
                "data": data,
                "mark": {**text, **shown},
                "encoding": {**place, "y": {"value": 0}, "text": {"field": "text"}},
            }
        )
    if y_limit is not None and y.low < y_limit < y.high:
        data = {"values": [{"y": y_limit, "text": f"limit KL {y_limit:g}"}]}
        place = {"y": {"field": "y", "type": "quantitative"}}
        out.append({"data": data, "mark": rule, "encoding": place})
        out.append(
            {
                "data": data,
                "mark": {**text, "align": "left", "baseline": "bottom", "dx": 4, "dy": -3},
                "encoding": {**place, "x": {"value": 0}, "text": {"field": "text"}},
            }
        )
    return out


def _xy() -> Spec:
    return {"x": {"field": "x", "type": "quantitative"}, "y": {"field": "y", "type": "quantitative"}}


def _front(rows: Sequence[Spec], more_is_better: bool) -> list[Spec]:
    """Rows that no other row beats in both x and y, by x."""
    best, out = math.inf, []
    for row in sorted(rows, key=lambda r: (-r["x"] if more_is_better else r["x"], r["y"])):
        if row["y"] < best:
            best = row["y"]
            out.append(row)
    return sorted(out, key=lambda r: float(r["x"]))


def _lines(rows: Sequence[Spec], more_is_better: bool) -> list[Spec]:
    """The dense model's line through its best quantizations, and the intervals."""
    dense = _front([r for r in rows if r["dense"] and r["measured"]], more_is_better)
    out: list[Spec] = []
    if len(dense) > 1:
        out.append(
            {
                "data": {"values": dense},
                "mark": {"type": "line", "color": "var(--dense)", "strokeWidth": 1.5, "opacity": 0.45},
                "encoding": {**_xy(), "order": {"field": "x", "type": "quantitative"}},
            }
        )
    for measured in (True, False):
        for dense_rows in (True, False):
            group = [r for r in rows if r["measured"] is measured and r["dense"] is dense_rows]
            color = f"var(--{'dense' if dense_rows else 'pruned'})"
            mark: Spec = {"type": "rule", "color": color, "strokeWidth": 1.4}
            if not measured:
                mark |= {"strokeDash": [2, 3], "strokeWidth": 1}
            for a, b in (("x", "y"), ("y", "x")):
                ends = [r for r in group if r[f"{a}_low"] is not None and r[f"{a}_high"] is not None]
                if ends:
                    spread = {
                        a: {"field": f"{a}_low", "type": "quantitative"},
                        f"{a}2": {"field": f"{a}_high"},
                        b: {"field": b, "type": "quantitative"},
                    }
                    out.append({"data": {"values": ends}, "mark": mark, "encoding": spread})
    return out


def _marks(rows: Sequence[Spec]) -> list[Spec]:
    out: list[Spec] = []
    # what is only predicted lies below what was measured
    for guessed, measured in ((True, False), (False, True), (False, False)):
        for dense in (True, False):
            kind = (guessed, measured, dense)
            group = [r for r in rows if (r["guessed"], r["measured"], r["dense"]) == kind]
            if not group:
                continue
            color = f"var(--{'dense' if dense else 'pruned'})"
            mark: Spec = {
                "type": "point",
                "shape": "circle" if dense else "triangle-up",
                "filled": True,
                "fill": color,
                "stroke": "var(--card)",
                "strokeWidth": 1,
                "size": 95 if dense else 105,
                "opacity": 1,
            }
            if not measured:
                mark = {**_HOLLOW, "fill": "var(--card)", "stroke": color, "strokeWidth": 1.8, "size": 80}
            about = {"description": {"field": "about"}}
            out.append({"data": {"values": group}, "mark": mark, "encoding": {**_xy(), **about}})
    marked = [r for r in rows if r["marked"]]
    if marked:
        ring = {"type": "point", "shape": "circle", "filled": False, "size": 330, "opacity": 1}
        ring |= {"stroke": "var(--accent)", "strokeWidth": 2.5}
        out.append({"data": {"values": marked}, "mark": ring, "encoding": _xy()})
    return out


def _labels(
    points: Sequence[Point], x: _Scale, y: _Scale, plot: tuple[int, int], limit: float | None
) -> Spec:
    """Names beside the marks where they cover neither a mark nor another name; the marked one first."""
    width, height = plot
    guessed = [p for p in points if not p.y_measured]
    at = {p.name: (x.share(p.x) * width, (1 - y.share(max(y.low, p.y or 0))) * height) for p in points}
    taken: list[Box] = [(cx - 7, cy - 7, cx + 7, cy + 7) for cx, cy in at.values()]
    for p in points:
        if p.x_low is not None and p.x_high is not None and p.y_measured:
            cy = at[p.name][1]
            taken.append((x.share(p.x_low) * width, cy - 2, x.share(p.x_high) * width, cy + 2))
    if limit is not None:
        at_limit = x.share(limit) * width
        taken.append((at_limit - 2, 0, at_limit + 2, height))
    rows = []
    for p in sorted(points, key=lambda p: (not p.marked, not p.y_measured, p.y or 0)):
        if not p.y_measured and len(guessed) > MOST_GUESSED_NAMES:
            continue
        cx, cy = at[p.name]
        long, far = (7.4 if p.marked else 6.8) * len(p.label), 13 if p.marked else 9
        places = {
            "left": (cx + far, cy - 7, cx + far + long, cy + 7),
            "right": (cx - far - long, cy - 7, cx - far, cy + 7),
            "above": (cx - long / 2, cy - far - 14, cx + long / 2, cy - far),
            "below": (cx - long / 2, cy + far, cx + long / 2, cy + far + 14),
        }
        for align, box in places.items():
            inside = box[0] >= 0 and box[1] >= 16 and box[2] <= width and box[3] <= height
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                rows.append((p, align, far))
                break
    layers = []
    for p, align, far in rows:
        mark: Spec = {"type": "text", "fontSize": 12, "color": "var(--ink)"}
        if p.marked:
            mark["fontWeight"] = 600
        if align in ("left", "right"):
            mark |= {"align": align, "baseline": "middle", "dx": far if align == "left" else -far}
        else:
            mark |= {
                "align": "center",
                "baseline": "middle",
                "dy": (far + 7) * (-1 if align == "above" else 1),
            }
        data = {"values": [{"x": p.x, "y": max(y.low, p.y or 0), "text": p.label}]}
        layers.append({"data": data, "mark": mark, "encoding": {**_xy(), "text": {"field": "text"}}})
    return {"layer": layers}


Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---------------------------------------------------------------- layers


def layer_chart(before: Sequence[int], after: Sequence[int], *, what: str, width: int) -> Spec:
    """What each decoder layer keeps, as bars inside the outline of what it had."""
    layers = range(1, len(before) + 1)
    rows = [
        {"layer": i, "had": b, "kept": a, "about": f"layer {i}: {a} of {b} {what} kept"}
        for i, b, a in zip(layers, before, after, strict=True)
    ]
    every = max(1, math.ceil(len(before) / (15 if width >= WIDE else 8)))
    x: Spec = {
        "field": "layer",
        "type": "ordinal",
        "title": "decoder layer",
        "scale": {"paddingInner": 0.18, "paddingOuter": 0.1},
        "axis": {"labelAngle": 0, "values": [i for i in layers if (i - 1) % every == 0], "ticks": False},
    }
    top = max(before, default=1) or 1
    y: Spec = {
        "field": "had",
        "type": "quantitative",
        "title": what,
        "scale": {"domain": [0, top], "nice": False},
        "axis": {"tickCount": 4 if top > 4 else top, "format": "d", "domain": False, "ticks": False},
    }
    had = {"type": "bar", "fill": "var(--gone)", "stroke": "var(--axis)", "strokeWidth": 0.6}
    kept = {"type": "bar", "fill": "var(--pruned)" if list(before) != list(after) else "var(--dense)"}
    chart = _base(
        width,
        190 if top > 16 else 140,
        [
            {"mark": had, "encoding": {"x": x, "y": y, "description": {"field": "about"}}},
            {
                "mark": kept,
                "encoding": {
                    "x": x,
                    "y": {"field": "kept", "type": "quantitative"},
                    "description": {"field": "about"},
                },
            },
        ],
    )
    return {**chart, "data": {"values": rows}}


# ---------------------------------------------------------------- memory


def memory_chart(
    parts: Iterable[tuple[str, int]], *, measured: int | None, limit: float | None, width: int
) -> Spec:
    """Parts of the predicted peak on one bar, the measured peak on another, and the limit across both."""
    rows, start = [], 0.0
    for name, value in parts:
        end = start + value / 1e6
        about = f"{name.replace('-', ' ')}: {value / 1e6:.1f} MB predicted"
        rows.append({"row": "predicted", "x": start, "x2": end, "color": f"var(--m-{name})", "about": about})
        start = end
    if limit is not None and start < limit / 1e6:
        about = f"headroom: {limit / 1e6 - start:.1f} MB"
        rows.append(
            {"row": "predicted", "x": start, "x2": limit / 1e6, "color": "var(--gone)", "about": about}
        )
    names = ["predicted"]
    if measured is not None:
        names.append("measured")
        about = f"peak: {measured / 1e6:.1f} MB measured"
        rows.append(
            {"row": "measured", "x": 0, "x2": measured / 1e6, "color": "var(--accent)", "about": about}
        )
    top = max([r["x2"] for r in rows if isinstance(r["x2"], float)], default=1.0)
    x: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": "MB",
        "scale": {"domain": [0, top * 1.02], "nice": False},
        "axis": {"tickCount": 5, "grid": False},
    }
    y: Spec = {"field": "row", "type": "nominal", "title": None, "sort": names}
    y["axis"] = {"domain": False, "ticks": False, "labelColor": "var(--ink)"}
    layers: list[Spec] = [
        {
            "data": {"values": rows},
            "mark": {"type": "bar", "height": 26, "stroke": "var(--card)", "strokeWidth": 1},
            "encoding": {
                "x": x,
                "x2": {"field": "x2"},
                "y": y,
                "fill": {"field": "color", "type": "nominal", "scale": None},
                "description": {"field": "about"},
            },
        }
    ]
    if limit is not None:
        rule = {"type": "rule", "color": "var(--limit)", "strokeDash": [6, 4], "strokeWidth": 1.5}
        layers.append(
            {
                "data": {"values": [{"x": limit / 1e6}]},
                "mark": rule,
                "encoding": {"x": {"field": "x", "type": "quantitative"}},
            }
        )
    return _base(width, 60 + 40 * len(names), layers)


def both(label: str, **specs: Spec | None) -> dict[str, Sheet] | None:
    """One chart for wide and narrow screens, or None where there is nothing to draw."""
    if any(spec is None for spec in specs.values()):
        return None
    return {name: Sheet(spec, label) for name, spec in specs.items() if spec is not None}
