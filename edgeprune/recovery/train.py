"""The training loop: deterministic by step, limited by tokens or minutes, resumable, on one process or many.

What happens at a step is a function of its number and of the journal, a small file of decisions that depend
on time (when the rate starts to fall, which step is the last). A run that is killed and started again reads
the journal and its last checkpoint and goes through the same steps with the same weights.
accelerate places the model, joins the gradients of processes and brings FSDP; the loop itself is ours since
transformers' Trainer neither stops by the clock at a step it can find again nor writes a checkpoint in one
piece.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from edgeprune import rundir
from edgeprune.errors import ConfigError
from edgeprune.progress import Progress
from edgeprune.recovery.methods.base import Attached, whole
from edgeprune.recovery.objective import token_losses
from edgeprune.recovery.processes import accelerator
from edgeprune.recovery.teacher import Targets, Teacher
from edgeprune.recovery.text import Rows, batch_rows

_PACE_STEPS = 3  # before these the pace is not known
_LOGITS_BYTES = 256 << 20  # of one micro-batch in float32; the loss holds a few copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train. `steps` or `seconds` ends it, whichever comes first; `batch` is over all processes."""

    rate: float
    batch: int  # rows per step
    steps: int | None
    seconds: float | None
    seed: int
    distill: float = 1.0  # share of the KL in the objective; the rest is the plain loss
    half: bool = False  # bfloat16 matrix products; weights and sums stay float32
    warmup: int = 5  # steps
    decay: float = 0.4  # share of the run at whose end the rate falls to zero, linearly
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 6
    patience: int = 3  # evaluations in a row without a better KL, before the rate falls or training stops
    checkpoint_s: float = 60.0
    gradient_checkpointing: bool = False
    shard: bool = False  # each process holds a share of weights and moments (FSDP)


@dataclass(slots=True, kw_only=True)
class Journal:
    """Decisions that depend on time or on measured KL; None: not decided yet."""

    evaluate_every: int | None = None
    decay_from: int | None = None  # the rate falls from this step on
    steps: int | None = None  # and would be zero at this one
    timed: bool = False  # the clock decided the two above
    last: int | None = None  # stopped here, before `steps`
    why: str | None = None

    @property
    def end(self) -> int | None:
        return self.steps if self.last is None else self.last


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation on the held-out rows."""

    step: int
    tokens: int  # seen so far, learned from or not
    seconds: float
    kl: float  # nats per token, on the parent's most likely tokens
    loss: float  # nats per token of the plain loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training came to. The best state is in the model; `best` is the point it was measured at."""

    points: list[Point]
    losses: list[float]  # objective of every step, mean over its learned tokens
    steps: int
    seconds: float
    stopped: str
    best: Point


def worth(point: Point, distill: float) -> float:
    """What has to fall on the held-out rows: the KL, or the plain loss where nothing is distilled."""
    return point.loss if distill == 0.0 else point.kl


class _Clock:
    def __init__(self, before: float) -> None:
        self._before, self._began = before, time.monotonic()

    def read(self) -> float:
        return self._before + time.monotonic() - self._began


def shard_(model: Any) -> None:
    """Leave each process a share of every parameter; layers are put together one at a time (FSDP)."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (torch.distributed.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Trainer:
    """Train an attached method on rows; everything it writes lies in `folder`."""

    def __init__(
        self,
        attached: Attached,
        rows: Rows,
        held: Rows,
        teacher: Teacher,
        training: Training,
        folder: Path,
        progress: Progress,
        *,
        held_targets: Targets,
        used_s: float = 0.0,
    ) -> None:
        """`held_targets` are the parent's for the held-out rows; `used_s` of the time are spent already."""
        self.attached, self.rows, self.held = attached, rows, held
        self.teacher, self.training, self.folder, self.progress = teacher, training, folder, progress
        self._held_targets = held_targets
        self._used_s = used_s
        self.accelerator = accelerator()
        world = self.accelerator.num_processes
        if training.shard and world == 1:
            raise ConfigError(
                "one process has nothing to share out",
                "start with accelerate launch, or leave --recovery-shard out",
            )
        if training.batch % world:
            raise ConfigError(
                f"a batch of {training.batch} rows cannot be shared by {world} processes",
                f"give --recovery-batch a multiple of {world}",
            )
        if training.steps is None and training.seconds is None:
            raise ConfigError("recovery has no end", "give --recovery-minutes or --recovery-tokens")
        self.main = self.accelerator.is_main_process
        folder.mkdir(parents=True, exist_ok=True)
        self._journal_path = folder / "journal.json"
        self._checkpoint_path = folder / "checkpoint.safetensors"
        self._best_path = folder / "best.safetensors"
        vocab = int(attached.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        self._micro = max(1, _LOGITS_BYTES // (4 * vocab * rows.tokens.shape[1]))

    # ------------------------------------------------ set up

    def _prepare(self) -> None:
        training, model = self.training, self.attached.model
        if training.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        self.device = self.accelerator.device
        names = {id(p): name for name, p in model.named_parameters()}
        if training.shard:
            # other parameters stand under the same names afterwards
            shard_(model.to(self.device))
        groups = [
            {
                "params": [model.get_parameter(names[id(p)]) for p in group.params],
                "lr": training.rate * group.scale,
                "scale": group.scale,
                "weight_decay": training.weight_decay if group.decay else 0.0,
            }
            for group in self.attached.groups()
            if group.params
        ]
        self.params = [p for group in groups for p in group["params"]]
        self.model, self.optimizer = model.to(self.device), None
        if not groups:
            return
        plain = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        if training.shard:
            # accelerate's own way to FSDP asks for GPUs; torch's works wherever there are processes
            self.optimizer = self.accelerator.prepare(plain)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, plain)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self.training.half and self.accelerator.mixed_precision == "no":
            with torch.autocast(self.device.type, torch.bfloat16):
                yield
        else:
            yield

    def _agree(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.accelerator.num_processes == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    # ------------------------------------------------ one step

    def _rate(self, step: int, journal: Journal) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        factor = min(1.0, (step + 1) / self.training.warmup) if self.training.warmup else 1.0
        if journal.decay_from is not None and step >= journal.decay_from:
            assert journal.steps is not None
            factor *= (journal.steps - step) / (journal.steps - journal.decay_from + 1)
        return factor

    def _step(self, step: int, journal: Journal) -> float:
        """Train on the step's rows; returns the mean objective over its learned tokens."""
        training, accelerator = self.training, self.accelerator
        torch.manual_seed((training.seed * 1_000_003 + step) * 64 + accelerator.process_index)
        index = batch_rows(step, n_rows=len(self.rows), batch=training.batch, seed=training.seed)
        n_learned = max(1, int(self.rows.learn[index].sum()))
        own = index[accelerator.process_index :: accelerator.num_processes]
        for group in self.optimizer.param_groups:
            group["lr"] = training.rate * group["scale"] * self._rate(step, journal)
        self.model.train()
        total = torch.zeros((), device=self.device)
        parts = [own[i : i + self._micro] for i in range(0, len(own), self._micro)]
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            wait = contextlib.nullcontext() if last or training.shard else accelerator.no_sync(self.model)
            with wait:
                loss = self._losses(part).sum() / n_learned
                # processes average their gradients; the sum over all tokens is wanted
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        accelerator.clip_grad_norm_(self.params, training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(accelerator.reduce(total, "sum"))

    def _losses(self, part: np.ndarray) -> torch.Tensor:
        """Objective of the learned tokens of some rows, zero elsewhere."""
        tokens = self.rows.tokens[part]
        parent = None
        if self.training.distill > 0.0:
            ids, values = self.teacher.targets(part, tokens)
            parent = (ids.to(self.device), values.to(self.device))
        ids = torch.from_numpy(tokens).to(self.device)
        learn = torch.from_numpy(self.rows.learn[part][:, 1:]).to(self.device)
        with self._precision():
            logits = self.model(input_ids=ids.long(), use_cache=False).logits
        objective, _ = token_losses(logits, ids, parent, distill=self.training.distill)
        return objective * learn

    def evaluate(self) -> tuple[float, float]:
        """(KL to the parent, plain loss) per learned token of the held-out rows, in nats."""
        self.model.eval()
        divergence = plain = 0.0
        with torch.no_grad():
            for start in range(0, len(self.held), self._micro):
                part = slice(start, start + self._micro)
                ids = torch.from_numpy(self.held.tokens[part]).to(self.device)
                learn = torch.from_numpy(self.held.learn[part][:, 1:]).to(self.device)
                parent = tuple(value[part].to(self.device) for value in self._held_targets)
                with self._precision():
                    logits = self.model(input_ids=ids.long(), use_cache=False).logits
                found = token_losses(logits, ids, parent, distill=1.0)  # type: ignore[arg-type]
                divergence += float((found[0] * learn).double().sum())
                plain += float((found[1] * learn).double().sum())
        n = int(self.held.learn.sum())
        return divergence / n, plain / n

    # ------------------------------------------------ files

    def _read_journal(self) -> Journal:
        if not self._journal_path.is_file():
            return Journal()
        return Journal(**json.loads(self._journal_path.read_text(encoding="utf-8")))

    def _write_journal(self, journal: Journal) -> None:
        if self.main:
            rundir.write_text(self._journal_path, json.dumps(dataclasses.asdict(journal)))

    def _save(self, path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        with rundir.friendly_disk_errors(path), rundir.atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"meta": json.dumps(meta)})

    def _checkpoint(self, meta: dict[str, Any]) -> None:
        tensors = {f"state.{name}": value for name, value in self.attached.state().items()}
        for index, fields in self.optimizer.state_dict()["state"].items():
            # every process takes part where each holds a share
            fields = {name: whole(value).contiguous() for name, value in fields.items()}
            tensors |= {f"optimizer.{index}.{k}": v for k, v in fields.items()}
        if self.main:
            self._save(self._checkpoint_path, tensors, meta)

    def _resume(self) -> dict[str, Any] | None:
        """Put the last checkpoint back; returns its facts, or None when there is none."""
        if not self._checkpoint_path.is_file():
            return None
        state: dict[str, torch.Tensor] = {}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(self._checkpoint_path, framework="pt") as f:
                meta: dict[str, Any] = json.loads(f.metadata()["meta"])
                for name in f.keys():  # noqa: SIM118  a safetensors file is no mapping
                    kind, _, rest = name.partition(".")
                    if kind == "state":
                        state[rest] = f.get_tensor(name)
                    else:
                        index, _, field = rest.partition(".")
                        moments.setdefault(int(index), {})[field] = f.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._checkpoint_path} is damaged: {error}", f"delete {self.folder} and start again"
            ) from None
        self.attached.load_(state)
        self._load_moments(moments)
        return meta

    def _load_moments(self, moments: dict[int, dict[str, torch.Tensor]]) -> None:
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, fields in moments.items():
            parameter = order[index]
            if isinstance(parameter, DTensor):
                moments[index] = {
                    name: (
                        distribute_tensor(
                            value.to(parameter.device), parameter.device_mesh, parameter.placements
                        )
                        if value.shape == parameter.shape
                        else value
                    )
                    for name, value in fields.items()
                }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _load_best(self) -> None:
        with safe_open(self._best_path, framework="pt") as f:
            self.attached.load_({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118

    # ------------------------------------------------ the run

    def run(
        self, after_step: Callable[[int], None] | None = None, *, pause_s: float | None = None
    ) -> Trained:
        """Train to the end and leave the best state in the model. `after_step` is told each finished step.

        After `pause_s` of the time limit it is left in a checkpoint instead, for a later call to go on.
        """
        training = self.training
        self._prepare()
        journal = self._agree(self._read_journal())
        meta = self._resume()
        self.accelerator.wait_for_everyone()
        points = [Point(**p) for p in meta["points"]] if meta else []
        losses: list[float] = list(meta["losses"]) if meta else []
        step = int(meta["step"]) if meta else 0
        clock = _Clock(float(meta["seconds"]) if meta else self._used_s)
        if meta is None:
            points.append(self._point(0, clock))
        if training.steps is not None and journal.evaluate_every is None:
            journal.steps = training.steps
            journal.decay_from = training.steps - round(training.decay * training.steps)
            journal.evaluate_every = max(1, training.steps // training.evaluations)
        saved_at, save_took = clock.read(), 0.0
        began_step, began_at = step, clock.read()
        with self.progress.stage("recover", journal.steps) as bar:
            bar.advance(step)
            while journal.end is None or step < journal.end:
                losses.append(self._step(step, journal))
                step += 1
                bar.advance()
                now = clock.read()
                if training.seconds is not None:
                    pace = (now - began_at) / (step - began_step)
                    self._watch(journal, step, now, pace, known=step - began_step >= _PACE_STEPS)
                if journal.evaluate_every and step % journal.evaluate_every == 0:
                    points.append(self._evaluated(points, step, clock))
                    self._rest(journal, points, step)
                if self._agree(clock.read() - saved_at > max(training.checkpoint_s, 30 * save_took)):
                    before = clock.read()
                    self._checkpoint(self._facts(step, clock, points, losses))
                    saved_at, save_took = clock.read(), clock.read() - before
                if after_step is not None:
                    after_step(step)
                if pause_s is not None and self._agree(clock.read() >= pause_s):
                    if points[-1].step != step:
                        points.append(self._evaluated(points, step, clock))
                    self._checkpoint(self._facts(step, clock, points, losses))
                    break
        paused = journal.end is None or step < journal.end
        if points[-1].step != step:
            points.append(self._evaluated(points, step, clock))
        best = min(points, key=self._worth)
        if best.step not in (0, step) and not paused:
            self._load_best()
        seconds = clock.read()
        self._release()
        return Trained(
            points=points,
            losses=losses,
            steps=step,
            seconds=seconds,
            stopped=journal.why or ("the time limit" if journal.timed else "the tokens asked for"),
            best=best,
        )

    def _facts(self, step: int, clock: _Clock, points: list[Point], losses: list[float]) -> dict[str, Any]:
        return {
            "step": step,
            "seconds": clock.read(),
            "points": [dataclasses.asdict(p) for p in points],
            "losses": losses,
        }

    def _point(self, step: int, clock: _Clock) -> Point:
        divergence, plain = self.evaluate()
        tokens = step * self.training.batch * self.rows.tokens.shape[1]
        point = Point(step=step, tokens=tokens, seconds=clock.read(), kl=divergence, loss=plain)
        if not math.isfinite(point.kl):
            # a best of NaN would be kept; no KL is this large
            point = dataclasses.replace(point, kl=1e9, loss=1e9)
        self.progress.say(f"recover: step {step}, validation KL {point.kl:.4f}, loss {point.loss:.4f}")
        return point

    def _evaluated(self, points: list[Point], step: int, clock: _Clock) -> Point:
        point = self._point(step, clock)
        if self._worth(point) < min(map(self._worth, points)):
            state = self.attached.state()
            if self.main:
                self._save(self._best_path, state, {"step": step})
        return point

    def _worth(self, point: Point) -> float:
        return worth(point, self.training.distill)

    def _rest(self, journal: Journal, points: list[Point], step: int) -> None:
        """No lower KL for `patience` evaluations: the rate starts to fall; if it was falling, stop.

        At the full rate the KL may well stand above the first one: what is learned there shows in the fall.
        """
        patience, decay = self.training.patience, self.training.decay
        falling = journal.decay_from is not None and step > journal.decay_from
        if falling:
            assert journal.decay_from is not None
            points = [p for p in points if p.step >= journal.decay_from]
        best = min(range(len(points)), key=lambda i: self._worth(points[i]))
        if len(points) - 1 - best < patience or journal.last is not None or step == journal.steps:
            return
        if falling:
            journal.last = step
        else:
            more = max(1, round(decay / (1.0 - decay) * step))
            if journal.steps is not None and step + more >= journal.steps:
                return
            journal.decay_from, journal.steps = step, step + more
        journal.why = f"the validation {'loss' if self.training.distill == 0.0 else 'KL'} no longer fell"
        self._write_journal(journal)

    def _watch(self, journal: Journal, step: int, now: float, pace: float, *, known: bool) -> None:
        """Decide by the clock, once each, and write it down before the next step."""
        seconds = self.training.seconds
        assert seconds is not None
        before = dataclasses.replace(journal)
        if self.main:
            left = seconds - now
            if journal.evaluate_every is None and known:
                journal.evaluate_every = max(1, round((now + left) / pace / self.training.evaluations))
            constant = journal.decay_from is None or step < journal.decay_from
            if not journal.timed and constant and now >= (1.0 - self.training.decay) * seconds:
                # two evaluations and the merge have to fit in as well: a twentieth is kept back
                more = max(1, int((left - 0.05 * seconds) / pace))
                if journal.steps is None or step + more < journal.steps:
                    journal.decay_from, journal.steps, journal.timed = step, step + more, True
            if left <= 0 and journal.last is None and step != journal.steps:
                journal.last, journal.why = step, "the time limit"
        after = self._agree(journal)
        for field in dataclasses.fields(Journal):
            setattr(journal, field.name, getattr(after, field.name))
        if journal != before:
            self._write_journal(journal)

    def _release(self) -> None:
        model = self.attached.model
        if not self.training.shard:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.training.gradient_checkpointing:
            model.activation_checkpointing_disable()
        model.eval()
        if self.optimizer is not None:
            self.optimizer.optimizer.state.clear()
        self.accelerator.free_memory()
        del self.model, self.optimizer
