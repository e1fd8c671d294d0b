"""Types and sizes of GGUF tensors, against llama.cpp's own choice and hand-worked numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.costs import gguf_types
from edgeprune.costs.gguf_header import (
    KeyValue,
    header_bytes,
    key_value_bytes,
    pad,
    read_header,
    tensor_info_bytes,
)
from edgeprune.errors import ConfigError
from edgeprune.graph import find_family, graph_of
from edgeprune.records import LayerShape, ModelDims

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from edgeprune.exporters import _gguf_quantize  # noqa: E402
from edgeprune.exporters import gguf as exporter  # noqa: E402

LLAMA = find_family("llama")
CONFIG: dict[str, object] = {"rope_theta": 10000.0}


def make_dims(
    hidden: int, head_dim: int, layers: list[tuple[int, int, int]], *, tied: bool = False, vocab: int = 64
) -> ModelDims:
    return ModelDims(
        family="llama",
        vocab=vocab,
        hidden=hidden,
        head_dim=head_dim,
        max_context=128,
        tied=tied,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        rms_eps=1e-5,
        layers=tuple(LayerShape(n_heads=h, n_kv_heads=k, n_ff=f) for h, k, f in layers),
    )


def test_type_table_agrees_with_the_format_library() -> None:
    for name, kind in gguf_types.TYPES.items():
        number = gguf.GGMLQuantizationType[name]
        assert (kind.id, kind.block, kind.block_bytes) == (number, *gguf.GGML_QUANT_SIZES[number]), name
    for name, (ftype, _) in gguf_types.QUANTIZATIONS.items():
        assert ftype == gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"], name


def test_hand_worked_bytes() -> None:
    # Q4_K: 256 weights in 144 bytes; 3 rows of 512 are 3 * 2 blocks
    assert gguf_types.tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
    # Q8_0: 32 weights in 34 bytes; 10 rows of 96 are 10 * 3 blocks
    assert gguf_types.tensor_bytes("Q8_0", (10, 96)) == 10 * 3 * 34
    with pytest.raises(ValueError, match="does not fill"):
        gguf_types.tensor_bytes("Q4_0", (1, 40))
    # key (8 + 3) + type 4 + string (8 + 2 bytes of 'é')
    assert key_value_bytes(KeyValue("abc", "STRING", "é")) == 11 + 4 + 10
    # key (8 + 1) + type 4 + item type 4 + count 8 + 3 * 4
    assert key_value_bytes(KeyValue("k", "ARRAY", (1, 2, 3), "INT32")) == 9 + 4 + 12 + 12
    # name (8 + 2) + n_dims 4 + 2 * 8 + type 4 + offset 8; a trailing 1 is dropped
    assert tensor_info_bytes("ab", (5, 7)) == 10 + 4 + 16 + 12
    assert tensor_info_bytes("ab", (1, 7)) == 10 + 4 + 8 + 12
    # magic 4, version 4, two counts of 8, then padded to 32
    assert header_bytes([], []) == 32 and pad(33) == 64


def test_fallback_of_rows_that_do_not_fill_blocks() -> None:
    assert [gguf_types.fit(t, 256) for t in ("Q4_K", "IQ4_XS", "Q4_0")] == ["Q4_K", "IQ4_XS", "Q4_0"]
    assert [gguf_types.fit(t, 96) for t in ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL")] == [
        "Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_NL",
    ]  # fmt: skip
    assert {gguf_types.fit(t, 40) for t in ("Q3_K", "Q4_K", "Q8_0", "IQ4_NL", "Q4_0")} == {"F16"}


def test_unknown_quantization_suggests() -> None:
    with pytest.raises(ConfigError, match=r"unknown GGUF quantization 'Q4_K' \(did you mean 'Q4_"):
        gguf_types.check_quantization("Q4_K")


def test_overrides_are_anchored() -> None:
    assert gguf_types.quantize_overrides({"blk.1.ffn_up.weight": "Q4_K"}) == [
        (r"^blk\.1\.ffn_up\.weight$", 12)
    ]


# the rules that ask for an importance matrix, and one that does not
WITH_IMATRIX = {"Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "Q4_K_M"}

MODELS = {
    # hidden 64: nothing fills a K-quant block; 17 layers reach the 'sixteenth' and 'eighth' rules
    "small-tied": make_dims(64, 16, [(4, 2, 128)] * 17, tied=True),
    "small-uneven": make_dims(64, 16, [(4, 4, 96), (2, 2, 64), (4, 4, 40), (0, 0, 96), (4, 4, 0)]),
    "k-quants": make_dims(256, 64, [(4, 2, 256)] * 8),
    "k-quants-gqa4-uneven": make_dims(256, 64, [(4, 1, 512), (2, 1, 256), (0, 0, 288), (4, 1, 0)], tied=True),
    # as SmolLM2-135M: the hidden size is a multiple of 64 but not of 256
    "wide-320": make_dims(320, 64, [(5, 1, 64)] * 8, tied=True),
    "wide-576-uneven": make_dims(576, 64, [(9, 3, 96), (6, 2, 64), (9, 3, 40)], vocab=32),
    "eighty": make_dims(64, 16, [(4, 2, 32)] * 80),
    "eighty-mha": make_dims(64, 16, [(4, 4, 32)] * 80, tied=True),
    "eighty-deci": make_dims(64, 16, [(4, 4, 32)] * 79 + [(4, 4, 64)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_types_and_bytes_are_llama_cpps(tmp_path: Path, name: str) -> None:
    """Without being told any type, llama.cpp chooses ours for every tensor, quantization and imatrix."""
    dims = MODELS[name]
    rng = np.random.default_rng(0)
    table = exporter.tensor_table(LLAMA, dims, CONFIG)
    shapes = graph_of(LLAMA, dims).shapes
    master = tmp_path / "master.gguf"
    exporter.write(
        master, LLAMA, dims, CONFIG, [], lambda n: rng.standard_normal(shapes[n], np.float32), dtype="F32"
    )
    arrays = tmp_path / "imatrix.npz"
    np.savez(arrays, **{n: rng.random(s[-1], np.float32) for n, s, _ in table if len(s) == 2})
    quantizations = list(gguf_types.QUANTIZATIONS)
    if name.startswith("eighty"):
        quantizations = ["Q3_K_M", "Q4_K_M", "Q4_0"]
    compared = 0
    for quantization in quantizations:
        for imatrix in (None, str(arrays)) if quantization in WITH_IMATRIX else (None,):
            out = tmp_path / "out.gguf"
            job = {
                "master": str(master),
                "out": str(out),
                "ftype": gguf_types.QUANTIZATIONS[quantization][0],
                "overrides": [],
                "imatrix": imatrix,
                "threads": 2,
            }
            assert _gguf_quantize.run(job) == 0
            cost = exporter.FileCost(LLAMA, CONFIG, [], has_imatrix=imatrix is not None)
            found = {t.name: t.type.name for t in read_header(out).tensors}
            planned = {n: t for n, _, t, _ in cost.tensors(dims, quantization)}
            assert planned == found, (quantization, imatrix)
            assert cost.file_bytes(dims, quantization) == out.stat().st_size, (quantization, imatrix)
            compared += 1
    assert compared == len(quantizations) + len(WITH_IMATRIX & set(quantizations))


def test_header_reader_agrees_with_the_format_library(tmp_path: Path) -> None:
    dims = MODELS["small-uneven"]
    table = exporter.tensor_table(LLAMA, dims, CONFIG)
    shapes = graph_of(LLAMA, dims).shapes
    kvs = [
        KeyValue("tokenizer.ggml.model", "STRING", "no_vocab"),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", ("a", "é", "漢"), "STRING"),
        KeyValue("tokenizer.ggml.scores", "ARRAY", (0.5, -1.25), "FLOAT32"),
        KeyValue("tokenizer.ggml.add_bos_token", "BOOL", True),
    ]
    path = tmp_path / "a.gguf"
    exporter.write(path, LLAMA, dims, CONFIG, kvs, lambda n: np.zeros(shapes[n], np.float32))
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert header.data_offset == reader.data_offset
    assert [(t.name, t.dims, t.type.id, t.offset, t.n_bytes) for t in header.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    for kv in header.metadata:
        contents = reader.fields[kv.key].contents()
        assert (list(kv.value) if kv.type == "ARRAY" else kv.value) == contents, kv.key
    assert len(header.metadata) == len(reader.fields) - 3
    assert [t.name for t in header.tensors] == [row[0] for row in table]
