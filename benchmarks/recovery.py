"""Recovery after pruning: every method and objective at equal tokens, or in equal minutes.

    .venv/bin/python benchmarks/recovery.py --data ../shared/data                       equal tokens
    .venv/bin/python benchmarks/recovery.py --data ../shared/data --minutes 10 --ratios 0.2 --rows full

The default model is pruned once per ratio with the default recipe (calibrated on C4), then recovered by
`edgeprune recover` in a fresh process per row; seconds and peak RSS are those of the whole command.
Training text is 30 Wikipedia articles (--train-text: it should not be what the cut was solved on, C4), or
what the parent writes itself (rows ending in 'self'). Judged in bfloat16 on text that was not trained on:
WikiText-2 test (first --tokens tokens, windows of 2048) and other C4 pages (full KL to the dense model and
perplexity, windows of 512). 'closed' is the share of the pruned model's excess perplexity that is gone.
With --items N also by accuracy on N items each of PIQA and ARC-Easy that a seed draws (needs the eval extra).
Rows are kept in benchmarks/results/recovery.json as they come, so a stopped run goes on where it was.
`--split valid` reads WikiText-2 validation text, which settings may be tuned on; the test text is for
reporting only.

With --files TYPE every row is exported as well, with an importance matrix of the training text, and the
file's own perplexity is measured in llama.cpp on the same WikiText-2 tokens: what `group` is compared by.

    .venv/bin/python benchmarks/recovery.py --data ../shared/data --files Q4_1 --ratios 0.2 \
        --rows lora full group "group minmax" "group rank 8" "group scales"
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import quality
import torch
from _common import RESULTS, call, edgeprune, machine
from metrics import wikitext

from edgeprune import locate
from edgeprune.evaluation import engines, texts
from edgeprune.evaluation import run as evaluation
from edgeprune.evaluation.groups import Store
from edgeprune.evaluation.suites import Suite
from edgeprune.pipeline import parent as parents
from edgeprune.progress import Silent
from edgeprune.rundir import RunDir

TASKS = ("piqa", "arc_easy")
LM = ("--recovery-objective", "lm")
GROUP = ("--recovery", "group", "--quantization", "Q4_1")
ROWS: dict[str, tuple[str, ...]] = {
    "lora": ("--recovery", "lora"),
    "full": ("--recovery", "full"),
    "lora kl": ("--recovery", "lora", "--recovery-mix", "1"),
    "full kl": ("--recovery", "full", "--recovery-mix", "1"),
    "lora lm": ("--recovery", "lora", *LM),
    "full lm": ("--recovery", "full", *LM),
    "lora self": ("--recovery", "lora"),
    "lora kl self": ("--recovery", "lora", "--recovery-mix", "1"),
    "lora lm self": ("--recovery", "lora", *LM),
    "full self": ("--recovery", "full"),
    "lora flat": ("--recovery", "lora", "--recovery-option", "more=0"),
    "full cut": ("--recovery", "full", "--recovery-option", "layers=cut"),
    "group": GROUP,
    "group minmax": (*GROUP, "--recovery-option", "init=minmax"),
    "group rank 8": (*GROUP, "--recovery-option", "rank=8"),
    "group scales": (*GROUP, "--recovery-option", "scales=yes"),
    "auto": ("--recovery", "auto"),
}
NEEDS_MINUTES = ("auto",)
ONLY_NAMED = ("group minmax", "group rank 8", "group scales")


class Judge(quality.Judge):
    """Reads folders, and the files made of them."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._text = wikitext(args.data)
        if args.split == "valid":
            self._text = (args.data / "wikitext-2" / "wiki.valid.tokens").read_text(encoding="utf-8")
        other = (args.data / "calibration" / "exllamav2_c4.utf8").read_text(encoding="utf-8")
        super().__init__(folder, self._text, other, args)
        self._args, self._folder = args, folder
        self._suite = Suite(tasks=TASKS, items=args.items)
        self._tasks = evaluation.open_sources(self._suite, args.data) if args.items else None

    def __call__(self, folder: Path | None) -> dict[str, float]:
        found = self._read(folder, perplexity=(self._ids, 2048), perplexity_c4=(self._other, 512))
        return {**found, **self._accuracy(folder or self._folder)}

    def _accuracy(self, folder: Path) -> dict[str, float]:
        if self._tasks is None:
            return {}
        with tempfile.TemporaryDirectory(prefix="edgeprune-items-") as scratch, RunDir(Path(scratch)) as run:
            settings = engines.Settings(threads=torch.get_num_threads(), dtype="bfloat16")
            asked = evaluation.score(
                *(folder, self._suite, self._tasks, run), settings=settings, seed=0, progress=Silent()
            )
        return {f"accuracy_{task.task}": task.metrics["acc"][0] for task in asked.tasks}

    def file(self, folder: Path | None) -> dict[str, Any]:
        """Export a folder and score the file; nothing without --files."""
        args = self._args
        if args.files is None:
            return {}
        with tempfile.TemporaryDirectory(prefix="edgeprune-recovery-") as scratch:
            path = Path(scratch) / "model.gguf"
            text = str(args.data / "calibration" / "c4_demo.jsonl")
            call(
                edgeprune(
                    *("export", str(folder or self._folder), "--quantization", args.files, "--no-verify"),
                    *("--imatrix-calibration", text, "--out", str(path)),
                )
            )
            engine = engines.open_engine(path, engines.Settings(threads=torch.get_num_threads()))
            found = texts.perplexity(
                *(engine, "wikitext2", self._text, args.split, 2048, Store(Path(scratch) / "scored.jsonl")),
                tokens=args.tokens,
                stage=functools.partial(Silent().stage, "score"),
            )
            return {"file": args.files, "file_perplexity": found.value, "file_bytes": path.stat().st_size}


def recover(pruned: Path, parent: Path, out: Path, row: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the command's cost and what its record says."""
    data = () if row.endswith(" self") else ("--recovery-data", str(args.data / args.train_text))
    ends = ("--recovery-minutes", str(args.minutes))
    if args.minutes is None:
        ends = ("--recovery-tokens", str(args.train_tokens))
    seconds, peak = call(
        edgeprune(
            *("recover", str(pruned), "--parent", str(parent), "--out", str(out), "--seed", str(args.seed)),
            *(*ROWS[row], *data, *ends, *args.more.split()),
        )
    )
    record = json.loads((out / "edgeprune_recovery.json").read_text())
    names = (
        "method",
        "options",
        "objective",
        "rate",
        "steps",
        "tokens",
        "seconds",
        "stopped",
        "kept",
        "note",
    )
    names += ("kl_before", "kl_after", "validation_tokens", "tried")
    cost = {"command_seconds": round(seconds, 1), "peak_rss_bytes": peak}
    return {**cost, **{name: record[name] for name in names}}


def show(rows: list[dict[str, Any]]) -> None:
    files = any(r.get("file") for r in rows)

    asked = [task for task in TASKS if f"accuracy_{task}" in rows[0]]

    def of_file(row: dict[str, Any]) -> str:
        out = f" {row['file_perplexity']:.2f} |" if files else ""
        return out + "".join(f" {row[f'accuracy_{task}']:.3f} |" for task in asked)

    print(
        "| ratio | recovery | tokens | seconds | peak RSS, GB | perplexity | closed | KL C4 | perplexity C4 "
        f"|{' file |' if files else ''}{''.join(f' {task} |' for task in asked)}"
    )
    print(f"|---|---|---|---|---|---|---|---|---|{'---|' if files else ''}{'---|' * len(asked)}")
    dense = next(r for r in rows if r["row"] == "dense")
    print(
        f"| 0 | dense | | | | {dense['perplexity']:.2f} | | | {dense['perplexity_c4']:.2f} |{of_file(dense)}"
    )
    for ratio in sorted({r["ratio"] for r in rows if r["ratio"]}):
        none = next(r for r in rows if r["row"] == "none" and r["ratio"] == ratio)
        excess = none["perplexity"] - dense["perplexity"]
        for r in sorted((r for r in rows if r["ratio"] == ratio), key=lambda r: -r["perplexity"]):
            closed = (none["perplexity"] - r["perplexity"]) / excess
            spent = ("", "", "")
            if "tokens" in r and r["row"] != "none":
                spent = (f"{r['tokens']:,}", f"{r['seconds']:.0f}", f"{r['peak_rss_bytes'] / 1e9:.2f}")
            print(
                f"| {ratio:g} | {r['row']} | {spent[0]} | {spent[1]} | {spent[2]} | {r['perplexity']:.2f} | "
                f"{100 * closed:.0f}% | {r['kl_c4']:.4f} | {r['perplexity_c4']:.2f} |{of_file(r)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2/ and calibration/")
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: edgeprune's own")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="default: all that fit")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.35])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-text", default="calibration/wiki_demo.txt", help="below the data folder")
    parser.add_argument("--train-tokens", type=int, default=131_072)
    parser.add_argument("--minutes", type=float, help="equal time instead of equal tokens")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the evaluation text")
    parser.add_argument("--kl-tokens", type=int, default=16_384)
    parser.add_argument("--items", type=int, help="of PIQA and of ARC-Easy; default: none")
    parser.add_argument("--split", choices=["test", "valid"], default="test")
    parser.add_argument("--more", default="", help="further options of 'edgeprune recover', in one string")
    parser.add_argument("--pruned", type=Path, help="take this pruned folder instead (one ratio)")
    parser.add_argument("--files", metavar="TYPE", help="also export to this GGUF type and score the file")
    parser.add_argument("--table", action="store_true", help="only print the results there are")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery.json")
    args = parser.parse_args()
    if not (args.data / "wikitext-2").is_dir():
        raise SystemExit(f"{args.data} has no wikitext-2/: this benchmark needs the data folder")
    stored = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    rows: list[dict[str, Any]] = stored["rows"]
    asked = {
        "model": args.model or "default",
        "split": args.split,
        "text_tokens": args.tokens,
        "seed": args.seed,
        "train_tokens": None if args.minutes else args.train_tokens,
        "minutes": args.minutes,
        "more": args.more,
        "train_text": args.train_text,
        "file": args.files,
        **({"items": args.items} if args.items else {}),
    }
    mine = lambda: [r for r in rows if all(r.get(k) == v for k, v in asked.items())]  # noqa: E731
    if args.table:
        show(mine())
        return

    def keep(row: dict[str, Any]) -> None:
        rows.append({**asked, **row})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
        command = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        part.write_text(json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n")
        os.replace(part, args.out)

    chosen = args.rows or [
        r for r in ROWS if r not in ONLY_NAMED and (args.minutes or r not in NEEDS_MINUTES)
    ]
    with tempfile.TemporaryDirectory(prefix="edgeprune-recovery-") as scratch:
        place = Path(scratch)
        with RunDir(place / "parent") as run:
            folder = parents.open_parent(str(locate.resolve_model(args.model)), run).folder
        judge = Judge(folder, args)
        if not any(r["row"] == "dense" for r in mine()):
            keep({"row": "dense", "ratio": 0.0, **judge(None), **judge.file(None)})
        for ratio in args.ratios:
            todo = [n for n in chosen if not any((r["row"], r["ratio"]) == (n, ratio) for r in mine())]
            has_none = any((r["row"], r["ratio"]) == ("none", ratio) for r in mine())
            if has_none and not todo:
                continue
            pruned = args.pruned or place / f"pruned-{ratio}"
            if args.pruned is None:
                calibration = str(args.data / "calibration" / "c4_demo.jsonl")
                call(
                    edgeprune(
                        *("prune", str(folder), "--ratio", str(ratio), "--seed", str(args.seed)),
                        *("--calibration", calibration, "--out", str(pruned)),
                    )
                )
            if not has_none:
                keep({"row": "none", "ratio": ratio, **judge(pruned), **judge.file(pruned)})
            for name in todo:
                out = place / "recovered"
                made = recover(pruned, folder, out, name, args)
                row = {"row": name, "ratio": ratio, **made, **judge(out), **judge.file(out)}
                keep(row)
                shutil.rmtree(out)
                print(f"{name} {ratio}: {row['perplexity']:.2f}, {made['note']}", flush=True)
    show(mine())


if __name__ == "__main__":
    main()
