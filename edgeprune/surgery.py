"""Cut a model along a plan and save it. Dumb on purpose: everything was decided before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from edgeprune import checkpoint, remote_code, rundir
from edgeprune import graph as graphs
from edgeprune.families.base import LAYER_LIST_KEY, write_config
from edgeprune.records import Axis, ModelGraph, PrunePlan, dumps

_SHARD_BYTES = 1 << 29  # a shard is held twice while it is written, beside the mapped parent
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "edgeprune_vocab.json",  # which tokens left
)


def load(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Load a folder that edgeprune wrote as a transformers model, whatever its plan.

    Raises ConfigError for a missing or damaged folder, UnsupportedModelError for an unknown family.
    """
    return checkpoint.load_model(Path(path), dtype=dtype, device=device)


def rows_of(axis: Axis, kept: Sequence[int]) -> Iterator[tuple[str, int, np.ndarray]]:
    """For each slice of an axis: (tensor, dim, indices along that dim that units `kept` own)."""
    units = np.asarray(kept, dtype=np.int64)
    for part in axis.slices:
        index = part.offset + units[:, None] * part.block + np.arange(part.block)
        yield part.tensor, part.dim, index.reshape(-1)


class PrunedSource(checkpoint.View):
    """A view of a source through a plan: tensors come out already cut."""

    def __init__(
        self, source: checkpoint.Source, graph: ModelGraph, kept: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(source, write_config(source.config, graphs.prune_dims(graph, kept)))
        # what leaves, not what stays: a fused tensor is cut by several slices at once
        self._cuts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for axis in graph.axes:
            if axis.name in kept and len(kept[axis.name]) < axis.n_units:
                gone = np.setdiff1d(np.arange(axis.n_units), np.asarray(kept[axis.name], dtype=np.int64))
                for tensor, dim, index in rows_of(axis, gone.tolist()):
                    self._cuts.setdefault(tensor, []).append((dim, torch.from_numpy(index)))

    def tensor(self, name: str) -> torch.Tensor:
        value = super().tensor(name)
        cuts = self._cuts.get(name, [])
        for dim in {dim for dim, _ in cuts}:
            stays = torch.ones(value.shape[dim], dtype=torch.bool)
            stays[torch.cat([index for d, index in cuts if d == dim])] = False
            value = value.index_select(dim, stays.nonzero()[:, 0])
        return value.contiguous()


def save(
    folder: Path,
    source: checkpoint.Source,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    extras: Path | None = None,
) -> None:
    """Write config.json and safetensors shards of at most 512 MiB; the folder appears whole or not at all.

    `extras` is the parent's folder, whose tokenizer files come along.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _write_shards(part, source, shapes)
        config = {key: value for key, value in source.config.items() if key != "auto_map"}
        if LAYER_LIST_KEY in config:
            family = graphs.find_family(config["model_type"])
            config["auto_map"] = remote_code.auto_map()
            rundir.write_text(part / remote_code.FILE_NAME, remote_code.code(family))
        rundir.write_text(part / "config.json", json.dumps(config, indent=2) + "\n")
        if extras is not None:
            for name in _TOKENIZER_FILES:
                if (extras / name).is_file():
                    shutil.copyfile(extras / name, part / name)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_shards(part: Path, source: checkpoint.Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            save_file(held, part / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
            shards.append(list(held))
            held, size = {}, 0
            source.close()

    for name, shape in shapes.items():
        tensor = source.tensor(name)
        if tuple(tensor.shape) != shape:
            raise AssertionError(f"{name}: cut to {tuple(tensor.shape)}, planned {shape}")
        n_bytes = tensor.numel() * tensor.element_size()
        if size + n_bytes > _SHARD_BYTES:
            flush()
        held[name] = tensor
        size += n_bytes
    flush()
    if len(shards) == 1:
        os.replace(part / "shard-00000.safetensors", part / "model.safetensors")
        return
    table = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(part / f"shard-{i:05d}.safetensors", part / final)
        table.update(dict.fromkeys(names, final))
    index = {"metadata": {}, "weight_map": table}
    rundir.write_text(part / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def prune(
    source: checkpoint.Source,
    graph: ModelGraph,
    plan: PrunePlan,
    folder: Path,
    *,
    extras: Path | None,
    pruned: checkpoint.Source | None = None,
) -> None:
    """Apply a plan and save the result as a Hugging Face folder with its plan beside it.

    `pruned` has the weights of what is left when more than a cut was done to them.
    """
    pruned = pruned or PrunedSource(source, graph, plan.kept)
    after = graphs.graph_of(graphs.find_family(plan.dims.family), plan.dims)
    save(folder, pruned, after.shapes, extras=extras)
    rundir.write_text(folder / "edgeprune_plan.json", dumps(plan))
