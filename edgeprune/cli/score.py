"""`edgeprune score`: importance of every prunable unit, saved for `edgeprune plan`."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._options import (
    calibration_options,
    metric_option_option,
    model_argument,
    out_option,
    query_heads_option,
)
from edgeprune.cli._output import echo_json, echo_pairs, format_option, stability_pairs


@click.command()
@model_argument
@click.option("--metric", metavar="NAME", default="llm-bip", show_default=True, help="Importance metric.")
@metric_option_option
@query_heads_option
@calibration_options
@out_option("FILE.safetensors", "Where the scores go; their record is written beside them as FILE.json.")
@format_option
def command(
    model: str | None,
    metric: str,
    metric_options: dict[str, str],
    query_heads: bool,
    calibration: str | None,
    samples: int,
    length: int,
    seed: int,
    calibration_seeds: int,
    out: Path,
    form: str,
) -> None:
    """Score every prunable unit of MODEL once, for any number of plans.

    \b
    Example:
      edgeprune score ./my-model --metric llm-bip --metric-option form=C --out scores.safetensors
    """
    # help must not load torch
    from edgeprune.cli._progress import open_progress
    from edgeprune.pipeline import light, stages

    with open_progress() as progress:
        made = stages.score(
            model,
            out,
            metric_name=metric,
            metric_options=metric_options,
            on=stages.Calibration(
                text=calibration, n_samples=samples, n_tokens=length, seed=seed, n_seeds=calibration_seeds
            ),
            query_heads=query_heads,
            progress=progress,
        )
    if form == "json":
        echo_json({**light.describe_scores(made.scores), "model": made.model, "path": str(out)})
        return
    switches = " ".join(f"{k}={v}" for k, v in made.scores.options.items())
    text = "none needed"
    if made.tokens is not None:
        text = f"{made.tokens.n_samples} x {made.tokens.n_tokens} tokens, {made.tokens.origin}"
    if calibration_seeds > 1 and made.tokens is not None:
        text += f", {calibration_seeds} seeds"
    echo_pairs(
        [
            ("model", made.model),
            ("metric", f"{made.scores.metric} {switches}".rstrip()),
            ("calibration", text),
            ("pooling", "across layers" if made.scores.poolable else "within a layer only"),
            *stability_pairs(light.describe_scores(made.scores)),
            ("written to", f"{out} and {light.record_path(out)}"),
        ]
    )
