"""What is scored at once: choices that share their first tokens, which are computed once; and its store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from edgeprune.errors import ConfigError

Pair = tuple[list[int], list[int]]  # tokens of the context, tokens of the continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prefix and one tail per choice; the targets of a choice begin behind position `starts`."""

    h: str
    prefix: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.tails))

    @property
    def length(self) -> int:
        """Positions of its longest choice."""
        return len(self.prefix) + max(map(len, self.tails))

    def line(self) -> str:
        return json.dumps({n: getattr(self, n) for n in ("h", "prefix", "tails", "starts", "targets")})


@dataclass(frozen=True, slots=True)
class Scored:
    """Per choice: nats summed over its targets, and whether each target was the likeliest token."""

    ll: tuple[float, ...]
    greedy: tuple[bool, ...]


def make(pairs: Sequence[Pair], max_length: int) -> Group:
    """Group the choices of one item; a choice longer than the model reads loses tokens from the left.

    Raises ConfigError for a continuation that is longer than the model reads.
    """
    inputs, starts, targets = [], [], []
    for context, continuation in pairs:
        if not context or not continuation or len(continuation) > max_length:
            raise ConfigError(
                f"a choice of {len(context)} and {len(continuation)} tokens cannot be scored with "
                f"{max_length} tokens of context"
            )
        # the last token is only predicted, never read
        whole = (context + continuation)[-(max_length + 1) :]
        inputs.append(tuple(whole[:-1]))
        starts.append(len(whole) - 1 - len(continuation))
        targets.append(tuple(continuation))
    shared = 0
    while all(len(x) > shared and x[shared] == inputs[0][shared] for x in inputs):
        shared += 1
    parts = (inputs[0][:shared], tuple(x[shared:] for x in inputs), tuple(starts), tuple(targets))
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return Group(h=digest, prefix=parts[0], tails=parts[1], starts=parts[2], targets=parts[3])


def window(tokens: Sequence[int]) -> Group:
    """All tokens of a window but the first, which nothing predicts."""
    return make([([tokens[0]], list(tokens[1:]))], len(tokens))


class Store:
    """Finished groups in a file that only grows: what a killed run has finished is read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._mend()

    def _mend(self) -> None:
        # a killed writer leaves at most one line unfinished
        if self.path.is_file():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with self.path.open("r+b") as f:
                    f.truncate(whole)

    def read(self) -> dict[str, Scored]:
        return dict(_rows(self.path))

    def open(self) -> TextIO:
        return self.path.open("a", encoding="utf-8")

    def count(self, since: int) -> tuple[int, int]:
        """Lines behind byte `since` of the file, and where they end."""
        if not self.path.is_file():
            return 0, since
        with self.path.open("rb") as f:
            f.seek(since)
            data = f.read()
        whole = data.rfind(b"\n") + 1
        return data.count(b"\n"), since + whole

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0


def _rows(path: Path) -> Iterator[tuple[str, Scored]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            yield row["h"], Scored(tuple(map(float, row["ll"])), tuple(map(bool, row["greedy"])))
        except (ValueError, KeyError, TypeError):
            continue  # a damaged line is scored again


def line_of(h: str, ll: Sequence[float], greedy: Sequence[bool]) -> str:
    return json.dumps({"h": h, "ll": list(ll), "greedy": list(greedy)}) + "\n"
