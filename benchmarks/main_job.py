"""The main job at several budgets, each in a fresh folder: what it chose, how long it took, what held.

    .venv/bin/python benchmarks/main_job.py --budget 200MB --budget 150MB --budget 120MB

Prints one row per budget and writes benchmarks/results/main_job.json: wall time, candidates measured,
the selected candidate, measured peak memory against the budget, the largest difference between predicted
and measured peak memory, and whether every predicted file size equals the real one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from _common import RESULTS, ROOT, edgeprune, write_results


def one(budget: str, folder: Path, extra: list[str]) -> dict:
    began = time.monotonic()
    done = subprocess.run(
        edgeprune("--target", "laptop-cpu", "--budget", budget, "--out", str(folder), *extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.monotonic() - began
    report_path = folder / "report.json"
    if not report_path.exists():
        raise SystemExit(f"{budget}: exit {done.returncode}\n{done.stderr[-2000:]}")
    report = json.loads(report_path.read_text())
    measured = [c for c in report["candidates"] if c["measured"]]
    ratios = [c["predicted"]["peak_memory_bytes"] / c["measured"]["peak_memory_bytes"] for c in measured]
    chosen = next((c for c in report["candidates"] if c["id"] == report["selected"]), None)
    stages: dict[str, float] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "done" and "seconds" in event:
            name = event["stage"].split()[0]
            stages[name] = round(stages.get(name, 0.0) + event["seconds"], 1)
    return {
        "stage_s": stages,
        "budget": budget,
        "exit": done.returncode,
        "wall_s": round(wall, 1),
        "measured": len(measured),
        "selected": report["selected"],
        "kl": chosen and chosen["quality"]["kl"],
        "selected_peak_bytes": chosen and chosen["measured"]["peak_memory_bytes"],
        "budget_bytes": report["budget"]["memory"]["value"],
        "peak_predicted_over_measured": ([round(min(ratios), 3), round(max(ratios), 3)] if ratios else None),
        "file_bytes_exact": all(
            c["predicted"]["file_bytes"] == c["artifact"]["bytes"] for c in measured if c["artifact"]
        ),
        "headline": report["headline"],
        "table": done.stdout,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", action="append", help="memory budget; may be repeated")
    parser.add_argument("--model", help="default: the model the tool itself takes")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    extra = ["--model", args.model] if args.model else []
    stored = RESULTS / "main_job.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    print("budget    wall s  measured  peak/budget  pred/meas peak   bytes exact  selected")
    for budget in args.budget or ["200MB", "150MB", "120MB"]:
        with tempfile.TemporaryDirectory(prefix="edgeprune-bench-") as scratch:
            folder = args.keep / budget if args.keep else Path(scratch) / "run"
            row = one(budget, folder, extra)
        # rows of other budgets stay; each is written as soon as it is there
        rows = [old for old in rows if old["budget"] != budget] + [row]
        path = write_results("main_job", rows)
        peak = row["selected_peak_bytes"]
        share = f"{peak / row['budget_bytes']:.3f}" if peak else "-"
        low, high = row["peak_predicted_over_measured"] or (float("nan"), float("nan"))
        print(
            f"{budget:9s} {row['wall_s']:6.0f}  {row['measured']:8d}  {share:>11s}  {low:.3f} - {high:.3f}  "
            f"{row['file_bytes_exact']!s:>11s}  {row['selected']}",
            flush=True,
        )
    print("written to", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
