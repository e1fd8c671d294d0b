"""report.json (schema 1): the answer, every candidate with its reason, and how to get there again.

Predicted and measured figures lie in separate objects everywhere. Paths are relative to the run folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import edgeprune
from edgeprune import rundir
from edgeprune.records import (
    SCHEMA,
    Budget,
    Candidate,
    DeviceTarget,
    LaunchFlags,
    ModelGraph,
    Profile,
    PrunePlan,
    Selection,
    to_plain,
)
from edgeprune.report.answers import answers

_LIBRARIES = (
    *("torch", "transformers", "safetensors", "gguf", "llama-cpp-python", "numpy"),
    *("onnx", "onnxruntime", "onnxruntime-genai"),
)
FILE_NAME = "report.json"


def versions() -> dict[str, str]:
    out = {"edgeprune": edgeprune.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def launch_line(path: str, flags: LaunchFlags) -> str:
    """A llama-server command with the flags that were measured, and the ones that keep its memory flat."""
    parts = [
        "llama-server",
        f"-m {path}",
        f"-c {flags.context_tokens}",
        f"-ub {flags.ubatch}",
        f"-b {max(flags.ubatch, 64)}",
        f"-ctk {flags.kv_type} -ctv {flags.kv_type}",
        "-fa on" if flags.flash_attention else "-fa off",
    ]
    if not flags.mmap:
        parts.append("-lm none")  # llama.cpp refuses --no-mmap since b10884
    return " ".join([*parts, "-np 1 --cache-ram 0 --ctx-checkpoints 0"])


def _plan_row(plan: PrunePlan) -> dict[str, Any]:
    return {
        "id": plan.id,
        "key": plan.key,
        "allocator": plan.allocator,
        "requested_ratio": plan.requested_ratio,
        "ratio": plan.ratio,
        "ratio_all": plan.ratio_all,
        "uniform": plan.uniform,
        "layers": [[s.n_heads, s.n_kv_heads, s.n_ff] for s in plan.dims.layers],
        "compensation": plan.compensation,
        "steps": plan.steps,
        "why": dict(plan.why),
    }


def _limits(budget: Budget) -> dict[str, Any]:
    names = {
        "memory": budget.memory_bytes,
        "file": budget.file_bytes,
        "decode_speed": budget.decode_tps,
        "first_token": budget.first_token_ms,
        "kl": budget.kl,
        "energy": budget.energy_j,
        "agreement": budget.agreement,
    }
    return {
        name: {"value": limit.value, "unit": limit.unit, "from": limit.source}
        for name, limit in names.items()
        if limit is not None
    }


def build(
    *,
    command: Sequence[str],
    seed: int,
    target: DeviceTarget,
    profile: Profile,
    budget: Budget,
    name: str,
    graph: ModelGraph,
    license_name: str | None,
    parent_key: str,
    candidates: Sequence[Candidate],
    chosen: Selection,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Put everything a reader needs into plain values."""
    picked = next((c for c in candidates if c.id == chosen.selected), None)
    launch = None
    if picked is not None and picked.artifact is not None and picked.measured is not None:
        flags = picked.measured.flags
        launch = launch_line(picked.artifact.path, flags) if flags else None
    report = {
        "kind": "report",
        "schema": SCHEMA,
        "command": list(command),
        "seed": seed,
        "versions": versions(),
        "model": {
            "id": name,
            "family": graph.dims.family,
            "parameters": graph.total_params,
            "decoder_parameters": graph.decoder_params,
            "license": license_name,
            "key": parent_key,
        },
        "vocabulary": context.get("vocabulary"),
        "target": to_plain(target),
        "target_choice": context.get("target_choice"),
        "profile": to_plain(profile),
        "budget": _limits(budget),
        "objective": budget.objective,
        "scores": context.get("scores"),
        "calibration": to_plain(context.get("calibration")),
        "evaluation": to_plain(context.get("evaluation")),
        "dense_perplexity": context.get("dense_perplexity"),
        "threads": context.get("threads"),
        "plans": [_plan_row(plan) for plan in context.get("plans", ())],
        "recoveries": to_plain(context.get("recoveries", {})),
        "candidates": [to_plain(c) for c in candidates],
        "selected": chosen.selected,
        "headline": chosen.headline,
        "ties": list(chosen.ties),
        "nearest": chosen.nearest,
        "missed": list(chosen.missed),
        "launch": launch,
        "against_selected": to_plain(context.get("against_selected", {})),
        "power_modes": to_plain(context.get("power_modes", ())),
        "search": to_plain(context.get("search")),
        "samples": to_plain(context.get("samples", ())),
    }
    report["answers"] = answers(report)
    return report


def file_name(label: str | None) -> str:
    """report.json, or that of a further target of the same run."""
    return FILE_NAME if label is None else f"report-{label}.json"


def digest(report: Mapping[str, Any]) -> str:
    """sha256 of everything a report says, its own `digest` left out."""
    rest = {name: value for name, value in report.items() if name != "digest"}
    return rundir.sha256_bytes(json.dumps(rest, sort_keys=True).encode())


def sealed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its digest: a figure that is changed by hand later is noticed."""
    return {**report, "digest": digest(report)}


def write(folder: rundir.RunDir, report: Mapping[str, Any], label: str | None = None) -> dict[str, Any]:
    """Write report.json into the run folder, atomically; returns it with its digest."""
    report = sealed(report)
    with rundir.friendly_disk_errors(folder.root):
        rundir.write_text(
            folder.root / file_name(label),
            json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )
    return report
