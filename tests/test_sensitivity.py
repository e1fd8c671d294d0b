"""Curves are the KL of models that were really cut; one pass gives what separate models give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune import checkpoint, graph, reconstruction, sensitivity, surgery
from edgeprune.allocators.base import best_units
from tests import builders

TOKENS = np.random.default_rng(3).integers(0, 96, (8, 20))
JUDGED = 3


def probe(folder: Path, *, compensated: bool, **over: object) -> sensitivity.Probe:
    source = checkpoint.SafetensorsSource(builders.tiny_llama(folder / "m", **over))  # type: ignore[arg-type]
    dense = graph.build(source.config)
    rng = np.random.default_rng(0)
    return sensitivity.Probe(
        source=source,
        graph=dense,
        windows=TOKENS,
        n_judged=JUDGED,
        scores={a.name: rng.random(a.n_units) for a in dense.axes},
        folder=folder / "moments",
        compensated=compensated,
        batch_tokens=40,
    )


def all_widths(found: sensitivity.Probe) -> dict[str, list[int]]:
    return {a.name: [1] if a.unit == "kv" else [0, 32, 96] for a in found.graph.axes}


def logp(source: checkpoint.Source, dims: object) -> torch.Tensor:
    model = checkpoint.assemble(source, dims)  # type: ignore[arg-type]
    with torch.no_grad():
        return torch.log_softmax(model(torch.from_numpy(TOKENS[:JUDGED]), use_cache=False).logits, dim=-1)


def kl_of(found: sensitivity.Probe, kept: dict[str, tuple[int, ...]], weights: Path | None = None) -> float:
    pruned: checkpoint.Source = surgery.PrunedSource(found.source, found.graph, kept)
    if weights is not None:
        pruned = reconstruction.RebuiltSource(pruned, weights)
    p, q = logp(found.source, found.graph.dims), logp(pruned, graph.prune_dims(found.graph, kept))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_curves_are_the_kl_of_cut_models(tmp_path: Path, tied: bool) -> None:
    found = probe(tmp_path, compensated=False, tied=tied)
    widths = all_widths(found)
    curves = found.curves(found.graph.axes, widths)
    assert set(curves) == set(widths)
    for axis in found.graph.axes:
        assert [w for w, _ in curves[axis.name]] == widths[axis.name]
        for width, damage in curves[axis.name]:
            kept = {axis.name: best_units(found.scores[axis.name], width)}
            assert damage == pytest.approx(kl_of(found, kept), rel=1e-3, abs=1e-6)


def test_compensated_curves_too(tmp_path: Path) -> None:
    found = probe(tmp_path, compensated=True)
    curves = found.curves(found.graph.axes, all_widths(found))
    for axis in (found.graph.axes[1], found.graph.axes[2]):
        for width, damage in curves[axis.name]:
            if width == 0:
                continue  # nothing is left to solve
            kept = {axis.name: best_units(found.scores[axis.name], width)}
            made = reconstruction.rebuild(
                found.source, found.graph, TOKENS, list(kept), reconstruction.as_planned(kept),
                tmp_path / f"{axis.name}-{width}", ridges=(sensitivity.RIDGE,),
            )  # fmt: skip
            assert damage == pytest.approx(kl_of(found, kept, made.folder), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("compensated", [False, True])
def test_measure_agrees_with_the_curves_and_with_cut_models(tmp_path: Path, compensated: bool) -> None:
    found = probe(tmp_path, compensated=compensated)
    curves = found.curves(found.graph.axes, all_widths(found))
    dense = {a.name: a.n_units for a in found.graph.axes}
    assert found.measure(dense) == pytest.approx(0.0, abs=1e-6)
    for name in ("layers.0.ffn", "layers.1.kv", "layers.2.ffn"):
        width, damage = curves[name][-1]
        assert found.measure({**dense, name: width}) == pytest.approx(damage, rel=1e-3, abs=1e-6)
    if not compensated:
        several = {"layers.0.ffn": 64, "layers.1.kv": 1, "layers.2.ffn": 16}
        kept = {n: best_units(found.scores[n], w) for n, w in several.items()}
        assert found.measure({**dense, **several}) == pytest.approx(kl_of(found, kept), rel=1e-3)


def test_which_widths_are_measured() -> None:
    assert sensitivity.probe_widths([1, 2, 3], 3, "kv") == [1, 2]
    assert sensitivity.probe_widths([0, 1, 2, 3], 3, "kv") == [0, 1, 2]
    assert sensitivity.probe_widths(list(range(1, 9)), 8, "kv") == [6, 7]
    legal = list(range(32, 1537, 32))
    assert sensitivity.probe_widths(legal, 1536, "ffn") == [608, 1152]
    assert sensitivity.probe_widths([0, *legal], 1536, "ffn") == [0, 608, 1152]
    assert sensitivity.probe_widths([64, 128], 128, "ffn") == [64]
    assert sensitivity.probe_widths([128], 128, "ffn") == []
