"""ONNX folders: against torch in plain ONNX Runtime and onnxruntime-genai, bytes, settings, damage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime_genai", reason="the extra 'onnx' is not installed")

import builders
import torch
from builders import logits

from edgeprune import checkpoint, graph, verify
from edgeprune.errors import ConfigError, StageError, UnsupportedModelError
from edgeprune.exporters import _onnx_blocks as blocks
from edgeprune.exporters import onnx as exporter
from edgeprune.runtimes import _onnx_worker as worker
from edgeprune.runtimes import onnx_genai, onnxruntime

# longer than the sliding window of the tiny Gemma
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 96, 60)]
UNEVEN = {"layers.1.kv": (1,), "layers.0.ffn": tuple(range(64)), "layers.3.kv": (), "layers.2.ffn": ()}

LLAMAS: dict[str, tuple[list[tuple[int, int, int]], dict[str, Any]]] = {
    "heads of their own": ([(4, 4, 128)] * 3, {}),
    "shared heads": ([(4, 2, 128)] * 3, {}),
    "tied": ([(4, 2, 128)] * 3, {"tied": True}),
    "biases": ([(4, 2, 128)] * 3, {"bias": True, "mlp_bias": True}),
    "per layer": ([(4, 2, 128), (2, 1, 96), (2, 2, 40)], {"tied": True}),
    "no attention in a layer": ([(0, 0, 96), (4, 2, 128), (2, 1, 64)], {}),
    "no FFN in a layer": ([(4, 2, 128), (2, 1, 0), (4, 4, 64)], {"tied": True}),
    "hidden size of no whole blocks": ([(4, 2, 128)] * 2, {"hidden": 80, "head_dim": 16, "tied": True}),
    "llama3 rotary scaling": ([(4, 2, 128)] * 2, {"rope": builders.LLAMA3_ROPE}),
}


@dataclasses.dataclass
class Made:
    folder: Path
    model: torch.nn.Module
    source: Any
    dims: Any
    n_bytes: int


def export(folder: Path, source: Any, dims: Any, quantization: str, **more: Any) -> int:
    return exporter.export(
        folder,
        family=graph.find_family(dims.family),
        dims=dims,
        config=source.config,
        read_tensor=lambda name: checkpoint.to_float32(source.tensor(name)),
        quantization=quantization,
        **more,
    )


def make(tmp_path: Path, name: str, quantization: str = "fp32") -> Made:
    layers, over = LLAMAS[name]
    source = checkpoint.SafetensorsSource(builders.uneven_llama(tmp_path / "hf", layers, **over))
    dims = graph.build(source.config).dims
    folder = tmp_path / quantization
    n_bytes = export(folder, source, dims, quantization)
    return Made(folder, checkpoint.assemble(source, dims), source, dims, n_bytes)


def run(folder: Path, tokens: Sequence[int], *, step: int = 512) -> np.ndarray:
    """[tokens, vocab] from plain ONNX Runtime in this process, `step` tokens a call."""
    args = {"folder": str(folder), "model": str(exporter.find_model(folder))}
    engine = worker.Ort(args, threads=1, chunk=512)
    engine.clear(len(tokens))
    parts = [np.array(engine.run(tokens[i : i + step])) for i in range(0, len(tokens), step)]
    return np.concatenate(parts)


def run_genai(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """[vocab] of the last token, the first 50 as a prompt and the others one by one."""
    engine = worker.Genai({"folder": str(folder)}, threads=1, chunk=16)
    engine.clear(len(tokens))
    engine.feed(tokens[:50])
    for token in tokens[50:]:
        engine.feed([token])
    return np.array(engine.last_logits())


@pytest.mark.parametrize("name", LLAMAS)
def test_fp32_is_torch(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, name)
    expected = logits(made.model, TOKENS)
    for step in (512, 1):
        found = run(made.folder, TOKENS, step=step)
        assert np.abs(found - expected).max() <= 1e-3
        assert (found.argmax(1) == expected.argmax(1)).all()
    last = run_genai(made.folder, TOKENS)
    assert np.abs(last - expected[-1]).max() <= 1e-3


def greedy_torch(model: torch.nn.Module, prompt: list[int], n_new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n_new):
        tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["tied", "per layer", "no attention in a layer"])
def test_greedy_tokens_are_those_of_torch(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, name)
    expected = greedy_torch(made.model, TOKENS[:8], 24)
    assert onnx_genai.greedy(made.folder, TOKENS[:8], 24) == expected
    assert onnxruntime.greedy(made.folder, TOKENS[:8], 24) == expected


def dequantized(made: Made, bits: int) -> torch.nn.Module:
    """The torch model with every matrix rounded as the file has it."""
    model = checkpoint.assemble(made.source, made.dims)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        own = 8 if "embed" in name or "lm_head" in name else bits
        columns = parameter.shape[1]
        packed, scales = blocks.quantize(parameter.detach().numpy(), own)
        parameter.data = torch.from_numpy(blocks.dequantize(packed, scales, own, columns))
    model.tie_weights() if made.dims.tied else None
    return model


@pytest.mark.parametrize(("quantization", "most_kl"), [("fp16", 1e-4), ("int8", 0.03), ("int4", 0.03)])
@pytest.mark.parametrize("name", ["shared heads", "per layer", "biases", "hidden size of no whole blocks"])
def test_smaller_types_compute_what_their_weights_say(
    tmp_path: Path, name: str, quantization: str, most_kl: float
) -> None:
    made = make(tmp_path, name, quantization)
    bits = {"fp16": 16, "int8": 8, "int4": 4}[quantization]
    model = made.model if bits == 16 else dequantized(made, bits)
    # activations are rounded to int8 as well, which is what is left
    found = verify.compare(logits(model, TOKENS), run(made.folder, TOKENS))
    assert found.kl <= most_kl
    assert found.same_argmax >= len(TOKENS) * 0.85


@pytest.mark.parametrize("quantization", exporter.QUANTIZATIONS)
@pytest.mark.parametrize("name", ["heads of their own", "per layer", "no FFN in a layer"])
def test_predicted_bytes_are_real(tmp_path: Path, name: str, quantization: str) -> None:
    layers, over = LLAMAS[name]
    folder = builders.uneven_llama(tmp_path / "hf", layers, vocab=300, **over)
    builders.tiny_tokenizer(folder, 300)
    source = checkpoint.SafetensorsSource(folder)
    dims = graph.build(source.config).dims
    cost = exporter.FileCost(graph.find_family("llama"), source.config, tokenizer_folder=folder)
    predicted = cost.file_bytes(dims, quantization)
    out = tmp_path / "out"
    assert export(out, source, dims, quantization, tokenizer_folder=folder) == predicted
    assert sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) == predicted
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    data = next((out / "onnx").glob("*_data")).stat().st_size
    assert cost.weight_bytes(dims, quantization) <= data < cost.weight_bytes(dims, quantization) + 64 * 200


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    source = checkpoint.SafetensorsSource(builders.tiny_llama(tmp_path / "hf", tied=True, vocab=3000))
    dims = graph.build(source.config).dims
    cost = exporter.FileCost(graph.find_family("llama"), source.config)
    untied = dataclasses.replace(dims, tied=False)
    for quantization, per_weight in (("fp32", 4.0), ("fp16", 2.0), ("int8", 36 / 32), ("int4", 36 / 32)):
        table = dims.vocab * dims.hidden * per_weight
        both = cost.weight_bytes(untied, quantization) - cost.weight_bytes(dims, quantization)
        assert both == table
        # neither rotary tables nor an embedding that is only looked up are read for every token
        tables = 2 * dims.max_context * dims.head_dim // 2 * (2 if quantization == "fp16" else 4)
        assert cost.read_bytes(dims, quantization) == cost.weight_bytes(dims, quantization) - tables
        assert cost.read_bytes(untied, quantization) == cost.read_bytes(dims, quantization)
    # read back: the embedding and the output layer name the same weights
    export(tmp_path / "out", source, dims, "int4")
    model = exporter.load_model(exporter.find_model(tmp_path / "out"))
    users = [n.op_type for n in model.graph.node if "lm_head.weight" in n.input]
    assert users == ["Gather", "MatMulNBits"]


def test_settings_for_the_clients(tmp_path: Path) -> None:
    made = make(tmp_path, "no attention in a layer", "int4")
    genai = json.loads((made.folder / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert decoder["filename"] == "onnx/model_q4.onnx"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 2)
    assert genai["search"]["past_present_share_buffer"] is True
    config = json.loads((made.folder / "config.json").read_text())
    assert config["hidden_size"] // config["num_attention_heads"] == made.dims.head_dim
    assert config["edgeprune_layers"] == [[0, 0, 96], [4, 2, 128], [2, 1, 64]]
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": True}
    model = exporter.load_model(exporter.find_model(made.folder))
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert list(shapes)[:2] == ["input_ids", "attention_mask"]
    assert shapes["past_key_values.0.key"][1] == 2
    assert shapes["past_key_values.1.value"][1] == 1
    assert "past_key_values.2.key" not in shapes


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 64, 40])
def test_blocks_keep_within_half_a_step(bits: int, columns: int) -> None:
    matrix = np.random.default_rng(1).standard_normal((50, columns)).astype(np.float32)
    packed, scales = blocks.quantize(matrix, bits)
    assert packed.shape == (50, -(-columns // 32), 32 * bits // 8)
    assert packed.nbytes == blocks.packed_bytes(matrix.shape, bits)
    error = np.abs(blocks.dequantize(packed, scales, bits, columns) - matrix)
    step = np.repeat(np.abs(scales), 32, axis=1)[:, :columns]
    # the largest value of an int4 block may be clipped by a search for the smallest squared error
    assert (error <= step * (0.5001 if bits == 8 else 1.6)).all()
    if bits == 4:
        assert np.sqrt((error**2).mean()) < 0.09


def test_blocks_zeros_and_importance() -> None:
    packed, scales = blocks.quantize(np.zeros((2, 32), np.float32), 4)
    assert (scales == 0).all() and (blocks.dequantize(packed, scales, 4, 32) == 0).all()
    matrix = np.random.default_rng(2).standard_normal((400, 64)).astype(np.float32)
    weights = np.ones(64, np.float32)
    weights[:16] = 100
    plain, weighted = (blocks.dequantize(*blocks.quantize(matrix, 4, w), 4, 64) for w in (None, weights))
    error = [float((((x - matrix) ** 2) * weights).sum()) for x in (plain, weighted)]
    assert error[1] < 0.97 * error[0]


# ---------------------------------------------------------------- refusals and damage


@pytest.mark.parametrize(("quantization", "multiple"), [("int4", 32), ("int8", 32), ("fp16", 1), ("fp32", 1)])
def test_constraints(quantization: str, multiple: int) -> None:
    config = json.loads(builders.tiny_config().to_json_string(use_diff=False)) | {"model_type": "llama"}
    dims = graph.build(config).dims
    rules = exporter.constraints(graph.find_family("llama"), dims, quantization)
    assert (rules.format, rules.ffn.multiple_of, rules.kv.multiple_of) == ("onnx", multiple, 1)
    assert not rules.ffn.uniform_across_layers and not rules.kv.uniform_across_layers
    assert len(rules.reasons) == (multiple > 1)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown ONNX quantization 'int5'"):
        exporter.check_quantization("int5")
    source = checkpoint.SafetensorsSource(builders.tiny_llama(tmp_path / "hf"))
    dims = graph.build(source.config).dims
    nothing = dataclasses.replace(dims.layers[0], n_heads=0, n_kv_heads=0)
    with pytest.raises(UnsupportedModelError, match="without any attention"):
        export(tmp_path / "out", source, dataclasses.replace(dims, layers=(nothing,) * 3), "fp32")
    config = dict(source.config, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedModelError, match="rotary scaling 'dynamic'"):
        exporter.rotary_tables(dims, config, 64)
    assert not (tmp_path / "out").exists()


def test_values_beyond_fp16_are_named(tmp_path: Path) -> None:
    source = checkpoint.SafetensorsSource(builders.tiny_llama(tmp_path / "hf"))
    dims = graph.build(source.config).dims

    def read(name: str) -> np.ndarray:
        array = checkpoint.to_float32(source.tensor(name))
        return array * 1e7 if name.endswith("layers.1.mlp.up_proj.weight") else array

    given: dict[str, Any] = {"family": graph.find_family("llama"), "dims": dims, "config": source.config}
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj\.weight holds .* beyond fp16"):
        exporter.export(tmp_path / "out", **given, read_tensor=read, quantization="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_broken_folder_is_one_clear_line(tmp_path: Path) -> None:
    made = make(tmp_path, "tied", "int4")
    model = exporter.find_model(made.folder)
    data = model.with_name(model.name + "_data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"_data has [\d,]+ bytes, its model refers to"):
        onnx_genai.greedy(made.folder, [1, 2], 1)
    data.write_bytes(whole)
    graph_bytes = model.read_bytes()
    model.write_bytes(graph_bytes[: len(graph_bytes) // 2])
    with pytest.raises(ConfigError, match=r"is not a readable ONNX file|refers to"):
        onnxruntime.greedy(made.folder, [1, 2], 1)
    model.write_bytes(graph_bytes)
    (made.folder / "genai_config.json").unlink()
    with pytest.raises(ConfigError, match=r"genai_config\.json is missing"):
        onnx_genai.greedy(made.folder, [1, 2], 1)
    with pytest.raises(ConfigError, match="does not exist"):
        exporter.find_model(tmp_path / "nowhere")


def test_readback_names_what_differs(tmp_path: Path) -> None:
    import onnx

    made = make(tmp_path, "tied", "int8")
    family = graph.find_family("llama")

    def check() -> int:
        return exporter.verify_readback(made.folder, family, made.dims, made.source.config, (), "int8")

    assert check() == made.n_bytes
    file = exporter.find_model(made.folder)
    model = onnx.load(str(file), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    next(a for a in node.attribute if a.name == "num_heads").i = 2
    file.write_bytes(model.SerializeToString())
    with pytest.raises(
        StageError, match=r"node '/layers\.0/attn/GroupQueryAttention' is not what was planned"
    ):
        check()


def test_a_tokenizer_that_gguf_cannot_say_goes_with_onnx(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    """Unigram with byte fallback: llama.cpp has none, the clients of ONNX read tokenizer.json themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = builders.tiny_llama(tmp_path / "hf", vocab=300)
    pieces = [("<unk>", 0.0), ("\u2581a", -1.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.save(str(folder / "tokenizer.json"))
    refused = run_cli("export", str(folder), "--format", "gguf", "--out", str(tmp_path / "a.gguf"))
    assert refused.code == 4 and "unigram with byte fallback" in refused.err
    assert "ONNX takes any tokenizer" in refused.err and not (tmp_path / "a.gguf").exists()
    done = run_cli(
        "export", str(folder), "--format", "onnx", "--quantization", "fp32", "--out", str(tmp_path / "onnx")
    )
    assert done.code == 0, done.err
    assert (tmp_path / "onnx" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
