"""Every metric on every family: scores follow a permutation, and what each family's layer changes counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import builders
import torch
from builders import FAMILIES

from edgeprune import calibration, checkpoint, gradients, graph, planner, registry
from edgeprune.errors import ConfigError
from edgeprune.exporters import gguf as exporter
from edgeprune.families.base import ACTIVATION_LIPSCHITZ
from edgeprune.metrics import llm_bip
from edgeprune.metrics.base import Metric, Need
from edgeprune.records import ModelGraph

NAMES = registry.names("metrics")
WINDOWS = np.random.default_rng(3).integers(3, 96, (3, 24))  # longer than the tiny Gemma's window


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            over = {"num_hidden_layers": 2, "intermediate_size": 24}
            if name == "gemma3":
                over["layer_types"] = ["sliding_attention", "full_attention"]
            made[name] = builders.tiny_family(tmp_path_factory.mktemp("family"), name, **over)
        return made[name]

    return folder


class Permuted:
    """A source whose units stand in another order: unit i is the dense model's unit order[i]."""

    def __init__(self, source: Any, model_graph: ModelGraph, orders: dict[str, np.ndarray]) -> None:
        self._source, self.config, self.fingerprint = source, source.config, "permuted"
        self._moves: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for axis in model_graph.axes:
            for part in axis.slices:
                rows = np.arange(axis.n_units * part.block).reshape(axis.n_units, part.block) + part.offset
                self._moves.setdefault(part.tensor, []).append(
                    (part.dim, rows.reshape(-1), rows[orders[axis.name]].reshape(-1))
                )

    def tensor(self, name: str) -> torch.Tensor:
        value = self._source.tensor(name).clone()
        for dim, to, of in self._moves.get(name, ()):
            value.index_copy_(
                dim, torch.from_numpy(to), value.index_select(dim, torch.from_numpy(of)).contiguous()
            )
        return value

    def close(self) -> None:
        self._source.close()


def opened(folder: Path) -> tuple[checkpoint.SafetensorsSource, ModelGraph]:
    source = checkpoint.SafetensorsSource(folder)
    return source, graph.build(source.config)


def collected(source: Any, model_graph: ModelGraph, needs: frozenset[Need]) -> dict[str, np.ndarray]:
    backward = frozenset(need for need in needs if need.gradient)
    arrays = gradients.collect(source, model_graph, WINDOWS, backward) if backward else {}
    if needs - backward:
        arrays |= calibration.collect(source, model_graph, WINDOWS, needs - backward)
    return arrays


def metric_of(name: str) -> Metric:
    found: Metric = registry.load("metrics", name, "METRIC")
    return found


def all_needs() -> frozenset[Need]:
    needs: frozenset[Need] = frozenset()
    for name in NAMES:
        metric = metric_of(name)
        needs |= metric.needs(metric.resolve({}))
    for form in "AC":
        needs |= llm_bip.needs(llm_bip.METRIC.resolve({"form": form}))
    return needs


@pytest.mark.parametrize("name", FAMILIES)
def test_permuting_units_permutes_the_scores(folders: Callable[[str], Path], name: str) -> None:
    source, model_graph = opened(folders(name))
    rng = np.random.default_rng(9)
    orders = {axis.name: rng.permutation(axis.n_units) for axis in model_graph.axes}
    orders["layers.0.kv"] = np.array([1, 0])
    permuted = Permuted(source, model_graph, orders)
    needs = all_needs()
    before, after = collected(source, model_graph, needs), collected(permuted, model_graph, needs)
    seen = set()
    for metric_name in NAMES:
        if metric_name == "random":  # drawn by position
            continue
        metric = metric_of(metric_name)
        for form in ("A", "B", "C") if metric_name == "llm-bip" else ("",):
            options = metric.resolve({"form": form} if form else {})
            plain = calibration.score(metric, options, source, model_graph, before, seed=0)
            moved = calibration.score(metric, options, permuted, model_graph, after, seed=0)
            for axis, order in orders.items():
                assert moved[axis] == pytest.approx(plain[axis][order], rel=5e-4, abs=1e-6), (
                    f"{metric_name} {form} {axis}"
                )
                if metric_name != "block-influence" and len(order) > 2:
                    assert np.ptp(plain[axis]) > 0, f"{metric_name} {axis}"
                seen.add((metric_name, axis))
    assert len(seen) == (len(NAMES) - 1) * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_statistics_are_those_of_the_stock_model(folders: Callable[[str], Path], name: str) -> None:
    """Layer by layer gives the logits of transformers, windows longer than a sliding window included."""
    from transformers import AutoModelForCausalLM

    source, model_graph = opened(folders(name))
    stock = AutoModelForCausalLM.from_pretrained(folders(name))
    with torch.no_grad():
        expected = stock(torch.from_numpy(WINDOWS), use_cache=False).logits.numpy()
    assert np.abs(calibration.forward(source, model_graph.dims, WINDOWS) - expected).max() <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_autograd(folders: Callable[[str], Path], name: str) -> None:
    source, model_graph = opened(folders(name))
    family = graph.find_family(model_graph.dims.family)
    arrays = gradients.collect(source, model_graph, WINDOWS, frozenset((Need.SAMPLE_VECTOR,)))
    model = checkpoint.assemble(source, model_graph.dims)
    for parameter in model.parameters():
        parameter.requires_grad_()
    ids = torch.from_numpy(WINDOWS[:1])
    model(ids, labels=ids, use_cache=False).loss.backward()
    named = dict(model.named_parameters())
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        part = family.part(model_graph.dims, role, 0)
        weight = named[part.tensor]
        product = (weight * weight.grad)[part.offset : part.offset + part.block]
        expected = product.sum(dim=0 if role in ("o", "down") else 1).detach().numpy()
        found = arrays[f"layers.0.sample_vector.{role}"][0]
        scale = np.abs(product.detach().numpy()).sum(axis=0 if role in ("o", "down") else 1)
        assert np.abs(found - expected).max() <= 1e-4 * max(scale.max(), 1e-3), role
        if role in ("q", "k") and family.qk_norm:
            # the norm takes the size of a head away: what sums over a head says nothing
            per_head = np.abs(expected.reshape(-1, model_graph.dims.head_dim).sum(axis=1))
            assert per_head.max() <= 1e-3 * scale.reshape(-1, model_graph.dims.head_dim).sum(axis=1).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_change_is_that_of_zeroing(folders: Callable[[str], Path], name: str) -> None:
    """Form C against the block run again without the group, norms behind attention and FFN included."""
    source, model_graph = opened(folders(name))
    dims = model_graph.dims
    found = calibration.collect(source, model_graph, WINDOWS, frozenset((Need.HEAD_EXACT,)))
    model = checkpoint.skeleton(source.config, dims)
    with torch.no_grad():
        stream = checkpoint.Stream(model, dims, WINDOWS.shape[1])
        x = stream.embed(source, torch.from_numpy(WINDOWS))
        with checkpoint.resident_layer(model, 0, source) as layer:
            out = stream.run(0, layer, x)
            o = layer.self_attn.o_proj
            width = o.weight.shape[1] // 2
            for group in (0, 1):
                kept = o.weight.clone()
                cut = kept.clone()
                cut[:, group * width : (group + 1) * width] = 0
                o.weight = torch.nn.Parameter(cut, requires_grad=False)
                change = (stream.run(0, layer, x) - out).square().sum().item()
                o.weight = torch.nn.Parameter(kept, requires_grad=False)
                expected = (change / WINDOWS.size) ** 0.5
                assert found["layers.0.head_exact"][group] == pytest.approx(expected, rel=1e-3)


def test_channel_score_of_a_block_with_norms_follows_the_exact_change(tmp_path: Path) -> None:
    """Gemma 3: columns of down count times the norm behind them."""
    source, model_graph = opened(builders.tiny_family(tmp_path, "gemma3", intermediate_size=192))
    dims = model_graph.dims
    metric = metric_of("llm-bip")
    options = metric.resolve({})
    arrays = calibration.collect(source, model_graph, WINDOWS, metric.needs(options))
    scores = calibration.score(metric, options, source, model_graph, arrays, seed=0)["layers.0.ffn"]
    model = checkpoint.skeleton(source.config, dims)
    changes = []
    with torch.no_grad():
        stream = checkpoint.Stream(model, dims, WINDOWS.shape[1])
        x = stream.embed(source, torch.from_numpy(WINDOWS))
        with checkpoint.resident_layer(model, 0, source) as layer:
            out = stream.run(0, layer, x)
            for channel in range(dims.layers[0].n_ff):
                kept = layer.mlp.down_proj.weight.clone()
                layer.mlp.down_proj.weight[:, channel] = 0
                changes.append((stream.run(0, layer, x) - out).norm().item())
                layer.mlp.down_proj.weight.copy_(kept)
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (scores, np.asarray(changes))]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.9


def test_activations_are_as_steep_as_they_say() -> None:
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    for name, bound in ACTIVATION_LIPSCHITZ.items():
        (slope,) = torch.autograd.grad(calibration._ACTIVATIONS[name](x).sum(), x)
        assert bound - 0.01 < float(slope.abs().max()) <= bound


def test_one_kv_head_leaves_ffn_only(tmp_path: Path) -> None:
    """Gemma 3 270M and 1B: there is no group to choose from."""
    source, model_graph = opened(builders.tiny_family(tmp_path, "gemma3", num_key_value_heads=1))
    dims = model_graph.dims
    rules = exporter.constraints(graph.find_family(dims.family), dims, "Q4_0")
    assert rules.kv.fixed and not rules.ffn.fixed and rules.ffn.uniform_across_layers
    assert "one KV head in every layer: FFN only" in rules.reasons
    metric = metric_of("magnitude")
    scores = calibration.score(metric, {}, source, model_graph, {}, seed=0)
    space = planner.PlanSpace(
        graph=model_graph, scores=scores, poolable=False, constraints=rules, metric="magnitude"
    )
    plan = planner.plan_ratio(space, "uniform", 0.3)
    assert plan.uniform and set(plan.kept) == {f"layers.{i}.ffn" for i in range(4)}
    with pytest.raises(ConfigError, match="protected layers keep widths of their own"):
        planner.plan_ratio(dataclasses.replace(space, protected=frozenset((0,))), "uniform", 0.3)
