"""`edgeprune inspect`: what a model is made of, what can be cut and what its files would weigh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from edgeprune.cli._options import model_argument
from edgeprune.cli._output import echo_json, echo_pairs, echo_table, format_option, plain
from edgeprune.units import format_bytes

_UNITS = {"kv": "KV group", "ffn": "FFN channel"}


@click.command()
@model_argument
@format_option
def command(model: str | None, form: str) -> None:
    """Show sizes, prunable units, legal GGUF widths and exact GGUF bytes of a model.

    MODEL is a Hugging Face folder or id, or a GGUF file; without it the default model. No weights are read.
    Where GGUF cannot describe the tokenizer, all but the GGUF bytes is shown.

    \b
    Examples:
      edgeprune inspect
      edgeprune inspect ./my-model --format json
    """
    # help must not load numpy
    from edgeprune.pipeline import light

    found = light.inspect(model)
    if form == "json":
        echo_json(found)
        return
    tied = "tied to the output" if found["tied"] else "and an output of its own"
    echo_pairs(
        [
            ("model", f"{found['model']} ({found['path']})"),
            ("family", found["family"]),
            ("licence", found["license"] or "not stated"),
            ("parameters", f"{found['parameters']:,}"),
            ("in decoder layers", f"{found['decoder_parameters']:,}"),
            (
                "elsewhere",
                f"{found['embedding_parameters']:,}, {100 * found['embedding_share']:.1f}%: embedding {tied}",
            ),
            ("layers", str(found["layers"])),
            ("hidden", str(found["hidden"])),
            ("heads", f"{_each(found['heads'])} of {found['head_dim']}"),
            ("KV heads", _each(found["kv_heads"])),
            ("FFN width", _each(found["ffn_width"])),
            ("vocabulary", f"{found['vocabulary']:,}"),
            ("context", f"{found['max_context']:,} tokens at most"),
            *_stored(found),
        ]
    )
    click.echo("")
    rows = [
        (
            _UNITS[a["unit"]],
            str(a["units"]),
            str(a["axes"]),
            f"{a['params_per_unit']:,}",
            f"{100 * a['share_of_decoder']:.1f}%",
        )
        for a in found["axes"]
    ]
    echo_table(("prunable unit", ">units", ">in layers", ">parameters each", ">of decoder"), rows)
    click.echo("")
    if found["gguf_refused"]:
        why = plain(found["gguf_refused"])
        click.echo(f"no GGUF file, so neither its bytes nor the memory it needs can be given: {why}")
        return
    types = [
        (
            row["quantization"],
            f"{row['file_bytes']:,}",
            f"{row['file_bytes_imatrix']:,}",
            f"steps of {row['ffn_multiple']}",
            f"steps of {row['kv_multiple']}",
            "alike" if row["uniform_across_layers"] else "free",
        )
        for row in found["gguf"]
    ]
    echo_table(
        ("GGUF type", ">bytes, dense", ">with imatrix", "FFN width", "KV heads", "layers"),
        types,
    )
    reasons = (r.replace(f"{row['quantization']} ", "") for row in found["gguf"] for r in row["reasons"])
    for reason in dict.fromkeys(reasons):
        click.echo(reason)


def _each(values: Sequence[int]) -> str:
    if len(set(values)) == 1:
        return str(values[0])
    return f"{min(values)} to {max(values)} by layer: {' '.join(map(str, values))}"


def _stored(found: dict[str, Any]) -> list[tuple[str, str]]:
    by_type = found["bytes_by_type"]
    if not by_type:
        return []
    ordered = sorted(by_type.items(), key=lambda pair: -pair[1])
    return [("stored as", ", ".join(f"{name} {format_bytes(n)}" for name, n in ordered))]
