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
    }


def write_results(name: str, rows: Any) -> Path:
    """Write benchmarks/results/NAME.json with the machine, the command and the rows."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    path.write_text(json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n")
    return path


def edgeprune(*args: str) -> list[str]:
    return [sys.executable, "-m", "edgeprune", *args]
