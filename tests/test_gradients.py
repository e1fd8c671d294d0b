"""Streamed gradient statistics against plain autograd on the whole model, and the identities they obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import checkpoint, gradients, graph
from edgeprune.errors import ConfigError
from edgeprune.metrics.base import COLUMN_ROLES, GRADIENT_NEEDS, ROLES, Need
from tests import builders

N, T = 3, 17
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "tied": {"tied": True},
    "bias": {"bias": True, "mlp_bias": True},
}


def windows(vocab: int = 96, n: int = N, length: int = T) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab, (n, length))


def open_model(folder: Path) -> tuple[checkpoint.SafetensorsSource, Any]:
    source = checkpoint.SafetensorsSource(folder)
    return source, graph.build(source.config)


def oracle(folder: Path, ids: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per-sample weight gradients [N, out, in] and the weights, by autograd on the whole model in float64."""
    model = checkpoint.load_model(folder).double()
    names = {name: p for name, p in model.named_parameters() if "proj" in name and name.endswith("weight")}
    for p in names.values():
        p.requires_grad_()
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for sample in torch.from_numpy(ids):
        logits = model(sample[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sample[1:])
        for name, gradient in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
            rows[name].append(gradient.numpy())
    return {k: np.stack(v) for k, v in rows.items()}, {k: p.detach().numpy() for k, p in names.items()}


def expected(gradient: np.ndarray, weight: np.ndarray, role: str) -> dict[Need, np.ndarray]:
    over = 0 if role in COLUMN_ROLES else 1
    product = gradient * weight
    return {
        Need.SAMPLE_VECTOR: product.sum(axis=over + 1),
        Need.SAMPLE_ELEMENT_ABS: np.abs(product).sum(axis=over + 1),
        Need.MEAN_ELEMENT_ABS: np.abs(product.mean(axis=0)).sum(axis=over),
        Need.ELEMENT_SECOND: (weight**2 * (gradient**2).mean(axis=0)).sum(axis=over),
        Need.ELEMENT_MIX_SUM: np.abs(product.mean(axis=0) - 0.5 * (T - 1) * (product**2).mean(axis=0)).sum(
            axis=over
        ),
        Need.ELEMENT_MIX: np.abs(product.mean(axis=0) - 0.5 * (product**2).mean(axis=0)).sum(axis=over),
    }


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


WEIGHT_NEEDS = GRADIENT_NEEDS - {Need.MASK_TRIALS, Need.MASK_LOSS, Need.N_TARGETS}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_statistics_equal_plain_autograd(tmp_path: Path, kind: str) -> None:
    folder = builders.tiny_llama(tmp_path, **KINDS[kind])
    source, model_graph = open_model(folder)
    got = gradients.collect(source, model_graph, windows(), WEIGHT_NEEDS, batch_tokens=2 * T)
    grads, weights = oracle(folder, windows())
    family = graph.find_family("llama")
    seen = 0
    for layer in range(len(model_graph.dims.layers)):
        for role in (r for roles in ROLES.values() for r in roles):
            name = family.tensor(role, layer)
            for need, want in expected(grads[name], weights[name], role).items():
                assert_close(got[f"layers.{layer}.{need.value}.{role}"], want)
                seen += 1
    assert seen == len(got) == 3 * 7 * 6


def test_one_need_alone_takes_the_short_way_to_the_same_numbers(tmp_path: Path) -> None:
    source, model_graph = open_model(builders.tiny_llama(tmp_path))
    together = gradients.collect(source, model_graph, windows(), WEIGHT_NEEDS)
    for need in sorted(WEIGHT_NEEDS, key=lambda n: n.value):
        alone = gradients.collect(source, model_graph, windows(), frozenset((need,)))
        assert len(alone) == 3 * 7
        for name, value in alone.items():
            assert_close(value, together[name])


def test_batches_and_spilled_activations_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model_graph = open_model(builders.tiny_llama(tmp_path))
    whole = gradients.collect(source, model_graph, windows(), WEIGHT_NEEDS, batch_tokens=10_000)
    again = gradients.collect(source, model_graph, windows(), WEIGHT_NEEDS, batch_tokens=10_000)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    monkeypatch.setattr(gradients, "MOST_KEPT_BYTES", 0)
    monkeypatch.setattr(gradients, "MOST_REUSED_BYTES", 0)
    split = gradients.collect(source, model_graph, windows(), WEIGHT_NEEDS, batch_tokens=1)
    for name, value in whole.items():
        assert_close(split[name], value)


def test_layers_without_attention_or_ffn(tmp_path: Path) -> None:
    folder = builders.uneven_llama(tmp_path, [(4, 2, 128), (0, 0, 96), (2, 1, 0), (4, 2, 64)])
    source, model_graph = open_model(folder)
    got = gradients.collect(source, model_graph, windows(), WEIGHT_NEEDS)
    grads, weights = oracle(folder, windows())
    family = graph.find_family("llama")
    assert len(got) == (7 + 3 + 4 + 7) * 6
    for key, value in got.items():
        _, layer, need, role = key.split(".")
        name = family.tensor(role, int(layer))
        assert_close(value, expected(grads[name], weights[name], role)[Need(need)])


@pytest.mark.parametrize("kind", ["gqa", "mha", "one kv head", "tied"])
def test_identities_of_bias_free_layers(tmp_path: Path, kind: str) -> None:
    source, model_graph = open_model(builders.tiny_llama(tmp_path, **KINDS[kind]))
    got = gradients.collect(source, model_graph, windows(), frozenset((Need.SAMPLE_VECTOR,)))
    for layer, shape in enumerate(model_graph.dims.layers):
        v = {
            role: got[f"layers.{layer}.sample_vector.{role}"].astype(np.float64)
            for roles in ROLES.values()
            for role in roles
        }
        n_kv, dh = shape.n_kv_heads, model_graph.dims.head_dim
        scale = 1e-5 * np.abs(v["down"]).max()
        assert np.abs(v["up"] - v["down"]).max() <= scale  # sum G_u W_u = sum G_d W_d per channel
        o = v["o"].reshape(N, n_kv, -1, dh).sum(axis=2)  # over the group's query heads
        assert np.abs(v["v"].reshape(N, n_kv, dh) - o).max() <= 1e-5 * np.abs(o).max()
        q = v["q"].reshape(N, n_kv, -1).sum(axis=-1)
        k = v["k"].reshape(N, n_kv, -1).sum(axis=-1)
        assert np.abs(q - k).max() <= 1e-5 * np.abs(v["q"]).max() * dh  # RoPE does not break it


def test_masked_losses_are_those_of_the_model_without_the_units(tmp_path: Path) -> None:
    folder = builders.tiny_llama(tmp_path)
    source, model_graph = open_model(folder)
    got = gradients.collect(
        source, model_graph, windows(), frozenset((Need.MASK_TRIALS, Need.MASK_LOSS)), seed=3
    )
    masks = got["layers.1.mask_trials.ffn"]
    assert masks.shape == (gradients.MASK_TRIALS, 128) and set(np.unique(masks)) == {0.0, 1.0}
    assert masks.sum(axis=1).max() <= 0.3 * 128 + 1
    assert got["layers.0.mask_trials.kv"].shape == (gradients.MASK_TRIALS, 2)

    def loss(trial: int | None) -> float:
        model = checkpoint.load_model(folder)
        for layer, block in enumerate(model.model.layers):
            if trial is not None:
                ffn = got[f"layers.{layer}.mask_trials.ffn"][trial] > 0
                kv = np.repeat(got[f"layers.{layer}.mask_trials.kv"][trial], 32) > 0
                block.mlp.down_proj.weight[:, torch.from_numpy(ffn)] = 0
                block.self_attn.o_proj.weight[:, torch.from_numpy(kv)] = 0
        ids = torch.from_numpy(windows())
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    for trial in (0, 7):
        assert got["layers.2.mask_loss"][trial] == pytest.approx(loss(trial) - loss(None), abs=2e-6)


def test_number_of_predicted_tokens(tmp_path: Path) -> None:
    source, model_graph = open_model(builders.tiny_llama(tmp_path))
    got = gradients.collect(source, model_graph, windows(), frozenset((Need.N_TARGETS,)))
    assert got == {f"layers.{i}.n_targets": np.array([T - 1]) for i in range(3)}


def test_refusals(tmp_path: Path) -> None:
    source, model_graph = open_model(builders.tiny_llama(tmp_path))
    with pytest.raises(ConfigError, match="down_in_abs: collected by the forward calibration"):
        gradients.collect(source, model_graph, windows(), frozenset((Need.DOWN_IN_ABS,)))
    with pytest.raises(ConfigError, match="at least two tokens"):
        gradients.collect(source, model_graph, windows(length=1), frozenset((Need.SAMPLE_VECTOR,)))
