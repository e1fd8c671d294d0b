"""What the model loses when one axis alone is cut: KL to the dense model, in nats per token.

One pass over the layers. At a resident layer every axis is cut to a few widths on the dense stream, each
making a stream of its own that runs through the rest of the model beside the dense one; the KL is taken
at the end. With compensation the cut matrix is solved anew first, from second moments that are kept on disk
and serve `Probe.measure` as well, the KL of a model cut on many axes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from edgeprune.progress import Progress, Silent
from edgeprune.reconstruction import Walk, set_columns_, solve
from edgeprune.records import Axis, ModelGraph

RIDGE = 0.1  # one for all: choosing it per axis and width would cost more than it tells
FFN_SHARES = (0.75, 0.4)  # widths that are measured, as shares of the dense one
_HEAD_TOKENS = 512


@dataclass(slots=True, kw_only=True)
class Probe:
    """Measures cuts of one model on fixed text.

    Attributes:
        windows: [N, T] tokens for second moments; the first `n_judged` of them give the KL.
        scores: axis to importance; the best units of a width stay.
        folder: where second moments lie, one file per layer; empty without `compensated`.
    """

    source: checkpoint.Source
    graph: ModelGraph
    windows: np.ndarray
    n_judged: int
    scores: Mapping[str, np.ndarray]
    folder: Path
    compensated: bool = True
    half: bool = False
    batch_tokens: int = 2048
    progress: Progress = field(default_factory=Silent)
    _dense: torch.Tensor | None = None  # last hidden states of the dense model, [n, T, d]
    _head: torch.Tensor | None = None

    # ------------------------------------------------ curves

    def curves(
        self, axes: Sequence[Axis], widths: Mapping[str, Sequence[int]]
    ) -> dict[str, list[tuple[int, float]]]:
        """KL with each axis alone cut to each of its widths: [(units kept, KL)], narrowest first."""
        by_layer: dict[int, list[Axis]] = {}
        for axis in axes:
            by_layer.setdefault(axis.layer, []).append(axis)
        labels: list[tuple[str, int]] = []
        streams: list[torch.Tensor] = []
        n_layers = len(self.graph.dims.layers)
        with torch.inference_mode(), self.progress.stage("sensitivity", n_layers + 1) as bar:
            walk = self._walk(self.windows)
            for index in range(n_layers):
                with checkpoint.resident_layer(walk.model, index, self.source) as layer:
                    for i, stream in enumerate(streams):
                        streams[i] = self._through(walk, index, layer, stream)
                    for axis in by_layer.get(index, ()):
                        for width, stream in self._cut(walk, index, layer, axis, widths[axis.name]):
                            labels.append((axis.name, width))
                            streams.append(stream)
                    walk.move(index, layer)
                self.source.close()
                bar.advance()
            self._dense = walk.stream[: self.n_judged].clone()
            found: dict[str, list[tuple[int, float]]] = {}
            for (name, width), kl in zip(labels, self._kl(walk, streams), strict=True):
                found.setdefault(name, []).append((width, kl))
            bar.advance()
        return {name: sorted(points) for name, points in found.items()}

    def _walk(self, windows: np.ndarray) -> Walk:
        return Walk(self.source, self.graph, windows, batch_tokens=self.batch_tokens, half=self.half)

    def _through(self, walk: Walk, index: int, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        parts = [walk.run(index, layer, stream[part].clone()) for part in walk.batches(len(stream))]
        return torch.cat(parts)

    def _cut(
        self, walk: Walk, index: int, layer: nn.Module, axis: Axis, widths: Sequence[int]
    ) -> list[tuple[int, torch.Tensor]]:
        """Streams after the layer with one axis cut, starting from the dense one."""
        module = walk.matrix(layer, axis.unit)
        kept = module.weight
        old = kept.detach().double().T
        gram = None
        if self.compensated:
            fit, held = walk.moments(index, layer, axis.unit, old.shape[0])
            gram = (fit + held).gram.float()
            self.folder.mkdir(parents=True, exist_ok=True)
            with rundir.atomic_path(self._file(axis)) as temporary:
                save_file({"gram": gram}, temporary)
        out = []
        for width in widths:
            self._set_(module, axis, width, old, gram)
            out.append((width, self._through(walk, index, layer, walk.stream[: self.n_judged])))
            module.weight = kept
        return out

    def _file(self, axis: Axis) -> Path:
        return self.folder / f"{axis.name}.safetensors"

    def _set_(
        self, module: Any, axis: Axis, width: int, old: torch.Tensor, gram: torch.Tensor | None
    ) -> None:
        units = best_units(self.scores[axis.name], width, axis.groups)
        columns = torch.from_numpy(kept_columns(axis, units))
        new = old[columns] if gram is None else solve(gram, old, columns, RIDGE)
        set_columns_(module, columns, new)

    # ------------------------------------------------ whole plans

    def measure(self, widths: Mapping[str, int]) -> float:
        """KL of the model cut to these widths; moments are those of the dense model. `curves` goes first."""
        with torch.inference_mode():
            walk = self._walk(self.windows[: self.n_judged])
            for index in range(len(self.graph.dims.layers)):
                with checkpoint.resident_layer(walk.model, index, self.source) as layer:
                    for axis in self.graph.axes:
                        if axis.layer == index and widths[axis.name] < axis.n_units:
                            module = walk.matrix(layer, axis.unit)
                            gram = load_file(self._file(axis))["gram"] if self.compensated else None
                            self._set_(module, axis, widths[axis.name], module.weight.double().T, gram)
                    walk.move(index, layer)
                self.source.close()
            return self._kl(walk, [walk.stream])[0]

    def _kl(self, walk: Walk, streams: Sequence[torch.Tensor]) -> list[float]:
        """Mean over all positions of KL(dense || other) for last hidden states [n, T, d] each."""
        assert self._dense is not None
        decoder: Any = walk.model.get_decoder()  # type: ignore[operator]
        family, dims = graphs.find_family(self.graph.dims.family), self.graph.dims
        kind = torch.bfloat16 if self.half else torch.float32
        if self._head is None:
            name = family.tensor("embed" if dims.tied else "head")
            self._head = self.source.tensor(name).to(kind).T.contiguous()
        if next(decoder.norm.parameters()).is_meta:
            checkpoint.fill_(decoder.norm, family.roles["final_norm"] + ".", self.source, torch.float32)
        head, dense = self._head, self._dense.flatten(0, 1)

        def log_softmax(x: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax((decoder.norm(x).to(kind) @ head).float(), dim=-1)

        totals = [0.0] * len(streams)
        for start in range(0, len(dense), _HEAD_TOKENS):
            part = slice(start, start + _HEAD_TOKENS)
            p = log_softmax(dense[part])
            weight = p.exp()
            for i, stream in enumerate(streams):
                difference = p - log_softmax(stream.flatten(0, 1)[part])
                totals[i] += float((weight * difference).sum(dim=-1).double().sum())
        return [total / len(dense) for total in totals]


def probe_widths(legal: Sequence[int], n_units: int, unit: str) -> list[int]:
    """Which of an axis's legal widths are measured: none, up to two group counts, shares of channels."""
    below = [w for w in legal if 0 < w < n_units]
    if unit != "ffn":
        chosen = set(below[-2:])
    else:
        chosen = {min(below, key=lambda w: abs(w - share * n_units)) for share in FFN_SHARES if below}
    return sorted(chosen | ({0} & set(legal)))
