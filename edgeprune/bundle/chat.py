"""A model's Jinja chat template as the Go template of an Ollama Modelfile.

The pieces around each message are read off by rendering conversations whose contents are marks. What was read
is then held against the Jinja template on further conversations; a template that does more than put pieces
around messages is not translated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeprune import chat_templates
from edgeprune.errors import EdgepruneError

Messages = Sequence[tuple[str, str]]  # (role, content)

_S, _U, _A, _V = "marksystem", "markuser", "markanswer", "markagain"
_MOST_CHARS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What stands around each message. `inside_user`: the system message opens the first user turn."""

    system: tuple[str, str] | None  # None: the template takes no system message
    user: tuple[str, str]
    answer: tuple[str, str]
    default_system: str | None  # said when no system message is given
    inside_user: bool

    def render(self, messages: Messages) -> str:
        """The prompt up to where the model goes on, without the first special token."""
        out, opened = "", False
        if self.default_system is not None and messages[0][0] != "system":
            messages = [("system", self.default_system), *messages]
        for role, content in messages:
            if role == "system":
                assert self.system is not None
                out += self.system[0] + content + self.system[1]
                opened = self.inside_user
            elif role == "user":
                out += ("" if opened else self.user[0]) + content + self.user[1]
                opened = False
            else:
                out += self.answer[0] + content + self.answer[1]
        return out + self.answer[0]

    @property
    def stop(self) -> str | None:
        """The text that ends an answer, such as <|im_end|>."""
        return self.answer[1].strip() or None

    def go_template(self) -> str | None:
        """The TEMPLATE of a Modelfile, or None when a piece cannot be written there."""
        pieces = [*(self.system or ()), *self.user, *self.answer, self.default_system or ""]
        if any("{{" in piece or "}}" in piece for piece in pieces):
            return None
        user = f"{self.user[0]}{{{{ .Content }}}}{self.user[1]}"
        out = "{{ range .Messages }}"
        if self.system is not None and self.inside_user:
            out = "{{ $opened := false }}" + out
            out += '{{ if eq .Role "system" }}' + self.system[0] + "{{ .Content }}" + self.system[1]
            out += '{{ $opened = true }}{{ else if eq .Role "user" }}{{ if not $opened }}' + self.user[0]
            out += "{{ end }}{{ .Content }}" + self.user[1] + "{{ $opened = false }}"
        elif self.system is not None:
            out += '{{ if eq .Role "system" }}' + self.system[0] + "{{ .Content }}" + self.system[1]
            out += '{{ else if eq .Role "user" }}' + user
        else:
            out += '{{ if eq .Role "user" }}' + user
        out += '{{ else if eq .Role "assistant" }}' + self.answer[0] + "{{ .Content }}" + self.answer[1]
        out += "{{ end }}{{ end }}" + self.answer[0]
        return out if fits_quotes(out) and fits_quotes(self.default_system or "") else None


def fits_quotes(text: str) -> bool:
    """The three quotes of a Modelfile can hold this text: they know no escapes, and Ollama drops what it
    cannot print.
    """
    plain = all(c.isprintable() or c in "\n\t" for c in text)
    return plain and '"""' not in text and not text.endswith('"')


class Render(Protocol):
    """A chat template applied to a conversation, as `chat_templates.Renderer.render` does it."""

    def __call__(self, messages: Sequence[dict[str, str]], /, *, go_on: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class _Jinja:
    _render: Render

    def render(self, messages: Messages, *, go_on: bool) -> str:
        return self._render([{"role": role, "content": content} for role, content in messages], go_on=go_on)


def _between(text: str, first: str, second: str) -> str:
    return text.split(first, 1)[1].split(second, 1)[0]


@functools.lru_cache(maxsize=16)
def read(source: str, *, eos: str = "", name: str = "the model") -> Pieces | None:
    """The pieces of a Jinja chat template, or None when it does more than put pieces around messages.

    Raises ConfigError for one that takes too much time, memory or text, with `name` in it.
    """
    if len(source) > _MOST_CHARS:
        return None
    # the tokenizer puts the first token in front by itself; one that the template spells out stays
    names = {"bos_token": "", "eos_token": eos}
    with chat_templates.Renderer(source, name=name, names=names) as jinja:
        return pieces_of(jinja.render)


def pieces_of(render: Render) -> Pieces | None:
    """As `read`, of whatever renders."""
    jinja = _Jinja(render)
    try:
        found = _read(jinja)
        if found is None:
            return None
        for messages in _conversations(with_system=found.system is not None):
            if found.render(messages) != jinja.render(messages, go_on=True):
                return None
        return found
    except EdgepruneError:
        raise
    except Exception:  # a template is a stranger's program: it may raise, and give, anything
        return None


def _read(jinja: _Jinja) -> Pieces | None:
    one = jinja.render([("user", _U)], go_on=False)
    user_after = one.split(_U, 1)[1]
    answered = jinja.render([("user", _U), ("assistant", _A)], go_on=False)
    answer_after = answered.split(_A, 1)[1]
    longer = jinja.render([("user", _U), ("assistant", _A), ("user", _V)], go_on=True)
    first = _between(longer, _U, _A)
    second = _between(longer, _A, _V)
    if not first.startswith(user_after) or not second.startswith(answer_after):
        return None
    answer_before = first[len(user_after) :]
    user_before = second[len(answer_after) :]
    head = one.split(_U, 1)[0]
    if not head.endswith(user_before):
        return None
    head = head[: len(head) - len(user_before)]
    user, answer = (user_before, user_after), (answer_before, answer_after)
    plain = Pieces(system=None, user=user, answer=answer, default_system=None, inside_user=False)
    try:
        told = jinja.render([("system", _S), ("user", _U)], go_on=True)
    except chat_templates.TemplateRefused:
        return plain if not head else None
    if _S not in told:
        return plain if not head else None
    before, after = told.split(_S, 1)[0], _between(told, _S, _U)
    inside = not after.endswith(user_before)
    if not inside:
        after = after[: len(after) - len(user_before)]
    default = None
    if head:
        if not head.startswith(before) or not head.endswith(after) or inside:
            return None
        default = head[len(before) : len(head) - len(after)]
    return Pieces(
        system=(before, after), user=user, answer=answer, default_system=default, inside_user=inside
    )


def _conversations(*, with_system: bool) -> list[Messages]:
    turns: list[tuple[str, str]] = [
        ("user", "One, two?"),
        ("assistant", "Three: four."),
        ("user", "Five <six>"),
        ("assistant", "Seven\neight"),
        ("user", "Nine"),
    ]
    out: list[Messages] = [turns[:1], turns[:3], turns]
    if with_system:
        out += [[("system", "Be brief."), *messages] for messages in out]
    return out
