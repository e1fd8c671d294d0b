"""Strict TOML: a file becomes a typed record, or a list of every problem with file and key named.

The shape of a file is a frozen dataclass. A field typed as another dataclass is a `[section]`, a
tuple of dataclasses is a `[[section]]`, `Size` is text like "7.4GiB". Unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NewType, TypeVar

from edgeprune import units
from edgeprune.errors import ConfigError
from edgeprune.registry import suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

Size = NewType("Size", int)  # written as "7.4GiB", read as bytes

_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def data_folder(kind: str) -> Path:
    """Return the folder of the shipped `targets` or `profiles`, installed or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_data" / kind
    return installed if installed.is_dir() else package.parent / kind


def user_data_folder() -> Path:
    """Where the user's own data lives (XDG base directories); nothing is made."""
    given = os.environ.get("XDG_DATA_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "share"
    return base / "edgeprune"


def list_names(kind: str) -> tuple[str, ...]:
    """List the data files of a kind by name, without opening them."""
    return tuple(sorted(p.stem for p in data_folder(kind).glob("*.toml")))


def find(kind: str, name_or_path: str) -> Path:
    """Turn a shipped name or a path into a file. Raises ConfigError with what is known."""
    noun = kind.removesuffix("s")
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{noun} file '{name_or_path}' does not exist",
                f"name a .toml file, or a shipped {noun}: edgeprune {kind}",
            )
        return path
    known = list_names(kind)
    if name_or_path not in known:
        raise ConfigError(
            f"unknown {noun} '{name_or_path}'{suggest(name_or_path, known)}",
            f"known: {', '.join(known)}; or give the path of a .toml file",
        )
    return data_folder(kind) / f"{name_or_path}.toml"


def name_of(path: Path) -> str:
    """Return the name a data file goes by: its file name without .toml."""
    if not _NAME.fullmatch(path.stem):
        raise ConfigError(
            f"{display(path)}: the file name is also the name, and '{path.stem}' is not one",
            "use letters, digits, '-', '_' and '.'",
        )
    return path.stem


def display(path: Path) -> str:
    """Print a data file's path as `targets/name.toml` when it is a shipped one."""
    for kind in ("targets", "profiles"):
        if path.parent == data_folder(kind):
            return f"{kind}/{path.name}"
    return str(path)


def read(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises ConfigError with the file and line for anything unreadable."""
    shown = display(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{shown}: too large for a data file", "a target or profile is a few kB")
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of more than 4300 digits
        raise ConfigError(f"{shown}: not valid TOML: {error}") from None


def build(cls: type[T], data: dict[str, Any], shown: str, problems: list[str]) -> T | None:
    """Fill the dataclass `cls` from parsed TOML; problems found are appended, and None is returned."""
    before = len(problems)
    value = _table(cls, data, shown, "", problems)
    return None if len(problems) > before else typing.cast(T, value)


def _at(shown: str, section: str) -> str:
    return f"{shown}: {section + ' ' if section else ''}"


def _table(cls: Any, data: Any, shown: str, section: str, problems: list[str]) -> Any:
    at = _at(shown, section)
    if not isinstance(data, dict):
        problems.append(f"{at}must be a table")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            problems.append(f"{at}unknown key '{key}'{suggest(key, fields)}")
    values: dict[str, Any] = {}
    before = len(problems)
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], shown, section, name, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{at}missing key '{name}'")
    return None if len(problems) > before else cls(**values)


def _value(kind: Any, data: Any, shown: str, section: str, name: str, problems: list[str]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        kind = next(o for o in typing.get_args(kind) if o is not type(None))
        origin = typing.get_origin(kind)
    at = _at(shown, section)
    if dataclasses.is_dataclass(kind):
        return _table(kind, data, shown, f"[{name}]", problems)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(data, list):
            problems.append(f"{at}'{name}' must be a list, found {_show(data)}")
            return None
        if dataclasses.is_dataclass(item):
            return tuple(_table(item, v, shown, f"[[{name}]] {i + 1}", problems) for i, v in enumerate(data))
        return tuple(_value(item, v, shown, section, f"{name}[{i}]", problems) for i, v in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            problems.append(f"{at}'{name}' must be a table, found {_show(data)}")
            return None
        item = typing.get_args(kind)[1]
        return {k: _value(item, v, shown, f"[{name}]", k, problems) for k, v in data.items()}
    if kind is Size:
        return _size(data, at, name, problems)
    if kind is float and type(data) is int:
        data = float(data)
    if type(data) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        problems.append(f"{at}'{name}' must be {words[kind]}, found {_show(data)}")
        return None
    if kind is float and not math.isfinite(data):
        problems.append(f"{at}'{name}' must be a finite number")
    return data


def _size(data: Any, at: str, name: str, problems: list[str]) -> int | None:
    if not isinstance(data, str):
        problems.append(f"{at}'{name}' must be a size such as \"7.4GiB\", found {_show(data)}")
        return None
    try:
        return units.parse_bytes(data, what=f"'{name}'")
    except ConfigError as error:
        problems.append(at + error.message + (f" ({error.hint})" if error.hint else ""))
        return None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check(condition: bool, problems: list[str], message: str) -> None:
    """Append `message` unless the condition holds."""
    if not condition:
        problems.append(message)


def raise_all(problems: Iterable[str]) -> None:
    """Raise one ConfigError with every problem, if there is any."""
    found = tuple(problems)
    if found:
        raise ConfigError(found)
