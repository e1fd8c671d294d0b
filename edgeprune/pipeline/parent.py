"""Open the parent model: a Hugging Face folder as it is, a GGUF file dequantized to one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune import checkpoint, locate, rundir, surgery, tokenizer
from edgeprune import graph as graphs
from edgeprune.costs.gguf_header import KeyValue, read_header
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.families.base import Family
from edgeprune.gguf_source import GgufSource
from edgeprune.metrics.base import Metric, Need
from edgeprune.records import Artifact, ModelGraph, VocabTrimming, make_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An opened parent. `given` is the user's own GGUF file, which can be shipped as it is."""

    name: str
    folder: Path
    source: checkpoint.Source
    graph: ModelGraph
    family: Family
    tokenizer_kvs: Sequence[KeyValue]
    license_name: str | None
    given: Path | None
    given_quantization: str | None
    key: str
    vocabulary: VocabTrimming | None = None  # what left it, see pipeline/trimming.py
    untold: UnsupportedModelError | None = None  # why GGUF has no words for the tokenizer

    def gguf_tokenizer(self) -> Sequence[KeyValue]:
        """Raises UnsupportedModelError where GGUF cannot describe the tokenizer; ONNX keeps its files."""
        if self.untold is not None:
            raise self.untold
        return self.tokenizer_kvs


class _AsF16:
    """A GGUF source whose tensors come out as F16, the reference precision of a quantized parent."""

    def __init__(self, source: GgufSource, fingerprint: str) -> None:
        self._source = source
        self.fingerprint = fingerprint

    @property
    def config(self) -> dict[str, Any]:
        return self._source.config

    def tensor(self, name: str) -> torch.Tensor:
        value = checkpoint.finite(torch.from_numpy(self._source.tensor(name)), name).half()
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(f"tensor {name} holds values beyond F16", "use the model's safetensors instead")
        return value

    def close(self) -> None:
        """Tensors are read, not mapped."""


def import_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF parent as a Hugging Face folder: F16 safetensors, config and tokenizer."""
    source = GgufSource(path)
    graph = graphs.build(source.config)
    plain = _AsF16(source, "")
    staging = folder.with_name(f".{folder.name}.import.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        surgery.save(staging, plain, graph.shapes)
        if source.tokenizer_kvs:
            tokenizer.write_hf(source.tokenizer_kvs, staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_folder(folder: Path, *, name: str | None = None, key: str | None = None) -> Parent:
    """Open a Hugging Face folder. Raises ConfigError or UnsupportedModelError."""
    source = checkpoint.SafetensorsSource(folder)
    graph = graphs.build(source.config)
    source.check(graph)
    kvs: Sequence[KeyValue] = ()
    untold = None
    try:
        kvs = tokenizer.kvs_from_hf(folder)
    except UnsupportedModelError as error:
        untold = error
    return Parent(
        name=name or folder.resolve().name,
        folder=folder,
        source=source,
        graph=graph,
        family=graphs.find_family(graph.dims.family),
        tokenizer_kvs=kvs,
        license_name=locate.license_of(folder),
        given=None,
        given_quantization=None,
        key=key or make_key("parent", source.fingerprint),
        untold=untold,
    )


def with_query_heads(parent: Parent, metric: Metric, options: Mapping[str, str]) -> Parent:
    """The same model with single query heads as units of attention, under a key of its own.

    Raises ConfigError where no KV group has two, or the metric knows whole groups only.
    """
    graph = graphs.with_query_heads(parent.graph)
    if not any(axis.unit == "q" for axis in graph.axes):
        raise ConfigError(
            f"{parent.name} has one query head for each KV head, so none can leave a group",
            "leave out --query-heads",
        )
    if Need.MASK_TRIALS in metric.needs(options):
        raise ConfigError(
            f"{metric.name} with these switches is fitted to masked KV groups, not to query heads",
            "choose another metric or switch, or leave out --query-heads",
        )
    return dataclasses.replace(parent, graph=graph, key=make_key("parent", "query heads", parent.key))


def given_type(path: Path, label: str | None = None) -> str:
    """What a user's GGUF calls itself: the type that most weight bytes have."""
    totals: dict[str, int] = {}
    for tensor in read_header(path).tensors:
        totals[tensor.type.name] = totals.get(tensor.type.name, 0) + tensor.n_bytes
    return max(totals, key=lambda t: totals[t])


def open_parent(model: str | None, run: rundir.RunDir) -> Parent:
    """Resolve `--model` and make it readable. A GGUF file is imported once into the run folder."""
    path = locate.resolve_model(model)
    if path.is_dir():
        label = model if model and not Path(model).exists() else None
        return open_folder(path, name=label)
    source = GgufSource(path)
    graphs.build(source.config)  # refuse an unsupported family before writing anything
    sha256 = rundir.sha256_file(path)
    key = make_key("import", sha256)
    relative = f"artifacts/parent-{key[:8]}"
    folder = run.path(relative)

    def compute() -> Artifact:
        import_gguf(path, folder)
        files = [f for f in folder.iterdir() if f.suffix == ".safetensors"]
        return Artifact(
            path=relative,
            format="hf",
            quantization="F16",
            bytes=sum(f.stat().st_size for f in files),
            sha256=rundir.sha256_file(files[0]),
            made_from=sha256,
            key=key,
        )

    run.stage(Artifact, key, compute, name="import", valid=lambda a: run.path(a.path).is_dir(), kind="parent")
    label, license_name = locate.gguf_labels(source.general, path)
    opened = checkpoint.SafetensorsSource(folder)
    graph = graphs.build(opened.config)
    return Parent(
        name=label,
        folder=folder,
        source=opened,
        graph=graph,
        family=graphs.find_family(graph.dims.family),
        tokenizer_kvs=source.tokenizer_kvs,
        license_name=license_name,
        given=path,
        given_quantization=given_type(path),
        key=key,
    )
