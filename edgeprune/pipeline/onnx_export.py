"""Export a model as an ONNX folder and prove it: logits against torch, then 64 decoded tokens."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune import calibration, checkpoint, rundir, verify
from edgeprune.errors import ConfigError, StageError
from edgeprune.exporters import onnx as exporter
from edgeprune.pipeline import prepare
from edgeprune.pipeline.lane import VERIFY_TOKENS
from edgeprune.pipeline.parent import Parent
from edgeprune.progress import Progress
from edgeprune.runtimes import onnx_genai, onnxruntime

GREEDY_TOKENS = 64
_PROMPT_TOKENS = 32
# larger models are not written as fp32 first: the graph is the same for all quantizations
MOST_FP32_PARAMS = 2_000_000_000
# torch and ONNX Runtime add up in another order
MOST_DIFFERENCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One artifact folder: bytes predicted and real, one digest over all its files, and what was verified."""

    path: Path
    predicted_bytes: int
    bytes: int
    sha256: str
    verified: verify.Comparison | None


def check_out(out: Path) -> None:
    """Raises ConfigError unless `out` is new, empty or an ONNX folder that may be replaced."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file", "an ONNX export is a folder; name a new one")
    if any(out.iterdir()) and not (out / exporter.GENAI_CONFIG).is_file():
        raise ConfigError(f"--out {out} exists and is not an ONNX export", "name a new folder, or delete it")


def export(
    run: rundir.RunDir,
    parent: Parent,
    *,
    quantization: str,
    imatrix: dict[str, np.ndarray] | None,
    check: bool,
    seed: int,
    threads: int,
    progress: Progress,
) -> Made:
    """Write the folder into the run folder and, with `check`, hold it against torch.

    A quantized file follows an fp32 one that had to agree with torch. Raises StageError when it cannot
    be trusted, MissingExtraError when a library is missing.
    """
    exporter.check_quantization(quantization)
    # what is missing is said before the slow part
    exporter.library("onnx")
    if check:
        for name in ("onnxruntime", "onnxruntime_genai"):
            exporter.library(name)
    job = _Job(run=run, parent=parent, threads=threads, progress=progress)
    if check:
        job.make_reference(seed)
        if quantization not in ("fp32", "fp16") and parent.graph.total_params <= MOST_FP32_PARAMS:
            shutil.rmtree(job.make("fp32", None)[0])
    path, n_bytes, compared = job.make(quantization, imatrix)
    return Made(
        path=path,
        predicted_bytes=job.cost().file_bytes(parent.graph.dims, quantization),
        bytes=n_bytes,
        sha256=exporter.sha256_folder(path),
        verified=compared,
    )


@dataclass(slots=True, kw_only=True)
class _Job:
    run: rundir.RunDir
    parent: Parent
    threads: int
    progress: Progress
    window: np.ndarray | None = None  # [1, T]
    expected: np.ndarray | None = None  # [T, vocab], torch's logits

    def cost(self) -> exporter.FileCost:
        return exporter.FileCost(
            self.parent.family, self.parent.source.config, tokenizer_folder=self.parent.folder
        )

    def make_reference(self, seed: int) -> None:
        tokens = prepare.Tokens(self.run, self.parent, self.progress)
        _, self.window = tokens.get(
            None, n_samples=1, n_tokens=VERIFY_TOKENS, seed=seed + prepare.EVAL_SEED_OFFSET
        )
        self.expected = calibration.forward(self.parent.source, self.parent.graph.dims, self.window)[0]

    def make(
        self, quantization: str, imatrix: dict[str, np.ndarray] | None
    ) -> tuple[Path, int, verify.Comparison | None]:
        path = self.run.path(f"artifacts/onnx-{quantization}")
        parent = self.parent
        with self.progress.stage(f"export {quantization}"):
            n_bytes = exporter.export(
                path,
                family=parent.family,
                dims=parent.graph.dims,
                config=parent.source.config,
                read_tensor=lambda n: checkpoint.to_float32(parent.source.tensor(n)),
                quantization=quantization,
                imatrix=imatrix,
                threads=self.threads,
                tokenizer_folder=parent.folder,
            )
        compared = None
        if self.window is not None and self.expected is not None:
            with self.progress.stage(f"verify {quantization}"):
                compared = self.compare(path)
                self.judge(path, quantization, compared)
        return path, n_bytes, compared

    def compare(self, path: Path) -> verify.Comparison:
        assert self.window is not None and self.expected is not None
        return verify.compare(self.expected, self.logits(path, self.window)[0])

    def logits(self, path: Path, window: np.ndarray) -> np.ndarray:
        out = self.run.path("arrays/logits.f32")
        found = np.array(onnxruntime.logits(path, window, out, threads=self.threads))
        with contextlib.suppress(OSError):
            out.unlink()
        return found

    def judge(self, path: Path, quantization: str, compared: verify.Comparison) -> None:
        """Raises StageError when the logits or the tokens decoded with the cache are wrong."""
        reason = compared.failure(exact=quantization in ("fp32", "fp16"))
        if reason is None and quantization == "fp32" and compared.max_abs_diff > MOST_DIFFERENCE:
            reason = (
                f"the exported file differs from torch by {compared.max_abs_diff:.1e} in a logit, "
                f"limit {MOST_DIFFERENCE:.0e}"
            )
        if reason is None:
            reason = self.decoding_failure(path, quantization)
        if reason is not None:
            raise StageError(reason, "report this with the model's config.json")

    def decoding_failure(self, path: Path, quantization: str) -> str | None:
        """Decode token by token with onnxruntime-genai, whose cache is one buffer written in place.

        fp32 tokens are held against torch. Other types round activations in one way for one token and in
        another for several, so they are held against plain ONNX Runtime, which decodes one by one too.
        """
        assert self.window is not None
        room = self.parent.graph.dims.max_context
        n_prompt = min(_PROMPT_TOKENS, self.window.shape[1], room // 2)
        n_new = min(GREEDY_TOKENS, room - n_prompt)
        prompt = [int(t) for t in self.window[0, :n_prompt]]
        tokens = onnx_genai.greedy(path, prompt, n_new, threads=self.threads)
        if quantization != "fp32":
            others = onnxruntime.greedy(path, prompt, n_new, threads=self.threads)
            pairs = enumerate(zip(tokens, others, strict=True))
            step = next((i for i, (a, b) in pairs if a != b), None)
            if step is None:
                return None
            return (
                f"onnxruntime-genai decodes token {tokens[step]} at step {step + 1}, plain ONNX Runtime "
                f"{others[step]}"
            )
        whole = np.array([[*prompt, *tokens[:-1]]], dtype=np.int32)
        logits = calibration.forward(self.parent.source, self.parent.graph.dims, whole)[0]
        for step, (row, token) in enumerate(zip(logits[n_prompt - 1 :], tokens, strict=True)):
            if float(row.max() - row[token]) > MOST_DIFFERENCE:
                return f"decoding gives token {token} at step {step + 1}, torch gives {int(row.argmax())}"
        return None
