"""Progress on stderr: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from edgeprune.progress import Lines, Progress, Stage
from edgeprune.units import format_seconds


class _Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars = bars
        self._task = task

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)


class _Bars:
    def __init__(self, bars: Any) -> None:
        self._bars = bars

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        began = time.monotonic()
        task = self._bars.add_task(name, total=total)
        try:
            yield _Bar(self._bars, task)
        finally:
            self._bars.remove_task(task)
        self.say(f"{name}: {format_seconds(time.monotonic() - began)}")

    def say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def open_progress() -> Iterator[Progress]:
    """Yield bars when stderr is a terminal, plain lines when it is not."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield Lines(sys.stderr)
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars)
