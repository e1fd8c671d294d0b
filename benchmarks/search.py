"""The search against measuring a whole grid: what each finds at five budgets, and how long it takes.

    .venv/bin/python benchmarks/search.py --keep runs
    .venv/bin/python benchmarks/search.py --table          only print the results there are
    .venv/bin/python benchmarks/search.py --keep runs --points     files of the grid: bytes and KL
    .venv/bin/python benchmarks/search.py --figure docs/curve.svg  the same, drawn

The grid is 8 shares of the decoder layers times 8 quantizations; at each budget every pair of it that is
predicted to fit is exported, verified and measured, in one run folder, so that what two budgets share is done
once. Its time is the sum of the seconds of all stages a budget needs, wherever they were worked out; 'of all'
is against all 64 pairs as they were measured at the largest budget: what the grid costs without a prediction
of what fits. The search has a fresh folder for every budget and is timed from start to end, as a user sees
it. Both are judged on the same tokens, so the difference between their choices has an error of its own:
'held' says that the search's choice is better, or that the paired difference's 95% interval reaches zero.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib

from _common import RESULTS, write_results
from safetensors.numpy import load_file

import edgeprune
from edgeprune import quality
from edgeprune.errors import InfeasibleError
from edgeprune.progress import Lines

RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
TYPES = (
    *("Q8_0", "Q5_0", "Q4_K_M", "IQ4_NL", "Q4_0", "Q5_0+embedding=Q5_0"),
    *("IQ4_XS+embedding=Q5_0", "IQ4_NL+embedding=IQ4_NL"),
)
GRID = tuple(itertools.product(RATIOS, TYPES))
BUDGETS = ("200MB", "140MB", "125MB", "115MB", "105MB")


def seconds_of(folder: Path, mark: int) -> float:
    """Seconds of every stage that the lines of log.jsonl behind `mark` name, as they first took."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    spent = {e["key"]: e["seconds"] for e in lines if e["event"] == "done" and "seconds" in e}
    return sum(spent.get(key, 0.0) for key in {e["key"] for e in lines[mark:]})


def run(budget: str, folder: Path, grid: tuple[tuple[float, str], ...]) -> dict[str, Any]:
    """One main job: what it chose, how many it measured, its wall time and the arrays behind its choice."""
    log = folder / "log.jsonl"
    mark = len(log.read_text().splitlines()) if log.exists() else 0
    began = time.monotonic()
    with contextlib.suppress(InfeasibleError):
        edgeprune.fit(
            target="laptop-cpu",
            budget=budget,
            out=folder,
            progress=Lines(sys.stderr),
            **({"grid": grid, "compensation": "none"} if grid else {}),
        )
    wall = time.monotonic() - began
    result = edgeprune.api.read(folder)
    found = {
        "measured": sum(c.measured is not None for c in result.candidates),
        "seconds": round(seconds_of(folder, mark) if grid else wall, 1),
    }
    if result.selected is None:
        return {**found, "selected": None}
    c = result.selected
    assert c.quality is not None and c.measured is not None and c.artifact is not None
    records = [json.loads(p.read_text()) for p in (folder / "records").glob("quality_result-*.json")]
    judged = next(r for r in records if r["artifact_sha256"] == c.artifact.sha256 and r["kl"] == c.quality.kl)
    return {
        **found,
        "selected": c.id,
        "kl": c.quality.kl,
        "kl_stderr": c.quality.kl_stderr,
        "peak_bytes": c.measured.peak_memory_bytes,
        "arrays": str(folder / judged["kl_arrays"]),
        "stopped": (result.report.get("search") or {}).get("stopped"),
    }


def compare(budget: str, place: Path) -> dict[str, Any]:
    grid = run(budget, place / "grid", GRID)
    search = run(budget, place / f"search-{budget}", ())
    row: dict[str, Any] = {"budget": budget, "grid_pairs": len(GRID)}
    if grid["selected"] and search["selected"]:
        pair = quality.paired_difference(
            load_file(search["arrays"])["kl"], load_file(grid["arrays"])["kl"]
        )  # search - grid
        row |= {"difference": pair.difference, "low": pair.low, "high": pair.high, "held": pair.low <= 0}
    else:
        row["held"] = bool(search["selected"]) or not grid["selected"]
    for one in (grid, search):
        one.pop("arrays", None)
    return {**row, "grid": grid, "search": search, "share": round(search["seconds"] / grid["seconds"], 3)}


def points(folder: Path) -> list[dict[str, Any]]:
    """Every file of the grid: what was cut, its type, bytes and KL with an F16 cache (the lowest it has)."""
    records = [json.loads(p.read_text()) for p in (folder / "records").glob("*.json")]
    best: dict[str, dict[str, Any]] = {}
    for r in records:
        if r.get("kind") == "quality_result":
            other = best.get(r["artifact_sha256"])
            best[r["artifact_sha256"]] = r if other is None or r["kl"] < other["kl"] else other
    out = []
    for r in records:
        found = re.fullmatch(r"artifacts/(.+)-[0-9a-f]{8}-(.+)\.gguf", r.get("path", ""))
        if found and r.get("sha256") in best:
            judged = best[r["sha256"]]
            out.append(
                {
                    "plan": found[1],
                    "quantization": found[2],
                    "bytes": r["bytes"],
                    "kl": judged["kl"],
                    "kl_stderr": judged["kl_stderr"],
                }
            )
    return sorted(out, key=lambda p: (p["plan"] != "dense", p["bytes"]))


def frontier(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no smaller file beats."""
    out: list[dict[str, Any]] = []
    for p in sorted(found, key=lambda p: (p["bytes"], p["kl"])):
        if not out or p["kl"] < out[-1]["kl"]:
            out.append(p)
    return out


def figure(found: list[dict[str, Any]], out: Path) -> None:
    import vl_convert

    names = {True: "quantized only", False: "pruned and quantized"}
    series = {names[d]: [p for p in found if (p["plan"] == "dense") is d] for d in (True, False)}

    def values(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        return [{"MB": p["bytes"] / 1e6, "KL": p["kl"], "how": name} for p in rows]

    x = {"field": "MB", "type": "quantitative", "scale": {"zero": False}, "title": "file, MB"}
    y = {
        "field": "KL",
        "type": "quantitative",
        "scale": {"type": "log", "domainMin": 0.004},
        "axis": {"values": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]},
        "title": "KL to the dense model, nats/token",
    }
    color = {
        "field": "how",
        "sort": list(names.values()),
        "scale": {"range": ["#2f55b8", "#9a6b00"]},
        "legend": {"title": None, "orient": "top", "columnPadding": 28},
    }
    encoding = {"x": x, "y": y, "color": color}
    dots = [v for name, rows in series.items() for v in values(rows, name)]
    best = [v for name, rows in series.items() for v in values(frontier(rows), name)]
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 560,
        "height": 320,
        "background": "white",
        "layer": [
            {"data": {"values": best}, "mark": {"type": "line", "strokeWidth": 2}, "encoding": encoding},
            {
                "data": {"values": dots},
                "mark": {"type": "point", "filled": True, "size": 40},
                "encoding": encoding,
            },
        ],
    }
    out.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")


def show(rows: list[dict[str, Any]]) -> None:
    names = ("budget", "grid", "measured", "s", "KL", "search", "measured", "s", "KL", "difference (95%)")
    print(f"| {' | '.join((*names, 'time', 'of all'))} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    whole = max(r["grid"]["seconds"] for r in rows if r["grid"]["measured"] == r["grid_pairs"])
    for r in rows:
        cells = []
        for one in (r["grid"], r["search"]):
            kl = f"{one['kl']:.4f} ± {one['kl_stderr']:.4f}" if one["selected"] else "-"
            cells += [one["selected"] or "nothing", str(one["measured"]), f"{one['seconds']:.0f}", kl]
        between = f"{r['difference']:+.4f} ({r['low']:+.4f} to {r['high']:+.4f})" if "low" in r else "-"
        print(
            f"| {r['budget']} | {' | '.join(cells)} | {between} | {100 * r['share']:.0f}% "
            f"| {100 * r['search']['seconds'] / whole:.0f}% |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", action="append", help="may be repeated; default: five")
    parser.add_argument("--keep", type=Path, help="keep the run folders here, and go on with them")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--points", action="store_true", help="write benchmarks/results/curve.json")
    parser.add_argument("--figure", type=Path, metavar="SVG", help="draw benchmarks/results/curve.json")
    args = parser.parse_args()
    stored = RESULTS / "search.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    if args.table:
        show(rows)
        return
    if args.points:
        write_results("curve", points(args.keep / "grid"))
        return
    if args.figure:
        figure(json.loads((RESULTS / "curve.json").read_text())["rows"], args.figure)
        return
    with tempfile.TemporaryDirectory(prefix="edgeprune-search-") as scratch:
        for budget in args.budget or BUDGETS:
            row = compare(budget, args.keep or Path(scratch))
            rows = [r for r in rows if r["budget"] != budget] + [row]
            rows.sort(key=lambda r: -float(r["budget"].removesuffix("MB")))
            write_results("search", rows)
    show(rows)
    found = [r["search"]["kl"] for r in rows if r["search"]["selected"]]
    print("quality never falls when the budget grows:", found == sorted(found))


if __name__ == "__main__":
    main()
