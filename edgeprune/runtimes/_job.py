"""What a worker process does around its job; `_child` is the other side."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


class JobError(Exception):
    """Something the caller should read in one line."""


Job = Callable[[dict[str, Any]], dict[str, Any]]
Explain = Callable[[str, Exception], dict[str, Any] | None]  # name of the job, error -> answer; None: raise


def serve(job_file: str, jobs: Mapping[str, Job], explain: Explain) -> NoReturn:
    """Do the job of a file, write its answer beside it whole, and end this process."""
    with open(job_file, encoding="utf-8") as f:
        job = json.load(f)
    _die_with(job["parent"])
    answer: dict[str, Any] | None
    try:
        answer = {"ok": jobs[job["job"]](job)}
    except JobError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "not enough memory"}
    except Exception as error:
        answer = explain(job["job"], error)
        if answer is None:
            raise
    temporary = job["result"] + ".part"
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(answer, f)
    os.replace(temporary, job["result"])
    sys.stdout.flush()
    # the libraries' own exit handlers have nothing left to save and may crash
    os._exit(0)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent goes, so a killed run leaves no worker behind."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
