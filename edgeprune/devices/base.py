"""What a device can be asked, wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.records import Environment


@dataclass(frozen=True, kw_only=True)
class Device:
    """A machine that measures; `local` is the one this program runs on."""

    name: str
    summary: str
    reference: str
    detect: Callable[..., dict[str, Any]]
    environment: Callable[[], Environment]
    available_threads: Callable[[], int]
