"""Closed-form compensation: o_proj and down_proj are solved anew on the inputs that stay.

For each of the two matrices, with X [tokens, in] its inputs, W [in, out] its weight and S the columns
that stay, the new weight minimises

    sum_t w_t |X_tS V - X_t W|^2  +  lambda |V - W_S|^2,      w_t = 1 / mean square of the stream at token t

With G = X'wX that is V = W_S + (G_SS + lambda I)^-1 G_SR W_R, R being the columns that leave: G is all that
has to be kept. The stream's size varies a thousandfold over tokens while the next norm divides it away: hence
w_t. X is what the already compensated layers before feed it. lambda is a share of the mean diagonal of G_SS,
chosen per matrix on windows that were held out. One layer is resident; new weights go to a file per layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune import checkpoint, rundir
from edgeprune import graph as graphs
from edgeprune.allocators.base import best_units
from edgeprune.compensation import kept_columns
from edgeprune.errors import ConfigError
from edgeprune.progress import Progress, Silent
from edgeprune.records import Axis, ModelGraph

RIDGES = (0.03, 0.1, 0.3, 1.0)  # shares of the mean diagonal that are tried
_KEPT_BYTES = 384 << 20  # of activations that are kept rather than computed again
HELD_OUT = 8  # one window in this many chooses the ridge

_ROLE = {"kv": "o", "q": "o", "ffn": "down"}
_NORM = {"kv": "attn_norm", "q": "attn_norm", "ffn": "ffn_norm"}


def solve(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """New weight [kept, out] float64 from G [in, in] and W [in, out]; `ridge` is a share of G's diagonal."""
    weight, gram = weight.double(), gram.double()
    gone = torch.ones(len(weight), dtype=torch.bool)
    gone[kept] = False
    if not bool(gone.any()) or len(kept) == 0:
        return weight[kept]
    among = gram[kept][:, kept]
    lost = gram[kept][:, gone] @ weight[gone]
    strength = ridge * among.diagonal().mean().clamp_min(1e-30)
    damped = among + strength * torch.eye(len(kept), dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:  # ridge 0 and inputs that depend on each other
        change = torch.linalg.lstsq(damped, lost, driver="gelsd").solution
    else:
        change = torch.cholesky_solve(lost, factor)
    return weight[kept] + change


def error(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, new: torch.Tensor) -> float:
    """Weighted squared change of the matrix's output when `new` [kept, out] stands for W [in, out]."""
    change = -weight.double()
    change[kept] += new
    return float((change * (gram.double() @ change)).sum())


def best_ridge(
    fit: torch.Tensor,
    held: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """The ridge whose weight, solved on `fit`, changes the output least on `held`."""
    if len(ridges) == 1 or not bool(held.any()):
        return ridges[len(ridges) // 2]
    errors = [error(held, weight, kept, solve(fit, weight, kept, ridge)) for ridge in ridges]
    return ridges[int(np.argmin(errors))]


Choose = Callable[[Axis, torch.Tensor, torch.Tensor], Sequence[int]]
"""(axis, G [in, in], W [in, out]) to the units that stay."""


def as_planned(kept: Mapping[str, Sequence[int]]) -> Choose:
    """The units that a plan names."""
    return lambda axis, gram, weight: kept.get(axis.name, range(axis.n_units))


def by_inputs(widths: Mapping[str, int]) -> Choose:
    """The units whose own output is largest on the inputs at hand: trace(W_u' G_uu W_u) each."""

    def choose(axis: Axis, gram: torch.Tensor, weight: torch.Tensor) -> Sequence[int]:
        n, each = axis.n_units, len(gram) // axis.n_units
        own = torch.stack([gram[u * each : (u + 1) * each, u * each : (u + 1) * each] for u in range(n)])
        parts = weight.reshape(n, each, -1)
        adds = (parts * (own @ parts)).sum(dim=(1, 2))
        return best_units(adds.numpy(), widths[axis.name], axis.groups)

    return choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a pass made: the units that stay, the ridge of every axis, new weights in `folder`."""

    folder: Path
    kept: dict[str, tuple[int, ...]]  # only axes that lost some
    ridges: dict[str, float]


class RebuiltSource:
    """A pruned source whose o_proj and down_proj come from the files of a rebuild."""

    def __init__(self, pruned: checkpoint.Source, folder: Path) -> None:
        self._pruned = pruned
        self._files = {path.stem: path for path in folder.glob("*.safetensors")}
        self._layer: tuple[str, dict[str, torch.Tensor]] = ("", {})

    @property
    def config(self) -> dict[str, Any]:
        return self._pruned.config

    @property
    def fingerprint(self) -> str:
        return self._pruned.fingerprint

    def tensor(self, name: str) -> torch.Tensor:
        _, _, rest = name.partition(".layers.")
        index = rest.split(".")[0]
        if index in self._files:
            if self._layer[0] != index:
                self._layer = (index, load_file(self._files[index]))
            if name in self._layer[1]:
                return self._layer[1][name].to(self._pruned.tensor(name).dtype)
        return self._pruned.tensor(name)

    def close(self) -> None:
        self._layer = ("", {})
        self._pruned.close()


def rebuild(
    source: checkpoint.Source,
    graph: ModelGraph,
    windows: np.ndarray,
    cut: Sequence[str],
    choose: Choose,
    folder: Path,
    *,
    ridges: Sequence[float] = RIDGES,
    weighted: bool = True,
    batch_tokens: int = 2048,
    half: bool = False,
    progress: Progress | None = None,
) -> Rebuilt:
    """Cut the axes named in `cut` to the units that `choose` names and solve their output matrices anew.

    `windows` [N, T] is calibration text; `folder` gets one file of float32 weights per layer that changed.
    With `half` the layers run in bfloat16, sums and solutions do not. Raises ConfigError when an activation
    is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = Rebuilt(folder=folder, kept={}, ridges={})
    by_layer: dict[int, list[Axis]] = {}
    for axis in graph.axes:
        if axis.name in cut:
            by_layer.setdefault(axis.layer, []).append(axis)
    last = max(by_layer, default=-1)
    with torch.inference_mode(), (progress or Silent()).stage("compensate", last + 1) as bar:
        walk = Walk(source, graph, windows, weighted=weighted, batch_tokens=batch_tokens, half=half)
        for index in range(last + 1):
            with checkpoint.resident_layer(walk.model, index, source) as layer:
                new = {}
                # attention first: its new output is what the FFN's inputs come from
                for axis in sorted(by_layer.get(index, ()), key=lambda a: a.unit == "ffn"):
                    name, weight = walk.solve(index, layer, axis, choose, ridges, made)
                    new[name] = weight
                if index < last:
                    walk.move(index, layer)
            if new:
                with rundir.atomic_path(folder / f"{index}.safetensors") as temporary:
                    save_file(new, temporary)
            source.close()
            bar.advance()
    return made


class _Reached(Exception):
    """The forward pass came to the matrix whose inputs were wanted."""


class Walk:
    """The stream of a model, dense or compensated, on its way through the layers."""

    def __init__(
        self,
        source: checkpoint.Source,
        graph: ModelGraph,
        windows: np.ndarray,
        *,
        weighted: bool = True,
        batch_tokens: int = 2048,
        half: bool = False,
    ) -> None:
        self._family = graphs.find_family(graph.dims.family)
        self._weighted, self._half = weighted, half
        self.model = checkpoint.skeleton(source.config, graph.dims, split=True)
        self._layers = checkpoint.Stream(self.model, graph.dims, windows.shape[1])
        ids = torch.from_numpy(np.ascontiguousarray(windows)).long()
        self.stream = self._layers.embed(source, ids)  # [N, T, d]
        self._batch = max(1, batch_tokens // windows.shape[1])
        # stream and inputs of down_proj of this layer, batch by batch, while they are still true
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def batches(self, n: int | None = None) -> list[slice]:
        rows = len(self.stream) if n is None else n
        return [slice(i, min(i + self._batch, rows)) for i in range(0, rows, self._batch)]

    def run(self, index: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Output of a layer for x [n, T, d], float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            return self._layers.run(index, layer, x).float()

    def move(self, index: int, layer: nn.Module) -> None:
        """The stream becomes the layer's output."""
        down = self.matrix(layer, "ffn") if self._seen else None
        for i, part in enumerate(self.batches()):
            if down is None:
                self.stream[part] = self.run(index, layer, self.stream[part].clone())
                continue
            between, x = self._seen[i]
            with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
                self.stream[part] = between + down(x).float()
        self._seen = []
        if not bool(torch.isfinite(self.stream).all()):
            raise ConfigError(f"activations of layer {index} are not finite", "the checkpoint is damaged")

    def moments(self, index: int, layer: nn.Module, unit: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """G of the windows that are fitted and of those held out, float64 [n, n] each."""
        seen: dict[str, torch.Tensor] = {}

        def see_norm(_: nn.Module, args: Any) -> None:
            seen["stream"] = args[0].detach()

        def see_input(_: nn.Module, args: Any) -> None:
            seen["x"] = args[0].detach()
            raise _Reached

        role = checkpoint.role_module(layer, self._family, _ROLE[unit])
        norm = checkpoint.role_module(layer, self._family, _NORM[unit])
        hooks = [norm.register_forward_pre_hook(see_norm), role.register_forward_pre_hook(see_input)]
        fit, held = (torch.zeros(n, n, dtype=torch.float64) for _ in range(2))
        size = self.stream[..., 0].numel() * (n + self.stream.shape[-1]) * (2 if self._half else 4)
        # with a norm behind down_proj the rest of the layer is more than one product and one sum
        keep = unit == "ffn" and "ffn_post_norm" not in self._family.roles and size <= _KEPT_BYTES
        self._seen = []
        try:
            for part in self.batches():
                with contextlib.suppress(_Reached):
                    self.run(index, layer, self.stream[part].clone())
                if keep:
                    self._seen.append((seen["stream"].clone(), seen["x"].clone()))
                x = seen["x"].float()
                if self._weighted:
                    per_token = seen["stream"].float().square().mean(dim=-1, keepdim=True)
                    x = x * per_token.clamp_min(1e-12).rsqrt()
                rows = torch.arange(part.start, part.start + len(x)) % HELD_OUT == HELD_OUT - 1
                for gram, chosen in ((held, rows), (fit, ~rows)):
                    if bool(chosen.any()):
                        flat = x[chosen].flatten(0, -2)
                        gram += flat.T @ flat
        finally:
            for hook in hooks:
                hook.remove()
        if not bool(torch.isfinite(fit).all() & torch.isfinite(held).all()):
            raise ConfigError(f"activations of layer {index} are not finite", "the checkpoint is damaged")
        return fit, held

    def matrix(self, layer: nn.Module, unit: str) -> Any:
        """The module whose inputs the units of this kind are."""
        return checkpoint.role_module(layer, self._family, _ROLE[unit])

    def solve(
        self, index: int, layer: nn.Module, axis: Axis, choose: Choose, ridges: Sequence[float], made: Rebuilt
    ) -> tuple[str, torch.Tensor]:
        """Choose the units of one axis and solve its output matrix; the layer then runs with it."""
        module = self.matrix(layer, axis.unit)
        old = module.weight.detach().double().T  # [in, out]
        fit, held = self.moments(index, layer, axis.unit, old.shape[0])
        units = tuple(sorted(int(u) for u in choose(axis, fit + held, old)))
        columns = torch.from_numpy(kept_columns(axis, units))
        ridge = best_ridge(fit, held, old, columns, ridges)
        new = solve(fit + held, old, columns, ridge).float()
        set_columns_(module, columns, new)
        if len(units) < axis.n_units:
            made.kept[axis.name] = units
        made.ridges[axis.name] = ridge
        return self._family.tensor(_ROLE[axis.unit], index), new.T.contiguous()


def set_columns_(module: Any, columns: torch.Tensor, new: torch.Tensor) -> None:
    """Give a matrix new weights [kept, out] on the columns that stay and zeros elsewhere."""
    whole = torch.zeros_like(module.weight)
    whole[:, columns] = new.T.to(whole.dtype)
    module.weight = nn.Parameter(whole, requires_grad=False)


def half_is_fast() -> bool:
    """This CPU multiplies bfloat16 in hardware; elsewhere it is emulated and slower than float32."""
    flags = Path("/proc/cpuinfo")
    try:
        text = flags.read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return any(word in text for word in ("avx512_bf16", "amx_bf16", " bf16"))
