"""Child process of the GGUF exporter: one call of llama.cpp's quantizer, described by a JSON file."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np


def run(job: dict[str, Any]) -> int:
    """Returns 0, or llama.cpp's own failure code; its messages go to stderr."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = job["threads"]
    params.ftype = job["ftype"]
    params.allow_requantize = False

    overrides = job["overrides"]
    if overrides:
        rows = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for row, (pattern, number) in zip(rows, overrides, strict=False):
            row.pattern, row.type = pattern.encode(), number
        params.tt_overrides = ctypes.cast(rows, type(params.tt_overrides))

    keep: list[np.ndarray] = []  # llama.cpp holds pointers into these
    if job["imatrix"]:
        with np.load(job["imatrix"]) as arrays:
            named = [(name, np.ascontiguousarray(arrays[name], dtype=np.float32)) for name in arrays.files]
        entries = (llama_cpp.llama_model_imatrix_data * (len(named) + 1))()
        for entry, (name, array) in zip(entries, named, strict=False):
            keep.append(array)
            entry.name = name.encode()
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = array.size
        params.imatrix = ctypes.cast(entries, type(params.imatrix))

    return int(
        llama_cpp.llama_model_quantize(job["master"].encode(), job["out"].encode(), ctypes.byref(params))
    )


def _die_with_parent() -> None:
    # a killed run must not leave a quantizer behind that competes with the next one
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    _die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit(run(job))


if __name__ == "__main__":
    main()
