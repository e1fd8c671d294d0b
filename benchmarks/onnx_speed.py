"""Decode and prefill speed of ONNX int4 against GGUF Q4_0, alternating; time of the ONNX export.

    PYTHONPATH=. python benchmarks/onnx_speed.py [--quick] [--model FOLDER] [--threads N ...]
        [--prompt N ...] [--rounds N]

Exports the model (default: SmolLM2-135M-Instruct) both ways, then times the two files turn by turn, each
time in a fresh process with the same prompt, tokens and threads, so that other load on the machine meets
both. Prints the ratio of the medians per number of threads and prompt length and the median of the ratios
of single rounds, and writes results/onnx_speed.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._common import ROOT, edgeprune, write_results
from edgeprune.devices import local
from edgeprune.records import LaunchFlags
from edgeprune.runtimes import llama_cpp, onnx_genai


def export(model: str | None, out: Path, form: str, quantization: str) -> float:
    """Export one file as a user would; returns seconds, start of Python included."""
    began = time.perf_counter()
    command = edgeprune("export", *([model] if model else []), "--format", form)
    command += ["--quantization", quantization, "--no-verify", "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, action="append", help="may be repeated; default: 1 and all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--prompt", type=int, action="append", help="tokens; may be repeated; default: 128, 512"
    )
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--onnx", default="int4", help="ONNX quantization")
    parser.add_argument("--gguf", default="Q4_0", help="GGUF quantization")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 128 tokens and 48 new ones")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.prompt, given.new = 3, [128], 48

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        engines: dict[str, tuple[Any, Path, str]] = {
            "onnx": (onnx_genai, Path(scratch, "onnx"), "f32"),
            "gguf": (llama_cpp, Path(scratch, "model.gguf"), "f16"),
        }
        kinds = {"onnx": given.onnx, "gguf": given.gguf}
        made = {n: export(given.model, engines[n][1], n, kinds[n]) for n in engines}
        print(f"export: ONNX {made['onnx']:.1f} s, GGUF {made['gguf']:.1f} s")
        combinations = itertools.product(
            given.threads or sorted({1, local.available_threads()}), given.prompt or (128, 512)
        )
        for threads, prompt in combinations:
            rates = alternate(engines, kinds, given, threads, prompt)
            for name, (_, path, _) in engines.items():
                row = {
                    "format": name,
                    "quantization": kinds[name],
                    "bytes": size(path),
                    "export_s": round(made[name], 2),
                    "threads": threads,
                    "prompt_tokens": prompt,
                    "new_tokens": given.new,
                    "load_average": round(os.getloadavg()[0], 2),
                }
                for what, values in rates[name].items():
                    row[f"{what}_tps"] = [round(v, 2) for v in values]
                    row[f"{what}_median_tps"] = round(statistics.median(values), 2)
                rows.append(row)
            for what in ("decode", "prefill"):
                onnx, gguf = (rates[n][what] for n in ("onnx", "gguf"))
                medians = [statistics.median(v) for v in (onnx, gguf)]
                by_round = statistics.median(a / b for a, b in zip(onnx, gguf, strict=True))
                print(
                    f"{threads} threads, behind {prompt} tokens, {what}: ONNX {given.onnx} {medians[0]:.1f}, "
                    f"GGUF {given.gguf} {medians[1]:.1f} tokens/s, ratio {medians[0] / medians[1]:.3f}, "
                    f"by round {by_round:.3f}"
                )
            path = write_results("onnx_speed", rows)
    print(path)


def alternate(
    engines: dict[str, tuple[Any, Path, str]],
    kinds: dict[str, str],
    given: argparse.Namespace,
    threads: int,
    prompt: int,
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every round, by engine and kind of work."""
    rates: dict[str, dict[str, list[float]]] = {n: {"decode": [], "prefill": []} for n in engines}
    for turn in range(given.rounds):
        # who goes first changes, in case the first one warms the machine up for the second
        for name in sorted(engines, reverse=bool(turn % 2)):
            engine, path, kv_type = engines[name]
            flags = LaunchFlags(context_tokens=prompt + given.new, ubatch=512, kv_type=kv_type, mmap=True)
            times = engine.bench(
                path, flags=flags, n_prompt=prompt, n_gen=given.new, repeats=1, threads=threads
            )
            rates[name]["decode"].append(given.new * 1e9 / times.decode_ns[0])
            rates[name]["prefill"].append(prompt * 1e9 / times.prefill_ns[0])
            print(
                f"round {turn + 1} {name} {kinds[name]}: decode {rates[name]['decode'][-1]:.1f}, "
                f"prefill {rates[name]['prefill'][-1]:.1f} tokens/s",
                file=sys.stderr,
            )
    return rates


if __name__ == "__main__":
    main()
