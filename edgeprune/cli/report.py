"""`edgeprune report`: print the result of a finished run again."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._output import echo_json, format_option


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@format_option
def command(run_dir: Path, form: str) -> None:
    """Print the result of a finished run from its report.json.

    \b
    Example:
      edgeprune report edgeprune-runs/my-run
    """
    # help must not load numpy and rich
    from edgeprune.pipeline import light
    from edgeprune.report.terminal import render_table

    found = light.load_report(run_dir)
    if form == "json":
        echo_json(found)
    else:
        click.echo(render_table(found, str(run_dir)))
