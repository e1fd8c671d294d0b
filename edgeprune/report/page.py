"""report.html: one file that opens without a network, made from report.json alone.

Everything in a report may come from a stranger (model names, generated text, device strings), so the template
escapes all of it and the page's policy allows its own style sheet and nothing else: no script, no request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgeprune import rundir
from edgeprune.errors import ConfigError
from edgeprune.report import charts
from edgeprune.report.answers import doubt_lines, search_line
from edgeprune.units import format_bytes

FILE_NAME = "report.html"
MOST_BYTES = 2_000_000
_PARTS = (
    ("weights", "weights"),
    ("copies", "weights in a second layout"),
    ("kv", "KV cache, whole context"),
    ("compute", "compute buffer"),
    ("runtime", "tokenizer and runtime"),
    ("target", "the target's own runtime"),
)
_VERDICTS = {
    "do-not-prune": "Do not prune",
    "prune": "Prune",
    "nothing-fits": "Nothing fits",
}
_MOST_GUESSED = 60  # points of predicted quality in a chart
_MOST_PLANNED = 300  # rows of candidates that were only planned
_MOST_TEXT = 2000  # characters of one sample output

Row = Mapping[str, Any]


def file_name(label: str | None) -> str:
    """report.html, or that of a further target of the same run."""
    return FILE_NAME if label is None else f"report-{label}.html"


def write(
    run_dir: Path,
    report: Mapping[str, Any],
    label: str | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write report.html into a run folder, atomically; one that shows this very report already is kept.

    Where the charts cannot be drawn the page is written without them, `say` is told, and the next call tries
    again.
    """
    path = run_dir / file_name(label)
    if not _is_of(path, digest(report)):
        text, undrawn = _render(report)
        with rundir.friendly_disk_errors(run_dir):
            rundir.write_text(path, text)
        if undrawn is not None and say is not None:
            say(f"{path.name} has no charts: {undrawn}")
    return path


def write_checked(
    run_dir: Path,
    report: Mapping[str, Any],
    label: str | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Path:
    """As `write`, for a report.json that may have been damaged. Raises ConfigError."""
    try:
        return write(run_dir, report, label, say=say)
    except (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{run_dir / 'report.json'} cannot be shown: {error}",
            "the file is damaged; run the command that made it again",
        ) from error


def digest(report: Mapping[str, Any]) -> str:
    """What a page is made from: the report, style and template, and whether charts can be drawn."""
    parts = [_text("report.css"), _text("report.html.j2"), str(charts.available())]
    text = json.dumps([report, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_of(path: Path, wanted: str) -> bool:
    try:
        with path.open(encoding="utf-8") as f:
            return f'content="{wanted}"' in f.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def render(report: Mapping[str, Any]) -> str:
    """The page as text, charts drawn where the library for it is installed and works."""
    return _render(report)[0]


def _render(report: Mapping[str, Any]) -> tuple[str, str | None]:
    """The page, and why drawing its charts failed."""
    css = _text("report.css")
    style = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    context = _context(report)
    undrawn = context["left_out"] if charts.available() else None
    text = (
        _environment()
        .get_template("report.html.j2")
        .render(
            **context,
            css=Markup(css),  # our own file; its hash is in the page's policy
            policy=f"default-src 'none'; style-src 'sha256-{style}'; img-src data:; "
            "base-uri 'none'; form-action 'none'",
            # another digest where drawing failed, so that it is tried again
            digest=digest(report) + ("" if undrawn is None else "-undrawn"),
        )
    )
    return text, undrawn


def _text(name: str) -> str:
    return (
        importlib.resources.files("edgeprune.report").joinpath("templates").joinpath(name).read_text("utf-8")
    )


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeprune.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters.update(
        bytes=lambda v: "-" if v is None else format_bytes(v),
        mb=lambda v: "-" if v is None else f"{v / 1e6:.1f}",
        number=lambda v, digits=2: "-" if v is None else f"{v:.{digits}f}",
        percent=lambda v, digits=1: "-" if v is None else f"{100 * v:.{digits}f}",
        short=_short,
        plain=_plain,
        breaks=_breaks,
    )
    return made


def _breaks(name: str) -> str | Markup:
    """A name that ends in a mix of types may wrap before each of them; others stay on one line."""
    if "+" not in name:
        return name
    # Markup passes `_shown` by, so what it does is done here
    parts = charts.visible(name).replace("@", "@\n").split("+")
    made = Markup("<wbr>+").join(parts).replace("\n", Markup("<wbr>"))
    return Markup('<span class="mix">') + made + Markup("</span>")


def _shown(value: Any) -> Any:
    """Every string of the page, without what reorders or hides text."""
    return charts.visible(value) if type(value) is str else value


def _short(text: Any) -> str:
    """Generated text, not endless."""
    shown = str(text)
    return shown if len(shown) <= _MOST_TEXT else shown[:_MOST_TEXT] + " ..."


def _plain(value: Any) -> str:
    """A value of a record for a table cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return str(value)


# ---------------------------------------------------------------- what the template gets


# what reports of older versions lack
_OPTIONAL = ("scores", "calibration", "evaluation", "target_choice", "dense_perplexity", "threads", "nearest")


def _context(report: Mapping[str, Any]) -> dict[str, Any]:
    report = {**dict.fromkeys(_OPTIONAL), **report}
    rows: Sequence[Row] = report["candidates"]
    by_id = {c["id"]: c for c in rows}
    selected = by_id.get(report["selected"])
    shown = selected or by_id.get(report.get("nearest"))
    tried = [c for c in rows if c["measured"] is not None or c["error"] is not None]
    answers = list(report.get("answers") or ())
    cut = _cut(report, shown)
    left_out, drawn = None, None
    try:
        drawn = _charts(report, rows, shown, cut)
    except charts.CannotDraw as error:
        left_out = str(error)
    return {
        "report": report,
        "shown": shown,
        "selected": selected,
        "verdict": next((_VERDICTS[a["code"]] for a in answers if a["code"] in _VERDICTS), None),
        "answers": answers,
        "charts": drawn,
        "left_out": left_out,
        "cut": cut,
        "memory": _memory(report, shown),
        "measured_rows": [_table_row(report, c) for c in tried],
        "planned": len(rows) - len(tried),
        "planned_rows": [_table_row(report, c) for c in rows if c not in tried][:_MOST_PLANNED],
        "samples": _samples(report),
        "command": shlex.join(str(part) for part in report["command"]),
        "limits": {name: _limit(limit) for name, limit in report["budget"].items()},
        "recoveries": dict(report.get("recoveries") or {}),
        "benchmarks": _benchmarks(report),
        "vocabulary": report.get("vocabulary"),
        "power_modes": list(report.get("power_modes") or ()),
        "doubts": doubt_lines(report),
        "bundle": _bundle(report),
        "targets": list(report.get("targets") or ()),
        "guessed": any(c["predicted"].get("kl") is not None for c in rows),
        "search": _search(report),
        "search_line": search_line(report),
    }


def _bundle(report: Mapping[str, Any]) -> str:
    """The folder that holds what to ship for this report's target."""
    rows = report.get("targets") or ()
    name = next((r["report"] for r in rows if r["target"] == report["target"]["name"]), "report.json")
    return str(name).removesuffix(".json").replace("report", "bundle", 1)


def _limit(limit: Row) -> str:
    if limit["unit"] == "bytes":
        return format_bytes(limit["value"])
    return f"{limit['value']:g} {limit['unit']}"


def _search(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is folded below the sentence on the search; parts that a run did not have are empty."""
    found = report.get("search") or {}
    return {
        "seconds": found.get("seconds"),
        "rounds": list(found.get("rounds") or ()),
        "terms": dict((found.get("model") or {}).get("terms") or {}),
    }


def _benchmarks(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Perplexities and accuracies of the selected file, one row each, beside the dense parent's."""
    found = report.get("benchmarks")
    if not found:
        return []
    against = found.get("against") or {}
    out = []
    for i, text in enumerate(found["texts"]):
        other = against["texts"][i] if against else {}
        row = {"what": f"{text['text']}, windows of {text['window']} tokens: perplexity", "percent": False}
        row |= {"count": text["tokens"], "value": text["value"], "stderr": text["stderr"]}
        # a difference of log-likelihoods: the ratio of the perplexities less one
        parts = {k: other.get(k) for k in ("nll_difference", "low", "high")}
        row |= {"dense": other.get("reference"), "unit": "nats/token", "difference": parts["nll_difference"]}
        out.append(row | {"low": parts["low"], "high": parts["high"]})
    for i, task in enumerate(found["tasks"]):
        for name, m in task["metrics"].items():
            other = against["tasks"][i]["metrics"][name] if against else {}
            row = {"what": f"{task['task']}: {name}, %", "percent": True, "count": task["items"]}
            row |= {"value": 100 * m["value"], "stderr": 100 * m["stderr"], "unit": "points"}
            paired = {k: other.get(k) for k in ("reference", "difference", "low", "high")}
            scaled = {k: None if v is None else 100 * v for k, v in paired.items()}
            out.append(row | {"dense": scaled.pop("reference"), **scaled})
    return out


def _table_row(report: Mapping[str, Any], c: Row) -> dict[str, Any]:
    pair = (report.get("against_selected") or {}).get(c["id"])
    return {
        "c": c,
        "mark": "selected"
        if c["id"] == report["selected"]
        else "tie"
        if c["id"] in report["ties"]
        else "nearest"
        if c["id"] == report.get("nearest")
        else "",
        "pair": pair,
    }


def _samples(report: Mapping[str, Any]) -> dict[str, Any] | None:
    sets = [s for s in report.get("samples") or () if s["rows"]]
    if not sets:
        return None
    prompts = [row["prompt"] for row in sets[0]["rows"]]
    return {
        "chat": sets[0]["chat"],
        "prompts": [
            {
                "prompt": prompt,
                "outputs": [{"source": s["source"], **s["rows"][i]} for s in sets if i < len(s["rows"])],
            }
            for i, prompt in enumerate(prompts)
        ],
    }


# ---------------------------------------------------------------- what was cut, memory


def _cut(report: Mapping[str, Any], shown: Row | None) -> dict[str, Any] | None:
    """Widths per layer before and after: of the selected plan, else of the best pruned candidate."""
    plans = {p["id"]: p for p in report.get("plans") or ()}
    dense = plans.get("dense")
    pruned = [c for c in report["candidates"] if c["ratio"] > 0 and c["quality"] is not None]
    of = shown if shown is not None and shown["ratio"] > 0 else None
    if of is None and pruned:
        of = min(pruned, key=lambda c: float(c["quality"]["kl"]))
    plan = plans.get(of["plan"]) if of is not None else None
    if dense is None or plan is None or of is None or len(dense["layers"]) != len(plan["layers"]):
        return None
    before, after = dense["layers"], plan["layers"]
    return {
        "candidate": of["id"],
        "is_selected": of["id"] == report["selected"],
        "ratio": plan["ratio"],
        "ratio_all": plan["ratio_all"],
        "kv": ([layer[1] for layer in before], [layer[1] for layer in after]),
        "ffn": ([layer[2] for layer in before], [layer[2] for layer in after]),
        "rows": [
            {"layer": i + 1, "kv": (b[1], a[1]), "heads": (b[0], a[0]), "ffn": (b[2], a[2])}
            for i, (b, a) in enumerate(zip(before, after, strict=True))
        ],
    }


def _memory(report: Mapping[str, Any], shown: Row | None) -> dict[str, Any] | None:
    if shown is None or not shown["predicted"].get("memory"):
        return None
    parts = shown["predicted"]["memory"]
    limit = report["budget"].get("memory")
    peak = shown["predicted"]["peak_memory_bytes"]
    measured = (shown["measured"] or {}).get("peak_memory_bytes")
    own = shown["predicted"].get("runtime_bytes", 0)
    value = None if limit is None else limit["value"]
    return {
        "candidate": shown["id"],
        "parts": [
            {"name": name, "title": title, "bytes": parts[f"{name}_bytes"]}
            for name, title in _PARTS
            if parts[f"{name}_bytes"]
        ],
        "predicted": peak,
        "measured": measured,
        "on": (shown["measured"] or {}).get("on"),
        "own": own,
        "limit": value,
        "headroom_predicted": None if value is None else value - peak,
        "headroom_measured": None if value is None or measured is None else value - measured - own,
    }


# ---------------------------------------------------------------- charts


def _charts(
    report: Mapping[str, Any], rows: Sequence[Row], shown: Row | None, cut: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Every chart of the page, drawn. Raises CannotDraw."""
    if not charts.available():
        raise charts.CannotDraw(
            "the library that draws them is not installed (pip install 'edgeprune[report]')"
        )
    marked = None if shown is None else shown["id"]
    budget = report["budget"]

    def limit(name: str, scale: float = 1.0) -> float | None:
        return budget[name]["value"] / scale if name in budget else None

    out: list[dict[str, Any]] = []
    plots: tuple[tuple[str, str, str, list[charts.Point | None], dict[str, Any]], ...] = (
        (
            "memory",
            "Quality against memory",
            "KL divergence against peak memory",
            [_memory_point(c, marked) for c in rows],
            {"x_title": "peak memory, MB", "x_unit": "MB", "x_limit": limit("memory", 1e6)},
        ),
        (
            "speed",
            "Quality against speed",
            "KL divergence against decode speed",
            [_speed_point(c, marked) for c in rows],
            {
                "x_title": "decode speed, tokens/s",
                "x_unit": "tokens/s",
                "x_limit": limit("decode_speed"),
                "x_limit_is": "least",
            },
        ),
        (
            "file",
            "Quality against file size",
            "KL divergence against file size",
            [_file_point(c, marked) for c in rows] if "file" in budget else [],
            {"x_title": "file, MB", "x_unit": "MB", "x_limit": limit("file", 1e6)},
        ),
    )
    for name, title, about, points, settings in plots:
        known = _fewer([p for p in points if p is not None])
        drawn = charts.both(
            f"Chart: {about} of {len([p for p in known if p.y is not None])} candidates. "
            "The figures are in the tables below.",
            wide=charts.quality_chart(known, width=charts.WIDE, y_limit=limit("kl"), **settings),
            narrow=charts.quality_chart(known, width=charts.NARROW, y_limit=limit("kl"), **settings),
        )
        if drawn is not None:
            seen, near = charts.in_view(known, settings["x_limit"])
            out.append(
                {
                    "name": name,
                    "title": title,
                    "points": sorted(known, key=lambda p: (p.y is None, p.y or 0, p.x)),
                    "unit": settings["x_unit"],
                    "dense": any(p.dense and p.y is not None for p in seen),
                    "pruned": any(not p.dense and p.y is not None for p in seen),
                    "planned": any(p.y is None for p in seen),
                    "predicted": any(p.y is not None and p.y_measured and not p.x_measured for p in seen),
                    "guessed": any(p.y is not None and not p.y_measured for p in seen),
                    "fewer": sum(p is not None for p in points) - len(known),
                    "limit": near,
                    "outside": settings["x_limit"] is not None and not near,
                    **drawn,
                }
            )
    if cut is not None:
        for unit, title in (("ffn", "FFN channels"), ("kv", "KV groups")):
            before, after = cut[unit]
            drawn = charts.both(
                f"Chart: {title} that each decoder layer keeps in {cut['candidate']}. "
                "The figures are in the table below.",
                wide=charts.layer_chart(before, after, what=title, width=charts.WIDE),
                narrow=charts.layer_chart(before, after, what=title, width=charts.NARROW),
            )
            assert drawn is not None
            out.append({"name": unit, "title": f"{title} kept per layer", **drawn})
    memory = _memory(report, shown)
    if memory is not None:
        parts = [(part["name"], part["bytes"]) for part in memory["parts"]]
        given = {"measured": memory["measured"], "limit": memory["limit"]}
        drawn = charts.both(
            "Chart: peak memory by part against the limit. The figures are in the table beside it.",
            wide=charts.memory_chart(parts, width=charts.WIDE, **given),
            narrow=charts.memory_chart(parts, width=charts.NARROW, **given),
        )
        assert drawn is not None
        out.append({"name": "parts", "title": "Memory", **drawn})
    return _drawn(out)


def _fewer(points: Sequence[charts.Point]) -> list[charts.Point]:
    """The points without most of those whose quality is only predicted: the best of them stay."""
    guessed = sorted((p for p in points if p.y is not None and not p.y_measured), key=lambda p: p.y or 0)
    out = {p.name for p in guessed[_MOST_GUESSED:]}
    return [p for p in points if p.name not in out or p.marked]


def _drawn(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with drawings in place of their sheets: all at once, as the process for it takes a second."""
    sheets = [value for row in rows for value in row.values() if isinstance(value, charts.Sheet)]
    made = iter(charts.draw(sheets))
    # `charts.clean` lets shapes and escaped text through and nothing else
    return [
        {k: Markup(next(made)) if isinstance(v, charts.Sheet) else v for k, v in row.items()} for row in rows
    ]


def _label(c: Row) -> str:
    base, more, _ = str(c["quantization"]).replace(" as given", "*").partition("+")
    quantization = f"{base} mix" if more else base
    return quantization if c["ratio"] == 0 else f"-{100 * c['ratio']:.0f}% {quantization}"


def _quality(c: Row) -> dict[str, Any]:
    """The y of a point: measured, or predicted with its interval where a report has such a thing."""
    quality, predicted = c["quality"], c["predicted"]
    if quality is not None and c["error"] is None:
        half = 1.96 * quality["kl_stderr"]
        return {"y": quality["kl"], "y_low": quality["kl"] - half, "y_high": quality["kl"] + half}
    if predicted.get("kl") is not None:
        low, high = predicted.get("kl_low"), predicted.get("kl_high")
        return {"y": predicted["kl"], "y_low": low, "y_high": high, "y_measured": False}
    return {"y": None, "y_measured": False}


def _point(c: Row, marked: str | None, **more: Any) -> charts.Point | None:
    if c["error"] is not None or not math.isfinite(more["x"]):
        return None
    return charts.Point(
        name=c["id"],
        label=_label(c),
        dense=c["ratio"] == 0,
        marked=c["id"] == marked,
        **_quality(c),
        **more,
    )


def _memory_point(c: Row, marked: str | None) -> charts.Point | None:
    measured = (c["measured"] or {}).get("peak_memory_bytes")
    if measured is not None:
        return _point(c, marked, x=measured / 1e6)
    return _point(c, marked, x=c["predicted"]["peak_memory_bytes"] / 1e6, x_measured=False)


def _speed_point(c: Row, marked: str | None) -> charts.Point | None:
    measured, predicted = c["measured"] or {}, c["predicted"]
    if measured.get("decode_tps") is not None:
        speed, spread = measured["decode_tps"], measured["decode_tps_stdev"] or 0.0
        return _point(c, marked, x=speed, x_low=max(0.0, speed - spread), x_high=speed + spread)
    if predicted["decode_tps"] is None:
        return None
    return _point(
        c,
        marked,
        x=predicted["decode_tps"],
        x_low=predicted["decode_tps_low"],
        x_high=predicted["decode_tps_high"],
        x_measured=False,
    )


def _file_point(c: Row, marked: str | None) -> charts.Point | None:
    if c["artifact"] is not None:
        return _point(c, marked, x=c["artifact"]["bytes"] / 1e6)
    return _point(c, marked, x=c["predicted"]["file_bytes"] / 1e6, x_measured=False)
