"""Recovery as a stage: training text, the run itself on one process or many, the folder that comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

import edgeprune
from edgeprune import checkpoint, data, rundir, surgery, tokenizer
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.pipeline import trimming
from edgeprune.pipeline.parent import Parent, open_folder, open_parent
from edgeprune.progress import Progress
from edgeprune.records import (
    ModelDims,
    RecoveryPoint,
    RecoveryResult,
    RecoveryTry,
    dumps,
    make_key,
    to_plain,
)
from edgeprune.recovery import packed, text
from edgeprune.recovery import recipe as recipes
from edgeprune.recovery import run as recovery
from edgeprune.recovery.processes import state
from edgeprune.recovery.recipe import RecoveryRecipe

RESULT_FILE = "edgeprune_recovery.json"
PLAN_FILE = "edgeprune_plan.json"
TEXT_SEED_OFFSET = 1_299_709  # neither calibration, nor held-out text, nor what matrices are solved on
WRITTEN_AT_ONCE = 64  # rows that the parent writes side by side
WRITING_SHARE = 0.3  # of the minutes that writing the text may take


# ---------------------------------------------------------------- text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingText:
    rows: text.Rows
    held: text.Rows
    origin: str


def training_text(parent: Parent, recipe: RecoveryRecipe, folder: Path, progress: Progress) -> TrainingText:
    """Packed windows for training and for validation; made once, then read from `folder`."""
    path = folder / "rows.safetensors"
    origin = recipe.data or "written by the parent"
    if not path.is_file():
        length = min(recipe.length, parent.graph.dims.max_context)
        if recipe.data is None:
            rows = text.plain_rows(_written(parent, recipe, length, folder, progress))
        else:
            rows = _given(parent, recipe, length)
        with rundir.friendly_disk_errors(path), rundir.atomic_path(path) as temporary:
            save_file({"tokens": rows.tokens, "learn": rows.learn}, temporary)
    arrays = load_file(path)
    rows, held = text.split(text.Rows(tokens=arrays["tokens"], learn=arrays["learn"]))
    return TrainingText(rows=rows, held=held, origin=origin)


def _given(parent: Parent, recipe: RecoveryRecipe, length: int) -> text.Rows:
    assert recipe.data is not None
    separator = parent.source.config.get("eos_token_id")
    if isinstance(separator, list):
        separator = separator[0] if separator else None
    return text.pack(
        text.read(recipe.data),
        lambda one: tokenizer.encode(parent.folder, one),
        lambda: text.Chat(parent.folder),
        n_tokens=length,
        separator=separator,
    )


def _written(
    parent: Parent, recipe: RecoveryRecipe, length: int, folder: Path, progress: Progress
) -> np.ndarray:
    """Rows that the parent writes, some at a time, until there are enough or their share of time is up."""
    half = recovery.half_here(torch.device("cpu"))
    limit = None if recipe.minutes is None else WRITING_SHARE * 60.0 * recipe.minutes
    parts: list[np.ndarray] = []
    model = None
    spent, index = 0.0, 0
    while sum(map(len, parts)) < recipe.samples:
        if parts and limit is not None and spent + spent / len(parts) > limit:
            break  # the next part would not fit
        count = min(WRITTEN_AT_ONCE, recipe.samples - sum(map(len, parts)))
        path = folder / f"written-{index}.npz"
        began = time.monotonic()
        if path.is_file():
            kept = np.load(path)
            parts.append(kept["tokens"])
            spent += float(kept["seconds"])
        else:
            if model is None:
                dtype = torch.bfloat16 if half else torch.float32
                model = checkpoint.assemble(parent.source, parent.graph.dims, dtype=dtype)
            seed = recipe.seed + TEXT_SEED_OFFSET + 1009 * index
            new = data.sample_from_model(
                model, n_samples=count, n_tokens=length, seed=seed, progress=progress
            )
            spent += time.monotonic() - began
            with rundir.atomic_path(path) as temporary, temporary.open("wb") as f:
                np.savez(f, tokens=new, seconds=time.monotonic() - began)
            parts.append(new)
        index += 1
    return np.concatenate(parts)


# ---------------------------------------------------------------- one recovery


def recipe_key(parent: Parent, source_key: str, recipe: RecoveryRecipe) -> str:
    """Changes with everything that changes the result; a data file counts by its content."""
    content = None
    if recipe.data is not None:
        path = Path(recipe.data).expanduser()
        content = rundir.sha256_file(path) if path.is_file() else recipe.data
    asked = dataclasses.asdict(dataclasses.replace(recipe, data=None, checkpoint_s=0.0))
    return make_key("recovery", parent.key, source_key, asked, content, edgeprune.__version__)


def recovered(
    run: rundir.RunDir,
    parent: Parent,
    dims: ModelDims,
    source: checkpoint.Source,
    source_key: str,
    recipe: RecoveryRecipe,
    progress: Progress,
) -> tuple[RecoveryResult, checkpoint.Source]:
    """The recovered weights of a pruned model, worked out once; every process of the run calls this.

    Where recovery made things worse the source itself comes back, and the record says so.
    """
    processes = state()
    key = recipe_key(parent, source_key, recipe)
    folder = run.path(f"artifacts/recovery-{key}")
    weights = run.path(f"arrays/recovered-{key}.safetensors")

    def valid(found: RecoveryResult) -> bool:
        if found.weights is None:
            return not found.kept
        if not weights.is_file() or rundir.sha256_file(weights) != found.weights_sha256:
            return False
        return set(recovery.exact_names(weights)) <= set(packed.load(_blocks_of(weights)))

    def compute() -> RecoveryResult:
        return _recover(run, parent, dims, source, recipe, folder, weights, key, progress)

    known = run.find(RecoveryResult, key)
    if processes.is_main_process:
        result = run.stage(RecoveryResult, key, compute, name=f"recover {recipe.method}", valid=valid)
    elif known is None or not valid(known):
        result = compute()
    else:
        result = known
    processes.wait_for_everyone()
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    if not result.kept:
        return result, source
    exact = recovery.exact_names(weights)
    return result, recovery.RecoveredSource(
        source, weights, exact=exact, packed=packed.load(_blocks_of(weights)) if exact else None
    )


def _blocks_of(weights: Path) -> Path:
    """Where the exact blocks of quantized tensors lie."""
    return weights.with_suffix("")


def _recover(
    run: rundir.RunDir,
    parent: Parent,
    dims: ModelDims,
    source: checkpoint.Source,
    recipe: RecoveryRecipe,
    folder: Path,
    weights: Path,
    key: str,
    progress: Progress,
) -> RecoveryResult:
    began = time.monotonic()
    processes = state()
    with processes.main_process_first():
        words = training_text(parent, recipe, folder, progress)

    def load_parent(dtype: torch.dtype) -> torch.nn.Module:
        return checkpoint.assemble(parent.source, parent.graph.dims, dtype=dtype)

    made = recovery.recover(
        source,
        dims,
        dense=parent.graph.dims,
        parent=load_parent,
        rows=words.rows,
        held=words.held,
        recipe=recipe,
        folder=folder,
        progress=progress,
        used_s=time.monotonic() - began,
    )
    parent.source.close()
    relative = sha256 = None
    if made.kept:
        if processes.is_main_process:
            if made.packed:
                _blocks_of(weights).mkdir(exist_ok=True)
                packed.save(_blocks_of(weights), made.packed)
            with rundir.friendly_disk_errors(weights), rundir.atomic_path(weights) as temporary:
                save_tensors(made.tensors, temporary, metadata=recovery.metadata(made))
        processes.wait_for_everyone()
        relative, sha256 = run.relative(weights), rundir.sha256_file(weights)
    trained = made.trained
    return RecoveryResult(
        method=made.candidate.method.name,
        options=made.candidate.options,
        objective=recipe.objective,
        text=words.origin,
        quantization=recipe.quantization,
        seed=recipe.seed,
        rate=made.candidate.rate,
        steps=trained.steps,
        tokens=trained.points[-1].tokens,
        seconds=round(trained.seconds, 3),
        stopped=trained.stopped,
        validation_tokens=int(words.held.learn.sum()),
        kl_before=trained.points[0].kl,
        kl_after=trained.best.kl if made.kept else trained.points[0].kl,
        kept=made.kept,
        note=made.note,
        points=tuple(RecoveryPoint(**dataclasses.asdict(p)) for p in trained.points),
        weights=relative,
        weights_sha256=sha256,
        key=key,
        processes=processes.num_processes,
        tried=tuple(
            RecoveryTry(
                method=one.candidate.method.name,
                options=one.candidate.options,
                rate=one.candidate.rate,
                seconds=round(one.seconds, 3),
                tokens=one.tokens,
                kl=one.kl,
            )
            for one in made.tried
        ),
    )


# ---------------------------------------------------------------- the verb


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[rundir.RunDir]:
    """The run folder OUT.recovery; only the main process locks it."""
    run = rundir.RunDir(out.with_name(out.name + ".recovery"))
    if state().is_main_process:
        with run:
            state().wait_for_everyone()
            yield run
    else:
        state().wait_for_everyone()
        yield run


def check_out(out: Path, *models: str | Path | None) -> None:
    """An existing folder is replaced only when it is empty or a recovered model."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file", "name a new folder")
    for model in models:
        if model is not None and out.resolve() == Path(model).resolve():
            raise ConfigError(f"--out {out} is a model that is read", "name a new folder")
    if any(out.iterdir()) and not ((out / RESULT_FILE).is_file() or (out / PLAN_FILE).is_file()):
        raise ConfigError(
            f"--out {out} exists and was not written by edgeprune", "name a new folder, or delete it"
        )


def recover(
    folder: Path, out: Path, *, parent_model: str | None, recipe: RecoveryRecipe, progress: Progress
) -> RecoveryResult:
    """Recover the pruned model in `folder` against its dense parent; `out` becomes a folder like it.

    Where tokens left the pruned model, its parent has only those that stay, too.
    A killed call goes on where it was when it is made again: its work lies in OUT.recovery until then.
    Raises ConfigError when the two models do not belong together.
    """
    out = out.absolute()
    check_out(out, folder, parent_model)
    check_recipe(recipe)
    with _work_folder(out) as run:
        processes = state()
        with processes.main_process_first():
            parent = open_parent(parent_model, run)
        pruned = open_folder(folder)
        # teacher, text and student must speak of the same tokens
        parent = trimming.like(parent, pruned)
        check_pair(parent, pruned)
        result, source = recovered(
            run, parent, pruned.graph.dims, pruned.source, pruned.key, recipe, progress
        )
        if processes.is_main_process:
            write_folder(run, pruned, source, result, out)
        processes.wait_for_everyone()
    if state().is_main_process:
        shutil.rmtree(run.root, ignore_errors=True)
    return result


def prune_and_recover(
    model: str | None,
    out: Path,
    *,
    cut: Callable[[Path, Progress], dict[str, Any]],
    asked: Mapping[str, Any],
    recipe: RecoveryRecipe,
    progress: Progress,
) -> dict[str, Any]:
    """Prune with `cut` into OUT.pruned, recover that into `out`; a killed call goes on with either.

    `asked` is the whole command: what it pruned before is taken only when the command is the same.
    """
    out = out.absolute()
    check_out(out, model)
    check_recipe(recipe)
    if state().num_processes > 1:
        raise ConfigError(
            "prune runs on one process", "prune first, then start 'edgeprune recover' on several"
        )
    staged = out.with_name(out.name + ".pruned")
    plain = {k: str(v) for k, v in asked.items() if k != "form"}
    # texts count by what is in them
    named = [asked.get("calibration"), asked.get("plan_file"), *asked.get("trim_vocab", ())]
    files = [Path(n).expanduser() for n in named if n is not None]
    contents = [rundir.sha256_file(f) for f in files if f.is_file()]
    key = make_key("staged", plain, contents, edgeprune.__version__)
    facts = staged / "edgeprune_staged.json"
    said = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    if said.get("key") != key:
        said = {"key": key, **cut(staged, progress)}
        rundir.write_text(facts, json.dumps(said))
    result = recover(staged, out, parent_model=model, recipe=recipe, progress=progress)
    shutil.rmtree(staged, ignore_errors=True)
    return {**said, "recovery": describe(result)}


def check_recipe(recipe: RecoveryRecipe) -> None:
    """Refuse what cannot be done, before the slow part. Raises ConfigError."""
    recipes.check(recipe)
    if recipe.method != recipes.AUTO:
        recovery.load_method(recipe)
    if recipe.data is not None:
        text.read(recipe.data)


def check_pair(parent: Parent, pruned: Parent) -> None:
    """The vocabularies must be one, or there is no KL. Raises ConfigError."""
    a, b = parent.graph.dims, pruned.graph.dims
    if a.vocab != b.vocab:
        raise ConfigError(
            f"{pruned.name} has {b.vocab} tokens and its parent {parent.name} {a.vocab}",
            "give the model it was pruned from with --parent",
        )


def write_folder(
    run: rundir.RunDir, pruned: Parent, source: checkpoint.Source, result: RecoveryResult, out: Path
) -> None:
    """Save recovered weights as a Hugging Face folder with the plan and the record of the recovery."""
    made = run.path("artifacts/recovered")
    dims = pruned.graph.dims
    shapes = graphs.graph_of(graphs.find_family(dims.family), dims).shapes
    with rundir.friendly_disk_errors(out):
        surgery.save(made, source, shapes, extras=pruned.folder)
        if isinstance(source, recovery.RecoveredSource):
            packed.save(made, source.packed)
        plan = pruned.folder / PLAN_FILE
        if plan.is_file():
            shutil.copyfile(plan, made / PLAN_FILE)
        rundir.write_text(made / RESULT_FILE, dumps(result))
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(made, out)


def describe(result: RecoveryResult) -> dict[str, object]:
    """What is printed and reported of a recovery."""
    return {
        "method": result.method,
        "quantization": result.quantization,
        "objective": result.objective,
        "text": result.text,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "stopped": result.stopped,
        "validation_tokens": result.validation_tokens,
        "kl_before": result.kl_before,
        "kl_after": result.kl_after,
        "kept": result.kept,
        "note": result.note,
        "tried": [to_plain(one) for one in result.tried],
    }
