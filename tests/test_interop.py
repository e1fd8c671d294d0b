"""scripts/interop: other people's clients load what we export, and read text as the parent does.

A client is tried where it is set up; scripts/interop/set-up, which .ci/run calls, does that from a network.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llama_cpp", reason="the extra 'gguf' is not installed")
pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime_genai", reason="the extra 'onnx' is not installed")

import builders
import llama_cpp
from test_tokenizer import NASTY, train_bpe, train_json_bpe

from edgeprune import checkpoint, graph, remote_code, tokenizer
from edgeprune.cli.main import run as edgeprune
from edgeprune.exporters import onnx as exporter

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "interop"
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
CACHE = Path(os.environ.get("EDGEPRUNE_INTEROP_CACHE", HOME / "edgeprune" / "interop"))
FORMATS = {
    "llama-cpp-python": "gguf",
    "llama-server": "gguf",
    "transformers": "hf",
    "onnxruntime-genai": "onnx",
    "optimum": "onnx",
    "transformers-js": "onnx",
    "chromium": "onnx",
}
IN_NODE = ("transformers-js", "chromium")
UNIFORM = [(4, 2, 96)] * 3
PER_LAYER = [(4, 2, 128), (0, 0, 96), (2, 1, 64), (4, 4, 0)]
# every plan and every kind of tokenizer that the clients' own libraries treat differently
MODELS = {
    "gpt-2": UNIFORM,
    "llama-bpe": PER_LAYER,
    "qwen2": UNIFORM,
    "byte fallback": PER_LAYER,
}
TEXTS = [
    *NASTY,
    "e\u0301a\u0308o\u0302\u0327 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u031ealgo",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u200f\u05e9\u05dc\u05d5\u05dd\u200e! \u0661\u0662\u0663",
    "\x07\x1b[0m\x85\u2028\u2029\ufeff\ufffd",
    "before\x00behind",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4,
    "  \t \n \u3000 \u2003 x",
    "<|im_end|><|im_start|>\u2581<bos> [INST]",
]
PROMPT = "the quick brown fox"
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def llama_server() -> str | None:
    """The program that the script would start, if it is there."""
    built = CACHE / "llama-server" / llama_cpp.__version__ / "build" / "bin" / "llama-server"
    found = os.environ.get("LLAMA_SERVER") or str(built)
    return found if os.access(found, os.X_OK) else None


def absent(client: str) -> str | None:
    """Why a client cannot be tried here, or None."""
    once = f"scripts/interop/{client} has not set it up in {CACHE}"
    if client == "llama-server":
        return (
            None if llama_server() else f"{once}; EDGEPRUNE_INTEROP=all .ci/run builds it (10 to 25 minutes)"
        )
    if client == "optimum":
        return None if (CACHE / "optimum" / "bin" / "python").exists() else once
    if client in IN_NODE:
        if not shutil.which("node") or not shutil.which("npm"):
            return "Node.js is not installed"
        if not (CACHE / "js" / "node_modules" / "@huggingface" / "transformers").is_dir():
            return once
    browsers = ("chromium", "chromium-browser", "google-chrome")
    if client == "chromium" and not os.environ.get("CHROMIUM") and not any(map(shutil.which, browsers)):
        return "no Chromium is installed"
    return None


@dataclass(frozen=True)
class Exported:
    """One tiny model in every form that a client reads."""

    kind: str
    hf: Path
    gguf: Path
    onnx: Path
    texts: Path

    def path(self, client: str) -> Path:
        found: Path = getattr(self, FORMATS[client])
        return found


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def add_tokenizer(folder: Path, kind: str, scratch: Path) -> None:
    made = train_json_bpe(scratch, "llama") if kind == "byte fallback" else train_bpe(scratch, kind)
    plain = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    if kind == "qwen2":
        plain["normalizer"] = {"type": "NFC"}  # as Qwen has it
    (folder / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    settings = json.loads((made / "tokenizer_config.json").read_text())
    if isinstance(settings["eos_token"], dict):  # one of the forms there are, but not one that loads
        settings["eos_token"] = settings["eos_token"]["content"]
    settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def exported(base: Path, kind: str) -> Exported:
    layers = MODELS[kind]
    hf = builders.uneven_llama(base / "hf", layers, vocab=640, tied=True)
    add_tokenizer(hf, kind, base / "tokenizer")
    source = checkpoint.SafetensorsSource(hf)
    family = graph.find_family("llama")
    if layers is PER_LAYER:
        # what the verb prune writes beside such weights
        (hf / remote_code.FILE_NAME).write_text(remote_code.code(family))
        plain = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**plain, "auto_map": remote_code.auto_map()}))
    made = Exported(kind, hf, base / "model.gguf", base / "artifact", base / "texts.json")
    exporter.export(
        made.onnx,
        family=family,
        dims=graph.build(source.config).dims,
        config=source.config,
        read_tensor=lambda name: checkpoint.to_float32(source.tensor(name)),
        quantization="int8",
        tokenizer_folder=hf,
    )
    args = ["export", str(hf), "--quantization", "F32", "--no-verify", "--out", str(made.gguf)]
    assert edgeprune(args) == 0
    made.texts.write_text(json.dumps(TEXTS))
    return made


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("interop"), request.param)


def run(client: str, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    more = {**os.environ, "EDGEPRUNE_INTEROP_CACHE": str(CACHE), "PYTHON": sys.executable, **env}
    command = ["bash", str(SCRIPTS / client), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=more)


@pytest.mark.slow
@pytest.mark.parametrize("client", FORMATS)
def test_client_generates_and_reads_text_as_the_parent(model: Exported, client: str, tmp_path: Path) -> None:
    reason = absent(client)
    if reason is not None:
        pytest.skip(reason)
    done = run(client, model.path(client), PROMPT, model.texts, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 1 <= len(found["made"]) <= 24 and PROMPT in found["text"]
    wrong: dict[str, Any] = {}
    for text, ids in zip(TEXTS, found["ids"], strict=True):
        expected = tokenizer.encode(model.hf, text)
        if ids != expected:
            wrong[text] = (ids, expected)
    differs = known_differences(model.kind, client)
    assert set(wrong) == differs, wrong


def known_differences(kind: str, client: str) -> set[str]:
    """Texts whose ids are other ones in this client, for a reason not ours: docs/onnx.md, Tokenizers."""
    if kind == "qwen2" and FORMATS[client] == "gguf":
        return {text for text in TEXTS if nfc(text) != text}  # llama.cpp normalises nothing
    if client == "onnxruntime-genai":
        # a NUL ends a text, no NFC, and no space is put in front where Llama 2 wants one
        changed = {"qwen2": lambda text: nfc(text) != text, "byte fallback": bool}.get(kind, lambda _: False)
        return {text for text in TEXTS if "\x00" in text or changed(text)}
    return set()


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("plain"), "gpt-2")


@pytest.mark.slow
@pytest.mark.parametrize("client", FORMATS)
def test_what_a_person_sees(client: str, plain_model: Exported) -> None:
    reason = absent(client)
    if reason is not None:
        pytest.skip(reason)
    done = run(client, plain_model.path(client), PROMPT)
    assert done.returncode == 0, done.stderr
    if client == "llama-server":  # an answer, not a continuation
        assert done.stdout.strip() and "tokens/s" in done.stderr
    else:
        assert done.stdout.startswith(PROMPT) and len(done.stdout.strip()) > len(PROMPT)


@pytest.mark.slow
def test_the_server_is_started_by_the_line_of_the_bundle(plain_model: Exported) -> None:
    """All flags of llama-server.sh are ones that this llama.cpp takes."""
    reason = absent("llama-server")
    if reason is not None:
        pytest.skip(reason)
    made = plain_model
    out = made.gguf.with_name("bundle")
    assert edgeprune(["bundle", str(made.gguf), "--tokenizer", str(made.hf), "--out", str(out)]) == 0
    assert "-lm none" in (out / "llama-server.sh").read_text()
    done = run("llama-server", out, PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if not shutil.which("node"):
        pytest.skip("Node.js is not installed; the sample for it is left out")
    # the ten lines in JavaScript against the server that they are for
    sys.path.insert(0, str(SCRIPTS))
    from llama_server_client import running

    server = llama_server()
    assert server is not None
    with running(server, str(out)) as address:
        command = ["node", str(out / "sample.mjs"), "the", "quick"]
        env = {**os.environ, "SERVER": address}
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    assert edgeprune(["verify", str(out)]) == 0


@pytest.mark.parametrize("client", FORMATS)
def test_what_is_wrong_is_said(client: str, tmp_path: Path) -> None:
    form = FORMATS[client]
    said = {"onnx": "is no ONNX folder", "gguf": "is no GGUF file", "hf": "is no Hugging Face folder"}[form]
    missing = "no model given" if form == "gguf" else "no folder given"
    for args, words in ((("",), said), ((), missing), (("--help",), missing)):
        done = run(client, *args)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ") and words in done.stderr
        assert "\nHint: " in done.stderr
    if form == "onnx":
        (tmp_path / "onnx").mkdir()
        assert "has no tokenizer.json" in run(client, tmp_path).stderr
    if form == "gguf":
        assert "does not hold one GGUF file" in run(client, tmp_path).stderr


def test_a_server_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    done = run("llama-server", tmp_path / "a.gguf", LLAMA_SERVER=str(tmp_path / "no"))
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        1,
        f"Error: LLAMA_SERVER={tmp_path / 'no'} is no program",
    )
    (tmp_path / "ends").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    (tmp_path / "ends").chmod(0o755)
    done = run("llama-server", tmp_path / "a.gguf", LLAMA_SERVER=str(tmp_path / "ends"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == ["broken", "Error: llama-server ended; its last lines are above"]
