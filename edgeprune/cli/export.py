"""`edgeprune export`: a model folder as one file for a runtime, checked against torch."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._options import model_argument, out_option
from edgeprune.cli._output import echo_pairs


@click.command()
@model_argument
@click.option(
    "--format", "format_name", metavar="NAME", default="gguf", show_default=True, help="Form of the file."
)
@click.option("--quantization", metavar="TYPE", default="Q4_0", show_default=True, help="GGUF type.")
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
@out_option("FILE.gguf", "Where the file goes; a GGUF file there is replaced.")
def command(
    model: str | None,
    format_name: str,
    quantization: str,
    imatrix_calibration: str | None,
    no_verify: bool,
    seed: int,
    threads: int | None,
    out: Path,
) -> None:
    """Export MODEL, pruned or not, and compare its logits with torch's on 256 tokens.

    \b
    Example:
      edgeprune export pruned --format gguf --quantization Q4_0 --out pruned.gguf
    """
    # help must not load torch
    from edgeprune.cli._progress import open_progress
    from edgeprune.pipeline import stages

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
            ("sha256", made.sha256),
            ("written to", str(out)),
        ]
    )
