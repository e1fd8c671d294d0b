"""The order of the stages: the only package that knows it."""

from edgeprune.pipeline.main import RunOptions, run

__all__ = ["RunOptions", "run"]
