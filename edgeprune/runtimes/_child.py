"""Run one job in a fresh process that answers with a JSON file; a crash of a library ends only the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.errors import StageError

_TAIL_LINES = 3


def run(
    module: str,
    job: str,
    args: dict[str, Any],
    *,
    timeout_s: float,
    label: str,
    env: dict[str, str] | None = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Start `python -m module JOBFILE` and return its answer; `poll` is called about once a second meanwhile.

    Raises StageError with its last words, OSError for an error of the disk that the job names.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        job_file, result, errors = (Path(folder, n) for n in ("job.json", "result.json", "stderr"))
        job_file.write_text(
            json.dumps({**args, "job": job, "result": str(result), "parent": os.getpid()}), encoding="utf-8"
        )
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=Path(__file__).resolve().parents[2],  # found even when edgeprune is not installed
                env=env,
            )
            try:
                code = _wait(process, timeout_s, poll)
            except subprocess.TimeoutExpired:
                raise StageError(
                    f"{label} {job} did not finish within {timeout_s:.0f} s",
                    "use a smaller model or fewer tokens",
                ) from None
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if not result.exists():
            raise StageError(f"{label} {job} {_ending(code)}: {_tail(errors)}")
        answer = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        if answer.get("errno") is not None:
            # the run folder turns the disk's own errors into advice
            raise OSError(
                answer["errno"], os.strerror(answer["errno"]), args.get("out") or args.get("arrays")
            )
        raise StageError(answer["error"])
    return dict(answer["ok"])


def _wait(process: subprocess.Popen[bytes], timeout_s: float, poll: Callable[[], None] | None) -> int:
    if poll is None:
        return process.wait(timeout=timeout_s)
    end = time.monotonic() + timeout_s
    while True:
        try:
            return process.wait(timeout=min(1.0, max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                raise
            poll()


def _ending(code: int) -> str:
    if code >= 0:
        return f"stopped with exit code {code}"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"


def _tail(errors: Path) -> str:
    """The last lines a job wrote, as one line."""
    with errors.open("rb") as f:
        f.seek(max(0, errors.stat().st_size - 4096))
        lines = [line.strip() for line in f.read().decode("utf-8", "replace").splitlines()]
    return " | ".join([line for line in lines if line][-_TAIL_LINES:]) or "it said nothing"
