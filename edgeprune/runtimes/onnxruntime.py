"""Plain ONNX Runtime on the CPU: logits of every position, and decoding without the genai library."""

from __future__ import annotations

import importlib.metadata
from functools import partial

from edgeprune.runtimes import _onnx_parent as jobs
from edgeprune.runtimes.base import Runtime

bench = partial(jobs.bench, "ort")
memory = partial(jobs.memory, "ort")
greedy = partial(jobs.greedy, "ort")
logits = jobs.logits
score = jobs.score

RUNTIME = Runtime(
    name="onnxruntime",
    summary="ONNX Runtime on the CPU of this machine",
    reference="https://onnxruntime.ai/docs",
    formats=("onnx",),
    extra=jobs.EXTRA,
    available=partial(jobs.available, "ort"),
    version=partial(importlib.metadata.version, "onnxruntime"),
    bench=bench,
    memory=memory,
)
