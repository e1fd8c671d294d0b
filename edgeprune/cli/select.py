"""`edgeprune select`: choose again from what a finished run measured."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._output import echo_json, format_option
from edgeprune.errors import InfeasibleError
from edgeprune.units import parse_bytes


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--budget", metavar="SIZE", help="Another limit on memory.")
@click.option("--max-file", metavar="SIZE", help="Another limit on the file.")
@click.option("--min-tps", type=float, metavar="X", help="Another slowest decode, tokens per second.")
@click.option("--max-first-token", type=float, metavar="MS", help="Another longest wait, milliseconds.")
@click.option("--max-energy", type=float, metavar="J", help="Another most energy for a token, joules.")
@click.option("--max-kl", type=float, metavar="X", help="Another largest KL, nats per token.")
@click.option("--min-agreement", type=float, metavar="X", help="Another smallest agreement, 0 to 1.")
@click.option(
    "--objective",
    type=click.Choice(["quality", "speed", "size"]),
    help="Another objective; speed and size need a floor of quality.",
)
@format_option
def command(
    run_dir: Path,
    budget: str | None,
    max_file: str | None,
    min_tps: float | None,
    max_first_token: float | None,
    max_energy: float | None,
    max_kl: float | None,
    min_agreement: float | None,
    objective: str | None,
    form: str,
) -> None:
    """Choose the best candidate of a finished run again, under other limits. Nothing is measured or written.

    \b
    Example:
      edgeprune select edgeprune-runs/my-run --budget 180MB
      edgeprune select edgeprune-runs/my-run --objective size --max-kl 0.1
    """
    # help must not load numpy and rich
    from edgeprune.pipeline import light
    from edgeprune.report.terminal import render_table

    report = light.reselect(
        run_dir,
        memory_bytes=None if budget is None else parse_bytes(budget, what="--budget"),
        file_bytes=None if max_file is None else parse_bytes(max_file, what="--max-file"),
        min_tps=min_tps,
        max_first_token_ms=max_first_token,
        max_energy_j=max_energy,
        max_kl=max_kl,
        min_agreement=min_agreement,
        objective=objective,
    )
    if form == "json":
        echo_json(report)
    else:
        click.echo(render_table(report, str(run_dir)))
    if report["selected"] is None:
        raise InfeasibleError(report["headline"], "raise the limit it missed")
