"""The run folder: the interface between stages. Atomic writes, one writer, resume by key."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from edgeprune import records
from edgeprune.errors import ConfigError, EdgepruneError

T = TypeVar("T")
_CHUNK = 1 << 20
_SCHEMA = re.compile(r'"schema":\s*(\d{1,9})\b')
_SHORT = re.compile(r"^\d+ requested and \d+ written$")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` if the block succeeds and vanishes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def friendly_disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's own errors into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and disk_is_full(path)):
            raise _full(path) from error
        # numpy reports a short write without an error number: a quota, or a limit on the size of files
        if error.errno == errno.EFBIG or (error.errno is None and _SHORT.search(str(error))):
            raise _too_large(path, error.strerror or str(error)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(
                f"cannot write {path}: {error.strerror}", "choose another folder with --out"
            ) from error
        raise
    except Exception as error:
        # the safetensors library has its own class, and only its text names the cause
        if any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise _full(path) from error
        if f"(os error {errno.EFBIG})" in str(error):
            raise _too_large(path, os.strerror(errno.EFBIG)) from error
        raise


def _full(path: Path) -> ConfigError:
    return ConfigError(
        f"no space left on the disk that holds {path}", "free some space and run the same command again"
    )


def _too_large(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"a file in {path} cannot grow: {why}",
        "raise the quota or the limit on file sizes (ulimit -f) and run the same command again",
    )


def disk_is_full(path: Path) -> bool:
    """Less than 64 KiB is free where `path` is, or would be."""
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free < 1 << 16
    return False


def default_root(model: str | None, target: str, profile: str, budget: str | None) -> Path:
    """Name a run folder after what was asked, so that the same question finds it again."""
    parts = (model or "default", target, profile, budget or "all")
    return Path("edgeprune-runs") / "_".join(slug(part) for part in parts)


def slug(text: str) -> str:
    """Part of a file name: the last part of a path or id, without what shells and disks dislike."""
    last = [p for p in re.split(r"[/\\]", text.removesuffix(".toml")) if p]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", last[-1] if last else "").strip("-.") or "x"


class RunDir:
    """A folder with `records/`, `artifacts/`, `arrays/` and `log.jsonl`. Use as a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: Any = None
        self._new: list[Path] = []  # folders that this run made, outermost last

    def __enter__(self) -> RunDir:
        with friendly_disk_errors(self.root):
            self._new = [p for p in (self.root, *self.root.absolute().parents) if not p.exists()]
            for name in ("records", "artifacts", "arrays"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"another edgeprune run is using {self.root}",
                "wait for it, or choose another folder with --out",
            ) from None
        try:
            self._check_schema()
        except ConfigError:
            self._lock.close()
            raise
        self._sweep()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        refused = kind is not None and issubclass(kind, EdgepruneError)
        if refused and self._new and not (self.root / "log.jsonl").exists():
            self._remove()  # the command was wrong and nothing was worked out: leave nothing behind
        self._lock.close()

    def _check_schema(self) -> None:
        """Raises ConfigError when another version's records are here: they would neither be read nor kept."""
        for path in (self.root / "records").glob("*.json"):
            with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as f:
                found = _SCHEMA.search(f.read(400))
                if found and int(found[1]) != records.SCHEMA:
                    raise ConfigError(
                        f"{self.root} was written by another version of edgeprune "
                        f"(schema {found[1]}, this one has {records.SCHEMA})",
                        "choose another folder with --out, or delete this one",
                    )

    def _remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in self._new[1:]:
                folder.rmdir()

    def _sweep(self) -> None:
        # what a killed run left half-written; we hold the lock, so nobody else is writing it
        for part in self.root.rglob(".*.part"):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)

    def path(self, relative: str) -> Path:
        """Resolve a path of a record; refuses to leave the run folder."""
        full = (self.root / relative).resolve()
        if not full.is_relative_to(self.root.resolve()):
            raise ConfigError(f"path '{relative}' leaves the run folder {self.root}")
        return full

    def relative(self, path: Path) -> str:
        return str(path.resolve().relative_to(self.root.resolve()))

    def record_path(self, kind: str, key: str) -> Path:
        return self.root / "records" / f"{kind}-{key}.json"

    def find(self, cls: type[T], key: str, *, kind: str | None = None) -> T | None:
        """Return a finished record with this key, or None. A damaged one counts as absent."""
        path = self.record_path(kind or cls.kind, key)  # type: ignore[attr-defined]
        if not path.exists():
            return None
        try:
            return records.loads(cls, path.read_text(encoding="utf-8"), where=str(path))
        except ConfigError:
            return None

    def write(self, record: Any, *, kind: str | None = None) -> None:
        write_text(self.record_path(kind or type(record).kind, record.key), records.dumps(record))

    def stage(
        self,
        cls: type[T],
        key: str,
        compute: Callable[[], T],
        *,
        name: str,
        valid: Callable[[T], bool] | None = None,
        kind: str | None = None,
    ) -> T:
        """Return the record with this key, computing and storing it only when it is not there.

        `valid` may look at the files a stored record points to; a record that fails it is made again.
        `kind` overrides the record's own kind when one kind is written by several stages.
        """
        found = self.find(cls, key, kind=kind)
        if found is not None and (valid is None or valid(found)):
            self.log("skip", name, key)
            return found
        self.log("start", name, key)
        began = time.monotonic()
        with friendly_disk_errors(self.root):
            record = compute()
            if record.key != key:  # type: ignore[attr-defined]
                raise AssertionError(f"stage {name} made key {record.key}, expected {key}")  # type: ignore[attr-defined]
            self.write(record, kind=kind)
        self.log("done", name, key, seconds=round(time.monotonic() - began, 3))
        return record

    def log(self, event: str, stage: str, key: str, **extra: Any) -> None:
        line = json.dumps(
            {"time": round(time.time(), 3), "event": event, "stage": stage, "key": key, **extra}
        )
        with friendly_disk_errors(self.root), (self.root / "log.jsonl").open("a", encoding="utf-8") as f:
            f.write(line + "\n")

    def file_ok(self, relative: str, n_bytes: int) -> bool:
        try:
            return self.path(relative).stat().st_size == n_bytes
        except (OSError, EdgepruneError):
            return False
