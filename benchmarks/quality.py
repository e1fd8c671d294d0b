"""What is done around the metric: dense, each switch alone, the default recipe.

    .venv/bin/python benchmarks/quality.py --data ../shared/data

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
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from _common import RESULTS, edgeprune, machine

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

    def __init__(self, folder: Path, text: str, other: str, args: argparse.Namespace) -> None:
        self._kind = torch.bfloat16 if reconstruction.half_is_fast() and not args.fp32 else torch.float32
        self._ids = np.asarray(tokenizer.encode(folder, text), dtype=np.int32)[: args.tokens]
        self._other = np.asarray(tokenizer.encode(folder, other), dtype=np.int32)[: args.kl_tokens]
        self._dense = surgery.load(folder, dtype=self._kind)

    def __call__(self, folder: Path | None) -> dict[str, float]:
        model = self._dense if folder is None else surgery.load(folder, dtype=self._kind)
        with torch.inference_mode():
            return {
                "perplexity_2048": losses(model, self._ids, 2048),
                "perplexity_128": losses(model, self._ids, 128),
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
    began = time.monotonic()
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - began
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    plan = json.loads((out / "edgeprune_plan.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2/ and calibration/")
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: edgeprune's own")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.1, 0.2, 0.35, 0.5])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=65_536, help="of the evaluation text")
    parser.add_argument("--kl-tokens", type=int, default=8_192)
    parser.add_argument("--split", choices=["test", "valid"], default="test")
    parser.add_argument(
        "--fp32", action="store_true", help="evaluate in float32 where bfloat16 is fast as well"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args()
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
        judge = Judge(folder, text, other, args)
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
