"""Make the best decoder LLM that fits a device: prune, export, measure, choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgeprune.api import Result as Result
    from edgeprune.api import fit as fit
    from edgeprune.surgery import load as load

__all__ = ["Result", "__version__", "fit", "load"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that `import edgeprune` stays instant
    if name == "load":
        from edgeprune.surgery import load

        return load
    if name in ("Result", "fit"):
        from edgeprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
