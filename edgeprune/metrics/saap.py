"""SAAP: vector-wise and element-wise scores fused by their uncertainty, then by stability (arXiv:2412.15127).

From the paper: an adaptive fusion metric weighs coupled structures by their homoscedastic uncertainty.
From descriptions of it: two Taylor scores, a Gaussian likelihood with learned sigma, the fused
I = Iv/(2 s1^2) + Ie/(2 s2^2) + log s1 s2, a fluctuation indicator and an adaptive stability indicator.
The formulas below are implemented from a reconstructed specification; the paper's may differ in detail.

With v_n = sum_k g_nk W_k over a unit's slice of one matrix, of sample n, each summed over the matrices:
'fisher' (default): Iv = mean_n v^2,  Ie = sum_k mean_n (g W)^2, the second-order term alone, as a trained
model's mean gradient says little; 'signed': per channel Iv = |mean_n v - 1/2 mean_n v^2| and
Ie = sum_k |mean_n(g W) - 1/2 mean_n (g W)^2|, where terms and samples of opposite sign cancel.
Sigma minimises sum_m 1/2 exp(-eta_m) mean_i I_m,i + 1/2 eta_m over eta = log sigma^2, so
sigma_m^2 = mean_i I_m,i; over the whole model by default, so that layers stay comparable.
In 'signed' a sample's loss is the sum of its token losses: with their mean ('signed-mean'), T times smaller,
both second-order terms would vanish beside the first. The term log s1 s2 is the same for all units of a
scope and is left out: a negative constant would turn the product with the stability indicator around.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import (
    ROLES,
    Array,
    LayerView,
    Metric,
    Need,
    Option,
    fold,
    n_units,
    present_units,
    unit_params,
    vector_roles,
)

_TINY = 1e-30
_EPSILON = 1e-12  # of fused scores, which are of order one


def needs(options: Mapping[str, str]) -> frozenset[Need]:
    wanted = {Need.SAMPLE_VECTOR}
    if options["terms"] == "fisher":
        wanted.add(Need.ELEMENT_SECOND)
    else:
        wanted |= (
            {Need.ELEMENT_MIX_SUM, Need.N_TARGETS} if options["terms"] == "signed" else {Need.ELEMENT_MIX}
        )
    if options["sigma"] == "residual" or options["stability"] in ("asi", "literal"):
        wanted.add(Need.SAMPLE_ELEMENT_ABS)
    return frozenset(wanted)


def parts(view: LayerView, unit: str, options: Mapping[str, str]) -> tuple[Array, Array]:
    """Iv and Ie of every unit, each [n_units]."""
    vector, element = np.zeros(n_units(view, unit)), np.zeros(n_units(view, unit))
    signed = vector_roles(view, unit)
    if options["terms"] == "fisher":
        for role in signed:
            v = fold(view, unit, view.role_stat(Need.SAMPLE_VECTOR, role))  # [N, n_units]
            vector += np.square(v).mean(axis=0)
        vector *= len(ROLES[unit]) / len(signed)  # matrices left out must not make a unit look smaller
        for role in ROLES[unit]:
            element += fold(view, unit, view.role_stat(Need.ELEMENT_SECOND, role))
        return vector, element
    # the sum's gradient is T times the mean's; both scores are left divided by T
    whole = options["terms"] == "signed"
    factor = float(view.stat(Need.N_TARGETS)[0]) if whole else 1.0
    need = Need.ELEMENT_MIX_SUM if whole else Need.ELEMENT_MIX
    for role in signed:
        v = view.role_stat(Need.SAMPLE_VECTOR, role).astype(np.float64)  # [N, channels]
        vector += fold(view, unit, np.abs(v.mean(axis=0) - 0.5 * factor * np.square(v).mean(axis=0)))
    for role in ROLES[unit]:
        element += fold(view, unit, view.role_stat(need, role))
    return vector, element


def sample_parts(view: LayerView, unit: str) -> tuple[Array, Array]:
    """First-order scores of every sample alone, each [N, n_units]."""
    vector = sum(
        fold(view, unit, np.abs(view.role_stat(Need.SAMPLE_VECTOR, role)))
        for role in vector_roles(view, unit)
    )
    element = sum(fold(view, unit, view.role_stat(Need.SAMPLE_ELEMENT_ABS, role)) for role in ROLES[unit])
    return np.asarray(vector), np.asarray(element)


def sigma_squares(view: LayerView, unit: str, options: Mapping[str, str]) -> tuple[float, float]:
    """(s1^2, s2^2) of the vector-wise and the element-wise score, over one axis or the whole model."""

    def per_unit(at: LayerView, kind: str) -> tuple[Array, Array]:
        if options["sigma"] == "residual":
            vector, element = sample_parts(at, kind)
            if options["terms"] == "fisher":
                vector, element = np.square(vector), np.square(element)
            return vector.var(axis=0), element.var(axis=0)
        return parts(at, kind, options)

    if options["scope"] == "layer":
        first, second = per_unit(view, unit)
        return max(float(first.mean()), _TINY), max(float(second.mean()), _TINY)

    def of_model() -> tuple[float, float]:
        firsts, seconds = [], []
        for layer in range(len(view.dims.layers)):
            at = view.at(layer)
            for kind in present_units(at):
                first, second = per_unit(at, kind)
                firsts.append(first)
                seconds.append(second)
        return (
            max(float(np.concatenate(firsts).mean()), _TINY),
            max(float(np.concatenate(seconds).mean()), _TINY),
        )

    return view.shared(f"saap {options['terms']} {options['sigma']}", of_model)


def fuse(vector: Array, element: Array, squares: tuple[float, float], how: str) -> Array:
    """Weigh the two scores by 1/sigma^2: halved ('closed') or as a weighted mean ('residual')."""
    total = vector / squares[0] + element / squares[1]
    fused: Array = total / (1 / squares[0] + 1 / squares[1]) if how == "residual" else total / 2
    return fused


def fluctuation(vector: Array, element: Array) -> Array:
    """F = std_n / mean_n of per-sample scores [N, n_units], each kind first divided by its mean."""
    samples = vector / max(float(vector.mean()), _TINY) + element / max(float(element.mean()), _TINY)
    unsteady: Array = samples.std(axis=0) / (samples.mean(axis=0) + _EPSILON)
    return unsteady


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    if n_units(view, unit) == 0:
        return np.zeros(0)
    squares = sigma_squares(view, unit, options)
    fused = fuse(*parts(view, unit, options), squares, options["sigma"])
    stability = options["stability"]
    if stability == "none":
        return fused
    if stability == "standardised":
        spread = float(fused.std())
        if spread <= _EPSILON * float(np.abs(fused).max(initial=0.0)):
            return np.zeros_like(fused)
        # one threshold for all layers; cost decides only how far down the list to go
        standard: Array = (fused - fused.mean()) / spread * unit_params(view, unit)
        return standard
    unsteady = fluctuation(*sample_parts(view, unit))
    ranked: Array = -unsteady if stability == "literal" else fused / (1 + unsteady)
    return ranked


def poolable(options: Mapping[str, str]) -> bool:
    if options["stability"] == "standardised":
        return True
    # sigma of a layer brings every layer to the same mean, so only the model's sigma keeps one scale
    return options["scope"] == "model" and options["stability"] != "literal"


METRIC = Metric(
    name="saap",
    summary="vector and element Taylor scores weighed by uncertainty and stability",
    reference="arXiv:2412.15127",
    needs=needs,
    score=score,
    poolable=poolable,
    options={
        "stability": Option(
            default="asi",
            choices=("asi", "literal", "standardised", "none"),
            help="asi: score/(1+F), F the score's relative spread over samples; literal: the largest F goes "
            "first; standardised: (I - mean)/std per layer, one threshold for all; none: the fused score",
            origin="told",
        ),
        "terms": Option(
            default="fisher",
            choices=("fisher", "signed", "signed-mean"),
            help="fisher: the second-order term alone, squares averaged over samples; signed: first order "
            "less half of the second, averaged before the size is taken, a sample's loss the sum of its "
            "token losses; signed-mean: the same with their mean, which makes the second order vanish",
            origin="reconstructed",
        ),
        "scope": Option(
            default="model",
            choices=("model", "layer"),
            help="where sigma is taken: the whole model, so that layers stay comparable, or each layer and "
            "kind of unit",
            origin="reconstructed",
        ),
        "sigma": Option(
            default="closed",
            choices=("closed", "residual"),
            help="closed: sigma^2 is the mean score; residual: the score's mean variance over samples",
            origin="reconstructed",
        ),
    },
)
