"""Bundles of what was made: a candidate of a finished run, or an exported file or folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import locate, tokenizer
from edgeprune.bundle import write as writer
from edgeprune.costs.gguf_header import MAGIC, read_header
from edgeprune.errors import ConfigError
from edgeprune.pipeline import light
from edgeprune.registry import suggest
from edgeprune.report import build as report_build

BUNDLE_FOLDER = "bundle"  # in a run folder
_GENAI_CONFIG = "genai_config.json"


def refresh(
    run_dir: Path, report: Mapping[str, Any], tokenizer_folder: Path, label: str | None = None
) -> None:
    """Make `run_dir`/bundle the bundle of what was selected; nothing selected: none is there."""
    out = run_dir / (BUNDLE_FOLDER if label is None else f"{BUNDLE_FOLDER}-{label}")
    if report["selected"] is None:
        writer.remove(out)
    else:
        of_run(run_dir, report, out, tokenizer_folder=tokenizer_folder, link=True)


def of_run(
    run_dir: Path,
    report: Mapping[str, Any],
    out: Path,
    *,
    candidate: str | None = None,
    tokenizer_folder: Path | None = None,
    license_name: str | None = None,
    link: bool = False,
) -> dict[str, Any]:
    """Bundle one candidate of a finished run, the selected one unless told otherwise; returns the manifest.

    Without `tokenizer_folder` the tokenizer files are made from the GGUF file. Raises ConfigError.
    """
    row = _candidate(report, candidate)
    facts = writer.facts_of(report, row)
    if license_name is not None:
        facts["parent"]["license"] = license_name
    path = (run_dir / row["artifact"]["path"]).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise ConfigError(f"report.json: path '{row['artifact']['path']}' leaves the run folder")
    if not path.is_file():
        raise ConfigError(f"{path} is not there", "run the job again; it makes the file anew")
    return _gguf(path, facts, out, tokenizer_folder, link=link)


def of_path(
    source: Path,
    out: Path,
    *,
    candidate: str | None,
    tokenizer_folder: Path | None,
    license_name: str | None,
) -> dict[str, Any]:
    """Bundle a run folder, a GGUF file or an ONNX folder. Raises ConfigError."""
    writer.check_out(out)
    if out.resolve() == source.resolve() or source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--out {out} holds the source", "name a new folder")
    if tokenizer_folder is not None and not (tokenizer_folder / "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer {tokenizer_folder} has no tokenizer.json")
    if (source / report_build.FILE_NAME).is_file():
        report = light.load_report(source)
        return of_run(
            *(source, report, out),
            candidate=candidate,
            tokenizer_folder=tokenizer_folder,
            license_name=license_name,
        )
    if candidate is not None:
        raise ConfigError(f"--candidate: {source} is no folder of a finished run")
    if source.is_file():
        return _export(source, out, tokenizer_folder, license_name)
    if (source / _GENAI_CONFIG).is_file():
        facts = writer.facts_of_export(
            source.resolve().name,
            format="onnx",
            quantization=_onnx_type(source),
            license_name=license_name or locate.license_of(source),
        )
        return writer.write(out, writer.Source(model=source, format="onnx", tokenizer=None, facts=facts))
    if not source.exists():
        raise ConfigError(f"{source} does not exist")
    raise ConfigError(
        f"{source} is neither a finished run, nor a GGUF file, nor an ONNX folder",
        "make one with: edgeprune export",
    )


def _export(
    source: Path, out: Path, tokenizer_folder: Path | None, license_name: str | None
) -> dict[str, Any]:
    with source.open("rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{source} is no GGUF file")
    header = read_header(source)
    values = {k: v for k, v in header.values().items() if isinstance(v, str)}
    totals: dict[str, int] = {}
    for tensor in header.tensors:
        totals[tensor.type.name] = totals.get(tensor.type.name, 0) + tensor.n_bytes
    facts = writer.facts_of_export(
        source.stem,
        format="gguf",
        quantization=max(totals, key=lambda t: totals[t]) if totals else None,
        license_name=license_name or values.get("general.license"),
    )
    facts["model"]["bytes"] = header.file_bytes
    return _gguf(source, facts, out, tokenizer_folder, link=False)


def _gguf(
    path: Path, facts: Mapping[str, Any], out: Path, tokenizer_folder: Path | None, *, link: bool
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        if tokenizer_folder is None:
            kvs = [kv for kv in read_header(path).metadata if kv.key.startswith("tokenizer.")]
            tokenizer.write_hf(kvs, made)
        source = writer.Source(
            model=path, format="gguf", tokenizer=tokenizer_folder or Path(made), facts=facts
        )
        return writer.write(out, source, link=link)


def _candidate(report: Mapping[str, Any], wanted: str | None) -> Mapping[str, Any]:
    rows = {row["id"]: row for row in report["candidates"]}
    if wanted is None:
        wanted = report["selected"]
        if wanted is None:
            raise ConfigError("this run selected nothing", "name one with --candidate")
    if wanted not in rows:
        raise ConfigError(f"this run has no candidate '{wanted}'{suggest(wanted, rows)}")
    row: Mapping[str, Any] = rows[wanted]
    if row["artifact"] is None:
        raise ConfigError(
            f"candidate {wanted} was planned and not made", "edgeprune report lists those with a file"
        )
    return row


def _onnx_type(folder: Path) -> str | None:
    config = locate.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    dtype = (config.get("transformers.js_config") or {}).get("dtype")
    return {"q4": "int4"}.get(dtype, dtype) if isinstance(dtype, str) else None
