"""The exported file: logits against torch, bytes against the prediction, everything read back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import llama_cpp
from builders import LLAMA3_ROPE, logits, save_model, tiny_llama, uneven_llama, uneven_model

from edgeprune import graph
from edgeprune.costs.gguf_header import KeyValue, read_header
from edgeprune.errors import ConfigError, StageError, UnsupportedModelError
from edgeprune.exporters import gguf as exporter
from edgeprune.records import LayerShape, ModelDims

LLAMA = graph.find_family("llama")
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 96, 100)]
KVS = [
    KeyValue("tokenizer.ggml.model", "STRING", "gpt2"),
    KeyValue("tokenizer.ggml.pre", "STRING", "gpt-2"),
    KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(f"t{i}" for i in range(96)), "STRING"),
    KeyValue("tokenizer.ggml.token_type", "ARRAY", (1,) * 96, "INT32"),
    KeyValue("tokenizer.ggml.merges", "ARRAY", ("t 1", "t 2"), "STRING"),
]


def runtime_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """[n_tokens, vocab] of llama.cpp with an F32 KV cache."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def build(layers: list[tuple[int, int, int]], **over: Any) -> tuple[Any, dict[str, Any], ModelDims, Any]:
    model, config = uneven_model(layers, **over)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    return model, config, graph.build(config).dims, state.__getitem__


def importance(dims: ModelDims, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    stats = {"head_in": rng.random(dims.hidden, np.float32)}
    for index, shape in enumerate(dims.layers):
        widths = {"attn_in": dims.hidden, "ffn_in": dims.hidden, "down_in": shape.n_ff}
        widths["o_in"] = shape.n_heads * dims.head_dim
        # a few columns matter far more than the others
        stats |= {f"layers.{index}.{k}": rng.random(n, np.float32) ** 8 + 1e-4 for k, n in widths.items()}
    return exporter.imatrix_names(LLAMA, dims, stats)


ALIKE = [(4, 2, 128)] * 3
UNEVEN = [(4, 2, 128), (2, 1, 96), (4, 2, 64)]
CASES: dict[str, tuple[str, list[tuple[int, int, int]], dict[str, Any]]] = {
    "mha": ("llama", [(4, 4, 128)] * 3, {}),
    "gqa": ("llama", ALIKE, {}),
    "tied": ("llama", ALIKE, {"tied": True}),
    "untied head size": ("llama", ALIKE, {"head_dim": 32}),
    "biases": ("llama", ALIKE, {"bias": True, "mlp_bias": True}),
    "per layer": ("deci", UNEVEN, {}),
    "per layer, tied, biases": ("deci", UNEVEN, {"tied": True, "bias": True, "mlp_bias": True}),
    "no attention": ("deci", [(4, 2, 128), (0, 0, 96), (4, 2, 64)], {}),
    "no ffn": ("deci", [(4, 2, 128), (4, 2, 0), (4, 2, 64)], {}),
    "no ffn, k-quant width": ("deci", [(4, 2, 128), (4, 2, 0)], {"hidden": 256, "vocab": 96}),
    "empty layer": ("deci", [(4, 2, 128), (0, 0, 0), (4, 2, 0)], {"bias": True, "mlp_bias": True}),
    "llama-3 rope": ("llama", ALIKE, {"rope": LLAMA3_ROPE}),
    "llama-3 rope per layer": ("deci", [(4, 2, 96), (0, 0, 96), (2, 1, 64)], {"rope": LLAMA3_ROPE}),
    "linear rope": ("llama", ALIKE, {"rope": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn rope": (
        "llama",
        ALIKE,
        {
            "context": 256,
            "rope": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_torch(tmp_path: Path, name: str) -> None:
    arch, layers, over = CASES[name]
    model, config, dims, read = build(layers, **over)
    path = tmp_path / "a.gguf"
    exporter.export(
        path,
        family=LLAMA,
        dims=dims,
        config=config,
        tokenizer_kvs=[],
        read_tensor=read,
        quantization="F32",
    )
    assert read_header(path).values()["general.architecture"] == arch
    expected, found = logits(model, TOKENS), runtime_logits(path, TOKENS)
    assert expected.std() > 0.5  # a flat model would agree with anything
    assert np.abs(expected - found).max() <= 1e-3
    assert (expected.argmax(axis=1) == found.argmax(axis=1)).all()


def test_stock_folder_exports(tmp_path: Path) -> None:
    """What `save_pretrained` writes, read as a user's folder would be."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "hf", tied=True)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(str(folder / "model.safetensors"))
    dims = graph.build(config).dims
    exporter.write(tmp_path / "a.gguf", LLAMA, dims, config, [], tensors.__getitem__, dtype="F32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert np.abs(logits(model, TOKENS) - runtime_logits(tmp_path / "a.gguf", TOKENS)).max() <= 1e-3


def test_uneven_folder_has_the_tensors_of_its_graph(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = uneven_llama(tmp_path / "hf", [(4, 2, 64), (0, 0, 32), (2, 1, 0)])
    config = json.loads((folder / "config.json").read_text())
    shapes = graph.build(config).shapes
    assert {k: v.shape for k, v in load_file(str(folder / "model.safetensors")).items()} == shapes
    assert save_model(*uneven_model([(4, 2, 64)]), tmp_path / "one").joinpath("config.json").exists()


SHAPES = {
    "dense-64": ([(4, 2, 128)] * 8, {"tied": True}),
    "uniform-64": ([(2, 1, 96)] * 8, {"bias": True, "mlp_bias": True, "head_dim": 16}),
    "per-layer-64": ([(4, 2, 128), (2, 1, 40), (0, 0, 64), (4, 2, 0)], {}),
    "dense-256": ([(4, 2, 256)] * 2, {"hidden": 256}),
    "per-layer-256": ([(4, 2, 512), (2, 1, 256), (4, 2, 288), (4, 2, 0)], {"hidden": 256, "tied": True}),
    "uniform-576": ([(9, 3, 96)] * 2, {"hidden": 576, "head_dim": 64, "tied": True}),
    "per-layer-576": ([(9, 3, 96), (6, 2, 64)], {"hidden": 576, "head_dim": 64, "rope": LLAMA3_ROPE}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_predicted_bytes_and_types_are_real(tmp_path: Path, name: str) -> None:
    """`export` reads each file back: names, shapes, types, metadata, and its bytes as predicted."""
    layers, over = SHAPES[name]
    _, config, dims, read = build(layers, **over)
    given = {"family": LLAMA, "dims": dims, "config": config, "tokenizer_kvs": KVS, "read_tensor": read}
    labels = {"name": "a model with a längere name", "license_name": "apache-2.0"}
    master = tmp_path / "master.gguf"
    exporter.write(master, LLAMA, dims, config, KVS, read, **labels)
    imatrix = importance(dims)
    cost = exporter.FileCost(LLAMA, config, KVS, **labels)
    without = exporter.FileCost(LLAMA, config, KVS, has_imatrix=False, **labels)
    for quantization in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL"):
        out = tmp_path / f"{quantization}.gguf"
        n = exporter.export(out, **given, quantization=quantization, imatrix=imatrix, master=master, **labels)
        assert n == out.stat().st_size == cost.file_bytes(dims, quantization)
        assert cost.weight_bytes(dims, quantization) == sum(t.n_bytes for t in read_header(out).tensors)
    n = exporter.export(tmp_path / "x.gguf", **given, quantization="Q4_0", master=master, **labels)
    assert n == without.file_bytes(dims, "Q4_0")
    assert n == exporter.predict_file_bytes(LLAMA, dims, "Q4_0", config, KVS, has_imatrix=False, **labels)


@pytest.mark.parametrize("quantization", ["F32", "BF16", "Q4_K_M"])
def test_export_without_a_master_leaves_nothing_behind(tmp_path: Path, quantization: str) -> None:
    _, config, dims, read = build(ALIKE)
    out = tmp_path / "out.gguf"
    exporter.export(
        out,
        family=LLAMA,
        dims=dims,
        config=config,
        tokenizer_kvs=KVS,
        read_tensor=read,
        quantization=quantization,
        imatrix=importance(dims) if quantization == "Q4_K_M" else None,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_quantized_models_run_and_stay_close(tmp_path: Path) -> None:
    """A layer of zeros survives every quantization, and eight bits stay near the float model."""
    model, config, dims, read = build([(4, 2, 128), (0, 0, 96), (4, 2, 0)], hidden=256)
    expected = logits(model, TOKENS)
    for quantization, limit in (("Q8_0", 0.05), ("Q6_K", 0.15), ("Q4_K_M", 0.5), ("IQ4_NL", 0.5)):
        out = tmp_path / f"{quantization}.gguf"
        exporter.export(
            out, family=LLAMA, dims=dims, config=config, tokenizer_kvs=[], read_tensor=read,
            quantization=quantization, imatrix=importance(dims),
        )  # fmt: skip
        difference = runtime_logits(out, TOKENS) - expected
        assert np.sqrt((difference**2).mean()) < limit * expected.std(), quantization


def test_imatrix_changes_the_file(tmp_path: Path) -> None:
    _, config, dims, read = build(ALIKE)
    master = tmp_path / "m.gguf"
    exporter.write(master, LLAMA, dims, config, [], read)
    files = {}
    for name, imatrix in (("none", None), ("a", importance(dims, 1)), ("b", importance(dims, 2))):
        out = tmp_path / f"{name}.gguf"
        kinds = {n: t for n, _, t, _ in exporter.FileCost(LLAMA, config, []).tensors(dims, "Q4_0")}
        exporter.quantize(master, out, quantization="Q4_0", types=kinds, imatrix=imatrix, threads=1)
        files[name] = out.read_bytes()
    assert len(set(files.values())) == 3 and len({len(f) for f in files.values()}) == 1


def test_imatrix_goes_to_the_tensors_that_read_it() -> None:
    _, _, dims, _ = build([(4, 2, 128), (0, 0, 96), (4, 2, 0)], tied=True)
    arrays = importance(dims)
    assert np.array_equal(arrays["blk.0.attn_q.weight"], arrays["blk.0.attn_v.weight"])
    assert arrays["blk.0.attn_output.weight"].shape == (64,) and arrays["blk.1.ffn_down.weight"].shape == (
        96,
    )
    assert {n.split(".")[2] for n in arrays if n.startswith("blk.1.")} == {"ffn_gate", "ffn_up", "ffn_down"}
    assert not any(n.startswith("blk.2.ffn") for n in arrays)
    assert "token_embd.weight" in arrays and "output.weight" not in arrays
    with pytest.raises(StageError, match=r"'layers\.0\.o_in' has shape \[63\], the tensor has 64 columns"):
        exporter.imatrix_names(LLAMA, dims, {"layers.0.o_in": np.ones(63)})
    with pytest.raises(StageError, match="not finite"):
        exporter.imatrix_names(LLAMA, dims, {"layers.0.o_in": np.full(64, np.nan)})


# ---------------------------------------------------------------- costs of a plan


def big_dims() -> ModelDims:
    """The shape of SmolLM2-135M."""
    return ModelDims(
        family="llama", vocab=49152, hidden=576, head_dim=64, max_context=8192, tied=True, qkv_bias=False,
        o_bias=False, mlp_bias=False, rms_eps=1e-5,
        layers=(LayerShape(n_heads=9, n_kv_heads=3, n_ff=1536),) * 30,
    )  # fmt: skip


def test_costs_by_hand() -> None:
    dims = big_dims()
    cost = exporter.FileCost(LLAMA, {}, [])
    norms = (30 * 2 + 1) * 576 * 4
    attention = 576 * 576 * 2 + 192 * 576 * 2
    matrices = 30 * (attention + 3 * 576 * 1536)
    embedding = 49152 * 576
    # Q8_0: 34 bytes for 32 weights; the tied embedding is read for the output
    assert cost.weight_bytes(dims, "Q8_0") == (matrices + embedding) // 32 * 34 + norms
    assert cost.read_bytes(dims, "Q8_0") == cost.weight_bytes(dims, "Q8_0")
    # Q4_0: the tied embedding is quantized as an output, and 576 is no multiple of 256: Q8_0;
    # with an importance matrix the first 30 // 8 = 3 ffn_down get Q4_1, 2 bytes more per block
    expected = matrices // 32 * 18 + 3 * 576 * 1536 // 32 * 2 + embedding // 32 * 34 + norms
    assert cost.weight_bytes(dims, "Q4_0") == expected
    assert cost.largest_tensor_bytes(dims, "Q4_0") == embedding // 32 * 34
    # untied: the embedding is only looked up
    untied = dataclasses.replace(dims, tied=False)
    assert cost.read_bytes(untied, "Q8_0") == cost.read_bytes(dims, "Q8_0")
    assert cost.weight_bytes(untied, "Q8_0") == cost.weight_bytes(dims, "Q8_0") + embedding // 32 * 34


def test_prediction_is_fast() -> None:
    tokens = tuple(f"token{i}" for i in range(49152))
    cost = exporter.FileCost(LLAMA, {}, [KeyValue("tokenizer.ggml.tokens", "ARRAY", tokens, "STRING")])
    dims = big_dims()
    began = time.process_time()
    for _ in range(20):
        cost.file_bytes(dims, "Q4_K_M")
    assert (time.process_time() - began) / 20 < 0.020


def test_constraints() -> None:
    dims = big_dims()
    found = exporter.constraints(LLAMA, dims, "Q4_K_M")
    # 576 is no multiple of 256: K-quants fall back to 32-weight blocks anyway
    assert (found.ffn.multiple_of, found.kv.multiple_of, found.kv.min_keep) == (32, 1, 1)
    assert not found.ffn.uniform_across_layers and not found.kv.uniform_across_layers
    # Llama-2-7B: one head of 128 per KV head, so K-quants want pairs
    wide = dataclasses.replace(
        dims, hidden=4096, head_dim=128, layers=(LayerShape(n_heads=32, n_kv_heads=32, n_ff=11008),) * 2
    )
    found = exporter.constraints(LLAMA, wide, "Q4_K_M")
    assert (found.ffn.multiple_of, found.kv.multiple_of) == (256, 2)
    found = exporter.constraints(LLAMA, wide, "Q4_0")
    assert (found.ffn.multiple_of, found.kv.multiple_of) == (32, 1)
    alone = dataclasses.replace(LLAMA, gguf=LLAMA.gguf[:1])
    assert exporter.constraints(alone, wide, "F16").ffn.uniform_across_layers
    with pytest.raises(UnsupportedModelError, match="different widths per layer"):
        uneven = (LayerShape(n_heads=32, n_kv_heads=32, n_ff=32), wide.layers[0])
        exporter.architecture(alone, dataclasses.replace(wide, layers=uneven))


# ---------------------------------------------------------------- failures


def test_first_layer_keeps_its_attention(tmp_path: Path) -> None:
    _, config, dims, read = build([(0, 0, 64), (4, 2, 64)])
    with pytest.raises(UnsupportedModelError, match="layer 0 must keep its attention"):
        exporter.write(tmp_path / "a.gguf", LLAMA, dims, config, [], read)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rotary scaling 'longrope'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rotary scaling 'dynamic'"),
        ({"type": "linear"}, "'linear' is incomplete"),
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
            "yarn rotary scaling with attention_f",
        ),
    ],
)
def test_rotary_scaling_that_gguf_lacks(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        exporter.rope_of({"rope_scaling": scaling})


def test_both_spellings_of_rope() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}}
    new = {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}
    assert exporter.rope_of(old) == exporter.rope_of(new)
    assert exporter.rope_of({}).theta == 10000.0


def test_value_beyond_f16_is_named(tmp_path: Path) -> None:
    _, config, dims, read = build(ALIKE)
    name = "model.layers.1.mlp.up_proj.weight"

    def too_large(tensor: str) -> np.ndarray:
        return read(tensor) * 1e6 if tensor == name else read(tensor)

    with pytest.raises(StageError, match=rf"tensor {name} holds .*, beyond F16"):
        exporter.write(tmp_path / "a.gguf", LLAMA, dims, config, [], too_large)
    assert list(tmp_path.iterdir()) == []
    exporter.write(tmp_path / "a.gguf", LLAMA, dims, config, [], too_large, dtype="F32")


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    _, config, dims, read = build(ALIKE)

    def short(name: str) -> np.ndarray:
        return read(name)[:63] if name == "model.norm.weight" else read(name)

    with pytest.raises(StageError, match=r"model\.norm\.weight has shape \[63\], the plan says \[64\]"):
        exporter.write(tmp_path / "a.gguf", LLAMA, dims, config, [], short)
    assert list(tmp_path.iterdir()) == []


def quantize(master: Path, out: Path) -> None:
    exporter.quantize(master, out, quantization="Q8_0", types={}, imatrix=None, threads=1)


def test_quantizer_failure_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense" * 10)
    with pytest.raises(StageError, match=r"quantizing out\.gguf failed \(exit code 1\): .*fail"):
        quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_an_abort_of_llama_cpp_is_survived(tmp_path: Path) -> None:
    """An unknown rotary scaling is an assertion there, which ends the process; ours goes on."""
    _, config, dims, read = build(ALIKE, rope={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    master = tmp_path / "m.gguf"
    exporter.write(master, LLAMA, dims, config, [], read)
    master.write_bytes(master.read_bytes().replace(b"linear", b"banana"))
    with pytest.raises(StageError, match=r"quantizing out\.gguf failed \(signal 6\): ."):
        quantize(master, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_quantizer_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = 'from edgeprune.exporters import _gguf_quantize as q; q._die_with_parent(); '\n"
        "child += 'import time; print(1, flush=True); time.sleep(60)'\n"
        "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n"
    )
    root = Path(exporter.__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child outlived its parent by five seconds")


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, dims, read = build(ALIKE)
    usage = type(exporter.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 10))
    with pytest.raises(ConfigError, match=r"but its disk has 10 B free"):
        exporter.write(tmp_path / "a.gguf", LLAMA, dims, config, [], read)
    assert list(tmp_path.iterdir()) == []


def test_readback_finds_every_difference(tmp_path: Path) -> None:
    _, config, dims, read = build(ALIKE)
    path = tmp_path / "a.gguf"
    exporter.write(path, LLAMA, dims, config, KVS, read)
    good = path.read_bytes()

    def check(data: bytes, message: str, **over: Any) -> None:
        path.write_bytes(data)
        given = {"dims": dims, "kvs": KVS, "quantization": "F16"} | over
        with pytest.raises(StageError, match=message):
            exporter.verify_readback(
                path, LLAMA, given["dims"], config, given["kvs"], given["quantization"], has_imatrix=False
            )

    assert exporter.verify_readback(path, LLAMA, dims, config, KVS, "F16", has_imatrix=False) == len(good)
    check(good[:-64], "cannot be read back")
    check(good + bytes(32), f"{len(good) + 32} bytes, planned {len(good)}")
    check(good.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"), r"'blk\.1\.ffn_up\.weight' is missing")
    check(good, "is F16, planned F32", quantization="F32")
    check(good, r"metadata 'tokenizer\.ggml\.tokens' is not what was written", kvs=[
        dataclasses.replace(kv, value=("x", *kv.value[1:])) if kv.key.endswith("tokens") else kv for kv in KVS
    ])  # fmt: skip
    check(good, "unplanned metadata 'tokenizer.ggml.merges'", kvs=KVS[:-1])
    wider = tuple(dataclasses.replace(s, n_ff=160) for s in dims.layers)
    check(good, r"has shape \(128, 64\), planned \(160, 64\)", dims=dataclasses.replace(dims, layers=wider))


def test_listing_the_exporter_loads_no_library() -> None:
    code = (
        "import sys\n"
        "from edgeprune import registry\n"
        "e = registry.load('exporters', 'gguf', 'EXPORTER')\n"
        "assert e.name == 'gguf' and 'Q4_K_M' in e.quantizations and e.suffix == '.gguf'\n"
        "assert not {'torch', 'gguf', 'llama_cpp', 'transformers'} & set(sys.modules)\n"
    )
    root = Path(exporter.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
