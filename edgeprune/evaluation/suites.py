"""What is scored: named suites, and suites of a user's own as a TOML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.config import toml
from edgeprune.errors import ConfigError
from edgeprune.registry import suggest

TEXTS = ("wikitext2", "ptb")
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Texts, windows and tasks of one evaluation; None of a limit means everything."""

    texts: tuple[str, ...] = ()
    windows: tuple[int, ...] = (128, 2048)
    tasks: tuple[str, ...] = ()
    items: int | None = None  # of each task
    tokens: int | None = None  # of each text

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.texts, *self.tasks)


SUITES = {
    "papers": Suite(texts=TEXTS, tasks=TASKS),
    "quick": Suite(texts=("wikitext2",), windows=(2048,), tasks=TASKS, items=100, tokens=32_768),
}


def find(name_or_path: str) -> Suite:
    """A shipped suite, or one read from a .toml file. Raises ConfigError naming every problem."""
    if name_or_path in SUITES:
        return SUITES[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.suffix != ".toml":
        raise ConfigError(
            f"unknown suite '{name_or_path}'{suggest(name_or_path, SUITES)}",
            f"known: {', '.join(SUITES)}; or give a .toml file with texts, windows, tasks, items, tokens",
        )
    if not path.is_file():
        raise ConfigError(f"suite file {path} does not exist")
    problems: list[str] = []
    shown = toml.display(path)
    made = toml.build(Suite, toml.read(path), shown, problems)
    if made is not None:
        problems += [f"{shown}: {p}" for p in _problems(made)]
    toml.raise_all(problems)
    assert made is not None
    return made


def chosen(suite: Suite, *, names: Sequence[str], items: int | None, tokens: int | None) -> Suite:
    """The part of a suite that the command line asks for. Raises ConfigError."""
    unknown = [n for n in names if n not in suite.names]
    if unknown:
        known = suite.names
        raise ConfigError(
            [f"--tasks: the suite has no '{n}'{suggest(n, known)}" for n in unknown],
            f"it has: {', '.join(known)}",
        )
    if names:
        suite = dataclasses.replace(
            suite,
            texts=tuple(n for n in suite.texts if n in names),
            tasks=tuple(n for n in suite.tasks if n in names),
        )
    return dataclasses.replace(
        suite,
        items=suite.items if items is None else items,
        tokens=suite.tokens if tokens is None else tokens,
    )


def _problems(suite: Suite) -> list[str]:
    out = [f"unknown text '{n}'{suggest(n, TEXTS)}" for n in suite.texts if n not in TEXTS]
    out += [f"unknown task '{n}'{suggest(n, TASKS)}" for n in suite.tasks if n not in TASKS]
    out += [f"a window of {w} tokens predicts nothing" for w in suite.windows if w < 2]
    if suite.texts and not suite.windows:
        out.append("texts need windows, such as windows = [2048]")
    for key in ("items", "tokens"):
        value = getattr(suite, key)
        if value is not None and value < 1:
            out.append(f"{key} must be at least 1")
    return out or ([] if suite.names else ["neither texts nor tasks are named"])
