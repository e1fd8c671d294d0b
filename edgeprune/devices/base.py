"""What a device can be asked, wherever it is, and how a command reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.records import Environment


@dataclass(frozen=True, kw_only=True)
class Transport:
    """A way to run a shell command on a device with stdin and stdout connected.

    `argv` turns a POSIX shell command line (already quoted) into the program to start here. `explain`
    turns the last words of that program into (kind, reason, hint) when it is the way that failed.
    """

    address: str  # as the user wrote it
    argv: Callable[[str], Sequence[str]]
    explain: Callable[[int, str], tuple[str, str, str | None]]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of machine that measures; `local` is the one this program runs on."""

    name: str
    summary: str
    reference: str
    transport: Callable[..., Transport]  # of an address; raises ConfigError for one it cannot read
    detect: Callable[..., dict[str, Any]] | None = None  # of this machine only
    environment: Callable[[], Environment] | None = None
    available_threads: Callable[[], int] | None = None
