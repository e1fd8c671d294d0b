"""`edgeprune verify`: is a bundle what it was when it was made?"""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._output import echo_json, format_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@format_option
def command(folder: Path, form: str) -> None:
    """Compare every file of a bundle with its manifest.json.

    Names each file that is changed, missing, not listed or a link, and ends with exit code 2. This is a
    checksum against damage, not a signature.

    \b
    Example:
      edgeprune verify edgeprune-runs/my-run/bundle
    """
    # help must stay instant
    from edgeprune.bundle import manifest
    from edgeprune.units import format_bytes

    found = manifest.verify(folder)
    if form == "json":
        echo_json(
            {"ok": True, "files": found.files, "bytes": found.bytes, "digest": found.manifest["digest"]}
        )
    else:
        click.echo(f"{found.files} files, {format_bytes(found.bytes)}: all as listed in {manifest.FILE_NAME}")
