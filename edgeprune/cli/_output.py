"""Options and printers that several verbs share; results go to stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def format_option(command: F) -> F:
    """Add `--format table|json` as the argument `form`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Form of the result on stdout.",
    )(command)


def plain(text: str) -> str:
    """One line without control characters: names come from files, and a terminal obeys what it is sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def echo_json(value: Any) -> None:
    """Print a result as JSON on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def echo_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns on stdout; columns whose head starts with '>' are right-aligned."""
    names = [h.removeprefix(">") for h in head]
    widths = [
        max(len(name), *(len(r[i]) for r in rows)) if rows else len(name) for i, name in enumerate(names)
    ]
    for row in (names, *rows):
        cells = (
            cell.rjust(width) if title.startswith(">") else cell.ljust(width)
            for title, cell, width in zip(head, row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def echo_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print `name  value` lines with the values aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name.ljust(width)}  {value}".rstrip())


def stability_pairs(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines about `light.describe_scores`; none for a single calibration seed."""
    return [
        (
            f"rank stability {row['unit']}",
            f"Spearman {row['mean']:.3f} between {len(scores['seeds'])} seeds, "
            f"lowest {row['minimum']:.3f} of {row['axes']} axes",
        )
        for row in scores["rank_stability"]
    ]
