"""Run calibration tokens through the model layer by layer and collect what a metric asked for.

Only one decoder layer's weights and the activations [N, T, d] are resident. Sums are kept in float64,
so that the split into batches does not show in the scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from edgeprune import checkpoint
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.families.base import ACTIVATION_LIPSCHITZ, Family
from edgeprune.metrics.base import Array, Metric, Need
from edgeprune.progress import Progress, Silent
from edgeprune.records import Axis, LayerShape, ModelDims, ModelGraph

T = TypeVar("T")

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}

# what quantization wants: mean squared input of every matrix
IMATRIX_NEEDS = frozenset(
    (Need.ATTN_IN_SQUARES, Need.O_IN_SQUARES, Need.FFN_IN_SQUARES, Need.DOWN_IN_SQUARES)
)

# a variance comes from two sums
_VARIANCES = {
    Need.O_IN_VARIANCE: (Need.O_IN_SQUARES, Need.O_IN_MEAN),
    Need.DOWN_IN_VARIANCE: (Need.DOWN_IN_SQUARES, Need.DOWN_IN_MEAN),
}


@dataclass(slots=True)
class Collector:
    """Running sums of one layer. Values are turned into means by `finish`."""

    family: Family
    layer: nn.Module
    shape: LayerShape
    dims: ModelDims
    needs: frozenset[Need]
    sums: dict[Need, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    _summed: frozenset[Need] = frozenset()
    _trying: bool = False  # the FFN runs on changed inputs, which are no statistics
    _u: torch.Tensor | None = None  # input of o_proj of this batch
    _y: torch.Tensor | None = None  # stream between attention and FFN of this batch
    _hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = [part for need, pair in _VARIANCES.items() if need in self.needs for part in pair]
        self._summed = self.needs.union(parts)

    def _add(self, need: Need, value: torch.Tensor) -> None:
        value = value.double()
        self.sums[need] = self.sums[need] + value if need in self.sums else value

    def __enter__(self) -> Collector:
        if self.shape.n_kv_heads:
            self._on_input("q", self._attn_in)
            self._on_input("o", self._o_in)
            self._on_inv_rms("o", Need.ATTN_OUT_INV_RMS)
        if self.shape.n_ff:
            self._on_input("ffn_norm", self._norm_in)
            self._on_input("gate", self._ffn_in)
            self._on_input("down", self._down_in)
            self._on_inv_rms("down", Need.FFN_OUT_INV_RMS)
            if Need.GATE_ABS in self.needs:
                f = _ACTIVATIONS[self.family.activation]
                self._on_output("gate", lambda z: self._mean(Need.GATE_ABS, f(z).abs()))
            if Need.UP_ABS in self.needs:
                self._on_output("up", lambda z: self._mean(Need.UP_ABS, z.abs()))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _module(self, role: str) -> nn.Module:
        return checkpoint.role_module(self.layer, self.family, role)

    def _on_input(self, role: str, see: Callable[[torch.Tensor], None]) -> None:
        self._hooks.append(
            self._module(role).register_forward_pre_hook(
                lambda _, args: None if self._trying else see(args[0])
            )
        )

    def _on_output(self, role: str, see: Callable[[torch.Tensor], None]) -> None:
        self._hooks.append(
            self._module(role).register_forward_hook(lambda _, __, out: None if self._trying else see(out))
        )

    def _on_inv_rms(self, role: str, need: Need) -> None:
        """Mean 1/rms of a matrix's output where a norm follows it; one where none does."""

        def see(z: torch.Tensor) -> None:
            if not self.family.post_norms:
                self._add(need, z.new_full((1,), z.numel() // z.shape[-1]))
                return
            rms = (z.double().square().mean(dim=-1) + self.dims.rms_eps).sqrt()
            self._add(need, (1.0 / rms).sum().reshape(1))

        if need in self.needs:
            self._on_output(role, see)

    def _mean(self, need: Need, value: torch.Tensor) -> None:
        if need in self._summed:
            self._add(need, value.flatten(0, -2).sum(dim=0, dtype=torch.float64))

    def _attn_in(self, x: torch.Tensor) -> None:
        self._mean(Need.ATTN_IN_SQUARES, x.square())

    def _ffn_in(self, x: torch.Tensor) -> None:
        self._mean(Need.FFN_IN_SQUARES, x.square())

    def _down_in(self, h: torch.Tensor) -> None:
        self._mean(Need.DOWN_IN_SQUARES, h.square())
        self._mean(Need.DOWN_IN_MEAN, h)
        self._mean(Need.DOWN_IN_ABS, h.abs())
        if Need.DOWN_IN_RELATIVE in self.needs:
            assert self._y is not None
            size = self._y.float().square().mean(dim=-1, keepdim=True) + self.dims.rms_eps
            self._mean(Need.DOWN_IN_RELATIVE, h.square() / size)

    def _norm_in(self, y: torch.Tensor) -> None:
        self._y = y.detach()
        if Need.INV_RMS in self.needs:
            rms = (y.double().square().mean(dim=-1) + self.dims.rms_eps).sqrt()
            self._add(Need.INV_RMS, (1.0 / rms).sum().reshape(1))

    def _o_in(self, u: torch.Tensor) -> None:
        self._u = u.detach()
        self._mean(Need.O_IN_SQUARES, u.square())
        self._mean(Need.O_IN_MEAN, u)
        if not self.needs & {Need.HEAD_GRAM, Need.HEAD_DELTA_ABS}:
            return
        n = self.shape.n_kv_heads
        per_group = u.reshape(-1, n, u.shape[-1] // n).transpose(0, 1)  # [K, tokens, g*dh]
        if Need.HEAD_GRAM in self.needs:
            self._add(Need.HEAD_GRAM, per_group.transpose(1, 2) @ per_group)
        if Need.HEAD_DELTA_ABS in self.needs:
            sums = [delta.abs().sum(dim=0, dtype=torch.float64) for delta in self._group_deltas(u)]
            self._add(Need.HEAD_DELTA_ABS, torch.stack(sums))

    def _group_deltas(self, u: torch.Tensor) -> list[torch.Tensor]:
        """u_k Wo,k' of every KV group, each [tokens, d]; computed one after the other."""
        n = self.shape.n_kv_heads
        o: torch.Tensor = self._module("o").weight  # type: ignore[assignment]
        width = o.shape[1] // n
        flat = u.flatten(0, -2)
        return [flat[:, k * width : (k + 1) * width] @ o[:, k * width : (k + 1) * width].T for k in range(n)]

    def after(self, before: torch.Tensor, out: torch.Tensor) -> None:
        """Look at one batch once the layer has run: `before` and `out` are [n, T, d]."""
        self.tokens += before.shape[0] * before.shape[1]
        if Need.OUT_SQUARES in self.needs:
            self._add(Need.OUT_SQUARES, out.double().square().sum().reshape(1))
        if Need.BLOCK_COSINE in self.needs:
            middle = self._y if self._y is not None else out
            pairs = ((before, out), (before, middle), (middle, out))
            cosines = [
                nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).sum() for a, b in pairs
            ]
            self._add(Need.BLOCK_COSINE, torch.stack(cosines))
        if Need.HEAD_EXACT in self.needs and self.shape.n_kv_heads:
            self._add(Need.HEAD_EXACT, self._exact(out))

    def _exact(self, out: torch.Tensor) -> torch.Tensor:
        """Squared change of the block's output for each removed KV group; one FFN pass per group."""
        assert self._u is not None
        if self._y is None:  # no FFN in this layer: the change reaches the output as it is
            return torch.stack([d.double().square().sum() for d in self._moves()])
        norm, mlp = self._module("ffn_norm"), self.layer.mlp
        after_mlp = self._module("ffn_post_norm") if self.family.post_norms else nn.Identity()
        y = self._y.flatten(0, -2)
        flat_out = out.flatten(0, -2)
        changes = []
        self._trying = True
        for delta in self._moves():
            moved = y - delta
            through = after_mlp(mlp(norm(moved)))  # type: ignore[operator]
            changes.append((moved + through - flat_out).double().square().sum())
        self._trying = False
        return torch.stack(changes)

    def _moves(self) -> list[torch.Tensor]:
        """What each KV group's removal takes from the stream, [tokens, d]."""
        assert self._u is not None
        deltas = self._group_deltas(self._u)
        if not self.family.post_norms:
            return deltas
        norm = self._module("attn_post_norm")
        o = self._module("o")
        whole = self._u.flatten(0, -2) @ o.weight.T  # type: ignore[operator, union-attr]
        if o.bias is not None:
            whole = whole + o.bias
        normed = norm(whole)
        return [normed - norm(whole - delta) for delta in deltas]

    def finish(self) -> dict[Need, np.ndarray]:
        """Means over tokens as float32 arrays; HEAD_EXACT as a root mean square."""
        out = {}
        means = {need: total / self.tokens for need, total in self.sums.items()}
        for need, (squares, mean) in _VARIANCES.items():
            if need in self.needs and squares in means:
                means[need] = (means[squares] - means[mean].square()).clamp_min(0.0)
        for need, value in means.items():
            if need in self.needs:
                value = value.sqrt() if need is Need.HEAD_EXACT else value
                out[need] = value.to(torch.float32).cpu().numpy()
        return out


def has_query_heads(graph: ModelGraph) -> bool:
    """Single query heads are units of this graph."""
    return any(axis.unit == "q" for axis in graph.axes)


def as_heads(shape: LayerShape) -> LayerShape:
    """The layer with every query head as a KV group of its own: what statistics per head are made of."""
    return dataclasses.replace(shape, n_kv_heads=shape.n_heads)


@dataclass(slots=True)
class View:
    """LayerView over collected arrays and lazily read weights."""

    family: Family
    dims: ModelDims
    layer: int
    source: checkpoint.Source
    arrays: Mapping[str, np.ndarray]
    heads: bool = False  # single query heads are scored
    _weights: dict[str, Array] = field(default_factory=dict)
    _shared: dict[str, Any] = field(default_factory=dict)  # one for all layers of a scoring run

    @property
    def qk_norm(self) -> bool:
        return self.family.qk_norm

    @property
    def post_norms(self) -> bool:
        return self.family.post_norms

    @property
    def gate_lipschitz(self) -> float:
        return ACTIVATION_LIPSCHITZ[self.family.activation]

    def at(self, layer: int) -> View:
        return View(self.family, self.dims, layer, self.source, self.arrays, self.heads, {}, self._shared)

    def shared(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._shared:
            self._shared[name] = make()
        value: T = self._shared[name]
        return value

    @property
    def shape(self) -> LayerShape:
        return as_heads(self.dims.layers[self.layer]) if self.heads else self.dims.layers[self.layer]

    @property
    def query_heads(self) -> bool:
        shape = self.dims.layers[self.layer]
        return self.heads and shape.n_heads != shape.n_kv_heads

    def weight(self, role: str) -> Array:
        if self.query_heads and role in ("k", "v"):
            return np.zeros((self.shape.n_heads * self.dims.head_dim, self.dims.hidden), np.float32)
        if role not in self._weights:
            tensor = checkpoint.role_tensor(self.source, self.family, self.dims, role, self.layer)
            values = checkpoint.to_float32(tensor)
            if role.endswith("norm") and self.family.norm_offset:
                values = values + np.float32(self.family.norm_offset)
            self._weights[role] = values
        return self._weights[role]

    def stat(self, need: Need) -> Array:
        return self.arrays[f"layers.{self.layer}.{need.value}"]

    def role_stat(self, need: Need, role: str) -> Array:
        if self.query_heads and role in ("k", "v"):
            return np.zeros_like(self.role_stat(need, "q"))
        return self.arrays[f"layers.{self.layer}.{need.value}.{role}"]


def collect(
    source: checkpoint.Source,
    graph: ModelGraph,
    tokens: np.ndarray,
    needs: frozenset[Need],
    *,
    batch_tokens: int = 2048,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Collect forward statistics. `tokens` is [N, T] int; returns 'layers.<l>.<need>' to float32 arrays.

    Raises ConfigError when a weight or an activation is not finite.
    """
    if any(need.gradient for need in needs):
        raise ConfigError("this metric needs gradients, which forward calibration does not collect")
    arrays: dict[str, np.ndarray] = {}
    with torch.inference_mode(), (progress or Silent()).stage("calibrate", len(graph.dims.layers)) as bar:
        walk = _Walk(source, graph, tokens, needs, batch_tokens, device)
        for index in range(len(graph.dims.layers)):
            with checkpoint.resident_layer(walk.model, index, source, device=device) as layer:
                arrays |= walk.collect(index, layer)
            walk.check(index)
            bar.advance()
    return arrays


class _Walk:
    """The stream [N, T, d] on its way through the layers of a model, one at a time."""

    def __init__(
        self,
        source: checkpoint.Source,
        graph: ModelGraph,
        tokens: np.ndarray,
        needs: frozenset[Need],
        batch_tokens: int,
        device: str,
    ) -> None:
        self.dims = dims = graph.dims
        self.family = graphs.find_family(dims.family)
        self.heads = has_query_heads(graph)
        self.needs = needs
        self.model = checkpoint.skeleton(source.config, dims, split=True)
        ids = torch.from_numpy(np.ascontiguousarray(tokens)).long()
        self._layers = checkpoint.Stream(self.model, dims, tokens.shape[1], device)
        self.stream = self._layers.embed(source, ids)
        self._source = source
        self._batch = max(1, batch_tokens // tokens.shape[1])

    def _batches(self) -> list[slice]:
        return [slice(start, start + self._batch) for start in range(0, len(self.stream), self._batch)]

    def collect(self, index: int, layer: nn.Module, *, move: bool = True) -> dict[str, np.ndarray]:
        """Statistics of one layer; with `move` the stream becomes the layer's output."""
        shape = self.dims.layers[index]
        shape = as_heads(shape) if self.heads else shape
        with Collector(self.family, layer, shape, self.dims, self.needs) as collector:
            for part in self._batches():
                before = self.stream[part].clone()
                out = self._layers.run(index, layer, before)
                collector.after(before, out)
                if move:
                    self.stream[part] = out
        return {f"layers.{index}.{need.value}": value for need, value in collector.finish().items()}

    def move(self, index: int, layer: nn.Module) -> None:
        for part in self._batches():
            self.stream[part] = self._layers.run(index, layer, self.stream[part].clone())

    def check(self, index: int) -> None:
        """Raises ConfigError when the stream is not finite. Drops file pages that were read so far."""
        if not bool(torch.isfinite(self.stream).all()):
            raise ConfigError(f"activations of layer {index} are not finite", "the checkpoint is damaged")
        self._source.close()


def forward(
    source: checkpoint.Source, dims: ModelDims, tokens: np.ndarray, *, device: str = "cpu"
) -> np.ndarray:
    """Logits [N, T, vocab] float32 of token windows [N, T], with one layer's weights resident at a time."""
    family = graphs.find_family(dims.family)
    model = checkpoint.skeleton(source.config, dims)
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    ids = torch.from_numpy(np.ascontiguousarray(tokens)).long()
    with torch.inference_mode():
        layers = checkpoint.Stream(model, dims, ids.shape[1], device)
        stream = layers.embed(source, ids)
        for index in range(len(dims.layers)):
            with checkpoint.resident_layer(model, index, source, device=device) as layer:
                stream = layers.run(index, layer, stream)
        checkpoint.fill_(decoder.norm, family.roles["final_norm"] + ".", source, torch.float32, device)
        stream = decoder.norm(stream)
        head = source.tensor(family.tensor("embed" if dims.tied else "head"))
        logits = stream @ head.to(device=device, dtype=torch.float32).T
    return logits.cpu().numpy()


def score(
    metric: Metric,
    options: Mapping[str, str],
    source: checkpoint.Source,
    graph: ModelGraph,
    arrays: Mapping[str, np.ndarray],
    *,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Scores of every axis, [n_units] float32. Raises ConfigError when a score is not finite."""
    family = graphs.find_family(graph.dims.family)
    out: dict[str, np.ndarray] = {}
    by_layer = _axes_by_layer(graph)
    shared: dict[str, Any] = {}
    with (progress or Silent()).stage(f"score {metric.name}", len(by_layer)) as bar:
        for layer, axes in by_layer.items():
            view = View(family, graph.dims, layer, source, arrays, has_query_heads(graph), {}, shared)
            for axis in axes:
                out[axis.name] = _axis_scores(metric, options, view, axis, seed)
            source.close()
            bar.advance()
    return out


def _axes_by_layer(graph: ModelGraph) -> dict[int, list[Axis]]:
    by_layer: dict[int, list[Axis]] = {}
    for axis in graph.axes:
        by_layer.setdefault(axis.layer, []).append(axis)
    return by_layer


def _axis_scores(metric: Metric, options: Mapping[str, str], view: View, axis: Axis, seed: int) -> np.ndarray:
    unit = "kv" if axis.unit == "q" else axis.unit  # the view shows each query head as a group
    values = np.asarray(metric.score(view, unit, options, seed), dtype=np.float32)
    if values.shape != (axis.n_units,) or not np.isfinite(values).all():
        raise ConfigError(f"metric {metric.name} gave unusable scores for {axis.name}")
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequential:
    """What a pass that scores and cuts layer after layer found."""

    scores: dict[str, np.ndarray]  # axis -> [n_units]
    kept: dict[str, tuple[int, ...]]  # only axes that lost some
    arrays: dict[str, np.ndarray]  # as `collect`, from pruned inputs


def score_sequential(
    metric: Metric,
    options: Mapping[str, str],
    source: checkpoint.Source,
    graph: ModelGraph,
    windows: np.ndarray,
    widths_of: Callable[[Axis, np.ndarray], Sequence[int]],
    *,
    seed: int,
    also: frozenset[Need] = frozenset(),
    batch_tokens: int = 2048,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Sequential:
    """Score a layer on the output of the pruned layers before it, cut it, go on.

    `widths_of` turns an axis and its scores into the indices to keep; `also` are further statistics to
    collect. Raises ConfigError when the metric needs gradients, which have no such order.
    """
    needs = metric.needs(options) | also
    if any(need.gradient for need in needs):
        raise ConfigError(f"metric {metric.name} needs gradients, so it cannot score layer after layer")
    found = Sequential(scores={}, kept={}, arrays={})
    by_layer = _axes_by_layer(graph)
    shared: dict[str, Any] = {}
    stage = (progress or Silent()).stage(f"score {metric.name}", len(graph.dims.layers))
    with torch.inference_mode(), stage as bar:
        walk = _Walk(source, graph, windows, needs, batch_tokens, device)
        for index in range(len(graph.dims.layers)):
            with checkpoint.resident_layer(walk.model, index, source, device=device) as layer:
                found.arrays.update(walk.collect(index, layer, move=False))
                view = View(walk.family, graph.dims, index, source, found.arrays, walk.heads, {}, shared)
                for axis in by_layer.get(index, ()):
                    scores = _axis_scores(metric, options, view, axis, seed)
                    found.scores[axis.name] = scores
                    kept = tuple(sorted(int(i) for i in widths_of(axis, scores)))
                    if len(kept) < axis.n_units:
                        found.kept[axis.name] = kept
                        _silence_(layer, index, axis, kept)
                walk.move(index, layer)
            walk.check(index)
            bar.advance()
    return found


def _silence_(layer: nn.Module, index: int, axis: Axis, kept: Sequence[int]) -> None:
    """Zero the output columns of the units that leave: the layer's output is that of the cut layer."""
    gone = np.setdiff1d(np.arange(axis.n_units), np.asarray(kept, dtype=np.int64))
    prefix = f"model.layers.{index}."
    for part in axis.slices:
        if part.dim != 1:
            continue
        columns = (part.offset + gone[:, None] * part.block + np.arange(part.block)).reshape(-1)
        owner, _, leaf = part.tensor.removeprefix(prefix).rpartition(".")
        module = layer.get_submodule(owner)
        # a copy: the parameter may be the mapped file itself
        weight = getattr(module, leaf).clone()
        weight[:, torch.from_numpy(columns).to(weight.device)] = 0
        setattr(module, leaf, nn.Parameter(weight, requires_grad=False))


def imatrix(
    arrays: Mapping[str, np.ndarray], graph: ModelGraph, kept: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Mean squared inputs of the pruned model's matrices, 'layers.<l>.<input>' to [columns].

    Inputs: attn_in, o_in, ffn_in, down_in. Taken from the dense model's calibration and cut along.
    """
    out: dict[str, np.ndarray] = {}
    for layer, shape in enumerate(graph.dims.layers):
        prefix = f"layers.{layer}."
        for name, need in (("attn_in", Need.ATTN_IN_SQUARES), ("ffn_in", Need.FFN_IN_SQUARES)):
            if f"{prefix}{need.value}" in arrays:
                out[prefix + name] = arrays[f"{prefix}{need.value}"]
        o_in = arrays.get(f"{prefix}{Need.O_IN_SQUARES.value}")
        if o_in is not None:
            heads = kept.get(f"{prefix}q")
            units = kept.get(f"{prefix}kv") if heads is None else heads
            per_group = o_in.reshape(shape.n_kv_heads if heads is None else shape.n_heads, -1)
            out[prefix + "o_in"] = (per_group if units is None else per_group[list(units)]).reshape(-1)
        down_in = arrays.get(f"{prefix}{Need.DOWN_IN_SQUARES.value}")
        if down_in is not None:
            units = kept.get(f"{prefix}ffn")
            out[prefix + "down_in"] = down_in if units is None else down_in[list(units)]
    return out
