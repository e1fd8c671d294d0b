"""Greedy tokens of exported files against torch fp32, dense and pruned by 20%.

    PYTHONPATH=. python benchmarks/parity.py [--model FOLDER|FILE.gguf ...] [--ratio R] [--new N]

Each model (default: SmolLM2-135M-Instruct) is exported dense and pruned as GGUF F16, GGUF F32 and ONNX fp32.
Every file writes N tokens behind each prompt, always the likeliest. One forward pass of torch over prompt and
tokens then says where torch would first have written another token, by how much it prefers its own there, and
how far the file's logits lie from torch's. GGUF F16 is also held against torch with every matrix rounded
to F16, and with the inputs of all matrices rounded to F16 as well, which is what llama.cpp computes with on a
CPU; how far that takes torch from itself is what such a file can be expected to differ by. Writes
results/parity.json; rows of other models stay in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from benchmarks._common import RESULTS, ROOT, edgeprune, write_results
from edgeprune import checkpoint, graph, tokenizer
from edgeprune.exporters import gguf
from edgeprune.pipeline import parent as parents
from edgeprune.rundir import RunDir
from edgeprune.runtimes import _onnx_worker as worker

EXPLAINED = 1e-3  # a smaller gap between torch's two best tokens explains another token
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics say that",
    "Q: What is 17 + 25?\nA:",
    "To make a good cup of tea, first",
    "Die Hauptstadt von Deutschland ist",
    "In 1969, the first humans",
)
Decoder = Callable[[list[int], int], tuple[list[int], np.ndarray]]


def run(*args: str) -> None:
    subprocess.run(edgeprune(*args), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def prunable(folder: Path) -> str:
    """The allocator that the family's GGUF architectures can carry."""
    dims = graph.build(checkpoint.SafetensorsSource(folder).config).dims
    rules = gguf.constraints(graph.find_family(dims.family), dims, "F16")
    return "uniform" if rules.ffn.uniform_across_layers else "inner"


def by_llama_cpp(path: Path, kv: str) -> Decoder:
    """Decodes one by one behind the prompt: tokens, and the logits [n, vocab] they were chosen from."""
    kind = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[kv]
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False, type_k=kind, type_v=kind
    )

    def decode(prompt: list[int], n_new: int) -> tuple[list[int], np.ndarray]:
        model.reset()
        model.eval(prompt)
        tokens, rows = [], []
        for _ in range(n_new):
            rows.append(np.array(model.scores[model.n_tokens - 1]))
            tokens.append(int(rows[-1].argmax()))
            model.eval(tokens[-1:])
        return tokens, np.stack(rows)

    return decode


def by_genai(folder: Path) -> Decoder:
    engine = worker.Genai({"folder": str(folder)}, threads=2, chunk=512)

    def decode(prompt: list[int], n_new: int) -> tuple[list[int], np.ndarray]:
        engine.clear(len(prompt) + n_new)
        engine.feed(prompt)
        tokens, rows = [], []
        for _ in range(n_new):
            rows.append(np.array(engine.last_logits(), np.float32))
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) < n_new:
                engine.feed(tokens[-1:])
        return tokens, np.stack(rows)

    return decode


def torch_models(folder: Path) -> dict[str, Callable[[], torch.nn.Module]]:
    """torch fp32 as it is, with F16 weights, and with F16 weights and matrix inputs."""

    def rounded() -> torch.nn.Module:
        model = checkpoint.load_model(folder).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(parameter.half().float())
        return model

    def as_ggml() -> torch.nn.Module:
        model = rounded()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (args[0].half().float(),))
        return model

    return {
        "fp32": lambda: checkpoint.load_model(folder).float().eval(),
        "F16 weights": rounded,
        "F16 weights and matrix inputs": as_ggml,
    }


def torch_logits(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """[tokens, vocab]: what torch chooses each of the tokens from."""
    with torch.inference_mode():
        whole = model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0].numpy()
    return whole[len(prompt) - 1 :]


def against(expected: np.ndarray, tokens: list[int], rows: np.ndarray) -> dict[str, Any]:
    """Where torch would first have written another token, and how far the logits are apart until there."""
    differing = np.flatnonzero(expected.argmax(axis=1) != np.asarray(tokens))
    until = int(differing[0]) + 1 if len(differing) else len(tokens)
    row: dict[str, Any] = {
        "identical": not len(differing),
        "max_logit_difference": float(np.abs(expected[:until] - rows[:until]).max()),
        "smallest_gap": float(min(np.ptp(np.sort(r)[-2:]) for r in expected[:until])),
    }
    if len(differing):
        at = int(differing[0])
        row |= {
            "first_difference": at + 1,
            "torch_gap": float(expected[at].max() - expected[at][tokens[at]]),
            "file_gap": float(rows[at].max() - rows[at][int(expected[at].argmax())]),
        }
    return row


def compare(folder: Path, scratch: Path, n_new: int) -> list[dict[str, Any]]:
    """One row per file and torch variant."""
    prompts = [tokenizer.encode(folder, text, add_special=True) for text in PROMPTS]
    files: dict[str, tuple[tuple[str, str], str | None]] = {
        "GGUF F16, F16 cache": (("gguf", "F16"), "f16"),
        "GGUF F16, F32 cache": (("gguf", "F16"), "f32"),
        "GGUF F32, F32 cache": (("gguf", "F32"), "f32"),
        "ONNX fp32": (("onnx", "fp32"), None),
    }
    made: dict[tuple[str, str], Path] = {}
    written = {}
    for label, ((form, kind), kv) in files.items():
        if (form, kind) not in made:
            made[form, kind] = scratch / (f"{kind}.gguf" if form == "gguf" else kind)
            run("export", str(folder), "--format", form, "--quantization", kind, "--no-verify", "--out",
                str(made[form, kind]))  # fmt: skip
        decode = by_genai(made[form, kind]) if kv is None else by_llama_cpp(made[form, kind], kv)
        written[label] = [decode(prompt, n_new) for prompt in prompts]
    rows = []
    plain: list[np.ndarray] = []  # torch fp32 along the tokens of the first file
    for kind, load in torch_models(folder).items():
        model = load()
        for label, answers in written.items():
            if kind != "fp32" and "F16" not in label.split(",")[0]:
                continue
            found, apart = [], []
            for i, (prompt, (tokens, logits)) in enumerate(zip(prompts, answers, strict=True)):
                expected = torch_logits(model, prompt, tokens)
                if label == next(iter(files)):
                    plain += [expected] if kind == "fp32" else []
                    apart.append(float(np.abs(expected - plain[i]).max()))
                found.append(against(expected, tokens, logits))
            differing = [f for f in found if not f["identical"]]
            rows.append(
                {
                    "file": label,
                    "torch": kind,
                    "prompts": len(found),
                    "new_tokens": n_new,
                    "identical": len(found) - len(differing),
                    "explained": sum(f["torch_gap"] < EXPLAINED for f in differing),
                    "gaps": [f["torch_gap"] for f in differing],
                    "max_logit_difference": max(f["max_logit_difference"] for f in found),
                    "by_prompt": found,
                }
            )
            if apart and kind != "fp32":
                rows[-1]["torch_from_fp32"] = max(apart)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--new", type=int, default=64)
    given = parser.parse_args()
    rows = []
    for model in given.model or [None]:
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as name:
            scratch = Path(name)
            with RunDir(scratch / "run") as folder_of_run:
                opened = parents.open_parent(model, folder_of_run)
                folders = {"dense": opened.folder, f"pruned {given.ratio:.0%}": scratch / "pruned"}
                allocator = prunable(opened.folder)
                run("prune", str(opened.folder), "--ratio", str(given.ratio), "--allocator", allocator,
                    "--compensation", "none", "--out", str(scratch / "pruned"))  # fmt: skip
                for plan, folder in folders.items():
                    files = scratch / plan.split()[0]
                    files.mkdir(exist_ok=True)
                    for row in compare(folder, files, given.new):
                        about = {"model": opened.name, "plan": plan}
                        if plan != "dense":
                            about["allocator"] = allocator
                        rows.append(about | row)
                        apart = row.get("torch_from_fp32")
                        gaps = ", ".join(f"{g:.1e}" for g in row["gaps"])
                        print(
                            f"{opened.name} {plan}: {row['file']} against torch {row['torch']}: "
                            f"{row['identical']} of {row['prompts']} identical, logits within "
                            f"{row['max_logit_difference']:.1e}{'; gaps ' + gaps if gaps else ''}"
                            + (f"; torch itself moved {apart:.1e}" if apart else ""),
                            flush=True,
                        )
    path = RESULTS / "parity.json"
    if path.is_file():
        made = {row["model"] for row in rows}
        rows = [row for row in json.loads(path.read_text())["rows"] if row["model"] not in made] + rows
    print(write_results("parity", rows), file=sys.stderr)


if __name__ == "__main__":
    main()
