"""Stops a run of edgeprune at one exact place, so that disturb.py can disturb it there.

Python loads a file of this name by itself when its folder is on PYTHONPATH. Nothing of edgeprune is changed:
Python's audit events tell of files that are opened and renamed. EDGEPRUNE_STOP_AT is "log EVENT KEY
STAGE" (behind that line of log.jsonl) or "rename FILE" (before a finished file takes that place);
EDGEPRUNE_RENAMES is a file that gets the name of everything that took its place. PID stands in names for the
number of the process.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from typing import Any

_KIND, _, _PLACE = os.environ.get("EDGEPRUNE_STOP_AT", "").partition(" ")
_NAMES = os.environ.get("EDGEPRUNE_RENAMES")


def _path(value: Any) -> str:
    try:
        return os.path.abspath(os.fsdecode(value))
    except TypeError:  # a descriptor
        return ""


def _last_line(path: str) -> str:
    """'EVENT KEY STAGE' of the last whole line of a log."""
    with open(path, "rb") as f:
        lines = f.read().splitlines(keepends=True)
    if not lines or not lines[-1].endswith(b"\n"):
        return ""
    row = json.loads(lines[-1])
    return f"{row['event']} {row['key']} {row['stage']}"


class _Watch:
    """An audit hook; `log` is the run's log once a line is being added to it."""

    def __init__(self) -> None:
        self.log, self.size, self.busy, self.done = "", 0, False, False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.busy or self.done:
            return
        self.busy = True
        try:
            self._see(event, args)
        except (OSError, ValueError, KeyError):
            pass  # the run itself will say what is wrong with its files
        finally:
            self.busy = False

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename":
            # names of unfinished folders have the process in them, and the next run is another
            place = _path(args[1]).replace(f".{os.getpid()}.", ".PID.")
            if _NAMES is not None:
                with open(_NAMES, "a", encoding="utf-8") as f:
                    f.write(place + "\n")
            if _KIND == "rename" and place == _PLACE:
                self._stop()
        elif _KIND == "log" and self.log and os.stat(self.log).st_size > self.size:
            line, self.log = _last_line(self.log), ""
            if line == _PLACE:
                self._stop()
        if event == "open" and _KIND == "log" and args[1] == "a" and _path(args[0]).endswith("log.jsonl"):
            self.log = _path(args[0])
            self.size = os.stat(self.log).st_size if os.path.exists(self.log) else 0

    def _stop(self) -> None:
        self.done = True
        os.kill(os.getpid(), signal.SIGSTOP)


if _KIND or _NAMES:
    _WATCH = _Watch()
    sys.addaudithook(_WATCH)
    atexit.register(_WATCH, "exit", ())  # nothing may come behind the last line
