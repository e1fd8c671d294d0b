"""Fixtures every test module may use."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target
from edgeprune.records import DeviceTarget, Profile

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process; returns exit code, stdout and stderr."""
    from edgeprune.cli.main import run

    def call(*args: str | Path) -> Ran:
        capfd.readouterr()
        code = run([str(a) for a in args])
        captured = capfd.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def run_python() -> Callable[..., Ran]:
    """Run code in a fresh interpreter at the repository root."""

    def call(code: str, *args: str, cwd: Path = ROOT, timeout: float = 60) -> Ran:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=env,
            timeout=timeout,
        )
        return Ran(code=done.returncode, out=done.stdout, err=done.stderr)

    return call


@pytest.fixture
def make_target() -> Callable[..., DeviceTarget]:
    """Return a valid target with some fields replaced."""

    def make(**over: Any) -> DeviceTarget:
        target, _ = load_target("raspberry-pi-5-8gb")
        return dataclasses.replace(target, **over)

    return make


@pytest.fixture
def make_profile() -> Callable[..., Profile]:
    """Return a valid profile with some fields replaced."""

    def make(**over: Any) -> Profile:
        return dataclasses.replace(load_profile("chat-2k"), **over)

    return make


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family by its name, made once per module."""
    import builders  # torch, which not every test has

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = builders.tiny_family(tmp_path_factory.mktemp("family"), name)
        return made[name]

    return folder
