"""A parent with a trimmed vocabulary: a folder of its own, so that every later stage sees one model."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import edgeprune
from edgeprune import checkpoint, data, languages, locate, rundir, surgery, tokenizer, vocabulary
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.families.base import Family
from edgeprune.pipeline.parent import Parent
from edgeprune.progress import Progress
from edgeprune.records import ModelDims, VocabTrimming, dumps, loads, make_key
from edgeprune.units import format_bytes

RECORD_FILE = "edgeprune_vocab.json"
LANGUAGES_PREFIX = "languages:"


class TrimmedSource(checkpoint.View):
    """A source whose embedding and head have only the rows `kept`; its config has the new ids."""

    def __init__(
        self, source: checkpoint.Source, family: Family, dims: ModelDims, kept: Sequence[int]
    ) -> None:
        super().__init__(source, {**vocabulary.remap(source.config, kept), "vocab_size": len(kept)})
        self._rows = torch.tensor(kept, dtype=torch.int64)
        self._names = {family.tensor("embed"), family.tensor("head")}

    def tensor(self, name: str) -> torch.Tensor:
        value = super().tensor(name)
        return value.index_select(0, self._rows) if name in self._names else value


@dataclasses.dataclass(frozen=True, slots=True)
class Trim:
    """A trimming asked for: text files, data sets or 'languages:en,de'; together."""

    sources: tuple[str, ...] = ()
    against: str | None = None  # text to count tokens of before and after; None: the built-in samples


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    texts: dict[str, str]  # source -> text
    codes: tuple[str, ...]  # of languages


def check(trim: Trim) -> None:
    """Raises ConfigError for a text or language that is not there, before the slow part."""
    if trim.against is not None and not trim.sources:
        raise ConfigError("--trim-check without --trim-vocab", "name what the vocabulary is trimmed to")
    _read(trim.sources)
    if trim.against is not None:
        data.read_text(trim.against)


def _read(sources: Sequence[str]) -> _Wanted:
    texts: dict[str, str] = {}
    codes: set[str] = set()
    for source in sources:
        if source.startswith(LANGUAGES_PREFIX):
            codes |= set(languages.parse(source.removeprefix(LANGUAGES_PREFIX)))
        else:
            texts[source] = data.read_text(source)
    return _Wanted(texts, tuple(sorted(codes)))


def trim(run: rundir.RunDir, parent: Parent, asked: Trim, progress: Progress) -> Parent:
    """The parent with only the tokens that were asked for, written once into the run folder.

    Raises UnsupportedModelError for a tokenizer that is not BPE.
    """
    if not asked.sources:
        return parent
    wanted = _read(asked.sources)
    against = asked.against
    other = languages.SAMPLES if against is None else {against: data.read_text(against)}
    key = make_key(
        "vocab_trimming",
        parent.key,
        edgeprune.__version__,
        list(wanted.codes),
        {name: rundir.sha256_bytes(text.encode()) for name, text in wanted.texts.items()},
        {name: rundir.sha256_bytes(text.encode()) for name, text in other.items()},
    )
    folder = run.path(f"artifacts/trimmed-{key[:8]}")

    def compute() -> VocabTrimming:
        with progress.stage("trim vocabulary"):
            return _write(parent, wanted, other, folder, asked.sources, key)

    record = run.stage(
        VocabTrimming,
        key,
        compute,
        name="trim vocabulary",
        valid=lambda _: (folder / RECORD_FILE).is_file(),
    )
    saved = format_bytes(record.bytes_removed)
    progress.say(f"vocabulary: {record.rows_after:,} of {record.rows_before:,} tokens stay, {saved} less")
    source = checkpoint.SafetensorsSource(folder)
    graph = graphs.build(source.config)
    source.check(graph)
    return dataclasses.replace(
        parent,
        folder=folder,
        source=source,
        graph=graph,
        tokenizer_kvs=vocabulary.trim_kvs(parent.gguf_tokenizer(), vocabulary.read_runs(record.kept)),
        # the file as given has another vocabulary, so nothing about it compares
        given=None,
        given_quantization=None,
        vocabulary=record,
        key=make_key("parent", "trimmed", key),
    )


def like(parent: Parent, pruned: Parent) -> Parent:
    """The parent with only the tokens that the pruned model has left, as its record says; no file is written.

    Itself where nothing left or another model was trimmed. Tokenizer files are the pruned model's own.
    Raises ConfigError for a record that does not fit the two models.
    """
    path, before = pruned.folder / RECORD_FILE, parent.graph.dims.vocab
    if pruned.graph.dims.vocab == before or not path.is_file():
        return parent
    record = loads(VocabTrimming, locate.read_text(path), where=str(path))
    if record.rows_before != before:
        return parent
    kept = vocabulary.read_runs(record.kept)
    fits = len(kept) == record.rows_after == pruned.graph.dims.vocab and list(kept) == sorted(set(kept))
    if not fits or kept[-1] >= before or not _same_tokens(parent, pruned, kept):
        raise ConfigError(
            f"{path} does not say which tokens of {parent.name} those of {pruned.name} are",
            "give the model it was pruned from with --parent",
        )
    source = TrimmedSource(parent.source, parent.family, parent.graph.dims, kept)
    return dataclasses.replace(
        parent,
        folder=pruned.folder,
        source=source,
        graph=graphs.build(source.config),
        tokenizer_kvs=pruned.gguf_tokenizer(),
        given=None,
        given_quantization=None,
        vocabulary=record,
        key=make_key("parent", "trimmed", parent.key, record.kept),
    )


def _same_tokens(parent: Parent, pruned: Parent, kept: Sequence[int]) -> bool:
    """Row i of the pruned model is the parent's token `kept[i]`; rows that only fill up have no name."""

    def rows(model: Parent) -> list[tuple[Any, bool]]:
        values = {kv.key.removeprefix("tokenizer.ggml."): kv.value for kv in model.gguf_tokenizer()}
        tokens = values.get("tokens") or ()
        kinds = values.get("token_type") or [tokenizer.NORMAL] * len(tokens)
        return [(t, k != tokenizer.UNUSED) for t, k in zip(tokens, kinds, strict=True)]

    whole, left = rows(parent), rows(pruned)
    if len(left) != len(kept) or len(whole) <= kept[-1]:
        return False
    return all(a == b or not (a[1] and b[1]) for a, b in zip((whole[i] for i in kept), left, strict=True))


def _write(
    parent: Parent,
    wanted: _Wanted,
    other: Mapping[str, str],
    folder: Path,
    sources: Sequence[str],
    key: str,
) -> VocabTrimming:
    with tempfile.TemporaryDirectory(prefix=".trim.", suffix=".part", dir=folder.parent) as made:
        before, after = Path(made) / "before", Path(made) / "after"
        before.mkdir()
        after.mkdir()
        # a SentencePiece file alone has no tokenizer.json yet
        own = parent.folder / "tokenizer.json"
        if own.is_file():
            before = parent.folder
        else:
            tokenizer.write_hf(parent.gguf_tokenizer(), before)
        of = vocabulary.Vocabulary(before, parent.gguf_tokenizer())
        path = parent.folder / "generation_config.json"
        generation = locate.read_json(path) if path.is_file() else {}
        chosen = vocabulary.choose(
            of, list(wanted.texts.values()), wanted.codes, [parent.source.config, generation]
        )
        vocabulary.write_folder(of, chosen.kept, parent.folder, after)
        growth = vocabulary.growth(before, after, other)
        dims = parent.graph.dims
        trimmed = TrimmedSource(parent.source, parent.family, dims, chosen.kept)
        graph = graphs.build(trimmed.config)
        size = parent.source.tensor(parent.family.tensor("embed")).element_size()
        removed = parent.graph.total_params - graph.total_params
        free = shutil.disk_usage(folder.parent).free
        if free < graph.total_params * size:
            raise ConfigError(
                f"{folder} needs {format_bytes(graph.total_params * size)}, its disk has "
                f"{format_bytes(free)} free",
                "free some space and run the same command again",
            )
        surgery.save(folder, trimmed, graph.shapes, extras=after)
    record = VocabTrimming(
        sources=tuple(sources),
        rows_before=dims.vocab,
        rows_after=len(chosen.kept),
        why=chosen.why,
        params_removed=removed,
        bytes_removed=removed * size,
        growth=growth,
        kept=vocabulary.write_runs(chosen.kept),
        key=key,
    )
    rundir.write_text(folder / RECORD_FILE, dumps(record))
    return record


def describe(record: VocabTrimming) -> dict[str, Any]:
    """The figures of a trimming that reports print; growth in percent."""
    return {
        "sources": list(record.sources),
        "tokens_before": record.rows_before,
        "tokens_after": record.rows_after,
        "why": dict(record.why),
        "parameters_removed": record.params_removed,
        "bytes_removed": record.bytes_removed,
        "growth": [
            {
                "text": g.text,
                "tokens_before": g.tokens_before,
                "tokens_after": g.tokens_after,
                "percent": round(100 * (g.tokens_after / g.tokens_before - 1), 1) if g.tokens_before else 0.0,
            }
            for g in record.growth
        ],
    }


def with_vocabulary(figures: Mapping[str, Any], record: VocabTrimming) -> dict[str, Any]:
    """Figures of `light.describe_plan` against the parent as it was, with its whole vocabulary."""
    before = figures["parameters_before"] + record.params_removed
    return {
        **figures,
        "parameters_before": before,
        "ratio_all": 1 - figures["parameters"] / before,
        "vocabulary": describe(record),
    }
