"""The report as a table for the terminal. Plain text on a pipe, colour where the terminal has it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from edgeprune.report import answers, benchmarks
from edgeprune.units import format_bytes

_WIDTH = 160  # no figure is cut short; most tables need 120
_SAID = ("do-not-prune", "prune")  # what the headline says


def render_table(report: Mapping[str, Any], folder: str | None = None) -> str:
    """The answer first, then what was measured, then how to run it; `folder` is where the paths start."""
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, force_terminal=False, highlight=False, soft_wrap=False)
    if len(report.get("targets") or ()) > 1:
        console.print(_matrix(report["targets"]))
        console.print(
            "each has its own report, page and bundle; below, the one of:", report["target"]["name"]
        )
        console.print()
    console.print(report["headline"], soft_wrap=True)
    for said in report.get("answers") or ():
        if said["code"] not in _SAID:
            console.print(f"- {said['text']}", soft_wrap=True)
    model, target, profile = report["model"], report["target"], report["profile"]
    workload = profile["workload"]
    console.print(
        f"{model['id']} ({model['parameters'] / 1e6:.0f}M parameters, "
        f"{model['decoder_parameters'] / 1e6:.0f}M of them in the decoder layers) "
        f"for {target['name']}, profile {profile['name']} (context {workload['context_tokens']} tokens)",
        soft_wrap=True,
    )
    trimmed = report.get("vocabulary")
    if trimmed:
        worst = max(trimmed["growth"], key=lambda row: row["percent"], default=None)
        grown = f"; text grows by up to {worst['percent']:.0f}% tokens ({worst['text']})" if worst else ""
        console.print(
            f"vocabulary: {trimmed['tokens_after']:,} of {trimmed['tokens_before']:,} tokens{grown}",
            soft_wrap=True,
        )
    for name, limit in report["budget"].items():
        shown = (
            format_bytes(limit["value"])
            if limit["unit"] == "bytes"
            else f"{limit['value']:g} {limit['unit']}"
        )
        console.print(f"limit {name.replace('_', ' ')}: {shown} (from {limit['from']})", soft_wrap=True)
    searched = answers.search_line(report)
    if searched:
        console.print(searched, soft_wrap=True)
    measured = [c for c in report["candidates"] if c["measured"] is not None or c["error"] is not None]
    if measured:
        console.print()
        console.print(_table(measured, report), soft_wrap=False)
        console.print(_footnotes(report), soft_wrap=True)
    if report.get("benchmarks"):
        console.print()
        for line in benchmarks.lines(report["benchmarks"]):
            console.print(line, soft_wrap=True)
    skipped = len(report["candidates"]) - len(measured)
    if skipped:
        console.print(
            f"{skipped} more candidates were planned and not measured; report.json gives each one's reason.",
            soft_wrap=True,
        )
    if report["launch"]:
        console.print()
        where = f" (in {folder})" if folder else ""
        console.print(f"run it{where}: {report['launch']}", soft_wrap=True)
    return out.getvalue().rstrip("\n")


def _matrix(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each target of a run got."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("target", no_wrap=True)
    table.add_column("selected", no_wrap=True)
    for head in ("memory limit", "MB meas.", "t/s pred.", "t/s meas.", "KL"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        c, limit = row["selected"], format_bytes(row["budget"]["memory"]["value"])
        if c is None:
            table.add_row(row["target"], "nothing fits", limit, "-", "-", "-", "-")
            continue
        p, m, q = c["predicted"], c["measured"], c["quality"]
        table.add_row(
            row["target"],
            _lines(c["id"]),
            limit,
            "-" if not m or m["peak_memory_bytes"] is None else f"{m['peak_memory_bytes'] / 1e6:.0f}",
            "-" if p["decode_tps"] is None else f"{p['decode_tps_low']:.0f}-{p['decode_tps_high']:.0f}",
            _decode(m),
            "-" if not q else f"{q['kl']:.4f}±{q['kl_stderr']:.4f}",
        )
    return table


def _lines(name: str) -> str:
    """A name that ends in a mix of types, one line for each of them; others as they are."""
    return name.replace("+", "\n  +")


def _mark(report: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    if candidate["id"] == report["selected"]:
        return ">"
    return "=" if candidate["id"] in report["ties"] else ""


def _table(rows: list[dict[str, Any]], report: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("candidate", no_wrap=True)
    for head in ("pruned", "file", "memory", "memory", "decode", "decode", "KL", "perplexity", "limits"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row(
        "",
        "",
        "% decoder",
        "MB",
        "MB pred.",
        "MB meas.",
        "t/s pred.",
        "t/s meas.",
        "nats/token",
        "",
        "",
        style="dim",
    )
    for c in rows:
        p, m, q = c["predicted"], c["measured"], c["quality"]
        missed = [name for name, ok in c["meets"].items() if not ok]
        limits = "met ?" if answers.unchecked(report, c) else "met"
        if c["error"] or missed:
            limits = "failed" if c["error"] else _misses(missed)
        table.add_row(
            _mark(report, c),
            _lines(c["id"]),
            f"{100 * c['ratio']:.1f}",
            f"{c['artifact']['bytes'] / 1e6:.1f}" if c["artifact"] else "-",
            f"{p['peak_memory_bytes'] / 1e6:.0f}",
            "-" if not m or m["peak_memory_bytes"] is None else f"{m['peak_memory_bytes'] / 1e6:.0f}",
            "-" if p["decode_tps"] is None else f"{p['decode_tps_low']:.0f}-{p['decode_tps_high']:.0f}",
            _decode(m),
            "-" if not q else f"{q['kl']:.4f}±{q['kl_stderr']:.4f}",
            "-" if not q else f"{q['perplexity']:.2f}±{q['perplexity_stderr']:.2f}",
            limits,
        )
    return table


def _misses(names: Sequence[str]) -> str:
    """Limits that were missed, one on a line."""
    return "misses " + ",\n".join(name.removeprefix("decode_").replace("_", " ") for name in names)


def _decode(measured: Mapping[str, Any] | None) -> str:
    if not measured or measured["decode_tps"] is None:
        return "-"
    noisy = "~" if measured["noisy"] else ""
    return f"{noisy}{measured['decode_tps']:.1f}±{measured['decode_tps_stdev']:.1f}"


def _footnotes(report: Mapping[str, Any]) -> str:
    lines = ["> selected, = quality cannot be told from it; pred. predicted, meas. measured"]
    if any(c["measured"] and c["measured"]["noisy"] for c in report["candidates"]):
        lines.append("~ the repeats spread by more than 10%: something else was using the machine")
    judged = [c for c in report["candidates"] if c["meets"] and all(c["meets"].values())]
    names = dict.fromkeys(name for c in judged for name in answers.unchecked(report, c))
    if names:
        shown = " and ".join(name.replace("_", " ") for name in names)
        lines.append(f"? but the limit on {shown} could not be checked: nothing measured it")
    for c in report["candidates"]:
        joules = (c["measured"] or {}).get("joules_per_token")
        if joules is not None:
            lines.append(f"{c['id']} took {joules:.3g} J per generated token by {c['measured']['meter']}")
    lines += answers.doubt_lines(report)
    evaluation = report["evaluation"]
    if evaluation:
        dense = "unknown" if report["dense_perplexity"] is None else f"{report['dense_perplexity']:.2f}"
        lines.append(
            f"KL to the dense F16 parent and perplexity on {evaluation['n_samples']} x "
            f"{evaluation['n_tokens']} held-out tokens, {evaluation['origin']} (seed {evaluation['seed']}); "
            f"the dense F16 parent's own perplexity is {dense}"
        )
    if not report["target"]["local"]:
        lines.append(
            f"speed on {report['target']['name']} is predicted (80% band); "
            "memory was measured on this machine, not on the board"
        )
        own = max((c["predicted"].get("runtime_bytes", 0) for c in report["candidates"]), default=0)
        if own:
            lines.append(
                f"predicted memory includes {format_bytes(own)} for the board's runtime, "
                "which the limit counts and no measurement here can see"
            )
    return "\n".join(lines)
