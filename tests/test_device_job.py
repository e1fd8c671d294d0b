"""The main job with a device: measured over a real SSH server, cut on the way, held against its budget."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import platform

from edgeprune import rundir
from edgeprune.costs.gguf_header import read_header
from edgeprune.devices import local
from edgeprune.pipeline import calibrating, device_loop
from edgeprune.records import LaunchFlags
from tests import ssh_server
from tests.test_end_to_end import place, report_of, start

__all__ = ["place"]

BOARD = """\
title = "a board behind SSH"
arch = "{arch}"
isa = {isa}
cores = 2
memory = "1GiB"
usable = "900MiB"
bandwidth_peak_gb_per_s = 20.0
formats = ["gguf"]
[sources]
arch = "test"
isa = "test"
cores = "test"
memory = "test"
usable = "test"
bandwidth_peak_gb_per_s = "test"
formats = "test"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ssh_server.Server]:
    reason = ssh_server.missing()
    if reason is not None:
        pytest.skip(reason)
    with ssh_server.running() as started:
        yield started


def _job(place: Path, out: Path, server: ssh_server.Server, arch: str | None = None) -> subprocess.Popen[str]:
    board = out.parent / "board.toml"
    isa = json.dumps(list(local.detect(probe_seconds=0)["isa"]))
    board.write_text(BOARD.format(arch=arch or platform.machine(), isa=isa))
    given = {
        "target": board,
        "budget": "100MB",
        "model": place / "tiny",
        "profile": place / "seconds.toml",
        "out": out,
        "threads": "1",
        "device": server.address,
        "ssh-config": server.config,
        "device-python": sys.executable,
        "sustained": "0.2",
        "max-candidates": "2",
        "quantization": "Q8_0",
        "format": "json",
    }
    return start([str(x) for k, v in given.items() for x in (f"--{k}", v)])


def _copied(server: ssh_server.Server) -> list[Path]:
    return [p for p in server.home.rglob("*") if p.is_file()]


def test_a_job_measured_over_ssh(place: Path, tmp_path: Path, server: ssh_server.Server) -> None:
    job = _job(place, tmp_path / "run", server)
    _, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    report = report_of(tmp_path / "run")
    measured = [c for c in report["candidates"] if c["measured"]]
    assert len(measured) == 2
    for candidate in measured:
        found = candidate["measured"]
        assert server.address in found["on"] and "not the target" not in found["on"]
        assert found["decode_tps"] > 0 and found["peak_memory_bytes"] > candidate["artifact"]["bytes"]
    assert report["selected"]
    raw: list[dict[str, Any]] = [
        json.loads(p.read_text()) for p in (tmp_path / "run" / "arrays").glob("device-*.json")
    ]
    sustained = [r["answer"]["sustained"] for r in raw if r["answer"]["sustained"]]
    assert len(sustained) == 2 and all(s["seconds"] >= 0.2 for s in sustained)
    held = [r["answer"] for r in raw if r["answer"]["memory_limit"]]
    assert len(held) == 1 and held[0]["tokens_filled"] == 128
    assert _copied(server) == []


def test_a_job_whose_connection_is_cut_goes_on(
    place: Path, tmp_path: Path, server: ssh_server.Server
) -> None:
    job = _job(place, tmp_path / "run", server)

    def work() -> None:
        deadline = time.monotonic() + 120
        while not list(server.home.rglob("job.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        server.cut()
        time.sleep(22)  # a shorter one the connection survives by itself
        server.restore()

    thread = threading.Thread(target=work)
    thread.start()
    _, err = job.communicate(timeout=300)
    thread.join()
    assert job.returncode == 0, err
    assert "trying again" in err
    assert len([c for c in report_of(tmp_path / "run")["candidates"] if c["measured"]]) == 2
    assert _copied(server) == []


def test_a_device_that_cannot_be_the_target(place: Path, tmp_path: Path, server: ssh_server.Server) -> None:
    job = _job(place, tmp_path / "run", server, arch="riscv64")
    _, err = job.communicate(timeout=100)
    assert job.returncode == 6
    assert "the target is riscv64" in err
    assert _copied(server) == []


def test_energy_of_a_sustained_run() -> None:
    run = {"tps": [20.0], "seconds": 60.0, "joules": 480.0, "meter": "RAPL", "tokens": 1200}
    assert device_loop.energy(run) == (0.4, "RAPL")
    assert device_loop.energy(None) == (None, None)
    # no meter, a counter that went backwards, nothing generated
    for lie in ({"joules": None, "meter": None}, {"joules": -3.0}, {"joules": 0.0}, {"tokens": 0}):
        assert device_loop.energy({**run, **lie}) == (None, None)


def test_hold(tmp_path: Path) -> None:
    """A file that needs more than the limit is killed, one that does not is not; both for real."""
    shape = {"hidden": 512, "head_dim": 64, "kv_dim": 256, "ffn": 1024, "layers": 16, "vocab": 4096}
    flags = LaunchFlags(context_tokens=256, ubatch=64, kv_type="f16", mmap=False)
    with (
        rundir.RunDir(tmp_path / "run") as run,
        calibrating.open_session("local", name="test-hold") as session,
    ):
        device = device_loop.DeviceBench(run=run, session=session, backend="cpu", local=True, sustained_s=0.0)
        path, _ = session.probe("a.gguf", {**shape, "type": "F16"})
        size = read_header(Path(path)).file_bytes
        sha256 = rundir.sha256_file(Path(path))

        def hold(limit: float) -> str | None:
            return device_loop.hold(
                device, Path(path), sha256=sha256, flags=flags, limit_bytes=limit, threads=1
            )

        assert hold(3 * size) is None
        killed = hold(0.4 * size)
        assert killed is not None and killed.startswith("under a hard limit of its budget")
        # what was killed is tried again in the next run, what was held is known
        kinds = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert sum(k["event"] == "done" for k in kinds) == 1
        assert hold(3 * size) is None
