"""Work on a device that may vanish at any moment: the agent put there, files copied, jobs run, all removed.

Every step can be repeated: a copy goes on where it stopped and is checked by its sha256, a measurement
starts again from nothing, and only a complete answer counts. A connection that is lost is tried again a
few times; then the step fails with a DeviceError and whoever asked decides what that means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from edgeprune.devices._answers import checked
from edgeprune.devices.base import Transport
from edgeprune.errors import ConfigError, DeviceError

T = TypeVar("T")

AGENT = Path(__file__).with_name("_agent.py")
_MARK = "EDGEPRUNE "
_BEAT_S = 5.0
_CHUNK = 1 << 18
_MOST_LINE = 8 << 20  # bytes; a sustained run of an hour is a tenth of it
_MOST_LINES = 16  # waiting to be read
_MOST_OUTPUT = 1 << 20  # bytes of a short command
_MOST_WORDS = 4096  # bytes of stderr, the last ones
_STILL_S = 120.0  # a copy of which nothing is taken for so long is given up
_PATIENCE_S = 3600.0  # for the digest of a large file on a slow card
# kinds after which the same step may work again
_PASSING = ("lost", "damaged")
_ARCH = {"amd64": "x86_64", "arm64": "aarch64"}


class Session:
    """One device in use. A context manager: leaving it removes what was put there unless `keep`."""

    def __init__(
        self,
        transport: Transport,
        *,
        name: str,
        python: str = "python3",
        llama_bench: str | None = None,
        keep: bool = False,
        waits_s: tuple[float, ...] = (2.0, 5.0, 10.0),
        silence_s: float = 25.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`name` tells the folders of different runs on the same device apart; the same one resumes."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", name):
            raise ConfigError(f"'{name}' cannot name a folder on a device")
        self.transport = transport
        self.facts: dict[str, Any] = {}
        self._name, self._python, self._llama_bench = name, python, llama_bench
        self.keep = keep
        self._waits, self._silence, self._say = waits_s, silence_s, say
        self._folder: str | None = None
        self._reached = False

    def __enter__(self) -> Session:
        try:
            self._steady("connect", self._install)
        except BaseException:
            self.close()  # half a connection may have left a folder
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------ steps

    def preflight(self, *, arch: str | None = None, mode: str | None = None, disk_bytes: int = 0) -> None:
        """Refuse a device that cannot measure what is asked. Raises DeviceError with the kind."""
        facts = self.facts
        found = _ARCH.get(facts["arch"].lower(), facts["arch"].lower())
        if arch is not None and found != _ARCH.get(arch, arch):
            raise DeviceError(
                "wrong-arch",
                f"{self.transport.address} is {found}, the target is {arch}",
                "name the target that this device is, see 'edgeprune targets'",
            )
        if mode is not None and facts["power_mode"] and _mode(mode) != _mode(facts["power_mode"]):
            raise DeviceError(
                "power-mode",
                f"{self.transport.address} runs in power mode {facts['power_mode']}, {mode} was asked for",
                "switch it with nvpmodel, or name the mode it is in with --mode",
            )
        if not facts["llama_cpp"] and not facts["llama_bench"]:
            raise DeviceError(
                "runtime",
                f"{self.transport.address} has neither llama-cpp-python nor llama-bench",
                "install one there; --device-python names another Python, --llama-bench a program",
            )
        self._need_space(disk_bytes)

    def send(self, path: Path, sha256: str) -> str:
        """Copy a file and return its path on the device; goes on where an earlier try stopped."""
        return self._steady(f"copy {path.name}", lambda: self._send(path, sha256))

    def measure(self, job: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Run the agent's `measure`; the job's `path` is one that `send` or `probe` returned."""
        work = {**job, "job": "measure", "timeout_s": timeout_s}
        return self._steady("measure", lambda: self._ask(work))

    def probe(self, file: str, shape: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Have a random-weight model written there: (its path, bytes read per token by type)."""

        def step() -> tuple[str, dict[str, Any]]:
            path = f"{self._folder}/{_plain(file)}"
            return path, self._ask({"job": "probe", "path": path, "shape": shape})

        return self._steady("write a probe file", step)

    def environment(self) -> dict[str, Any]:
        return self._steady("read its state", lambda: self._ask({"job": "environment"}))

    def remove(self, path: str) -> None:
        """Delete one file of the work folder."""
        assert self._folder is not None and path.startswith(self._folder + "/")
        self._steady("remove a file", lambda: self._ask({"job": "remove", "path": path}))

    def close(self) -> None:
        """Remove the work folder, once; a device that is gone keeps it until the next run there ends."""
        if not self._reached or self.keep:
            return
        self._reached = False
        # the parent goes too when no other run is using it
        line = (
            f'd="$HOME/.cache/edgeprune-device/{self._name}"; rm -rf -- "$d"; '
            'rmdir "$HOME/.cache/edgeprune-device" 2>/dev/null; true'
        )
        try:
            self._shell(line, b"", timeout_s=30)
        except DeviceError as error:
            self._say(f"{self.transport.address}: the work folder could not be removed: {error}")

    # ------------------------------------------------ the way there

    def _steady(self, what: str, step: Callable[[], T]) -> T:
        """Do a step, again after a lost connection; a new connection gets the agent again."""
        for wait in (*self._waits, None):
            try:
                if self._folder is None and what != "connect":
                    self._install()
                return step()
            except DeviceError as error:
                if error.kind not in _PASSING or wait is None:
                    raise
                self._say(f"{self.transport.address}: {what}: {error}; trying again in {wait:g} s")
                self._folder = None
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _install(self) -> None:
        """Put the agent there and ask for the device's facts."""
        agent = AGENT.read_bytes()
        line = (
            f'umask 077; d="$HOME/.cache/edgeprune-device/{self._name}"; mkdir -p "$d" '
            f'&& cat > "$d/agent.part" && test "$(wc -c < "$d/agent.part")" -eq {len(agent)} '
            '&& mv -f "$d/agent.part" "$d/agent.py" && cd "$d" && echo "EDGEPRUNE $(pwd -P)"'
        )
        self._reached = True
        out = self._shell(line, agent, timeout_s=60)
        found = [x[len(_MARK) :] for x in out.splitlines() if x.startswith(_MARK + "/")]
        if not found:
            raise DeviceError("remote", f"{self.transport.address}: no usable shell there: {out[-200:]!r}")
        self._folder = found[-1]
        earlier = self.facts.get("boot_id")
        self.facts = self._ask({"job": "facts"})
        if earlier and earlier != self.facts["boot_id"]:
            self._say(f"{self.transport.address}: it was restarted in between")

    def _shell(self, line: str, stdin: bytes, *, timeout_s: float) -> str:
        process = subprocess.Popen(
            list(self.transport.argv("LC_ALL=C; export LC_ALL; " + line)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        errors = _Words(process)
        try:
            out = _exchange(process, stdin, timeout_s)
        except subprocess.TimeoutExpired:
            raise DeviceError("lost", f"{self.transport.address} does not answer") from None
        finally:
            _end(process)
        if process.returncode != 0:
            raise self._failure(process.returncode, errors.tail())
        return out.decode("utf-8", "replace")

    def _failure(self, code: int, words: str) -> DeviceError:
        if code == 127 or "command not found" in words:
            return DeviceError(
                "runtime",
                f"{self.transport.address} has no '{self._python}'",
                "name a Python 3.8 or newer there with --device-python",
            )
        if code == 28 or "No space left" in words:
            return DeviceError("no-space", f"{self.transport.address}: the disk is full", "free some space")
        kind, reason, hint = self.transport.explain(code, words)
        return DeviceError(kind, reason, hint)

    def _agent(self, *words: str) -> list[str]:
        assert self._folder is not None
        parts = [self._python, f"{self._folder}/agent.py", *words]
        return list(self.transport.argv("LC_ALL=C exec " + " ".join(shlex.quote(p) for p in parts)))

    def _ask(self, job: dict[str, Any]) -> Any:
        """One job, one answer. The link counts as lost when the agent's heartbeats stop."""
        job = {**job, "folder": self._folder}
        if self._llama_bench is not None:
            job["llama_bench"] = self._llama_bench
        elif self.facts.get("llama_bench"):
            job["llama_bench"] = self.facts["llama_bench"]
        process = subprocess.Popen(
            self._agent("serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        errors = _Words(process)
        try:
            patience = float(job.get("timeout_s", 0.0)) + _PATIENCE_S
            answer = self._converse(process, json.dumps(job).encode() + b"\n", patience)
        finally:
            _end(process)
        if answer is None:
            raise self._silent(process.returncode, errors.tail())
        if "error" in answer:
            raise DeviceError(f"{answer.get('kind')}", f"{self.transport.address}: {answer['error']!s:.500}")
        return checked(job["job"], answer["ok"], self.transport.address)

    def _silent(self, code: int | None, words: str) -> DeviceError:
        """Why an agent went without an answer; a signal from outside is no answer either."""
        if code in (0, None) or (code is not None and code < 0):
            return DeviceError("lost", f"{self.transport.address}: the connection was lost")
        found = self._failure(code, words)
        if found.kind == "remote" and self.transport.address != "local" and not words:
            return DeviceError("lost", f"{self.transport.address}: the connection was lost")
        return found

    def _converse(
        self, process: subprocess.Popen[bytes], first: bytes, patience_s: float = _PATIENCE_S
    ) -> dict[str, Any] | None:
        # both ends of the queue are bounded: a board that never stops talking fills no memory
        lines: queue.Queue[bytes | None] = queue.Queue(_MOST_LINES)
        over = threading.Event()

        def put(line: bytes | None) -> None:
            while not over.is_set():
                with contextlib.suppress(queue.Full):
                    return lines.put(line, timeout=1.0)

        def listen() -> None:
            assert process.stdout is not None
            with contextlib.suppress(OSError, ValueError):  # closed from our side
                while not over.is_set() and (line := process.stdout.readline(_MOST_LINE)):
                    put(line)
            put(None)

        threading.Thread(target=listen, daemon=True).start()
        try:
            return self._listen(process, lines, first, patience_s)
        finally:
            over.set()

    def _listen(
        self,
        process: subprocess.Popen[bytes],
        lines: queue.Queue[bytes | None],
        first: bytes,
        patience_s: float,
    ) -> dict[str, Any] | None:
        assert process.stdin is not None
        message, beaten, heard = first, 0.0, time.monotonic()
        until = heard + patience_s
        while True:
            now = time.monotonic()
            if now > until:
                process.kill()
                raise DeviceError("hung", f"{self.transport.address}: no answer within {patience_s:.0f} s")
            if message or now - beaten > _BEAT_S:
                try:
                    process.stdin.write(message or b"\n")
                    process.stdin.flush()
                except OSError:
                    message = b""  # the reader below finds out what happened
                message, beaten = b"", now
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                if time.monotonic() - heard > self._silence:
                    process.kill()
                    return None
                continue
            if line is None:
                return None
            heard = time.monotonic()
            answer = answer_of(line)
            if answer is not None:
                return answer

    # ------------------------------------------------ copies

    def _need_space(self, n_bytes: int) -> None:
        free = self.facts["disk_free_bytes"]
        if n_bytes + (64 << 20) > free:
            raise DeviceError(
                "no-space",
                f"{self.transport.address} has {free / 1e6:.0f} MB left on its disk, "
                f"the file needs {n_bytes / 1e6:.0f} MB",
                "free some space there",
            )

    def _send(self, path: Path, sha256: str) -> str:
        final = f"{self._folder}/{sha256[:16]}{_plain(path.suffix)}"
        part = final + ".part"
        if self._ask({"job": "digest", "path": final})["sha256"] == sha256:
            return final
        size = path.stat().st_size
        there = self._ask({"job": "digest", "path": part})
        offset = int(there["bytes"])
        if offset > size or _prefix_sha256(path, offset) != there["sha256"]:
            offset = 0
        if offset:
            self._say(f"{self.transport.address}: {path.name} goes on at {offset / size:.0%}")
        self._need_space(size - offset)
        self._pour(path, part, offset)
        self._ask({"job": "finish", "part": part, "path": final, "sha256": sha256})
        return final

    def _pour(self, path: Path, part: str, offset: int) -> None:
        with path.open("rb") as source:
            source.seek(offset)
            process = subprocess.Popen(
                self._agent("receive", part, str(offset)),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            errors = _Words(process)
            assert process.stdin is not None
            try:
                with _Guard(process, _STILL_S) as guard:
                    with contextlib.suppress(OSError):  # the exit code says what happened
                        for chunk in iter(lambda: source.read(_CHUNK), b""):
                            process.stdin.write(chunk)
                            guard.moved()
                        process.stdin.close()
                    code = process.wait()
            finally:
                _end(process)
            if guard.ended:
                raise DeviceError("lost", f"{self.transport.address}: the copy stands still")
            if code != 0:
                if code < 0:
                    raise DeviceError("lost", f"{self.transport.address}: the connection was lost")
                raise self._failure(code, errors.tail())


class _Words:
    """The last words of a program on stderr, read as they come: endless talk fills nothing."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._source, self._kept = process.stderr, b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := self._source.read1(1 << 16):  # type: ignore[attr-defined]
                self._kept = (self._kept + data)[-_MOST_WORDS:]

    def tail(self) -> str:
        """The last two lines as one, of a program that has ended."""
        self._reader.join(timeout=2)  # something it left behind may hold the pipe
        lines = [x.strip() for x in self._kept.decode("utf-8", "replace").splitlines()]
        return " | ".join([x for x in lines if x and not x.startswith("Warning: Permanently added")][-2:])


class _Guard:
    """Ends a program that takes nothing for `patience_s`: writing to it would never come back."""

    def __init__(self, process: subprocess.Popen[bytes], patience_s: float) -> None:
        self._process, self._patience = process, patience_s
        self._moved, self._over = time.monotonic(), threading.Event()
        self.ended = False

    def __enter__(self) -> _Guard:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    def moved(self) -> None:
        self._moved = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._patience / 4)):
            if time.monotonic() - self._moved > self._patience and self._process.poll() is None:
                self.ended = True
                self._process.kill()
                return


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close our side; a program that stays is killed."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answer_of(line: bytes) -> dict[str, Any] | None:
    """The answer in one line of output; None for heartbeats, login messages and halves of lines."""
    text = line.decode("utf-8", "replace")
    if not text.startswith(_MARK) or not text.endswith("\n"):
        return None
    try:
        answer = json.loads(text[len(_MARK) :])
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and ("ok" in answer or "error" in answer) else None


def _exchange(process: subprocess.Popen[bytes], stdin: bytes, timeout_s: float) -> bytes:
    """Give it `stdin` and return its output; more than _MOST_OUTPUT is not waited for."""
    assert process.stdin is not None and process.stdout is not None
    held: list[bytes] = []
    source = process.stdout
    reader = threading.Thread(target=lambda: held.append(source.read(_MOST_OUTPUT)), daemon=True)
    reader.start()
    with _Guard(process, timeout_s) as guard:
        with contextlib.suppress(OSError):  # the exit code says what happened
            process.stdin.write(stdin)
            process.stdin.close()
        process.wait()
    if guard.ended:
        raise subprocess.TimeoutExpired(process.args, timeout_s)
    reader.join(timeout=5)
    return held[0] if held else b""


def _plain(name: str) -> str:
    """A file name without anything a shell or a path could read otherwise."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("-")


def _mode(name: str) -> str:
    return name.upper().removeprefix("MODE_").replace(" ", "")


def _prefix_sha256(path: Path, n_bytes: int) -> str:
    sha = hashlib.sha256()
    for block in _blocks(path, n_bytes):
        sha.update(block)
    return sha.hexdigest()


def _blocks(path: Path, n_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as f:
        while n_bytes > 0:
            block = f.read(min(1 << 20, n_bytes))
            if not block:
                return
            n_bytes -= len(block)
            yield block
