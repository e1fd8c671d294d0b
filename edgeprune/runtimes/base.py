"""What a runtime says about itself, and what its jobs answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchTimes:
    """What one bench process measured; nanoseconds per repeat."""

    threads: int
    sweep: dict[str, float]  # thread count -> decode tokens/s
    prefill_ns: tuple[int, ...]
    decode_ns: tuple[int, ...]
    load_ns: int
    n_batch: int
    model_type: str
    model_bytes: int
    model_params: int
    build_commit: str


@dataclass(frozen=True, kw_only=True)
class MemoryPeak:
    """Peak resident size after the context was filled, less its value before the model was opened."""

    peak_bytes: int
    before_bytes: int
    tokens_filled: int
    load_ns: int


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
    bench: Callable[..., BenchTimes]
    memory: Callable[..., MemoryPeak]
