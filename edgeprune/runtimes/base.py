"""What a runtime says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One engine that runs exported artifacts on this machine."""

    name: str
    summary: str
    reference: str
    formats: tuple[str, ...]  # export formats it can run
    extra: str  # the optional dependency group that installs it
    available: Callable[[], str | None]  # None, or the reason why it cannot run
    version: Callable[[], str]
