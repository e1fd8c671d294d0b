"""onnxruntime-genai on the CPU: the fastest way to decode an ONNX artifact. Every job is a fresh process."""

from __future__ import annotations

import importlib.metadata
from functools import partial

from edgeprune.runtimes import _onnx_parent as jobs
from edgeprune.runtimes.base import Runtime

bench = partial(jobs.bench, "genai")
memory = partial(jobs.memory, "genai")
greedy = partial(jobs.greedy, "genai")
kv_type = jobs.kv_type

RUNTIME = Runtime(
    name="onnx-genai",
    summary="onnxruntime-genai on the CPU of this machine",
    reference="https://github.com/microsoft/onnxruntime-genai",
    formats=("onnx",),
    extra=jobs.EXTRA,
    available=partial(jobs.available, "genai"),
    version=partial(importlib.metadata.version, "onnxruntime-genai"),
    bench=bench,
    memory=memory,
)
