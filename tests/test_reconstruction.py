"""Compensation by least squares: nothing to do at ratio 0, exact where it can be, best where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune import checkpoint, graph, reconstruction, surgery
from edgeprune.errors import ConfigError
from edgeprune.records import Axis, TensorSlice
from tests import builders

FAMILY = graph.find_family("llama")


def windows(n: int = 16, tokens: int = 24, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, (n, tokens))


def problem(rows: int = 60, n: int = 10, out: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, n, generator=rng, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    x = torch.randn(rows, n, generator=rng, dtype=torch.float64) @ mixed
    return x, torch.randn(n, out, generator=rng, dtype=torch.float64)


def test_nothing_removed_changes_nothing() -> None:
    x, weight = problem()
    kept = torch.arange(10)
    assert torch.equal(reconstruction.solve(x.T @ x, weight, kept, 0.1), weight)


def test_a_column_that_others_make_up_is_given_back_exactly() -> None:
    x, weight = problem()
    x[:, 3] = 2 * x[:, 0] - 0.5 * x[:, 7]
    kept = torch.tensor([i for i in range(10) if i != 3])
    new = reconstruction.solve(x.T @ x, weight, kept, 0.0)
    assert torch.allclose(x[:, kept] @ new, x @ weight, atol=1e-9)
    # and it says how: twice the removed row on column 0, minus half of it on column 7
    assert torch.allclose(new[0], weight[0] + 2 * weight[3], atol=1e-9)
    assert torch.allclose(new[6], weight[7] - 0.5 * weight[3], atol=1e-9)


def test_kept_inputs_that_depend_on_each_other() -> None:
    x, weight = problem()
    x[:, 1] = x[:, 2]
    x[:, 3] = 3 * x[:, 1]
    kept = torch.tensor([i for i in range(10) if i != 3])
    new = reconstruction.solve(x.T @ x, weight, kept, 0.0)
    assert torch.allclose(x[:, kept] @ new, x @ weight, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.05, 1.0])
def test_the_gradient_is_zero_at_the_solution(ridge: float) -> None:
    x, weight = problem()
    kept = torch.tensor([0, 2, 5, 6, 9])
    gram = x.T @ x
    new = reconstruction.solve(gram, weight, kept, ridge).requires_grad_()
    strength = ridge * gram.diagonal()[kept].mean()
    loss = (x[:, kept] @ new - x @ weight).square().sum() + strength * (new - weight[kept]).square().sum()
    loss.backward()
    assert new.grad is not None
    assert float(new.grad.abs().max()) < 1e-8 * float(gram.abs().max())


def test_a_huge_ridge_leaves_the_weight_alone() -> None:
    x, weight = problem()
    kept = torch.tensor([0, 1, 2])
    assert torch.allclose(reconstruction.solve(x.T @ x, weight, kept, 1e12), weight[kept], atol=1e-9)


def test_error_is_what_the_output_changes() -> None:
    x, weight = problem()
    kept = torch.tensor([0, 2, 5])
    new = torch.randn(3, 6, dtype=torch.float64)
    expected = float((x[:, kept] @ new - x @ weight).square().sum())
    assert reconstruction.error(x.T @ x, weight, kept, new) == pytest.approx(expected, rel=1e-10)


def test_held_out_windows_choose_the_ridge() -> None:
    kept = torch.arange(8)
    # as many rows as columns: a fit without ridge follows the noise
    few, weight = problem(rows=9, seed=1)
    more, _ = problem(rows=4000, seed=1)
    ridges = (1e-6, 1e-3, 0.1, 1.0)
    fit, held = few.T @ few, more.T @ more
    of = reconstruction.Moments
    chosen = reconstruction.best_ridge(of(fit), of(held), weight, kept, ridges)
    errors = {
        r: reconstruction.error(held, weight, kept, reconstruction.solve(fit, weight, kept, r))
        for r in ridges
    }
    assert errors[chosen] == min(errors.values())
    assert chosen > 1e-6
    # enough text: the held-out part finds that less ridge is needed than that
    assert reconstruction.best_ridge(of(held), of(held), weight, kept, ridges) == 1e-6
    nothing = torch.zeros(10, 10, dtype=torch.float64)
    assert reconstruction.best_ridge(of(fit), of(nothing), weight, kept, ridges) == 0.1


def test_what_the_stream_lacks_is_part_of_the_target() -> None:
    x, weight = problem()
    kept = torch.tensor([0, 2, 5, 6, 9])
    lack = torch.randn(60, 6, dtype=torch.float64)
    pull = x.T @ lack
    new = reconstruction.solve(x.T @ x, weight, kept, 0.0, pull)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight + lack).solution
    assert torch.allclose(new, expected, atol=1e-9)
    distance = float((x[:, kept] @ new - x @ weight - lack).square().sum() - lack.square().sum())
    assert reconstruction.error(x.T @ x, weight, kept, new, pull) == pytest.approx(distance, rel=1e-9)


def axis_of(n: int, block: int, groups: int = 1) -> Axis:
    slices = (TensorSlice(tensor="w", dim=1, offset=0, block=block),)
    return Axis(name="a", unit="ffn", layer=0, n_units=n, unit_params=1, slices=slices, groups=groups)


@pytest.mark.parametrize("block", [1, 2])
def test_the_unit_whose_loss_is_least_goes(block: int) -> None:
    x, weight = problem(n=12, seed=3)
    gram, axis = x.T @ x, axis_of(12 // block, block)
    ridge = 1e-9
    losses = {}
    for unit in range(axis.n_units):
        kept = torch.tensor([c for c in range(12) if c // block != unit])
        losses[unit] = reconstruction.error(
            gram, weight, kept, reconstruction.solve(gram, weight, kept, ridge)
        )
    left = reconstruction.by_loss({"a": axis.n_units - 1}, ridge)(axis, gram, weight)
    assert set(range(axis.n_units)) - set(left) == {min(losses, key=losses.__getitem__)}


def test_a_channel_that_others_make_up_goes_before_a_smaller_one() -> None:
    x, weight = problem(seed=4)
    x[:, 3] = 2 * x[:, 0] - 0.5 * x[:, 7]
    x[:, 5] *= 0.1
    left = reconstruction.by_loss({"a": 9}, 1e-6)(axis_of(10, 1), x.T @ x, weight)
    assert len(left) == 9 and set(range(10)) - set(left) <= {0, 3, 7}


def test_every_group_keeps_as_many() -> None:
    x, weight = problem(n=12, seed=6)
    left = reconstruction.by_loss({"a": 6}, 0.03)(axis_of(12, 1, groups=3), x.T @ x, weight)
    assert [sum(u // 4 == g for u in left) for g in range(3)] == [2, 2, 2]


# ---------------------------------------------------------------- on models


KEPT = {
    "layers.0.ffn": tuple(range(0, 128, 2)),
    "layers.1.kv": (1,),
    "layers.1.ffn": tuple(range(32, 128)),
    "layers.2.ffn": tuple(range(5, 69)),
}


def opened(folder: Path, **over: object) -> tuple[checkpoint.SafetensorsSource, graph.ModelGraph]:
    source = checkpoint.SafetensorsSource(builders.tiny_llama(folder, **over))  # type: ignore[arg-type]
    return source, graph.build(source.config)


def logits(source: checkpoint.Source, dims: object, tokens: np.ndarray) -> torch.Tensor:
    model = checkpoint.assemble(source, dims)  # type: ignore[arg-type]
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits


def test_ratio_zero_is_the_identity(tmp_path: Path) -> None:
    source, dense = opened(tmp_path / "m")
    everything = {a.name: tuple(range(a.n_units)) for a in dense.axes}
    made = reconstruction.rebuild(
        source, dense, windows(), list(everything), reconstruction.as_planned(everything), tmp_path / "new"
    )
    assert made.kept == {}
    again = reconstruction.RebuiltSource(source, made.folder)
    for name in dense.shapes:
        assert torch.equal(again.tensor(name), source.tensor(name)), name


def by_hand(
    folder: Path, dense: graph.ModelGraph, tokens: np.ndarray, ridge: float, drift: float
) -> dict[str, torch.Tensor]:
    """The same, the plain way: the whole model in memory, one hook after the other."""
    model, parent = checkpoint.load_model(folder), checkpoint.load_model(folder)
    found = {}
    for axis in sorted(dense.axes, key=lambda a: (a.layer, a.unit != "kv")):
        if axis.name not in KEPT:
            continue
        path = FAMILY.tensor("o" if axis.unit == "kv" else "down", axis.layer, "")[:-1]
        norm = FAMILY.tensor("attn_norm" if axis.unit == "kv" else "ffn_norm", axis.layer, "")[:-1]
        seen = {}
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(lambda m, a, s=seen: s.update(x=a[0])),
            model.get_submodule(norm).register_forward_pre_hook(lambda m, a, s=seen: s.update(y=a[0])),
        ]
        with torch.no_grad():
            model(torch.from_numpy(tokens), use_cache=False)
        for hook in hooks:
            hook.remove()
        goal = {}
        behind = parent.get_submodule(FAMILY.tensor("ffn_norm", axis.layer, "")[:-1])
        hooks = [
            behind.register_forward_pre_hook(lambda m, a, s=goal: s.update(kv=a[0])),
            parent.model.layers[axis.layer].register_forward_hook(
                lambda m, a, out, s=goal: s.update(ffn=out[0] if isinstance(out, tuple) else out)
            ),
        ]
        with torch.no_grad():
            parent(torch.from_numpy(tokens), use_cache=False)
        for hook in hooks:
            hook.remove()
        x = (seen["x"] / seen["y"].square().mean(-1, keepdim=True).sqrt()).flatten(0, 1).double()
        weight = model.get_submodule(path).weight.detach().double()
        block = weight.shape[1] // axis.n_units
        kept = [u * block + i for u in KEPT[axis.name] for i in range(block)]
        xs = x[:, kept]
        gram = xs.T @ xs
        strength = ridge * gram.diagonal().mean()
        residual = x @ weight.T - xs @ weight[:, kept].T
        scale = seen["y"].square().mean(-1, keepdim=True).sqrt()
        lack = (goal[axis.unit] - seen["y"]) / scale - (x @ weight.T).view(seen["y"].shape)
        residual = residual + drift * lack.flatten(0, 1).double()
        change = torch.linalg.inv(gram + strength * torch.eye(len(kept))) @ (xs.T @ residual)
        new = torch.zeros_like(weight)
        new[:, kept] = weight[:, kept] + change.T
        model.get_submodule(path).weight.data = new.float()
        found[f"{path}.weight"] = new[:, kept].float()
    return found


@pytest.mark.parametrize(
    ("batch_tokens", "drift"), [(24, 0.5), (100, 0.5), (10_000, 0.5), (100, 0.0), (100, 1.0)]
)
def test_streamed_equals_in_memory(tmp_path: Path, batch_tokens: int, drift: float) -> None:
    source, dense = opened(tmp_path / "m")
    made = reconstruction.rebuild(
        source, dense, windows(), list(KEPT), reconstruction.as_planned(KEPT), tmp_path / "new",
        ridges=(0.02,), batch_tokens=batch_tokens, drift=drift,
    )  # fmt: skip
    assert made.kept == KEPT
    expected = by_hand(tmp_path / "m", dense, windows(), 0.02, drift)
    again = reconstruction.RebuiltSource(surgery.PrunedSource(source, dense, KEPT), made.folder)
    assert len(expected) == len(KEPT)
    for name, weight in expected.items():
        assert again.tensor(name).shape == weight.shape
        assert torch.allclose(again.tensor(name), weight, atol=2e-4), name


def test_it_brings_the_model_closer_to_the_dense_one(tmp_path: Path) -> None:
    source, dense = opened(tmp_path / "m")
    pruned = surgery.PrunedSource(source, dense, KEPT)
    dims = graph.prune_dims(dense, KEPT)
    made = reconstruction.rebuild(
        source, dense, windows(64), list(KEPT), reconstruction.as_planned(KEPT), tmp_path / "new"
    )
    fresh = windows(8, seed=99)
    whole = logits(source, dense.dims, fresh)
    plain = logits(pruned, dims, fresh)
    better = logits(reconstruction.RebuiltSource(pruned, made.folder), dims, fresh)
    assert (better - whole).square().mean() < 0.9 * (plain - whole).square().mean()
    assert set(made.ridges) == set(KEPT) and set(made.ridges.values()) <= set(reconstruction.RIDGES)


def test_saved_and_loaded(tmp_path: Path) -> None:
    source, dense = opened(tmp_path / "m")
    made = reconstruction.rebuild(
        source, dense, windows(), list(KEPT), reconstruction.as_planned(KEPT), tmp_path / "new"
    )
    dims = graph.prune_dims(dense, KEPT)
    again = reconstruction.RebuiltSource(surgery.PrunedSource(source, dense, KEPT), made.folder)
    surgery.save(tmp_path / "out", again, graph.graph_of(FAMILY, dims).shapes)
    loaded = checkpoint.load_model(tmp_path / "out")
    with torch.no_grad():
        found = loaded(torch.from_numpy(windows(2)), use_cache=False).logits
    assert torch.allclose(found, logits(again, dims, windows(2)), atol=1e-5)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    source, dense = opened(tmp_path / "m")
    for half in (False, True):
        reconstruction.rebuild(
            source, dense, windows(64), list(KEPT), reconstruction.as_planned(KEPT), tmp_path / str(half),
            ridges=(0.1,), half=half,
        )  # fmt: skip
    pruned = surgery.PrunedSource(source, dense, KEPT)
    a, b = (reconstruction.RebuiltSource(pruned, tmp_path / str(h)) for h in (False, True))
    for name in ("model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        plain = (a.tensor(name) - pruned.tensor(name)).norm()
        assert (a.tensor(name) - b.tensor(name)).norm() < 0.1 * plain


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    source, dense = opened(tmp_path / "m")

    class Huge:
        config, fingerprint = source.config, source.fingerprint

        def tensor(self, name: str) -> torch.Tensor:
            return source.tensor(name) * (1e38 if "up_proj" in name else 1)

        def close(self) -> None:
            source.close()

    with pytest.raises(ConfigError, match="activations of layer 0 are not finite"):
        reconstruction.rebuild(
            Huge(), dense, windows(), list(KEPT), reconstruction.as_planned(KEPT), tmp_path / "new"
        )
