"""Every family: its graph against transformers, cutting against zeroing, its file against torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import builders
import llama_cpp
import torch
from builders import FAMILIES, Kept, cut, gguf_architecture, logits, opened, pruned

from edgeprune import checkpoint, graph, registry, surgery
from edgeprune.costs import gguf_types
from edgeprune.costs.gguf_header import read_header
from edgeprune.errors import UnsupportedModelError
from edgeprune.exporters import _gguf_quantize
from edgeprune.exporters import gguf as exporter
from edgeprune.families.base import ACTIVATION_LIPSCHITZ, MATRICES, Family
from edgeprune.gguf_source import GgufSource
from edgeprune.records import ModelGraph

# longer than the sliding window of the tiny Gemma
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 96, 100)]


def export(path: Path, source: Any, after: ModelGraph, family: Family, quantization: str = "F32") -> None:
    exporter.export(
        path,
        family=family,
        dims=after.dims,
        config=source.config,
        tokenizer_kvs=[],
        read_tensor=lambda n: checkpoint.to_float32(source.tensor(n)),
        quantization=quantization,
    )


def runtime_logits(path: Path, tokens: Sequence[int]) -> np.ndarray:
    """[n_tokens, vocab] of llama.cpp with an F32 KV cache."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    model.eval(list(tokens))
    return np.array(model.scores[: len(tokens)])


# ---------------------------------------------------------------- contract


def test_every_family_has_a_case() -> None:
    known = {graph.find_family(name.replace("-", "_")).model_type for name in registry.names("families")}
    assert {case.model_type for case in FAMILIES.values()} == known


@pytest.mark.parametrize("name", registry.names("families"))
def test_contract(name: str) -> None:
    family: Family = registry.load("families", name, "FAMILY")
    assert family.model_type.startswith(name.split("-")[0].replace("gemma3", "gemma3"))
    assert family.summary and "\n" not in family.summary and family.reference
    assert family.activation in ACTIVATION_LIPSCHITZ
    assert [r for r in family.roles if r in MATRICES] == list(MATRICES)
    assert len({arch.name for arch in family.gguf}) == len(family.gguf) > 0
    assert not family.gguf[0].per_layer
    for arch in family.gguf:
        assert all(role in family.roles for roles in arch.fused.values() for role in roles)


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported") as caught:
        graph.build({"model_type": "mamba"})
    assert caught.value.hint is not None and "gemma3, gemma3-text, llama, mistral, phi3" in caught.value.hint


@pytest.mark.parametrize("name", FAMILIES)
def test_graph_is_that_of_transformers(folders: Callable[[str], Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    source, found = opened(folders(name))
    stock = AutoModelForCausalLM.from_pretrained(folders(name))
    named = {n: tuple(p.shape) for n, p in stock.named_parameters()}  # tied ones once
    assert found.shapes == named
    assert found.total_params == sum(p.numel() for p in stock.parameters())
    ours = logits(checkpoint.assemble(source, found.dims), TOKENS)
    assert np.abs(ours - logits(stock, TOKENS)).max() <= 1e-5
    assert ours.std() > 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_units_cover_their_slices_once(folders: Callable[[str], Path], name: str) -> None:
    _, found = opened(folders(name))
    taken: dict[tuple[str, int], list[int]] = {}
    for axis in found.axes:
        assert axis.unit_params * axis.n_units == sum(
            part.block
            * axis.n_units
            * (found.shapes[part.tensor][1 - part.dim] if len(found.shapes[part.tensor]) == 2 else 1)
            for part in axis.slices
        )
        for tensor, dim, index in surgery.rows_of(axis, range(axis.n_units)):
            taken.setdefault((tensor, dim), []).extend(int(i) for i in index)
    for (tensor, dim), rows in taken.items():
        assert sorted(rows) == list(range(found.shapes[tensor][dim])), tensor


# ---------------------------------------------------------------- cutting


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_is_remove(folders: Callable[[str], Path], name: str) -> None:
    """Also where every layer has widths of its own, which only edgeprune's loader reads."""
    kept: Kept = {
        "layers.0.kv": (1,),
        "layers.2.kv": (0,),
        "layers.0.ffn": tuple(range(0, 128, 2)),
        "layers.1.ffn": tuple(range(40)),
        "layers.3.kv": (),
        "layers.3.ffn": (),
    }
    source, found = opened(folders(name))
    model, _, after, _ = pruned(folders(name), kept)
    state = checkpoint.assemble(source, found.dims).state_dict()
    for axis in found.axes:
        for i in set(range(axis.n_units)) - set(kept.get(axis.name, range(axis.n_units))):
            for part in axis.slices:
                start = part.offset + i * part.block
                state[part.tensor].narrow(part.dim, start, part.block).zero_()
    zeroed = checkpoint.assemble(source, found.dims)
    zeroed.load_state_dict(state)
    assert np.abs(logits(zeroed, TOKENS) - logits(model, TOKENS)).max() <= 1e-4
    assert after.decoder_params < found.decoder_params


@pytest.mark.parametrize("name", FAMILIES)
def test_ratio_zero_is_the_identity(folders: Callable[[str], Path], name: str) -> None:
    source, found = opened(folders(name))
    model, cut_source, after, _ = pruned(folders(name), {})
    assert after.dims == found.dims and after.key == found.key
    for tensor in found.shapes:
        assert torch.equal(cut_source.tensor(tensor), source.tensor(tensor))
    assert np.array_equal(logits(model, TOKENS), logits(checkpoint.assemble(source, found.dims), TOKENS))


@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_folder_loads_in_stock_transformers(
    tmp_path: Path, folders: Callable[[str], Path], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    kept = cut("fewer heads" if gguf_architecture("fewer heads", name) else "uniform", name)
    model, cut_source, after, _ = pruned(folders(name), kept)
    surgery.save(tmp_path / "cut", cut_source, after.shapes)
    expected = logits(model, TOKENS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert np.abs(logits(stock, TOKENS) - expected).max() <= 1e-5
    again = checkpoint.load_model(tmp_path / "cut")
    assert np.array_equal(logits(again, TOKENS), expected)


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", FAMILIES)
def test_types_are_what_llama_cpp_chooses(tmp_path: Path, folders: Callable[[str], Path], name: str) -> None:
    """Told only the name of a quantization, llama.cpp gives every tensor the type that was counted on."""
    for shape in ("dense", "per layer"):
        if gguf_architecture(shape, name) is None:
            continue
        _, source, after, family = pruned(folders(name), cut(shape, name))
        master = tmp_path / f"{shape}.gguf"
        export(master, source, after, family)
        cost = exporter.FileCost(family, source.config, [], has_imatrix=False)
        for quantization in ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q4_0", "IQ4_NL"):
            out = tmp_path / f"{quantization}.gguf"
            job = {
                "master": str(master),
                "out": str(out),
                "ftype": gguf_types.QUANTIZATIONS[quantization][0],
                "overrides": [],
                "imatrix": None,
                "threads": 1,
            }
            assert _gguf_quantize.run(job) == 0
            found = {t.name: t.type.name for t in read_header(out).tensors}
            assert found == {n: t for n, _, t, _ in cost.tensors(after.dims, quantization)}, quantization
            assert out.stat().st_size == cost.file_bytes(after.dims, quantization)


CONSTRAINTS = {  # widths per layer, heads, whole FFN blocks, whole attention blocks
    "llama": (True, True, True, True),
    "mistral": (True, True, True, True),
    "qwen2": (True, True, True, True),
    "qwen3": (True, True, True, False),
    "qwen3 untied": (False, True, False, False),
    "gemma3": (False, True, False, False),
    "smollm3": (False, True, False, False),
    "phi3": (False, False, False, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_planner_is_told(folders: Callable[[str], Path], name: str) -> None:
    _, found = opened(folders(name))
    rules = exporter.constraints(graph.find_family(found.dims.family), found.dims, "Q4_0")
    told = (not rules.ffn.uniform_across_layers, not rules.kv.fixed, rules.ffn.whole, rules.kv.whole)
    assert told == CONSTRAINTS[name]
    assert rules.kv.uniform_across_layers is rules.ffn.uniform_across_layers
    text = " ".join(rules.reasons)
    assert ("with widths per layer" in text) is rules.ffn.uniform_across_layers
    assert ("heads are fixed" in text) is rules.kv.fixed
    assert ("'openelm' refuses an output of its own" in text) is (name == "qwen3 untied")


@pytest.mark.parametrize("name", FAMILIES)
def test_file_reads_back_as_the_same_model(tmp_path: Path, folders: Callable[[str], Path], name: str) -> None:
    for shape in ("dense", "per layer", "layer dropped"):
        if gguf_architecture(shape, name) is None:
            continue
        model, source, after, family = pruned(folders(name), cut(shape, name))
        path = tmp_path / f"{shape}.gguf"
        export(path, source, after, family)
        again = GgufSource(path)

        class AsTorch:
            config, fingerprint = again.config, ""

            def tensor(self, n: str, again: GgufSource = again) -> torch.Tensor:
                return torch.from_numpy(again.tensor(n))

            def close(self) -> None: ...

        loaded = checkpoint.assemble(AsTorch(), again.dims)
        assert np.abs(logits(loaded, TOKENS) - logits(model, TOKENS)).max() <= 1e-4, shape
        json.dumps(again.config)


# ---------------------------------------------------------------- rules of single families


def test_multimodal_gemma_counts_as_its_text(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file, save_file

    plain = folders("gemma3")
    config = json.loads((plain / "config.json").read_text())
    nested = {"model_type": "gemma3", "eos_token_id": [1, 2], "vision_config": {}, "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    state = {f"language_model.{n}": t for n, t in load_file(plain / "model.safetensors").items()}
    state["vision_tower.patch.weight"] = torch.zeros(2, 2)
    save_file(state, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    expected = logits(checkpoint.load_model(plain), TOKENS)
    assert np.array_equal(logits(checkpoint.load_model(tmp_path), TOKENS), expected)
    other = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    with pytest.raises(UnsupportedModelError, match="'llava' is not supported"):
        graph.build(other)


def test_attention_scale_of_62_layers_is_made_up_for(tmp_path: Path) -> None:
    """llama.cpp takes such a Gemma for the 27B one and scales by hidden size over heads."""
    kinds = ["sliding_attention"] * 62
    folder = builders.tiny_family(tmp_path / "hf", "gemma3", num_hidden_layers=62, layer_types=kinds)
    model, source, after, family = pruned(folder, {})
    export(tmp_path / "a.gguf", source, after, family)
    for layer in model.model.layers:
        layer.mlp.act_fn = builders.HalfGelu()
    difference = np.abs(logits(model, TOKENS[:20]) - runtime_logits(tmp_path / "a.gguf", TOKENS[:20]))
    assert np.median(difference.max(axis=1)) <= 5e-3  # 62 layers of rounding; 1.25 with the scale as it is
    again = GgufSource(tmp_path / "a.gguf")
    assert again.config["query_pre_attn_scalar"] == 16 and len(again.config["layer_types"]) == 62


def test_layers_of_smollm3_leave_only_by_its_rule(folders: Callable[[str], Path]) -> None:
    source, found = opened(folders("smollm3"))
    family = graph.find_family("smollm3")
    gone: Kept = {"layers.1.kv": (), "layers.1.ffn": ()}
    dims = graph.prune_dims(found, gone)
    with pytest.raises(UnsupportedModelError, match="layer 3 would become layer 2, whose rotary embedding"):
        exporter.tensor_table(family, dims, source.config)


@pytest.mark.parametrize(
    ("name", "over", "context"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("phi3", {"sliding_window": 64}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 512),
        ("gemma3", {"sliding_window": 64}, 512),
    ],
)
def test_context_ends_with_a_window_that_the_runtime_ignores(
    name: str, over: dict[str, Any], context: int
) -> None:
    assert graph.build(builders.family_config(name, **over)).dims.max_context == context


@pytest.mark.parametrize(
    ("name", "over", "message"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is not covered"),
        ("gemma3", {"hidden_activation": "silu"}, "activation 'silu' is not gelu_pytorch_tanh"),
        ("gemma3", {"layer_types": ["full_attention"]}, "'layer_types' must name 4 layers"),
        ("qwen3", {"attention_bias": True}, "Qwen3 with 'attention_bias'"),
        ("smollm3", {"no_rope_layers": [1]}, "'no_rope_layers' must list 4 layers"),
        ("phi3", {"hidden_act": "gelu"}, "activation 'gelu' is not silu"),
    ],
)
def test_what_a_family_does_not_cover(name: str, over: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        graph.build(builders.family_config(name, **over))
