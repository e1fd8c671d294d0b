"""Run calibration tokens through the model layer by layer and collect what a metric asked for.

Only one decoder layer's weights and the activations [N, T, d] are resident. Sums are kept in float64,
so that the split into batches does not show in the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune import checkpoint
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.families.base import Family
from edgeprune.metrics.base import Array, Metric, Need
from edgeprune.records import LayerShape, ModelDims, ModelGraph
from edgeprune.progress import Progress, Silent

# what quantization wants: mean squared input of every matrix
IMATRIX_NEEDS = frozenset(
    (Need.ATTN_IN_SQUARES, Need.O_IN_SQUARES, Need.FFN_IN_SQUARES, Need.DOWN_IN_SQUARES)
)


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
    _u: torch.Tensor | None = None  # input of o_proj of this batch
    _y: torch.Tensor | None = None  # stream between attention and FFN of this batch
    _hooks: list[Any] = field(default_factory=list)

    def _add(self, need: Need, value: torch.Tensor) -> None:
        value = value.double()
        self.sums[need] = self.sums[need] + value if need in self.sums else value

    def __enter__(self) -> Collector:
        if self.shape.n_kv_heads:
            self._on_input("q", self._attn_in)
            self._on_input("o", self._o_in)
        if self.shape.n_ff:
            self._on_input("ffn_norm", self._norm_in)
            self._on_input("gate", self._ffn_in)
            self._on_input("down", self._down_in)
            if Need.GATE_ABS in self.needs:
                self._on_output("gate", lambda z: self._mean(Need.GATE_ABS, nn.functional.silu(z).abs()))
            if Need.UP_ABS in self.needs:
                self._on_output("up", lambda z: self._mean(Need.UP_ABS, z.abs()))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _module(self, role: str) -> nn.Module:
        return checkpoint.role_module(self.layer, self.family, role)

    def _on_input(self, role: str, see: Callable[[torch.Tensor], None]) -> None:
        self._hooks.append(self._module(role).register_forward_pre_hook(lambda _, args: see(args[0])))

    def _on_output(self, role: str, see: Callable[[torch.Tensor], None]) -> None:
        self._hooks.append(self._module(role).register_forward_hook(lambda _, __, out: see(out)))

    def _mean(self, need: Need, value: torch.Tensor) -> None:
        if need in self.needs:
            self._add(need, value.flatten(0, -2).sum(dim=0, dtype=torch.float64))

    def _attn_in(self, x: torch.Tensor) -> None:
        self._mean(Need.ATTN_IN_SQUARES, x.square())

    def _ffn_in(self, x: torch.Tensor) -> None:
        self._mean(Need.FFN_IN_SQUARES, x.square())

    def _down_in(self, h: torch.Tensor) -> None:
        self._mean(Need.DOWN_IN_SQUARES, h.square())
        self._mean(Need.DOWN_IN_MEAN, h)
        self._mean(Need.DOWN_IN_ABS, h.abs())

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
            return torch.stack([d.double().square().sum() for d in self._group_deltas(self._u)])
        norm, mlp = self._module("ffn_norm"), self.layer.mlp
        y = self._y.flatten(0, -2)
        flat_out = out.flatten(0, -2)
        changes = []
        for delta in self._group_deltas(self._u):
            moved = y - delta
            changes.append((moved + mlp(norm(moved)) - flat_out).double().square().sum())  # type: ignore[operator]
        return torch.stack(changes)

    def finish(self) -> dict[Need, np.ndarray]:
        """Means over tokens as float32 arrays; HEAD_EXACT as a root mean square."""
        out = {}
        for need, total in self.sums.items():
            mean = total / self.tokens
            if need is Need.HEAD_EXACT:
                mean = mean.sqrt()
            out[need] = mean.to(torch.float32).cpu().numpy()
        return out


@dataclass(slots=True)
class View:
    """LayerView over collected arrays and lazily read weights."""

    family: Family
    dims: ModelDims
    layer: int
    source: checkpoint.Source
    arrays: Mapping[str, np.ndarray]
    _weights: dict[str, Array] = field(default_factory=dict)

    @property
    def shape(self) -> LayerShape:
        return self.dims.layers[self.layer]

    def weight(self, role: str) -> Array:
        if role not in self._weights:
            tensor = self.source.tensor(self.family.tensor(role, self.layer))
            self._weights[role] = checkpoint.to_float32(tensor)
        return self._weights[role]

    def stat(self, need: Need) -> Array:
        return self.arrays[f"layers.{self.layer}.{need.value}"]

    def role_stat(self, need: Need, role: str) -> Array:
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
    family = graphs.find_family(graph.dims.family)
    model = checkpoint.skeleton(source.config, graph.dims)
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    n, length = tokens.shape
    batch = max(1, batch_tokens // length)
    arrays: dict[str, np.ndarray] = {}
    ids = torch.from_numpy(np.ascontiguousarray(tokens)).long()
    with torch.inference_mode(), (progress or Silent()).stage("calibrate", len(graph.dims.layers)) as bar:
        embed = source.tensor(family.tensor("embed"))
        stream = embed[ids].to(device=device, dtype=torch.float32)  # [N, T, d]
        del embed
        positions = torch.arange(length, device=device)[None]
        rotary = decoder.rotary_emb(stream[:1], position_ids=positions)
        for index, shape in enumerate(graph.dims.layers):
            with checkpoint.resident_layer(model, index, source, device=device) as layer:
                with Collector(family, layer, shape, graph.dims, needs) as collector:
                    for start in range(0, n, batch):
                        before = stream[start : start + batch].clone()
                        out = layer(
                            before, attention_mask=None, position_ids=positions, position_embeddings=rotary
                        )
                        collector.after(before, out)
                        stream[start : start + batch] = out
            for need, value in collector.finish().items():
                arrays[f"layers.{index}.{need.value}"] = value
            if not bool(torch.isfinite(stream).all()):
                raise ConfigError(f"activations of layer {index} are not finite", "the checkpoint is damaged")
            bar.advance()
    return arrays


def forward(
    source: checkpoint.Source, dims: ModelDims, tokens: np.ndarray, *, device: str = "cpu"
) -> np.ndarray:
    """Logits [N, T, vocab] float32 of token windows [N, T], with one layer's weights resident at a time."""
    family = graphs.find_family(dims.family)
    model = checkpoint.skeleton(source.config, dims)
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    ids = torch.from_numpy(np.ascontiguousarray(tokens)).long()
    with torch.inference_mode():
        embed = source.tensor(family.tensor("embed"))
        stream = embed[ids].to(device=device, dtype=torch.float32)
        positions = torch.arange(ids.shape[1], device=device)[None]
        rotary = decoder.rotary_emb(stream[:1], position_ids=positions)
        for index in range(len(dims.layers)):
            with checkpoint.resident_layer(model, index, source, device=device) as layer:
                stream = layer(
                    stream, attention_mask=None, position_ids=positions, position_embeddings=rotary
                )
        checkpoint.fill_(decoder.norm, family.roles["final_norm"] + ".", source, torch.float32, device)
        stream = decoder.norm(stream)
        head = embed if dims.tied else source.tensor(family.tensor("head"))
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
    by_layer: dict[int, list[Any]] = {}
    for axis in graph.axes:
        by_layer.setdefault(axis.layer, []).append(axis)
    with (progress or Silent()).stage(f"score {metric.name}", len(by_layer)) as bar:
        for layer, axes in by_layer.items():
            view = View(family, graph.dims, layer, source, arrays)
            for axis in axes:
                values = np.asarray(metric.score(view, axis.unit, options, seed), dtype=np.float32)
                if values.shape != (axis.n_units,) or not np.isfinite(values).all():
                    raise ConfigError(f"metric {metric.name} gave unusable scores for {axis.name}")
                out[axis.name] = values
            bar.advance()
    return out


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
            units = kept.get(f"{prefix}kv")
            per_group = o_in.reshape(shape.n_kv_heads, -1)
            out[prefix + "o_in"] = (per_group if units is None else per_group[list(units)]).reshape(-1)
        down_in = arrays.get(f"{prefix}{Need.DOWN_IN_SQUARES.value}")
        if down_in is not None:
            units = kept.get(f"{prefix}ffn")
            out[prefix + "down_in"] = down_in if units is None else down_in[list(units)]
    return out
