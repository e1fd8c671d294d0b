"""Facts of this machine: plausible here, and read right from given system files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.devices import local


def test_detect_agrees_with_the_operating_system() -> None:
    facts = local.detect(probe_seconds=0.05)
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory_bytes"] > 2**28
    assert 0 < facts["usable_bytes"] <= facts["memory_bytes"]
    assert facts["memcpy_all_bytes_per_s"] >= facts["memcpy_bytes_per_s"]
    assert facts["peak_bytes_per_s"] == pytest.approx(2 * facts["memcpy_all_bytes_per_s"] / 0.794)
    assert 1e8 < facts["matmul_float32_flops"] < 1e14
    # between a very slow board and anything that exists
    assert 2e8 < facts["memcpy_bytes_per_s"] < 2e12
    assert facts["cpu"]


def test_detection_needs_no_heavy_library() -> None:
    code = (
        "import sys; from edgeprune.devices import local as d; d.detect(probe_seconds=0.0); d.environment();"
        "print([m for m in ('torch', 'numpy', 'llama_cpp', 'gguf') if m in sys.modules])"
    )
    root = Path(local.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_probe_when_none_is_wanted() -> None:
    facts = local.detect(probe_seconds=0.0)
    assert facts["memcpy_bytes_per_s"] is None
    assert facts["peak_bytes_per_s"] is None
    assert facts["matmul_int8_ops"] is None


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"flags": "fpu sse2 avx2 avx512f avx_vnni"}, ("avx2", "avx512", "avx_vnni")),
        ({"Features": "fp asimd fphp asimdhp asimddp"}, ("neon", "dotprod", "fp16")),
        ({"Features": "fp asimd evtstrm crc32"}, ("neon",)),  # Cortex-A72
    ],
)
def test_instruction_sets_from_cpuinfo(info: dict[str, str], expected: tuple[str, ...]) -> None:
    assert local.isa(info) == expected


def test_a_control_group_limits_memory_and_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path
    (group / "memory.max").write_text(f"{300 << 20}\n")
    (group / "memory.current").write_text(f"{100 << 20}\n")
    (group / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(local, "_cgroup_folders", lambda controller: [group])
    total, usable = local.memory_bytes()
    assert total == 300 << 20
    assert usable == 200 << 20
    assert local.available_threads() == 1
    assert local.cores() == 1


def test_an_unlimited_control_group_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path
    before = local._system_memory()[0]
    (group / "memory.max").write_text("max\n")
    (group / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(local, "_cgroup_folders", lambda controller: [group])
    assert local.memory_bytes()[0] == before
    if hasattr(os, "sched_getaffinity"):
        assert local.available_threads() == len(os.sched_getaffinity(0))


def test_without_proc_everything_degrades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_read", lambda path: None)
    monkeypatch.setattr(local, "_sysctl", lambda name: None)
    facts = local.detect(probe_seconds=0.0)
    assert facts["memory_bytes"] is None
    assert facts["usable_bytes"] is None
    assert facts["cores"] >= 1
    environment = local.environment()
    assert environment.governor is None
    assert environment.temperature_c is None
    assert environment.n_cpus >= 1
