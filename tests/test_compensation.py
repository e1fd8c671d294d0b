"""Biases for removed columns: exact on average, loadable, refused where there is no place for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune import calibration, checkpoint, compensation, graph, surgery
from edgeprune.errors import ConfigError, UnsupportedModelError
from tests import builders

FAMILY = graph.find_family("llama")


def windows() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 96, (4, 11))


def test_hand_worked() -> None:
    weight = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mean = np.array([0.5, -1.0, 2.0])
    assert compensation.bias(weight, mean, [1]).tolist() == [1 * 0.5 + 3 * 2, 4 * 0.5 + 6 * 2]
    assert compensation.bias(weight, mean, [0, 1, 2]).tolist() == [0, 0]


def test_the_mean_output_is_preserved() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(6, 10)), rng.normal(1.0, 2.0, size=(50, 10))
    kept = [0, 3, 4, 8]
    lost = compensation.bias(weight, x.mean(axis=0), kept)
    after = x[:, kept] @ weight[:, kept].T + lost
    assert np.abs(after.mean(axis=0) - (x @ weight.T).mean(axis=0)).max() < 1e-12


@pytest.mark.parametrize("had_bias", [False, True])
def test_applied_to_a_model(tmp_path: Path, had_bias: bool) -> None:
    folder = builders.tiny_llama(tmp_path / "dense", bias=had_bias, mlp_bias=had_bias)
    source = checkpoint.SafetensorsSource(folder)
    dense = graph.build(source.config)
    arrays = calibration.collect(source, dense, windows(), compensation.NEEDS)
    # only the last layer's FFN and the first layer's attention: nothing before them moves
    kept = {"layers.2.ffn": tuple(range(0, 128, 2)), "layers.0.kv": (1,)}
    dims = graph.prune_dims(dense, kept)
    new = compensation.biases(source, dense, kept, arrays)
    assert set(new) == {
        "model.layers.2.mlp.down_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
    }
    pruned = surgery.PrunedSource(source, dense, kept)
    compensated = compensation.CompensatedSource(pruned, dims, new)
    after = graph.graph_of(FAMILY, compensation.compensated_dims(dims))
    surgery.save(tmp_path / "pruned", compensated, after.shapes)
    loaded = checkpoint.load_model(tmp_path / "pruned")

    def mean_output(model: torch.nn.Module, path: str) -> np.ndarray:
        seen = []
        hook = model.get_submodule(path).register_forward_hook(
            lambda module, args, out: seen.append(out.flatten(0, 1).double().mean(dim=0).numpy())
        )
        with torch.no_grad():
            model(torch.from_numpy(windows()), use_cache=False)
        hook.remove()
        return seen[0]

    whole = checkpoint.load_model(folder)
    path = "model.layers.0.self_attn.o_proj"
    assert mean_output(loaded, path) == pytest.approx(mean_output(whole, path), abs=1e-5)
    # on its own, since the cut attention changes what reaches the last layer
    kept = {"layers.2.ffn": kept["layers.2.ffn"]}
    dims = graph.prune_dims(dense, kept)
    new = compensation.biases(source, dense, kept, arrays)
    compensated = compensation.CompensatedSource(surgery.PrunedSource(source, dense, kept), dims, new)
    after = graph.graph_of(FAMILY, compensation.compensated_dims(dims))
    surgery.save(tmp_path / "ffn", compensated, after.shapes)
    path = "model.layers.2.mlp.down_proj"
    loaded = checkpoint.load_model(tmp_path / "ffn")
    assert mean_output(loaded, path) == pytest.approx(mean_output(whole, path), abs=1e-5)


def test_refusals(tmp_path: Path) -> None:
    source = checkpoint.SafetensorsSource(builders.tiny_llama(tmp_path))
    dense = graph.build(source.config)
    with pytest.raises(ConfigError, match="needs the calibration statistic o_in_mean"):
        compensation.biases(source, dense, {"layers.0.kv": (0,)}, {})
    with pytest.raises(UnsupportedModelError, match="family gemma3 has no place for biases"):
        compensation.compensated_dims(dataclasses.replace(dense.dims, family="gemma3"))
