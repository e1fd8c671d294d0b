"""One-shot pruning without recovery: every metric, same calibration text, WikiText-2 perplexity.

    .venv/bin/python benchmarks/metrics.py --data ../shared/data

Scores each metric in a fresh process (seconds without model loading, peak RSS with it), plans with it, cuts
in memory and reads the first --tokens tokens of the WikiText-2 test text in windows of 2048 and 128 tokens.
Rows are kept in benchmarks/results/metrics.json as they come, so a stopped run goes on where it was. Without
the data folder it says so and stops. Ratios are of decoder-layer parameters. Metrics that prune in sequence
(wanda-sp) are scored from the dense model here.
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
from edgeprune.pipeline import parent as parents
from edgeprune.records import Constraints, UnitRule
from edgeprune.rundir import RunDir

ROWS = (
    "random",
    "magnitude",
    "taylor-vector",
    "taylor-element1",
    "taylor-element2",
    "taylor-mix",
    "wanda-sp",
    "flap",
    "llm-bip:form=B",
    "saap",
    "adaptive-fusion",
)
ABLATIONS = (
    "llm-bip:form=A",
    "llm-bip:form=C",
    "saap:stability=none",
    "saap:stability=literal",
    "saap:stability=standardised",
    "adaptive-fusion:fusion=coarse",
    "adaptive-fusion:fusion=fine",
    "adaptive-fusion:fusion=half",
)
FREE = Constraints(
    format="none",
    ffn=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
    kv=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
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


def perplexity(model: torch.nn.Module, ids: np.ndarray, window: int) -> float:
    total = count = 0
    with torch.inference_mode():
        step = max(1, 2048 // window)
        windows = torch.from_numpy(ids[: len(ids) // window * window].reshape(-1, window)).long()
        for start in range(0, len(windows), step):
            part = windows[start : start + step]
            logits = model(part).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
            total += float(losses)
            count += part[:, 1:].numel()
    return float(np.exp(total / count))


def build(source: checkpoint.Source, graph: graphs.ModelGraph, kept: dict) -> torch.nn.Module:
    pruned = surgery.PrunedSource(source, graph, kept)
    return checkpoint.assemble(pruned, graphs.prune_dims(graph, kept))


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak, "poolable": metric.poolable(options)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", help="default: the model the tool itself takes")
    parser.add_argument("--metric", action="append", help="NAME[:switch=value,…]; default: all rows")
    parser.add_argument("--ablations", action="store_true", help="the ablation rows too")
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--allocation", action="append", choices=["uniform", "ffn", "protected", "global"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", default="metrics")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        score_job(json.loads(args.job))
        return
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

        def measure(kept: dict) -> dict:
            model = build(source, graph, kept)
            return {f"ppl_{w}": perplexity(model, ids, w) for w in (2048, 128)}

        dense_key = f"dense/{args.tokens}"
        if dense_key not in done:
            keep({"key": dense_key, "metric": "dense", "ratio": 0.0, "tokens": args.tokens, **measure({})})
        dense = done[dense_key]
        print(f"dense  {dense['ppl_2048']:.2f} (2048)  {dense['ppl_128']:.2f} (128)", flush=True)
        rows = args.metric or [*ROWS, *(ABLATIONS if args.ablations else ())]
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
            for label in rows:
                name, options = parse_metric(label)
                scored: dict | None = None
                for allocation in args.allocation or ["uniform"]:
                    for ratio in args.ratio or [0.2, 0.35]:
                        shape = f"{args.tokens}/{args.samples}x{args.length}"
                        key = f"{label}/{allocation}/{ratio}/{seed}/{shape}"
                        if key in done:
                            continue
                        if scored is None:
                            out = str(Path(scratch) / "scores.safetensors")
                            job = {
                                "folder": str(parent.folder),
                                "metric": name,
                                "options": options,
                                "windows": str(tokens_path),
                                "seed": seed,
                                "out": out,
                            }
                            child = subprocess.run(
                                [sys.executable, __file__, "--job", json.dumps(job)],
                                capture_output=True,
                                text=True,
                                check=False,
                            )
                            if child.returncode:
                                raise SystemExit(f"{label}: {child.stderr[-2000:]}")
                            scored = json.loads(child.stdout.splitlines()[-1])
                            values = load_file(out)
                        protected = (
                            planner.protected_layers(len(graph.dims.layers))
                            if allocation == "protected"
                            else frozenset()
                        )
                        space = planner.PlanSpace(
                            graph=graph,
                            scores=values,
                            poolable=scored["poolable"],
                            constraints=FFN_ONLY if allocation == "ffn" else FREE,
                            metric=name,
                            protected=protected,
                        )
                        try:
                            plan = planner.plan_ratio(
                                space, "global" if allocation == "global" else "uniform", ratio
                            )
                        except Exception as error:  # a row that cannot be planned is a result too
                            print(f"{key}: {error}", flush=True)
                            continue
                        row = {
                            "key": key,
                            "metric": label,
                            "allocation": allocation,
                            "ratio": ratio,
                            "reached": plan.ratio,
                            "seed": seed,
                            "tokens": args.tokens,
                            "score_s": round(scored["seconds"], 2),
                            "score_peak_rss_bytes": scored["peak_rss_bytes"],
                            **measure(plan.kept),
                        }
                        keep(row)
                        print(
                            f"{label:32s} {allocation:10s} {100 * plan.ratio:5.1f}%  seed {seed}  "
                            f"{row['ppl_2048']:8.2f} (2048) {row['ppl_128']:8.2f} (128)  "
                            f"{row['score_s']:5.1f} s  {row['score_peak_rss_bytes'] / 1e9:.2f} GB",
                            flush=True,
                        )
    table(done, args.tokens)


def table(done: dict[str, dict], tokens: int) -> None:
    """Mean and spread over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in done.values():
        if row["metric"] != "dense" and row["tokens"] == tokens:
            groups.setdefault((row["ratio"], row["metric"], row["allocation"]), []).append(row)
    print(f"\n{'metric':32s} {'allocation':10s} ratio  seeds  perplexity 2048      perplexity 128")
    for (ratio, metric, allocation), rows in sorted(groups.items(), key=lambda g: g[0]):
        cells = []
        for field in ("ppl_2048", "ppl_128"):
            values = [row[field] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):9.2f} ± {spread:6.2f}")
        print(f"{metric:32s} {allocation:10s} {ratio:5.2f} {len(rows):6d}  {cells[0]}  {cells[1]}")


if __name__ == "__main__":
    main()
