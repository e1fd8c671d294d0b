"""manifest.json (schema 1): what a bundle holds, where it comes from, and the check that it is unchanged.

The file is written in one canonical form and carries a digest of itself, so that a changed byte in it is
noticed as one in any other file. It is a checksum, not a signature: who can write the folder can write both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import rundir
from edgeprune.errors import ConfigError

FILE_NAME = "manifest.json"
KIND = "bundle"
SCHEMA = 1
_MOST_BYTES = 64 << 20
_MOST_SHOWN = 20  # problems in one message
_HINT = "copy the bundle again from where it was made"
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a whole bundle held."""

    files: int
    bytes: int
    manifest: Mapping[str, Any]


def _render(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _digest(plain: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in plain.items() if key != "digest"}
    return hashlib.sha256(_render(rest).encode()).hexdigest()


def found_files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of all that is no plain folder under `root`, sorted; follows no links."""
    out = []
    for folder, names, files in os.walk(root):
        for name in (*files, *(n for n in names if os.path.islink(os.path.join(folder, n)))):
            out.append(os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/"))
    return iter(sorted(out))


def write(root: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """List the files of `root` with bytes and sha256 beside `facts`, and write it all as manifest.json."""
    files = [
        {"path": name, "bytes": (root / name).stat().st_size, "sha256": rundir.sha256_file(root / name)}
        for name in found_files(root)
        if name != FILE_NAME
    ]
    plain: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "files": files, **facts}
    plain["digest"] = _digest(plain)
    rundir.write_text(root / FILE_NAME, _render(plain))
    return plain


def is_bundle(root: Path) -> bool:
    """`root` holds a manifest, damaged or not."""
    return (root / FILE_NAME).is_file() and not (root / FILE_NAME).is_symlink()


def _read(root: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest and what is wrong with its own bytes; raises ConfigError when it is of no use."""
    path = root / FILE_NAME
    if not root.is_dir():
        raise ConfigError(f"bundle {root} does not exist or is no folder")
    if not is_bundle(root):
        raise ConfigError(f"{root} has no {FILE_NAME}: it is no bundle", "make one with: edgeprune bundle")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{FILE_NAME}: larger than {_MOST_BYTES} bytes", _HINT)
    data = path.read_bytes()
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{FILE_NAME}: is not valid JSON ({error!s:.80})", _HINT) from None
    if not isinstance(plain, dict) or plain.get("kind") != KIND:
        raise ConfigError(f"{FILE_NAME}: does not describe a bundle", _HINT)
    if plain.get("schema") != SCHEMA:
        raise ConfigError(
            f"{FILE_NAME}: schema {plain.get('schema')!r:.20}, this edgeprune reads {SCHEMA}",
            "use the edgeprune that made it, or a newer one",
        )
    try:
        same = _render(plain).encode() == data and plain.get("digest") == _digest(plain)
    except ValueError:  # NaN, or half of a surrogate pair
        same = False
    return plain, [] if same else [f"{FILE_NAME}: changed since it was written"]


def name_problem(name: Any) -> str | None:
    """Why a name of a manifest must not be looked at, or None. Only plain relative POSIX paths pass."""
    if not isinstance(name, str) or not name:
        return "is no file name"
    if "\\" in name or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "has a character that no file of a bundle has"
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leaves the bundle or is not in its shortest form"
    return None


def _file_problem(root: Path, row: Mapping[str, Any]) -> str | None:
    """What is wrong with one listed file, or None; links are refused in every part of its path."""
    path = root
    try:
        for part in row["path"].split("/"):
            path = path / part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                return "is a link"
        if not stat.S_ISREG(mode):
            return "is no plain file"
        size = path.stat().st_size
        if size != row["bytes"]:
            return f"has {size} bytes, listed are {row['bytes']}"
        if rundir.sha256_file(path) != row.get("sha256"):
            return "its sha256 is not the listed one"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def verify(root: Path) -> Checked:
    """Check every file of a bundle against its manifest.

    Raises ConfigError with one problem per file that is changed, missing, not listed, a link, or listed under
    a name that leaves the folder (nothing outside is opened).
    """
    plain, problems = _read(root)
    rows = plain.get("files")
    if not isinstance(rows, list):
        raise ConfigError([*problems, f"{FILE_NAME}: 'files' is not a list"], _HINT)
    seen: set[str] = set()
    total = 0
    for row in rows:
        if not isinstance(row, dict) or type(row.get("bytes")) is not int:
            problems.append(f"{FILE_NAME}: an entry of 'files' is no file: {row!r:.60}")
            continue
        name = row.get("path")
        wrong = name_problem(name)
        if wrong is None and (name in seen or name == FILE_NAME):
            wrong = "is listed twice" if name in seen else "lists itself"
        if wrong is not None:
            problems.append(f"{FILE_NAME}: {name!r:.80} {wrong}")
            continue
        assert isinstance(name, str)
        seen.add(name)
        wrong = _file_problem(root, row)
        if wrong is not None:
            problems.append(f"{name}: {wrong}")
        total += row["bytes"]
    problems += [f"{n}: is not listed" for n in found_files(root) if n not in seen and n != FILE_NAME]
    if len(problems) > _MOST_SHOWN:
        problems = [*problems[:_MOST_SHOWN], f"and {len(problems) - _MOST_SHOWN} more problems"]
    if problems:
        raise ConfigError(problems, _HINT)
    return Checked(len(seen), total, plain)
