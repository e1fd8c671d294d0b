"""`edgeprune recover`: short training that gives back what a cut took."""

from __future__ import annotations

import os
from pathlib import Path

import click

from edgeprune.cli._options import out_option, recovery_options, recovery_recipe
from edgeprune.cli._output import echo_json, echo_pairs, format_option
from edgeprune.errors import ConfigError


@click.command()
@click.argument("pruned", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--parent",
    metavar="FOLDER|FILE|ID",
    help="The dense model that DIR was pruned from. Default: SmolLM2-135M-Instruct.",
)
@recovery_options("auto")
@click.option(
    "--quantization",
    "recovery_quantization",
    metavar="TYPE",
    help="GGUF type the result is meant for, such as Q4_1; for methods that train through its rounding.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all sampling."
)
@out_option("OUT", "New Hugging Face folder; an earlier result of this verb is replaced.")
@format_option
def command(pruned: Path, parent: str | None, seed: int, out: Path, form: str, **asked: object) -> None:
    """Train the pruned model in DIR for a short while, so that it answers as its dense parent does.

    Where 'prune --trim-vocab' made DIR, the parent answers with the tokens that DIR has left.
    Killed, it goes on where it was when it is started again. With accelerate it trains on several processes.

    \b
    Examples:
      edgeprune recover pruned --parent ./my-model --recovery-minutes 10 --out recovered
      edgeprune recover pruned --parent ./my-model --recovery lora --recovery-data text.jsonl --out recovered
      accelerate launch -m edgeprune recover pruned --parent ./my-model --recovery full --out recovered
    """
    recipe = recovery_recipe(asked, seed=seed)
    if recipe is None:
        raise ConfigError("--recovery none leaves the model as it is", "name a method, or leave it out")

    # help must not load torch
    from edgeprune.cli._progress import open_progress
    from edgeprune.pipeline import recovering
    from edgeprune.progress import Silent

    if os.environ.get("RANK", "0") != "0":
        # one of several processes speaks
        recovering.recover(pruned, out, parent_model=parent, recipe=recipe, progress=Silent())
        return
    with open_progress() as progress:
        result = recovering.recover(pruned, out, parent_model=parent, recipe=recipe, progress=progress)
    figures = recovering.describe(result)
    if form == "json":
        echo_json({**figures, "path": str(out)})
        return
    echo_pairs(
        [
            ("method", result.method),
            ("objective", result.objective),
            ("text", result.text),
            ("trained", f"{result.tokens:,} tokens in {result.steps} steps, {result.seconds:.0f} s"),
            ("ended by", result.stopped),
            ("result", result.note),
            ("written to", str(out)),
        ]
    )
