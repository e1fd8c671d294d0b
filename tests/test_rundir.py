from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune import records
from edgeprune.errors import ConfigError
from edgeprune.records import Artifact
from edgeprune.rundir import RunDir, atomic_path, friendly_disk_errors, sha256_bytes, sha256_file, write_text


def artifact(key: str = "k1", n_bytes: int = 3) -> Artifact:
    return Artifact(
        path="artifacts/a.gguf",
        format="gguf",
        quantization="Q4_0",
        bytes=n_bytes,
        sha256="00",
        made_from="k0",
        key=key,
    )


class Counter:
    """Makes an artifact record and counts how often."""

    def __init__(self, record: Artifact) -> None:
        self.record = record
        self.calls = 0

    def __call__(self) -> Artifact:
        self.calls += 1
        return self.record


def events(run: RunDir) -> list[tuple[str, str]]:
    lines = (run.root / "log.jsonl").read_text().splitlines()
    return [(entry["event"], entry["stage"]) for entry in map(json.loads, lines)]


def test_atomic_write_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]
    write_text(target, "né\n")
    assert target.read_bytes() == "né\n".encode()


def test_the_temporary_is_hidden_and_beside(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x.bin") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".x.bin.") and temporary.name.endswith(".part")
        temporary.write_bytes(b"1")
        assert not (tmp_path / "x.bin").exists()
    assert (tmp_path / "x.bin").read_bytes() == b"1"


def test_hashes(tmp_path: Path) -> None:
    data = b"ab" * (1 << 20) + b"c"
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest() == sha256_bytes(data)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    make = Counter(artifact())
    with RunDir(tmp_path / "run") as run:
        assert run.stage(Artifact, "k1", make, name="export") == artifact()
        assert run.stage(Artifact, "k1", make, name="export") == artifact()
        assert make.calls == 1
        assert events(run) == [("start", "export"), ("done", "export"), ("skip", "export")]
    with RunDir(tmp_path / "run") as run:
        assert run.find(Artifact, "k1") == artifact()
        assert run.find(Artifact, "k2") is None
        run.stage(Artifact, "k1", make, name="export")
    assert make.calls == 1


def test_another_key_runs(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.stage(Artifact, "k1", Counter(artifact("k1")), name="export")
        second = Counter(artifact("k2"))
        run.stage(Artifact, "k2", second, name="export")
        assert second.calls == 1
        assert sorted(p.name for p in (tmp_path / "records").iterdir()) == [
            "artifact-k1.json",
            "artifact-k2.json",
        ]


def test_one_kind_from_two_stages(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.stage(Artifact, "k1", Counter(artifact(n_bytes=1)), name="surgery", kind="pruned")
        run.stage(Artifact, "k1", Counter(artifact(n_bytes=2)), name="export")
        assert run.find(Artifact, "k1", kind="pruned") == artifact(n_bytes=1)
        assert run.find(Artifact, "k1") == artifact(n_bytes=2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"schema": 1', '"schema": 99'),
        lambda text: text.replace('"bytes": 3', '"bytes": "3"'),
        lambda text: text.replace('"kind": "artifact"', '"kind": "budget"'),
    ],
    ids=["empty", "cut", "schema", "type", "kind"],
)
def test_a_damaged_record_is_made_again(tmp_path: Path, damage: Callable[[str], str]) -> None:
    make = Counter(artifact())
    with RunDir(tmp_path) as run:
        run.stage(Artifact, "k1", make, name="export")
        path = run.record_path("artifact", "k1")
        text = path.read_text()
        assert damage(text) != text
        path.write_text(damage(text))
        assert run.find(Artifact, "k1") is None
        assert run.stage(Artifact, "k1", make, name="export") == artifact()
        assert make.calls == 2
        assert path.read_text() == text


def test_a_record_whose_file_is_gone_is_made_again(tmp_path: Path) -> None:
    make = Counter(artifact())
    with RunDir(tmp_path) as run:
        file = tmp_path / "artifacts" / "a.gguf"
        file.write_bytes(b"abc")

        def valid(record: Artifact) -> bool:
            return run.file_ok(record.path, record.bytes)

        run.stage(Artifact, "k1", make, name="export", valid=valid)
        run.stage(Artifact, "k1", make, name="export", valid=valid)
        assert make.calls == 1
        file.write_bytes(b"ab")
        run.stage(Artifact, "k1", make, name="export", valid=valid)
        assert make.calls == 2
        file.unlink()
        run.stage(Artifact, "k1", make, name="export", valid=valid)
        assert make.calls == 3


def test_a_stage_that_fails_leaves_no_record(tmp_path: Path) -> None:
    def fail() -> Artifact:
        raise ValueError("no")

    with RunDir(tmp_path) as run:
        with pytest.raises(ValueError, match="no"):
            run.stage(Artifact, "k1", fail, name="export")
        assert run.find(Artifact, "k1") is None
        assert events(run) == [("start", "export")]


def test_a_stage_must_make_its_own_key(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run, pytest.raises(AssertionError, match="made key other, expected k1"):
        run.stage(Artifact, "k1", Counter(artifact("other")), name="export")


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run"):
        with pytest.raises(ConfigError) as caught, RunDir(tmp_path / "run"):
            pass
        assert caught.value.message == f"another edgeprune run is using {tmp_path / 'run'}"
        assert "--out" in str(caught.value.hint)
    with RunDir(tmp_path / "run") as again:
        assert again.root.is_dir()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from edgeprune.rundir import RunDir, atomic_path\n"
        f"run = RunDir(Path({str(tmp_path)!r})).__enter__()\n"
        "with atomic_path(run.root / 'artifacts' / 'big.gguf') as t:\n"
        "    t.write_bytes(b'x' * 1000)\n"
        "    (run.root / 'arrays' / '.folder.1.part').mkdir()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -9
    assert len(list(tmp_path.rglob(".*.part"))) == 2
    with RunDir(tmp_path) as run:
        assert list(run.root.rglob(".*.part")) == []
        assert not (run.root / "artifacts" / "big.gguf").exists()


@pytest.mark.parametrize("relative", ["../out.txt", "/etc/passwd", "artifacts/../../x", "link/x"])
def test_paths_stay_inside(tmp_path: Path, relative: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    with RunDir(tmp_path / "run") as run:
        (run.root / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="leaves the run folder"):
            run.path(relative)
        assert run.file_ok(relative, 0) is False


def test_paths_round_trip(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        full = run.path("artifacts/a.gguf")
        assert full == (tmp_path / "artifacts" / "a.gguf").resolve()
        assert run.relative(full) == "artifacts/a.gguf"


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught, RunDir(tmp_path / "file" / "run"):
        pass
    assert caught.value.message == f"cannot write {tmp_path / 'file' / 'run'}: Not a directory"
    assert caught.value.hint == "choose another folder with --out"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk that holds /runs"),
        (errno.EROFS, "cannot write /runs: Read-only file system"),
        (errno.EACCES, "cannot write /runs: Permission denied"),
    ],
)
def test_disk_errors_say_what_to_do(number: int, message: str) -> None:
    import os

    with pytest.raises(ConfigError) as caught, friendly_disk_errors(Path("/runs")):
        raise OSError(number, os.strerror(number))
    assert caught.value.message == message
    assert caught.value.hint


def test_a_limit_on_file_sizes_is_one_line(tmp_path: Path) -> None:
    """As a quota: numpy tells of a short write without an error number, the system with its own."""
    for error in (
        OSError(errno.EFBIG, "File too large"),
        OSError("102400 requested and 99563 written"),
        ValueError("I/O error: File too large (os error 27)"),
    ):
        with pytest.raises(ConfigError) as caught, friendly_disk_errors(tmp_path):
            raise error
        assert caught.value.message.startswith(f"a file in {tmp_path} cannot grow: ")
        assert "ulimit -f" in str(caught.value.hint)
    with pytest.raises(OSError, match="pipe"), friendly_disk_errors(tmp_path):
        raise OSError("the pipe has gone")


@pytest.mark.parametrize("schema", [records.SCHEMA - 1, records.SCHEMA + 1])
def test_records_of_another_schema_are_refused(tmp_path: Path, schema: int) -> None:
    folder = tmp_path / "run"
    with RunDir(folder) as run:
        run.write(artifact())
        run.write(artifact("k2"))
    path = folder / "records" / "artifact-k2.json"
    path.write_text(path.read_text().replace(f'"schema": {records.SCHEMA}', f'"schema": {schema}'))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for _ in range(2):  # the lock is given back each time
        with pytest.raises(ConfigError) as caught, RunDir(folder):
            pass
        assert caught.value.message == (
            f"{folder} was written by another version of edgeprune (schema {schema}, this one has 1)"
        )
        assert caught.value.hint == "choose another folder with --out, or delete this one"
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    path.unlink()
    with RunDir(folder) as run:
        assert run.find(Artifact, "k1") == artifact()


def test_other_os_errors_pass_through() -> None:
    with pytest.raises(OSError, match="gone"), friendly_disk_errors(Path("/runs")):
        raise OSError(errno.ENOENT, "gone")


def test_a_full_disk_while_a_stage_works(tmp_path: Path) -> None:
    def fail() -> Artifact:
        with atomic_path(tmp_path / "artifacts" / "a.gguf") as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with RunDir(tmp_path) as run:
        with pytest.raises(ConfigError, match="no space left"):
            run.stage(Artifact, "k1", fail, name="export")
        assert list((tmp_path / "artifacts").iterdir()) == []
        assert run.find(Artifact, "k1") is None


def test_a_library_that_names_the_full_disk_only_in_its_text() -> None:
    from safetensors import SafetensorError

    with pytest.raises(ConfigError) as caught, friendly_disk_errors(Path("/runs")):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert caught.value.message == "no space left on the disk that holds /runs"
    with pytest.raises(SafetensorError), friendly_disk_errors(Path("/runs")):
        raise SafetensorError("InvalidHeaderLength")


@pytest.mark.parametrize("existed", [False, True])
def test_a_refused_command_leaves_no_new_folder(tmp_path: Path, existed: bool) -> None:
    root = tmp_path / "runs" / "deep" / "run"
    if existed:
        root.mkdir(parents=True)
    with pytest.raises(ConfigError), RunDir(root):
        raise ConfigError("no such model")
    assert root.exists() == (tmp_path / "runs").exists() == existed


def test_a_run_that_did_something_keeps_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), RunDir(tmp_path / "run") as run:
        run.stage(Artifact, "k1", lambda: artifact(), name="export")
        raise ConfigError("later")
    assert (tmp_path / "run" / "records" / "artifact-k1.json").is_file()


def test_records_on_disk_are_what_records_write(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.write(artifact())
        text = run.record_path("artifact", "k1").read_text()
    assert text == records.dumps(artifact())
    assert records.loads(Artifact, text) == artifact()
