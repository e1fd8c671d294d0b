"""Single query heads as units: as many leave every KV group, and nothing else changes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from builders import FAMILIES, family_config, logits, tiny_family, tiny_llama, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import edgeprune
from edgeprune import calibration, checkpoint, graph, planner, registry, surgery
from edgeprune.allocators.base import PlanSpace, best_units
from edgeprune.exporters import gguf
from edgeprune.metrics.base import Metric
from edgeprune.pipeline import light
from edgeprune.records import ModelGraph, UnitRule
from edgeprune.search import SearchSpace

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 96, 40)]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
# four of eight heads in one layer, two in another, other ones in each of its groups
KEPT = {"layers.0.q": (0, 2, 5, 7), "layers.2.q": (3, 4), "layers.1.ffn": tuple(range(0, 128, 2))}
ALL_LAYERS = {f"layers.{i}.q": (i % 4, 4 + (i + 1) % 4) for i in range(4)}


def opened(folder: Path) -> tuple[checkpoint.SafetensorsSource, ModelGraph]:
    source = checkpoint.SafetensorsSource(folder)
    return source, graph.with_query_heads(graph.build(source.config))


def space_of(built: ModelGraph, scores: dict[str, np.ndarray], **over: Any) -> PlanSpace:
    values: dict[str, Any] = {
        "graph": built,
        "scores": scores,
        "poolable": True,
        "constraints": light.hand_constraints(32),
        "metric": "none",
    }
    return PlanSpace(**(values | over))


def scores_of(built: ModelGraph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {axis.name: rng.random(axis.n_units) for axis in built.axes}


def cut(folder: Path, kept: dict[str, tuple[int, ...]], out: Path) -> ModelGraph:
    source, built = opened(folder)
    space = space_of(built, scores_of(built))
    widths = {a.name: len(kept.get(a.name, range(a.n_units))) for a in built.axes}
    made = planner.make_plan(space, "uniform", 0.0, widths, kept=kept)
    surgery.prune(source, built, made, out, extras=folder)
    return built


# ---------------------------------------------------------------- off by default


def test_nothing_changes_unless_asked() -> None:
    config = family_config("llama", **HEADS)
    plain = graph.build(config)
    assert {axis.unit for axis in plain.axes} == {"kv", "ffn"} and all(a.groups == 1 for a in plain.axes)
    with_heads = graph.with_query_heads(plain)
    assert [a.name for a in with_heads.axes if a.layer == 0] == ["layers.0.q", "layers.0.ffn"]
    assert with_heads.key != plain.key and with_heads.dims == plain.dims
    assert graph.like(plain, ["layers.0.kv", "layers.3.ffn"]) is plain
    assert graph.like(plain, ["layers.0.q"]) == with_heads


def test_an_axis_by_hand() -> None:
    axis = graph.with_query_heads(graph.build(family_config("qwen2", **HEADS))).axes[0]
    assert (axis.n_units, axis.groups) == (8, 2)
    assert axis.unit_params == 2 * 16 * 64 + 16  # rows of q, columns of o, bias of q
    assert [(s.tensor.split(".", 3)[3], s.dim, s.block) for s in axis.slices] == [
        ("self_attn.q_proj.weight", 0, 16),
        ("self_attn.o_proj.weight", 1, 16),
        ("self_attn.q_proj.bias", 0, 16),
    ]


def test_groups_of_one_head_stay_the_unit() -> None:
    built = graph.build(family_config("llama", num_key_value_heads=4))
    assert graph.with_query_heads(built).axes == built.axes


# ---------------------------------------------------------------- surgery


@pytest.mark.parametrize("name", FAMILIES)
def test_zeroing_is_removing(tmp_path: Path, name: str) -> None:
    folder = tiny_family(tmp_path / "dense", name, **HEADS)
    built = cut(folder, KEPT, tmp_path / "out")
    model = edgeprune.load(folder)
    with torch.no_grad():
        for axis_name, kept in KEPT.items():
            layer = model.model.layers[int(axis_name.split(".")[1])]
            if axis_name.endswith("ffn"):
                layer.mlp.down_proj.weight[:, sorted(set(range(128)) - set(kept))] = 0
                continue
            for head in set(range(8)) - set(kept):
                layer.self_attn.o_proj.weight[:, head * 16 : (head + 1) * 16] = 0
    expected, dense = logits(model, TOKENS), logits(edgeprune.load(folder), TOKENS)
    found = logits(edgeprune.load(tmp_path / "out"), TOKENS)
    assert np.abs(expected - dense).max() > 0.01
    assert np.abs(expected - found).max() < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [row[:2] for row in config["edgeprune_layers"]] == [[4, 2], [8, 2], [2, 2], [8, 2]]
    assert built.dims.layers[0].n_heads == 8


def test_all_heads_kept_is_the_identity(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "dense", heads=8, kv_heads=2, bias=True)
    cut(folder, {}, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(before) == set(after) and all(torch.equal(t, after[n]) for n, t in before.items())


# ---------------------------------------------------------------- planning


def test_best_units_of_every_group_by_hand() -> None:
    scores = np.array([1.0, 9, 8, 2, 0, 3, 3, 3])
    assert best_units(scores, 4) == (1, 2, 5, 6)
    assert best_units(scores, 4, groups=2) == (1, 2, 5, 6)
    assert best_units(scores, 2, groups=2) == (1, 5)
    assert best_units(scores, 8, groups=2) == tuple(range(8))
    assert best_units(np.array([9.0, 8, 1, 0]), 2, groups=2) == (0, 2)
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        best_units(scores, 3, groups=2)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.data())
def test_kept_sets_are_even_and_nested(groups: int, each: int, seed: int, data: Any) -> None:
    scores = np.random.default_rng(seed).integers(0, 5, groups * each)
    fewer = data.draw(st.integers(0, each)) * groups
    more = data.draw(st.integers(fewer // groups, each)) * groups
    small, large = best_units(scores, fewer, groups), best_units(scores, more, groups)
    assert set(small) <= set(large) and list(large) == sorted(large)
    assert {sum(u // each == g for u in large) for g in range(groups)} == {more // groups}


def test_legal_widths() -> None:
    built = graph.with_query_heads(graph.build(family_config("llama", **HEADS)))
    axis = built.axes[0]
    space = space_of(built, scores_of(built))
    assert space.legal_widths(axis) == [2, 4, 6, 8] and space.floor(axis) == 2
    rule = UnitRule(uniform_across_layers=False, multiple_of=4, min_keep=4, fixed=False)
    rules = dataclasses.replace(space.constraints, q=rule)
    assert dataclasses.replace(space, constraints=rules).legal_widths(axis) == [4, 8]
    blocks = dataclasses.replace(space, blocks=True)
    assert blocks.legal_widths(axis) == [2, 4, 6, 8]  # attention stays


@pytest.mark.parametrize("allocator", ["uniform", "inner", "global"])
def test_ladders_are_nested_and_even(allocator: str) -> None:
    built = graph.with_query_heads(graph.build(family_config("llama", **HEADS)))
    space = space_of(built, scores_of(built))
    field = SearchSpace(
        plans={32: space},
        allocators=(allocator,),
        quantizations=("Q8_0",),
        price=lambda *_: pytest.fail("a ladder needs no prices"),
        rows=lambda *_: (),
        caches=1,
    )
    made = [field.make(rung) for rung in (field.dense, *field.ladder(allocator, 32))]
    assert len(made) >= 4 and made[0].kept == {}
    assert any(name.endswith(".q") for name in made[-1].kept)
    for weak, strong in itertools.pairwise(made):
        for axis in built.axes:
            inside = set(strong.kept.get(axis.name, range(axis.n_units)))
            assert inside <= set(weak.kept.get(axis.name, range(axis.n_units)))
    for plan in made:
        for shape in plan.dims.layers:
            assert shape.n_kv_heads == 2 and shape.n_heads % 2 == 0
        for name, kept in plan.kept.items():
            if name.endswith(".q"):
                assert sum(u < 4 for u in kept) == sum(u >= 4 for u in kept) > 0
        after = graph.graph_of(graph.find_family("llama"), plan.dims)
        lost = sum(
            (a.n_units - len(plan.kept.get(a.name, range(a.n_units)))) * a.unit_params for a in built.axes
        )
        assert built.decoder_params - after.decoder_params == lost


def test_exports_say_how_many_heads_load() -> None:
    def rule(name: str, quantization: str = "F16", **over: Any) -> UnitRule:
        config = family_config(name, **(HEADS | over))
        family = graph.find_family(config["model_type"])
        found = gguf.constraints(family, family.read_dims(config), quantization).q
        assert found is not None
        return found

    assert rule("llama") == UnitRule(uniform_across_layers=False, multiple_of=2, min_keep=2, fixed=False)
    assert rule("llama", head_dim=32).multiple_of == 1  # a head fills a block
    assert rule("llama", "Q4_K_M", hidden_size=256).multiple_of in (8, 16, 1)
    assert rule("gemma3").uniform_across_layers and not rule("gemma3").fixed
    assert rule("phi3").fixed
    # one KV head has no group to lose, but query heads
    assert not rule("gemma3", num_key_value_heads=1).fixed
    assert not rule("qwen3").uniform_across_layers and rule("qwen3 untied").uniform_across_layers


# ---------------------------------------------------------------- scores

METRICS = [
    *((f, {"form": f}) for f in ("A", "B", "C")),
    *((name, {}) for name in ("wanda-sp", "flap", "magnitude", "saap", "adaptive-fusion")),
    *((name, {}) for name in ("taylor-vector", "taylor-element1", "taylor-element2", "taylor-mix")),
]


def scored(folder: Path, name: str, switches: dict[str, str], *, heads: bool = True) -> dict[str, np.ndarray]:
    from edgeprune import gradients

    metric: Metric = registry.load("metrics", "llm-bip" if len(name) == 1 else name, "METRIC")
    options = metric.resolve(switches)
    options |= {"sequential": "no"} if "sequential" in options else {}
    source, built = opened(folder)
    built = built if heads else graph.build(source.config)
    windows = np.random.default_rng(1).integers(3, 96, (4, 24)).astype(np.int32)
    needs = metric.needs(options)
    backward = frozenset(n for n in needs if n.gradient)
    arrays = calibration.collect(source, built, windows, needs - backward)
    if backward:
        arrays |= gradients.collect(source, built, windows, backward, seed=0)
    return calibration.score(metric, options, source, built, arrays, seed=0)


def permuted(folder: Path, out: Path, order: list[int]) -> Path:
    """The same function with the query heads of layer 1 in another order inside their groups."""
    tensors = load_file(folder / "model.safetensors")
    at = "model.layers.1.self_attn."
    rows = np.concatenate([np.arange(h * 16, (h + 1) * 16) for h in order])
    tensors[at + "q_proj.weight"] = tensors[at + "q_proj.weight"][rows].contiguous()
    tensors[at + "o_proj.weight"] = tensors[at + "o_proj.weight"][:, rows].contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


@pytest.mark.parametrize(("name", "switches"), METRICS, ids=[n for n, _ in METRICS])
def test_scores_follow_the_heads(tmp_path: Path, name: str, switches: dict[str, str]) -> None:
    folder = tiny_family(tmp_path / "a", "llama", **HEADS)
    order = [2, 0, 3, 1, 5, 4, 7, 6]
    other = permuted(folder, tmp_path / "b", order)
    before, after = scored(folder, name, switches), scored(other, name, switches)
    assert before["layers.1.q"].shape == (8,) and np.ptp(before["layers.1.q"]) > 0
    for axis, values in before.items():
        expected = values[order] if axis == "layers.1.q" else values
        np.testing.assert_allclose(after[axis], expected, rtol=2e-3, atol=1e-6 * np.abs(values).max())
    # channels are scored as they are without query heads
    plain = scored(folder, name, switches, heads=False)
    if name not in ("saap", "adaptive-fusion"):  # they divide by means over all units
        np.testing.assert_allclose(before["layers.1.ffn"], plain["layers.1.ffn"], rtol=1e-5)


def test_scores_by_hand(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "a", "llama", **HEADS)
    tensors = load_file(folder / "model.safetensors")
    q = tensors["model.layers.0.self_attn.q_proj.weight"].numpy().reshape(8, 16, 64)
    o = tensors["model.layers.0.self_attn.o_proj.weight"].numpy().reshape(64, 8, 16)
    expected = np.sqrt(np.square(q).sum(axis=(1, 2)) + np.square(o).sum(axis=(0, 2)))
    np.testing.assert_allclose(scored(folder, "magnitude", {})["layers.0.q"], expected, rtol=1e-5)
    # what is a sum over columns of o is, summed over a group's heads, the group's
    heads, groups = scored(folder, "wanda-sp", {}), scored(folder, "wanda-sp", {}, heads=False)
    np.testing.assert_allclose(
        heads["layers.2.q"].reshape(2, 4).sum(axis=1), groups["layers.2.kv"], rtol=1e-5
    )


def test_form_c_is_the_change_of_the_block(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "a", heads=8, kv_heads=2, hidden=64, layers=1, head_dim=16)
    found = scored(folder, "C", {"form": "C"})["layers.0.q"]
    windows = torch.from_numpy(np.random.default_rng(1).integers(3, 96, (4, 24)))

    def block(head: int | None) -> np.ndarray:
        model = edgeprune.load(folder)
        with torch.no_grad():
            if head is not None:
                model.model.layers[0].self_attn.o_proj.weight[:, head * 16 : (head + 1) * 16] = 0
            model.model.norm = torch.nn.Identity()
            return model.model(windows).last_hidden_state.numpy().astype(np.float64)

    dense = block(None)
    size = np.sqrt(np.square(dense).sum(axis=-1).mean())
    expected = [np.sqrt(np.square(block(h) - dense).sum(axis=-1).mean()) / size for h in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


# ---------------------------------------------------------------- the verbs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in whose groups every second query head does what the one before it does."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama(folder, vocab=300, heads=8, kv_heads=2, hidden=128, ff=256, layers=3)
    tiny_tokenizer(folder, 300)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        q = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].reshape(8, 16, 128)
        q[1::2] = q[0::2]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["fox", "dog", "lazy", "quick", "brown", "jumps", "over", "again"]
    rng = np.random.default_rng(0)
    path.write_text(" ".join(words[i] for i in rng.integers(0, 8, 6000)))
    return path


@pytest.mark.parametrize("compensation", ["none", "ridge"])
def test_prune(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path, compensation: str
) -> None:
    ran = run_cli(
        *(
            "prune",
            model,
            "--ratio",
            "0.4",
            "--query-heads",
            "--allocator",
            "uniform",
            "--metric",
            "wanda-sp",
        ),
        *("--width-multiple", "128", "--calibration", text, "--samples", "4", "--length", "64"),
        *("--compensation", compensation, "--compensation-samples", "4", "--out", tmp_path / "out"),
        *("--format", "json"),
    )
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    plan = json.loads((tmp_path / "out" / "edgeprune_plan.json").read_text())
    n_heads = said["layers"][0][0]
    assert n_heads in (4, 6) and said["layers"] == [[n_heads, 2, 128]] * 3
    assert set(plan["kept"]) == {f"layers.{i}.{unit}" for i in range(3) for unit in ("q", "ffn")}
    loaded = edgeprune.load(tmp_path / "out")
    assert loaded.config.num_attention_heads == n_heads
    weight = loaded.model.layers[2].self_attn.o_proj.weight
    assert weight.shape == (128, 16 * n_heads)
    # the saved plan cuts the same
    again = run_cli(
        *("prune", model, "--plan", tmp_path / "out" / "edgeprune_plan.json", "--out", tmp_path / "again")
    )
    assert again.code == 0, again.err
    kept = plan["kept"]["layers.2.q"]
    dense = load_file(model / "model.safetensors")["model.layers.2.self_attn.o_proj.weight"]
    columns = dense.reshape(128, 8, 16)[:, kept].reshape(128, -1)
    once_more = edgeprune.load(tmp_path / "again").model.layers[2].self_attn.o_proj.weight
    assert torch.equal(once_more, columns)
    assert torch.equal(weight, columns) == (compensation == "none")


def test_ridge_gives_a_twin_its_sisters_work(model: Path, tmp_path: Path) -> None:
    """Where a head that leaves computes what one that stays computes, nothing is lost."""
    from edgeprune import reconstruction

    source, built = opened(model)
    kept = {f"layers.{i}.q": (0, 2, 4, 6) for i in range(3)}
    windows = np.random.default_rng(2).integers(3, 300, (16, 32)).astype(np.int32)
    made = reconstruction.rebuild(
        *(source, built, windows, list(kept), reconstruction.as_planned(kept), tmp_path / "new"),
        ridges=(1e-7,),
    )
    assert made.kept == kept
    rebuilt = reconstruction.RebuiltSource(surgery.PrunedSource(source, built, kept), made.folder)
    dims = graph.prune_dims(built, kept)
    held_out = np.random.default_rng(3).integers(3, 300, (1, 32)).astype(np.int32)
    dense = calibration.forward(source, built.dims, held_out)
    plain = calibration.forward(surgery.PrunedSource(source, built, kept), dims, held_out)
    found = calibration.forward(rebuilt, dims, held_out)
    assert np.abs(plain - dense).max() > 0.1 and np.abs(found - dense).max() < 1e-2


def test_importance_matrix_follows() -> None:
    built = graph.with_query_heads(graph.build(family_config("llama", **HEADS)))
    arrays = {"layers.0.o_in_squares": np.arange(128, dtype=np.float32)}
    found = calibration.imatrix(arrays, built, {"layers.0.q": (1, 6)})["layers.0.o_in"]
    assert found.tolist() == [*range(16, 32), *range(96, 112)]


@pytest.mark.parametrize(
    ("name", "kept", "arch"),
    [
        ("llama", KEPT, "deci"),
        ("llama", ALL_LAYERS, "llama"),
        ("qwen2", ALL_LAYERS, "deci"),
        ("qwen3", KEPT, "openelm"),
        ("gemma3", ALL_LAYERS, "gemma3"),
        ("smollm3", ALL_LAYERS, "smollm3"),
    ],
)
def test_gguf(
    run_cli: Callable[..., Any], tmp_path: Path, name: str, kept: dict[str, tuple[int, ...]], arch: str
) -> None:
    pytest.importorskip("llama_cpp")
    from edgeprune.costs.gguf_header import read_header

    folder = tiny_family(tmp_path / "dense", name, vocab_size=300, **HEADS)
    tiny_tokenizer(folder, 300)
    cut(folder, kept, tmp_path / "out")
    ran = run_cli("export", tmp_path / "out", "--quantization", "F32", "--out", tmp_path / "x.gguf")
    assert ran.code == 0, ran.err  # logits against torch, bytes against the prediction
    values = read_header(tmp_path / "x.gguf").values()
    heads = values[f"{arch}.attention.head_count"]
    expected = [4, 8, 2, 8] if kept is KEPT else 2
    assert (list(heads) if isinstance(heads, tuple) else heads) == expected
    assert values[f"{arch}.attention.head_count_kv"] == 2


def test_onnx(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = tiny_family(tmp_path / "dense", "llama", vocab_size=300, **HEADS)
    tiny_tokenizer(folder, 300)
    cut(folder, KEPT, tmp_path / "out")
    ran = run_cli(
        *("export", tmp_path / "out", "--format", "onnx", "--quantization", "fp32"),
        *("--out", tmp_path / "onnx"),
    )
    assert ran.code == 0, ran.err


def test_score_then_plan(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    scores, out = tmp_path / "s.safetensors", tmp_path / "plan.json"
    ran = run_cli("score", model, "--metric", "magnitude", "--query-heads", "--out", scores)
    assert ran.code == 0, ran.err
    ran = run_cli(
        *("plan", model, "--scores", scores, "--ratio", "0.5", "--width-multiple", "32", "--out", out)
    )
    assert ran.code == 0, ran.err
    plan = json.loads(out.read_text())
    assert {name.split(".")[2] for name in plan["kept"]} == {"q", "ffn"}
    assert all(layer["n_kv_heads"] == 2 and layer["n_heads"] < 8 for layer in plan["dims"]["layers"])


def test_refusals(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    mha = tiny_llama(tmp_path / "mha", vocab=300, heads=4, kv_heads=4)
    tiny_tokenizer(mha, 300)
    ran = run_cli("prune", mha, "--ratio", "0.2", "--query-heads", "--out", tmp_path / "x")
    assert ran.code == 2 and "one query head for each KV head" in ran.err
    ran = run_cli(
        *("prune", model, "--ratio", "0.2", "--query-heads", "--out", tmp_path / "x"),
        *("--metric", "adaptive-fusion", "--metric-option", "fusion=learned"),
    )
    assert ran.code == 2 and "fitted to masked KV groups" in ran.err


def test_an_uneven_plan_is_refused(model: Path, tmp_path: Path) -> None:
    from edgeprune.errors import ConfigError
    from edgeprune.records import dumps

    source, built = opened(model)
    space = space_of(built, scores_of(built))
    widths = {a.name: 4 if a.unit == "q" else a.n_units for a in built.axes}
    plan = planner.make_plan(space, "uniform", 0.0, widths)
    path = tmp_path / "plan.json"
    path.write_text(dumps(plan))
    plain = graph.build(source.config)
    assert light.load_plan(path, plain) == plan
    odd = dataclasses.replace(plan, kept=plan.kept | {"layers.0.q": (0, 1, 2, 4)})
    path.write_text(dumps(odd))
    with pytest.raises(ConfigError, match=r"'layers\.0\.q' does not list units"):
        light.load_plan(path, plain)
