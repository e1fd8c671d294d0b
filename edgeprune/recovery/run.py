"""One recovery from pruned weights to recovered ones: attach, train, judge, merge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune import checkpoint, reconstruction, registry, rundir
from edgeprune import graph as graphs
from edgeprune.progress import Progress
from edgeprune.records import ModelDims
from edgeprune.recovery.methods.base import Method, Packed, Setting
from edgeprune.recovery.recipe import RecoveryRecipe
from edgeprune.recovery.teacher import TOP, Cache, Targets, Teacher
from edgeprune.recovery.text import Rows
from edgeprune.recovery.train import Trained, Trainer, Training

# share of the KL in the objective; the rest is the plain loss on the text
DISTILL = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """`tensors` are those that changed, float32, by Hugging Face name; none when it was discarded."""

    trained: Trained
    rate: float
    kept: bool
    note: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)


def half_here(device: torch.device) -> bool:
    """bfloat16 is computed in hardware on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and reconstruction.half_is_fast()


def load_method(recipe: RecoveryRecipe) -> tuple[Method, dict[str, str]]:
    """The method and its resolved switches. Raises ConfigError."""
    method: Method = registry.load("recovery.methods", recipe.method, "METHOD")
    return method, method.resolve(recipe.options)


def assemble(source: checkpoint.Source, dims: ModelDims) -> nn.Module:
    """A float32 model that owns its weights: training must not write into the mapped file behind them."""
    model = checkpoint.assemble(source, dims)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    source.close()
    return model


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
    method, options = load_method(recipe)
    accelerator = Accelerator()
    device = accelerator.device
    half = half_here(device)
    folder.mkdir(parents=True, exist_ok=True)
    live = recipe.objective == "distill" and method.rate > 0
    teacher, held_targets = _teach(parent, rows, held, folder, accelerator, half=half, live=live)
    student = assemble(source, dims)
    attached = method.attach(
        student,
        Setting(dims=dims, dense=dense, quantization=recipe.quantization, seed=recipe.seed, options=options),
    )
    rate = method.rate if recipe.rate is None else recipe.rate
    training = Training(
        rate=rate,
        batch=recipe.batch,
        steps=0 if method.rate == 0 else recipe.steps,
        seconds=None if recipe.minutes is None else 60.0 * recipe.minutes,
        seed=recipe.seed,
        distill=DISTILL if recipe.objective == "distill" else 0.0,
        half=half,
        gradient_checkpointing=recipe.gradient_checkpointing,
        checkpoint_s=recipe.checkpoint_s,
    )
    trainer = Trainer(
        *(attached, rows, held, teacher, training, folder, progress),
        held_targets=held_targets,
        used_s=_spent(folder, used_s + time.monotonic() - began, accelerator),
    )
    trained = trainer.run(after_step)
    before, after = trained.points[0].kl, trained.best.kl
    if trained.best.step == 0:
        last = trained.points[-1].kl
        note = f"discarded: the validation KL went from {before:.4f} to {last:.4f} nats/token"
        if trained.steps == 0:
            note = "nothing was trained"
        return Recovered(trained=trained, rate=rate, kept=False, note=note)
    attached.merge_()
    shapes = graphs.graph_of(graphs.find_family(dims.family), dims).shapes
    state = {name: value for name, value in attached.model.state_dict().items() if name in shapes}
    packed = attached.packed()
    tensors = {}
    for name, value in state.items():
        value = value.detach().cpu().float().contiguous()
        if name in packed or not torch.equal(value, source.tensor(name).float()):
            tensors[name] = value
    source.close()
    return Recovered(
        trained=trained,
        rate=rate,
        kept=True,
        note=f"validation KL {before:.4f} to {after:.4f} nats/token",
        tensors=tensors,
        packed=packed,
    )


def _teach(
    parent: Callable[[torch.dtype], nn.Module],
    rows: Rows,
    held: Rows,
    folder: Path,
    accelerator: Accelerator,
    *,
    half: bool,
    live: bool,
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
    teacher = Teacher(model, cache=cache)
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


class RecoveredSource:
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
        self._source, self._file, self._exact = source, file, frozenset(exact)
        self.packed: Mapping[str, Packed] = packed or {}
        self._names = frozenset(load_names(file))

    @property
    def config(self) -> dict[str, object]:
        return self._source.config

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._names:
            return self._source.tensor(name)

        with safe_open(self._file, framework="pt") as f:
            value: torch.Tensor = f.get_tensor(name)
        return value if name in self._exact else value.to(self._source.tensor(name).dtype)

    def close(self) -> None:
        self._source.close()


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
