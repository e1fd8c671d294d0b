"""Closed-form compensation: o_proj and down_proj are solved anew on the inputs that stay.

For each of the two matrices, with X [tokens, in] its inputs, W [in, out] its weight and S the columns
that stay, the new weight minimises

    sum_t w_t |X_tS V - X_t W|^2  +  lambda |V - W_S|^2,      w_t = 1 / mean square of the stream at token t

With G = X'wX that is V = W_S + (G_SS + lambda I)^-1 G_SR W_R, R being the columns that leave: G is all that
has to be kept. What the layers before it spoiled is made up for as well: the target is X_t W + DRIFT d_t,
d_t being what the dense model's stream behind the block has and this one lacks, which adds
(G_SS + lambda I)^-1 DRIFT X_S'wd. The whole of d asks for more than the text can tell. The stream's size
varies a thousandfold over tokens while the next norm divides it away: hence w_t. X is what the already
compensated layers before feed it. lambda is a share of the mean diagonal of G_SS, chosen per matrix on
windows that were held out. One layer is resident; new weights go to a file per layer.
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
from edgeprune.compensation import kept_columns
from edgeprune.errors import ConfigError
from edgeprune.progress import Progress, Silent
from edgeprune.records import Axis, ModelGraph

RIDGES = (0.03, 0.1, 0.3, 1.0)  # shares of the mean diagonal that are tried
_KEPT_BYTES = 384 << 20  # of activations that are kept rather than computed again
DRIFT = 0.5  # share of the earlier layers' error that a matrix is asked to undo
HELD_OUT = 8  # one window in this many chooses the ridge

_AT_ONCE = 16  # channels that leave between two updates of the inverse

_ROLE = {"kv": "o", "q": "o", "ffn": "down"}
_NORM = {"kv": "attn_norm", "q": "attn_norm", "ffn": "ffn_norm"}
_POST_NORM = {"kv": "attn_post_norm", "q": "attn_post_norm", "ffn": "ffn_post_norm"}


def solve(
    gram: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    ridge: float,
    pull: torch.Tensor | None = None,
) -> torch.Tensor:
    """New weight [kept, out] float64 from G [in, in] and W [in, out]; `ridge` is a share of G's diagonal.

    `pull` [in, out] is X'wD of what the output should have on top, if anything.
    """
    weight, gram = weight.double(), gram.double()
    gone = torch.ones(len(weight), dtype=torch.bool)
    gone[kept] = False
    if (not bool(gone.any()) and pull is None) or len(kept) == 0:
        return weight[kept]
    among = gram[kept][:, kept]
    lost = gram[kept][:, gone] @ weight[gone]
    if pull is not None:
        lost = lost + pull.double()[kept]
    strength = ridge * among.diagonal().mean().clamp_min(1e-30)
    damped = among + strength * torch.eye(len(kept), dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:  # ridge 0 and inputs that depend on each other
        change = torch.linalg.lstsq(damped, lost, driver="gelsd").solution
    else:
        change = torch.cholesky_solve(lost, factor)
    return weight[kept] + change


def error(
    gram: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    new: torch.Tensor,
    pull: torch.Tensor | None = None,
) -> float:
    """Weighted squared change of the matrix's output when `new` [kept, out] stands for W [in, out].

    With `pull` = X'wD the squared distance to the output plus D, less the constant D'wD.
    """
    change = -weight.double()
    change[kept] += new
    total = (change * (gram.double() @ change)).sum()
    return float(total if pull is None else total - 2 * (change * pull.double()).sum())


@dataclass(frozen=True, slots=True)
class Moments:
    """X'wX [in, in] of the inputs of a matrix, and X'wD [in, out] of what its output should have on top."""

    gram: torch.Tensor
    pull: torch.Tensor | None = None

    def __add__(self, other: Moments) -> Moments:
        pull = None if self.pull is None or other.pull is None else self.pull + other.pull
        return Moments(self.gram + other.gram, pull)

    def solve(self, weight: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
        return solve(self.gram, weight, kept, ridge, self.pull)

    def error(self, weight: torch.Tensor, kept: torch.Tensor, new: torch.Tensor) -> float:
        return error(self.gram, weight, kept, new, self.pull)


def best_ridge(
    fit: Moments,
    held: Moments,
    weight: torch.Tensor,
    kept: torch.Tensor,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """The ridge whose weight, solved on `fit`, serves `held` best."""
    if len(ridges) == 1 or not bool(held.gram.any()):
        return ridges[len(ridges) // 2]
    errors = [held.error(weight, kept, fit.solve(weight, kept, ridge)) for ridge in ridges]
    return ridges[int(np.argmin(errors))]


Choose = Callable[[Axis, torch.Tensor, torch.Tensor], Sequence[int]]
"""(axis, G [in, in], W [in, out]) to the units that stay."""


def as_planned(kept: Mapping[str, Sequence[int]]) -> Choose:
    """The units that a plan names."""
    return lambda axis, gram, weight: kept.get(axis.name, range(axis.n_units))


def by_loss(widths: Mapping[str, int], ridge: float = 0.03) -> Choose:
    """Units whose loss the rest makes up for go, a few at a time: structured optimal brain surgeon.

    With H = G + lambda I a unit u costs trace(W_u' (H^-1_uu)^-1 W_u) when all others are solved anew without
    it; after each removal W and H^-1 are those of what is left (ZipLM, arXiv:2302.04089, reconstructed).
    """

    def choose(axis: Axis, gram: torch.Tensor, weight: torch.Tensor) -> Sequence[int]:
        each, groups = len(gram) // axis.n_units, axis.groups
        left = torch.arange(axis.n_units)
        strength = ridge * gram.diagonal().mean().clamp_min(1e-30)
        inverse = torch.linalg.inv(gram.double() + strength * torch.eye(len(gram), dtype=torch.float64))
        solved = weight.double().clone()
        at_once = _AT_ONCE if each == 1 else 1
        columns = lambda units: (units[:, None] * each + torch.arange(each)).flatten()  # noqa: E731
        while (n := len(left)) > widths[axis.name]:
            blocks = inverse.reshape(n, each, n, each)[torch.arange(n), :, torch.arange(n)]
            parts = solved.reshape(n, each, -1)
            costs = (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2)).reshape(groups, -1)
            most = min(at_once, (n - widths[axis.name]) // groups)
            goes = torch.argsort(costs, dim=1, stable=True)[:, :most]
            goes = (goes + torch.arange(groups)[:, None] * (n // groups)).flatten()
            stays = torch.ones(n, dtype=torch.bool)
            stays[goes] = False
            gone, kept = columns(goes), columns(torch.arange(n)[stays])
            across = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
            solved = solved[kept] - across.T @ solved[gone]
            inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ across
            left = left[stays]
        return [int(u) for u in left]

    return choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a pass made: the units that stay, the ridge of every axis, new weights in `folder`."""

    folder: Path
    kept: dict[str, tuple[int, ...]]  # only axes that lost some
    ridges: dict[str, float]


class RebuiltSource(checkpoint.View):
    """A pruned source whose o_proj and down_proj come from the files of a rebuild."""

    def __init__(self, pruned: checkpoint.Source, folder: Path) -> None:
        super().__init__(pruned)
        self._files = {path.stem: path for path in folder.glob("*.safetensors")}
        self._layer: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def tensor(self, name: str) -> torch.Tensor:
        _, _, rest = name.partition(".layers.")
        index = rest.split(".")[0]
        if index in self._files:
            if self._layer[0] != index:
                self._layer = (index, load_file(self._files[index]))
            if name in self._layer[1]:
                return self._layer[1][name].to(super().tensor(name).dtype)
        return super().tensor(name)

    def close(self) -> None:
        self._layer = ("", {})
        super().close()


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
    drift: float = DRIFT,
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
        first = min(by_layer, default=0)
        for index in range(last + 1):
            with checkpoint.resident_layer(walk.model, index, source) as layer:
                if drift and index >= first:
                    walk.lead(index, layer, drift)
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
        # the dense model's stream, and behind each block of this layer what it should be
        self._ahead: torch.Tensor | None = None
        self._goals: dict[str, torch.Tensor] = {}
        self._drift = 0.0
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

    def lead(self, index: int, layer: nn.Module, drift: float) -> None:
        """Send the dense stream through the layer, before any of its matrices changes; `moments` asks for it.

        Behind a norm of the block's output the stream's error is not one that the matrix can mend.
        """
        if self._ahead is None:
            self._ahead = self.stream.clone()
        middle = torch.empty_like(self._ahead)
        norm = checkpoint.role_module(layer, self._family, _NORM["ffn"])
        seen: list[torch.Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float()))
        try:
            for part in self.batches():
                self._ahead[part] = self.run(index, layer, self._ahead[part].clone())
                middle[part] = seen.pop() if seen else self._ahead[part]  # no FFN here
        finally:
            hook.remove()
        goals = {"kv": middle, "q": middle, "ffn": self._ahead}
        self._goals = {u: g for u, g in goals.items() if _POST_NORM[u] not in self._family.roles}
        self._drift = drift

    def moments(self, index: int, layer: nn.Module, unit: str, n: int) -> tuple[Moments, Moments]:
        """Moments, float64, of the windows that are fitted and of those held out."""
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
        goal = self._goals.get(unit)
        pulls = [torch.zeros(n, self.stream.shape[-1], dtype=torch.float64) for _ in range(2)]
        bias = getattr(role, "bias", None)
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
                lack = None
                if goal is not None:
                    lack = goal[part] - seen["stream"].float() - x @ role.weight.float().T
                    lack = self._drift * (lack if bias is None else lack - bias.float())
                if self._weighted:
                    per_token = seen["stream"].float().square().mean(dim=-1, keepdim=True)
                    scale = per_token.clamp_min(1e-12).rsqrt()
                    x, lack = x * scale, None if lack is None else lack * scale
                rows = torch.arange(part.start, part.start + len(x)) % HELD_OUT == HELD_OUT - 1
                for gram, pull, chosen in ((held, pulls[1], rows), (fit, pulls[0], ~rows)):
                    if bool(chosen.any()):
                        flat = x[chosen].flatten(0, -2)
                        gram += flat.T @ flat
                        if lack is not None:
                            pull += flat.T @ lack[chosen].flatten(0, -2)
        finally:
            for hook in hooks:
                hook.remove()
        if not bool(torch.isfinite(fit).all() & torch.isfinite(held).all()):
            raise ConfigError(f"activations of layer {index} are not finite", "the checkpoint is damaged")
        if goal is None:
            return Moments(fit), Moments(held)
        return Moments(fit, pulls[0]), Moments(held, pulls[1])

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
        both = fit + held
        units = tuple(sorted(int(u) for u in choose(axis, both.gram, old)))
        if len(units) == axis.n_units:
            return self._family.tensor(_ROLE[axis.unit], index), old.float().T.contiguous()
        columns = torch.from_numpy(kept_columns(axis, units))
        ridge = best_ridge(fit, held, old, columns, ridges)
        new = both.solve(old, columns, ridge).float()
        set_columns_(module, columns, new)
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
