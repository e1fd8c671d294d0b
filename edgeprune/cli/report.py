"""`edgeprune report`: print the result of a finished run again, or make its page anew."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._output import echo_json, format_option


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--html", is_flag=True, help="Write RUN_DIR/report.html and print where it is.")
@click.option("--target", metavar="NAME", help="Of a run with several targets: this one. Default: the first.")
@format_option
def command(run_dir: Path, html: bool, target: str | None, form: str) -> None:
    """Print the result of a finished run from its report.json, or make its page.

    Every run writes the page; --html makes it anew, for a run of an older version or after tasks were added.

    \b
    Examples:
      edgeprune report edgeprune-runs/my-run
      edgeprune report edgeprune-runs/my-run --html
    """
    # help must not load numpy and rich
    from edgeprune.pipeline import light
    from edgeprune.report import charts, page
    from edgeprune.report.terminal import render_table

    label = light.label_of(run_dir, target)
    found = light.load_report(run_dir, label)
    if html:
        if not charts.available():
            click.echo("charts are left out: pip install 'edgeprune[report]'", err=True)
        click.echo(page.write_checked(run_dir, found, label, say=lambda text: click.echo(text, err=True)))
    elif form == "json":
        echo_json(found)
    else:
        click.echo(render_table(found, str(run_dir)))
