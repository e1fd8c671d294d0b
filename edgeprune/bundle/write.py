"""Put a bundle together: the files, the texts made from templates, the manifest last; whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from edgeprune import locate, rundir
from edgeprune.bundle import chat, manifest
from edgeprune.costs.gguf_header import read_header
from edgeprune.errors import ConfigError
from edgeprune.records import LaunchFlags, from_plain, to_plain
from edgeprune.report import benchmarks
from edgeprune.report.build import launch_line, versions
from edgeprune.units import format_bytes

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
# of what the hub calls a licence; anything else is 'other' with its name beside it
_HUB_LICENSES = frozenset(
    (
        *("apache-2.0", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "unlicense", "openrail"),
        *("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3"),
    )
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
_DEFAULT_CONTEXT = 2048
_MOST_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What goes into a bundle. `facts` are the manifest's fields beside the files and versions."""

    model: Path  # a GGUF file, or an ONNX folder
    format: str  # gguf or onnx
    tokenizer: Path | None  # folder with tokenizer files; an ONNX folder has its own
    facts: Mapping[str, Any]


# ---------------------------------------------------------------- facts


def facts_of(report: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's fields about one candidate of a finished run (report.json and a row of it)."""
    profile = report["profile"]
    plan = next((p for p in report["plans"] if p["id"] == candidate["plan"]), None)
    return {
        "candidate": candidate["id"],
        "headline": report["headline"] if candidate["id"] == report["selected"] else None,
        "parent": {
            key: report["model"][key]
            for key in ("id", "family", "license", "key", "parameters", "decoder_parameters")
        },
        "model": _model(candidate["artifact"]),
        "plan": plan,
        "recipe": {
            "metric": candidate["metric"],
            "allocator": candidate["allocator"],
            "profile": profile["name"],
            **profile["recipe"],
        },
        "workload": profile["workload"],
        "seeds": {
            "run": report["seed"],
            "calibration": (report["calibration"] or {}).get("seed"),
            "evaluation": (report["evaluation"] or {}).get("seed"),
        },
        "calibration": report["calibration"],
        "evaluation": report["evaluation"],
        "made_with": report["versions"],
        "target": {key: report["target"][key] for key in ("name", "title", "local", "key")},
        "budget": report["budget"],
        "ratio": candidate["ratio"],
        "ratio_all": candidate["ratio_all"],
        "predicted": candidate["predicted"],
        "measured": candidate["measured"],
        "quality": candidate["quality"],
        "dense_perplexity": report["dense_perplexity"],
        **(
            {"benchmarks": report["benchmarks"]}
            if report.get("benchmarks") and candidate["id"] == report["selected"]
            else {}
        ),
        "verified": candidate["verify"],
        "meets": candidate["meets"],
        "flags": (candidate["measured"] or candidate["predicted"])["flags"],
        "command": report["command"],
    }


def facts_of_export(
    name: str, *, format: str, quantization: str | None, license_name: str | None
) -> dict[str, Any]:
    """The same fields for a file that no run measured: what is not known is null."""
    empty = dict.fromkeys(
        (
            *("candidate", "headline", "plan", "recipe", "workload", "seeds", "calibration", "evaluation"),
            *("target", "budget", "ratio", "ratio_all", "predicted", "measured", "quality"),
            *("dense_perplexity", "verified", "meets", "flags", "command"),
        )
    )
    return {
        **empty,
        "parent": {"id": name, "license": license_name},
        "model": {"format": format, "quantization": quantization},
        "made_with": versions(),
    }


def _model(artifact: Mapping[str, Any]) -> dict[str, Any]:
    return {key: artifact[key] for key in ("format", "quantization", "bytes", "sha256", "key")}


def slug(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text.replace(" as given", "")).strip("-.") or "model"


# ---------------------------------------------------------------- writing


def write(out: Path, source: Source, *, link: bool = False) -> dict[str, Any]:
    """Write a bundle into `out` and return its manifest; an older bundle there is replaced.

    With `link` a model on the same disk is not stored twice. Raises ConfigError when `out` holds anything
    else, or when the model is not the one that its facts describe.
    """
    out = Path(os.path.abspath(out))
    check_out(out)
    staging = out.with_name(f".{out.name}.{os.getpid()}.part")
    with rundir.friendly_disk_errors(out):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            made = _fill(staging, source, link=link)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return made


def check_out(out: Path) -> None:
    """Raises ConfigError unless `out` is new, empty or a bundle."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"--out {out} is a file or a link", "a bundle is a folder; name a new one")
    if any(out.iterdir()) and not manifest.is_bundle(out):
        raise ConfigError(f"--out {out} exists and is no bundle", "name a new folder, or delete it")


def remove(out: Path) -> None:
    """Delete a bundle that is out of date; anything else is left alone."""
    if not out.is_symlink() and manifest.is_bundle(out):
        shutil.rmtree(out)


def _fill(root: Path, source: Source, *, link: bool) -> dict[str, Any]:
    facts = dict(source.facts)
    if source.format == "gguf":
        stem = slug(facts["parent"]["id"])
        name = f"{stem}-{slug(facts['candidate'])}.gguf" if facts["candidate"] else f"{stem}.gguf"
        _place(source.model, root / name, link=link)
        _copy_tokenizer(source.tokenizer, root)
        about = _read_gguf(root / name)
    else:
        name = "."
        for path in manifest.found_files(source.model):
            if path in ("README.md", manifest.FILE_NAME) or path.startswith("."):
                continue
            _place(source.model / path, root / path, link=link)
        about = _read_folder(root)
    facts["model"] = {**facts["model"], "path": name}
    flags = _flags(facts, about)
    facts["flags"] = to_plain(flags)
    texts = _texts(facts, about, flags)
    for file, text in texts.items():
        rundir.write_text(root / file, text)
    if "llama-server.sh" in texts:
        (root / "llama-server.sh").chmod(0o755)
    made = manifest.write(root, facts)
    expected = facts["model"].get("sha256")
    if source.format == "gguf" and expected is not None:
        found = next(row["sha256"] for row in made["files"] if row["path"] == name)
        if found != expected:
            raise ConfigError(
                f"{source.model} is not the file that was measured: its sha256 is another",
                "run the job again; it makes the file anew",
            )
    return made


def _place(source: Path, target: Path, *, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # another disk, or one without hard links
    shutil.copyfile(source, target)


def _copy_tokenizer(folder: Path | None, root: Path) -> None:
    for name in TOKENIZER_FILES if folder is not None else ():
        assert folder is not None
        if (folder / name).is_file():
            shutil.copyfile(folder / name, root / name)


# ---------------------------------------------------------------- what the model says about itself


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    template: str | None  # Jinja
    eos: str
    max_context: int | None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _read_gguf(path: Path) -> _About:
    values = read_header(path).values()
    tokens = values.get("tokenizer.ggml.tokens") or []

    def token(name: str) -> str:
        number = values.get(f"tokenizer.ggml.{name}_token_id")
        return _text(tokens[number]) if type(number) is int and 0 <= number < len(tokens) else ""

    context = values.get(f"{_text(values.get('general.architecture'))}.context_length")
    return _About(
        template=_text(values.get("tokenizer.chat_template")) or None,
        eos=token("eos"),
        max_context=context if type(context) is int else None,
    )


def _read_folder(root: Path) -> _About:
    settings, config = _json(root / "tokenizer_config.json"), _json(root / "config.json")
    path = root / "chat_template.jinja"
    template = settings.get("chat_template")
    if path.is_file() and path.stat().st_size <= _MOST_TEMPLATE_BYTES:
        template = path.read_text(encoding="utf-8", errors="replace")

    def token(name: str) -> str:
        value = settings.get(f"{name}_token")
        return _text(value.get("content") if isinstance(value, dict) else value)

    context = config.get("max_position_embeddings")
    return _About(
        template=template if isinstance(template, str) else None,
        eos=token("eos"),
        max_context=context if type(context) is int else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return locate.read_json(path)
    except ConfigError:
        return {}


def _flags(facts: Mapping[str, Any], about: _About) -> LaunchFlags:
    if facts["flags"] is not None:
        return from_plain(LaunchFlags, facts["flags"], where="flags")
    context = min(_DEFAULT_CONTEXT, about.max_context or _DEFAULT_CONTEXT)
    # mapped files are held twice where the runtime repacks weights
    return LaunchFlags(context_tokens=context, ubatch=128, kv_type="f16", mmap=False)


# ---------------------------------------------------------------- texts


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _cell(value: Any) -> str:
    return _one_line(value).replace("|", "\\|")


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeprune.bundle"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # no HTML is written
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    quoted = functools.partial(json.dumps, ensure_ascii=False)
    made.filters.update(yaml=quoted, quoted=quoted, cell=_cell)
    return made


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.j2").render(**values)


def _texts(facts: Mapping[str, Any], about: _About, flags: LaunchFlags) -> dict[str, str]:
    form, parent, model = facts["model"]["format"], facts["parent"], facts["model"]["path"]
    title = _one_line(f"{parent['id']} {facts['candidate'] or facts['model']['quantization'] or form}")
    out = {}
    common = {"model": model, "flags": flags, "chat": about.template is not None, "title": title}
    launch = None
    if form == "gguf":
        launch = launch_line(model, flags)
        out["llama-server.sh"] = _render(
            "llama-server.sh", launch=launch, flags=flags, measured=facts["measured"] is not None
        )
        out["Modelfile"] = _modelfile(facts, about, common)
    python = _render(f"sample_{form}.py", kv_type=_GGML_TYPES.get(flags.kv_type, 1), **common)
    javascript = _render(f"sample_{form}.mjs", **common)
    out["sample.py"], out["sample.mjs"] = python, javascript
    command = facts["command"]
    out["README.md"] = _render(
        "README.md",
        title=title,
        short_name=slug(parent["id"]).lower(),
        head=_head(facts),
        summary=_summary(facts),
        about=_about_rows(facts),
        figures=_figures(facts),
        measured_note=_measured_note(facts),
        benchmarks=benchmarks.lines(facts["benchmarks"]) if facts.get("benchmarks") else [],
        limits=_limits(facts),
        launch=launch,
        modelfile="Modelfile" in out,
        format=form,
        python=python,
        javascript=javascript,
        command=shlex.join(command) if command else None,
    )
    return out


def _modelfile(facts: Mapping[str, Any], about: _About, common: Mapping[str, Any]) -> str:
    pieces = None
    if about.template:
        pieces = chat.read(about.template, eos=about.eos, name=common["model"])
    template = pieces.go_template() if pieces else None
    system = pieces.default_system if pieces and template else None
    wanted = [pieces.stop if pieces and template else None, about.eos if template else None]
    stops = [s for s in dict.fromkeys(wanted) if s and '"' not in s and s.isprintable()]
    licence = facts["parent"].get("license")
    if licence is not None and not chat.fits_quotes(licence):
        licence = None
    return _render("Modelfile", template=template, system=system, stops=stops, license=licence, **common)


def _head(facts: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:
    """The YAML head of a model card, in the hub's keys."""
    parent, form = facts["parent"], facts["model"]["format"]
    head: dict[str, str | Sequence[str]] = {}
    licence = parent.get("license")
    if licence:
        known = licence.lower() in _HUB_LICENSES
        head["license"] = licence.lower() if known else "other"
        if not known:
            head["license_name"] = licence
    if _HUB_ID.match(parent["id"]):
        head["base_model"] = parent["id"]
        head["base_model_relation"] = "finetune" if facts["ratio"] else "quantized"
    head["pipeline_tag"] = "text-generation"
    head["library_name"] = "gguf" if form == "gguf" else "onnxruntime-genai"
    tags = ["edgeprune", form]
    head["tags"] = [*tags, "pruned"] if facts["ratio"] else tags
    return head


def _summary(facts: Mapping[str, Any]) -> str:
    parent = _one_line(facts["parent"]["id"])
    if facts["candidate"] is None:
        return f"{parent}, exported by edgeprune. No run measured this file: figures are not known."
    cut = "not pruned"
    if facts["ratio"]:
        cut = f"without {100 * facts['ratio']:.1f}% of its decoder-layer parameters "
        cut += f"({100 * facts['ratio_all']:.1f}% of all)"
    line = f"{parent}, {cut}, as {facts['model']['quantization']}, for {facts['target']['title']}."
    return f"{line}\n\n{_one_line(facts['headline'])}" if facts["headline"] else line


def _about_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    parent, plan, recipe = facts["parent"], facts["plan"], facts["recipe"]
    rows = [
        ("parent", parent["id"]),
        ("parent's licence", parent.get("license") or "not known: ask its makers"),
    ]
    if plan is not None and facts["ratio"]:
        widths = "all layers alike" if plan["uniform"] else "every layer has its own widths"
        rows.append(("plan", f"{plan['id']}, {widths}, compensation {plan['compensation']}"))
    if recipe is not None and facts["ratio"]:
        rows.append(("importance", f"{recipe['metric']}, widths by {recipe['allocator']}"))
    for name, limit in (facts["budget"] or {}).items():
        shown = (
            format_bytes(limit["value"])
            if limit["unit"] == "bytes"
            else f"{limit['value']:g} {limit['unit']}"
        )
        met = (facts["meets"] or {}).get(name)
        said = "" if met is None else ", met" if met else ", missed"
        rows.append((f"limit on {name.replace('_', ' ')}", f"{shown} (from {limit['from']}){said}"))
    rows.append(("made with", ", ".join(f"{k} {v}" for k, v in facts["made_with"].items())))
    return rows


def _or(value: float | None, text: str, otherwise: str) -> str:
    return otherwise if value is None else text.format(value)


def _figures(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (figure, predicted, measured); the two never share a column."""
    p, m, q = facts["predicted"] or {}, facts["measured"] or {}, facts["quality"] or {}
    none, no_prediction = "not measured", "-"
    peak, measured_peak = p.get("peak_memory_bytes"), m.get("peak_memory_bytes")
    band = no_prediction
    if p.get("decode_tps") is not None:
        band = f"{p['decode_tps_low']:.0f} to {p['decode_tps_high']:.0f} tokens/s"
    decode = none
    if m.get("decode_tps") is not None:
        decode = f"{m['decode_tps']:.1f} ± {m['decode_tps_stdev']:.1f} tokens/s"
        decode += " (repeats spread by more than 10%)" if m["noisy"] else ""
    kl = perplexity = agreement = none
    if q:
        kl = f"{q['kl']:.4f} ± {q['kl_stderr']:.4f} nats per token"
        perplexity = f"{q['perplexity']:.2f} ± {q['perplexity_stderr']:.2f}"
        if facts["dense_perplexity"] is not None:
            perplexity += f" (dense parent {facts['dense_perplexity']:.2f})"
        agreement = f"{100 * q['agreement']:.1f}% of positions"
    size = facts["model"].get("bytes")
    return [
        (
            "file",
            _or(p.get("file_bytes"), "{:,} bytes", no_prediction),
            _or(size, "{:,} bytes", "see manifest.json"),
        ),
        (
            "peak memory, context full",
            no_prediction if peak is None else format_bytes(peak),
            none if measured_peak is None else format_bytes(measured_peak),
        ),
        ("decode", band, decode),
        ("prefill", no_prediction, _or(m.get("prefill_tps"), "{:.0f} tokens/s", none)),
        ("first token", no_prediction, _or(m.get("first_token_ms"), "{:.0f} ms", none)),
        ("KL to the dense F16 parent", no_prediction, kl),
        ("perplexity", no_prediction, perplexity),
        ("same most likely token as the parent", no_prediction, agreement),
    ]


def _measured_note(facts: Mapping[str, Any]) -> str:
    parts = []
    if facts["measured"]:
        parts.append(f"Measured on: {_one_line(facts['measured']['on'])}.")
    if facts["workload"]:
        w = facts["workload"]
        parts.append(
            f"Context {w['context_tokens']} tokens; first token behind a prompt of {w['prompt_tokens']}. "
            "The predicted band of speed holds 80%."
        )
    if facts["quality"]:
        parts.append(
            f"Quality on {facts['quality']['tokens']} held-out tokens, {_one_line(facts['quality']['text'])}."
        )
    return " ".join(parts) or "Nothing was measured."


def _limits(facts: Mapping[str, Any]) -> list[str]:
    out = []
    if facts["quality"]:
        out.append(
            "Quality was measured as distance to the parent on a small text, not on tasks; try yours before "
            "relying on it."
        )
    else:
        out.append("Quality was not measured.")
    if facts["ratio"]:
        out.append("Pruning and quantization lose knowledge unevenly: rare facts and languages go first.")
    if (
        facts["target"]
        and not facts["target"]["local"]
        and "not the target" in (facts["measured"] or {}).get("on", "")
    ):
        out.append(
            f"Speed on {_one_line(facts['target']['title'])} is predicted; no such device was at hand."
        )
    if facts["plan"] is not None and not facts["plan"]["uniform"]:
        out.append("Layers differ in width: programs that read one width for all layers refuse the file.")
    out.append("Whatever limits, biases and terms of use the parent has hold for this model too.")
    return out
