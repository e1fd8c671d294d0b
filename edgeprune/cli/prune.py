"""`edgeprune prune`: cut a model by hand, for research. The product's input is a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli._options import (
    allocator_option,
    calibration_options,
    cut_options,
    given_on_command_line,
    metric_option_option,
    model_argument,
    out_option,
    query_heads_option,
    recovery_options,
    recovery_recipe,
    refine_options,
    trim_options,
)
from edgeprune.cli._output import format_option
from edgeprune.errors import ConfigError

# what a plan already says
_DECIDED = (
    "metric",
    "metric_options",
    "ratio",
    "calibration",
    "samples",
    "length",
    "seed",
    "calibration_seeds",
    "allocator",
    "protect_first",
    "protect_last",
    "width_multiple",
    "compensation",
    "compensation_samples",
    "steps",
    "blocks",
    "rechoose",
    "query_heads",
    "trim_vocab",
    "trim_check",
)


@click.command()
@model_argument
@click.option("--metric", metavar="NAME", default="llm-bip", show_default=True, help="Importance metric.")
@metric_option_option
@click.option("--ratio", type=float, metavar="R", help="Share of decoder-layer parameters to remove.")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="PLAN.json",
    help="Instead: cut along a plan of 'edgeprune plan'.",
)
@allocator_option("inner")
@cut_options
@refine_options
@query_heads_option
@calibration_options
@trim_options
@recovery_options("none")
@out_option("DIR", "New Hugging Face folder; an earlier result of this verb is replaced.")
@format_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    metric: str,
    metric_options: dict[str, str],
    ratio: float | None,
    plan_file: Path | None,
    allocator: str,
    protect_first: int,
    protect_last: int,
    width_multiple: int,
    compensation: str,
    compensation_samples: int,
    steps: int,
    blocks: bool,
    rechoose: bool,
    query_heads: bool,
    calibration: str | None,
    samples: int,
    length: int,
    seed: int,
    calibration_seeds: int,
    trim_vocab: tuple[str, ...],
    trim_check: str | None,
    out: Path,
    form: str,
    **asked: Any,
) -> None:
    """Remove a share of MODEL's decoder layers and save what is left as a Hugging Face folder.

    Any result loads with edgeprune.load; one with the same widths in every layer also with transformers.

    \b
    Examples:
      edgeprune prune ./my-model --metric llm-bip --ratio 0.2 --out pruned
      edgeprune prune ./my-model --ratio 0.2 --calibration text.txt --allocator uniform --out pruned
      edgeprune prune ./my-model --plan plan.json --out pruned
      edgeprune prune ./my-model --ratio 0.2 --recovery full --recovery-minutes 10 --out pruned
      edgeprune prune ./my-model --ratio 0 --trim-vocab languages:en,de --out trimmed
      edgeprune prune ./my-model --ratio 0.2 --trim-vocab text.txt --recovery full --out small
    """
    if (ratio is None) == (plan_file is None):
        raise ConfigError("give either --ratio or --plan", "--ratio 0.2, or --plan plan.json")
    if plan_file is not None and (extra := given_on_command_line(ctx, _DECIDED)):
        raise ConfigError(f"--plan already says what stays; leave out {', '.join(extra)}")

    # help must not load torch
    from edgeprune.cli._plans import echo_plan
    from edgeprune.cli._progress import open_progress
    from edgeprune.pipeline import light, stages, trimming
    from edgeprune.progress import Progress

    recipe = recovery_recipe(asked, seed=seed, text=calibration)

    def cut(folder: Path, progress: Progress) -> dict[str, Any]:
        """Prune into a folder; returns what is printed of it."""
        figures = vocabulary = None
        if plan_file is not None:
            made, before = stages.prune_to_plan(model, folder, plan_file=plan_file, progress=progress)
        else:
            assert ratio is not None
            made, before, scores, vocabulary = stages.prune(
                model,
                folder,
                metric_name=metric,
                metric_options=metric_options,
                on=stages.Calibration(
                    text=calibration,
                    n_samples=samples,
                    n_tokens=length,
                    seed=seed,
                    n_seeds=calibration_seeds,
                ),
                cut=stages.Cut(
                    ratio=ratio,
                    allocator=allocator,
                    width_multiple=width_multiple,
                    protect_first=protect_first,
                    protect_last=protect_last,
                    blocks=blocks,
                    rechoose=rechoose,
                    query_heads=query_heads,
                    steps=steps,
                    compensation=compensation,
                    compensation_samples=compensation_samples,
                    trained_on=recipe is not None and recipe.data == calibration,
                ),
                trim=trimming.Trim(trim_vocab, trim_check),
                progress=progress,
            )
            figures = light.describe_scores(scores) if scores else None
        described = light.describe_plan(made, before)
        if vocabulary is not None:
            described = trimming.with_vocabulary(described, vocabulary)
        return {"plan": described, "scores": figures}

    with open_progress() as progress:
        if recipe is None:
            said = cut(out, progress)
        else:
            from edgeprune.pipeline import recovering

            said = recovering.prune_and_recover(
                model, out, cut=cut, asked=ctx.params, recipe=recipe, progress=progress
            )
    echo_plan(said["plan"], out, form, scores=said["scores"], recovery=said.get("recovery"))
