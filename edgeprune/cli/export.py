"""`edgeprune export`: a model folder in a runtime's form, checked against torch."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._options import model_argument, out_option, trim_options
from edgeprune.cli._output import echo_pairs
from edgeprune.cli._plans import vocabulary_pairs


@click.command()
@model_argument
@click.option(
    "--format", "format_name", metavar="NAME", default="gguf", show_default=True, help="gguf or onnx."
)
@click.option(
    "--quantization",
    metavar="TYPE",
    help="A GGUF type or mix of types by class (docs/quantization.md), or int4, int8, fp16 or fp32 for ONNX. "
    "Default: Q4_0, for ONNX int4.",
)
@click.option(
    "--imatrix-calibration",
    metavar="FILE|DATASET",
    help="Text whose activations weigh the rounding errors. Default: no importance matrix.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare the file's logits with torch's.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all sampling."
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads to quantize and verify with."
)
@trim_options
@out_option(
    "FILE.gguf|FOLDER", "Where it goes: a .gguf file or an ONNX folder; an older one there is replaced."
)
def command(
    model: str | None,
    format_name: str,
    quantization: str | None,
    imatrix_calibration: str | None,
    no_verify: bool,
    seed: int,
    threads: int | None,
    trim_vocab: tuple[str, ...],
    trim_check: str | None,
    out: Path,
) -> None:
    """Export MODEL, pruned or not, and compare its logits with torch's on 256 tokens.

    An ONNX folder is read by onnxruntime-genai, optimum and transformers.js; it has widths of its own in
    every layer, and 64 tokens decoded with the cache are checked too.

    \b
    Examples:
      edgeprune export pruned --format gguf --quantization Q4_0 --out pruned.gguf
      edgeprune export pruned --quantization Q4_0+embedding=Q8_0+attention=Q5_1 --out mixed.gguf
      edgeprune export pruned --format onnx --quantization int4 --out pruned-onnx
      edgeprune export ./my-model --trim-vocab my-text.txt --out small.gguf
    """
    # help must not load torch
    from edgeprune.cli._progress import open_progress
    from edgeprune.pipeline import stages, trimming

    with open_progress() as progress:
        made = stages.export(
            model,
            out,
            format_name=format_name,
            quantization=quantization,
            imatrix_text=imatrix_calibration,
            check=not no_verify,
            seed=seed,
            threads=threads,
            trim=trimming.Trim(trim_vocab, trim_check),
            progress=progress,
        )
    checked = "not verified"
    if made.verified is not None:
        v = made.verified
        checked = (
            f"same most likely token at {v.same_argmax} of {v.tokens} positions, "
            f"KL to torch {v.kl:.2e} nats per token, largest difference {v.max_abs_diff:.3f}"
        )
    echo_pairs(
        [
            ("quantization", f"{made.quantization}{' with importance matrix' if made.imatrix else ''}"),
            ("predicted", f"{made.predicted_bytes:,} bytes"),
            ("real", f"{made.bytes:,} bytes"),
            ("verified", checked),
            *(vocabulary_pairs(trimming.describe(made.vocabulary)) if made.vocabulary else ()),
            ("sha256", made.sha256),
            ("written to", str(out)),
        ]
    )
