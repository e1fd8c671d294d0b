"""The main job given wrong input: one clear line, its exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from builders import tiny_model_with_tokenizer
from candidates import small_profile
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]

PROFILE = small_profile(
    bench=(16, 4, 1),
    metric="magnitude",
    calibration_samples=2,
    calibration_tokens=32,
    eval_samples=2,
    quantizations=["Q8_0", "Q4_0"],
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def gguf_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeprune.cli.main import run

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert run(["export", str(tiny), "--quantization", "F16", "--out", str(path), "--no-verify"]) == 0
    return path


class Bench:
    """A copy of the tiny model to damage, a profile and a place for the run."""

    def __init__(self, folder: Path, tiny: Path, gguf_file: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.out = folder / "runs" / "deep" / "run"
        self.profile = folder / "small.toml"
        self.profile.write_text(PROFILE)
        shutil.copytree(tiny, self.model)
        self.weights = self.model / "model.safetensors"
        self.gguf_file = gguf_file

    def command(self, *more: str | Path, **over: str | Path | None) -> list[str]:
        given: dict[str, str | Path | None] = {
            "--target": "laptop-cpu",
            "--budget": "100MB",
            "--model": self.model,
            "--profile": self.profile,
            "--out": self.out,
            "--threads": "1",
        }
        given.update({f"--{k.replace('_', '-')}": v for k, v in over.items()})
        flat = [str(x) for pair in given.items() if pair[1] is not None for x in pair]
        return [*flat, *(str(m) for m in more)]

    def config(self, **over: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **over}))

    def without(self, *keys: str) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))

    def index(self, **weight_map: str) -> None:
        names = dict.fromkeys(load_file(self.weights), "model.safetensors")
        (self.model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {**names, **weight_map}})
        )

    def own_gguf(self) -> Path:
        return Path(shutil.copy(self.gguf_file, self.folder / "own.gguf"))


@pytest.fixture
def at(tmp_path: Path, tiny: Path, gguf_file: Path) -> Bench:
    return Bench(tmp_path, tiny, gguf_file)


def assert_refused(ran: Any, code: int, *problems: str, hint: str | None = None) -> None:
    """`problems` and `hint` are regular expressions; each problem is one line, and there are no others."""
    assert ran.out == ""
    assert "Traceback" not in ran.err
    found = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert ran.code == code, ran.err
    assert len(found) == len(problems), ran.err
    for line, problem in zip(found, problems, strict=True):
        assert re.search(problem, line), f"{line!r} does not match {problem!r}"
        assert len(line) < 400
    hints = [line for line in ran.err.splitlines() if line.startswith("Hint: ")]
    assert len(hints) <= 1
    if hint is not None:
        assert hints and re.search(hint, hints[0]), f"{hints} do not match {hint!r}"
    # besides these two only our own progress lines, never a library's
    rest = [line for line in ran.err.splitlines() if not line.startswith(("Error: ", "Hint: "))]
    # on a busy machine a stage lasts long enough to say how far it is
    own = re.compile(r"…$|: done in |^candidate |: \d+/\d+, .* left$")
    assert all(own.search(line) for line in rest), rest


# ---------------------------------------------------------------- the command line and its files

Refusal = tuple[Callable[[Bench], list[str]], int, tuple[str, ...], str | None]


def _toml(text: str) -> Callable[[Bench], list[str]]:
    def make(at: Bench) -> list[str]:
        at.profile.write_text(text)
        return at.command()

    return make


def _target(text: str) -> Callable[[Bench], list[str]]:
    def make(at: Bench) -> list[str]:
        path = at.folder / "board.toml"
        path.write_text(text)
        return at.command(target=path)

    return make


COMMANDS: dict[str, Refusal] = {
    "size in two words": (
        lambda at: at.command("MB", budget="200"),
        2,
        ("'MB' stands alone: write number and unit together, such as 200MB",),
        None,
    ),
    "target as a verb": (
        lambda at: ["laptop-cpu", "--budget", "200MB"],
        2,
        ("'laptop-cpu' is a target, not a verb: write --target laptop-cpu",),
        None,
    ),
    "target": (
        lambda at: at.command(target="jetson-orinn"),
        2,
        (r"unknown target 'jetson-orinn' \(did you mean 'jetson-orin'\?\)",),
        "known: .*laptop-cpu",
    ),
    "target and profile": (
        lambda at: at.command(target="laptop", profile="chat2k"),
        2,
        ("unknown target 'laptop'", r"unknown profile 'chat2k' \(did you mean 'chat-2k'\?\)"),
        None,
    ),
    "target file": (
        lambda at: at.command(target="./no.toml"),
        2,
        ("target file './no.toml' does not exist",),
        None,
    ),
    "profile file": (
        lambda at: at.command(profile="no.toml"),
        2,
        ("profile file 'no.toml' does not exist",),
        None,
    ),
    "unit in lower case": (lambda at: at.command(budget="6gb"), 2, ("--budget '6gb'",), "did you mean 6GB"),
    "no unit": (
        lambda at: at.command(budget="6"),
        2,
        ("--budget '6' is not a number followed by a unit",),
        None,
    ),
    "negative size": (lambda at: at.command(budget="-1GB"), 2, ("--budget '-1GB'",), None),
    "zero size": (
        lambda at: at.command(budget="0MB"),
        2,
        ("--budget '0MB' must be at least one byte",),
        None,
    ),
    "no number": (lambda at: at.command(budget="lots"), 2, ("--budget 'lots'",), None),
    "huge number": (
        lambda at: at.command(budget="9" * 400 + "GB"),
        2,
        ("--budget '9{37}…' is beyond any device",),
        None,
    ),
    "file size": (
        lambda at: at.command(max_file="3"),
        2,
        ("--max-file '3' is not a number followed by a unit",),
        None,
    ),
    "speed of nothing": (
        lambda at: at.command(min_tps="0"),
        2,
        ("--min-tps must be a positive number",),
        None,
    ),
    "kl that is no number": (
        lambda at: at.command(max_kl="nan"),
        2,
        ("--max-kl must be a positive number",),
        None,
    ),
    "negative seed": (lambda at: at.command(seed="-1"), 2, ("'--seed'",), "--help"),
    "broken toml": (_toml("title = \n[workload"), 2, (r"small.toml: not valid TOML: .*line 1",), None),
    "toml that is no text": (
        lambda at: (at.profile.write_bytes(b"\xff\xfe\x00"), at.command())[1],
        2,
        ("small.toml: not UTF-8 text",),
        None,
    ),
    "unknown keys": (
        _toml(PROFILE.replace("max_measured", "max_mesured") + "[limits]\nmax_first_token = 3\n"),
        2,
        (
            r"\[recipe\] unknown key 'max_mesured' \(did you mean 'max_measured'\?\)",
            r"\[recipe\] missing key 'max_measured'",
            r"\[limits\] unknown key 'max_first_token' \(did you mean 'max_first_token_ms'\?\)",
        ),
        None,
    ),
    "wrong types": (
        _toml(PROFILE.replace("repeats = 1", 'repeats = "often"')),
        2,
        (r"\[bench\] 'repeats' must be a whole number",),
        None,
    ),
    "target file with unknown keys": (
        _target('title = "board"\nmemry = "4GB"\n'),
        2,
        (r"unknown key 'memry' \(did you mean 'memory'\?\)", *["board.toml: missing key"] * 8),
        None,
    ),
    "metric": (
        lambda at: at.command(metric="llm-bipp"),
        2,
        (r"unknown metric 'llm-bipp' \(did you mean 'llm-bip'\?\)",),
        None,
    ),
    "metric in a profile": (
        _toml(PROFILE.replace('"magnitude"', '"magnitud"')),
        2,
        (r"unknown metric 'magnitud' \(did you mean 'magnitude'\?\)",),
        None,
    ),
    "metric option": (
        lambda at: at.command(metric="llm-bip", metric_option="form=D"),
        2,
        ("form",),
        None,
    ),
    "quantization": (
        lambda at: at.command(quantization="Q4_O"),
        2,
        (r"unknown GGUF quantization 'Q4_O' \(did you mean 'Q4_",),
        None,
    ),
    "quantization in a profile": (
        _toml(PROFILE.replace('"Q4_0"', '"Q4"')),
        2,
        (r"unknown GGUF quantization 'Q4'",),
        None,
    ),
    "allocator in a profile": (
        _toml(PROFILE.replace('["uniform"]', '["even"]')),
        2,
        (r"unknown allocator 'even'",),
        None,
    ),
    "format in a profile": (
        _toml(PROFILE.replace('["gguf"]', '["ggml"]')),
        2,
        (r"unknown exporter 'ggml'",),
        None,
    ),
    "mode of a target without modes": (
        lambda at: at.command(mode="25W"),
        2,
        ("target laptop-cpu has no power mode '25W'",),
        None,
    ),
    "mode": (
        lambda at: at.command(target="jetson-orin-nano-8gb", mode="26W"),
        2,
        ("target jetson-orin-nano-8gb has no power mode '26W'",),
        "power modes: .*25W",
    ),
    "device": (
        lambda at: at.command(device="ssh://me@bo ard"),
        2,
        ("'ssh://me@bo ard' is not a device address",),
        "write ssh://user@host",
    ),
    "device-scheme": (
        lambda at: at.command(device="shh://board"),
        2,
        (r"device 'shh://board' cannot be reached \(did you mean 'ssh'\?\)",),
        "local, ssh://",
    ),
    "context": (
        lambda at: at.command(profile="chat-2k"),
        2,
        ("profile chat-2k needs a context of 2048 tokens, model was trained for 512",),
        "--profile",
    ),
    "calibration file": (
        lambda at: at.command(calibration="./no.txt"),
        2,
        ("text file ./no.txt does not exist",),
        None,
    ),
    "held-out file": (
        lambda at: at.command(eval_text="no.txt"),
        2,
        ("text file no.txt does not exist",),
        None,
    ),
    "empty text": (
        lambda at: ((at.folder / "e.txt").write_text(" \n"), at.command(eval_text=at.folder / "e.txt"))[1],
        2,
        ("e.txt is empty",),
        None,
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line(run_cli: Callable[..., Any], at: Bench, name: str) -> None:
    make, code, problems, hint = COMMANDS[name]
    ran = run_cli(*make(at))
    assert_refused(ran, code, *problems, hint=hint)
    assert not at.out.parents[1].exists()


def test_text_that_is_too_short(run_cli: Callable[..., Any], at: Bench) -> None:
    (at.folder / "short.txt").write_text("the quick brown fox " * 3)
    ran = run_cli(*at.command(calibration=at.folder / "short.txt"))
    assert_refused(ran, 2, r"short.txt has \d+ tokens, 2 windows of 32 need 64", hint="longer text")


# ---------------------------------------------------------------- models


def _header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


def _truncate(path: Path, drop: int) -> None:
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - drop)


def _nan(at: Bench) -> None:
    arrays = load_file(at.weights)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = arrays[name].copy()
    arrays[name][3, 5] = np.nan
    save_file(arrays, at.weights, metadata={"format": "pt"})


def _integers(at: Bench) -> None:
    arrays = load_file(at.weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**arrays, name: arrays[name].astype(np.int32)}, at.weights)


def _only_pickle(at: Bench) -> None:
    at.weights.unlink()
    (at.model / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _no_tensor(at: Bench) -> None:
    arrays = load_file(at.weights)
    del arrays["model.norm.weight"]
    save_file(arrays, at.weights)


def _tokenizer(text: str | None) -> Callable[[Bench], None]:
    def make(at: Bench) -> None:
        path = at.model / "tokenizer.json"
        path.unlink()
        if text is not None:
            path.write_text(text)

    return make


def _half_tokenizer(at: Bench) -> None:
    path = at.model / "tokenizer.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


MODELS: dict[str, tuple[Callable[[Bench], Any], int, tuple[str, ...], str | None]] = {
    "missing": (
        lambda at: shutil.rmtree(at.model),
        2,
        ("model '.*/model' does not exist",),
        "org/name",
    ),
    "empty folder": (
        lambda at: (shutil.rmtree(at.model), at.model.mkdir()),
        2,
        ("config.json",),
        None,
    ),
    "truncated safetensors": (
        lambda at: _truncate(at.weights, 999),
        2,
        ("is damaged or truncated: it has",),
        "download it again",
    ),
    "absurd header length": (
        lambda at: at.weights.write_bytes(_header(2**62, b"{}")),
        2,
        ("is damaged or truncated: 10 bytes do not hold its header",),
        None,
    ),
    "header that is not JSON": (
        lambda at: at.weights.write_bytes(_header(4, b"{{{{")),
        2,
        ("its header is not JSON",),
        None,
    ),
    "header of deep brackets": (
        lambda at: at.weights.write_bytes(_header(10**6, b"[" * 10**6)),
        2,
        ("its header is not JSON",),
        None,
    ),
    "header with negative offsets": (
        lambda at: at.weights.write_bytes(
            _header(61, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-8]}}'.ljust(61))
        ),
        2,
        ("is damaged or truncated",),
        None,
    ),
    "empty safetensors": (
        lambda at: at.weights.write_bytes(b""),
        2,
        ("0 bytes do not hold its header",),
        None,
    ),
    "missing shard": (
        lambda at: at.index(**{"model.norm.weight": "model-00002.safetensors"}),
        2,
        ("shard .*model-00002.safetensors is missing",),
        "download",
    ),
    "shard outside the folder": (
        lambda at: at.index(**{"model.norm.weight": "../../etc/passwd.safetensors"}),
        2,
        (r"shard name '../../etc/passwd.safetensors' is not a plain",),
        None,
    ),
    "shard by absolute path": (
        lambda at: at.index(**{"model.norm.weight": "/etc/passwd"}),
        2,
        ("shard name '/etc/passwd' is not a plain",),
        None,
    ),
    "index that is not JSON": (
        lambda at: (at.model / "model.safetensors.index.json").write_text("{"),
        2,
        ("cannot read .*index.json",),
        None,
    ),
    "missing tensor": (_no_tensor, 2, ("tensor model.norm.weight is missing",), None),
    "only a pickle": (_only_pickle, 2, ("holds only pytorch_model.bin, a pickle",), "safe_serialization"),
    "NaN weights": (_nan, 2, ("tensor model.layers.1.mlp.up_proj.weight holds NaN",), None),
    "integer weights": (_integers, 2, (r"model.layers.1.mlp.up_proj.weight is torch.int32",), None),
    "config of absurd sizes": (
        lambda at: at.config(num_hidden_layers=10**12, vocab_size=10**15),
        4,
        ("config.json: 'num_hidden_layers'|config.json: 'vocab_size'",),
        None,
    ),
    "config that is not JSON": (
        lambda at: (at.model / "config.json").write_text("{'a': 1}"),
        2,
        ("cannot read .*config.json",),
        None,
    ),
    "config that is a list": (
        lambda at: (at.model / "config.json").write_text("[1]"),
        2,
        ("does not hold a JSON object",),
        None,
    ),
    "config of deep brackets": (
        lambda at: (at.model / "config.json").write_text("[" * 10**6),
        2,
        ("cannot read .*config.json",),
        None,
    ),
    "config without keys": (lambda at: at.without("hidden_size"), 4, ("'hidden_size'",), None),
    "config without a family": (lambda at: at.without("model_type"), 4, ("model_type|family",), None),
    "config with text for a number": (
        lambda at: at.config(intermediate_size="128"),
        4,
        ("'intermediate_size'",),
        None,
    ),
    "config that does not fit the weights": (
        lambda at: at.config(intermediate_size=256),
        2,
        (*[r"has shape \[.*\], config.json says"] * 5, "and 4 more"),
        "do not belong together",
    ),
    "config with an eps of text": (lambda at: at.config(rms_norm_eps="tiny"), 4, ("rms_norm_eps",), None),
    "config with rope of nonsense": (
        lambda at: at.config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        4,
        ("rope|rotary|spiral",),
        None,
    ),
    "unknown family": (
        lambda at: at.config(model_type="gptj"),
        4,
        ("model family 'gptj' is not supported",),
        "known families: .*llama",
    ),
    "no tokenizer": (_tokenizer(None), 2, ("tokenizer",), None),
    "tokenizer that is not JSON": (_half_tokenizer, 2, ("tokenizer.json",), None),
    "tokenizer that is a list": (_tokenizer("[]"), 2, ("tokenizer.json",), None),
    "tokenizer without a model": (
        _tokenizer('{"version": "1.0"}'),
        4,
        ("tokenizer.json: not a BPE tokenizer",),
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(run_cli: Callable[..., Any], at: Bench, name: str) -> None:
    damage, code, problems, hint = MODELS[name]
    damage(at)
    ran = run_cli(*at.command())
    assert_refused(ran, code, *problems, hint=hint)
    assert not (at.out / "report.json").exists()
    assert not list(at.folder.rglob("*.part"))
    if not (at.out / "log.jsonl").exists():
        assert not at.out.parents[1].exists()


def _gguf_magic(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:4] = b"GGML"
    path.write_bytes(data)


def _gguf_at(offset: int, value: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset : offset + len(value)] = value
        path.write_bytes(data)

    return damage


def _gguf_arch(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))


GGUFS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "empty": (lambda p: p.write_bytes(b""), 2, "not a GGUF file"),
    "another file": (lambda p: p.write_bytes(b"PK\x03\x04" * 100), 2, "not a GGUF file"),
    "other magic": (_gguf_magic, 2, "not a GGUF file"),
    "version": (_gguf_at(4, struct.pack("<I", 99)), 2, "version 99"),
    "absurd tensor count": (_gguf_at(8, struct.pack("<Q", 2**60)), 2, "own.gguf: "),
    "absurd metadata count": (_gguf_at(16, struct.pack("<Q", 2**60)), 2, "own.gguf: "),
    "absurd key length": (_gguf_at(24, struct.pack("<Q", 2**63)), 2, "own.gguf: "),
    "cut in the weights": (lambda p: _truncate(p, 1000), 2, "lies beyond the end of the file"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:500]), 2, "own.gguf: "),
    "a few bytes": (lambda p: p.write_bytes(p.read_bytes()[:20]), 2, "own.gguf: "),
    "another architecture": (_gguf_arch, 4, "GGUF architecture 'mamba' is not supported"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_files(run_cli: Callable[..., Any], at: Bench, name: str) -> None:
    damage, code, problem = GGUFS[name]
    path = at.own_gguf()
    damage(path)
    ran = run_cli(*at.command(model=path))
    assert_refused(ran, code, problem)
    assert not at.out.parents[1].exists()


def test_nan_weights_in_a_gguf(run_cli: Callable[..., Any], at: Bench) -> None:
    from edgeprune.costs.gguf_header import read_header

    path = at.own_gguf()
    tensor = next(t for t in read_header(path).tensors if t.name == "blk.1.ffn_up.weight")
    _gguf_at(tensor.offset + 10, struct.pack("<e", float("nan")))(path)
    ran = run_cli(*at.command(model=path))
    assert_refused(ran, 2, "model.layers.1.mlp.up_proj.weight holds NaN")
    assert not (at.out / "report.json").exists()
    assert [p for p in (at.out / "artifacts").iterdir()] == []


@pytest.mark.parametrize("option", ["model", "calibration"])
@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_cannot_be_reached(at: Bench, option: str, offline: bool) -> None:
    # an address that answers 'refused' at once stands for a machine without a network
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(at.folder / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", *at.command(**{option: "someone/something"})],
        capture_output=True,
        text=True,
        env=env,
        cwd=at.folder,
        timeout=60,
    )
    assert time.monotonic() - began < 30  # starting python and torch on a busy machine included
    from conftest import Ran

    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    ran = Ran(code=done.returncode, out=done.stdout, err=done.stderr)
    assert_refused(ran, 2, f"'someone/something' .*: {why}", hint="network")
    assert not at.out.exists()


# ---------------------------------------------------------------- the place to write


def test_out_is_a_file(run_cli: Callable[..., Any], at: Bench) -> None:
    file = at.folder / "notes.txt"
    file.write_text("mine")
    assert_refused(run_cli(*at.command(out=file)), 2, f"cannot write {file}: ", hint="--out")
    assert_refused(run_cli(*at.command(out=file / "run")), 2, f"cannot write {file / 'run'}: ", hint="--out")
    assert file.read_text() == "mine"


@pytest.fixture
def anyones_folder() -> Iterator[Path]:
    """A folder every user can reach; pytest's own are for one user only."""
    folder = Path(tempfile.mkdtemp(prefix="edgeprune-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_that_cannot_be_written(at: Bench, anyones_folder: Path) -> None:
    """As another user when the test runs as root, who may write everywhere."""
    from conftest import Ran

    locked = anyones_folder / "locked"
    locked.mkdir(mode=0o555)
    model = Path(shutil.copytree(at.model, anyones_folder / "model"))
    profile = Path(shutil.copy(at.profile, anyones_folder))
    code = "import sys, torch, transformers, edgeprune.pipeline.main; import os\n"
    code += "if os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)\n"
    code += "from edgeprune.cli.main import run; sys.exit(run(sys.argv[1:]))"
    args = at.command(model=model, profile=profile, out=locked / "run")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, cwd=ROOT
    )
    ran = Ran(code=done.returncode, out=done.stdout, err=done.stderr)
    assert_refused(ran, 2, f"cannot write {locked / 'run'}: Permission denied", hint="--out")
    assert list(locked.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of that many KiB, or make it that large when it is there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def size(kib: int) -> Path:
        nonlocal mounted
        how = f"size={kib}k" if not mounted else f"remount,size={kib}k"
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip() if done else 'no mount'}")
        mounted = True
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# where a run of the tiny model stops: its records, its statistics, its first file, a later one
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("kib", [40, 120, 300, 450, 640])
def test_a_full_disk_and_then_room(
    run_cli: Callable[..., Any], at: Bench, small_disk: Callable[[int], Path], kib: int
) -> None:
    folder = small_disk(kib)
    command = at.command("--format", "json", out=folder / "run")
    ran = run_cli(*command)
    assert_refused(
        ran, 2, r"no space left on the disk|but its disk has", hint="free some space and run the same"
    )
    assert not (folder / "run" / "report.json").exists()
    assert not list(folder.rglob("*.part"))
    small_disk(32 << 10)
    again = run_cli(*command)
    assert again.code == 0, again.err
    assert json.loads(again.out)["selected"] == "dense@Q8_0"
    assert not list(folder.rglob("*.part"))


# ---------------------------------------------------------------- what is not installed

_WITHOUT = """
import importlib.metadata, sys
blocked = set(sys.argv[1].split(","))

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
real = importlib.metadata.version
def version(name):
    if name.removesuffix("-python").replace("-", "_") in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from edgeprune.cli.main import run
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("library", "extra"),
    [
        ("torch", "torch"),
        ("transformers", "torch"),
        ("tokenizers", "torch"),
        ("gguf", "gguf"),
        ("llama_cpp", "gguf"),
    ],
)
def test_a_library_that_is_not_installed(
    run_python: Callable[..., Any], at: Bench, library: str, extra: str
) -> None:
    ran = run_python(_WITHOUT, library, *at.command())
    assert_refused(
        ran,
        5,
        f"this needs the library '{library}', which is not installed",
        hint=re.escape(f"pip install 'edgeprune[{extra}]'"),
    )
    assert not list(at.folder.rglob("*.part"))
    assert not (at.out / "log.jsonl").exists()
