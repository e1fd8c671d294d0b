"""A Hugging Face folder's tokenizer as GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import locate
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.families.base import text_config
from edgeprune.tokenizer import byte_level, sentencepiece, sentencepiece_file, unigram
from edgeprune.tokenizer.base import SPECIAL_IDS, UNKNOWN
from edgeprune.tokenizer.use import ids_of


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
        scored = model.get("type") == "Unigram" and "vocab" in model
        if not scored and (model.get("type", "BPE") != "BPE" or "merges" not in model):
            raise UnsupportedModelError(f"{path}: not a BPE tokenizer and not a unigram one")
        try:
            if scored:
                pieces = [(str(t), float(s)) for t, s in model["vocab"]]
                ids_of = {t: i for i, (t, _) in enumerate(pieces)}
                data["model"] = model = {**model, "vocab": ids_of, "scores": dict(pieces)}
                out = unigram.kvs_of_json(path, data, size)
            elif model.get("byte_fallback") or not byte_level.ends_in_bytes(data):
                out = sentencepiece.kvs_of_json(root, data, size)
            else:
                out = byte_level.kvs_of_json(path, data, size)
            added = [(t["id"], t["content"]) for t in data.get("added_tokens") or ()]
            ids = dict(model["vocab"]) | {content: i for i, content in added}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: damaged: {error!r:.100}") from None
    elif (root / "tokenizer.model").is_file():
        proto = root / "tokenizer.model"
        tokens, scores, kinds, prefix = sentencepiece_file.read_pieces(proto)
        sentencepiece_file.apply_added(tokens, scores, kinds, settings)
        if sentencepiece_file.model_type(proto) == sentencepiece_file.UNIGRAM:
            out = unigram.kvs_of(proto, tokens, scores, kinds, sentencepiece_file.normalization(proto), size)
        else:
            out = sentencepiece.kvs_of(root, tokens, scores, kinds, prefix, size)
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


def _special_kvs(
    root: Path,
    settings: dict[str, Any],
    config: dict[str, Any],
    ids: Mapping[str, int],
    unknown: int | None,
) -> list[KeyValue]:
    found: dict[str, int] = {}
    for name in SPECIAL_IDS:
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
    out = [KeyValue(f"tokenizer.ggml.{SPECIAL_IDS[n]}_token_id", "UINT32", i) for n, i in found.items()]
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
    ids = ids_of(path, "a", add_special=True)
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
