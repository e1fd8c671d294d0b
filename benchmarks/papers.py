"""The papers' table: perplexity and seven zero-shot tasks of dense, baselines, methods, default recipe.

    .venv/bin/python benchmarks/papers.py --data ../shared/data --items 200 --tokens 65536
    python benchmarks/papers.py --model huggyllama/llama-7b --protocol --device cuda --dtype float16 \\
        --data DIR --out benchmarks/results/papers-llama-7b.json

Every row is one `edgeprune prune` (and, tuned, one `edgeprune recover`) in a fresh process, then the suite on
the folder it made, in torch. Ratios are of decoder-layer parameters. --protocol prunes as LLM-Pruner does: 10
samples of 128 tokens, the first 4 and last 2 of 32 layers untouched (scaled with depth), uniform, nothing
compensated; without it every metric has `edgeprune prune`'s own defaults for everything but the metric.
Rows and items are kept as they come, so a stopped run goes on; --keep also keeps models and finished items.
Tasks and texts that the data folder lacks are left out and named. For LLaMA-7B the published figures stand
beside what was measured; --show prints the table only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from _common import RESULTS, edgeprune, machine

from edgeprune import locate, rundir
from edgeprune.evaluation import localdata, run, suites
from edgeprune.evaluation.engines import Settings
from edgeprune.pipeline import parent as parents
from edgeprune.progress import Lines

METRICS = (
    *("random", "magnitude", "taylor-vector", "taylor-element1", "wanda-sp", "flap", "block-influence"),
    *("llm-bip", "saap", "adaptive-fusion"),
)
DEFAULT = "default recipe"
# published for LLaMA-7B: WikiText-2 perplexity in windows of 128 tokens, average of the seven tasks
PUBLISHED: dict[tuple[str, float, bool], tuple[float, float | None]] = {
    ("dense", 0.0, False): (12.62, 63.25),
    ("magnitude", 0.2, False): (582.0, 42.65),
    ("random", 0.2, False): (27.5, 52.69),
    ("taylor-vector", 0.2, False): (22.28, 53.25),
    ("taylor-element1", 0.2, False): (19.09, 56.69),
    ("taylor-element1", 0.2, True): (17.58, 59.23),
    ("taylor-element1", 0.5, False): (112.0, 42.13),
    ("taylor-element1", 0.5, True): (38.12, 48.69),
    ("flap", 0.2, False): (14.62, None),
    ("flap", 0.5, False): (31.80, None),
}
COMMAND = (
    "python benchmarks/papers.py --model huggyllama/llama-7b --protocol --device cuda --dtype float16 "
    "--data DIR --out benchmarks/results/papers-llama-7b.json"
)


def prune_options(args: argparse.Namespace, name: str, n_layers: int) -> list[str]:
    calibration = args.data / "calibration" / "c4_demo.jsonl"
    text = ["--calibration", str(calibration)] if calibration.is_file() else []
    if name == DEFAULT:
        return [*text, "--samples", "64"]
    blocks = ["--allocator", "global", "--blocks"] if name == "block-influence" else []
    if not args.protocol:
        return [*text, "--samples", "64", "--metric", name, *blocks]
    return [
        *(*text, "--samples", "10", "--length", "128", "--metric", name, "--compensation", "none"),
        *(blocks or ["--allocator", "uniform"]),
        *("--protect-first", str(round(n_layers * 4 / 32)), "--protect-last", str(round(n_layers * 2 / 32))),
    ]


def work(command: list[str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}")
    return round(time.monotonic() - began, 1)


def made(
    args: argparse.Namespace, dense: Path, work_dir: Path, name: str, ratio: float, tuned: bool, layers: int
) -> tuple[Path, dict[str, Any]]:
    """The folder of one row; an earlier one with the same options is taken again."""
    if name == "dense":
        return dense, {}
    options = prune_options(args, name, layers)
    folder = work_dir / f"{name.replace(' ', '-')}-{ratio}{'-protocol' if args.protocol else ''}"
    facts: dict[str, Any] = {}
    if not (folder / "edgeprune_plan.json").is_file():
        facts["prune_seconds"] = work(
            edgeprune("prune", str(dense), "--ratio", str(ratio), "--out", str(folder), *options)
        )
    facts["reached"] = json.loads((folder / "edgeprune_plan.json").read_text())["ratio"]
    if not tuned:
        return folder, facts
    out = folder.with_name(f"{folder.name}-tuned")
    if not (out / "config.json").is_file():
        more = [x for option in args.recover_option for x in option.split("=", 1)]
        facts["recover_seconds"] = work(
            edgeprune(
                *("recover", str(folder), "--parent", str(dense), "--recovery-minutes", str(args.minutes)),
                *("--recovery", args.recovery, "--out", str(out), *more),
            )
        )
    return out, facts


def show(rows: list[dict[str, Any]], model: str) -> None:
    llama = "llama-7b" in model.lower()
    print(
        f"{model}; ratios of decoder-layer parameters; windows as named, means over the tasks that were run"
    )
    head = f"{'row':18} {'ratio':>5} {'tuned':>5} {'wiki 128':>9} {'wiki 2048':>9}"
    head += f" {'ptb 128':>8} {'ptb 2048':>8}"
    print(f"{head} {'acc':>6} {'acc*':>6}" + (f" {'pub. 128':>9} {'pub. avg':>8}" if llama else ""))
    found = {(r["row"], r["ratio"], r["tuned"]): r for r in rows}
    order = ["dense", *METRICS, DEFAULT]
    keys = sorted({*found, *(PUBLISHED if llama else ())}, key=lambda k: (k[1], k[2], order.index(k[0])))
    for key in keys:
        result = found.get(key, {}).get("result")
        ppl = {(t["text"], t["window"]): t["value"] for t in result["texts"]} if result else {}
        cells = [ppl.get((t, w)) for t in ("wikitext2", "ptb") for w in (128, 2048)]
        mean = result["averages"] if result else None
        line = f"{key[0]:18} {key[1]:5.2f} {'yes' if key[2] else 'no':>5} "
        line += " ".join(
            "-".rjust(n) if c is None else f"{c:{n}.2f}" for c, n in zip(cells, (9, 9, 8, 8), strict=True)
        )
        for metric in ("acc", "acc_norm_where_defined"):
            line += f" {100 * mean[metric]:6.2f}" if mean else f" {'-':>6}"
        if llama:
            ppl_there, average = PUBLISHED.get(key, (None, None))
            line += f" {'-' if ppl_there is None else format(ppl_there, '.2f'):>9}"
            line += f" {'-' if average is None else format(average, '.2f'):>8}"
        print(line)
    print("acc: plain accuracy; acc*: acc_norm where the task has it")
    if llama and not rows:
        print(f"nothing was measured here yet; this fills the columns on a GPU machine:\n  {COMMAND}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the official files")
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: edgeprune's own")
    parser.add_argument("--rows", nargs="*", default=["dense", *METRICS, DEFAULT])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.5])
    parser.add_argument("--tuned", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--recovery", default="lora", help="method of `edgeprune recover`")
    parser.add_argument("--minutes", type=float, default=10.0, help="of recovery, for each tuned row")
    parser.add_argument("--recover-option", action="append", default=[], metavar="--OPTION=VALUE")
    parser.add_argument("--items", type=int, help="of each task; default: all")
    parser.add_argument("--tokens", type=int, help="of each text; default: all")
    parser.add_argument("--tasks", nargs="*", default=list(suites.find("papers").names))
    parser.add_argument("--protocol", action="store_true", help="prune as LLM-Pruner does")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--keep", type=Path, help="folder for pruned models and items; default: a temporary one"
    )
    parser.add_argument("--show", action="store_true", help="print the table of what is stored")
    parser.add_argument("--out", type=Path, default=RESULTS / "papers.json")
    args = parser.parse_args()
    name = args.model or "default"
    stored = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    asked = {"model": name, "items": args.items, "tokens": args.tokens, "protocol": args.protocol}
    asked |= {"seed": args.seed, "dtype": args.dtype, "tasks": args.tasks}
    rows = lambda: [r for r in stored if all(r.get(k) == v for k, v in asked.items())]  # noqa: E731
    if args.show:
        show([r for r in stored if r["model"] == name], name)
        return
    if args.data is None or not args.data.is_dir():
        raise SystemExit("give the folder with the official files: --data DIR")
    suite = suites.chosen(suites.find("papers"), names=args.tasks, items=args.items, tokens=args.tokens)
    there = [
        n
        for n in suite.names
        if (localdata.text_file if n in suites.TEXTS else localdata.task_file)(args.data, n) is not None
    ]
    absent = [n for n in suite.names if n not in there]
    if absent:
        print(f"left out, {args.data} has no file of them: {', '.join(absent)}", flush=True)
    if not there:
        raise SystemExit("nothing to score")
    suite = suites.chosen(suite, names=there, items=None, tokens=None)
    sources = run.open_sources(suite, args.data)
    settings = Settings(threads=args.threads, dtype=args.dtype, device=args.device)
    tuned = {"no": [False], "yes": [True], "both": [False, True]}[args.tuned]
    wanted = [("dense", 0.0, False)] if "dense" in args.rows else []
    others = [r for r in args.rows if r != "dense"]
    wanted += [(r, ratio, t) for ratio, t, r in itertools.product(args.ratios, tuned, others)]

    with tempfile.TemporaryDirectory() as scratch:
        work_dir = args.keep or Path(scratch)
        with rundir.RunDir(work_dir / "run") as folder:
            parent = parents.open_parent(str(locate.resolve_model(args.model)), folder)
            dense, layers = parent.folder, len(parent.graph.dims.layers)
            for row, ratio, is_tuned in wanted:
                if any((r["row"], r["ratio"], r["tuned"]) == (row, ratio, is_tuned) for r in rows()):
                    continue
                kept = {**asked, "row": row, "ratio": ratio, "tuned": is_tuned, "absent": absent}
                try:
                    path, facts = made(args, dense, work_dir, row, ratio, is_tuned, layers)
                except RuntimeError as error:
                    print(f"{row} {ratio} tuned {is_tuned}: {error}", flush=True)
                    continue
                began = time.monotonic()
                scored = run.score(
                    *(path, suite, sources, folder),
                    settings=settings,
                    seed=args.seed,
                    progress=Lines(sys.stderr),
                )
                kept |= {"eval_seconds": round(time.monotonic() - began, 1), **facts}
                kept["recovery"] = f"{args.recovery}, {args.minutes:g} min" if is_tuned else None
                kept["result"] = {**run.describe(scored), "path": row}
                stored.append(kept)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                part = args.out.with_suffix(".part")
                command = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
                part.write_text(
                    json.dumps({"machine": machine(), "command": command, "rows": stored}, indent=1) + "\n"
                )
                os.replace(part, args.out)
                if args.keep is None and row != "dense" and is_tuned:
                    shutil.rmtree(path)
    show(rows(), name)


if __name__ == "__main__":
    main()
