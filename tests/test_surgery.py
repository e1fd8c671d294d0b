"""Zero = remove, identity, and what is saved is what was planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from builders import logits, tiny_llama, uneven_llama
from safetensors.torch import load_file

import edgeprune
from edgeprune import calibration, checkpoint, gradients, graph, planner, surgery
from edgeprune.families.base import LAYER_LIST_KEY
from edgeprune.metrics.base import Need
from edgeprune.pipeline.light import hand_constraints
from edgeprune.records import PrunePlan, loads

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 96, 40)]

MODELS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "gqa": {"kv_heads": 2},
    "gqa of three": {"hidden": 96, "heads": 6, "kv_heads": 2},
    "biases": {"bias": True, "mlp_bias": True},
    "head size of its own": {"head_dim": 32},
    "tied": {"tied": True},
}
# some units of every layer, other ones in each
KEPT = {
    "layers.0.ffn": tuple(range(0, 128, 2)),
    "layers.1.ffn": tuple(range(5, 100)),
    "layers.0.kv": (1,),
    "layers.2.kv": (0,),
}


def plan_of(built: Any, kept: dict[str, tuple[int, ...]]) -> PrunePlan:
    """A plan that keeps exactly these units."""
    after = graph.prune_dims(built, kept)
    return PrunePlan(
        id="by-hand",
        metric="none",
        allocator="none",
        requested_ratio=0.0,
        ratio=0.0,
        ratio_all=0.0,
        uniform=len(set(after.layers)) == 1,
        kept=kept,
        dims=after,
        binding=None,
        key="k",
    )


def open_model(folder: Path) -> tuple[checkpoint.SafetensorsSource, Any]:
    source = checkpoint.SafetensorsSource(folder)
    return source, graph.build(source.config)


def zeroed(folder: Path, built: Any, kept: dict[str, tuple[int, ...]]) -> Any:
    """The dense model whose removed units add nothing: their columns of o_proj and down_proj are zero."""
    model = edgeprune.load(folder)
    head = built.dims.head_dim
    with torch.no_grad():
        for name, units in kept.items():
            layer = model.model.layers[int(name.split(".")[1])]
            shape = built.dims.layers[int(name.split(".")[1])]
            if name.endswith("ffn"):
                gone = sorted(set(range(shape.n_ff)) - set(units))
                layer.mlp.down_proj.weight[:, gone] = 0
            else:
                width = shape.n_heads // shape.n_kv_heads * head
                for k in set(range(shape.n_kv_heads)) - set(units):
                    layer.self_attn.o_proj.weight[:, k * width : (k + 1) * width] = 0
    return model


@pytest.mark.parametrize("axis", [*KEPT, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_zeroing_is_removing(tmp_path: Path, name: str, axis: str) -> None:
    folder = tiny_llama(tmp_path / "dense", **MODELS[name])
    source, built = open_model(folder)
    kept = KEPT if axis == "all" else {axis: KEPT[axis]}
    surgery.prune(source, built, plan_of(built, kept), tmp_path / "out", extras=folder)
    expected = logits(zeroed(folder, built, kept), TOKENS)
    found = logits(edgeprune.load(tmp_path / "out"), TOKENS)
    assert np.abs(expected - logits(edgeprune.load(folder), TOKENS)).max() > 0.1  # it matters what is cut
    assert np.abs(expected - found).max() < 1e-4


def test_ratio_zero_is_the_identity(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dense", bias=True)
    source, built = open_model(folder)
    surgery.prune(source, built, plan_of(built, {}), tmp_path / "out", extras=folder)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    old = json.loads((folder / "config.json").read_text())
    assert {k: config[k] for k in old} == old


class Counting(checkpoint.SafetensorsSource):
    """Counts how often its shards are let go."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


def test_shards_are_let_go_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "dense")
    source = Counting(folder)
    built = graph.build(source.config)
    pruned = surgery.PrunedSource(source, built, KEPT)
    after = graph.graph_of(graph.find_family("llama"), graph.prune_dims(built, KEPT))
    windows = np.asarray([TOKENS])
    calibration.collect(pruned, after, windows, frozenset((Need.DOWN_IN_SQUARES,)))
    assert source.closed == 3  # once per layer
    source.closed = 0
    gradients.collect(pruned, after, windows, frozenset((Need.SAMPLE_VECTOR,)))
    assert source.closed == 7  # forward, the loss, backward
    source.closed = 0
    monkeypatch.setattr(surgery, "_SHARD_BYTES", 40_000)
    surgery.save(tmp_path / "out", pruned, after.shapes)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert source.closed == len(shards) > 3
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(saved) == set(after.shapes)
    assert all(torch.equal(tensor, pruned.tensor(name)) for name, tensor in saved.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_of_the_parent_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "f32")
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "half")
    source, built = open_model(tmp_path / "half")
    surgery.prune(source, built, plan_of(built, KEPT), tmp_path / "out", extras=None)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {dtype}
    gate = source.tensor("model.layers.0.mlp.gate_proj.weight")
    assert torch.equal(after["model.layers.0.mlp.gate_proj.weight"], gate[::2])


def test_every_layer_keeps_its_own_width(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dense")
    source, built = open_model(folder)
    plan = plan_of(built, KEPT)
    surgery.prune(source, built, plan, tmp_path / "out", extras=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[LAYER_LIST_KEY] == [[2, 1, 64], [4, 2, 95], [2, 1, 128]]
    model = edgeprune.load(tmp_path / "out")
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [64, 95, 128]
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [16, 32, 16]
    assert loads(PrunePlan, (tmp_path / "out" / "edgeprune_plan.json").read_text()) == plan


def test_cutting_again_cuts_the_rest(tmp_path: Path) -> None:
    folder = uneven_llama(tmp_path / "uneven", [(4, 2, 128), (2, 1, 96), (4, 2, 64)])
    source, built = open_model(folder)
    kept = {"layers.0.kv": (1,), "layers.2.ffn": tuple(range(32))}
    surgery.prune(source, built, plan_of(built, kept), tmp_path / "out", extras=None)
    expected = logits(zeroed(folder, built, kept), TOKENS)
    assert np.abs(expected - logits(edgeprune.load(tmp_path / "out"), TOKENS)).max() < 1e-4


def test_a_saved_model_reloads_to_the_same_logits(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dense")
    source, built = open_model(folder)
    plan = plan_of(built, KEPT)
    surgery.prune(source, built, plan, tmp_path / "out", extras=None)
    in_memory = surgery.PrunedSource(source, built, plan.kept)
    from edgeprune import calibration

    expected = calibration.forward(in_memory, plan.dims, np.array([TOKENS]))[0]
    assert np.abs(expected - logits(edgeprune.load(tmp_path / "out"), TOKENS)).max() < 1e-4


def test_a_uniform_cut_loads_with_stock_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "dense", bias=True)
    source, built = open_model(folder)
    rng = np.random.default_rng(1)
    scores = {a.name: rng.random(a.n_units) for a in built.axes}
    space = planner.PlanSpace(
        graph=built, scores=scores, poolable=True, constraints=hand_constraints(8), metric="none"
    )
    plan = planner.plan_ratio(space, "uniform", 0.4)
    surgery.prune(source, built, plan, tmp_path / "out", extras=None)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = logits(edgeprune.load(tmp_path / "out"), TOKENS)
    assert np.abs(expected - logits(stock.float().eval(), TOKENS)).max() < 1e-5


def test_large_models_are_saved_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "dense")
    source, built = open_model(folder)
    plan = plan_of(built, KEPT)
    surgery.prune(source, built, plan, tmp_path / "one", extras=None)
    monkeypatch.setattr(surgery, "_SHARD_BYTES", 100_000)
    surgery.prune(source, built, plan, tmp_path / "many", extras=None)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {k: v for f in files for k, v in load_file(tmp_path / "many" / f).items()}
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert np.array_equal(
        logits(edgeprune.load(tmp_path / "one"), TOKENS), logits(edgeprune.load(tmp_path / "many"), TOKENS)
    )


def test_nothing_half_written_when_saving_fails(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dense")
    source, built = open_model(folder)

    class Failing(surgery.PrunedSource):
        def tensor(self, name: str) -> torch.Tensor:
            if name.startswith("model.layers.2"):
                raise OSError(28, "No space left on device")
            return super().tensor(name)

    with pytest.raises(OSError, match="No space left"):
        surgery.save(tmp_path / "out", Failing(source, built, {}), built.shapes)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dense")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_text("not ours")
    source, built = open_model(folder)
    surgery.prune(source, built, plan_of(built, {}), tmp_path / "out", extras=folder)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_head_counts_that_do_not_divide_the_hidden_size_load(tmp_path: Path) -> None:
    # 3 heads of 16 in a hidden size of 64: transformers refuses such a config on construction
    folder = tiny_llama(tmp_path, hidden=64, heads=4, kv_heads=4)
    source = checkpoint.SafetensorsSource(folder)
    model = graph.build(source.config)
    kept = {axis.name: (0, 2, 3) for axis in model.axes if axis.unit == "kv"}
    pruned = surgery.PrunedSource(source, model, kept)
    dims = graph.prune_dims(model, kept)
    surgery.save(tmp_path / "cut", pruned, graph.graph_of(graph.find_family("llama"), dims).shapes)
    whole = surgery.load(folder)
    for layer in whole.model.layers:
        layer.self_attn.o_proj.weight.data[:, 16:32] = 0
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        expected, found = whole(ids).logits, surgery.load(tmp_path / "cut")(ids).logits
    assert float((expected - found).abs().max()) < 1e-4
