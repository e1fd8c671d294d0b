"""LLM-BIP: block-wise forward importance propagation (arXiv:2412.06419).

From the paper: a unit is scored by its influence on the output of its own transformer block, through
an upper bound from Lipschitz continuity, in one forward pass without gradients. The formulas below are
implemented from a reconstructed specification; the paper's may differ in detail.

Per token: a = u Wo', y = x + a, n = RMSNorm(y), h = f(n Wg') * (n Wu'), out = y + h Wd'.

FFN channel j, exact: removing it changes `out` by -h_j Wd[:,j]. KV group k: removing it changes a by
da = -u_k Wo,k' exactly, which then passes the residual and the FFN. Forms of the group's score:
A: ||da||_F.  B: the change carried to the block's output through a bound.  C: that output recomputed.

f is the family's activation, L its Lipschitz constant: 1.1 for SiLU, 1.13 for GELU by tanh. Where a norm
follows o or down (Gemma 3), its columns count times that norm's weight and the mean of 1/rms of what it
receives: the norm's derivative without its projection, reconstructed as the rest. Only form C is exact
there, and B is no longer a bound.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.metrics.base import Array, LayerView, Metric, Need, Option, group_columns, sequential_option


def needs(options: Mapping[str, str]) -> frozenset[Need]:
    squares = Need.DOWN_IN_RELATIVE if relative(options) else Need.DOWN_IN_SQUARES
    wanted = {squares if options["norm"] == "l2" else Need.DOWN_IN_ABS, Need.OUT_SQUARES}
    wanted |= {Need.ATTN_OUT_INV_RMS, Need.FFN_OUT_INV_RMS}
    wanted |= {
        "A": {Need.HEAD_GRAM},
        "B": {Need.HEAD_DELTA_ABS, Need.INV_RMS, Need.GATE_ABS, Need.UP_ABS},
        "C": {Need.HEAD_EXACT},
    }[options["form"]]
    return frozenset(wanted)


def relative(options: Mapping[str, str]) -> bool:
    """A token's share in a channel's score is relative to its stream."""
    return options["norm"] == "l2" and options["tokens"] == "relative"


def behind(view: LayerView, role: str) -> Array | float:
    """Factor per stream entry [d] on what o or down adds: 1, or the norm behind it at its mean."""
    if not view.post_norms:
        return 1.0
    norm, need = (
        ("attn_post_norm", Need.ATTN_OUT_INV_RMS) if role == "o" else ("ffn_post_norm", Need.FFN_OUT_INV_RMS)
    )
    factor: Array = np.abs(view.weight(norm).astype(np.float64)) * float(view.stat(need)[0])
    return factor


def joined(view: LayerView, role: str) -> Array:
    """o or down [d, columns] float64 as its output joins the stream."""
    weight: Array = view.weight(role).astype(np.float64)
    return weight if not view.post_norms else weight * np.asarray(behind(view, role))[:, None]


def stream_sensitivity(view: LayerView) -> Array:
    """s [d]: how strongly a change of stream entry k between attention and FFN can move the block's output.

    s_k = 1 + E[1/rms] gamma_k sum_j ||Wd[:,j]||_1 (L E|up_j| |Wg[j,k]| + E|f(gate_j)| |Wu[j,k]|)
    """
    if view.shape.n_ff == 0:
        return np.ones(view.dims.hidden)
    down = np.abs(joined(view, "down")).sum(axis=0)  # [m]
    through = (down * view.gate_lipschitz * view.stat(Need.UP_ABS)) @ np.abs(view.weight("gate"))
    through = through + (down * view.stat(Need.GATE_ABS)) @ np.abs(view.weight("up"))
    gamma = np.abs(view.weight("ffn_norm").astype(np.float64))
    sensitivity: Array = 1.0 + float(view.stat(Need.INV_RMS)[0]) * gamma * through
    return sensitivity


def group_norms(view: LayerView) -> Array:
    """Root mean square over tokens of ||u_k Wo,k'||, one per KV group, from the Gram matrices."""
    n, group = view.shape.n_kv_heads, group_columns(view)
    o = joined(view, "o").reshape(-1, n, group)  # [d, K, g*dh]
    gram = view.stat(Need.HEAD_GRAM).astype(np.float64)
    traces = np.array([np.sum((o[:, k] @ gram[k]) * o[:, k]) for k in range(n)])
    norms: Array = np.sqrt(np.maximum(traces, 0.0))
    return norms


def score(view: LayerView, unit: str, options: Mapping[str, str], seed: int) -> Array:
    if unit == "ffn":
        down = joined(view, "down")
        if options["norm"] == "l2":
            squares = Need.DOWN_IN_RELATIVE if relative(options) else Need.DOWN_IN_SQUARES
            value = np.sqrt(view.stat(squares)) * np.sqrt(np.square(down).sum(axis=0))
        else:
            value = view.stat(Need.DOWN_IN_ABS) * np.abs(down).sum(axis=0)
    elif options["form"] == "A":
        value = group_norms(view)
    elif options["form"] == "B":
        value = view.stat(Need.HEAD_DELTA_ABS) @ (behind(view, "o") * stream_sensitivity(view))
    else:
        value = view.stat(Need.HEAD_EXACT)
    if poolable(options):
        value = value / max(float(np.sqrt(view.stat(Need.OUT_SQUARES)[0])), 1e-12)
    return np.asarray(value, dtype=np.float64)


def poolable(options: Mapping[str, str]) -> bool:
    # B is 45 to 90 times loose, so its groups and channels share no scale; A and C do, in L2
    # relative channels and absolute groups share none either
    return options["form"] != "B" and options["norm"] == "l2" and not relative(options)


METRIC = Metric(
    name="llm-bip",
    summary="influence on the block's own output, one forward pass",
    reference="arXiv:2412.06419",
    needs=needs,
    score=score,
    poolable=poolable,
    options={
        "form": Option(
            default="B",
            choices=("A", "B", "C"),
            help="KV groups: A norm of the removed attention output, B carried to the block's output "
            "through a bound, C that output recomputed",
            origin="reconstructed",
        ),
        "norm": Option(
            default="l2",
            choices=("l2", "l1"),
            help="FFN channels: l2 ||h_j||·||Wd_j||, l1 mean|h_j|·||Wd_j||_1",
            origin="reconstructed",
        ),
        "tokens": Option(
            default="equal",
            choices=("equal", "relative"),
            help="FFN channels, l2: relative divides what a token adds by the mean square of its stream, as "
            "the next norm will; equal lets the few tokens with a huge stream decide",
            origin="reconstructed",
        ),
        "sequential": sequential_option("no", "reconstructed"),
    },
)
