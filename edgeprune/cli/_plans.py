"""How a plan is printed, by `plan` and `prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.cli._output import echo_json, echo_pairs, stability_pairs
from edgeprune.units import format_bytes


def echo_plan(
    figures: dict[str, Any],
    path: Path,
    form: str,
    *,
    asked: str | None = None,
    scores: dict[str, Any] | None = None,
    recovery: dict[str, Any] | None = None,
) -> None:
    """Print the figures of `light.describe_plan` and where the result lies.

    `asked` says what was asked for when it was not a ratio; `scores` is of `light.describe_scores`.
    """
    if form == "json":
        more = {"scores": scores, "recovery": recovery}
        echo_json({**figures, **{k: v for k, v in more.items() if v}, "path": str(path)})
        return
    ratio, whole = figures["ratio"], figures["ratio_all"]
    pairs = [
        ("requested", asked or f"{100 * figures['requested_ratio']:.1f}% of decoder-layer parameters"),
        ("reached", f"{100 * ratio:.1f}% of decoder-layer parameters, {100 * whole:.1f}% of all"),
        ("parameters", f"{figures['parameters']:,} of {figures['parameters_before']:,}"),
        *_query_heads(figures),
        ("KV groups", _widths(figures, 1)),
        ("FFN width", _widths(figures, 2)),
    ]
    if "vocabulary" in figures:
        pairs += vocabulary_pairs(figures["vocabulary"])
    if figures["binding"]:
        pairs.append(("held back by", figures["binding"]))
    if recovery:
        pairs.append(("recovery", f"{recovery['method']}: {recovery['note']}"))
    echo_pairs([*pairs, *(stability_pairs(scores) if scores else ()), ("written to", str(path))])


def vocabulary_pairs(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on a trimmed vocabulary: tokens, and by how much other text grows."""
    grown = [f"{row['text']} {row['percent']:+.1f}%" for row in figures["growth"]]
    return [
        ("tokens", f"{figures['tokens_after']:,} of {figures['tokens_before']:,}"),
        ("saved there", format_bytes(figures["bytes_removed"])),
        ("tokens of text", ", ".join(grown)),
    ]


def _query_heads(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """A line on query heads where they left on their own and not with their KV group."""
    pairs = zip(figures["layers"], figures["layers_before"], strict=True)
    if all(a[0] * b[1] == a[1] * b[0] for a, b in pairs):
        return []
    return [("query heads", _widths(figures, 0))]


def _widths(figures: dict[str, Any], column: int) -> str:
    after = [row[column] for row in figures["layers"]]
    before = [row[column] for row in figures["layers_before"]]
    if len(set(after)) == 1 and len(set(before)) == 1:
        return f"{after[0]} of {before[0]} in each of {len(after)} layers"
    return f"{_span(after)} of {_span(before)} by layer: {' '.join(map(str, after))}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
