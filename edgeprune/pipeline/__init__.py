"""The order of the stages: the only package that knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.pipeline.main import RunOptions as RunOptions
    from edgeprune.pipeline.main import run as run
    from edgeprune.pipeline.several import run_all as run_all

__all__ = ["RunOptions", "run", "run_all"]


def __getattr__(name: str) -> Any:
    # the main job needs torch; stages that only do arithmetic must not load it
    if name == "run_all":
        from edgeprune.pipeline import several

        return several.run_all
    if name in __all__:
        from edgeprune.pipeline import main

        return getattr(main, name)
    raise AttributeError(f"module 'edgeprune.pipeline' has no attribute {name!r}")
