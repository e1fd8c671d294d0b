"""Predicted against measured peak memory of llama.cpp.

    PYTHONPATH=. python benchmarks/memory.py [--quick] [--model FILE]

Makes random models of several shapes, quantizes each, measures every row in a fresh process with its
whole context filled, prints predicted, measured and their ratio, and writes results/memory.json.
The constants of edgeprune/costs/memory.py come from runs of this script with one size varied at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from edgeprune import __version__
from edgeprune.costs import gguf_types
from edgeprune.costs.gguf_header import read_header
from edgeprune.costs.memory import StoredTensor, predict_peak_memory, repacked
from edgeprune.devices import local
from edgeprune.records import LaunchFlags, LayerShape, ModelDims
from edgeprune.runtimes import llama_cpp

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    vocab: int
    hidden: int
    head_dim: int
    layers: tuple[tuple[int, int, int], ...]  # heads, KV heads, FFN width
    tied: bool = True
    tokenizer: str = "bpe"
    types: tuple[str, ...] = TYPES
    contexts: tuple[int, ...] = (512,)
    sweep: bool = False  # vary micro-batch and cache type too


def alternate(n: int, *layers: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(layers[i % len(layers)] for i in range(n))


SHAPES = (
    Shape(
        name="20M spm, dense",
        vocab=8192,
        hidden=256,
        head_dim=32,
        layers=((8, 4, 1024),) * 16,
        tokenizer="spm",
        contexts=(512, 2048, 8192),
        sweep=True,
    ),
    Shape(
        name="135M bpe, dense",
        vocab=49152,
        hidden=576,
        head_dim=64,
        layers=((9, 3, 1536),) * 30,
        contexts=(512, 2048),
        sweep=True,
    ),
    Shape(name="135M bpe, uniform plan", vocab=49152, hidden=576, head_dim=64, layers=((6, 2, 1024),) * 30),
    Shape(
        name="135M bpe, per-layer plan",
        vocab=49152,
        hidden=576,
        head_dim=64,
        layers=alternate(30, (9, 3, 1536), (3, 1, 512), (6, 2, 1280), (9, 3, 256)),
        contexts=(512, 2048),
    ),
    Shape(
        name="230M spm, untied",
        vocab=32000,
        hidden=1024,
        head_dim=64,
        layers=((16, 16, 2816),) * 12,
        tied=False,
        tokenizer="spm",
        contexts=(512, 2048),
    ),
    Shape(
        name="1.2B bpe, dense",
        vocab=128256,
        hidden=2048,
        head_dim=64,
        layers=((32, 8, 8192),) * 16,
        types=("F16", "Q8_0", "Q4_K_M", "Q4_0"),
    ),
    Shape(
        name="0.9B bpe, per-layer plan",
        vocab=128256,
        hidden=2048,
        head_dim=64,
        layers=alternate(16, (32, 8, 8192), (16, 4, 4096), (24, 6, 2048)),
        types=("Q4_0",),
    ),
)


def words(n: int) -> list[str]:
    """Make n distinct words with the lengths of a real vocabulary."""
    rng = np.random.default_rng(5)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    out: dict[str, None] = {}
    while len(out) < n:
        out["".join(letters[rng.integers(0, 26, 1 + int(rng.poisson(5.7)))])] = None
    return list(out)


def write_model(path: Path, shape: Shape) -> None:
    """Write a random F16 model of this shape; llama when its layers are alike, else deci."""
    uniform = len(set(shape.layers)) == 1
    w = gguf.GGUFWriter(path, "llama" if uniform else "deci")
    heads, kv, ffn = ([layer[i] for layer in shape.layers] for i in range(3))
    w.add_context_length(32768)
    w.add_embedding_length(shape.hidden)
    w.add_block_count(len(shape.layers))
    w.add_feed_forward_length(ffn[0] if uniform else ffn)
    w.add_head_count(heads[0] if uniform else heads)
    w.add_head_count_kv(kv[0] if uniform else kv)
    for add in (w.add_key_length, w.add_value_length, w.add_rope_dimension_count):
        add(shape.head_dim)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(1e4)
    w.add_vocab_size(shape.vocab)
    tokens = words(shape.vocab)
    w.add_tokenizer_model("gpt2" if shape.tokenizer == "bpe" else "llama")
    w.add_token_list(tokens)
    w.add_token_types([1] * shape.vocab)
    if shape.tokenizer == "bpe":
        w.add_tokenizer_pre("llama-bpe")
        w.add_token_merges([f"{t[: len(t) // 2]} {t[len(t) // 2 :]}" for t in tokens if len(t) > 1])
    else:
        w.add_token_scores([0.0] * shape.vocab)
    pool = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(np.float16)

    def matrix(name: str, rows: int, columns: int) -> None:
        w.add_tensor(name, np.resize(pool, rows * columns).reshape(rows, columns))

    def norm(name: str) -> None:
        w.add_tensor(name, np.ones(shape.hidden, np.float32))

    matrix("token_embd.weight", shape.vocab, shape.hidden)
    norm("output_norm.weight")
    if not shape.tied:
        matrix("output.weight", shape.vocab, shape.hidden)
    for i, (h, k, f) in enumerate(shape.layers):
        block, d = f"blk.{i}.", shape.head_dim
        norm(block + "attn_norm.weight")
        norm(block + "ffn_norm.weight")
        matrix(block + "attn_q.weight", h * d, shape.hidden)
        matrix(block + "attn_k.weight", k * d, shape.hidden)
        matrix(block + "attn_v.weight", k * d, shape.hidden)
        matrix(block + "attn_output.weight", shape.hidden, h * d)
        matrix(block + "ffn_gate.weight", f, shape.hidden)
        matrix(block + "ffn_up.weight", f, shape.hidden)
        matrix(block + "ffn_down.weight", shape.hidden, f)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def dims_of(path: Path) -> tuple[ModelDims, str]:
    """Sizes of a llama or deci file, and its tokenizer's kind."""
    header = read_header(path)
    meta = header.values()
    arch = meta["general.architecture"]
    n = meta[f"{arch}.block_count"]

    def per_layer(key: str) -> list[int]:
        value = meta[f"{arch}.{key}"]
        return list(value) if isinstance(value, tuple) else [value] * n

    columns = (
        per_layer(k) for k in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    layers = tuple(LayerShape(n_heads=h, n_kv_heads=k, n_ff=f) for h, k, f in zip(*columns, strict=True))
    embedding = next(t for t in header.tensors if t.name == "token_embd.weight")
    hidden = meta[f"{arch}.embedding_length"]
    head_dim = meta.get(f"{arch}.attention.key_length", hidden // layers[0].n_heads)
    dims = ModelDims(
        family="llama",
        vocab=embedding.shape[0],
        hidden=hidden,
        head_dim=head_dim,
        max_context=32768,
        tied=all(t.name != "output.weight" for t in header.tensors),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        rms_eps=1e-5,
        layers=layers,
    )
    return dims, {"gpt2": "bpe", "llama": "spm"}[meta["tokenizer.ggml.model"]]


def flag_rows(shape: Shape, kind: str, quick: bool) -> Iterator[LaunchFlags]:
    for mmap in (False, True):
        yield LaunchFlags(context_tokens=512, ubatch=128, kv_type="f16", mmap=mmap)
    if quick or kind not in ("Q4_0", "Q4_K_M"):
        return
    for context in shape.contexts[1:]:
        yield LaunchFlags(context_tokens=context, ubatch=128, kv_type="f16", mmap=False)
    if not shape.sweep:
        return
    for ubatch in (32, 64, 256, 512):
        yield LaunchFlags(context_tokens=2048, ubatch=ubatch, kv_type="f16", mmap=False)
    for kv_type in ("q8_0", "q4_0"):
        yield LaunchFlags(
            context_tokens=shape.contexts[-1], ubatch=512, kv_type=kv_type, mmap=kv_type == "q4_0"
        )


def measure(name: str, kind: str, path: Path, flags: LaunchFlags, isa: tuple[str, ...]) -> dict[str, object]:
    """One row: predicted, measured, ratio."""
    dims, tokenizer = dims_of(path)
    tensors = read_header(path).tensors
    stored = [StoredTensor(name=t.name, type=t.type.name, shape=t.shape, bytes=t.n_bytes) for t in tensors]
    predicted = predict_peak_memory(
        dims,
        weight_bytes=sum(t.n_bytes for t in tensors),
        flags=flags,
        repacked=repacked(stored, isa),
        tokenizer=tokenizer,
    )
    measured = llama_cpp.memory(path, flags=flags, threads=2).peak_bytes
    print(
        f"{name:26} {kind:7} ctx {flags.context_tokens:5} ub {flags.ubatch:4} kv {flags.kv_type:5}"
        f" {'mmap' if flags.mmap else 'read'}  predicted {predicted / 1e6:8.1f} MB"
        f"  measured {measured / 1e6:8.1f} MB  ratio {predicted / measured:.3f}",
        flush=True,
    )
    return {
        "model": name,
        "type": kind,
        "context_tokens": flags.context_tokens,
        "ubatch": flags.ubatch,
        "kv_type": flags.kv_type,
        "mmap": flags.mmap,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratio": round(predicted / measured, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rows per type and no model above 300M")
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a GGUF file to measure as well"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    args = parser.parse_args()
    facts = local.detect(probe_seconds=0.0)
    isa = tuple(facts["isa"])
    rows = []
    for path in args.model:
        for context, ubatch, kv, mmap in (
            (512, 128, "f16", False),
            (2048, 512, "f16", True),
            (2048, 64, "q8_0", False),
            (4096, 256, "q4_0", True),
        ):
            flags = LaunchFlags(context_tokens=context, ubatch=ubatch, kv_type=kv, mmap=mmap)
            rows.append(measure(path.name[:26], path.stem.rsplit(".")[-1], path, flags, isa))
    with tempfile.TemporaryDirectory(prefix="edgeprune-memory-") as folder:
        for shape in SHAPES:
            if args.quick and shape.vocab > 100_000:
                continue
            master = Path(folder, "master.gguf")
            write_model(master, shape)
            for kind in shape.types:
                path = master if kind == "F16" else Path(folder, f"{kind}.gguf")
                if kind != "F16":
                    ftype = gguf_types.check_quantization(kind)[0]
                    llama_cpp.quantize(master, path, ftype=ftype, overrides=[], imatrix=None, threads=2)
                for flags in flag_rows(shape, kind, args.quick):
                    rows.append(measure(shape.name, kind, path, flags, isa))
                if path != master:
                    path.unlink()
    worst = max(rows, key=lambda r: abs(float(str(r["ratio"])) - 1))
    print(f"{len(rows)} rows, worst ratio {worst['ratio']} ({worst['model']} {worst['type']})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": facts["cpu"], "isa": list(isa), "cores": facts["cores"], "os": os.uname().sysname}
    versions = {"edgeprune": __version__, "llama-cpp-python": llama_cpp.RUNTIME.version()}
    args.out.write_text(
        json.dumps({"machine": machine, "versions": versions, "worst": worst, "rows": rows}, indent=1) + "\n"
    )
    return 0 if abs(float(str(worst["ratio"])) - 1) <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
