"""Find plug-ins by file name: one file, one constant; and optional libraries.

Names are listed without importing anything.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeprune.errors import ConfigError, MissingExtraError


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean …?)' when something known is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def names(package: str) -> tuple[str, ...]:
    """List the plug-ins of `edgeprune.<package>`: file names, '_' as '-', without 'base' and '_private'."""
    folder = Path(__file__).parent.joinpath(*package.split("."))
    found = [m.name for m in pkgutil.iter_modules([str(folder)])]
    return tuple(sorted(n.replace("_", "-") for n in found if n != "base" and not n.startswith("_")))


def load(package: str, name: str, constant: str) -> Any:
    """Import one plug-in and return its constant. Raises ConfigError for an unknown name."""
    known = names(package)
    if name not in known:
        raise ConfigError(
            f"unknown {constant.lower()} '{name}'{suggest(name, known)}", f"known: {', '.join(known)}"
        )
    module = importlib.import_module(f"edgeprune.{package}.{name.replace('-', '_')}")
    return getattr(module, constant)


def library(name: str, extra: str) -> ModuleType:
    """Import a library that only some installations have. Raises MissingExtraError naming the extra."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # one that is there and lacks something of its own is a bug, which keeps its traceback
        if error.name is None or error.name != name.partition(".")[0]:
            raise
        raise MissingExtraError(error.name, extra) from None
