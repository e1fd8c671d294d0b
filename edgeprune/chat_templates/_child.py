"""The process that renders one chat template: it limits itself first, then runs the stranger's program.

Reads JSON lines from stdin, first the template, then what is asked of it, and answers each on stdout.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

NOW = "now"  # as `dates`: what strftime_now says is the real date


class TooLong(Exception):
    """More was rendered than may be."""


class _Generation(Extension):
    """{% generation %} marks what the model says for those who train on it; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """A namespace without names that Python itself uses: they are a way out of the sandbox."""

    def __init__(*args: Any, **given: Any) -> None:
        self, *rest = args
        Namespace.__init__(self, _plain_names(dict(*rest, **given)))

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_names({name: value})
        Namespace.__setitem__(self, name, value)


def _plain_names(given: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in given:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace may not have the name {name!r}")
    return given


class _Dict:
    """`dict(...)` of a template, without the class itself."""

    def __call__(self, *args: Any, **given: Any) -> dict[Any, Any]:
        return dict(*args, **given)


def _refuse(message: str = "") -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **more: Any) -> str:
    kept = {k: more[k] for k in ("separators", "sort_keys") if k in more}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kept)


def environment(dates: str | None = None) -> jinja2.Environment:
    """What transformers gives to a chat template; `strftime_now` only with `dates`."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_refuse, dict=_Dict(), namespace=_PlainNamespace)
    if dates is not None:
        made.globals["strftime_now"] = lambda form: (
            datetime.datetime.now().strftime(form) if dates == NOW else dates
        )
    return made


class Template:
    """A chat template, compiled when it is first asked for something."""

    def __init__(self, source: str, names: Mapping[str, str], dates: str | None) -> None:
        self._source, self._names = source, names
        self._environment = environment(dates)
        self._made: jinja2.Template | None = None

    def render(self, messages: Sequence[Mapping[str, str]], *, go_on: bool, most: int) -> str:
        """One conversation. Raises TooLong beyond `most` characters, and whatever the template raises."""
        if self._made is None:
            self._made = self._environment.from_string(self._source)
        given = {**self._names, "messages": [dict(m) for m in messages], "add_generation_prompt": go_on}
        out, n = [], 0
        for piece in self._made.generate({**given, "tools": None, "documents": None}):
            n += len(piece)
            if n > most:
                raise TooLong
            out.append(piece)
        return "".join(out)

    def literals(self) -> list[str]:
        """Texts and strings that are written in the template."""
        texts: list[str] = []
        for _, kind, value in self._environment.lex(self._source):
            if kind == "data":
                texts.append(value)
            elif kind == "string":
                texts.append(value[1:-1].replace("\\n", "\n").replace("\\t", "\t"))
        return texts


def answer(template: Template, asked: Mapping[str, Any]) -> dict[str, Any]:
    """{"ok": …} or {"error": kind, "says": …} to one question; never raises what a template raises."""
    try:
        if asked["what"] == "literals":
            return {"ok": template.literals()}
        return {"ok": template.render(asked["messages"], go_on=asked["go_on"], most=asked["most"])}
    except TooLong:
        return {"error": "long"}
    except MemoryError:
        return {"error": "memory"}
    except jinja2.TemplateError as error:
        return {"error": "refused", "says": str(error)[:300]}
    except Exception as error:  # a template is a program: it may raise anything
        return {"error": "failed", "says": f"{type(error).__name__}: {error}"[:300]}


class _Time:
    """Processor time for the next question; past it the kernel ends this process with SIGXCPU."""

    def __init__(self, one_s: float, each_s: float) -> None:
        self._one, self._each, self._began, self._asked = one_s, each_s, time.process_time(), 0

    def allow(self) -> None:
        self._asked += 1
        whole = self._began + self._one + self._each * self._asked
        most = math.ceil(min(time.process_time() + self._one, whole))
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (most if hard < 0 else min(most, hard), hard))


def _limit_memory(n_bytes: int) -> None:
    """This much more than now, where the system tells what is now."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + n_bytes, hard))


def main() -> None:
    first = json.loads(sys.stdin.buffer.readline())
    _limit_memory(first["memory"])
    limit = _Time(first["one_s"], first["each_s"])
    template = Template(first["template"], first["names"], first["dates"])
    for line in sys.stdin.buffer:
        limit.allow()
        try:
            said = json.dumps(answer(template, json.loads(line))).encode("ascii")
        except MemoryError:
            said = b'{"error": "memory"}'
        sys.stdout.buffer.write(said + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
