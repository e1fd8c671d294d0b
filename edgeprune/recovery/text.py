"""Training text as packed windows: plain text, or instruction records with the loss on the answers only."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import chat_templates, data
from edgeprune.errors import ConfigError

Encode = Callable[[str], list[int]]
Message = dict[str, str]  # role, content
# names that published instruction sets give to what is asked, what it is about, and the answer
_ASKED = ("instruction", "prompt", "question")
_ABOUT = ("input", "context")
_ANSWER = ("output", "response", "completion", "answer")
_KNOWN = "'text', 'messages', or 'instruction' (with 'input') and 'output'"
_TEXT_SUFFIXES = (".txt", ".raw", ".md", ".tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Packed windows. `learn[n, t]` says that predicting token t from those before it counts."""

    tokens: np.ndarray  # [N, T] int32
    learn: np.ndarray  # [N, T] bool; column 0 never counts

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> Rows:
        return Rows(tokens=self.tokens[start:stop], learn=self.learn[start:stop])


def plain_rows(windows: np.ndarray) -> Rows:
    """Windows of which every token but the first counts."""
    learn = np.ones(windows.shape, dtype=bool)
    learn[:, 0] = False
    return Rows(tokens=np.ascontiguousarray(windows, dtype=np.int32), learn=learn)


class Chat:
    """Renders conversations with the parent's own chat template, or plainly when it has none.

    A context manager: the template is rendered in a process of its own. Raises ConfigError.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # any damage has the same remedy
            raise ConfigError(
                f"{folder} has no tokenizer that can be read: {error!s:.120}", "is the folder complete?"
            ) from None
        self.templated = bool(tokenizer.chat_template)
        self._name = str(folder)
        self._jinja: chat_templates.Renderer | None = None
        if self.templated:
            try:
                template = tokenizer.get_chat_template()
            except ValueError as error:  # several templates, none of them the default
                raise ConfigError(f"the chat template of {folder}: {error}") from None
            self._jinja = chat_templates.Renderer(
                template, name=self._name, names=tokenizer.special_tokens_map, dates="now"
            )

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._jinja is not None:
            self._jinja.close()

    def pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """The conversation in order as (text, whether it is an answer). Raises ConfigError."""
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], go_on=True)
            after = self._render(messages[: i + 1], go_on=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise ConfigError(
                    "the model's chat template does not put answers behind what was asked, so the loss "
                    "cannot be kept to them",
                    "give plain text, or records with 'text'",
                )
            yield before[len(done) :], False
            yield after[len(before) :], True
            done = after

    def _render(self, messages: Sequence[Message], *, go_on: bool) -> str:
        if self._jinja is None:
            said = "".join(m["content"].strip() + "\n\n" for m in messages)
            return said
        try:
            return self._jinja.render(messages, go_on=go_on)
        except chat_templates.TemplateFailed as error:
            raise ConfigError(
                f"the chat template of {self._name} does not take a conversation of the text: {error}",
                "give plain text, or records with 'text'",
            ) from None


def read(source: str) -> list[str | list[Message]]:
    """Documents of a file or a data set on the hub: plain texts and conversations.

    .json holds a list of records, .jsonl one a line, other files are one text. Raises ConfigError.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        if (
            path.exists()
            or source.startswith((".", "/", "~"))
            or path.suffix in (*_TEXT_SUFFIXES, ".json", ".jsonl")
        ):
            raise ConfigError(f"recovery data {source} does not exist or is not a file")
        return [_document(row, f"{source}, row {i + 1}") for i, row in enumerate(data.hub_rows(source))]
    try:
        text = path.read_text(encoding="utf-8", errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recovery data {path}: {error}") from None
    documents: list[str | list[Message]]
    if path.suffix == ".json":
        documents = [_document(row, f"{path}[{i}]") for i, row in enumerate(_json_list(path, text))]
    elif path.suffix == ".jsonl":
        documents = [_document(row, where) for row, where in _json_lines(path, text)]
    else:
        documents = [text]
    documents = [d for d in documents if not isinstance(d, str) or d.strip()]
    if not documents:
        raise ConfigError(f"recovery data {path} is empty")
    return documents


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: expected a list of records", f"each with {_KNOWN}")
    return rows


def _json_lines(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}:{number}"
            except (ValueError, RecursionError):
                raise ConfigError(f"{path}:{number}: not JSON") from None


def _document(row: Any, where: str) -> str | list[Message]:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if isinstance(row.get("messages"), list):
            return _messages(row["messages"], where)
        asked, about, answer = (_first(row, names) for names in (_ASKED, _ABOUT, _ANSWER))
        if asked is not None and answer is not None:
            question = f"{asked}\n\n{about}" if about and about.strip() else asked
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    raise ConfigError(f"{where}: no text and no instruction in it", f"each record has {_KNOWN}")


def _first(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)


def _messages(given: Sequence[Any], where: str) -> list[Message]:
    out = []
    for message in given:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ConfigError(f"{where}: a message must have 'role' and 'content'")
        out.append({"role": message["role"], "content": message["content"]})
    if not any(m["role"] == "assistant" for m in out):
        raise ConfigError(f"{where}: no message of role 'assistant' to learn from")
    return out


def pack(
    documents: Sequence[str | list[Message]],
    encode: Encode,
    chat: Callable[[], Chat],
    *,
    n_tokens: int,
    separator: int | None,
    most_rows: int | None = None,
) -> Rows:
    """Documents one after the other, `separator` between them, cut to windows of `n_tokens`.

    Attention is not cut at document ends. The rest that fills no window is left out. Raises ConfigError when
    there is no whole window.
    """
    ids: list[int] = []
    learn: list[bool] = []
    renderer: Chat | None = None
    with contextlib.ExitStack() as closing:
        for document in documents:
            if most_rows is not None and len(ids) >= most_rows * n_tokens:
                break
            if isinstance(document, str):
                new = encode(document)
                ids += new
                learn += [True] * len(new)
            else:
                renderer = renderer or closing.enter_context(chat())
                for text, answer in renderer.pieces(document):
                    new = encode(text)
                    ids += new
                    learn += [answer] * len(new)
            if separator is not None:
                ids.append(separator)
                learn.append(isinstance(document, str))
    n_rows = len(ids) // n_tokens
    if n_rows < 1:
        raise ConfigError(
            f"recovery data has {len(ids)} tokens, less than one window of {n_tokens}",
            "give more text or a smaller --recovery-length",
        )
    n_rows = min(n_rows, most_rows) if most_rows is not None else n_rows
    shape = (n_rows, n_tokens)
    mask = np.asarray(learn[: n_rows * n_tokens], dtype=bool).reshape(shape)
    mask[:, 0] = False
    tokens = np.asarray(ids[: n_rows * n_tokens], dtype=np.int32).reshape(shape)
    some = mask.any(axis=1)  # a window that is all question teaches nothing
    if not some.any():
        raise ConfigError("recovery data has no answers to learn from")
    return Rows(tokens=tokens[some], learn=mask[some])


def split(rows: Rows, *, most: int = 32) -> tuple[Rows, Rows]:
    """(training rows, held-out rows): the last tenth, at most `most`, at least one, is held out."""
    if len(rows) < 2:
        raise ConfigError(
            "recovery data fills a single window, and one has to be held out",
            "give more text or a smaller --recovery-length",
        )
    held = max(1, min(most, len(rows) // 10))
    return rows.part(0, len(rows) - held), rows.part(len(rows) - held, len(rows))


def batch_rows(step: int, *, n_rows: int, batch: int, seed: int) -> np.ndarray:
    """Indices [batch] of step `step` (from 0): each pass over the rows in its own order, drawn with `seed`.

    A function of the step alone, so that a resumed run goes on with the same rows.
    """
    wanted = np.arange(step * batch, (step + 1) * batch)
    out = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(wanted // n_rows):
        order = np.random.default_rng([seed, int(epoch)]).permutation(n_rows)
        here = wanted // n_rows == epoch
        out[here] = order[wanted[here] % n_rows]
    return out
