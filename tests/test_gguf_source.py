"""A GGUF parent gives back what was written, and damaged files are one clear line."""

from __future__ import annotations

import dataclasses
import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")

import builders

from edgeprune import graph
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, EdgepruneError, UnsupportedModelError
from edgeprune.exporters import gguf as exporter
from edgeprune.families.base import LAYER_LIST_KEY
from edgeprune.gguf_source import GgufSource, permute_rows, unpermute_rows

KVS = [
    KeyValue("tokenizer.ggml.model", "STRING", "gpt2"),
    KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(f"t{i}" for i in range(96)), "STRING"),
    KeyValue("tokenizer.ggml.bos_token_id", "UINT32", 1),
    KeyValue("tokenizer.ggml.eos_token_id", "UINT32", 2),
    KeyValue("tokenizer.chat_template", "STRING", "{{ messages }}"),
]


def write_file(
    path: Path, layers: list[tuple[int, int, int]], dtype: str = "F32", **over: Any
) -> tuple[Any, Any]:
    model, config = builders.uneven_model(layers, **over)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    dims = graph.build(config).dims
    family = graph.find_family("llama")
    exporter.write(
        path, family, dims, config, KVS, state.__getitem__, dtype=dtype, name="tiny", license_name="mit"
    )
    return state, config


ALIKE = [(4, 2, 64)] * 2


@pytest.mark.parametrize(
    ("layers", "over"),
    [
        ([(4, 4, 64)] * 2, {}),
        (ALIKE, {"tied": True}),
        (ALIKE, {"bias": True, "mlp_bias": True}),
        ([(4, 2, 64), (2, 1, 32), (0, 0, 96)], {}),
        (ALIKE, {"rope": builders.LLAMA3_ROPE}),
        (ALIKE, {"rope": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
        (
            ALIKE,
            {
                "rope": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
    ids=["mha", "tied", "biases", "uneven", "llama3", "linear", "yarn"],
)
def test_round_trip(tmp_path: Path, layers: list[tuple[int, int, int]], over: dict[str, Any]) -> None:
    path = tmp_path / "a.gguf"
    state, config = write_file(path, layers, **over)
    source = GgufSource(path)
    expected = graph.build(config)
    assert source.dims == expected.dims
    assert set(source.names()) == set(expected.shapes)
    for name in source.names():
        array = source.tensor(name)
        assert array.dtype == np.float32 and np.array_equal(array, state[name]), name
        assert source.shape(name) == array.shape and source.types[name] == "F32"
    for key in ("rope_parameters", "rms_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        assert source.config[key] == config[key], key
    assert source.config.get(LAYER_LIST_KEY) == config.get(LAYER_LIST_KEY)
    assert list(source.tokenizer_kvs) == KVS
    assert (source.general["name"], source.general["license"]) == ("tiny", "mit")


def test_config_loads_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path / "a.gguf"
    write_file(path, ALIKE, rope=builders.LLAMA3_ROPE, bias=True)
    model, _ = builders.uneven_model(ALIKE, rope=builders.LLAMA3_ROPE, bias=True)
    source = GgufSource(path)
    again = LlamaForCausalLM(LlamaConfig(**source.config)).eval()
    again.load_state_dict({n: torch.from_numpy(source.tensor(n)) for n in source.names()})
    tokens = list(range(3, 90))
    assert np.abs(builders.logits(again, tokens) - builders.logits(model, tokens)).max() <= 1e-4


def test_quantized_parent_is_dequantized(tmp_path: Path) -> None:
    path, out = tmp_path / "a.gguf", tmp_path / "q.gguf"
    state, _ = write_file(path, ALIKE, dtype="F16")
    exporter.quantize(path, out, quantization="Q8_0", types={}, imatrix=None, threads=1)
    source = GgufSource(out)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert source.types[name] == "Q8_0"
    # half a step of 1/127 of the block's largest value
    assert np.abs(source.tensor(name) - state[name]).max() <= np.abs(state[name]).max() / 127


def test_permutation_by_hand() -> None:
    # one head of six rows: halves (0 1 2) (3 4 5) become the pairs 0 3, 1 4, 2 5; then a second head
    rows = np.arange(12)
    assert permute_rows(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = np.arange(24).reshape(12, 2)
    assert np.array_equal(unpermute_rows(permute_rows(matrix, 2), 2), matrix)


def test_left_out_bias_is_zero(tmp_path: Path) -> None:
    """llama.cpp files may have Q, K, V biases and none for the output; the HF family has one switch."""
    path = tmp_path / "a.gguf"
    state, config = write_file(path, ALIKE, bias=True)
    dims = dataclasses.replace(graph.build(config).dims, o_bias=False)
    exporter.write(path, graph.find_family("llama"), dims, config, [], state.__getitem__, dtype="F32")
    source = GgufSource(path)
    assert source.config["attention_bias"] is True
    assert "model.layers.0.self_attn.o_proj.bias" not in source.types
    assert np.array_equal(source.tensor("model.layers.0.self_attn.o_proj.bias"), np.zeros(64, np.float32))
    name = "model.layers.0.self_attn.k_proj.bias"
    assert np.array_equal(source.tensor(name), state[name]) and state[name].any()


def test_strange_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_file(path, ALIKE, bias=True)
    rename(path, "blk.1.attn_output.bias", "blk.1.attn_oooooo.bias")
    with pytest.raises(UnsupportedModelError, match=r"attn_oooooo\.bias' is not part of a llama model"):
        GgufSource(path)


# ---------------------------------------------------------------- hostile files


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(s: str) -> bytes:
    return u64(len(s)) + s.encode()


HEAD = b"GGUF" + u32(3)
HOSTILE = {
    "empty": b"",
    "not gguf": b"PK\x03\x04" + bytes(100),
    "magic only": b"GGUF",
    "version 1": b"GGUF" + u32(1) + bytes(64),
    "big endian": b"GGUF" + struct.pack(">I", 3) + bytes(64),
    "endless tensors": HEAD + u64(2**63) + u64(1) + bytes(64),
    "endless metadata": HEAD + u64(0) + u64(2**62) + bytes(64),
    "endless key": HEAD + u64(0) + u64(1) + u64(2**62) + bytes(64),
    "endless string": HEAD + u64(0) + u64(1) + text("a") + u32(8) + u64(2**63 - 1) + bytes(64),
    "endless array": HEAD + u64(0) + u64(1) + text("a") + u32(9) + u32(4) + u64(2**62) + bytes(64),
    "endless strings": HEAD + u64(0) + u64(1) + text("a") + u32(9) + u32(8) + u64(2**40) + bytes(64),
    "array of arrays": HEAD + u64(0) + u64(1) + text("a") + u32(9) + u32(9) + u64(1) + bytes(64),
    "unknown value type": HEAD + u64(0) + u64(1) + text("a") + u32(77) + bytes(64),
    "no metadata": HEAD + u64(0) + u64(0) + bytes(64),
    "many dimensions": HEAD + u64(1) + u64(0) + text("t") + u32(2**31) + bytes(64),
    "zero dimension": HEAD + u64(1) + u64(0) + text("t") + u32(1) + u64(0) + u32(0) + u64(0) + bytes(64),
    "huge tensor": HEAD + u64(1) + u64(0) + text("t") + u32(2) + u64(2**40) * 2 + u32(0) + u64(0) + bytes(64),
    "far tensor": HEAD + u64(1) + u64(0) + text("t") + u32(1) + u64(8) + u32(0) + u64(2**50) + bytes(64),
    "unknown tensor type": HEAD
    + u64(1)
    + u64(0)
    + text("t")
    + u32(1)
    + u64(8)
    + u32(99)
    + u64(0)
    + bytes(64),
    "same key twice": HEAD + u64(0) + u64(2) + (text("a") + u32(0) + b"\x01") * 2 + bytes(64),
    "odd alignment": HEAD + u64(0) + u64(1) + text("general.alignment") + u32(4) + u32(24) + bytes(64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with pytest.raises((ConfigError, UnsupportedModelError)) as caught:
        GgufSource(path)
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        GgufSource(tmp_path / "none.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_file(path, ALIKE)
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    # the last tensor ends in padding only when its size is odd; here every byte counts
    for n in [*range(0, 4000, 97), *np.linspace(4000, len(data) - 1, 30).astype(int)]:
        cut.write_bytes(data[:n])
        with pytest.raises(ConfigError):
            GgufSource(cut)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Any damage to the header is either harmless or one of our errors."""
    path = tmp_path / "a.gguf"
    write_file(path, ALIKE)
    data = path.read_bytes()
    size = GgufSource(path).header.data_offset
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(0, size, 3):
            damaged[at] = rng.integers(0, 256)
        bad.write_bytes(damaged)
        try:
            source = GgufSource(bad)
            for name in source.names():
                source.tensor(name)
        except EdgepruneError:
            refused += 1
    assert refused > 100


def rename(path: Path, old: str, new: str) -> None:
    assert len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


def test_missing_tensor_and_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_file(path, ALIKE)
    rename(path, "blk.1.ffn_up.weight", "blk.1.ffn_xx.weight")
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up\.weight' is missing"):
        GgufSource(path)
    write_file(path, ALIKE)
    rename(path, "llama", "mamba")
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported") as caught:
        GgufSource(path)
    assert (
        caught.value.hint == "known architectures: gemma3, llama, deci, phi3, qwen2, qwen3, openelm, smollm3"
    )


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_file(path, ALIKE)
    data = path.read_bytes()
    entry = text("llama.feed_forward_length") + u32(4)
    assert data.count(entry + u32(64)) == 1
    path.write_bytes(data.replace(entry + u32(64), entry + u32(96)))
    with pytest.raises(
        ConfigError, match=r"blk\.0\.ffn_gate\.weight' has shape \[64, 64\], expected \[96, 64\]"
    ):
        GgufSource(path)
