"""One-shot pruning without recovery: every metric, same calibration text, WikiText-2 perplexity.

    .venv/bin/python benchmarks/metrics.py --data ../shared/data                 uniform and own allocation
    .venv/bin/python benchmarks/metrics.py --data ../shared/data --ablations     the switches, too
    .venv/bin/python benchmarks/metrics.py --data ../shared/data --best --tokens 65536 --windows 2048
    .venv/bin/python benchmarks/metrics.py --cost                                seconds and RSS of scoring

Scores each metric in a fresh process, plans with it, cuts in memory and reads the first --tokens tokens of
the WikiText-2 test text in windows of 2048 and 128 tokens, in bfloat16 (which moves the dense model's
perplexity by 0.04%). Rows are kept in benchmarks/results/metrics.json as they come, so a stopped run goes on
where it was. Without the data folder it says so and stops. Ratios are of decoder-layer parameters. Metrics
that prune in sequence (wanda-sp) are scored from the dense model here. --cost wants an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from _common import RESULTS, ROOT, machine
from safetensors.numpy import load_file, save_file

from edgeprune import calibration, checkpoint, data, gradients, planner, registry, surgery, tokenizer
from edgeprune import graph as graphs
from edgeprune.errors import InfeasibleError
from edgeprune.pipeline import parent as parents
from edgeprune.records import Constraints, UnitRule
from edgeprune.rundir import RunDir

METRICS = (
    "random",
    "magnitude",
    "taylor-vector",
    "taylor-element1",
    "taylor-element2",
    "taylor-mix",
    "wanda-sp",
    "flap",
    "block-influence",
    "llm-bip",
    "saap",
    "adaptive-fusion",
)
UNIFORM = [(name, "uniform") for name in METRICS if name != "block-influence"]
# what a method itself would do, and for the better ones LLM-Pruner's choice: the first four and last two of
# 32 layers (scaled to the depth) stay whole, channels only; llm-bip's channels and groups share no scale
OWN = [
    *(
        (name, "protected")
        for name in (
            "taylor-vector",
            "taylor-element1",
            "wanda-sp",
            "flap",
            "llm-bip",
            "saap",
            "adaptive-fusion",
        )
    ),
    ("taylor-element1", "global"),
    ("flap", "global"),
    ("block-influence", "global"),
    ("llm-bip", "ffn"),
    ("llm-bip:form=C", "global"),
    ("saap", "global"),
    ("adaptive-fusion", "global"),
]
BEST = [("llm-bip", "protected"), ("saap", "protected"), ("adaptive-fusion", "protected")]
ABLATIONS = [
    ("llm-bip:form=A", "uniform"),
    ("llm-bip:form=C", "uniform"),
    *(
        (f"saap:stability={how}", where)
        for how in ("none", "literal", "standardised")
        for where in ("uniform", "global")
        if (how, where) != ("literal", "global")
    ),
    ("saap:terms=signed", "uniform"),
    *(
        (f"adaptive-fusion:fusion={how}", where)
        for how in ("coarse", "fine", "half")
        for where in ("uniform", "global")
    ),
    ("adaptive-fusion:terms=signed,normalise=layer", "uniform"),
]
FREE = Constraints(
    format="none",
    ffn=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False, whole=True),
    kv=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False, whole=True),
    reasons=(),
)
FFN_ONLY = Constraints(
    format="none",
    ffn=FREE.ffn,
    kv=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=True),
    reasons=(),
)


def parse_metric(label: str) -> tuple[str, dict[str, str]]:
    """'llm-bip:form=B,norm=l1' to its name and switches."""
    name, _, rest = label.partition(":")
    return name, dict(pair.split("=", 1) for pair in rest.split(",") if pair)


def wikitext(folder: Path) -> str:
    """Test rows joined with two newlines, each row as the data set stores it: with its own line end."""
    path = folder / "wikitext-2" / "wiki.test.raw"
    if not path.is_file():
        raise SystemExit(f"{path} is absent; give the data folder with --data")
    rows = path.read_text(encoding="utf-8").split("\n")
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def losses(model: torch.nn.Module, ids: np.ndarray, window: int) -> np.ndarray:
    """Mean loss of every group of windows of 2048 tokens together, in nats per token."""
    found = []
    with torch.inference_mode():
        step = max(1, 2048 // window)
        windows = torch.from_numpy(ids[: len(ids) // window * window].reshape(-1, window)).long()
        for start in range(0, len(windows), step):
            part = windows[start : start + step]
            logits = model(part).logits[:, :-1].float()
            found.append(
                float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
            )
    return np.array(found)


def build(source: checkpoint.Source, graph: graphs.ModelGraph, kept: dict) -> torch.nn.Module:
    pruned = surgery.PrunedSource(source, graph, kept)
    return checkpoint.assemble(pruned, graphs.prune_dims(graph, kept)).to(torch.bfloat16)


def peak_rss_bytes() -> int:
    """Of this process as this program; getrusage also counts what the parent held when it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def score_job(job: dict) -> None:
    """Child process: score once; print seconds and peak RSS."""
    source = checkpoint.SafetensorsSource(Path(job["folder"]))
    graph = graphs.build(source.config)
    metric = registry.load("metrics", job["metric"], "METRIC")
    options = metric.resolve(job["options"])
    windows = load_file(job["windows"])["tokens"]
    needs = metric.needs(options)
    backward = frozenset(n for n in needs if n.gradient)
    began = time.monotonic()
    arrays = calibration.collect(source, graph, windows, needs - backward) if needs - backward else {}
    if backward:
        arrays |= gradients.collect(source, graph, windows, backward, seed=job["seed"])
    scores = calibration.score(metric, options, source, graph, arrays, seed=job["seed"])
    seconds = time.monotonic() - began
    save_file({k: np.ascontiguousarray(v) for k, v in scores.items()}, job["out"])
    peak = peak_rss_bytes()
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak, "poolable": metric.poolable(options)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", help="default: the model the tool itself takes")
    parser.add_argument("--metric", action="append", help="NAME[:switch=value,…]; default: the table's rows")
    parser.add_argument("--ablations", action="store_true", help="the ablation rows instead")
    parser.add_argument("--best", action="store_true", help="the three methods' best allocations only")
    parser.add_argument("--cost", action="store_true", help="only time scoring, three times each")
    parser.add_argument("--table", action="store_true", help="only print the results there are, as in README")
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--allocation", action="append", choices=["uniform", "ffn", "protected", "global"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, action="append", help="default: 2048 and 128")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", default="metrics")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        score_job(json.loads(args.job))
        return
    if args.cost:
        cost(args)
        return
    if args.table:
        markdown(RESULTS / f"{args.out}.json", args.tokens)
        return
    windows_read = args.windows or [2048, 128]
    text = wikitext(args.data)
    calibration_text = data.read_text(str(args.data / "calibration" / "c4_demo.jsonl"))
    path = RESULTS / f"{args.out}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict] = {}
    if path.exists():
        done = {row["key"]: row for row in json.loads(path.read_text())["rows"]}
    with tempfile.TemporaryDirectory(prefix="edgeprune-metrics-") as scratch:
        with RunDir(Path(scratch) / "run") as run:
            parent = parents.open_parent(args.model, run)
        ids = np.asarray(tokenizer.encode(parent.folder, text)[: args.tokens])
        source, graph = parent.source, parent.graph

        def keep(row: dict) -> None:
            done[row["key"]] = row
            command = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
            path.write_text(
                json.dumps({"machine": machine(), "command": command, "rows": list(done.values())}, indent=1)
                + "\n"
            )

        measured: dict[str, dict] = {}

        def measure(kept: dict) -> dict:
            # two metrics may choose the same units
            same = json.dumps({name: list(units) for name, units in sorted(kept.items())})
            if same not in measured:
                model, out = build(source, graph, kept), {}
                for window in windows_read:
                    found = losses(model, ids, window)
                    out[f"ppl_{window}"] = float(np.exp(found.mean()))
                    out[f"ppl_{window}_first_8192"] = float(np.exp(found[:4].mean()))
                measured[same] = out
            return measured[same]

        dense_key = f"dense/{args.tokens}/{windows_read}"
        if dense_key not in done:
            keep({"key": dense_key, "metric": "dense", "ratio": 0.0, "tokens": args.tokens, **measure({})})
        print(
            "dense", {k: round(v, 2) for k, v in done[dense_key].items() if k.startswith("ppl")}, flush=True
        )
        for seed in range(args.seeds):
            windows = data.windows(
                calibration_text,
                lambda t: tokenizer.encode(parent.folder, t),
                n_samples=args.samples,
                n_tokens=args.length,
                seed=seed,
                where="c4_demo.jsonl",
            )
            tokens_path = Path(scratch) / f"tokens-{seed}.safetensors"
            save_file({"tokens": windows}, tokens_path)
            scored: dict[str, tuple[dict, dict]] = {}
            for label, allocation in chosen(args):
                for ratio in args.ratio or [0.2, 0.35]:
                    shape = f"{args.tokens}/{windows_read}/{args.samples}x{args.length}"
                    key = f"{label}/{allocation}/{ratio}/{seed}/{shape}"
                    if key in done:
                        continue
                    if label not in scored:
                        scored[label] = score_in_child(parent.folder, label, tokens_path, seed, Path(scratch))
                    facts, values = scored[label]
                    name = parse_metric(label)[0]
                    space = planner.PlanSpace(
                        graph=graph,
                        scores=values,
                        poolable=facts["poolable"],
                        constraints=FFN_ONLY if allocation in ("ffn", "protected") else FREE,
                        metric=name,
                        blocks=name == "block-influence",
                        protected=(
                            planner.protected_layers(len(graph.dims.layers))
                            if allocation == "protected"
                            else frozenset()
                        ),
                    )
                    how = "global" if allocation == "global" else "uniform"
                    row = {
                        "key": key,
                        "metric": label,
                        "allocation": allocation,
                        "ratio": ratio,
                        "seed": seed,
                    }
                    row["tokens"] = args.tokens
                    try:
                        plan = planner.plan_ratio(space, how, ratio)
                    except InfeasibleError as error:  # that a row cannot be planned is a result too
                        keep(row | {"error": str(error)})
                        print(f"{label:40s} {allocation:10s} {error}", flush=True)
                        continue
                    keep(row | {"reached": plan.ratio, **measure(plan.kept)})
                    figures = {k: round(v, 2) for k, v in measure(plan.kept).items() if "first" not in k}
                    print(f"{label:40s} {allocation:10s} {plan.ratio:.4f} seed {seed} {figures}", flush=True)
    for window in windows_read:
        table(done, args.tokens, window)


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    if args.metric:
        return [(label, where) for label in args.metric for where in args.allocation or ["uniform"]]
    rows = ABLATIONS if args.ablations else BEST if args.best else [*UNIFORM, *OWN]
    return [(label, where) for label, where in rows if not args.allocation or where in args.allocation]


def score_in_child(
    folder: Path, label: str, tokens: Path, seed: int, scratch: Path
) -> tuple[dict, dict[str, np.ndarray]]:
    """({seconds, peak_rss_bytes, poolable}, scores) of a fresh process."""
    name, options = parse_metric(label)
    out = scratch / "scores.safetensors"
    job = {"folder": str(folder), "metric": name, "options": options, "windows": str(tokens)}
    job |= {"seed": seed, "out": str(out)}
    child = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise SystemExit(f"{label}: {child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1]), load_file(out)


def cost(args: argparse.Namespace) -> None:
    """Seconds (without loading the model) and peak RSS (with it) of scoring, three fresh processes each."""
    shapes = [(10, 128, label) for label in args.metric or METRICS]
    if not args.metric:
        shapes += [
            (64, 128, label) for label in ("taylor-vector", "taylor-element1", "saap", "adaptive-fusion")
        ]
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-metrics-") as scratch:
        with RunDir(Path(scratch) / "run") as run:
            parent = parents.open_parent(args.model, run)
        weights = parent.graph.total_params * 4
        rng = np.random.default_rng(0)
        for samples, length, label in shapes:
            tokens = Path(scratch) / "tokens.safetensors"
            ids = rng.integers(0, parent.graph.dims.vocab, (samples, length))
            save_file({"tokens": ids.astype(np.int32)}, tokens)
            found = [
                score_in_child(parent.folder, label, tokens, 0, Path(scratch))[0]
                for _ in range(3 if samples == 10 else 1)
            ]
            seconds = sorted(f["seconds"] for f in found)
            peak = max(f["peak_rss_bytes"] for f in found)
            row = {"metric": label, "samples": samples, "length": length, "seconds": seconds}
            row |= {"peak_rss_bytes": peak, "peak_rss_of_fp32_weights": peak / weights}
            rows.append(row)
            print(
                f"{label:18s} {samples} x {length}  {seconds[len(seconds) // 2]:6.2f} s "
                f"({seconds[0]:.2f} to {seconds[-1]:.2f})  {peak / 1e9:.2f} GB, "
                f"{peak / weights:.2f} x fp32 weights",
                flush=True,
            )
    report = {"machine": machine(), "command": "benchmarks/metrics.py --cost", "rows": rows}
    (RESULTS / "metrics_cost.json").write_text(json.dumps(report, indent=1) + "\n")


def markdown(path: Path, tokens: int) -> None:
    """The committed rows as a table: mean ± sd over seeds, and what scoring cost."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["tokens"] == tokens]
    cost_path = RESULTS / "metrics_cost.json"
    costs = json.loads(cost_path.read_text())["rows"] if cost_path.exists() else []
    spent = {row["metric"]: row for row in costs if row["samples"] == 10}
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["metric"] != "dense" and "error" not in row:
            groups.setdefault((row["metric"], row["allocation"]), []).append(row)

    def cell(found: list[dict], ratio: float, field: str) -> str:
        values = [row[field] for row in found if row["ratio"] == ratio and field in row]
        if not values:
            return "-"
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        if mean >= 1000:
            return "> 1000"
        return f"{mean:.1f} ± {spread:.1f}"

    def order(group: tuple[tuple[str, str], list[dict]]) -> tuple[str, float]:
        (_, allocation), found = group
        return allocation, statistics.mean(row["ppl_2048"] for row in found if row["ratio"] == 0.2)

    print("| metric | allocation | 20%, 2048 | 20%, 128 | 35%, 2048 | 35%, 128 | score, s | peak RSS, GB |")
    print("|---|---|---|---|---|---|---|---|")
    dense = [row for row in rows if row["metric"] == "dense" and "ppl_128" in row]
    for row in dense[:1]:
        print(f"| dense | | {row['ppl_2048']:.1f} | {row['ppl_128']:.1f} | | | | |")
    for (metric, allocation), found in sorted(groups.items(), key=order):
        cells = [cell(found, r, f"ppl_{w}") for r in (0.2, 0.35) for w in (2048, 128)]
        one = spent.get(metric) if allocation == "uniform" else None
        paid = [f"{one['seconds'][1]:.1f}", f"{one['peak_rss_bytes'] / 1e9:.2f}"] if one else ["", ""]
        print("| " + " | ".join([f"`{metric}`", allocation, *cells, *paid]) + " |")


def table(done: dict[str, dict], tokens: int, window: int) -> None:
    """Mean and spread over seeds."""
    groups: dict[tuple, list[float]] = {}
    for row in done.values():
        if row["metric"] != "dense" and row["tokens"] == tokens and f"ppl_{window}" in row:
            place = (row["ratio"], row["metric"], row["allocation"])
            groups.setdefault(place, []).append(row[f"ppl_{window}"])
    print(f"\n{'metric':46s} {'allocation':10s} ratio  seeds  perplexity, window {window}")
    for (ratio, metric, allocation), values in sorted(groups.items(), key=lambda g: (g[0][0], np.mean(g[1]))):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{metric:46s} {allocation:10s} {ratio:5.2f} {len(values):6d}  "
            f"{statistics.mean(values):9.2f} ± {spread:.2f}"
        )


if __name__ == "__main__":
    main()
