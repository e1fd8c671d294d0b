"""`edgeprune bundle`: a folder to ship, from a finished run or an export."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._options import out_option
from edgeprune.cli._output import echo_pairs
from edgeprune.units import format_bytes


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="SOURCE")
@click.option("--candidate", metavar="ID", help="Candidate of the run. Default: the selected one.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Where tokenizer.json lies. Default: made from the GGUF file; an ONNX folder has its own.",
)
@click.option("--license", "license_name", metavar="NAME", help="The parent's licence, if it is not known.")
@out_option("DIR", "Where it goes; an older bundle there is replaced.")
def command(
    source: Path, candidate: str | None, tokenizer: Path | None, license_name: str | None, out: Path
) -> None:
    """Put the model of SOURCE into a folder with all it takes to run it and to know what it is.

    SOURCE is the folder of a finished run, a GGUF file or an ONNX folder. The main job writes the bundle of
    what it selected into RUN_DIR/bundle by itself. A bundle holds the model, tokenizer files, manifest.json
    (bytes and sha256 of every file, parent, licence, plan, recipe, seeds, versions, figures), a model card,
    for GGUF an Ollama Modelfile and a llama-server line, and samples in Python and JavaScript.

    \b
    Examples:
      edgeprune bundle edgeprune-runs/my-run --candidate uniform-9.4@Q8_0 --out my-model
      edgeprune bundle pruned-onnx --license apache-2.0 --out my-model
    """
    # help must not load numpy
    from edgeprune.pipeline import bundling

    made = bundling.of_path(
        source, out, candidate=candidate, tokenizer_folder=tokenizer, license_name=license_name
    )
    total = sum(row["bytes"] for row in made["files"])
    echo_pairs(
        [
            (
                "model",
                f"{made['model']['path']} ({made['model']['quantization'] or made['model']['format']})",
            ),
            ("parent's licence", made["parent"].get("license") or "not known; name it with --license"),
            ("files", f"{len(made['files'])}, {format_bytes(total)}"),
            ("written to", str(out)),
        ]
    )
