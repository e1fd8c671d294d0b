"""Adaptive fusion of coarse and fine importance, from v5 on called HyWIA (arXiv:2403.10799).

From the paper: coarse-grained and fine-grained estimates of each substructure are fused adaptively by
attention. The formulas below are implemented from a reconstructed specification; the paper's may differ
in detail.

For unit i with M coupled matrices, over its slice of matrix a: 'fisher' (default) coarse
C_i[a] = mean_n (sum g_n W)^2 and fine F_i[a] = sum mean_n (g_n W)^2; 'signed' C_i[a] = |sum G W| and
F_i[a] = sum |G W| with the mean gradient G, in whose sums samples of opposite sign cancel. C and F are each
divided by their mean, over the model by default or over the layer per matrix. Query Q = (C+F)/2, keys [C; F],
values [sum C; sum F], alpha = softmax([C; F] Q / (tau sqrt(M))), I = alpha . values: between the two.
"""

from __future__ import annotations

import itertools
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
    vector_roles,
)

_TINY = 1e-30


def needs(options: Mapping[str, str]) -> frozenset[Need]:
    fine_need = Need.ELEMENT_SECOND if options["terms"] == "fisher" else Need.MEAN_ELEMENT_ABS
    wanted = {"coarse": {Need.SAMPLE_VECTOR}, "fine": {fine_need}}.get(
        options["fusion"], {Need.SAMPLE_VECTOR, fine_need}
    )
    if options["fusion"] == "learned":
        wanted |= {Need.MASK_TRIALS, Need.MASK_LOSS}
    return frozenset(wanted)


def raw_coarse(view: LayerView, unit: str, roles: tuple[str, ...], terms: str) -> Array:
    """[M, n_units] of the unit's whole slice of each matrix."""
    rows = []
    for role in roles:
        v = fold(view, unit, view.role_stat(Need.SAMPLE_VECTOR, role))  # [N, n_units]
        rows.append(np.square(v).mean(axis=0) if terms == "fisher" else np.abs(v.mean(axis=0)))
    return np.stack(rows)


def raw_fine(view: LayerView, unit: str, roles: tuple[str, ...], terms: str) -> Array:
    """[M, n_units] of the single weights of the unit's slice of each matrix."""
    need = Need.ELEMENT_SECOND if terms == "fisher" else Need.MEAN_ELEMENT_ABS
    return np.stack([fold(view, unit, view.role_stat(need, role)) for role in roles])


def scaled(view: LayerView, unit: str, options: Mapping[str, str], which: str) -> Array:
    """C or F, [M, n_units], divided by its mean. `which`: 'coarse' or 'fine'."""
    raw = raw_coarse if which == "coarse" else raw_fine
    terms = options["terms"]

    def rows(at: LayerView, kind: str) -> Array:
        return raw(at, kind, vector_roles(at, kind) if which == "coarse" else ROLES[kind], terms)

    values = rows(view, unit)
    if options["normalise"] == "no":
        return values
    if options["normalise"] == "layer":
        by_matrix: Array = values / np.maximum(values.mean(axis=1, keepdims=True), _TINY)
        return by_matrix

    def of_model() -> float:
        views = [view.at(layer) for layer in range(len(view.dims.layers))]
        found = np.concatenate([rows(at, kind).ravel() for at in views for kind in present_units(at)])
        return max(float(found.mean()), _TINY)

    # one number for all layers, matrices and kinds of unit keeps them comparable
    everywhere: Array = values / view.shared(f"adaptive-fusion {terms} {which}", of_model)
    return everywhere


def estimates(view: LayerView, unit: str, options: Mapping[str, str]) -> tuple[Array, Array]:
    """C and F, each [M, n_units]. Where q and k are normalised their fine score stands in for the coarse."""
    fines = scaled(view, unit, options, "fine")
    coarses = fines.copy()
    rows = [ROLES[unit].index(role) for role in vector_roles(view, unit)]
    coarses[rows] = scaled(view, unit, options, "coarse")
    return coarses, fines


def attend(coarses: Array, fines: Array, temperature: float) -> Array:
    """Fused score [n_units] of C and F [M, n_units]."""
    query = (coarses + fines) / 2
    scale = temperature * np.sqrt(coarses.shape[0])
    logits = np.stack([(coarses * query).sum(axis=0), (fines * query).sum(axis=0)]) / scale
    weights = np.exp(logits - logits.max(axis=0))
    weights /= weights.sum(axis=0)
    return blend(coarses, fines, weights[0])


def blend(coarses: Array, fines: Array, weight: Array | float) -> Array:
    """weight * sum C + (1 - weight) * sum F, which rounding must not carry past either of the two."""
    coarse, fine = coarses.sum(axis=0), fines.sum(axis=0)
    blended: Array = weight * coarse + (1 - weight) * fine
    return np.clip(blended, np.minimum(coarse, fine), np.maximum(coarse, fine))


def nonnegative_fit(design: Array, target: Array) -> Array:
    """Least squares with non-negative weights for a handful of columns, by trying every active set."""
    best, best_error = np.zeros(design.shape[1]), float(np.square(target).sum())
    for size in range(1, design.shape[1] + 1):
        for columns in itertools.combinations(range(design.shape[1]), size):
            found = np.linalg.lstsq(design[:, columns], target, rcond=None)[0]
            error = float(np.square(design[:, columns] @ found - target).sum())
            if (found >= 0).all() and error < best_error:
                best_error = error
                best = np.zeros(design.shape[1])
                best[list(columns)] = found
    return best


def learned_weights(view: LayerView, options: Mapping[str, str]) -> dict[str, float]:
    """Weight of the coarse score per unit kind, fitted to the measured loss of masked random units."""
    kinds = tuple(ROLES)
    loss = view.stat(Need.MASK_LOSS).astype(np.float64)
    design = np.zeros((len(loss), 2 * len(kinds)))
    for layer in range(len(view.dims.layers)):
        at = view.at(layer)
        for kind in present_units(at):
            masks = at.role_stat(Need.MASK_TRIALS, kind).astype(np.float64)  # [R, n_units]
            coarses, fines = estimates(at, kind, options)
            column = 2 * kinds.index(kind)
            design[:, column] += masks @ coarses.sum(axis=0)
            design[:, column + 1] += masks @ fines.sum(axis=0)
    fitted = nonnegative_fit(design, loss)
    out = {}
    for i, kind in enumerate(kinds):
        a, b = fitted[2 * i], fitted[2 * i + 1]
        out[kind] = float(a / (a + b)) if a + b > 0 else 0.5
    return out


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    fusion = options["fusion"]
    if n_units(view, unit) == 0:
        return np.zeros(0)
    if fusion in ("coarse", "fine"):
        only: Array = scaled(view, unit, options, fusion).sum(axis=0)
        return only
    coarses, fines = estimates(view, unit, options)
    if fusion == "half":
        return blend(coarses, fines, 0.5)
    if fusion == "learned":
        weights = view.shared("adaptive-fusion", lambda: learned_weights(view, options))
        return blend(coarses, fines, weights[unit])
    return attend(coarses, fines, float(options["temperature"]))


METRIC = Metric(
    name="adaptive-fusion",
    summary="coarse and fine Taylor scores fused by attention",
    reference="arXiv:2403.10799",
    needs=needs,
    score=score,
    # dividing by the layer's mean takes the layer's scale away
    poolable=lambda options: options["normalise"] != "layer",
    options={
        "fusion": Option(
            default="attention",
            choices=("attention", "coarse", "fine", "half", "learned"),
            help="attention: weights per unit by softmax; coarse, fine: one of the two; half: their mean; "
            "learned: one weight per kind of unit, fitted to the loss of masked random units",
            origin="reconstructed",
        ),
        "temperature": Option(
            default="1",
            choices=("0.1", "0.5", "1", "2", "10"),
            help="tau of the softmax; larger brings attention nearer to half",
            origin="reconstructed",
        ),
        "normalise": Option(
            default="model",
            choices=("model", "layer", "no"),
            help="model: coarse and fine scores are each divided by their mean over the model, comparable "
            "between layers; layer: each matrix's by their mean over the layer; no: as they are, where the "
            "larger kind always wins",
            origin="reconstructed",
        ),
        "terms": Option(
            default="fisher",
            choices=("fisher", "signed"),
            help="fisher: squares averaged over samples; signed: the size of the mean over samples",
            origin="reconstructed",
        ),
    },
)
