"""Statistics of the language-model loss's gradient, layer by layer, with one layer's weights resident.

Forward keeps only the input of every layer; backward runs one layer again under autograd, for activation
gradients alone. Signed sums need no weight gradient: for row c of W in y = W x,
sum_k g_nk W_ck = sum_t dL/dy_tc (y_tc - b_c), and for column c of o or down it is sum_t x_tc dL/dx_tc
through that matrix. Where single weights count, the gradient of one matrix and one sample is made,
folded to its channels and dropped; at most one weight-sized buffer per matrix of the layer stays.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune import checkpoint
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.families.base import Family
from edgeprune.metrics.base import COLUMN_ROLES, ROLES, Need
from edgeprune.progress import Progress, Silent
from edgeprune.records import Axis, LayerShape, ModelDims, ModelGraph

# layer inputs beyond this go to an unnamed file on disk
MOST_KEPT_BYTES = 192 << 20
# FFN outputs are kept from the forward pass for the backward one while all of them fit
MOST_REUSED_BYTES = 576 << 20
_LOGIT_BYTES = 16 << 20

MASK_TRIALS = 24
_MASK_SHARE = 0.3  # most of an axis that one trial masks

_PER_SAMPLE = frozenset(
    (Need.SAMPLE_ELEMENT_ABS, Need.ELEMENT_SECOND, Need.ELEMENT_MIX, Need.ELEMENT_MIX_SUM)
)
_MASKED = frozenset((Need.MASK_TRIALS, Need.MASK_LOSS))


class _Kept:
    """The input [N, T, d] of every layer: in memory while they are few, beyond that on disk."""

    def __init__(self, n_layers: int, like: torch.Tensor) -> None:
        self._bytes = like.numel() * 4
        self._shape = like.shape
        self._held: dict[int, torch.Tensor] = {}
        spill = self._bytes * n_layers > MOST_KEPT_BYTES
        self._file = tempfile.TemporaryFile() if spill else None  # noqa: SIM115 - closed by `close`

    def put(self, index: int, stream: torch.Tensor) -> None:
        if self._file is None:
            self._held[index] = stream.clone()
            return
        self._file.seek(index * self._bytes)
        stream.cpu().numpy().tofile(self._file)

    def take(self, index: int, device: str) -> torch.Tensor:
        if self._file is None:
            return self._held.pop(index)
        self._file.seek(index * self._bytes)
        flat = np.fromfile(self._file, dtype=np.float32, count=self._bytes // 4)
        return torch.from_numpy(flat).reshape(self._shape).to(device)

    def close(self) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()


class _Known(torch.autograd.Function):
    """A matrix whose output is known already: forward costs nothing, backward is the usual one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return dy @ weight, None, None


class _Reused:
    """Outputs of gate, up and down from the forward pass, so that backward need not make them again."""

    def __init__(self, family: Family, dims: ModelDims, tokens: int) -> None:
        self._family, self._dims = family, dims
        wanted = sum(2 * shape.n_ff + dims.hidden for shape in dims.layers if shape.n_ff)
        self._worth = 4 * wanted * tokens <= MOST_REUSED_BYTES
        self._held: dict[int, dict[str, list[torch.Tensor]]] = {}

    @contextlib.contextmanager
    def record(self, index: int, layer: nn.Module) -> Iterator[None]:
        if not self._worth or not self._dims.layers[index].n_ff:
            yield
            return
        held = self._held[index] = {role: [] for role in ROLES["ffn"]}
        hooks = [
            checkpoint.role_module(layer, self._family, role).register_forward_hook(
                lambda _, __, out, parts=parts: parts.append(out)
            )
            for role, parts in held.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def replay(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Batches have to come in the order in which they were recorded."""
        modules = []
        for role, parts in self._held.pop(index, {}).items():
            module = checkpoint.role_module(layer, self._family, role)
            queue = iter(parts)
            module.forward = lambda x, module=module, queue=queue: _Known.apply(  # type: ignore[method-assign]
                x, module.weight, next(queue)
            )
            modules.append(module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


@dataclass(slots=True)
class _Tap:
    """Input and output of one matrix in one batch, as autograd sees them."""

    x: torch.Tensor | None = None  # [n, T, in]
    y: torch.Tensor | None = None  # [n, T, out]


@dataclass(slots=True)
class _LayerSums:
    """What one layer's backward pass adds up over batches."""

    family: Family
    layer: nn.Module
    needs: frozenset[Need]
    n_samples: int
    n_targets: int
    rows: dict[tuple[Need, str], list[torch.Tensor]] = field(default_factory=dict)  # per batch [n, channels]
    sums: dict[tuple[Need, str], torch.Tensor] = field(default_factory=dict)  # [channels] float64
    weights: dict[tuple[Need, str], torch.Tensor] = field(default_factory=dict)  # [out, in]

    def add(self, role: str, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor) -> None:
        """x, dx [n, T, in] and y, dy [n, T, out] of one batch; dx is only that through this matrix."""
        module = checkpoint.role_module(self.layer, self.family, role)
        column = role in COLUMN_ROLES
        if Need.SAMPLE_VECTOR in self.needs:
            bias = getattr(module, "bias", None)
            product = x * dx if column else dy * (y if bias is None else y - bias)
            self.rows.setdefault((Need.SAMPLE_VECTOR, role), []).append(
                product.sum(dim=1, dtype=torch.float64)
            )
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        over = 0 if column else 1
        if self.needs & _PER_SAMPLE:
            self._per_sample(role, weight, x, dy, over)
        elif Need.MEAN_ELEMENT_ABS in self.needs:
            total = self._buffer(Need.MEAN_ELEMENT_ABS, role, weight)
            total.addmm_(dy.flatten(0, 1).T, x.flatten(0, 1))

    def _buffer(self, need: Need, role: str, weight: torch.Tensor) -> torch.Tensor:
        key = (need, role)
        if key not in self.weights:
            self.weights[key] = torch.zeros_like(weight)
        return self.weights[key]

    def _per_sample(
        self, role: str, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, over: int
    ) -> None:
        taken = []
        for n in range(x.shape[0]):
            product = (dy[n].T @ x[n]).mul_(weight)  # g_n W of this matrix and sample, [out, in]
            if Need.SAMPLE_ELEMENT_ABS in self.needs:
                taken.append(torch.linalg.vector_norm(product, ord=1, dim=over).double())
            if Need.MEAN_ELEMENT_ABS in self.needs:
                self._buffer(Need.MEAN_ELEMENT_ABS, role, weight).add_(product)
            for need, factor in ((Need.ELEMENT_MIX, 1), (Need.ELEMENT_MIX_SUM, self.n_targets)):
                if need in self.needs:
                    # the mean of gW - (gW)^2 / 2 needs one buffer where two means would need two
                    buffer = self._buffer(need, role, weight)
                    buffer.add_(product).addcmul_(product, product, value=-0.5 * factor)
            if Need.ELEMENT_SECOND in self.needs:
                second = product.square_().sum(dim=over).double()
                key = (Need.ELEMENT_SECOND, role)
                self.sums[key] = self.sums[key] + second if key in self.sums else second
        if taken:
            self.rows.setdefault((Need.SAMPLE_ELEMENT_ABS, role), []).append(torch.stack(taken))

    def finish(self, index: int) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}

        def put(need: Need, role: str, value: torch.Tensor) -> None:
            out[f"layers.{index}.{need.value}.{role}"] = value.to(torch.float32).cpu().numpy()

        for (need, role), parts in self.rows.items():
            put(need, role, torch.cat(parts))
        for (need, role), total in self.sums.items():
            put(need, role, total / self.n_samples)
        for (need, role), total in self.weights.items():
            over = 0 if role in COLUMN_ROLES else 1
            if need is Need.MEAN_ELEMENT_ABS and not self.needs & _PER_SAMPLE:
                weight: torch.Tensor = checkpoint.role_module(self.layer, self.family, role).weight  # type: ignore[assignment]
                total.mul_(weight)
            put(need, role, torch.linalg.vector_norm(total, ord=1, dim=over).double() / self.n_samples)
        self.weights.clear()
        return out


class _Model:
    """The pieces of a streamed model that both directions share."""

    def __init__(
        self, source: checkpoint.Source, dims: ModelDims, windows: np.ndarray, batch_tokens: int, device: str
    ) -> None:
        self.source, self.dims, self.device = source, dims, device
        self.family = graphs.find_family(dims.family)
        self.skeleton = checkpoint.skeleton(source.config, dims, split=True)
        self.decoder: Any = self.skeleton.get_decoder()  # type: ignore[operator]
        self.ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
        self.batch = max(1, batch_tokens // windows.shape[1])
        self._layers = checkpoint.Stream(self.skeleton, dims, windows.shape[1], device)

    def embed(self) -> torch.Tensor:
        """[N, T, d] float32."""
        return self._layers.embed(self.source, self.ids)

    def batches(self) -> list[slice]:
        return [slice(start, start + self.batch) for start in range(0, len(self.ids), self.batch)]

    def run(self, index: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self._layers.run(index, layer, x)

    def resident(self, index: int) -> Any:
        return checkpoint.resident_layer(self.skeleton, index, self.source, device=self.device)

    def unmap(self) -> None:
        # pages of mapped shards count as resident until the map goes
        self.source.close()

    def top_(self, stream: torch.Tensor, *, gradient: bool) -> torch.Tensor:
        """Mean loss of every sample, [N] float64. With `gradient`, `stream` becomes dloss_n/dstream.

        Logits exist for a few tokens at a time, so that a large vocabulary costs no memory.
        """
        prefix = self.family.roles["final_norm"] + "."
        checkpoint.fill_(self.decoder.norm, prefix, self.source, torch.float32, self.device)
        role = "embed" if self.dims.tied else "head"
        head = self.source.tensor(self.family.tensor(role)).to(device=self.device, dtype=torch.float32)
        rows = max(1, _LOGIT_BYTES // (4 * head.shape[0]))
        losses = torch.zeros(len(self.ids), dtype=torch.float64)
        n_targets = self.ids.shape[1] - 1
        for n in range(len(self.ids)):
            targets = self.ids[n, 1:].to(self.device)
            x = stream[n : n + 1, :-1].detach().clone().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                normed = self.decoder.norm(x)
            slope = torch.empty_like(normed[0])
            for start in range(0, n_targets, rows):
                some = slice(start, start + rows)
                logits = normed.detach()[0, some] @ head.T
                wanted = targets[some, None]
                total = logits.logsumexp(dim=-1, keepdim=True)
                losses[n] += float((total - logits.gather(1, wanted)).double().sum())
                if gradient:
                    chance = logits.sub_(total).exp_()  # the softmax, in place
                    chance.scatter_add_(1, wanted, chance.new_full(wanted.shape, -1.0))
                    slope[some] = (chance @ head) / n_targets
            if gradient:
                stream[n, :-1] = torch.autograd.grad(normed, x, slope[None])[0][0]
                stream[n, -1] = 0
        losses /= n_targets
        if not bool(torch.isfinite(losses).all()):
            raise ConfigError("the loss on the calibration text is not finite", "the checkpoint is damaged")
        self.decoder.norm.to("meta")
        self.unmap()
        return losses


def _taps(layer: nn.Module, family: Family, shape: LayerShape) -> tuple[dict[str, _Tap], list[Any]]:
    """Record input and output of every matrix. The input is a view of its own, so that its gradient is
    the one through this matrix alone."""
    taps: dict[str, _Tap] = {}
    hooks = []
    for unit, present in (("kv", shape.n_kv_heads), ("ffn", shape.n_ff)):
        for role in ROLES[unit] if present else ():
            tap = taps[role] = _Tap()

            def before(_: nn.Module, args: tuple[torch.Tensor, ...], tap: _Tap = tap) -> tuple[torch.Tensor]:
                tap.x = args[0].view_as(args[0])
                return (tap.x,)

            def after(_: nn.Module, __: Any, out: torch.Tensor, tap: _Tap = tap) -> None:
                tap.y = out

            module = checkpoint.role_module(layer, family, role)
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return taps, hooks


def _backward_layer(
    model: _Model, index: int, layer: nn.Module, inputs: torch.Tensor, slope: torch.Tensor, sums: _LayerSums
) -> None:
    """Add one layer's statistics; `slope` [N, T, d], the gradient of its output, becomes its input's."""
    for part in model.batches():
        x = inputs[part].detach().requires_grad_()
        taps, hooks = _taps(layer, model.family, model.dims.layers[index])
        try:
            with torch.enable_grad():
                out = model.run(index, layer, x)
        finally:
            for hook in hooks:
                hook.remove()
        roles = list(taps)
        wanted = [taps[r].x if r in COLUMN_ROLES else taps[r].y for r in roles]
        # columns need dy too, for the weight gradient
        element = sums.needs - {Need.SAMPLE_VECTOR}
        extra = [r for r in roles if r in COLUMN_ROLES] if element else []
        wanted += [taps[r].y for r in extra]
        if not out.requires_grad:  # a layer without any block
            continue
        found = list(torch.autograd.grad(out, [*wanted, x], slope[part]))
        below = found.pop()
        dy_of_columns = dict(zip(extra, found[len(roles) :], strict=True))
        del out
        for role, gradient in zip(roles, found[: len(roles)], strict=True):
            tap = taps.pop(role)
            assert tap.x is not None and tap.y is not None
            dy = dy_of_columns.get(role, gradient)
            sums.add(role, tap.x.detach(), tap.y.detach(), dy, gradient)
        slope[part] = below  # only now: the gradient at down's output may be `slope` itself


def collect(
    source: checkpoint.Source,
    graph: ModelGraph,
    windows: np.ndarray,
    needs: frozenset[Need],
    *,
    batch_tokens: int = 2048,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Collect gradient statistics. `windows` is [N, T] int; returns 'layers.<l>.<need>.<role>' to float32.

    MASK_TRIALS has the unit kind in the role's place, MASK_LOSS and N_TARGETS nothing. `seed` draws the
    masked units.
    Raises ConfigError for a need without gradients, or when the loss or a gradient is not finite.
    """
    forward_only = sorted(need.value for need in needs if not need.gradient)
    if forward_only:
        raise ConfigError(
            f"{', '.join(forward_only)}: collected by the forward calibration, not by gradients"
        )
    if windows.shape[1] < 2:
        raise ConfigError("gradients need windows of at least two tokens")
    arrays: dict[str, np.ndarray] = {}
    if Need.N_TARGETS in needs:
        n_targets = np.array([windows.shape[1] - 1], dtype=np.float32)
        for index in range(len(graph.dims.layers)):
            arrays[f"layers.{index}.{Need.N_TARGETS.value}"] = n_targets
    weights = needs - _MASKED - {Need.N_TARGETS}
    if weights:
        arrays |= _collect_gradients(source, graph, windows, weights, batch_tokens, device, progress)
    if needs & _MASKED:
        arrays |= _collect_masked(source, graph, windows, batch_tokens, device, seed, progress)
    return arrays


def _collect_gradients(
    source: checkpoint.Source,
    graph: ModelGraph,
    windows: np.ndarray,
    needs: frozenset[Need],
    batch_tokens: int,
    device: str,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    dims = graph.dims
    model = _Model(source, dims, windows, batch_tokens, device)
    arrays: dict[str, np.ndarray] = {}
    n_layers = len(dims.layers)
    with torch.no_grad(), (progress or Silent()).stage("gradients", 2 * n_layers) as bar:
        stream = model.embed()
        kept = _Kept(n_layers, stream)
        reused = _Reused(model.family, dims, windows.size)
        try:
            for index in range(n_layers):
                kept.put(index, stream)
                with model.resident(index) as layer, reused.record(index, layer):
                    for part in model.batches():
                        stream[part] = model.run(index, layer, stream[part])
                model.unmap()
                bar.advance()
            model.top_(stream, gradient=True)
            for index in reversed(range(n_layers)):
                with model.resident(index) as layer, reused.replay(index, layer):
                    sums = _LayerSums(model.family, layer, needs, len(windows), windows.shape[1] - 1)
                    _backward_layer(model, index, layer, kept.take(index, device), stream, sums)
                    arrays |= sums.finish(index)
                if not bool(torch.isfinite(stream).all()):
                    raise ConfigError(
                        f"gradients of layer {index} are not finite", "the checkpoint is damaged"
                    )
                model.unmap()
                bar.advance()
        finally:
            kept.close()
    return arrays


# ---------------------------------------------------------------- masked units


def mask_trials(axis: Axis, trials: int, seed: int) -> np.ndarray:
    """[trials, n_units] 0/1: units that each trial masks, a share that itself is drawn. One unit: never."""
    rng = np.random.default_rng([seed, axis.layer, axis.unit == "ffn"])
    masks = np.zeros((trials, axis.n_units), dtype=np.float32)
    for row in masks:
        most = min(axis.n_units - 1, max(1, round(axis.n_units * _MASK_SHARE)))
        row[rng.permutation(axis.n_units)[: rng.integers(0, most + 1)]] = 1
    return masks


def _collect_masked(
    source: checkpoint.Source,
    graph: ModelGraph,
    windows: np.ndarray,
    batch_tokens: int,
    device: str,
    seed: int,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """Loss of MASK_TRIALS copies of the stream, each with its own units silenced in every layer."""
    model = _Model(source, graph.dims, windows, batch_tokens, device)
    masks = {axis.name: mask_trials(axis, MASK_TRIALS, seed) for axis in graph.axes}
    n_layers = len(graph.dims.layers)
    with torch.no_grad(), (progress or Silent()).stage("masked losses", n_layers) as bar:
        dense = model.embed()
        streams = [dense] + [dense.clone() for _ in range(MASK_TRIALS)]
        for index in range(n_layers):
            with model.resident(index) as layer:
                for trial, stream in enumerate(streams, start=-1):
                    hooks = [] if trial < 0 else _mask_hooks(model, layer, index, graph, masks, trial)
                    for part in model.batches():
                        stream[part] = model.run(index, layer, stream[part])
                    for hook in hooks:
                        hook.remove()
            model.unmap()
            bar.advance()
        losses = [float(model.top_(stream, gradient=False).mean()) for stream in streams]
    rise = np.asarray(losses[1:], dtype=np.float64) - losses[0]
    arrays: dict[str, np.ndarray] = {}
    for index in range(n_layers):
        arrays[f"layers.{index}.{Need.MASK_LOSS.value}"] = rise.astype(np.float32)
    for axis in graph.axes:
        arrays[f"layers.{axis.layer}.{Need.MASK_TRIALS.value}.{axis.unit}"] = masks[axis.name]
    return arrays


def _mask_hooks(
    model: _Model, layer: nn.Module, index: int, graph: ModelGraph, masks: dict[str, np.ndarray], trial: int
) -> list[Any]:
    """Zero what the masked units hand to o and down: the same as removing them."""
    hooks = []
    for axis in graph.axes:
        if axis.layer != index or not masks[axis.name][trial].any():
            continue
        role = "down" if axis.unit == "ffn" else "o"
        module = checkpoint.role_module(layer, model.family, role)
        width = module.weight.shape[1] // axis.n_units  # type: ignore[union-attr, operator, index]
        keep = 1 - torch.from_numpy(np.repeat(masks[axis.name][trial], width)).to(model.device)
        hooks.append(module.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,)))
    return hooks
