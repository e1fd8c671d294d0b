"""Forward statistics against the whole model, and scoring layer after layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import calibration, checkpoint, graph, registry, surgery
from edgeprune.errors import ConfigError
from edgeprune.metrics.base import Metric, Need, is_sequential
from edgeprune.records import Axis, ModelGraph
from tests import builders

N, T = 4, 11
FORWARD = frozenset(need for need in Need if not need.gradient)


def windows() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 96, (N, T))


def opened(folder: Path) -> tuple[checkpoint.SafetensorsSource, ModelGraph]:
    source = checkpoint.SafetensorsSource(folder)
    return source, graph.build(source.config)


def seen_inputs(folder: Path) -> dict[str, np.ndarray]:
    """Input of every matrix [tokens, in] and, as '<layer>.out', the layers' outputs; float64."""
    model = checkpoint.load_model(folder).double()
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: seen.update({name: args[0].flatten(0, 1).numpy()})

    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if name.endswith(("_proj", "post_attention_layernorm")):
                module.register_forward_hook(keep(f"{index}.{name.rpartition('.')[2]}"))
        layer.register_forward_hook(
            lambda m, args, out, i=index: seen.update({f"{i}.out": out.flatten(0, 1).numpy()})
        )
    with torch.no_grad():
        model(torch.from_numpy(windows()), use_cache=False)
    return seen


def close(got: np.ndarray, want: Any) -> None:
    want = np.asarray(want)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_statistics_are_those_of_the_whole_model(tmp_path: Path) -> None:
    folder = builders.tiny_llama(tmp_path, bias=True)
    source, model_graph = opened(folder)
    got = calibration.collect(source, model_graph, windows(), FORWARD, batch_tokens=2 * T)
    seen = seen_inputs(folder)
    for i in range(3):
        u, h = seen[f"{i}.o_proj"], seen[f"{i}.down_proj"]
        y = seen[f"{i}.post_attention_layernorm"]
        o = source.tensor(f"model.layers.{i}.self_attn.o_proj.weight").double().numpy()
        stat = {need: got[f"layers.{i}.{need.value}"] for need in FORWARD}
        close(stat[Need.O_IN_SQUARES], (u**2).mean(axis=0))
        close(stat[Need.O_IN_MEAN], u.mean(axis=0))
        close(stat[Need.O_IN_VARIANCE], u.var(axis=0))
        close(stat[Need.DOWN_IN_SQUARES], (h**2).mean(axis=0))
        close(stat[Need.DOWN_IN_MEAN], h.mean(axis=0))
        close(stat[Need.DOWN_IN_VARIANCE], h.var(axis=0))
        close(stat[Need.DOWN_IN_ABS], np.abs(h).mean(axis=0))
        size = (y**2).mean(axis=1, keepdims=True) + 1e-5
        close(stat[Need.DOWN_IN_RELATIVE], (h**2 / size).mean(axis=0))
        close(stat[Need.ATTN_IN_SQUARES], (seen[f"{i}.q_proj"] ** 2).mean(axis=0))
        close(stat[Need.FFN_IN_SQUARES], (seen[f"{i}.gate_proj"] ** 2).mean(axis=0))
        close(stat[Need.OUT_SQUARES], [(seen[f"{i}.out"] ** 2).sum(axis=1).mean()])
        close(stat[Need.INV_RMS], [(1 / np.sqrt((y**2).mean(axis=1) + 1e-5)).mean()])
        groups = u.reshape(-1, 2, 32)
        close(stat[Need.HEAD_GRAM], np.einsum("tki,tkj->kij", groups, groups) / len(u))
        deltas = np.einsum("tki,dki->ktd", groups, o.reshape(-1, 2, 32))
        close(stat[Need.HEAD_DELTA_ABS], np.abs(deltas).mean(axis=1))


def test_variance_alone_returns_nothing_else(tmp_path: Path) -> None:
    source, model_graph = opened(builders.tiny_llama(tmp_path))
    got = calibration.collect(source, model_graph, windows(), frozenset((Need.DOWN_IN_VARIANCE,)))
    assert set(got) == {f"layers.{i}.down_in_variance" for i in range(3)}


def test_batches_do_not_show(tmp_path: Path) -> None:
    source, model_graph = opened(builders.tiny_llama(tmp_path))
    whole = calibration.collect(source, model_graph, windows(), FORWARD, batch_tokens=10_000)
    for name, value in calibration.collect(source, model_graph, windows(), FORWARD, batch_tokens=1).items():
        close(value, whole[name])


def half(axis: Axis, scores: np.ndarray) -> list[int]:
    return [int(i) for i in np.argsort(-scores, kind="stable")[: axis.n_units // 2]]


@pytest.mark.parametrize(("name", "given"), [("wanda-sp", {}), ("llm-bip", {"sequential": "yes"})])
def test_each_layer_sees_the_pruned_layers_before_it(
    tmp_path: Path, name: str, given: dict[str, str]
) -> None:
    source, model_graph = opened(builders.tiny_llama(tmp_path, bias=True))
    metric: Metric = registry.load("metrics", name, "METRIC")
    options = metric.resolve(given)
    assert is_sequential(options)
    also = frozenset((Need.ATTN_IN_SQUARES,))
    found = calibration.score_sequential(
        metric, options, source, model_graph, windows(), half, seed=0, also=also
    )
    assert {a: len(k) for a, k in found.kept.items()} == {a.name: a.n_units // 2 for a in model_graph.axes}
    needs = metric.needs(options) | also
    for layer in range(3):
        # the model whose earlier layers are cut, this one and later ones whole
        before = {a.name: found.kept[a.name] for a in model_graph.axes if a.layer < layer}
        cut = surgery.PrunedSource(source, model_graph, before)
        cut_graph = graph.graph_of(graph.find_family("llama"), graph.prune_dims(model_graph, before))
        arrays = calibration.collect(cut, cut_graph, windows(), needs)
        scores = calibration.score(metric, options, cut, cut_graph, arrays, seed=0)
        for axis in (f"layers.{layer}.kv", f"layers.{layer}.ffn"):
            close(found.scores[axis], scores[axis])
        key = f"layers.{layer}.attn_in_squares"
        close(found.arrays[key], arrays[key])


def test_cutting_nothing_is_the_plain_pass(tmp_path: Path) -> None:
    source, model_graph = opened(builders.tiny_llama(tmp_path))
    metric: Metric = registry.load("metrics", "wanda-sp", "METRIC")
    found = calibration.score_sequential(
        metric, metric.resolve({}), source, model_graph, windows(), lambda a, s: range(a.n_units), seed=0
    )
    plain = calibration.collect(source, model_graph, windows(), metric.needs({}))
    assert found.kept == {} and set(found.arrays) == set(plain)
    assert all(np.array_equal(found.arrays[name], plain[name]) for name in plain)


def test_refusals(tmp_path: Path) -> None:
    source, model_graph = opened(builders.tiny_llama(tmp_path))
    with pytest.raises(ConfigError, match="needs gradients"):
        calibration.collect(source, model_graph, windows(), frozenset((Need.SAMPLE_VECTOR,)))
    metric: Metric = registry.load("metrics", "taylor-vector", "METRIC")
    with pytest.raises(ConfigError, match="taylor-vector needs gradients, so it cannot score layer after"):
        calibration.score_sequential(metric, {}, source, model_graph, windows(), half, seed=0)
