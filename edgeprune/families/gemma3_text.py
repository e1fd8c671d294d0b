"""Gemma 3 as its text-only models call themselves."""

from edgeprune.families.gemma3 import FAMILY

__all__ = ["FAMILY"]
