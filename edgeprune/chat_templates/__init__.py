"""Chat templates of models: programs of strangers, rendered in jinja2's sandbox in a process of their own.

The sandbox bounds what a template can reach, the process bounds its processor time, memory and output.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import ConfigError, StageError

MOST_CHARS = 1 << 20  # of a template
MOST_TEXT = 1 << 20  # characters of what one gives, beside EACH for every character of the conversation
EACH = 8
ONE_S = 5.0  # of processor time, compiling and rendering; a usual template takes milliseconds
EACH_S = 0.05  # more per conversation, so that a long list of them has an end too
MEMORY_BYTES = 512 << 20  # more than the process has to begin with
PATIENCE_S = 600.0  # of the clock; a last resort, as a busy or sleeping machine is no fault of a template
_HINT = "the template is broken or made to do harm: use another copy of the model, or remove its template"


class TemplateFailed(Exception):
    """A template raised something."""


class TemplateRefused(TemplateFailed):
    """A template refused the conversation, or is none."""


class Renderer:
    """One chat template in its process; a context manager, the process starts with the first question.

    `name` says whose template it is in errors. `names` are the variables beside the messages, `dates` what
    strftime_now says ("now": the real date; None: there is no such function).
    """

    def __init__(
        self, template: str, *, name: str, names: Mapping[str, str] | None = None, dates: str | None = None
    ) -> None:
        self._about = f"the chat template of {name}"
        if len(template) > MOST_CHARS:
            raise ConfigError(f"{self._about} has {len(template)} characters; at most {MOST_CHARS}", _HINT)
        limits = {"memory": MEMORY_BYTES, "one_s": ONE_S, "each_s": EACH_S}
        self._first = {"template": template, "names": dict(names or {}), "dates": dates, **limits}
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process, self._process, self._rest = self._process, None, b""
        if process is not None:
            process.kill()
            process.communicate()

    def render(self, messages: Sequence[Mapping[str, str]], *, go_on: bool) -> str:
        """One conversation as text; with `go_on` up to where the model's answer begins.

        Raises TemplateRefused or TemplateFailed for what the template raises, ConfigError past a limit.
        """
        plain = [dict(message) for message in messages]
        most = MOST_TEXT + EACH * sum(len(value) for message in plain for value in message.values())
        return str(self._ask({"what": "render", "messages": plain, "go_on": go_on, "most": most}, most))

    def literals(self) -> list[str]:
        """Texts and strings written in the template. Raises as `render`."""
        return list(self._ask({"what": "literals"}, 8 * MOST_CHARS))

    def _ask(self, question: Mapping[str, Any], most: int) -> Any:
        try:
            said = self._exchange(question, 12 * most + 4096)
        except BaseException:
            self.close()
            raise
        return result(said, self._about)

    def _exchange(self, question: Mapping[str, Any], most_bytes: int) -> dict[str, Any]:
        process = self._process
        questions = [question]
        if process is None:
            process = self._process = self._start()
            questions.insert(0, self._first)
        assert process.stdin is not None
        try:
            for one in questions:
                process.stdin.write(json.dumps(one).encode("ascii") + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(process) from None
        return dict(json.loads(self._line(process, most_bytes)))

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "edgeprune.chat_templates._child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parents[2],  # found even when edgeprune is not installed
            )
        except OSError as error:
            raise StageError(f"{self._about} cannot be rendered: {error.strerror or error}") from None

    def _line(self, process: subprocess.Popen[bytes], most_bytes: int) -> bytes:
        assert process.stdout is not None
        end = time.monotonic() + PATIENCE_S
        parts, n = [self._rest], len(self._rest)
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in parts[-1]:
                if not ready.select(max(0.0, end - time.monotonic())):
                    raise StageError(f"{self._about} was not rendered within {PATIENCE_S:g} s")
                parts.append(os.read(process.stdout.fileno(), 1 << 20))
                n += len(parts[-1])
                if not parts[-1]:
                    raise self._ended(process)
                if n > most_bytes:
                    raise StageError(f"{self._about} was rendered to more than was allowed")
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _ended(self, process: subprocess.Popen[bytes]) -> ConfigError | StageError:
        code = process.wait()
        if code == -signal.SIGXCPU:
            return ConfigError(
                f"{self._about} was stopped: rendering took more than {ONE_S:g} s of processor time", _HINT
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return StageError(f"the process that renders {self._about} ended ({how})")


def result(said: Mapping[str, Any], about: str) -> Any:
    """What the process answered, or the error it stands for."""
    if "ok" in said:
        return said["ok"]
    kind, says = said["error"], str(said.get("says", ""))
    if kind == "refused":
        raise TemplateRefused(says)
    if kind == "failed":
        raise TemplateFailed(says)
    much = (
        f"more than {MEMORY_BYTES >> 20} MiB of memory"
        if kind == "memory"
        else "more text than a conversation can be"
    )
    raise ConfigError(f"{about} was stopped: rendering took {much}", _HINT)
