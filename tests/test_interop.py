"""The scripts under scripts/interop: other people's clients load what we export and agree with each other.

A client is tried where it is set up already; run its script once to set it up (this needs a network).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime_genai", reason="the extra 'onnx' is not installed")

import builders

from edgeprune import checkpoint, graph
from edgeprune.exporters import onnx as exporter

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "interop"
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
CACHE = Path(os.environ.get("EDGEPRUNE_INTEROP_CACHE", HOME / "edgeprune" / "interop"))
CLIENTS = ("onnxruntime-genai", "optimum", "transformers-js", "chromium")
LAYERS = {
    "uniform": [(4, 2, 96)] * 3,
    "per layer": [(4, 2, 128), (0, 0, 96), (2, 1, 64), (4, 4, 0)],
}


def absent(client: str) -> str | None:
    """Why a client cannot be tried here, or None."""
    once = f"scripts/interop/{client} has not set it up in {CACHE}"
    if client == "optimum":
        return None if (CACHE / "optimum" / "bin" / "python").exists() else once
    if client in ("transformers-js", "chromium"):
        if not shutil.which("node") or not shutil.which("npm"):
            return "Node.js is not installed"
        if not (CACHE / "js" / "node_modules" / "@huggingface" / "transformers").is_dir():
            return once
    browsers = ("chromium", "chromium-browser", "google-chrome")
    if client == "chromium" and not os.environ.get("CHROMIUM") and not any(map(shutil.which, browsers)):
        return "no Chromium is installed"
    return None


@pytest.fixture(scope="module", params=LAYERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("interop")
    hf = builders.uneven_llama(base / "hf", LAYERS[request.param], vocab=300, tied=True)
    builders.tiny_tokenizer(hf, 300)
    source = checkpoint.SafetensorsSource(hf)
    exporter.export(
        base / "artifact",
        family=graph.find_family("llama"),
        dims=graph.build(source.config).dims,
        config=source.config,
        read_tensor=lambda name: checkpoint.to_float32(source.tensor(name)),
        quantization="int8",
        tokenizer_folder=hf,
    )
    return base / "artifact"


def run(client: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "EDGEPRUNE_INTEROP_CACHE": str(CACHE), "PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS / client), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_client_generates(folder: Path, client: str) -> None:
    reason = absent(client)
    if reason is not None:
        pytest.skip(reason)
    done = run(client, folder, "the quick brown fox")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the quick brown fox")
    assert len(done.stdout.strip()) > len("the quick brown fox")


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_wrong_is_said(client: str, tmp_path: Path) -> None:
    for args, words in ((("",), "is no ONNX folder"), ((), "no artifact folder given")):
        done = run(client, *args)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ") and words in done.stderr
        assert "\nHint: " in done.stderr
    (tmp_path / "onnx").mkdir()
    assert "has no tokenizer.json" in run(client, tmp_path).stderr
