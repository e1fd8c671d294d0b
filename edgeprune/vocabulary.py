"""Trim a vocabulary: choose the tokens that stay, and write the tokenizer that has only them.

Why text whose tokens stay is cut up as before: BPE takes the best merge among those it can see, one after
the other. When every merge that was ever taken stays, in its order, it is still the best one to be seen.
Which merges led to a token depends on its own letters alone, so each token is taken apart by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import chat_templates, locate, rundir, tokenizer
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.languages import Alphabet
from edgeprune.records import TokenGrowth

ROWS_MULTIPLE = 64  # vectors and repacked blocks of every runtime; filled with the tokens next in line
_PIECE = 1 << 19  # characters encoded at once
# tokens that the makers of a model left free: nothing was ever trained on them
_PLACEHOLDER = re.compile(
    r"[<\[]\|?(?:unused|reserved(?:_special)?(?:_token)?|extra|dummy|placeholder|control|special)"
    r"[_-]?\d+\|?[>\]]",
    re.IGNORECASE,
)
_ID_KEYS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens that stay, as ids of the parent, sorted; `why` counts each under its first reason."""

    kept: tuple[int, ...]
    why: dict[str, int]


class Vocabulary:
    """A model's tokenizer as far as trimming has to know it.

    Args:
        folder: with a tokenizer.json.
        kvs: the same tokenizer as GGUF metadata, with a token for every row of the embedding.

    Raises UnsupportedModelError for anything but BPE, ConfigError when the two do not belong together.
    """

    def __init__(self, folder: Path, kvs: Sequence[KeyValue]) -> None:
        values = {kv.key.removeprefix("tokenizer.ggml."): kv.value for kv in kvs}
        kind = values.get("model")
        self.data = locate.read_json(folder / "tokenizer.json")
        model = self.data.get("model")
        if kind not in ("gpt2", "llama") or not isinstance(model, dict) or "merges" not in model:
            name = model.get("type", kind) if isinstance(model, dict) else kind
            raise UnsupportedModelError(
                f"the vocabulary of a {name} tokenizer cannot be trimmed",
                "byte-level BPE and SentencePiece BPE with byte fallback can",
            )
        self.folder, self.values = folder, values
        self.tokens: list[str] = [t if isinstance(t, str) else "" for t in values["tokens"]]
        self.kinds: list[int] = list(values.get("token_type") or [tokenizer.NORMAL] * len(self.tokens))
        self.byte_level = kind == "gpt2"
        self.ids: dict[str, int] = dict(model["vocab"])
        self.ids |= {t["content"]: t["id"] for t in self.data.get("added_tokens") or ()}
        odd = next((t for t, i in self.ids.items() if i >= len(self.tokens) or self.tokens[i] != t), None)
        if odd is not None:
            raise ConfigError(
                f"{folder / 'tokenizer.json'}: token {odd!r:.40} is not the embedding's row {self.ids[odd]}",
                "tokenizer and model do not belong together",
            )
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(pairs(model["merges"]))))}
        scores = values.get("scores")
        self._scores = (
            {} if scores is None or self.byte_level else dict(zip(self.tokens, scores, strict=True))
        )
        self._encoder = tokenizer.load(folder / "tokenizer.json")
        self._encoder.no_truncation()
        self._encoder.no_padding()

    # ------------------------------------------------ what texts need

    def used(self, text: str) -> set[int]:
        """Ids of a text, special tokens written in it included."""
        found: set[int] = set()
        for piece in self._pieces(text):
            found.update(self._encoder.encode(piece, add_special_tokens=False).ids)
        if self.values.get("add_space_prefix", not self.byte_level):
            # the same line at the start of a text has a space before it
            lines = list(dict.fromkeys(text.splitlines()))
            for one in self._encoder.encode_batch(lines, add_special_tokens=False):
                found.update(one.ids)
        return found

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text cut where no token can reach across: between a line's end and a letter.

        Each piece begins with the end of the line before it, so that it does not look like a text's begin.
        """
        across = not self.byte_level and any(re.search(r"\n[^\n]", token) for token in self.tokens)
        at = 0
        while len(text) - at > _PIECE and not across:
            cut = re.compile(r"(?<=[^\s])\n(?=[^\W_])").search(text, at + _PIECE)
            if cut is None:
                break
            yield text[at : cut.end()]
            at = cut.start()
        yield text[at:]

    def written_in(self, codes: Sequence[str]) -> set[int]:
        """Ids of the tokens that can occur in these languages, by their letters."""
        alphabet = Alphabet(codes)
        found = set()
        for token, i in self.ids.items():
            if self.kinds[i] != tokenizer.NORMAL:
                continue
            text = self._text(token)
            if text is not None and alphabet.writes(text):
                found.add(i)
        return found

    def _text(self, token: str) -> str | None:
        """What a token stands for; None for a part of a character."""
        if not self.byte_level:
            return token.replace("\u2581", " ")
        try:
            return bytes(_BYTE_OF[c] for c in token).decode("utf-8")
        except (KeyError, UnicodeDecodeError):
            return None

    def parts(self, token: str) -> set[str]:
        """Everything that merging passes through on its way to a token, itself included.

        Empty when merging never makes it: such a token is written as it is, or not at all.
        """
        found = _merged(token, lambda a, b: self._ranks.get((a, b)))
        if self._scores:
            # llama.cpp merges by score whatever gives a token
            found |= _merged(token, lambda a, b: _negative(self._scores.get(a + b)))
        return found

    # ------------------------------------------------ what always stays

    def bytes(self) -> set[int]:
        if self.byte_level:
            return {self.ids[c] for c in _BYTE_OF if c in self.ids}
        return {i for i, kind in enumerate(self.kinds) if kind == tokenizer.BYTE}

    def special(self, configs: Iterable[Mapping[str, Any]]) -> set[int]:
        """Added and control tokens but for free places, and every token that settings or configs name."""
        found = {
            i
            for i, kind in enumerate(self.kinds)
            if kind in (tokenizer.UNKNOWN, tokenizer.CONTROL, tokenizer.USER_DEFINED)
            and not _PLACEHOLDER.fullmatch(self.tokens[i])
        }
        found |= {v for k, v in self.values.items() if k.endswith("_token_id") and type(v) is int}
        for config in configs:
            for key, value in config.items():
                if key.endswith("_token_id"):
                    found |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
        settings = _settings(self.folder)
        for key, value in settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str) and text in self.ids:
                found.add(self.ids[text])
        found |= _wrapping_ids(self.data.get("post_processor"))
        unknown = self.data["model"].get("unk_token")
        if unknown in self.ids:
            found.add(self.ids[unknown])
        return {i for i in found if 0 <= i < len(self.tokens)}

    def chat(self) -> set[int]:
        """Tokens of the chat template: of its words one by one, and of a short conversation."""
        template = self.values.get("tokenizer.chat_template")
        if not isinstance(template, str) or not template:
            return set()
        found = {
            i for i, kind in enumerate(self.kinds) if kind != tokenizer.NORMAL and self.tokens[i] in template
        }
        for text in _template_texts(template, _settings(self.folder), str(self.folder)):
            found |= self.used(text)
        return found


_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_REST = [b for b in range(256) if b not in _PRINTABLE]
# byte-level BPE writes each byte as one letter: printable ones as themselves, the others from U+0100 on
_BYTE_OF: Mapping[str, int] = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_REST)}


def pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """Merges of a tokenizer.json in either spelling."""
    out = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        out.append((left, right))
    return out


def _negative(score: float | None) -> float | None:
    return None if score is None else -score


def _merged(token: str, rank: Any) -> set[str]:
    symbols = list(token)
    seen = set(symbols)
    while len(symbols) > 1:
        best, at = None, -1
        for i in range(len(symbols) - 1):
            found = rank(symbols[i], symbols[i + 1])
            if found is not None and (best is None or found < best):
                best, at = found, i
        if best is None:
            return set()
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        seen.add(symbols[at])
    return seen


def _wrapping_ids(step: Any) -> set[int]:
    """Tokens that a post-processor puts around a text."""
    if not isinstance(step, dict):
        return set()
    found = {i for one in step.get("processors") or () for i in _wrapping_ids(one)}
    found |= {i for entry in (step.get("special_tokens") or {}).values() for i in entry["ids"]}
    return found | {step[k][1] for k in ("sep", "cls") if isinstance(step.get(k), list) and len(step[k]) == 2}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return locate.read_json(path) if path.is_file() else {}


def _template_texts(template: str, settings: Mapping[str, Any], name: str) -> list[str]:
    """Literal texts of a chat template and, where it can be rendered, a conversation in it.

    Raises ConfigError, with `name` in it, for one that takes too much time, memory or text.
    """
    names = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)}
    user = {"role": "user", "content": "x"}
    with chat_templates.Renderer(template, name=name, names=names, dates="01 Jan 2026 23 45 67 89") as jinja:
        try:
            texts = jinja.literals()
        except chat_templates.TemplateFailed:
            return [template]
        for turns in (
            [user],
            [{"role": "system", "content": "x"}, user, {"role": "assistant", "content": "x"}, user],
        ):
            # one that fails is read by its literal texts alone
            with contextlib.suppress(chat_templates.TemplateFailed):
                texts.append(jinja.render(turns, go_on=True))
    return texts


# ---------------------------------------------------------------- choosing


def choose(
    of: Vocabulary,
    texts: Sequence[str],
    codes: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
) -> Choice:
    """Which tokens stay so that `texts` are cut up as before; with `codes` also those of languages."""
    kept: dict[int, str] = {}

    def keep(ids: Iterable[int], why: str) -> None:
        for i in ids:
            kept.setdefault(i, why)

    for text in texts:
        keep(sorted(of.used(text)), "text")
    if codes:
        keep(sorted(of.written_in(codes)), "languages")
    keep(sorted(of.bytes()), "bytes")
    keep(sorted(of.special(configs)), "special")
    keep(sorted(of.chat()), "chat template")
    for i in list(kept):
        keep((of.ids[p] for p in of.parts(of.tokens[i]) if p in of.ids), "on the way")
    # rather real tokens than empty rows: an empty row could be sampled
    goal = -(-len(kept) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    for i, token in enumerate(of.tokens):
        if len(kept) >= goal:
            break
        if i in kept or of.kinds[i] != tokenizer.NORMAL or token not in of.ids:
            continue
        more = {of.ids[p] for p in of.parts(token) if p in of.ids} - set(kept)
        if i in more and len(kept) + len(more) <= goal:
            keep(sorted(more), "to fill up")
    why: dict[str, int] = {}
    for reason in kept.values():
        why[reason] = why.get(reason, 0) + 1
    return Choice(tuple(sorted(kept)), why)


_MOST_TOKENS = 1 << 22  # sixteen times the largest vocabulary


def write_runs(ids: Sequence[int]) -> str:
    """Sorted ids as runs: '0-16,20,22-40'."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read_runs(runs: str) -> tuple[int, ...]:
    """Undo `write_runs`. Raises ConfigError."""
    out: list[int] = []
    try:
        for run in runs.split(",") if runs else ():
            first, _, last = run.partition("-")
            span = range(int(first), int(last or first) + 1)
            if len(out) + len(span) > _MOST_TOKENS or span.start < 0:
                raise ValueError(run)
            out += span
    except (ValueError, OverflowError):  # OverflowError: len of a range beyond 64 bits
        raise ConfigError(f"token ids {runs!r:.40} are not written as 0-16,20") from None
    return tuple(out)


# ---------------------------------------------------------------- rewriting


def _stays(merge: tuple[str, str], left: set[str]) -> bool:
    return merge[0] in left and merge[1] in left and merge[0] + merge[1] in left


def trim_kvs(kvs: Sequence[KeyValue], kept: Sequence[int]) -> list[KeyValue]:
    """GGUF metadata of the same tokenizer with only the tokens `kept`; ids in it are the new ones."""
    new = {old: i for i, old in enumerate(kept)}
    tokens = next(kv.value for kv in kvs if kv.key == "tokenizer.ggml.tokens")
    left = {t for t in (tokens[i] for i in kept) if isinstance(t, str)}
    out = []
    for kv in kvs:
        name = kv.key.removeprefix("tokenizer.ggml.")
        if kv.key == "tokenizer.huggingface.json":
            continue  # a second tokenizer, with all tokens
        if name == "merges":
            stay = tuple(m for m in kv.value if _stays(tuple(m.split(" ", 1)), left))  # type: ignore[arg-type]
            kv = dataclasses.replace(kv, value=stay)
        elif name in ("tokens", "token_type", "scores"):
            kv = dataclasses.replace(kv, value=tuple(kv.value[i] for i in kept))
        elif name.endswith("_token_id") and type(kv.value) is int:
            if kv.value not in new:
                continue
            kv = dataclasses.replace(kv, value=new[kv.value])
        out.append(kv)
    return out


def remap(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """config.json or generation_config.json with new token ids; an id that left becomes null."""
    new = {old: i for i, old in enumerate(kept)}

    def walk(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: walk(k, v) for k, v in value.items()}
        if not key.endswith(_ID_KEYS) or isinstance(value, bool):
            return value
        if isinstance(value, list):
            return [new[v] for v in value if type(v) is int and v in new]
        return new.get(value) if isinstance(value, int) else value

    return {k: walk(k, v) for k, v in config.items()}


def write_folder(of: Vocabulary, kept: Sequence[int], source: Path, out: Path) -> None:
    """Write tokenizer.json and what belongs to it with only the tokens `kept`.

    `source` is the parent's folder. Older forms of the same tokenizer are left out: tokenizer.json says all.
    """
    new = {old: i for i, old in enumerate(kept)}
    left = {of.tokens[i] for i in kept}
    data = dict(of.data)
    model = dict(data["model"])
    vocab = {t: new[i] for t, i in model["vocab"].items() if i in new}
    model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    merges = model["merges"]
    model["merges"] = [m for m, pair in zip(merges, pairs(merges), strict=True) if _stays(pair, left)]
    data["model"] = model
    added = data.get("added_tokens") or ()
    data["added_tokens"] = [t | {"id": new[t["id"]]} for t in added if t["id"] in new]
    data["post_processor"] = _post_processor(data.get("post_processor"), of.ids, new)
    data["truncation"] = data["padding"] = None
    rundir.write_text(out / "tokenizer.json", json.dumps(data, ensure_ascii=False))
    settings = _trim_settings(_settings(source) or _settings(of.folder), left, new)
    # a class of its own would build the parent's vocabulary again
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("auto_map", "vocab_file", "merges_file", "tokenizer_file"):
        settings.pop(key, None)
    rundir.write_text(out / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=1))
    path = source / "special_tokens_map.json"
    if path.is_file():
        made = _trim_settings(locate.read_json(path), left, new)
        rundir.write_text(out / path.name, json.dumps(made, ensure_ascii=False, indent=1))
    path = source / "chat_template.jinja"
    if path.is_file():
        rundir.write_text(out / path.name, path.read_text(encoding="utf-8"))
    path = source / "generation_config.json"
    if path.is_file():
        made = remap(locate.read_json(path), kept)
        rundir.write_text(out / path.name, json.dumps(made, ensure_ascii=False, indent=1))


def _trim_settings(settings: Mapping[str, Any], left: set[str], new: Mapping[int, int]) -> dict[str, Any]:
    """Tokens that left must not be named: a loader would add them again, beyond the embedding."""

    def text(value: Any) -> Any:
        return value.get("content") if isinstance(value, dict) else value

    out: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "added_tokens_decoder" and isinstance(value, dict):
            stay = {int(i): t for i, t in value.items() if int(i) in new}
            value = {str(new[i]): t for i, t in sorted(stay.items())}
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(value, list):
                value = [t for t in value if text(t) in left]
            elif isinstance(value, dict):
                value = {k: t for k, t in value.items() if text(t) in left}
        elif key.endswith("_token") and isinstance(text(value), str):
            # how it is matched is said in tokenizer.json
            value = text(value)
            if value not in left:
                continue
        out[key] = value
    return out


def _post_processor(step: Any, ids: Mapping[str, int], new: Mapping[int, int]) -> Any:
    if not isinstance(step, dict):
        return step
    step = dict(step)
    if isinstance(step.get("processors"), list):
        step["processors"] = [_post_processor(one, ids, new) for one in step["processors"]]
    if isinstance(step.get("special_tokens"), dict):
        step["special_tokens"] = {
            name: entry | {"ids": [new[i] for i in entry["ids"]]}
            for name, entry in step["special_tokens"].items()
        }
    for key in ("sep", "cls"):
        if isinstance(step.get(key), list) and len(step[key]) == 2:
            step[key] = [step[key][0], new[step[key][1]]]
    return step


# ---------------------------------------------------------------- what it costs


def growth(before: Path, after: Path, texts: Mapping[str, str]) -> tuple[TokenGrowth, ...]:
    """Tokens of each text under both tokenizers (folders with tokenizer.json)."""
    encoders = [tokenizer.load(folder / "tokenizer.json") for folder in (before, after)]
    for encoder in encoders:
        encoder.no_truncation()
    out = []
    for name, text in texts.items():
        counts = [len(e.encode(text, add_special_tokens=False).ids) for e in encoders]
        out.append(TokenGrowth(text=name, tokens_before=counts[0], tokens_after=counts[1]))
    return tuple(out)
