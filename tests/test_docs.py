"""The documentation says what the program does: fresh command reference, commands that parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgeprune import registry
from edgeprune.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`((?:\S*/)?edgeprune [^`\n]+)`(?!`)")
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:[\w./-]*/)?edgeprune (.+)$")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `edgeprune …` in code blocks and inline code; '…' marks an outline."""
    blocks = [block.replace("\\\n", " ") for block in _FENCE.findall(text)]
    inline = _INLINE.findall(_FENCE.sub("", text))
    for line in [*(line for block in blocks for line in block.splitlines()), *inline]:
        match = _COMMAND.match(line)
        if match and not re.search(r"…|\.\.\.|VERB|\bOPTIONS\b", line):
            args = shlex.split(match[1], comments=True)
            stop = next((i for i, a in enumerate(args) if a in ("|", ">", "&&", ";", "2>")), len(args))
            yield args[:stop]


def parse(args: list[str], command: click.Command = cli, parent: click.Context | None = None) -> None:
    """Parse a command line without running it. Raises click.UsageError."""
    try:
        ctx = command.make_context("edgeprune", list(args), parent=parent)
    except click.exceptions.Exit:  # --help, --version
        return
    rest = [*ctx._protected_args, *ctx.args] if isinstance(command, click.Group) else []
    if rest:
        assert isinstance(command, click.Group)
        _, found, left = command.resolve_command(ctx, rest)
        assert found is not None
        parse(left, found, ctx)


FOUND = [(page.name, args) for page in PAGES for args in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "args"), FOUND, ids=[f"{page}: {shlex.join(args)[:60]}" for page, args in FOUND]
)
def test_documented_commands_parse(page: str, args: list[str]) -> None:
    parse(args)


def test_the_examples_of_every_help_parse() -> None:
    lines = commands((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
    verbs = {args[0] for args in lines if args and not args[0].startswith("-")}
    assert verbs >= {v for v in registry.names("cli") if v != "main"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```sh\nedgeprune --tagret laptop-cpu\n```", "No such option '--tagret'"),
        ("```sh\n$ scripts/edgeprune prnue x\n```", "unknown verb 'prnue'"),
        ("run `edgeprune targets --format yaml` now", "'yaml' is not one of"),
        ("```sh\nedgeprune prune m \\\n  --samples 0 --out o\n```", "0 is not in the range"),
        ("```sh\nedgeprune export m | cat\n```", "Missing option '--out'"),
    ],
)
def test_a_wrong_command_would_be_noticed(text: str, error: str) -> None:
    (args,) = commands(text)
    with pytest.raises(click.UsageError) as caught:
        parse(args)
    assert error in caught.value.format_message()


def test_outlines_and_other_programs_are_left_alone() -> None:
    text = "```\nedgeprune prune MODEL …\npip install edgeprune\n```\n`edgeprune.load(path)` and `edgeprune`"
    assert list(commands(text)) == []
    parse(["--version"])


def test_the_command_reference_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make-cli-docs"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", [v for v in registry.names("cli") if v != "main"])
def test_every_verb_is_in_the_reference(verb: str) -> None:
    assert f"\n## edgeprune {verb}\n" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
