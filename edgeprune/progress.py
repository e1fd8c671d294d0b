"""How long work reports itself: a protocol, a silent one and one that writes plain lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TextIO


class Stage(Protocol):
    """One piece of work with a known or unknown number of steps."""

    def advance(self, n: int = 1) -> None: ...


class Progress(Protocol):
    """Where stages and messages go; never stdout, which carries the result."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]: ...

    def say(self, text: str) -> None: ...


class _Quiet:
    def advance(self, n: int = 1) -> None:
        pass


class Silent:
    """Say nothing; for library use and tests."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        yield _Quiet()

    def say(self, text: str) -> None:
        pass


class _Counted:
    def __init__(self, lines: Lines, name: str, total: int | None) -> None:
        self._lines = lines
        self._name = name
        self._total = total
        self._done = 0
        self._began = self._said = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said < self._lines.every_s:
            return
        self._said = now
        if self._total:
            left = (now - self._began) / self._done * max(self._total - self._done, 0)
            self._lines.say(f"{self._name}: {self._done}/{self._total}, {left:.0f} s left")
        else:
            self._lines.say(f"{self._name}: {self._done}")


class Lines:
    """Write a line when a stage starts and ends, and every `every_s` seconds between."""

    def __init__(self, stream: TextIO, *, every_s: float = 10.0) -> None:
        self.every_s = every_s
        self._stream = stream

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        began = time.monotonic()
        self.say(f"{name} …")
        yield _Counted(self, name, total)
        self.say(f"{name}: done in {time.monotonic() - began:.1f} s")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
