"""One recovery from pruned weights to recovered ones: attach, train, judge, merge."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune import checkpoint, reconstruction, registry, rundir
from edgeprune import graph as graphs
from edgeprune.progress import Progress
from edgeprune.records import ModelDims
from edgeprune.recovery import _grouped, processes
from edgeprune.recovery.methods.base import Attached, Method, Packed, Setting
from edgeprune.recovery.recipe import AUTO, RecoveryRecipe
from edgeprune.recovery.teacher import TOP, Cache, Targets, Teacher
from edgeprune.recovery.text import Rows
from edgeprune.recovery.train import Trained, Trainer, Training, shard_, worth

INPUT_ROWS = 16  # that say how large the inputs of each matrix are
ROUNDS = (0.05, 0.1)  # of auto: share of the time for each candidate that is left


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to train: a method with its switches resolved, and a learning rate."""

    method: Method
    options: dict[str, str]
    rate: float

    @property
    def label(self) -> str:
        return f"{self.method.name} {self.rate:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """How far a candidate of auto came: its own seconds and tokens, its best KL."""

    candidate: Candidate
    seconds: float
    tokens: int
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """`tensors` are those that changed, float32, by Hugging Face name; none when it was discarded."""

    candidate: Candidate
    trained: Trained
    kept: bool
    note: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)
    tried: tuple[Try, ...] = ()


def half_here(device: torch.device) -> bool:
    """bfloat16 is computed in hardware on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and reconstruction.half_is_fast()


def load_method(recipe: RecoveryRecipe) -> tuple[Method, dict[str, str]]:
    """The method and its resolved switches. Raises ConfigError."""
    method: Method = registry.load("recovery.methods", recipe.method, "METHOD")
    options = method.resolve(recipe.options)
    if method.check is not None:
        method.check(recipe.quantization)
    return method, options


def assemble(source: checkpoint.Source, dims: ModelDims) -> nn.Module:
    """A float32 model that owns its weights: training must not write into the mapped file behind them."""
    model = checkpoint.assemble(source, dims)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    source.close()
    return model


@dataclass(slots=True, kw_only=True)
class _Bench:
    """What every candidate is trained with."""

    source: checkpoint.Source
    dims: ModelDims
    dense: ModelDims | None
    rows: Rows
    held: Rows
    teacher: Teacher
    held_targets: Targets
    recipe: RecoveryRecipe
    half: bool
    progress: Progress

    def attach(self, candidate: Candidate, folder: Path) -> Attached:
        """The pruned model with the candidate's method on it, untrained."""
        student = assemble(self.source, self.dims)
        setting = Setting(
            dims=self.dims,
            dense=self.dense,
            quantization=self.recipe.quantization,
            seed=self.recipe.seed,
            options=candidate.options,
            inputs=self._inputs(student, folder) if candidate.method.quantized else None,
        )
        return candidate.method.attach(student, setting)

    def train(
        self,
        candidate: Candidate,
        folder: Path,
        *,
        steps: int | None,
        seconds: float | None,
        used_s: float = 0.0,
        pause_s: float | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> tuple[Attached, Trained]:
        """Train to the end, or to a pause from which a later call goes on; what is in `folder` counts."""
        recipe = self.recipe
        attached = self.attach(candidate, folder)
        training = Training(
            rate=candidate.rate,
            batch=recipe.batch,
            steps=steps,
            seconds=seconds,
            seed=recipe.seed,
            distill=_distill(recipe),
            half=self.half,
            gradient_checkpointing=recipe.gradient_checkpointing,
            checkpoint_s=recipe.checkpoint_s,
            shard=recipe.shard,
        )
        trainer = Trainer(
            *(attached, self.rows, self.held, self.teacher, training, folder, self.progress),
            held_targets=self.held_targets,
            used_s=used_s,
        )
        return attached, trainer.run(after_step, pause_s=pause_s)

    def _inputs(self, student: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
        """Mean squared inputs of the matrices, worked out once: a resumed run must round as before."""
        path = folder / "inputs.safetensors"
        with processes.state().main_process_first():
            if path.is_file():
                return load_file(path)
            made = _grouped.input_squares(student, self.rows.tokens[:INPUT_ROWS], half_precision=self.half)
            folder.mkdir(parents=True, exist_ok=True)
            with rundir.atomic_path(path) as temporary:
                save_file(made, temporary)
            return made


def recover(
    source: checkpoint.Source,
    dims: ModelDims,
    *,
    dense: ModelDims | None,
    parent: Callable[[torch.dtype], nn.Module],
    rows: Rows,
    held: Rows,
    recipe: RecoveryRecipe,
    folder: Path,
    progress: Progress,
    used_s: float = 0.0,
    after_step: Callable[[int], None] | None = None,
) -> Recovered:
    """Recover the model of `source` with sizes `dims`; `parent` loads the dense model in a dtype.

    `folder` holds checkpoints, so that a killed run goes on; `used_s` of the time limit are spent already.
    Every process of a distributed run calls this; all get the result.
    """
    began = time.monotonic()
    accelerator = processes.accelerator()
    half = recipe.precision == "auto" and half_here(accelerator.device)
    folder.mkdir(parents=True, exist_ok=True)
    live = recipe.objective == "distill" and recipe.method != "none"
    teacher, held_targets = _teach(
        parent, rows, held, folder, accelerator, half=half, live=live, shard=recipe.shard
    )
    bench = _Bench(
        source=source,
        dims=dims,
        dense=dense,
        rows=rows,
        held=held,
        teacher=teacher,
        held_targets=held_targets,
        recipe=recipe,
        half=half,
        progress=progress,
    )
    seconds = None if recipe.minutes is None else 60.0 * recipe.minutes
    used_s = _spent(folder, used_s + time.monotonic() - began, accelerator)
    if recipe.method == AUTO:
        assert seconds is not None
        return _halving(bench, folder, seconds, used_s, accelerator, after_step)
    method, options = load_method(recipe)
    rate = method.rate if recipe.rate is None else recipe.rate
    candidate = Candidate(method=method, options=options, rate=rate)
    steps = 0 if method.rate == 0 else recipe.steps
    attached, trained = bench.train(
        candidate, folder, steps=steps, seconds=seconds, used_s=used_s, after_step=after_step
    )
    return _finish(bench, candidate, attached, trained, folder)


def _distill(recipe: RecoveryRecipe) -> float:
    """Share of the KL in the objective."""
    return recipe.mix if recipe.objective == "distill" else 0.0


def _finish(
    bench: _Bench, candidate: Candidate, attached: Attached, trained: Trained, folder: Path
) -> Recovered:
    """Merge what was trained, or discard it when no evaluation was better than the start."""
    distill = _distill(bench.recipe)
    judged = "KL" if distill else "loss"
    before, after = (worth(p, distill) for p in (trained.points[0], trained.best))
    source = bench.source
    state = attached.state() if bench.recipe.shard else None
    if trained.best.step == 0:
        last = worth(trained.points[-1], distill)
        note = f"discarded: the validation {judged} went from {before:.4f} to {last:.4f} nats/token"
        if trained.steps == 0:
            note = "nothing was trained"
        return Recovered(candidate=candidate, trained=trained, kept=False, note=note)
    if state is not None:
        # merging wants whole weights, which no process has any more
        attached = bench.attach(candidate, folder)
        attached.load_(state)
    attached.merge_()
    shapes = graphs.graph_of(graphs.find_family(bench.dims.family), bench.dims).shapes
    state = {name: value for name, value in attached.model.state_dict().items() if name in shapes}
    packed = attached.packed()
    tensors = {}
    for name, value in state.items():
        value = value.detach().cpu().float().contiguous()
        if name in packed or not torch.equal(value, source.tensor(name).float()):
            tensors[name] = value
    source.close()
    return Recovered(
        candidate=candidate,
        trained=trained,
        kept=True,
        note=f"validation {judged} {before:.4f} to {after:.4f} nats/token",
        tensors=tensors,
        packed=packed,
    )


# ---------------------------------------------------------------- auto


def candidates(recipe: RecoveryRecipe) -> list[Candidate]:
    """What auto tries: every method that trains plain weights, at its own rate and at a neighbour's."""
    found = []
    for name in registry.names("recovery.methods"):
        method: Method = registry.load("recovery.methods", name, "METHOD")
        if method.rate > 0 and method.quantized == (recipe.quantization is not None):
            base = method.rate if recipe.rate is None else recipe.rate
            options = method.resolve({})
            found += [Candidate(method=method, options=options, rate=base * by) for by in (1.0, 0.4)]
    return found


def _halving(
    bench: _Bench,
    folder: Path,
    seconds: float,
    used_s: float,
    accelerator: Accelerator,
    after_step: Callable[[int], None] | None,
) -> Recovered:
    """All candidates a little, the better half a little more, the best one the rest of the time.

    Nobody starts again: a candidate that goes on does so from its checkpoint. What the rounds measured lies
    in a file, so that a killed run does not decide anew.
    """
    left = seconds - used_s
    alive = candidates(bench.recipe)
    tries: dict[str, Try] = {}
    path = folder / "auto.json"
    known: dict[str, dict[str, Any]] = {}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    for round_ in range(len(ROUNDS)):
        if len(alive) == 1:
            break
        for candidate in alive:
            name = f"{round_} {candidate.label}"
            if name not in known:
                bench.progress.say(f"recover: {candidate.label}, round {round_ + 1}")
                began = time.monotonic()
                _, trained = bench.train(
                    candidate,
                    folder / candidate.label.replace(" ", "-"),
                    steps=None,
                    seconds=left,
                    pause_s=sum(ROUNDS[: round_ + 1]) * left,
                    after_step=after_step,
                )
                last = trained.points[-1]
                known[name] = {
                    "seconds": trained.seconds,
                    "tokens": last.tokens,
                    "kl": trained.best.kl,
                    "wall": time.monotonic() - began,
                }
                known = _agreed(known, accelerator)
                if accelerator.is_main_process:
                    rundir.write_text(path, json.dumps(known))
            figures = {k: v for k, v in known[name].items() if k != "wall"}
            tries[candidate.label] = Try(candidate=candidate, **figures)
        alive = sorted(alive, key=lambda c: tries[c.label].kl)[: math.ceil(len(alive) / 2)]
        if round_ + 1 == len(ROUNDS):
            alive = alive[:1]
    best = alive[0]
    rest = left - sum(figures["wall"] for figures in known.values())
    own = tries[best.label].seconds if best.label in tries else 0.0
    bench.progress.say(f"recover: {best.label} has the rest of the time")
    attached, trained = bench.train(
        best,
        folder / best.label.replace(" ", "-"),
        steps=bench.recipe.steps,
        seconds=max(own + rest, own + 1.0),
        after_step=after_step,
    )
    last = trained.points[-1]
    tries[best.label] = Try(candidate=best, seconds=trained.seconds, tokens=last.tokens, kl=trained.best.kl)
    made = _finish(bench, best, attached, trained, folder / best.label.replace(" ", "-"))
    return dataclasses.replace(made, tried=tuple(tries.values()))


def _agreed(value: Any, accelerator: Accelerator) -> Any:
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def _teach(
    parent: Callable[[torch.dtype], nn.Module],
    rows: Rows,
    held: Rows,
    folder: Path,
    accelerator: Accelerator,
    *,
    half: bool,
    live: bool,
    shard: bool,
) -> tuple[Teacher, Targets]:
    """The parent ready to give targets (if `live`), and its targets for the held-out rows."""
    stored = folder / "held-targets.safetensors"
    cache = None
    if live and accelerator.num_processes == 1:
        # what the parent says of a row is worked out once, however often the row is trained on
        cache = Cache(folder / "parent", len(rows), rows.tokens.shape[1], TOP)
    model = None
    if live or not stored.is_file():
        model = parent(torch.bfloat16 if half else torch.float32).to(accelerator.device).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if shard:
            shard_(model)
    teacher = Teacher(model, cache=cache)
    if shard and not stored.is_file():
        found = teacher.compute(held.tokens)  # all processes together
        if accelerator.is_main_process:
            with rundir.atomic_path(stored) as temporary:
                save_file({"ids": found[0].contiguous(), "values": found[1].contiguous()}, temporary)
        accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        if stored.is_file():
            found = load_file(stored)
            targets = (found["ids"], found["values"])
        else:
            targets = teacher.compute(held.tokens)
            if accelerator.is_main_process:
                with rundir.atomic_path(stored) as temporary:
                    save_file({"ids": targets[0].contiguous(), "values": targets[1].contiguous()}, temporary)
    if not live:
        teacher.release()
    return teacher, targets


def _spent(folder: Path, seconds: float, accelerator: Accelerator) -> float:
    """Seconds before the first step, as first measured: a resumed run must not count them anew."""
    path = folder / "prepared.json"
    if accelerator.is_main_process and not path.is_file():
        rundir.write_text(path, json.dumps({"seconds": seconds}))
    accelerator.wait_for_everyone()
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])


class RecoveredSource(checkpoint.View):
    """A source some of whose tensors come from a file of recovered weights, in their old types.

    `exact` names tensors that stay float32: their rounding is part of the result, and `packed` has their
    blocks.
    """

    def __init__(
        self,
        source: checkpoint.Source,
        file: Path,
        *,
        exact: Sequence[str] = (),
        packed: Mapping[str, Packed] | None = None,
    ) -> None:
        super().__init__(source)
        self._file, self._exact = file, frozenset(exact)
        self.packed: Mapping[str, Packed] = packed or {}
        self._names = frozenset(load_names(file))

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._names:
            return super().tensor(name)
        with safe_open(self._file, framework="pt") as f:
            value: torch.Tensor = f.get_tensor(name)
        return value if name in self._exact else value.to(super().tensor(name).dtype)


def load_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as f:
        return list(f.keys())


def metadata(made: Recovered) -> dict[str, str]:
    """What a file of recovered weights says beside them: which are exact in their quantized form."""
    return {"exact": json.dumps(sorted(made.packed))}


def exact_names(file: Path) -> list[str]:
    """Tensors of such a file that must not be rounded again."""
    with safe_open(file, framework="pt") as f:
        names: list[str] = json.loads((f.metadata() or {}).get("exact", "[]"))
    return names
