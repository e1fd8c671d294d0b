"""Tokenizers both ways: a Hugging Face folder to GGUF metadata, and GGUF metadata to a folder.

Byte-level BPE (GGUF model 'gpt2'), SentencePiece BPE with byte fallback (GGUF model 'llama') and
SentencePiece unigram without it (GGUF model 't5').
Splitting rules are those llama.cpp knows by name (facts: `src/llama-vocab.cpp`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import locate, registry, rundir
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.families.base import text_config

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPELLED_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut before merging: patterns one after the other, then bytes."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token as a whole is taken as it is


_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_SPLITTINGS: Mapping[str, _Splitting] = {
    "gpt-2": _Splitting((_GPT2,)),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": _Splitting((_LLAMA3,), ignore_merges=True),
    "smaug-bpe": _Splitting((_LLAMA3,)),
    "qwen2": _Splitting((_QWEN2,)),
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_SAME_AS: Mapping[str, str] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"
    ),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "modern-bert"), "gpt-2"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "kormo", "hunyuan", "megrez"), "qwen2"),
    "dbrx": "smaug-bpe",
}
_SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


# ---------------------------------------------------------------- Hugging Face to GGUF


def kvs_from_hf(folder: str | Path) -> list[KeyValue]:
    """`tokenizer.*` metadata of a Hugging Face folder.

    The vocabulary is filled up to `vocab_size` of config.json with unused tokens.
    Raises ConfigError for missing or damaged files, UnsupportedModelError for another kind of tokenizer.
    """
    root = Path(folder)
    settings = _read_json(root / "tokenizer_config.json", needed=False)
    config = text_config(_read_json(root / "config.json", needed=False))
    size = config.get("vocab_size")
    path = root / "tokenizer.json"
    if path.is_file():
        data = _read_json(path)
        model = data.get("model")
        if not isinstance(model, dict):
            raise UnsupportedModelError(f"{path}: not a BPE tokenizer and not a unigram one")
        unigram = model.get("type") == "Unigram" and "vocab" in model
        if not unigram and (model.get("type", "BPE") != "BPE" or "merges" not in model):
            raise UnsupportedModelError(f"{path}: not a BPE tokenizer and not a unigram one")
        try:
            if unigram:
                pieces = [(str(t), float(s)) for t, s in model["vocab"]]
                ids_of = {t: i for i, (t, _) in enumerate(pieces)}
                data["model"] = model = {**model, "vocab": ids_of, "scores": dict(pieces)}
                out = _unigram_from_json(path, data, size)
            elif model.get("byte_fallback") or not _ends_in_bytes(data):
                out = _sentencepiece_from_json(root, data, size)
            else:
                out = _byte_level(path, data, size)
            added = [(t["id"], t["content"]) for t in data.get("added_tokens") or ()]
            ids = dict(model["vocab"]) | {content: i for i, content in added}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: damaged: {error!r:.100}") from None
    elif (root / "tokenizer.model").is_file():
        proto = root / "tokenizer.model"
        tokens, scores, kinds, prefix = _read_sentencepiece(proto)
        _apply_added(tokens, scores, kinds, settings)
        if _sentencepiece_kind(proto) == _UNIGRAM:
            out = _unigram_kvs(proto, tokens, scores, kinds, _normalization(proto), size)
        else:
            out = _sentencepiece_kvs(root, tokens, scores, kinds, prefix, size)
        ids = {t: i for i, t in enumerate(tokens)}
    else:
        raise ConfigError(
            f"{root} has no tokenizer.json and no tokenizer.model", "is this a complete model folder?"
        )
    unknown = None
    if out[0].value == "t5":
        # llama.cpp's own guess is 2, whatever stands there
        kinds = next(kv.value for kv in out if kv.key.endswith(".token_type"))
        unknown = kinds.index(UNKNOWN)
    return out + _special_kvs(root, settings, config, ids, unknown) + _chat_template(root, settings)


def _read_json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    if not needed and not path.is_file():
        return {}
    return locate.read_json(path)


def _parts(step: Any, key: str) -> list[dict[str, Any]]:
    """A tokenizer.json step as a flat list; `key` names the children of a sequence."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [p for child in step[key] for p in _parts(child, key)]
    return [step]


def _ends_in_bytes(data: dict[str, Any]) -> bool:
    steps = _parts(data.get("pre_tokenizer"), "pretokenizers")
    return bool(steps) and steps[-1].get("type") == "ByteLevel"


def _recognise(path: Path, data: dict[str, Any]) -> str:
    """Name llama.cpp gives to the splitting of a byte-level tokenizer."""
    patterns: list[str] = []
    for step in _parts(data.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                patterns.append(_GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "Split" and "Regex" in step["pattern"] and step.get("behavior") == "Isolated":
            patterns.append(step["pattern"]["Regex"].replace(_SPELLED_OUT, _CONTRACTIONS))
        else:
            raise UnsupportedModelError(f"{path}: pre-tokenizer {kind} {step!r:.80} has no GGUF name")
    # trailing '|\s+' changes nothing: what no pattern takes is a piece of its own
    cut = tuple(p if p in (_LLAMA3, _QWEN2) else p.removesuffix(r"|\s+") for p in patterns)
    ignore = bool(data["model"].get("ignore_merges"))
    for name, splitting in _SPLITTINGS.items():
        if splitting.patterns == cut and splitting.ignore_merges == ignore:
            return name
    raise UnsupportedModelError(
        f"{path}: no GGUF name is known for this pre-tokenizer: {' then '.join(patterns)!r:.200}",
        f"known: {', '.join(_SPLITTINGS)}",
    )


def _byte_level(path: Path, data: dict[str, Any], size: int | None) -> list[KeyValue]:
    name = _recognise(path, data)
    odd = [s.get("type") for s in _parts(data.get("normalizer"), "normalizers") if s.get("type") != "NFC"]
    if odd:
        raise UnsupportedModelError(f"{path}: normalizer {odd[0]} is not one of llama.cpp's")
    tokens, kinds = _vocabulary(path, data, size)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"])
    return [
        KeyValue("tokenizer.ggml.model", "STRING", "gpt2"),
        KeyValue("tokenizer.ggml.pre", "STRING", name),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(tokens), "STRING"),
        KeyValue("tokenizer.ggml.token_type", "ARRAY", tuple(kinds), "INT32"),
        KeyValue("tokenizer.ggml.merges", "ARRAY", merges, "STRING"),
    ]


def _vocabulary(path: Path, data: dict[str, Any], size: int | None) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; holes and the tail up to `size` are unused tokens."""
    by_id: dict[int, tuple[str, int]] = {i: (t, NORMAL) for t, i in data["model"]["vocab"].items()}
    for token in data.get("added_tokens") or ():
        by_id[token["id"]] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    n = max(by_id) + 1
    _check_size(path, n, size)
    if n > 4 * len(by_id) + 1024:
        raise ConfigError(f"{path}: token ids go up to {n - 1} for {len(by_id)} tokens")
    rows = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(max(n, size or 0))]
    return [t for t, _ in rows], [k for _, k in rows]


def _check_size(path: Path, n: int, size: int | None) -> None:
    if isinstance(size, int) and n > size:
        raise ConfigError(
            f"{path}: has {n} tokens, but the model's embedding has {size} rows",
            "tokenizer and model do not belong together",
        )


def _sentencepiece_from_json(root: Path, data: dict[str, Any], size: int | None) -> list[KeyValue]:
    path = root / "tokenizer.json"
    model = data["model"]
    normal = _parts(data.get("normalizer"), "normalizers")
    before = _parts(data.get("pre_tokenizer"), "pretokenizers")
    spaces = [s for s in normal if s.get("type") == "Replace" and s.get("content") == _SPACE]
    meta = [s for s in before if s.get("type") == "Metaspace"]
    odd = [s.get("type") for s in normal if s.get("type") not in ("Replace", "Prepend")]
    # Gemma cuts at spaces that the normalizer has already replaced: nothing is cut
    before = [
        s for s in before if not (spaces and s.get("type") == "Split" and s["pattern"] == {"String": " "})
    ]
    odd += [s.get("type") for s in before if s.get("type") != "Metaspace"]
    if not model.get("byte_fallback") or not (spaces or meta) or odd:
        what = f": {odd[0]}" if odd else ""
        raise UnsupportedModelError(
            f"{path}: neither byte-level BPE nor SentencePiece BPE with byte fallback{what}"
        )
    prefix = any(s.get("type") == "Prepend" for s in normal) or any(
        s.get("prepend_scheme", "always") != "never" for s in meta
    )
    tokens, kinds = _vocabulary(path, data, size)
    best: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        best.setdefault(left + right, rank)
    scores = [-float(best.get(t, len(best))) for t in tokens]
    for i, token in enumerate(tokens):
        if token == model.get("unk_token"):
            kinds[i] = UNKNOWN
        elif kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = BYTE
    proto = root / "tokenizer.model"
    if proto.is_file():
        pieces, real, _, _ = _read_sentencepiece(proto)
        if pieces == tokens[: len(pieces)]:
            scores[: len(real)] = real
    return _sentencepiece_kvs(root, tokens, scores, kinds, prefix, size)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message; stops where it is damaged."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data):
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
        elif kind in (1, 2, 5):
            size = varint() if kind == 2 else 8 if kind == 1 else 4
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            return


def _sentencepiece_kind(path: Path) -> int | None:
    """`trainer_spec.model_type` of a SentencePiece file: 1 unigram, 2 BPE, 3 words, 4 characters."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    for number, spec in _fields(data):
        if number == 2 and isinstance(spec, bytes):
            # the field is left out for the format's default, unigram
            return next((v for n, v in _fields(spec) if n == 3 and isinstance(v, int)), 1)
    return None


def _read_sentencepiece(path: Path) -> tuple[list[str], list[float], list[int], bool]:
    """Pieces, scores, types, and whether a space is put before the text."""
    if _sentencepiece_kind(path) not in (None, _UNIGRAM, 2):
        raise UnsupportedModelError(
            f"{path}: a SentencePiece model of words or characters", "GGUF has BPE and unigram"
        )
    library = registry.library("sentencepiece", "torch")
    processor = library.SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path}: not a SentencePiece model: {error!s:.80}") from None
    size = range(processor.GetPieceSize())
    tokens = [processor.IdToPiece(i) for i in size]
    scores = [processor.GetScore(i) for i in size]
    # the types have GGUF's numbers; the library does not tell which pieces are the user's own
    pieces = [spec for number, spec in _fields(path.read_bytes()) if number == 1 and isinstance(spec, bytes)]
    kinds = [next((v for n, v in _fields(p) if n == 3 and isinstance(v, int)), NORMAL) for p in pieces]
    if len(kinds) != len(tokens) or not all(NORMAL <= k <= BYTE for k in kinds):
        raise ConfigError(f"{path}: not a SentencePiece model: pieces of unknown types")
    prefix = bool(processor.EncodeAsPieces("a")) and processor.EncodeAsPieces("a")[0].startswith(_SPACE)
    return tokens, scores, kinds, prefix


def _apply_added(tokens: list[str], scores: list[float], kinds: list[int], settings: dict[str, Any]) -> None:
    added = settings.get("added_tokens_decoder") or {}
    for key in sorted(added, key=int):
        i, token = int(key), added[key]
        while len(tokens) <= i < len(added) + len(scores) + 1024:
            tokens.append(f"[PAD{len(tokens)}]")
            scores.append(-10000.0)
            kinds.append(UNUSED)
        if i < len(tokens) and kinds[i] != UNKNOWN:
            tokens[i] = token["content"]
            kinds[i] = CONTROL if token.get("special") else USER_DEFINED


def _sentencepiece_kvs(
    root: Path, tokens: list[str], scores: list[float], kinds: list[int], prefix: bool, size: int | None
) -> list[KeyValue]:
    _check_size(root, len(tokens), size)
    for i in range(len(tokens), size or 0):
        tokens.append(f"[PAD{i}]")
        scores.append(-10000.0)
        kinds.append(UNUSED)
    return [
        KeyValue("tokenizer.ggml.model", "STRING", "llama"),
        KeyValue("tokenizer.ggml.pre", "STRING", "default"),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(tokens), "STRING"),
        KeyValue("tokenizer.ggml.scores", "ARRAY", tuple(scores), "FLOAT32"),
        KeyValue("tokenizer.ggml.token_type", "ARRAY", tuple(kinds), "INT32"),
        KeyValue("tokenizer.ggml.add_space_prefix", "BOOL", prefix),
    ]


_UNIGRAM = 1  # in SentencePiece's `trainer_spec.model_type`
_SPACES, _LAST_SPACES = " {2,}", " +$"  # how tokenizer.json finds runs of spaces, and those at the end


@dataclass(frozen=True, slots=True)
class _Normalization:
    """What SentencePiece does to a text before it is cut."""

    charsmap: bytes = b""  # compiled replacements, empty where there are none
    prefix: bool = True  # a space goes before the text
    merge: bool = True  # runs of spaces become one, those at the ends go


def _normalization(path: Path) -> _Normalization:
    """`normalizer_spec` of a SentencePiece file. Raises UnsupportedModelError for what GGUF cannot say."""
    out = _Normalization()
    for number, spec in _fields(path.read_bytes()):
        found = dict(_fields(spec)) if isinstance(spec, bytes) and number in (2, 3) else {}
        if (number == 2 and found.get(24)) or (number == 3 and not found.get(5, 1)):
            raise UnsupportedModelError(
                f"{path}: unigram with spaces behind words, or kept as they are",
                "llama.cpp knows spaces before words only; ONNX takes any tokenizer",
            )
        if number == 3:
            charsmap = found.get(2)
            out = _Normalization(
                charsmap if isinstance(charsmap, bytes) else b"",
                prefix=bool(found.get(3, 1)),
                merge=bool(found.get(4, 1)),
            )
    return out


def _spaces_only(charsmap: bytes) -> bool:
    """Does it leave no white space but spaces? `Strip` takes line ends too, llama.cpp only spaces."""
    if not charsmap:
        return False
    normalizer = registry.library("tokenizers", "torch").normalizers.Precompiled(charsmap)
    return not normalizer.normalize_str("\n\t\r").strip(" ")


def _unigram_from_json(path: Path, data: dict[str, Any], size: int | None) -> list[KeyValue]:
    """`data` has its vocabulary as a mapping to ids, and the scores beside it."""
    model = data["model"]
    charsmap, merge, end = b"", False, False
    odd = []
    for step in _parts(data.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Precompiled":
            try:
                charsmap = base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
            except binascii.Error:
                raise ConfigError(f"{path}: damaged: precompiled_charsmap is not base64") from None
        elif (kind == "Strip" and step.get("strip_right") and _spaces_only(charsmap)) or (
            kind == "Replace" and step["pattern"] == {"Regex": _LAST_SPACES} and step["content"] == ""
        ):
            end = True
        elif kind == "Replace" and step["pattern"] == {"Regex": _SPACES} and step["content"] in (" ", _SPACE):
            merge = True
        else:
            odd.append(f"normalizer {kind}")
    before = _parts(data.get("pre_tokenizer"), "pretokenizers")
    odd += [f"pre-tokenizer {s.get('type')}" for s in before if s.get("type") != "Metaspace"]
    if odd or len(before) != 1 or merge is not end:
        raise UnsupportedModelError(
            f"{path}: unigram with {odd[0] if odd else 'spaces handled unlike SentencePiece'}",
            "llama.cpp cannot be told that; ONNX takes any tokenizer",
        )
    scheme = before[0].get("prepend_scheme", "always")
    if scheme == "first":
        raise UnsupportedModelError(
            f"{path}: unigram with a space before the first piece of a text only",
            "llama.cpp puts one behind special tokens too; ONNX takes any tokenizer",
        )
    tokens, kinds = _vocabulary(path, data, size)
    scores = [model["scores"].get(t, -10000.0) for t in tokens]
    if isinstance(model.get("unk_id"), int) and 0 <= model["unk_id"] < len(kinds):
        kinds[model["unk_id"]] = UNKNOWN
    if model.get("byte_fallback"):
        kinds = [
            BYTE if k == NORMAL and len(t) == 6 and t.startswith("<0x") else k
            for t, k in zip(tokens, kinds, strict=True)
        ]
    across = any(_SPACE in t[1:] for t, k in zip(tokens, kinds, strict=True) if k == NORMAL)
    if across and before[0].get("split", True):
        raise UnsupportedModelError(
            f"{path}: unigram with pieces across spaces, cut at spaces all the same",
            "llama.cpp would use those pieces; ONNX takes any tokenizer",
        )
    return _unigram_kvs(
        path, tokens, scores, kinds, _Normalization(charsmap, scheme == "always", merge), size
    )


def _unigram_kvs(
    path: Path,
    tokens: list[str],
    scores: list[float],
    kinds: list[int],
    how: _Normalization,
    size: int | None,
) -> list[KeyValue]:
    if BYTE in kinds:
        raise UnsupportedModelError(
            f"{path}: unigram with byte fallback",
            "llama.cpp's unigram has none and would write <unk> instead; ONNX takes any tokenizer",
        )
    if UNKNOWN not in kinds:
        raise UnsupportedModelError(f"{path}: unigram without an unknown token", "llama.cpp needs one")
    # with one and without the other its texts differ at their ends
    if how.prefix is not how.merge:
        raise UnsupportedModelError(
            f"{path}: unigram that {'adds a space' if how.prefix else 'merges spaces'} and does not "
            f"{'merge spaces' if how.prefix else 'add one'}",
            "llama.cpp treats the ends of such a text in another way; ONNX takes any tokenizer",
        )
    _check_size(path, len(tokens), size)
    for i in range(len(tokens), size or 0):
        tokens.append(f"[PAD{i}]")
        scores.append(-10000.0)
        kinds.append(UNUSED)
    made = [
        KeyValue("tokenizer.ggml.model", "STRING", "t5"),
        KeyValue("tokenizer.ggml.pre", "STRING", "default"),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", tuple(tokens), "STRING"),
        KeyValue("tokenizer.ggml.scores", "ARRAY", tuple(scores), "FLOAT32"),
        KeyValue("tokenizer.ggml.token_type", "ARRAY", tuple(kinds), "INT32"),
        KeyValue("tokenizer.ggml.add_space_prefix", "BOOL", how.prefix),
        KeyValue("tokenizer.ggml.remove_extra_whitespaces", "BOOL", how.merge),
    ]
    if how.charsmap:
        made.append(KeyValue("tokenizer.ggml.precompiled_charsmap", "ARRAY", tuple(how.charsmap), "UINT8"))
    return made


def _special_kvs(
    root: Path,
    settings: dict[str, Any],
    config: dict[str, Any],
    ids: Mapping[str, int],
    unknown: int | None,
) -> list[KeyValue]:
    found: dict[str, int] = {}
    for name in _SPECIAL_IDS:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        value = ids.get(text) if isinstance(text, str) else None
        if value is None:
            value = config.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value >= 0:
            found[name] = value
    if "unk" not in found and unknown is not None:
        found["unk"] = unknown
    out = [KeyValue(f"tokenizer.ggml.{_SPECIAL_IDS[n]}_token_id", "UINT32", i) for n, i in found.items()]
    first, last = _wrapping(root, found)
    for name, seen in (("bos", first), ("eos", last)):
        flag = settings.get(f"add_{name}_token")
        # without an id llama.cpp would abort on adding it
        use = (flag if isinstance(flag, bool) else seen) and name in found
        out.append(KeyValue(f"tokenizer.ggml.add_{name}_token", "BOOL", use))
    return out


def _wrapping(root: Path, found: Mapping[str, int]) -> tuple[bool, bool]:
    """Does the tokenizer itself put bos before and eos after a text?"""
    path = root / "tokenizer.json"
    if not path.is_file():
        return True, False
    ids = load(path).encode("a").ids
    return bool(ids) and ids[0] == found.get("bos"), len(ids) > 1 and ids[-1] == found.get("eos")


def _chat_template(root: Path, settings: dict[str, Any]) -> list[KeyValue]:
    path = root / "chat_template.jinja"
    template: Any = locate.read_text(path) if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        return []
    return [KeyValue("tokenizer.chat_template", "STRING", template)]


# ---------------------------------------------------------------- GGUF to Hugging Face


def write_hf(kvs: Sequence[KeyValue], folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json that AutoTokenizer loads offline.

    Raises UnsupportedModelError for a kind of tokenizer we cannot write, ConfigError for damaged metadata.
    """
    root = Path(folder)
    values = {kv.key.removeprefix("tokenizer.ggml."): kv.value for kv in kvs}
    kind = values.get("model")
    if kind not in ("gpt2", "llama", "t5"):
        raise UnsupportedModelError(f"GGUF tokenizer {kind!r:.40} is not supported", "known: gpt2, llama, t5")
    tokens = _strings(values, "tokens")
    kinds = list(values.get("token_type") or [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise ConfigError(f"tokenizer metadata: {len(tokens)} tokens, but {len(kinds)} token types")
    for name in _SPECIAL_IDS.values():
        value = values.get(f"{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise ConfigError(f"tokenizer metadata: {name}_token_id is {value!r:.40} of {len(tokens)} tokens")
    if kind == "gpt2":
        data = _byte_level_json(values, tokens)
    elif kind == "llama":
        data = _sentencepiece_json(values, tokens, kinds)
    else:
        data = _unigram_json(values, tokens, kinds)
    data["added_tokens"] = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[i] != USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if kinds[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    # rows that only fill up the embedding are no tokens
    vocab = data["model"]["vocab"]
    for i, token in reversed(list(enumerate(tokens))):
        if kinds[i] == UNUSED and token == f"[PAD{i}]" and (kind != "t5" or i == len(vocab) - 1):
            del vocab[i if kind == "t5" else token]
    data["post_processor"] = _post_processor(values, tokens, kind)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    for name, key in _SPECIAL_IDS.items():
        if values.get(f"{key}_token_id") is not None:
            settings[f"{name}_token"] = tokens[values[f"{key}_token_id"]]
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    with rundir.friendly_disk_errors(root):
        rundir.write_text(root / "tokenizer.json", json.dumps(data, ensure_ascii=False))
        rundir.write_text(root / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=1))


def _strings(values: Mapping[str, Any], key: str) -> list[str]:
    found = values.get(key)
    if not isinstance(found, tuple | list) or not found:
        raise ConfigError(f"tokenizer metadata: '{key}' is missing")
    if not all(isinstance(t, str) for t in found):
        raise ConfigError(f"tokenizer metadata: '{key}' holds something that is no text")
    return list(found)


def _base(model: dict[str, Any]) -> dict[str, Any]:
    empty = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    fixed = {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"version": "1.0", "truncation": None, "padding": None, "model": {**fixed, **empty, **model}}


def _byte_level_json(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    name = values.get("pre", "default")
    splitting = _SPLITTINGS.get(_SAME_AS.get(name, name)) if isinstance(name, str) else None
    if splitting is None:
        raise UnsupportedModelError(
            f"GGUF pre-tokenizer {name!r:.40} is not supported", f"known: {', '.join(_SPLITTINGS)}"
        )
    merges = []
    for merge in _strings(values, "merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ConfigError(f"tokenizer metadata: merge {merge!r:.40} is not a pair")
        merges.append([left, right])
    data = _base(
        {
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": splitting.ignore_merges,
        }
    )
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in splitting.patterns
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, to_bytes]}
    data["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return data


def _sentencepiece_json(values: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    scores = values.get("scores")
    if not isinstance(scores, tuple | list) or len(scores) != len(tokens):
        raise ConfigError("tokenizer metadata: 'scores' is missing or of another length than 'tokens'")
    vocab = {t: i for i, t in enumerate(tokens)}
    mergeable = {t for t, k in zip(tokens, kinds, strict=True) if k in (NORMAL, USER_DEFINED, UNUSED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token in mergeable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    merges.sort()
    unknown = values.get("unknown_token_id")
    unk = (
        tokens[unknown]
        if unknown is not None
        else next((t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None)
    )
    data = _base(
        {
            "unk_token": unk,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, _, _, left, right in merges],
        }
    )
    prefix = values.get("add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    data["normalizer"] = {"type": "Sequence", "normalizers": steps}
    data["pre_tokenizer"] = None
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    data["decoder"] = {"type": "Sequence", "decoders": decoders}
    return data


def _unigram_json(values: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    scores = values.get("scores")
    if not isinstance(scores, tuple | list) or len(scores) != len(tokens):
        raise ConfigError("tokenizer metadata: 'scores' is missing or of another length than 'tokens'")
    prefix, merge = values.get("add_space_prefix", False), values.get("remove_extra_whitespaces", False)
    if prefix is not merge:
        raise UnsupportedModelError(
            "GGUF tokenizer 't5' that adds a space without merging runs of them, or merges without adding"
        )
    charsmap = values.get("precompiled_charsmap") or ()
    try:
        packed = bytes(b % 256 for b in charsmap)
    except TypeError:
        raise ConfigError(
            "tokenizer metadata: 'precompiled_charsmap' holds something that is no byte"
        ) from None
    steps: list[dict[str, Any]] = []
    if packed:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(packed).decode()})
    if merge:
        steps.append({"type": "Replace", "pattern": {"Regex": _LAST_SPACES}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": _SPACES}, "content": _SPACE})
    across = any(_SPACE in t[1:] for t, k in zip(tokens, kinds, strict=True) if k == NORMAL)
    space = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": not across,
    }
    unknown = values.get("unknown_token_id", 2)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": space,
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "byte_fallback": False,
            "vocab": [[t, float(s)] for t, s in zip(tokens, scores, strict=True)],
        },
    }


def _post_processor(values: Mapping[str, Any], tokens: list[str], kind: str) -> dict[str, Any] | None:
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    used: dict[str, Any] = {}
    # llama.cpp's own defaults where the file says nothing
    on = {
        "bos": kind == "llama" or values.get("pre") in ("llama-bpe", "llama3", "llama-v3"),
        "eos": kind == "t5",
    }
    for name in ("bos", "eos"):
        value = values.get(f"{name}_token_id")
        if value is None or not values.get(f"add_{name}_token", on[name]):
            continue
        token = tokens[value]
        entry = {"SpecialToken": {"id": token, "type_id": 0}}
        single = [entry, *single] if name == "bos" else [*single, entry]
        used[token] = {"id": token, "ids": [value], "tokens": [token]}
    if not used:
        return None
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": used}


# ---------------------------------------------------------------- use


def load(path: Path) -> Any:
    """The `tokenizers` object of a tokenizer.json. Raises ConfigError for a damaged file."""
    library = registry.library("tokenizers", "torch")
    try:
        return library.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises plain Exception, and panics, which are none
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ConfigError(f"{path}: {error!s:.120}") from None


def encode(folder: str | Path, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids of a text; special tokens written in it become their ids. `add_special` adds bos or eos."""
    root = Path(folder)
    if (root / "tokenizer.json").is_file():
        return list(load(root / "tokenizer.json").encode(text, add_special_tokens=add_special).ids)
    auto = registry.library("transformers", "torch").AutoTokenizer
    tokenizer = auto.from_pretrained(str(root), trust_remote_code=False)
    return list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
