"""Which shapes the installed llama.cpp loads, cell by cell: a version that changes a cell is noticed.

Files are written with the format's own library, from a table of their own, not by the exporter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import gguf
import llama_cpp

from edgeprune import graph
from edgeprune.families._gguf import architectures
from edgeprune.records import LayerShape, ModelDims

D, HEAD, VOCAB, FF = 64, 16, 32, 96
Shape = tuple[int, int, int]  # heads, KV heads, FFN width
DENSE: Shape = (4, 2, FF)
COLUMNS: dict[str, list[Shape]] = {
    "dense": [DENSE] * 4,
    "uniform FFN cut, layer dropped": [(4, 2, 64)] * 3,
    "same smaller head count": [(2, 1, FF)] * 4,
    "FFN width per layer": [DENSE, (4, 2, 64), DENSE, (4, 2, 32)],
    "heads per layer": [DENSE, (2, 1, FF), DENSE, (4, 4, FF)],
    "layer without attention": [DENSE, (0, 0, FF), DENSE, DENSE],
}
# architecture to the columns it loads
MATRIX: dict[str, str] = {
    "llama": "yyynnn",
    "mistral3": "yyynnn",
    "qwen2": "yynnnn",
    "qwen3": "yyynnn",
    "gemma3": "yyynnn",
    "smollm3": "yyynnn",
    "phi3": "yynnnn",
    "deci": "yyyyyy",
    "openelm": "yyyyyn",
}
QK_NORM = ("qwen3", "gemma3", "openelm")
UNTIED = ("llama", "qwen2", "qwen3", "deci", "phi3", "smollm3")


def write(path: Path, arch: str, layers: Sequence[Shape], *, tied: bool = True, bias: str = "") -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(len(layers))
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    for key, column in (
        ("feed_forward_length", 2),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 1),
    ):
        values = [shape[column] for shape in layers]
        if len(set(values)) == 1:
            writer.add_uint32(f"{arch}.{key}", values[0])
        else:
            writer.add_array(f"{arch}.{key}", values)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        writer.add_uint32(f"{arch}.{key}", HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_uint32(f"{arch}.vocab_size", VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, *shape: int) -> None:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        scale = 1.0 if name.endswith("norm.weight") else 0.1
        writer.add_tensor(name, (rng.standard_normal(shape) * scale).astype(np.float32))

    add("token_embd.weight", VOCAB, D)
    add("output_norm.weight", D)
    if not tied:
        add("output.weight", VOCAB, D)
    for i, (heads, kv, ff) in enumerate(layers):
        q, k = heads * HEAD, kv * HEAD
        if heads:
            add(f"blk.{i}.attn_norm.weight", D)
            if arch in ("phi3", "openelm"):
                add(f"blk.{i}.attn_qkv.weight", q + 2 * k, D)
            else:
                for part, rows in (("q", q), ("k", k), ("v", k)):
                    add(f"blk.{i}.attn_{part}.weight", rows, D)
                    if bias == "qkv":
                        add(f"blk.{i}.attn_{part}.bias", rows)
            add(f"blk.{i}.attn_output.weight", D, q)
            if bias == "o":
                add(f"blk.{i}.attn_output.bias", D)
            if arch in QK_NORM:
                add(f"blk.{i}.attn_q_norm.weight", HEAD)
                add(f"blk.{i}.attn_k_norm.weight", HEAD)
        if arch == "gemma3":
            add(f"blk.{i}.post_attention_norm.weight", D)
            add(f"blk.{i}.post_ffw_norm.weight", D)
        if ff:
            add(f"blk.{i}.ffn_norm.weight", D)
            if arch != "phi3":
                add(f"blk.{i}.ffn_gate.weight", ff, D)
            add(f"blk.{i}.ffn_up.weight", 2 * ff if arch == "phi3" else ff, D)
            add(f"blk.{i}.ffn_down.weight", D, ff)
            if bias == "mlp":
                add(f"blk.{i}.ffn_down.bias", D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(path: Path) -> np.ndarray | None:
    """[6, vocab] of six tokens, or None where the file does not load."""
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=32, n_batch=32, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
        )
    except ValueError:
        return None
    model.eval([3, 1, 4, 1, 5, 9])
    return np.array(model.scores[:6])


def loads(path: Path) -> bool:
    found = logits(path)
    assert found is None or (np.isfinite(found).all() and found.std() > 0)
    return found is not None


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("arch", MATRIX)
def test_cell(tmp_path: Path, arch: str, column: str) -> None:
    layers = COLUMNS[column]
    expected = MATRIX[arch][list(COLUMNS).index(column)] == "y"
    write(tmp_path / "a.gguf", arch, layers)
    assert loads(tmp_path / "a.gguf") is expected
    known = architectures()
    if arch in known:  # what the planner is told
        family, rules = known[arch]
        dims = ModelDims(
            family=family.model_type, vocab=VOCAB, hidden=D, head_dim=HEAD, max_context=64, tied=True,
            qkv_bias=False, o_bias=False, mlp_bias=False, rms_eps=1e-5,
            layers=tuple(LayerShape(n_heads=h, n_kv_heads=k, n_ff=f) for h, k, f in layers),
        )  # fmt: skip
        assert (rules.refuses(dims) is None) is expected


def test_every_architecture_is_in_the_matrix() -> None:
    assert set(architectures()) <= set(MATRIX)
    assert graph.find_family("llama").gguf[1].name == "deci"


@pytest.mark.parametrize("arch", [*UNTIED, "openelm"])
def test_output_of_its_own(tmp_path: Path, arch: str) -> None:
    """openelm refuses the tensor, and takes the embedding where it is missing."""
    write(tmp_path / "a.gguf", arch, [DENSE] * 2, tied=False)
    assert loads(tmp_path / "a.gguf") is (arch != "openelm")


@pytest.mark.parametrize("kind", ["qkv", "o", "mlp"])
@pytest.mark.parametrize("arch", ["llama", "deci", "mistral3", "qwen2", "qwen3", "gemma3", "smollm3"])
def test_biases(tmp_path: Path, arch: str, kind: str) -> None:
    """A bias that an architecture does not know is refused, not forgotten."""
    write(tmp_path / "a.gguf", arch, [DENSE] * 2, bias=kind)
    everywhere = arch in ("llama", "deci", "mistral3")
    assert loads(tmp_path / "a.gguf") is (everywhere or kind == "qkv")


def test_first_layer_without_attention(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "deci", [(0, 0, FF), DENSE])
    assert not loads(tmp_path / "a.gguf")


def test_no_ffn_drops_the_attention_of_deci(tmp_path: Path) -> None:
    """Why an FFN of zeros is written: with n_ff 0 the layer loads and does nothing at all."""
    write(tmp_path / "none.gguf", "deci", [DENSE, (4, 2, 0), DENSE])
    write(tmp_path / "alike.gguf", "deci", [DENSE, (0, 0, 0), DENSE])
    none, alike = logits(tmp_path / "none.gguf"), logits(tmp_path / "alike.gguf")
    assert none is not None and alike is not None
    assert np.array_equal(none, alike)
