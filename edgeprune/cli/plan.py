"""`edgeprune plan`: which units stay, from saved scores. Arithmetic only."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._options import allocator_option, cut_options, model_argument, out_option
from edgeprune.cli._output import format_option
from edgeprune.errors import ConfigError
from edgeprune.units import parse_bytes


@click.command()
@model_argument
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    metavar="FILE.safetensors",
    required=True,
    help="Scores of this model, written by 'edgeprune score'.",
)
@click.option("--ratio", type=float, metavar="R", help="Share of decoder-layer parameters to remove.")
@click.option("--budget", metavar="SIZE", help="Instead: remove as little as fits this much memory.")
@click.option(
    "--quantization", metavar="TYPE", help="GGUF type or mix the widths must suit. Required with --budget."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Context that must fit the budget. Default: 2048, or all the model has.",
)
@click.option(
    "--target",
    metavar="NAME|FILE",
    default="laptop-cpu",
    show_default=True,
    help="Device whose memory is predicted.",
)
@allocator_option("uniform")
@cut_options
@out_option("PLAN.json", "Where the plan goes.")
@format_option
def command(
    model: str | None,
    scores: Path,
    ratio: float | None,
    budget: str | None,
    quantization: str | None,
    context: int | None,
    target: str,
    allocator: str,
    protect_first: int,
    protect_last: int,
    width_multiple: int,
    out: Path,
    form: str,
) -> None:
    """Plan a cut of MODEL from saved scores; no weights are read.

    \b
    Examples:
      edgeprune plan ./my-model --scores scores.safetensors --ratio 0.2 --out plan.json
      edgeprune plan ./my-model --scores scores.safetensors --budget 200MB --quantization Q4_0 --out plan.json
    """
    if (ratio is None) == (budget is None):
        raise ConfigError("give either --ratio or --budget", "--ratio 0.2, or --budget 200MB")
    budget_bytes = None
    if budget is not None:
        if quantization is None:
            raise ConfigError("--budget needs --quantization: bytes depend on it", "such as Q4_0")
        budget_bytes = parse_bytes(budget, what="--budget")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder", "name a file")

    # help must not load numpy
    from edgeprune import records, rundir
    from edgeprune.cli._plans import echo_plan
    from edgeprune.pipeline import light

    made, before = light.plan(
        model,
        scores,
        allocator=allocator,
        ratio=ratio,
        budget_bytes=budget_bytes,
        quantization=quantization,
        context_tokens=context,
        target=target,
        width_multiple=width_multiple,
        protect_first=protect_first,
        protect_last=protect_last,
    )
    with rundir.friendly_disk_errors(out):
        rundir.write_text(out, records.dumps(made))
    asked = None if budget is None else f"the least that fits {budget} at {quantization}"
    echo_plan(light.describe_plan(made, before), out, form, asked=asked)
