"""The device loop: the agent, and copies and measurements over a real SSH server whose traffic is cut."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.devices import adb, local, ssh
from edgeprune.devices._session import AGENT, Session
from edgeprune.errors import ConfigError, DeviceError
from tests import ssh_server

SHAPE = {"hidden": 256, "head_dim": 64, "kv_dim": 128, "ffn": 512, "layers": 2, "vocab": 512, "type": "Q8_0"}
FLAGS = {"context_tokens": 128, "ubatch": 32, "kv_type": "f16", "mmap": False, "flash_attention": True}
JOB = {"n_prompt": 8, "n_gen": 8, "repeats": 2, "threads": 1, "sweep": [], "flags": FLAGS}


@pytest.fixture(scope="module")
def server() -> Iterator[ssh_server.Server]:
    reason = ssh_server.missing()
    if reason is not None:
        pytest.skip(reason)
    with ssh_server.running() as started:
        yield started


def _open(server: ssh_server.Server, said: list[str] | None = None, **over: Any) -> Session:
    way = ssh.transport(server.address, config=server.config, connect_s=2, alive_s=1)
    words = said if said is not None else []
    given = {"name": "test", "python": sys.executable, "waits_s": (0.5, 1.0, 2.0, 4.0), "silence_s": 4.0}
    return Session(way, say=words.append, **{**given, **over})


def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **over: Any) -> Session:
    monkeypatch.setenv("HOME", str(tmp_path))
    return Session(local.transport("local"), **{"name": "test", "python": sys.executable, **over})


def _file(folder: Path, n_bytes: int) -> tuple[Path, str]:
    path = folder / "model one.gguf"
    path.write_bytes(random.Random(1).randbytes(n_bytes))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def _left(home: Path) -> list[str]:
    return sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file())


# ---------------------------------------------------------------- the agent here


def test_agent_is_one_file_of_the_standard_library_for_python_3_8() -> None:
    import ast

    tree = ast.parse(AGENT.read_text(), feature_version=(3, 8))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - {"llama_cpp", "onnxruntime_genai"} <= sys.stdlib_module_names


def test_probe_files_are_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.costs.gguf_header import read_header
    from edgeprune.devices._agent import BLOCKS

    with _here(tmp_path, monkeypatch) as session:
        for kind in BLOCKS:
            path, made = session.probe(f"{kind}.gguf", {**SHAPE, "type": kind})
            header = read_header(Path(path))
            assert made["bytes"] == header.file_bytes
            found: dict[str, int] = {}
            for tensor in header.tensors:
                found[tensor.type.name] = found.get(tensor.type.name, 0) + tensor.n_bytes
            assert made["read"] == found
    assert _left(tmp_path) == []


def test_a_measurement_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    with _here(tmp_path, monkeypatch) as session:
        session.preflight()
        path, made = session.probe("a.gguf", SHAPE)
        found = session.measure({**JOB, "path": path, "fill": True, "sustained_s": 0.2}, timeout_s=60)
    assert found["threads"] == 1
    assert len(found["prefill_ns"]) == len(found["decode_ns"]) == len(found["first_token_ns"]) == 2
    assert min(found["decode_ns"]) > 0
    # the first token comes behind the prompt
    assert all(
        first > prompt for first, prompt in zip(found["first_token_ns"], found["prefill_ns"], strict=True)
    )
    assert found["sustained"]["tokens"] == 8 * len(found["sustained"]["tps"])
    assert found["tokens_filled"] == 128
    assert found["peak_bytes"] > made["bytes"] * 0.9
    assert found["before"]["boot_id"] == found["after"]["boot_id"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"spin": 60, "timeout": 1.0}, "hung", "did not finish within 1 s and was killed"),
        ({"path": "/nowhere.gguf"}, "load", "cannot load"),
    ],
)
def test_a_failed_measurement_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], kind: str, message: str
) -> None:
    pytest.importorskip("llama_cpp")
    timeout = change.pop("timeout", 30.0)
    with _here(tmp_path, monkeypatch) as session:
        path, _ = session.probe("a.gguf", SHAPE)
        began = time.monotonic()
        with pytest.raises(DeviceError, match=message) as caught:
            session.measure({**JOB, "path": path, **change}, timeout_s=timeout)
        assert caught.value.kind == kind
        assert time.monotonic() - began < 20
        # and the device still works
        assert session.measure({**JOB, "path": path}, timeout_s=60)["decode_ns"]
    assert _left(tmp_path) == []


def test_a_hard_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    shape = {**SHAPE, "hidden": 512, "ffn": 1024, "layers": 16, "vocab": 4096, "type": "F16"}
    with _here(tmp_path, monkeypatch) as session:
        path, made = session.probe("a.gguf", shape)
        job = {**JOB, "path": path, "fill": True, "repeats": 1}
        enough = session.measure({**job, "memory_limit_bytes": 3 * made["bytes"]}, timeout_s=60)
        assert enough["memory_limit"]["bytes"] == 3 * made["bytes"]
        for by, kinds in (("rlimit", {"killed", "crashed", "load"}), ("any", {"killed"})):
            if by == "any" and enough["memory_limit"]["by"] != "cgroup":
                continue  # without a control group the second way is the first
            with pytest.raises(DeviceError) as caught:
                session.measure(
                    {**job, "memory_limit_bytes": made["bytes"] // 2, "limit_by": by}, timeout_s=60
                )
            assert caught.value.kind in kinds


def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _here(tmp_path, monkeypatch) as session:
        other = "riscv64"
        for given, kind in (
            ({"arch": other}, "wrong-arch"),
            ({"disk_bytes": 1 << 60}, "no-space"),
        ):
            with pytest.raises(DeviceError) as caught:
                session.preflight(**given)  # type: ignore[arg-type]
            assert caught.value.kind == kind
        session.facts["power_mode"] = "MODE_15W"
        session.preflight(mode="15W")
        with pytest.raises(DeviceError, match="runs in power mode MODE_15W, 25W was asked for"):
            session.preflight(mode="25W")
        session.facts.update(llama_cpp=None, llama_bench=None)
        with pytest.raises(DeviceError, match="neither llama-cpp-python nor llama-bench"):
            session.preflight()


def test_no_python_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="has no 'python9'") as caught:
        _here(tmp_path, monkeypatch, python="python9").__enter__()
    assert caught.value.kind == "runtime"
    assert _left(tmp_path) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", str(tmp_path)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        with _here(tmp_path, monkeypatch) as session:
            (tmp_path / "filler").write_bytes(bytes(20 << 20))
            path = Path(f"/dev/shm/edgeprune-test-{os.getpid()}.gguf")
            try:
                path.write_bytes(random.Random(2).randbytes(80 << 20))
                # what preflight saw is out of date: the copy itself must say it
                session._need_space = lambda n: None  # type: ignore[method-assign,assignment]
                with pytest.raises(DeviceError, match="disk is full") as caught:
                    session.send(path, hashlib.sha256(path.read_bytes()).hexdigest())
                assert caught.value.kind == "no-space"
            finally:
                path.unlink()
        assert _left(tmp_path) == ["filler"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch /x",
        "ssh://host;reboot",
        "ssh://user@ho st",
        "ssh://-l@host",
        "ssh://user@host:0",
        "ssh://user@host:70000",
        "ssh://user:secret@host",
        "ssh://host/path",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="is not a device address"):
        ssh.transport(address)


def test_addresses() -> None:
    argv = list(ssh.transport("ssh://pi@board.local:2200").argv("true"))
    assert argv[-3:] == ["--", "board.local", "true"]
    assert argv[argv.index("-p") + 1] == "2200" and argv[argv.index("-l") + 1] == "pi"
    assert "StrictHostKeyChecking=yes" in argv and "BatchMode=yes" in argv
    assert list(ssh.transport("ssh://[fe80::1]").argv("true"))[-2] == "fe80::1"
    for bad in ("adb://", "adb://a b", "adb://-x"):
        with pytest.raises(ConfigError, match="is not a device address"):
            adb.transport(bad)


def test_a_folder_name_cannot_leave_its_place() -> None:
    for bad in ("../x", "a/b", "$(reboot)", "", "-rf", "a b"):
        with pytest.raises(ConfigError, match="cannot name a folder"):
            Session(local.transport("local"), name=bad)


# ---------------------------------------------------------------- over SSH


def test_over_ssh(server: ssh_server.Server, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path, sha256 = _file(tmp_path, 3 << 20)
    with _open(server) as session:
        assert session.facts["python"]
        there = session.send(path, sha256)
        assert Path(there).read_bytes() == path.read_bytes()
        assert session.send(path, sha256) == there  # nothing is copied twice
        probe, _ = session.probe("a.gguf", SHAPE)
        assert min(session.measure({**JOB, "path": probe}, timeout_s=60)["decode_ns"]) > 0
        assert _left(server.home)
    assert _left(server.home) == []


def test_keep_leaves_the_copy(server: ssh_server.Server, tmp_path: Path) -> None:
    path, sha256 = _file(tmp_path, 1 << 20)
    with _open(server, keep=True) as session:
        there = session.send(path, sha256)
    assert Path(there).is_file()
    with _open(server) as session:
        assert session.send(path, sha256) == there
    assert _left(server.home) == []


def test_a_strange_host_key_is_refused(server: ssh_server.Server, tmp_path: Path) -> None:
    known = server.config.parent / "known_hosts"
    good = known.read_text()
    stranger = (server.config.parent / "stranger.pub").read_text().split()[:2]
    try:
        for text in ("", f"[{ssh_server.ADDRESS}]:{ssh_server.PORT} {' '.join(stranger)}\n"):
            known.write_text(text)
            with pytest.raises(DeviceError, match=r"host key .* is not known, or has changed") as caught:
                _open(server).__enter__()
            assert caught.value.kind == "host-key"
            assert caught.value.hint is not None and "ssh -p 2222 root@" in caught.value.hint
            assert known.read_text() == text  # nothing was trusted on the way
    finally:
        known.write_text(good)


def test_a_login_that_is_refused(server: ssh_server.Server) -> None:
    text = server.config.read_text()
    try:
        server.config.write_text(text.replace("/user\n", "/stranger\n"))
        with pytest.raises(DeviceError, match="refused the login") as caught:
            _open(server).__enter__()
        assert caught.value.kind == "refused"
    finally:
        server.config.write_text(text)


def test_nobody_there() -> None:
    way = ssh.transport("ssh://root@127.0.0.1:1", connect_s=2)
    with pytest.raises(DeviceError, match="cannot be reached") as caught:
        Session(way, name="test", waits_s=(0.1,)).__enter__()
    assert caught.value.kind == "lost"


def _cut_when(
    server: ssh_server.Server, ready: Callable[[], bool], *, for_s: float
) -> tuple[threading.Thread, list[float]]:
    """Cut the traffic as soon as `ready` says so, and restore it later."""
    cuts: list[float] = []

    def work() -> None:
        deadline = time.monotonic() + 20
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        server.cut()
        cuts.append(time.monotonic())
        time.sleep(for_s)
        server.restore()

    thread = threading.Thread(target=work)
    thread.start()
    return thread, cuts


def test_a_copy_that_is_cut_goes_on_where_it_was(server: ssh_server.Server, tmp_path: Path) -> None:
    path, sha256 = _file(tmp_path, 12 << 20)
    said: list[str] = []

    def part() -> int:
        return max((p.stat().st_size for p in server.home.rglob("*.part") if p.suffix == ".part"), default=0)

    with _open(server, said) as session:
        server.slow(40)  # 12 MiB take 2.5 s
        try:
            thread, cuts = _cut_when(server, lambda: part() > 3 << 20, for_s=5.0)
            there = session.send(path, sha256)
            thread.join()
        finally:
            server.fast()
        assert cuts, "the copy was over before it could be cut"
        assert hashlib.sha256(Path(there).read_bytes()).hexdigest() == sha256
    lost = [s for s in said if "trying again" in s]
    went_on = [s for s in said if "goes on at" in s]
    assert lost and went_on
    assert int(went_on[0].split("goes on at ")[1].rstrip("%")) >= 20
    assert _left(server.home) == []


def test_a_damaged_part_is_copied_again(server: ssh_server.Server, tmp_path: Path) -> None:
    path, sha256 = _file(tmp_path, 2 << 20)
    said: list[str] = []
    with _open(server, said) as session:
        part = Path(f"{session._folder}/{sha256[:16]}.gguf.part")
        part.write_bytes(b"x" * 1000)
        there = session.send(path, sha256)
        assert Path(there).read_bytes() == path.read_bytes()
        part.write_bytes(path.read_bytes()[: 1 << 20])
        Path(there).write_bytes(b"damaged")
        assert Path(session.send(path, sha256)).read_bytes() == path.read_bytes()
    assert [s for s in said if "goes on at" in s] == [f"{server.address}: model one.gguf goes on at 50%"]


def test_a_measurement_that_is_cut_starts_again(server: ssh_server.Server) -> None:
    pytest.importorskip("llama_cpp")
    said: list[str] = []

    def measuring() -> bool:
        return any(server.home.rglob("job.json"))

    with _open(server, said) as session:
        path, _ = session.probe("a.gguf", SHAPE)
        thread, cuts = _cut_when(server, measuring, for_s=6.0)
        found = session.measure({**JOB, "path": path, "sustained_s": 3.0}, timeout_s=60)
        thread.join()
    assert cuts and any("trying again" in s for s in said)
    assert len(found["decode_ns"]) == 2 and found["sustained"]["seconds"] >= 3.0
    assert _left(server.home) == []


def test_a_device_that_stays_away_is_given_up(server: ssh_server.Server, tmp_path: Path) -> None:
    path, sha256 = _file(tmp_path, 1 << 20)
    session = _open(server, waits_s=(0.1,)).__enter__()
    server.cut()
    try:
        with pytest.raises(DeviceError) as caught:
            session.send(path, sha256)
        assert caught.value.kind == "lost"
    finally:
        server.restore()
        session.close()
    # the next run finds it again, and tidies up
    with _open(server) as again:
        again.send(path, sha256)
    assert _left(server.home) == []


def test_the_engine_dies_with_the_connection(server: ssh_server.Server) -> None:
    with _open(server) as session:
        work = threading.Thread(target=lambda: _quietly(session, {**JOB, "path": "x", "spin": 50}))
        work.start()
        deadline = time.monotonic() + 15
        while not _engines() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _engines()
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-x", "ssh"], check=True)
        while _engines() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _engines() == []
        session._waits = ()
        work.join(30)


def _quietly(session: Session, job: dict[str, Any]) -> None:
    session._waits = ()
    try:
        session.measure(job, timeout_s=40)
    except DeviceError as error:
        assert error.kind == "lost"


def _engines() -> list[int]:
    out = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"engine" in words and any(b"edgeprune-device/test/agent.py" in w for w in words):
                out.append(int(entry.name))
    return out
