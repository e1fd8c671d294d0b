"""A 7B-shaped checkpoint with random weights is scored, pruned by 20% and saved: seconds, and peak memory.

    .venv/bin/python benchmarks/streaming.py --dir /scratch

Writes 13.5 GB of bf16 shards below --dir (and up to 11 GB more for the result), runs
`edgeprune prune --metric llm-bip --ratio 0.2 --samples 8 --length 128` in a fresh process, checks that every
tensor of the result has the shape its config.json promises, and deletes all of it. Random weights say nothing
about quality, so none is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _common import write_results
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeprune import graph as graphs

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix dark potions in a quiet room"


def write_checkpoint(folder: Path, layers: int) -> int:
    """One shard per decoder layer; returns parameters."""
    CONFIG["num_hidden_layers"] = layers
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.save(str(folder / "tokenizer.json"))
    graph = graphs.build(CONFIG)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in graph.shapes.items():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    index = {}
    for number, (_, tensors) in enumerate(shards.items()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name, shape in tensors.items():
            scale = 0.02 if len(shape) > 1 else 0.0
            noise = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 1, generator=generator)
            made[name] = noise.mul_(scale) + (0.0 if scale else 1.0)
            index[name] = file
        save_file(made, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return int(graph.total_params)


def check(folder: Path) -> tuple[int, float]:
    """(parameters, share of decoder parameters removed) of the result, from its files."""
    config = json.loads((folder / "config.json").read_text())
    promised = dict(graphs.build(config).shapes)
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                found[name] = tuple(shard.get_slice(name).get_shape())
    if found != promised:
        raise SystemExit("the saved tensors do not have the shapes that config.json promises")
    before, after = graphs.build(CONFIG), graphs.build(config)
    return after.total_params, 1 - after.decoder_params / before.decoder_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="25 GB of free disk")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick try")
    args = parser.parse_args()
    CONFIG["num_hidden_layers"] = args.layers
    if shutil.disk_usage(args.dir).free < 27e9 * args.layers / 32:
        raise SystemExit(f"{args.dir} has less than 27 GB free; name another folder with --dir")
    scratch = Path(tempfile.mkdtemp(prefix="edgeprune-7b-", dir=args.dir))
    try:
        began = time.monotonic()
        # in a process of its own: a child's peak memory counts what its parent held when it was started
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(write_checkpoint, (scratch / "model", args.layers))
        print(f"{parameters / 1e9:.2f}e9 parameters written in {time.monotonic() - began:.0f} s", flush=True)
        (scratch / "text.txt").write_text("\n".join(f"{i} {WORDS}" for i in range(2000)))
        command = [
            "-m",
            "edgeprune",
            "prune",
            str(scratch / "model"),
            "--metric",
            "llm-bip",
            "--ratio",
            "0.2",
        ]
        command += ["--samples", "8", "--length", "128", "--calibration", str(scratch / "text.txt")]
        command += ["--allocator", "uniform", "--compensation", "none"]
        command += ["--seed", "0", "--out", str(scratch / "pruned")]
        began = time.monotonic()
        # wait4 tells of this process alone; the sum over children has the checkpoint's writer in it
        child = subprocess.Popen([sys.executable, *command])
        _, status, usage = os.wait4(child.pid, 0)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit("edgeprune prune failed")
        seconds, peak = time.monotonic() - began, usage.ru_maxrss * 1024
        left, ratio = check(scratch / "pruned")
        row = {"parameters": parameters, "parameters_left": left, "ratio": ratio, "seconds": seconds}
        row |= {"peak_rss_bytes": peak, "samples": 8, "length": 128, "metric": "llm-bip"}
        print(
            f"{ratio:.1%} of the decoder layers removed in {seconds:.0f} s, peak RSS {peak / 2**30:.2f} GiB",
            flush=True,
        )
        if args.layers == 32:
            write_results("streaming", [row])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
