"""What the report says beside the choice: power modes and sample outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune import rundir
from edgeprune.costs import speed as speed_costs
from edgeprune.costs.gguf_header import read_header
from edgeprune.errors import StageError
from edgeprune.pipeline import samples
from edgeprune.pipeline.parent import Parent
from edgeprune.progress import Progress
from edgeprune.records import (
    Candidate,
    DeviceTarget,
    ModelDims,
    ModeSpeed,
    SampleSet,
    Selection,
    Workload,
)

PARENT = "dense F16"  # how samples name the model that all are compared with


def power_modes(
    target: DeviceTarget,
    current: str | None,
    candidate: Candidate | None,
    path: Path | None,
    dims: ModelDims,
    workload: Workload,
) -> tuple[ModeSpeed, ...]:
    """Predicted decode speed of the selected file in every power mode of the target, slowest first."""
    if candidate is None or path is None or len(target.power_modes) < 2:
        return ()
    flags = candidate.measured.flags if candidate.measured else candidate.predicted.flags
    if flags is None:
        return ()
    tensors = [(t.name, t.type.name, t.n_bytes) for t in read_header(path).tensors]
    read = speed_costs.by_type(tensors, tied=dims.tied)
    out = []
    for mode in target.power_modes:
        model = speed_costs.speed_model(target, mode=mode.name)
        if model is None:
            return ()
        tps, low, high = speed_costs.predict_decode(
            dims, read=read, flags=flags, context_tokens=workload.prompt_tokens, speed=model
        )
        out.append(
            ModeSpeed(
                mode=mode.name,
                current=mode.name == (current or target.default_mode),
                decode_tps=tps,
                decode_tps_low=low,
                decode_tps_high=high,
            )
        )
    return tuple(sorted(out, key=lambda m: m.decode_tps))


def shown(candidates: Sequence[Candidate], chosen: Selection) -> list[Candidate]:
    """Whose outputs stand beside the parent's: the selected one, and the best pruned one if it is dense."""
    able = [c for c in candidates if c.artifact is not None and c.quality is not None and c.error is None]
    out = [c for c in able if c.id == chosen.selected]
    if not out or not out[0].ratio:
        pruned = [c for c in able if c.ratio > 0]
        fitting = [c for c in pruned if c.meets and all(c.meets.values())] or pruned
        out += sorted(fitting, key=lambda c: c.quality.kl if c.quality else math.inf)[:1]
    # the dense F16 file is the parent, whose outputs are there already
    return [c for c in out if c.ratio > 0 or c.quantization != "F16"]


def sample(
    run: rundir.RunDir,
    parent: Parent,
    progress: Progress,
    file: Callable[[], Path],
    *,
    source: str,
    made_from: str,
    kv_type: str,
    threads: int,
) -> SampleSet | None:
    """Sample outputs, or None when the runtime fails: they are worth a look, not worth the run."""
    try:
        return samples.take(
            run,
            file,
            source=source,
            made_from=made_from,
            parent=parent.name,
            kvs=parent.tokenizer_kvs,
            max_context=parent.graph.dims.max_context,
            kv_type=kv_type,
            threads=threads,
        )
    except StageError as error:
        progress.say(f"no sample outputs of {source}: {error.message}")
        return None
