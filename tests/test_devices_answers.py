"""A board that lies, babbles or is broken: an error of the device, never a traceback or a hang."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.devices import _answers, _session
from edgeprune.devices.base import Transport
from edgeprune.errors import DeviceError, EdgepruneError

ENVIRONMENT: dict[str, Any] = {
    "governor": None,
    "clocks_hz": {"policy0": 1_000_000},
    "temperatures_c": {"thermal_zone0 cpu": 41.5},
    "throttled": None,
    "power_mode": None,
    "thermal_throttle_count": "3",
    "load_average": 0.1,
    "on_battery": None,
    "busy_s": 12.5,
    "boot_id": "b",
}
GOOD: dict[str, Any] = {
    "facts": {
        "board": None,
        "cpu": "Cortex-A76",
        "arch": "aarch64",
        "flags": ["neon"],
        "threads": 4,
        "memory_bytes": 8 << 30,
        "available_bytes": None,
        "disk_free_bytes": 1 << 34,
        "cache_bytes": 0,
        "boot_id": "b",
        "power_mode": None,
        "llama_cpp": "0.3.36",
        "llama_bench": None,
    },
    "environment": ENVIRONMENT,
    "digest": {"bytes": 0, "sha256": "e3b0"},
    "probe": {"bytes": 100, "read": {"F16": 96}},
    "measure": {
        "engine": "llama-bench",
        "depth": 0,
        "engine_version": "b1",
        "threads": 4,
        "sweep": {"4": 20.5},
        "prefill_ns": [10, 11],
        "decode_ns": [20, 21],
        "first_token_ns": [],
        "sustained": {"tps": [20.0], "seconds": 1.0, "joules": None, "meter": None, "tokens": 8},
        "load_ns": 0,
        "before_bytes": 0,
        "peak_bytes": 1000,
        "available_drop_bytes": None,
        "tokens_filled": 128,
        "n_batch": 0,
        "model_type": "llama 1B",
        "model_bytes": 10,
        "model_params": 10,
        "build_commit": "unknown",
        "elapsed_s": 1.5,
        "own_s": 1.0,
        "before": ENVIRONMENT,
        "after": ENVIRONMENT,
    },
}


@pytest.mark.parametrize("job", GOOD)
def test_good_answers_pass_unchanged(job: str) -> None:
    assert _answers.checked(job, GOOD[job], "board") is GOOD[job]
    assert GOOD.keys() == _answers.FORMS.keys()
    assert GOOD[job].keys() == _answers.FORMS[job].keys()


@pytest.mark.parametrize(
    ("job", "field", "value"),
    [
        ("facts", "cpu", None),
        ("facts", "arch", 64),
        ("facts", "threads", 0),
        ("facts", "threads", 10**9),
        ("facts", "disk_free_bytes", "plenty"),
        ("facts", "llama_bench", ["sh", "-c", "true"]),
        ("digest", "bytes", -1),
        ("probe", "read", {"F16": 1.5}),
        ("measure", "decode_ns", []),
        ("measure", "decode_ns", [0]),
        ("measure", "decode_ns", [float("nan")]),
        ("measure", "prefill_ns", ["1"]),
        ("measure", "prefill_ns", [1] * 100_001),
        ("measure", "peak_bytes", True),
        ("measure", "peak_bytes", 2**70),
        ("measure", "engine", "x" * 5000),
        ("measure", "sustained", {"tps": [float("inf")]}),
        ("measure", "before", {}),
        ("environment", "load_average", float("nan")),
        ("environment", "temperatures_c", {"zone": "hot"}),
    ],
)
def test_a_field_that_cannot_be_used_is_named(job: str, field: str, value: Any) -> None:
    with pytest.raises(
        DeviceError, match=f"board: '{field}' in its answer to '{job}' cannot be used"
    ) as seen:
        _answers.checked(job, {**GOOD[job], field: value}, "board")
    assert (seen.value.kind, seen.value.exit_code) == ("answer", 6)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(job=st.sampled_from(sorted(GOOD)), field=st.text(), value=ANY)
def test_any_answer_is_taken_or_refused(job: str, field: str, value: Any) -> None:
    for answer in (value, {**GOOD[job], field: value}, {**GOOD[job], sorted(GOOD[job])[0]: value}):
        try:
            _answers.checked(job, answer, "board")
        except DeviceError as error:
            assert error.kind == "answer"


def board(folder: Path, serve: str) -> Transport:
    """A board whose Python is a script of ours: `serve` is what its agent does."""
    script = folder / "agent.py"
    script.write_text("import sys, time, json\nwrite = sys.stdout.write\n" + serve)

    def argv(line: str) -> list[str]:
        if "mkdir -p" in line:
            return ["/bin/sh", "-c", f"cat > /dev/null; echo EDGEPRUNE {shlex.quote(str(folder))}"]
        if "rmdir" in line:
            return ["/bin/true"]
        return [sys.executable, str(script)]

    return Transport(address="board", argv=argv, explain=lambda code, words: ("remote", words or "?", None))


def ask(transport: Transport) -> Any:
    with _session.Session(transport, name="test", waits_s=(), silence_s=5.0) as session:
        return session.facts


@pytest.mark.parametrize(
    ("serve", "kind", "said"),
    [
        ("write('EDGEPRUNE 5\\n')", "lost", "connection was lost"),
        ("write('EDGEPRUNE [\"ok\"]\\n')", "lost", "connection was lost"),
        ("write('EDGEPRUNE ' + '[' * 100000 + '\\n')", "lost", "connection was lost"),
        ("write('EDGEPRUNE {\"ok\": 5}\\n')", "answer", "is no table"),
        ("write('EDGEPRUNE {\"ok\": {}}\\n')", "answer", "'cpu' in its answer"),
        ('write(\'EDGEPRUNE {"error": [1], "kind": {}}\\n\')', "{}", r"board: \[1\]"),
        ("write('EDGEPRUNE {\"error\": \"%s\"}\\n' % ('x' * 100000))", "None", "board: x{500}$"),
        ("sys.stdout.buffer.write(b'\\xff' * 1000000)", "lost", "connection was lost"),
        ("sys.exit(3)", "lost", "connection was lost"),
    ],
)
def test_a_lying_board_is_an_error(tmp_path: Path, serve: str, kind: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said) as seen:
        ask(board(tmp_path, serve))
    assert seen.value.kind == kind


def test_good_facts_over_the_same_way(tmp_path: Path) -> None:
    line = "EDGEPRUNE " + json.dumps({"ok": GOOD["facts"]})
    assert ask(board(tmp_path, f"write({line!r} + chr(10))")) == GOOD["facts"]


def test_a_board_that_never_stops_talking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats without end and without an answer, and a line without end, each within bounded memory."""
    monkeypatch.setattr(_session, "_PATIENCE_S", 3.0)
    monkeypatch.setattr(_session, "_MOST_LINE", 1 << 16)
    for serve in ("while True: write('EDGEPRUNE {\"beat\": 1}\\n')", "while True: write('x' * 65536)"):
        with pytest.raises(DeviceError, match="no answer within 3 s") as seen:
            ask(board(tmp_path, serve))
        assert seen.value.kind == "hung"


def test_a_short_command_that_never_stops_talking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_session, "_MOST_OUTPUT", 1 << 12)
    process = subprocess.Popen(
        [sys.executable, "-c", "while True: print('x' * 100)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            _session._exchange(process, b"", 2.0)
    finally:
        process.kill()
        process.wait()


def plain_session(code: str) -> _session.Session:
    """A session whose every program over there is this one."""
    transport = Transport(
        address="board",
        argv=lambda line: [sys.executable, "-c", code],
        explain=lambda number, words: ("remote", words or "?", None),
    )
    made = _session.Session(transport, name="test", waits_s=())
    made._folder = "/there"
    return made


def test_stderr_without_an_end_is_not_kept() -> None:
    """20 MB of it and then a reason: the last words count, and no more than them is held."""
    code = "import sys; [sys.stderr.write('x' * 1000000) for _ in range(20)]; sys.exit('\\nno disk there')"
    session = plain_session(code)
    with pytest.raises(DeviceError) as seen:
        session._shell("true", b"", timeout_s=60)
    assert seen.value.message.endswith(" | no disk there") and len(seen.value.message) < 5000
    with pytest.raises(DeviceError, match="does not answer"):
        plain_session("import sys\nwhile True: sys.stderr.write('x' * 1000)")._shell("true", b"", timeout_s=2)


def test_a_board_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds is written to it, and it never reads."""
    monkeypatch.setattr(_session, "_STILL_S", 1.0)
    session = plain_session("import time; time.sleep(600)")
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1 << 20))
    began = time.monotonic()
    with pytest.raises(DeviceError, match="board: the copy stands still") as seen:
        session._pour(path, "/there/model.part", 0)
    assert seen.value.kind == "lost"
    with pytest.raises(DeviceError, match="does not answer"):
        session._shell("cat", bytes(1 << 20), timeout_s=1)
    assert time.monotonic() - began < 60


def test_words_of_a_board_are_never_run(tmp_path: Path) -> None:
    """A folder and a program name with shell in them stay words."""
    evil = tmp_path / "x; touch pwned; $(touch pwned)"
    evil.mkdir()
    with pytest.raises(EdgepruneError):
        ask(board(evil, "write('EDGEPRUNE {\"ok\": {}}\\n')"))
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
