"""Imports point down only: the layer rule, read from the source with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "edgeprune"

LAYERS = {
    "errors": 0,
    "units": 0,
    "registry": 0,
    "progress": 0,
    "records": 1,
    "rundir": 2,
    "chat_templates": 2,
    "config": 2,
    "costs": 2,
    "families": 3,
    "graph": 4,
    "metrics": 5,
    "allocators": 5,
    "planner": 5.5,
    "damage": 5,
    "search": 5.7,  # asks the planner for ladders
    "stability": 5,
    "verify": 5,
    "locate": 5,
    "remote_code": 5,
    "languages": 5,
    "checkpoint": 6,
    "data": 6,
    "gguf_source": 6,
    "tokenizer": 6,
    "vocabulary": 6.5,  # rewrites what tokenizer reads
    "calibration": 7,
    "gradients": 7,
    "compensation": 7,
    "surgery": 7,
    "reconstruction": 7.5,  # takes the columns from compensation
    "sensitivity": 7.7,  # runs models that a reconstruction made
    "recovery": 7.8,  # trains what a reconstruction made
    "quality": 7,
    "exporters": 8,
    "runtimes": 9,
    "devices": 9,
    "bench": 9.5,  # drives the runtimes on a device
    "evaluation": 9.5,  # drives the runtimes over benchmark items
    "selection": 10,
    "report": 10,
    "bundle": 10.5,  # launch lines are the report's
    "pipeline": 11,
    "api": 11.5,
    "cli": 12,
    "__main__": 13,
}
# inside layer 0 the registry raises the errors and units refuse with them
FOUNDATION = {("registry", "errors"), ("units", "errors")}
TORCH_FREE = {name for name, layer in LAYERS.items() if layer < 6 or layer in (10, 10.5, 11.5, 12)}
HEAVY = {"torch", "transformers", "safetensors", "gguf", "llama_cpp", "datasets", "tokenizers"}
HEAVY |= {"onnx", "onnxruntime", "onnxruntime_genai"}
NUMPY_FROM = 5

FILES = sorted(PACKAGE.rglob("*.py"))


def component(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, in functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def violations(name: str, source: str) -> list[str]:
    """Return what breaks the rule in a module of component `name`."""
    found = []
    for line, target in imports(ast.parse(source)):
        top, _, rest = target.partition(".")
        if top in HEAVY and name in TORCH_FREE:
            found.append(f"line {line}: {name} must load without {top}")
        if top == "numpy" and LAYERS[name] < NUMPY_FROM:
            found.append(f"line {line}: {name} must load without numpy")
        if top != "edgeprune" or not rest:
            continue
        other = rest.split(".")[0]
        if other == name or other == "__version__" or (name, other) in FOUNDATION:
            continue
        if other not in LAYERS:
            found.append(f"line {line}: {name} imports {other}, which has no layer")
        elif LAYERS[other] >= LAYERS[name]:
            arrow = "sideways" if LAYERS[other] == LAYERS[name] else "up"
            found.append(f"line {line}: {name} imports {arrow} from {other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    name = component(path)
    if name == "__init__":  # the lazy `edgeprune.load`; its own test is below
        return
    assert name in LAYERS, f"{path}: give it a layer here"
    assert violations(name, path.read_text(encoding="utf-8")) == []


def test_the_package_itself_imports_nothing_when_loaded() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_import = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert {getattr(n, "module", None) for n in at_import} == {"__future__", "typing"}


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("records", "from edgeprune.rundir import RunDir", "line 1: records imports up from rundir"),
        ("config", "from edgeprune import costs", "line 1: config imports sideways from costs"),
        ("planner", "def f():\n    import edgeprune.pipeline", "line 2: planner imports up from pipeline"),
        ("graph", "import torch.nn", "line 1: graph must load without torch"),
        ("families", "import numpy as np", "line 1: families must load without numpy"),
        ("bench", "from edgeprune import nowhere", "line 1: bench imports nowhere, which has no layer"),
    ],
)
def test_the_rule_catches(name: str, source: str, problem: str) -> None:
    assert violations(name, source) == [problem]


def test_the_rule_allows() -> None:
    assert violations("cli", "def f():\n    from edgeprune import pipeline") == []
    assert violations("config", "from edgeprune.config import toml\nfrom edgeprune.errors import E") == []
    assert violations("planner", "import numpy as np") == []
    assert violations("surgery", "import torch") == []


def test_files_were_found() -> None:
    assert len(FILES) > 20
