"""Every metric: the plug-in contract, hand-worked values, and what must hold on tiny models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeprune import calibration, checkpoint, gradients, graph, planner, registry, surgery
from edgeprune.errors import ConfigError
from edgeprune.metrics import adaptive_fusion, base, block_influence, saap
from edgeprune.metrics.base import Metric, Need
from edgeprune.records import Constraints, LayerShape, ModelDims, ModelGraph, UnitRule
from tests import builders

NAMES = registry.names("metrics")
FFN_NORM = np.array([2.0, -1.0])


def metric_of(name: str) -> Metric:
    metric: Metric = registry.load("metrics", name, "METRIC")
    return metric


# ---------------------------------------------------------------- contract


def test_every_method_of_the_specification_is_there() -> None:
    assert set(NAMES) >= {
        "adaptive-fusion",
        "block-influence",
        "flap",
        "hywia",
        "llm-bip",
        "magnitude",
        "random",
        "saap",
        "taylor-element1",
        "taylor-element2",
        "taylor-mix",
        "taylor-vector",
        "wanda-sp",
    }


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    metric = metric_of(name)
    assert metric.name == name
    assert metric.summary and "\n" not in metric.summary and len(metric.summary) < 80
    assert metric.reference.startswith("arXiv:") or metric.reference == "baseline"
    for key, option in metric.options.items():
        assert key.islower() and option.default in option.choices and len(option.choices) > 1
        assert option.help and option.origin in ("paper", "told", "reconstructed")
        assert all(c in option.help for c in option.choices if not c[0].isdigit() and len(c) > 1)
    options = metric.resolve({})
    assert options == {key: option.default for key, option in metric.options.items()}
    assert isinstance(metric.poolable(options), bool)
    assert all(isinstance(need, Need) for need in metric.needs(options))
    doc = (Path(base.__file__).parent / f"{name.replace('-', '_')}.py").read_text().split('"""')[1]
    assert len(doc.splitlines()[0]) < 110
    if any(option.origin == "reconstructed" for option in metric.options.values()) and name != "hywia":
        assert "reconstructed specification" in " ".join(doc.split())


def test_unknown_switches_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no switch 'stabilty' \(did you mean 'stability'\?\)"):
        metric_of("saap").resolve({"stabilty": "none"})
    with pytest.raises(ConfigError, match="sigma=open is not one of closed, residual"):
        metric_of("saap").resolve({"sigma": "open"})


def test_hywia_is_adaptive_fusion() -> None:
    alias, metric = metric_of("hywia"), metric_of("adaptive-fusion")
    assert dataclasses.replace(alias, name=metric.name, summary=metric.summary) == metric


# ---------------------------------------------------------------- hand-worked values


@dataclass
class Sheet:
    """A layer on paper: d 2, two FFN channels, two KV groups of two query heads of size 1."""

    stats: Mapping[str, Any] = field(default_factory=dict)
    qk_norm: bool = False
    query_heads: bool = False
    layer: int = 0
    dims: ModelDims = field(
        default_factory=lambda: ModelDims(
            family="llama",
            vocab=8,
            hidden=2,
            head_dim=1,
            max_context=8,
            tied=True,
            qkv_bias=False,
            o_bias=False,
            mlp_bias=False,
            rms_eps=1e-5,
            layers=(LayerShape(n_heads=4, n_kv_heads=2, n_ff=2),),
        )
    )
    weights: Mapping[str, Any] = field(
        default_factory=lambda: {
            "gate": [[1, 2], [3, 4]],
            "up": [[0, 1], [1, 0]],
            "down": [[1, 0], [2, 3]],
            "q": [[1, 0], [0, 1], [2, 0], [0, 2]],
            "k": [[1, 1], [0, 3]],
            "v": [[2, 0], [1, 1]],
            "o": [[1, -1, 2, 0], [3, 1, 0, 2]],
            "ffn_norm": FFN_NORM,
        }
    )

    post_norms: bool = False
    gate_lipschitz: float = 1.1

    @property
    def shape(self) -> LayerShape:
        return self.dims.layers[self.layer]

    def weight(self, role: str) -> np.ndarray:
        return np.asarray(self.weights[role], dtype=np.float32)

    def stat(self, need: Need) -> np.ndarray:
        return np.asarray(self.stats[need.value], dtype=np.float32)

    def role_stat(self, need: Need, role: str) -> np.ndarray:
        return np.asarray(self.stats[f"{need.value}.{role}"], dtype=np.float32)

    def at(self, layer: int) -> Sheet:
        return self

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        return make()


def roles(need: Need, **values: Any) -> dict[str, Any]:
    return {f"{need.value}.{role}": value for role, value in values.items()}


VECTORS = roles(
    Need.SAMPLE_VECTOR,
    gate=[[1, -2], [3, 2]],
    up=[[-1, 1], [-1, 3]],
    down=[[0, -4], [2, 0]],
    q=[[1, -1, 2, 0]],
    k=[[1, -3]],
    v=[[0.5, 1]],
    o=[[1, 1, -1, 0]],
)
ELEMENTS = {"gate": [1, 2], "up": [3, 4], "down": [5, 6], "q": [1, 1, 2, 2], "k": [3, 4], "v": [5, 6]}
ELEMENTS |= {"o": [1, 0, 0, 1]}


def worth(name: str, unit: str, view: Sheet, **options: str) -> list[float]:
    metric = metric_of(name)
    return [float(v) for v in metric.score(view, unit, metric.resolve(options), 0)]


def test_magnitude() -> None:
    assert worth("magnitude", "ffn", Sheet()) == pytest.approx([11**0.5, 35**0.5])
    # q 2, k 2, v 4, o 12; q 8, k 9, v 2, o 8
    assert worth("magnitude", "kv", Sheet()) == pytest.approx([20**0.5, 27**0.5])


def test_random_depends_on_seed_and_place_only() -> None:
    metric = metric_of("random")
    first = metric.score(Sheet(), "ffn", {}, 1)
    assert np.array_equal(first, metric.score(Sheet(), "ffn", {}, 1))
    assert not np.array_equal(first, metric.score(Sheet(), "ffn", {}, 2))
    assert not np.array_equal(first, metric.score(Sheet(), "kv", {}, 1))


def test_wanda_sp() -> None:
    view = Sheet({"down_in_squares": [4, 16], "o_in_squares": [1, 4, 9, 16]})
    assert worth("wanda-sp", "ffn", view) == [1.5 * 2, 1.5 * 4]
    assert worth("wanda-sp", "kv", view) == [2 * 1 + 1 * 2, 1 * 3 + 1 * 4]


def test_flap() -> None:
    view = Sheet({"down_in_variance": [2, 1], "o_in_variance": [1, 2, 0.5, 0.25]})
    assert worth("flap", "ffn", view, scale="raw") == [10, 9]
    assert worth("flap", "kv", view, scale="raw") == [(100 + 16) / 2, (4 + 1) / 2]
    # times the unit's parameters, by which the planner divides pooled scores
    assert worth("flap", "ffn", view) == pytest.approx([6, -6])
    # columns squared are 100, 16, 4, 1: mean 30.25, variance 1653.1875, then the group's mean
    z = 27.75 / 1653.1875**0.5
    assert worth("flap", "kv", view) == pytest.approx([12 * z, -12 * z])
    equal = Sheet({"down_in_variance": [9, 5]})
    assert worth("flap", "ffn", equal) == [0, 0]


def test_block_influence() -> None:
    view = Sheet({"block_cosine": [0.9, 0.95, 0.8]})
    assert worth("block-influence", "ffn", view) == pytest.approx([0.1, 0.1])
    assert worth("block-influence", "kv", view) == pytest.approx([0.025, 0.025])
    # 2 x 6 and 2 x 12 parameters share the layer's 0.1
    assert worth("block-influence", "ffn", view, scope="layer") == pytest.approx([1 / 60, 1 / 60])
    assert worth("block-influence", "kv", view, scope="layer") == pytest.approx([1 / 30, 1 / 30])
    assert block_influence.influence(view, "attention") == pytest.approx(0.05)


def test_llm_bip_forms() -> None:
    view = Sheet(
        {
            "down_in_squares": [4, 16],
            "down_in_abs": [1, 3],
            "down_in_relative": [9, 1],
            "out_squares": [4],
            "head_gram": [[[1, 0], [0, 4]], [[1, 1], [1, 1]]],
            "head_delta_abs": [[1, 2], [3, 4]],
            "head_exact": [3, 5],
            "inv_rms": [0.5],
            "up_abs": [1, 2],
            "gate_abs": [0.5, 1],
        }
    )
    assert worth("llm-bip", "ffn", view) == pytest.approx([2 * 5**0.5, 12])
    assert worth("llm-bip", "ffn", view, norm="l1") == [3, 9]
    assert worth("llm-bip", "ffn", view, tokens="relative") == pytest.approx([3 * 5**0.5, 3])
    # s = 1 + 0.5 |norm weight| [26.1, 34.5] = [27.1, 18.25]
    assert worth("llm-bip", "kv", view) == pytest.approx([27.1 + 2 * 18.25, 3 * 27.1 + 4 * 18.25])
    # traces 1 + 4 + 9 + 4 and (2+0)^2 + (0+2)^2; divided by the output's size 2
    assert worth("llm-bip", "kv", view, form="A") == pytest.approx([18**0.5 / 2, 8**0.5 / 2])
    assert worth("llm-bip", "kv", view, form="C") == [1.5, 2.5]


def test_taylor_vector() -> None:
    assert worth("taylor-vector", "ffn", Sheet(VECTORS)) == [2 + 1 + 1, 0 + 2 + 2]
    assert worth("taylor-vector", "kv", Sheet(VECTORS)) == [2 + 1 + 0.5 + 2, 2 + 3 + 1 + 1]
    assert worth("taylor-vector", "kv", Sheet(VECTORS, qk_norm=True)) == [0.5 + 2, 1 + 1]


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("taylor-element1", Need.MEAN_ELEMENT_ABS),
        ("taylor-element2", Need.ELEMENT_SECOND),
        ("taylor-mix", Need.ELEMENT_MIX),
    ],
)
def test_taylor_elements(name: str, need: Need) -> None:
    view = Sheet(roles(need, **ELEMENTS), qk_norm=True)  # sizes of weights say something there too
    assert worth(name, "ffn", view) == [9, 12]
    assert worth(name, "kv", view) == [2 + 3 + 5 + 1, 4 + 4 + 6 + 1]
    assert metric_of(name).needs({}) == {need}


def saap_sheet() -> Sheet:
    ones = {role: [[1, 1], [1, 1]] for role in ("gate", "up", "down")}
    elements = roles(Need.ELEMENT_MIX, **ELEMENTS) | roles(Need.ELEMENT_SECOND, **ELEMENTS)
    return Sheet(VECTORS | elements | roles(Need.SAMPLE_ELEMENT_ABS, **ones))


def test_saap() -> None:
    view = saap_sheet()
    options = metric_of("saap").resolve({})
    vector, element = saap.parts(view, "ffn", options)
    # mean squares: gate 5 and 4, up 1 and 5, down 2 and 8
    assert vector.tolist() == [8, 17] and element.tolist() == [9, 12]
    # a group's channels are summed before the square: q 0 and 2, k 1 and -3, v 0.5 and 1, o 2 and -1
    assert saap.parts(view, "kv", options)[0].tolist() == [0 + 1 + 0.25 + 4, 4 + 9 + 1 + 1]
    fused = [8 / 25 + 9 / 21, 17 / 25 + 12 / 21]
    assert worth("saap", "ffn", view, scope="layer", stability="none") == pytest.approx(fused)
    # samples [2, 7] and [6, 5] over their mean 5, plus 1: [1.4, 2.4] and [2.2, 2.0], so F = 2/9 and 1/11
    steady = [fused[0] * 9 / 11, fused[1] * 11 / 12]
    assert worth("saap", "ffn", view, scope="layer") == pytest.approx(steady)
    # the whole model: (8 + 17 + 5.25 + 15) / 4 and (9 + 12 + 11 + 15) / 4
    everywhere = [8 / 22.625 + 9 / 23.5, 17 / 22.625 + 12 / 23.5]
    assert worth("saap", "ffn", view, stability="none") == pytest.approx(everywhere)


def test_saap_signed() -> None:
    view = saap_sheet()
    signed = {"terms": "signed-mean", "scope": "layer"}
    vector, element = saap.parts(view, "ffn", metric_of("saap").resolve(signed))
    assert vector.tolist() == [0.5 + 1.5 + 0, 2 + 0.5 + 6] and element.tolist() == [9, 12]
    # sigma^2 5.25 and 10.5
    assert worth("saap", "ffn", view, **signed, stability="none") == pytest.approx([13 / 21, 29 / 21])
    assert worth("saap", "ffn", view, **signed) == pytest.approx([13 / 21 * 9 / 11, 29 / 21 * 11 / 12])
    assert worth("saap", "ffn", view, **signed, stability="literal") == pytest.approx([-2 / 9, -1 / 11])
    assert worth("saap", "ffn", view, **signed, stability="standardised") == pytest.approx([-6, 6])


def test_saap_of_the_summed_loss() -> None:
    stats = dict(saap_sheet().stats) | roles(Need.ELEMENT_MIX_SUM, **ELEMENTS) | {"n_targets": [4]}
    signed = {"terms": "signed", "scope": "layer"}
    vector, element = saap.parts(Sheet(stats), "ffn", metric_of("saap").resolve(signed))
    # gate |2 - 2 * 5|, |0 - 2 * 4|; up |-1 - 2 * 1|, |2 - 2 * 5|; down |1 - 2 * 2|, |-2 - 2 * 8|
    assert vector.tolist() == [8 + 3 + 3, 8 + 8 + 18] and element.tolist() == [9, 12]
    fused = [14 / 48 + 9 / 21, 34 / 48 + 12 / 21]
    assert worth("saap", "ffn", Sheet(stats), **signed, stability="none") == pytest.approx(fused)


def test_saap_residual_is_a_weighted_mean() -> None:
    fused = saap.fuse(np.array([2.0]), np.array([5.0]), (1.0, 2.0), "residual")
    assert fused[0] == pytest.approx((2 / 1 + 5 / 2) / (1 + 1 / 2))
    view = saap_sheet()
    switches = {"sigma": "residual", "terms": "signed-mean", "scope": "layer"}
    options = metric_of("saap").resolve(switches)
    first, second = saap.sigma_squares(view, "ffn", options)
    assert first == pytest.approx((4 + 1) / 2)  # samples [2, 6] and [7, 5]
    assert second < 1e-29  # no spread at all: the steadier score decides alone
    assert worth("saap", "ffn", view, **switches, stability="none") == pytest.approx([9, 12])


def golden_section(f: Callable[[float], float], low: float, high: float) -> float:
    """Minimiser of a convex function, to 1e-9."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if f(a) < f(b) else (a, high)
    return (low + high) / 2


@given(hnp.arrays(np.float64, 6, elements=st.floats(1e-3, 1e3)))
@settings(max_examples=25, deadline=None)
def test_saap_sigma_is_the_minimiser(scores: np.ndarray) -> None:
    def loss(eta: float) -> float:
        return 0.5 * math.exp(-eta) * float(scores.mean()) + 0.5 * eta

    eta = golden_section(loss, -20.0, 20.0)
    view = Sheet(
        roles(Need.SAMPLE_VECTOR, gate=[[0] * 6], up=[[0] * 6], down=[[0] * 6])
        | roles(Need.ELEMENT_MIX, gate=scores, up=[0] * 6, down=[0] * 6),
        dims=dataclasses.replace(Sheet().dims, layers=(LayerShape(n_heads=4, n_kv_heads=2, n_ff=6),)),
    )
    signed = {"terms": "signed-mean", "scope": "layer"}
    _, closed = saap.sigma_squares(view, "ffn", metric_of("saap").resolve(signed))
    # a minimum is flat: halving the digits of its place is all that comparing values can give
    assert closed == pytest.approx(math.exp(eta), rel=1e-6)


def fusion_sheet() -> Sheet:
    return Sheet(VECTORS | roles(Need.MEAN_ELEMENT_ABS, **ELEMENTS) | roles(Need.ELEMENT_SECOND, **ELEMENTS))


def test_adaptive_fusion_parts() -> None:
    view = fusion_sheet()
    # mean squares of the samples as in saap; over the model they sum to 45.25, the fine ones to 47, 14 each
    coarse, fine = [8 * 14 / 45.25, 17 * 14 / 45.25], [9 * 14 / 47, 12 * 14 / 47]
    assert worth("adaptive-fusion", "ffn", view, fusion="coarse") == pytest.approx(coarse)
    assert worth("adaptive-fusion", "ffn", view, fusion="fine") == pytest.approx(fine)
    half = [(a + b) / 2 for a, b in zip(coarse, fine, strict=True)]
    assert worth("adaptive-fusion", "ffn", view, fusion="half") == pytest.approx(half)
    assert worth("adaptive-fusion", "kv", view, fusion="coarse", normalise="no") == [5.25, 15]


def test_adaptive_fusion_signed_parts() -> None:
    view = fusion_sheet()
    signed = {"terms": "signed", "normalise": "layer"}
    coarse, fine = [10 / 3, 8 / 3], [2 / 3 + 6 / 7 + 10 / 11, 4 / 3 + 8 / 7 + 12 / 11]
    assert worth("adaptive-fusion", "ffn", view, fusion="coarse", **signed) == pytest.approx(coarse)
    assert worth("adaptive-fusion", "ffn", view, fusion="fine", **signed) == pytest.approx(fine)
    half = [(a + b) / 2 for a, b in zip(coarse, fine, strict=True)]
    assert worth("adaptive-fusion", "ffn", view, fusion="half", **signed) == pytest.approx(half)
    raw = {"terms": "signed", "normalise": "no", "fusion": "coarse"}
    assert worth("adaptive-fusion", "ffn", view, **raw) == [4, 4]
    # the sum over the whole slice, then its size: q 0 and 2, k 1 and 3, v 0.5 and 1, o 2 and 1
    assert worth("adaptive-fusion", "kv", view, **raw) == [3.5, 7]


def test_adaptive_fusion_attention() -> None:
    # M 1, Q 2: logits 2 and 6
    alpha = 1 / (1 + math.exp(4))
    fused = adaptive_fusion.attend(np.array([[1.0]]), np.array([[3.0]]), 1.0)
    assert fused[0] == pytest.approx(alpha * 1 + (1 - alpha) * 3)
    # M 4 halves the logits of a query of four equal parts
    fused = adaptive_fusion.attend(np.full((4, 1), 1.0), np.full((4, 1), 3.0), 1.0)
    alpha = 1 / (1 + math.exp(8))
    assert fused[0] == pytest.approx(4 * (alpha * 1 + (1 - alpha) * 3))
    # a large temperature brings it to the mean
    warm = adaptive_fusion.attend(np.array([[1.0]]), np.array([[3.0]]), 1e9)
    assert warm[0] == pytest.approx(2.0)


SCORES = hnp.arrays(np.float64, (3, 4), elements=st.floats(0, 1e6))


@given(SCORES, SCORES, st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=100, deadline=None)
def test_the_fused_score_lies_between_its_parts(coarse: np.ndarray, fine: np.ndarray, tau: float) -> None:
    fused = adaptive_fusion.attend(coarse, fine, tau)
    parts = np.stack([coarse.sum(axis=0), fine.sum(axis=0)])
    assert (fused >= parts.min(axis=0) * (1 - 1e-12)).all()
    assert (fused <= parts.max(axis=0) * (1 + 1e-12)).all()


def test_learned_fusion_finds_the_weights_of_a_made_up_loss() -> None:
    rng = np.random.default_rng(0)
    design = rng.random((24, 4))
    made = design @ [1.0, 3.0, 0.0, 2.0]
    assert adaptive_fusion.nonnegative_fit(design, made) == pytest.approx([1, 3, 0, 2])
    assert adaptive_fusion.nonnegative_fit(design, -design[:, 0]).tolist() == [0, 0, 0, 0]
    sheet = fusion_sheet()
    options = metric_of("adaptive-fusion").resolve({"fusion": "learned"})
    masks = {kind: rng.integers(0, 2, (12, 2)) for kind in base.ROLES}
    loss = np.zeros(12)
    for kind, (a, b) in {"ffn": (1.0, 3.0), "kv": (2.0, 0.0)}.items():
        c, f = adaptive_fusion.estimates(sheet, kind, options)
        loss += masks[kind] @ (a * c.sum(axis=0) + b * f.sum(axis=0))
    stats = dict(sheet.stats) | {"mask_loss": loss} | roles(Need.MASK_TRIALS, **masks)
    weights = adaptive_fusion.learned_weights(Sheet(stats), options)
    assert weights == {"ffn": pytest.approx(0.25, abs=1e-4), "kv": pytest.approx(1.0, abs=1e-4)}


def test_normalised_queries_and_keys_leave_their_signed_sums_out() -> None:
    stats = dict(saap_sheet().stats) | fusion_sheet().stats
    for name, options in (("saap", {"stability": "none"}), ("adaptive-fusion", {})):
        scores = []
        for signed in (1.0, 100.0):
            other = stats | roles(Need.SAMPLE_VECTOR, q=[[signed, 0, 0, 2]], k=[[1, signed]])
            scores.append(worth(name, "kv", Sheet(other, qk_norm=True), **options))
        assert scores[0] == scores[1]
        assert scores[0] != worth(name, "kv", Sheet(other), **options)


# ---------------------------------------------------------------- on tiny models

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "tied": {"tied": True},
    "bias": {"bias": True, "mlp_bias": True},
}
SMALL = {"layers": 2, "ff": 24, "hidden": 32}


def scored(
    name: str, source: checkpoint.Source, model_graph: ModelGraph, **options: str
) -> dict[str, np.ndarray]:
    metric = metric_of(name)
    resolved = metric.resolve(options)
    needs = metric.needs(resolved)
    windows = np.random.default_rng(1).integers(0, 96, (3, 12))
    arrays: dict[str, np.ndarray] = {}
    slow = frozenset(need for need in needs if need.gradient)
    if needs - slow:
        arrays |= calibration.collect(source, model_graph, windows, needs - slow)
    if slow:
        arrays |= gradients.collect(source, model_graph, windows, slow)
    return calibration.score(metric, resolved, source, model_graph, arrays, seed=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @lru_cache
    def make(kind: str) -> Path:
        return builders.tiny_llama(tmp_path_factory.mktemp("model"), **(SMALL | KINDS[kind]))

    return make


def opened(folder: Path) -> tuple[checkpoint.SafetensorsSource, ModelGraph]:
    source = checkpoint.SafetensorsSource(folder)
    return source, graph.build(source.config)


def switches() -> Iterator[tuple[str, str, str]]:
    for name in NAMES:
        for key, option in metric_of(name).options.items():
            for choice in option.choices:
                if choice != option.default and name != "hywia":
                    yield name, key, choice


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_finite_everywhere(folders: Callable[[str], Path], kind: str) -> None:
    source, model_graph = opened(folders(kind))
    for name in NAMES:
        scores = scored(name, source, model_graph)
        assert set(scores) == {axis.name for axis in model_graph.axes}
        for axis in model_graph.axes:
            assert scores[axis.name].shape == (axis.n_units,)
            assert np.isfinite(scores[axis.name]).all()
            if axis.unit == "ffn" and name != "block-influence":
                assert np.unique(scores[axis.name]).size > axis.n_units // 2, name


@pytest.mark.parametrize(("name", "key", "choice"), list(switches()), ids="-".join)
def test_every_switch_works_and_does_something(
    folders: Callable[[str], Path], name: str, key: str, choice: str
) -> None:
    source, model_graph = opened(folders("gqa"))
    changed = scored(name, source, model_graph, **{key: choice})
    default = scored(name, source, model_graph)
    assert all(np.isfinite(v).all() for v in changed.values())
    same = all(np.array_equal(changed[axis], default[axis]) for axis in default)
    assert same == (key == "sequential")  # that one acts where statistics are collected


class Permuted:
    """A source whose units come in another order."""

    def __init__(self, source: Any, model_graph: ModelGraph, orders: Mapping[str, np.ndarray]) -> None:
        self._source = source
        self.config = source.config
        self.fingerprint = "permuted"
        self._moves: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for axis in model_graph.axes:
            for tensor, dim, index in surgery.rows_of(axis, orders[axis.name]):
                self._moves.setdefault(tensor, []).append((dim, torch.from_numpy(index)))

    def tensor(self, name: str) -> torch.Tensor:
        value = self._source.tensor(name)
        for dim, index in self._moves.get(name, ()):
            value = value.index_select(dim, index)
        return value

    def close(self) -> None:
        self._source.close()


@pytest.mark.parametrize("kind", ["gqa", "bias"])
def test_permuting_units_permutes_scores(folders: Callable[[str], Path], kind: str) -> None:
    source, model_graph = opened(folders(kind))
    rng = np.random.default_rng(9)
    orders = {axis.name: rng.permutation(axis.n_units) for axis in model_graph.axes}
    permuted = Permuted(source, model_graph, orders)
    for name in NAMES:
        if name == "random":  # drawn by position
            continue
        plain, moved = scored(name, source, model_graph), scored(name, permuted, model_graph)
        for axis, order in orders.items():
            assert moved[axis] == pytest.approx(plain[axis][order], rel=2e-4, abs=1e-6), f"{name} {axis}"


def test_parameters_of_a_unit_are_those_of_the_graph(folders: Callable[[str], Path]) -> None:
    for kind in KINDS:
        source, model_graph = opened(folders(kind))
        family = graph.find_family("llama")
        for axis in model_graph.axes:
            view = calibration.View(family, model_graph.dims, axis.layer, source, {})
            assert base.unit_params(view, axis.unit) == axis.unit_params
            assert base.n_units(view, axis.unit) == axis.n_units


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def test_llm_bip_bound_holds_and_follows_the_exact_change(tmp_path: Path) -> None:
    folder = builders.tiny_llama(tmp_path, hidden=64, heads=16, kv_heads=16, head_dim=4, ff=96, layers=2)
    # heads of different sizes, as in trained models
    sizes = torch.from_numpy(np.random.default_rng(2).permutation(np.geomspace(0.2, 3.0, 16)).repeat(4))

    class Scaled(Permuted):
        def tensor(self, name: str) -> torch.Tensor:
            value = super().tensor(name)
            return value * sizes.to(value.dtype) if "o_proj.weight" in name else value

    source, model_graph = opened(folder)
    whole = {axis.name: np.arange(axis.n_units) for axis in model_graph.axes}
    scaled = Scaled(source, model_graph, whole)
    exact = calibration.collect(
        scaled, model_graph, np.random.default_rng(1).integers(0, 96, (3, 12)), frozenset((Need.HEAD_EXACT,))
    )
    forms = {form: scored("llm-bip", scaled, model_graph, form=form) for form in "ABC"}
    for layer in range(2):
        axis = f"layers.{layer}.kv"
        true = exact[f"layers.{layer}.head_exact"]
        assert (forms["B"][axis] >= true).all()
        assert spearman(forms["A"][axis], true) > 0.9
        assert spearman(forms["B"][axis], true) > 0.9
        assert spearman(forms["C"][axis], true) == pytest.approx(1.0)


# ---------------------------------------------------------------- with the planner

LOOSE = Constraints(
    format="gguf",
    ffn=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
    kv=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
    reasons=(),
)


def space(model_graph: ModelGraph, name: str, source: Any, **options: str) -> planner.PlanSpace:
    metric = metric_of(name)
    return planner.PlanSpace(
        graph=model_graph,
        scores=scored(name, source, model_graph, **options),
        poolable=metric.poolable(metric.resolve(options)),
        constraints=LOOSE,
        metric=name,
    )


def test_one_kv_head_is_never_cut(folders: Callable[[str], Path]) -> None:
    source, model_graph = opened(folders("one kv head"))
    for name in NAMES:
        plan = planner.plan_ratio(space(model_graph, name, source), "uniform", 0.3)
        assert plan.kept and all(axis.endswith(".ffn") for axis in plan.kept), name


@pytest.mark.parametrize(("name", "options"), [("flap", {}), ("saap", {"stability": "standardised"})])
def test_standardised_scores_make_one_list_by_score_alone(
    folders: Callable[[str], Path], name: str, options: dict[str, str]
) -> None:
    source, model_graph = opened(folders("mha"))
    plan_space = space(model_graph, name, source, **options)
    plan = planner.plan_ratio(plan_space, "global", 0.25)
    standard = {
        axis.name: plan_space.scores[axis.name].astype(np.float64) / axis.unit_params
        for axis in model_graph.axes
    }
    for axis, values in standard.items():
        assert values.mean() == pytest.approx(0, abs=1e-5)
        # flap standardises columns before it averages those of a group
        if name == "saap" or axis.endswith(".ffn"):
            assert values.std() == pytest.approx(1, abs=1e-5)
    gone, stay = [], []
    for axis in model_graph.axes:
        kept = set(plan.kept.get(axis.name, range(axis.n_units)))
        if len(kept) > 1:  # the last unit of an axis stays whatever it is worth
            stay += [standard[axis.name][i] for i in kept]
        gone += [standard[axis.name][i] for i in range(axis.n_units) if i not in kept]
    assert max(gone) <= min(stay)


def test_block_influence_takes_whole_blocks_from_a_pooled_list(folders: Callable[[str], Path]) -> None:
    source, model_graph = opened(folders("mha"))
    plan_space = space(model_graph, "block-influence", source)
    plan = planner.plan_ratio(plan_space, "global", 0.3)
    assert plan.kept and all(len(kept) == 1 for kept in plan.kept.values())  # down to the floor


def test_protected_layers_scale_with_depth() -> None:
    assert planner.protected_layers(32) == frozenset((0, 1, 2, 3, 30, 31))
    assert planner.protected_layers(30) == frozenset((0, 1, 2, 3, 28, 29))
    assert planner.protected_layers(16) == frozenset((0, 1, 15))
    assert planner.protected_layers(3) == frozenset()


# ---------------------------------------------------------------- documentation


@pytest.mark.parametrize("name", NAMES)
def test_every_switch_is_documented_with_its_default_and_origin(name: str) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    if name == "hywia":
        assert "Also `hywia`" in text
        return
    section = text.split(f"\n## {name}\n")[1].split("\n## ")[0].split("\n# ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    metric = metric_of(name)
    assert [row.split("`")[1] for row in rows] == list(metric.options)
    for row, option in zip(rows, metric.options.values(), strict=True):
        values, default, origin = (cell.strip() for cell in row.split("|")[2:5])
        assert values == " ".join(f"`{choice}`" for choice in option.choices)
        assert (default, origin) == (f"`{option.default}`", option.origin)
    if metric.reference != "baseline" and not name.startswith("taylor-"):
        assert metric.reference.partition(":")[2] in section or name == "wanda-sp"
