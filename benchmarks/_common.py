"""What the benchmark scripts share: the machine they ran on, and where results go."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """CPU, memory, versions and commit, so that a row can be judged later."""
    from edgeprune.devices import local
    from edgeprune.report.build import versions

    facts = local.detect(probe_seconds=0)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": facts["cpu"],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": facts["memory_bytes"],
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "doubts": doubts(),
    }


def _state() -> tuple[Any, float, float]:
    from edgeprune import bench
    from edgeprune.devices import local

    return local.environment(), time.monotonic(), bench.own_s()


def doubts() -> list[str]:
    """Why figures timed since this script started may not be the machine's own."""
    from edgeprune import bench

    before, began, own = _BEFORE
    after, now, used = _state()
    return list(bench.doubts(before, after, elapsed_s=now - began, own_s=used - own))


_BEFORE = _state()


def write_results(name: str, rows: Any) -> Path:
    """Write benchmarks/results/NAME.json with the machine, the command and the rows."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    path.write_text(json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n")
    return path


def edgeprune(*args: str) -> list[str]:
    return [sys.executable, "-m", "edgeprune", *args]


# a process starts with the peak of the one that spawned it: a small one has to stand between
_WAIT = """
import os, sys
silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=silent)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def call(command: list[str]) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of a command in a process of its own; ends the script when it fails."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _WAIT, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.monotonic() - began, int(done.stdout)
