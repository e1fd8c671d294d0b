"""What is done around the metric: dense, each switch alone, the default recipe.

    .venv/bin/python benchmarks/quality.py --data ../shared/data
    .venv/bin/python benchmarks/quality.py --table             the README's table, from the rows there are
    .venv/bin/python benchmarks/quality.py --figure docs/quality.svg

Every row is one `edgeprune prune` in a fresh process (seconds and peak RSS are those of the whole command),
then perplexity on WikiText-2 in windows of 2048 and 128 tokens and KL to the dense model on C4 text that is
not the calibration text. Ratios are of decoder-layer parameters. Rows are kept in
benchmarks/results/quality.json as they come, so a stopped run goes on where it was. `--split valid` reads
WikiText-2 validation text, which recipes may be tuned on; the test text is for reporting only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from _common import RESULTS, ROOT, call, edgeprune, machine

from edgeprune import locate, reconstruction, surgery, tokenizer
from edgeprune.pipeline import parent as parents
from edgeprune.rundir import RunDir

ONE = ("--metric", "llm-bip", "--allocator", "uniform", "--compensation", "none")
RELATIVE = ("--metric-option", "tokens=relative")
RECIPES: dict[str, tuple[str, ...]] = {
    "uniform": ONE,
    "relative": (*ONE, *RELATIVE),
    "ridge": (*ONE, "--compensation", "ridge"),
    "bias": (*ONE, "--compensation", "bias"),
    "sensitivity": (*ONE, "--allocator", "sensitivity"),
    "steps": (*ONE, "--steps", "3"),
    "search": (*ONE, "--allocator", "search"),
    "blocks": ("--metric", "block-influence", "--allocator", "global", "--blocks", "--compensation", "none"),
    "sensitivity-blocks": (*ONE, "--allocator", "sensitivity", "--blocks"),
    "flap-bias": ("--metric", "flap", "--allocator", "global", "--compensation", "bias"),
    "relative-ridge": (*ONE, *RELATIVE, "--compensation", "ridge"),
    "relative-ridge-steps": (*ONE, *RELATIVE, "--compensation", "ridge", "--steps", "3"),
    "ridge-rechoose": (*ONE, "--compensation", "ridge", "--rechoose"),
    "default": (),
    "default-rechoose": ("--rechoose",),
    "default-steps": ("--steps", "3"),
    "default-search": ("--allocator", "search"),
}


def texts(data: Path, split: str) -> tuple[Path, str, str]:
    """Calibration file, evaluation text, text for KL."""
    calibration = data / "calibration" / "c4_demo.jsonl"
    name = {"test": "wiki.test.raw", "valid": "wiki.valid.tokens"}[split]
    read = (data / "wikitext-2" / name).read_text(encoding="utf-8")
    if split == "test":
        read = "\n\n".join(read.split("\n"))
    return calibration, read, (data / "calibration" / "exllamav2_c4.utf8").read_text(encoding="utf-8")


def losses(model: Any, ids: np.ndarray, window: int) -> float:
    """Perplexity of ids in windows; the last part that fills none is left out."""
    rows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    batch = max(1, 2048 // window)
    total, n = 0.0, 0
    for part in rows.split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
        n += part[:, 1:].numel()
    return float(np.exp(total / n))


def kl(model: Any, dense: Any, ids: np.ndarray, window: int) -> float:
    rows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    total = 0.0
    for row in rows:
        p, q = (
            torch.log_softmax(m(row[None], use_cache=False).logits[0].float(), dim=-1) for m in (dense, model)
        )
        total += float((p.exp() * (p - q)).sum())
    return total / rows.numel()


class Judge:
    """Reads one folder after the other; the dense model stays."""

    def __init__(
        self, folder: Path, text: str, other: str, args: argparse.Namespace, *, fp32: bool = False
    ) -> None:
        self._kind = torch.bfloat16 if reconstruction.half_is_fast() and not fp32 else torch.float32
        self._ids = np.asarray(tokenizer.encode(folder, text), dtype=np.int32)[: args.tokens]
        self._other = np.asarray(tokenizer.encode(folder, other), dtype=np.int32)[: args.kl_tokens]
        self._dense = surgery.load(folder, dtype=self._kind)

    def __call__(self, folder: Path | None) -> dict[str, float]:
        return self._read(folder, perplexity_2048=(self._ids, 2048), perplexity_128=(self._ids, 128))

    def _read(self, folder: Path | None, **asked: tuple[np.ndarray, int]) -> dict[str, float]:
        """Perplexities of token ids in windows, by name, and KL to the dense model."""
        model = self._dense if folder is None else surgery.load(folder, dtype=self._kind)
        with torch.inference_mode():
            return {
                **{name: losses(model, ids, window) for name, (ids, window) in asked.items()},
                "kl_c4": 0.0 if folder is None else kl(model, self._dense, self._other, 512),
            }


def prune(
    model: str, out: Path, ratio: float, seed: int, calibration: Path, more: tuple[str, ...]
) -> dict[str, Any]:
    """One command in a process of its own; its time, its peak memory and the plan it made."""
    command = edgeprune(
        *("prune", model, "--ratio", str(ratio), "--seed", str(seed), "--calibration", str(calibration)),
        *("--samples", "64", "--out", str(out), *more),
    )
    seconds, peak = call(command)
    plan = json.loads((out / "edgeprune_plan.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak,
        "reached": plan["ratio"],
        "kv": [s["n_kv_heads"] for s in plan["dims"]["layers"]],
        "ffn": [s["n_ff"] for s in plan["dims"]["layers"]],
    }


def show(rows: list[dict[str, Any]]) -> None:
    dense = next(r for r in rows if r["recipe"] == "dense")
    print(f"dense: {dense['perplexity_2048']:.2f} at 2048, {dense['perplexity_128']:.2f} at 128")
    print(
        f"{'recipe':22} {'ratio':>5} {'ppl 2048':>16} {'excess':>7} {'ppl 128':>9} {'KL C4':>7}      s    GB"
    )
    key = lambda r: (r["ratio"], list(RECIPES).index(r["recipe"]))  # noqa: E731
    for (ratio, _), group in itertools.groupby(
        sorted((r for r in rows if r["recipe"] != "dense"), key=key), key
    ):
        found = list(group)
        ppl = [r["perplexity_2048"] for r in found]
        spread = statistics.stdev(ppl) if len(ppl) > 1 else 0.0
        mean = {k: statistics.mean(r[k] for r in found) for k in ("perplexity_128", "kl_c4", "seconds")}
        peak = max(r["peak_rss_bytes"] for r in found) / 1e9
        print(
            f"{found[0]['recipe']:22} {ratio:5.2f} {statistics.mean(ppl):9.2f} ±{spread:5.2f} "
            f"{statistics.mean(ppl) - dense['perplexity_2048']:7.2f} {mean['perplexity_128']:9.2f} "
            f"{mean['kl_c4']:7.4f} {mean['seconds']:6.0f} {peak:5.2f}"
        )


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per recipe and ratio: how many seeds, mean and sample standard deviation."""
    dense = next(r for r in rows if r["recipe"] == "dense")
    found = []
    for recipe, ratio in sorted(
        {(r["recipe"], r["ratio"]) for r in rows if r["ratio"]},
        key=lambda k: (k[1], list(RECIPES).index(k[0])),
    ):
        group = [r for r in rows if (r["recipe"], r["ratio"]) == (recipe, ratio)]
        ppl = [r["perplexity_2048"] for r in group]
        found.append(
            {
                "recipe": recipe,
                "ratio": ratio,
                "seeds": len(group),
                "reached": statistics.mean(r["reached"] for r in group),
                "perplexity": statistics.mean(ppl),
                "spread": statistics.stdev(ppl) if len(ppl) > 1 else None,
                "excess": statistics.mean(ppl) - dense["perplexity_2048"],
                "perplexity_128": statistics.mean(r["perplexity_128"] for r in group),
                "kl_c4": statistics.mean(r["kl_c4"] for r in group),
                "peak_gb": max(r["peak_rss_bytes"] for r in group) / 1e9,
            }
        )
    return found


def markdown(rows: list[dict[str, Any]]) -> None:
    dense = next(r for r in rows if r["recipe"] == "dense")
    print("| recipe | asked | reached | seeds | window 2048 | excess | window 128 | KL on C4, nats/token |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| dense | | | | {dense['perplexity_2048']:.1f} | | {dense['perplexity_128']:.1f} | |")
    for m in means(rows):
        spread = "" if m["spread"] is None else f" ± {m['spread']:.1f}"
        print(
            f"| {m['recipe']} | {m['ratio']:.0%} | {m['reached']:.1%} | {m['seeds']} "
            f"| {m['perplexity']:.1f}{spread} | {m['excess']:.1f} | {m['perplexity_128']:.1f} "
            f"| {m['kl_c4']:.2f} |"
        )


def figure(rows: list[dict[str, Any]], out: Path) -> None:
    """Perplexity against bytes in 16 bits, one line per recipe."""
    import vl_convert

    with tempfile.TemporaryDirectory() as scratch, RunDir(Path(scratch) / "parent") as run:
        graph = parents.open_parent(str(locate.resolve_model(None)), run).graph
    decoder = sum(axis.unit_params * axis.n_units for axis in graph.axes)
    dense = next(r for r in rows if r["recipe"] == "dense")
    names = {"uniform": "LLM-BIP, uniform", "ridge": "the same with ridge", "default": "default recipe"}
    points = [
        {
            "recipe": names[m["recipe"]],
            "MB": 2 * (graph.total_params - m["reached"] * decoder) / 1e6,
            "perplexity": m["perplexity"],
        }
        for m in means(rows)
        if m["recipe"] in names
    ]
    points += [
        {"recipe": name, "MB": 2 * graph.total_params / 1e6, "perplexity": dense["perplexity_2048"]}
        for name in names.values()
    ]
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 560,
        "height": 300,
        "background": "white",
        "data": {"values": points},
        "mark": {"type": "line", "point": True, "strokeWidth": 2},
        "encoding": {
            "x": {
                "field": "MB",
                "type": "quantitative",
                "scale": {"zero": False},
                "title": "weights in 16 bits, MB",
            },
            "y": {
                "field": "perplexity",
                "type": "quantitative",
                "scale": {"type": "log"},
                "axis": {"values": [25, 35, 50, 70, 100, 200, 400]},
                "title": "WikiText-2 test perplexity, window 2048",
            },
            "color": {
                "field": "recipe",
                "sort": list(names.values()),
                "scale": {"range": ["#9a6b00", "#2f55b8", "#0a7a50"]},
                "legend": {"title": None, "orient": "top", "columnPadding": 28},
            },
        },
    }
    out.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="folder with wikitext-2/ and calibration/",
    )
    parser.add_argument("--table", action="store_true", help="only print the rows there are")
    parser.add_argument("--figure", type=Path, metavar="SVG", help="only draw the rows there are")
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: edgeprune's own")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.1, 0.2, 0.35, 0.5])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8_192, help="of the evaluation text")
    parser.add_argument("--kl-tokens", type=int, default=8_192)
    parser.add_argument("--split", choices=["test", "valid"], default="test")
    parser.add_argument(
        "--fp32", action="store_true", help="evaluate in float32 where bfloat16 is fast as well"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args()
    if args.table or args.figure:
        rows = [r for r in json.loads(args.out.read_text())["rows"] if r["tokens"] == args.tokens]
        if args.table:
            markdown(rows)
        else:
            figure(rows, args.figure)
        return
    if not (args.data / "wikitext-2").is_dir():
        raise SystemExit(f"{args.data} has no wikitext-2/: this benchmark needs the data folder")
    calibration, text, other = texts(args.data, args.split)
    name = args.model or "default"
    stored = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    asked = {"model": name, "split": args.split, "tokens": args.tokens, "kl_tokens": args.kl_tokens}
    rows: list[dict[str, Any]] = stored["rows"]
    mine = lambda: [r for r in rows if all(r[k] == v for k, v in asked.items())]  # noqa: E731

    def keep(row: dict[str, Any]) -> None:
        rows.append({**asked, **row})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
        command = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        part.write_text(json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n")
        os.replace(part, args.out)

    with tempfile.TemporaryDirectory() as scratch, RunDir(Path(scratch) / "parent") as run:
        folder = parents.open_parent(str(locate.resolve_model(args.model)), run).folder
        judge = Judge(folder, text, other, args, fp32=args.fp32)
        if not any(r["recipe"] == "dense" for r in mine()):
            keep({"recipe": "dense", "ratio": 0.0, "seed": 0, **judge(None)})
        for ratio, seed, recipe in itertools.product(args.ratios, args.seeds, args.recipes):
            if any((r["recipe"], r["ratio"], r["seed"]) == (recipe, ratio, seed) for r in mine()):
                continue
            out = Path(scratch) / "pruned"
            made = prune(str(folder), out, ratio, seed, calibration, RECIPES[recipe])
            row = {"recipe": recipe, "ratio": ratio, "seed": seed, **made, **judge(out)}
            keep(row)
            shutil.rmtree(out)
            ppl = row["perplexity_2048"]
            print(f"{recipe} {ratio} seed {seed}: {ppl:.2f}, {made['seconds']} s", flush=True)
    show(mine())


if __name__ == "__main__":
    main()
