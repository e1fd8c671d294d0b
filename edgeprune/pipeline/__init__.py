"""The order of the stages: the only package that knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.pipeline.main import RunOptions as RunOptions
    from edgeprune.pipeline.main import run as run

__all__ = ["RunOptions", "run"]


def __getattr__(name: str) -> Any:
    # the main job needs torch; stages that only do arithmetic must not load it
    if name in __all__:
        from edgeprune.pipeline import main

        return getattr(main, name)
    raise AttributeError(f"module 'edgeprune.pipeline' has no attribute {name!r}")
