"""Candidates, budgets, reports and profiles made up by hand; nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeprune import graph, rundir
from edgeprune.records import (
    Artifact,
    Budget,
    Candidate,
    DeviceTarget,
    LaunchFlags,
    LayerShape,
    Limit,
    Measured,
    ModelDims,
    Predicted,
    Profile,
    QualitySummary,
    Selection,
)
from edgeprune.report import build as report_build

FLAGS = LaunchFlags(context_tokens=2048, ubatch=128, kv_type="f16", mmap=False)


def dims(
    *,
    hidden: int = 576,
    heads: int = 9,
    kv_heads: int = 3,
    ff: int = 1536,
    layers: int = 30,
    vocab: int = 49152,
    head_dim: int = 64,
) -> ModelDims:
    """Sizes of SmolLM2-135M unless told otherwise."""
    return ModelDims(
        family="llama",
        vocab=vocab,
        hidden=hidden,
        head_dim=head_dim,
        max_context=8192,
        tied=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        rms_eps=1e-5,
        layers=(LayerShape(n_heads=heads, n_kv_heads=kv_heads, n_ff=ff),) * layers,
    )


def limit(value: float, unit: str = "bytes", source: str = "command line") -> Limit:
    return Limit(value=value, unit=unit, source=source)


def budget(memory: float = 200e6, **over: Limit | None) -> Budget:
    values: dict[str, Any] = {
        "memory_bytes": limit(memory),
        "file_bytes": None,
        "decode_tps": None,
        "first_token_ms": None,
        "kl": None,
        "key": "budget",
        **over,
    }
    return Budget(**values)


def candidate(
    name: str,
    *,
    ratio: float = 0.0,
    memory: int | None = 150_000_000,
    predicted_memory: int = 149_000_000,
    file: int = 100_000_000,
    tps: float | None = 50.0,
    predicted_tps: float | None = 48.0,
    kl: float | None = 0.1,
    stderr: float = 0.001,
    agreement: float = 0.9,
    joules: float | None = None,
    first_token_ms: float | None = None,
    predicted_kl: tuple[float, float, float] | None = None,
    error: str | None = None,
    reason: str = "planned",
) -> Candidate:
    """A candidate; `memory` None: not measured at all, `tps` None: measured off the board.

    predicted_kl: value, low and high.
    """
    measured = None
    if memory is not None:
        measured = Measured(
            on="here",
            decode_tps=tps,
            decode_tps_stdev=None if tps is None else 0.5,
            noisy=False,
            prefill_tps=None if tps is None else 300.0,
            first_token_ms=first_token_ms,
            peak_memory_bytes=memory,
            load_s=0.5,
            flags=FLAGS,
            joules_per_token=joules,
            meter=None if joules is None else "RAPL",
        )
    quality = None
    if kl is not None and memory is not None:
        quality = QualitySummary(
            kl=kl,
            kl_stderr=stderr,
            perplexity=20.0,
            perplexity_stderr=1.0,
            agreement=agreement,
            tokens=1000,
            text="made up",
        )
    artifact = None
    if memory is not None:
        artifact = Artifact(
            path=f"artifacts/{name}.gguf",
            format="gguf",
            quantization="Q4_0",
            bytes=file,
            sha256=f"sha-{name}",
            made_from="plan",
            key=f"artifact-{name}",
        )
    return Candidate(
        id=name,
        plan="dense" if ratio == 0 else f"uniform-{100 * ratio:.1f}",
        ratio=ratio,
        ratio_all=0.8 * ratio,
        metric=None if ratio == 0 else "llm-bip",
        allocator=None if ratio == 0 else "uniform",
        quantization="Q4_0",
        uniform=True,
        artifact=artifact,
        predicted=Predicted(
            file_bytes=file,
            peak_memory_bytes=predicted_memory,
            decode_tps=predicted_tps,
            decode_tps_low=None if predicted_tps is None else 0.8 * predicted_tps,
            decode_tps_high=None if predicted_tps is None else 1.2 * predicted_tps,
            flags=FLAGS,
            **dict(zip(("kl", "kl_low", "kl_high"), predicted_kl or (), strict=False)),
        ),
        measured=measured,
        quality=quality,
        verify=None,
        meets={},
        error=error,
        reason=reason,
        key=f"candidate-{name}",
    )


def write_report(
    folder: Path,
    candidates: list[Candidate],
    *,
    target: DeviceTarget,
    profile: Profile,
    limits: Budget,
    chosen: Selection,
) -> Path:
    """A finished run's report.json."""
    report = report_build.build(
        command=("edgeprune", "--target", target.name),
        seed=0,
        target=target,
        profile=profile,
        budget=limits,
        name="made-up",
        graph=graph.graph_of(graph.find_family("llama"), dims()),
        license_name=None,
        parent_key="parent",
        candidates=candidates,
        chosen=chosen,
        context={},
    )
    with rundir.RunDir(folder) as run:
        report_build.write(run, report)
    return folder


def small_profile(
    *,
    workload: tuple[int, int, int] = (64, 32, 128),
    bench: tuple[int, int, int] = (32, 8, 1),
    **recipe: Any,
) -> str:
    """A profile whose whole run takes seconds, as TOML.

    workload: tokens of prompt, answer and context; bench: tokens of prompt and answer, repeats.
    """
    sections = {
        "workload": dict(zip(("prompt_tokens", "new_tokens", "context_tokens"), workload, strict=True)),
        "recipe": {
            "metric": "llm-bip",
            "allocators": ["uniform"],
            "calibration_samples": 4,
            "calibration_tokens": 64,
            "eval_samples": 4,
            "eval_tokens": 64,
            "formats": ["gguf"],
            "quantizations": ["Q4_0"],
            "ratios": [0.25],
            "max_measured": 2,
            **recipe,
        },
        "bench": dict(zip(("prompt_tokens", "new_tokens", "repeats"), bench, strict=True)),
    }
    lines = ['title = "a whole run in seconds"']
    for name, values in sections.items():
        # strings, numbers and lists are written alike in JSON and TOML
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
