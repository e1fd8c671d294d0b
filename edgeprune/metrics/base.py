"""The contract of a metric: what it needs, its switches, and a pure function from arrays to scores."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from edgeprune.errors import ConfigError
from edgeprune.records import LayerShape, ModelDims
from edgeprune.registry import suggest

Array: TypeAlias = npt.NDArray[Any]
T = TypeVar("T")

# the matrices that are cut together; rows of all but o and down, columns of those two
ROLES: Mapping[str, tuple[str, ...]] = {"ffn": ("gate", "up", "down"), "kv": ("q", "k", "v", "o")}
COLUMN_ROLES = frozenset(("o", "down"))


class Need(enum.Enum):
    """A statistic that calibration can collect for one decoder layer; the shape behind each.

    H query heads, K KV heads, g = H/K, dh head size, d hidden, m FFN width, N samples.
    'mean' is over all tokens of all samples unless it says otherwise.
    """

    # forward only
    O_IN_SQUARES = "o_in_squares"  # [H*dh] mean u^2, u the input of o_proj
    O_IN_MEAN = "o_in_mean"  # [H*dh]
    O_IN_VARIANCE = "o_in_variance"  # [H*dh] over tokens, mean u^2 - (mean u)^2
    DOWN_IN_SQUARES = "down_in_squares"  # [m] mean h^2, h the input of down_proj
    DOWN_IN_MEAN = "down_in_mean"  # [m]
    DOWN_IN_VARIANCE = "down_in_variance"  # [m]
    DOWN_IN_ABS = "down_in_abs"  # [m] mean |h|
    DOWN_IN_RELATIVE = "down_in_relative"  # [m] mean h^2 / mean square of the stream at that token
    ATTN_IN_SQUARES = "attn_in_squares"  # [d] input of q, k, v
    FFN_IN_SQUARES = "ffn_in_squares"  # [d] input of gate, up
    HEAD_GRAM = "head_gram"  # [K, g*dh, g*dh] mean u_k' u_k of each KV group
    HEAD_DELTA_ABS = "head_delta_abs"  # [K, d] mean |u_k Wo,k'|
    HEAD_EXACT = "head_exact"  # [K] ||out - out(y - u_k Wo,k')||_F over all tokens, per sqrt(token)
    INV_RMS = "inv_rms"  # [1] mean 1/rms(y), y the input of the FFN norm
    ATTN_OUT_INV_RMS = "attn_out_inv_rms"  # [1] mean 1/rms of what o hands to a norm behind it; else 1
    FFN_OUT_INV_RMS = "ffn_out_inv_rms"  # [1] mean 1/rms of what down hands to a norm behind it; else 1
    GATE_ABS = "gate_abs"  # [m] mean |f(gate)|, f the family's activation
    UP_ABS = "up_abs"  # [m] mean |up|
    OUT_SQUARES = "out_squares"  # [1] mean ||out||^2 of the layer's output
    BLOCK_COSINE = "block_cosine"  # [3] mean cos(in, out): layer, attention block, FFN block

    # gradients of the language-model loss, one row per sample n; role is q, k, v, o, gate, up or down.
    # channels: rows of q, k, v, gate, up; columns of o, down. g_n belongs to sample n's own mean loss.
    SAMPLE_VECTOR = "sample_vector"  # {role: [N, channels]} sum_k g_nk W_k per channel of the unit
    SAMPLE_ELEMENT_ABS = "sample_element_abs"  # {role: [N, channels]} sum_k |g_nk W_k|
    MEAN_ELEMENT_ABS = "mean_element_abs"  # {role: [channels]} sum_k |mean_n g_nk W_k|
    ELEMENT_SECOND = "element_second"  # {role: [channels]} sum_k W_k^2 mean_n g_nk^2
    ELEMENT_MIX = "element_mix"  # {role: [channels]} sum_k |mean_n(g W) - 1/2 mean_n (g W)^2|
    # for the loss summed over a sample's T predicted tokens, divided by T: the square gets the factor T
    ELEMENT_MIX_SUM = "element_mix_sum"  # {role: [channels]} sum_k |mean_n(g W) - T/2 mean_n (g W)^2|
    N_TARGETS = "n_targets"  # [1] T, the same for every layer

    # the loss of R trials in which random units of all layers were masked at once
    MASK_TRIALS = "mask_trials"  # {unit kind: [R, n_units]} 1 where the unit was masked
    MASK_LOSS = "mask_loss"  # [R] increase of the mean loss, the same array for every layer

    @property
    def gradient(self) -> bool:
        """It needs the loss, so `gradients` collects it and not `calibration`."""
        return self in GRADIENT_NEEDS


GRADIENT_NEEDS = frozenset(
    (
        Need.SAMPLE_VECTOR,
        Need.SAMPLE_ELEMENT_ABS,
        Need.MEAN_ELEMENT_ABS,
        Need.ELEMENT_SECOND,
        Need.ELEMENT_MIX,
        Need.ELEMENT_MIX_SUM,
        Need.N_TARGETS,
        Need.MASK_TRIALS,
        Need.MASK_LOSS,
    )
)


class LayerView(Protocol):
    """What a metric sees of one layer: its sizes, its weights by role, its collected statistics."""

    @property
    def dims(self) -> ModelDims: ...
    @property
    def layer(self) -> int: ...
    @property
    def shape(self) -> LayerShape: ...
    @property
    def qk_norm(self) -> bool:
        """Queries and keys are normalised per head, so their signed sums carry no information."""
        ...

    @property
    def query_heads(self) -> bool:
        """Each query head is a KV group of its own here; k and v, which it shares, are zero and stay."""
        ...

    @property
    def post_norms(self) -> bool:
        """Attention and FFN outputs pass a norm before they join the stream."""
        ...

    @property
    def gate_lipschitz(self) -> float:
        """sup |f'| of the activation between gate and up."""
        ...

    def weight(self, role: str) -> Array:
        """[out, in] float32; role: q k v o gate up down, or a norm, as the factor that it multiplies by:
        attn_norm ffn_norm, with post_norms attn_post_norm ffn_post_norm."""
        ...

    def stat(self, need: Need) -> Array: ...
    def role_stat(self, need: Need, role: str) -> Array: ...
    def at(self, layer: int) -> LayerView:
        """Another layer of the same model."""
        ...

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """A value of the whole model, worked out once per scoring run."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A switch of a metric; `origin` says whether the paper, a description of it or we defined it."""

    default: str
    choices: tuple[str, ...]
    help: str
    origin: str  # paper, told, reconstructed


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric. `score` returns one float per unit of the axis, higher = keep, finite.

    Attributes:
        needs: options to the statistics that calibration must collect.
        score: (view, unit kind 'ffn' or 'kv', options, seed) to [n_units].
        poolable: options to whether scores of different layers and kinds share one scale.
    """

    name: str
    summary: str
    reference: str
    needs: Callable[[Mapping[str, str]], frozenset[Need]]
    score: Callable[[LayerView, str, Mapping[str, str], int], Array]
    poolable: Callable[[Mapping[str, str]], bool]
    options: Mapping[str, Option] = field(default_factory=dict)

    def resolve(self, given: Mapping[str, str]) -> dict[str, str]:
        """Fill in defaults. Raises ConfigError naming every unknown switch or value."""
        problems = []
        for name, value in given.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                near = suggest(name, self.options)
                problems.append(f"metric {self.name} has no switch '{name}'{near}; switches: {known}")
            elif value not in self.options[name].choices:
                choices = ", ".join(self.options[name].choices)
                problems.append(f"metric {self.name}: {name}={value} is not one of {choices}")
        if problems:
            raise ConfigError(problems)
        return {name: given.get(name, option.default) for name, option in self.options.items()}


def group_columns(view: LayerView) -> int:
    """Columns of o_proj that one KV group owns: g*dh."""
    return view.shape.n_heads // view.shape.n_kv_heads * view.dims.head_dim


def n_units(view: LayerView, unit: str) -> int:
    return view.shape.n_ff if unit == "ffn" else view.shape.n_kv_heads


def unit_params(view: LayerView, unit: str) -> int:
    """Parameters of one unit, as the graph counts them.

    The planner pools scores divided by this number; a score that is already comparable is multiplied by it.
    """
    dims, shape = view.dims, view.shape
    if unit == "ffn":
        return 3 * dims.hidden + (2 if dims.mlp_bias else 0)
    if view.query_heads:
        return 2 * dims.hidden * dims.head_dim + (dims.head_dim if dims.qkv_bias else 0)
    g = shape.n_heads // shape.n_kv_heads
    return (2 + 2 * g) * dims.hidden * dims.head_dim + ((g + 2) * dims.head_dim if dims.qkv_bias else 0)


def fold(view: LayerView, unit: str, values: Array) -> Array:
    """Sum channels [..., channels] of one role to units [..., n_units], in float64."""
    values = np.asarray(values, dtype=np.float64)
    if unit == "ffn":
        return values
    folded: Array = values.reshape(*values.shape[:-1], view.shape.n_kv_heads, -1).sum(axis=-1)
    return folded


def vector_roles(view: LayerView, unit: str) -> tuple[str, ...]:
    """Roles whose signed sums say something: without q and k where those are normalised."""
    roles = ROLES[unit]
    return tuple(role for role in roles if role not in ("q", "k")) if unit == "kv" and view.qk_norm else roles


def present_units(view: LayerView) -> tuple[str, ...]:
    """Unit kinds that this layer has."""
    return tuple(unit for unit in ROLES if n_units(view, unit))


def sequential_option(default: str, origin: str) -> Option:
    return Option(
        default=default,
        choices=("yes", "no"),
        help="yes: each layer sees the output of the already pruned layers before it; no: of the dense model",
        origin=origin,
    )


def is_sequential(options: Mapping[str, str]) -> bool:
    """Scores have to come from `calibration.score_sequential`, which cuts as it goes."""
    return options.get("sequential") == "yes"
