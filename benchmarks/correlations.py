"""LLM-BIP's forms against its exact oracle, on a real model: bound and rank correlation.

    .venv/bin/python benchmarks/correlations.py [--calibration FILE]

For every KV group: form A (norm), form B (propagated bound) and wanda-sp against form C (the block's output
recomputed without the group). Prints Spearman's rank correlation over all groups, each layer divided by its
mean, how often B lies above C, and by what factor. Without --calibration the text is this project's own docs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from _common import ROOT, write_results

from edgeprune import calibration, data, registry, stability, tokenizer
from edgeprune.metrics.base import Need
from edgeprune.pipeline import parent as parents
from edgeprune.rundir import RunDir

FORMS = (("llm-bip", {"form": "A"}), ("llm-bip", {"form": "B"}), ("wanda-sp", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: the model the tool itself takes")
    parser.add_argument("--calibration", help="text file; default: docs/*.md")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeprune-correlations-") as scratch:
        with RunDir(Path(scratch) / "run") as run:
            parent = parents.open_parent(args.model, run)
        source, graph = parent.source, parent.graph
        docs = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
        windows = data.windows(
            data.read_text(args.calibration) if args.calibration else docs,
            lambda text: tokenizer.encode(parent.folder, text),
            n_samples=args.samples,
            n_tokens=args.length,
            seed=args.seed,
            where=args.calibration or "docs",
        )
        oracle = registry.load("metrics", "llm-bip", "METRIC")
        needs: set[Need] = set(oracle.needs(oracle.resolve({"form": "C"})))
        for name, options in FORMS:
            metric = registry.load("metrics", name, "METRIC")
            needs |= metric.needs(metric.resolve(options))
        arrays = calibration.collect(source, graph, windows, frozenset(needs))

        def of(name: str, options: dict[str, str]) -> list[np.ndarray]:
            metric = registry.load("metrics", name, "METRIC")
            scores = calibration.score(metric, metric.resolve(options), source, graph, arrays, seed=0)
            return [scores[axis.name].astype(np.float64) for axis in graph.axes if axis.unit == "kv"]

        def levelled(layers: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([layer / layer.mean() for layer in layers])

        exact = of("llm-bip", {"form": "C"})
        rows = []
        for name, options in FORMS:
            found = of(name, options)
            label = ":".join([name, *options.values()])
            row = {"metric": label, "spearman": stability.spearman(levelled(found), levelled(exact))}
            if options.get("form") == "B":
                # form C is divided by the block's output, the bound is not
                sizes = [
                    float(np.sqrt(arrays[f"layers.{axis.layer}.{Need.OUT_SQUARES.value}"][0]))
                    for axis in graph.axes
                    if axis.unit == "kv"
                ]
                undivided = np.concatenate([c * size for c, size in zip(exact, sizes, strict=True)])
                factor = np.concatenate(found) / undivided
                row |= {
                    "above_oracle": float((factor >= 1).mean()),
                    "median_factor": float(np.median(factor)),
                }
            rows.append(row | {"groups": sum(map(len, found))})
            print(row, flush=True)
    write_results("correlations", rows)


if __name__ == "__main__":
    main()
