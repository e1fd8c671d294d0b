"""ONNX: one folder that onnxruntime-genai, optimum and transformers.js read; own widths in every layer.

The graph is written here and not by onnxruntime-genai's model builder, which takes one head count and one
FFN width for all layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import rundir
from edgeprune.errors import ConfigError, StageError, UnsupportedModelError
from edgeprune.exporters import _onnx_blocks as blocks_of
from edgeprune.exporters._onnx_graph import (
    BLOCK,
    QUANTIZATIONS,
    Block,
    Graph,
    Source,
    attention_layers,
    build,
    check,
    library,
    model_file,
    traits_of,
)
from edgeprune.exporters.base import Exporter
from edgeprune.families.base import LAYER_LIST_KEY, Family, text_config, write_config
from edgeprune.records import Constraints, ModelDims, UnitRule
from edgeprune.registry import suggest
from edgeprune.units import format_bytes

MODEL_FOLDER = "onnx"  # where transformers.js looks
GENAI_CONFIG = "genai_config.json"
# prompts are computed in pieces of this many tokens, or their logits would need megabytes per token
PREFILL_CHUNK = 512
_TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def check_quantization(name: str) -> None:
    """Raises ConfigError for a name this format does not have."""
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"unknown ONNX quantization '{name}'{suggest(name, QUANTIZATIONS)}",
            f"known: {', '.join(QUANTIZATIONS)}",
        )


def constraints(family: Family, dims: ModelDims, quantization: str) -> Constraints:
    """Any width loads; quantized rows that are no whole number of blocks are padded, so those are avoided."""
    check_quantization(quantization)
    multiple = BLOCK if QUANTIZATIONS[quantization][0] < 16 else 1
    while multiple > max(1, max(s.n_ff for s in dims.layers)):
        multiple //= 2
    reasons = []
    if multiple > 1:
        reasons.append(
            f"FFN width in steps of {multiple}: rows of down_proj fill whole {quantization} blocks"
        )
    return Constraints(
        format="onnx",
        ffn=UnitRule(uniform_across_layers=False, multiple_of=multiple, min_keep=multiple, fixed=False),
        kv=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
        q=UnitRule(uniform_across_layers=False, multiple_of=1, min_keep=1, fixed=False),
        reasons=tuple(reasons),
    )


# ---------------------------------------------------------------- the files beside the model


def _ids(*values: Any) -> list[int]:
    """Token ids of settings that are a number, a list or absent; the first that says anything wins."""
    for value in values:
        found = [value] if isinstance(value, int) else list(value or ())
        if found:
            return [int(v) for v in found]
    return []


def genai_config(
    dims: ModelDims, config: Mapping[str, Any], generation: Mapping[str, Any], quantization: str, context: int
) -> str:
    """genai_config.json as onnxruntime-genai reads it; the cache is numbered over layers with attention."""
    layers = [dims.layers[i] for i in attention_layers(dims)]
    eos = _ids(generation.get("eos_token_id"), config.get("eos_token_id")) or [0]
    bos = _ids(generation.get("bos_token_id"), config.get("bos_token_id")) or eos
    pad = _ids(generation.get("pad_token_id"), config.get("pad_token_id")) or eos
    made = {
        "model": {
            "type": "llama",  # the runtime's plain decoder; the graph holds what differs
            "vocab_size": dims.vocab,
            "context_length": context,
            "bos_token_id": bos[0],
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": pad[0],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": f"{MODEL_FOLDER}/{model_file(quantization)}",
                "head_size": dims.head_dim,
                "hidden_size": dims.hidden,
                "num_attention_heads": max(s.n_heads for s in layers),
                "num_key_value_heads": max(s.n_kv_heads for s in layers),
                "num_hidden_layers": len(layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "chunk_size": PREFILL_CHUNK,
        },
    }
    return json.dumps(made, indent=1) + "\n"


def client_config(dims: ModelDims, config: Mapping[str, Any], quantization: str) -> str:
    """config.json for optimum and transformers.js, which size the cache from it.

    optimum takes hidden size over heads for the head size, so the head count is written that way and
    the true widths are listed per layer.
    """
    made = write_config(text_config(dict(config)), dims)
    if dims.hidden % dims.head_dim == 0:
        heads = dims.hidden // dims.head_dim
        if heads != made["num_attention_heads"]:
            made["num_attention_heads"] = heads
            made[LAYER_LIST_KEY] = [[s.n_heads, s.n_kv_heads, s.n_ff] for s in dims.layers]
    for key in ("auto_map", "quantization_config"):
        made.pop(key, None)
    dtype = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "q4"}[quantization]
    made["transformers.js_config"] = {"dtype": dtype, "use_external_data_format": True}
    return json.dumps(made, indent=1) + "\n"


def _tokenizer_config(folder: Path | None) -> dict[str, str]:
    """tokenizer_config.json, its class by the name that transformers 4 and the other clients know too."""
    path = None if folder is None else folder / "tokenizer_config.json"
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if isinstance(found, dict) and found.get("tokenizer_class") in (None, "TokenizersBackend"):
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found, dict):
        # without this transformers 4 makes token types, which the decoder does not take
        found.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return {path.name: json.dumps(found, indent=1, ensure_ascii=False) + "\n"}


def _generation(folder: Path | None) -> dict[str, Any]:
    path = None if folder is None else folder / "generation_config.json"
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


# ---------------------------------------------------------------- bytes


class FileCost:
    """Exact bytes of the artifact folder for any plan; needs the library onnx, but no weights."""

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        tokenizer_kvs: Sequence[Any] = (),
        *,
        name: str = "model",
        license_name: str | None = None,
        has_imatrix: bool = True,
        tokenizer_folder: Path | None = None,
        context: int | None = None,
    ) -> None:
        self.family = family
        self.config = config
        self.context = context
        self.generation = _generation(tokenizer_folder)
        self._tokenizer_config = _tokenizer_config(tokenizer_folder)
        self._constant_bytes = sum(p.stat().st_size for p in _tokenizer_files(tokenizer_folder))

    def model(self, dims: ModelDims, quantization: str) -> tuple[Any, Graph]:
        """The ModelProto and the layout of its data file."""
        return build(self.family, dims, self.config, quantization, context=self.context or dims.max_context)

    def texts(self, dims: ModelDims, quantization: str) -> dict[str, str]:
        """The JSON files of the artifact."""
        context = self.context or dims.max_context
        return {
            "config.json": client_config(dims, self.config, quantization),
            GENAI_CONFIG: genai_config(dims, self.config, self.generation, quantization, context),
            **self._tokenizer_config,
        }

    def file_bytes(self, dims: ModelDims, quantization: str) -> int:
        """All files of the folder together."""
        model, graph = self.model(dims, quantization)
        texts = self.texts(dims, quantization)
        return (
            self._constant_bytes
            + sum(len(t.encode()) for t in texts.values())
            + int(model.ByteSize())
            + graph.data_bytes
        )

    def weight_bytes(self, dims: ModelDims, quantization: str) -> int:
        return sum(b.n_bytes for b in self.model(dims, quantization)[1].blocks)

    def read_bytes(self, dims: ModelDims, quantization: str) -> int:
        """Weight bytes read per decoded token: no rotary tables, no embedding that is not also the output."""
        embed = self.family.tensor("embed")
        return sum(
            b.n_bytes
            for b in self.model(dims, quantization)[1].blocks
            if b.kind not in ("cos", "sin") and (dims.tied or b.sources[0][0] != embed)
        )

    def largest_tensor_bytes(self, dims: ModelDims, quantization: str) -> int:
        return max(b.n_bytes for b in self.model(dims, quantization)[1].blocks)


# ---------------------------------------------------------------- writing


def imatrix_names(family: Family, dims: ModelDims, stats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean squared input per column, by HF tensor name; `stats` as for the GGUF exporter."""
    out: dict[str, np.ndarray] = {}
    for layer in range(len(dims.layers)):
        for source, roles in (
            ("attn_in", ("q", "k", "v")),
            ("o_in", ("o",)),
            ("ffn_in", ("gate", "up")),
            ("down_in", ("down",)),
        ):
            array = stats.get(f"layers.{layer}.{source}")
            for role in roles if array is not None else ():
                out[family.tensor(role, layer)] = np.asarray(array, np.float32)
    return out


def rotary_tables(dims: ModelDims, config: Mapping[str, Any], context: int) -> dict[str, np.ndarray]:
    """'cos_full', 'sin_full' (and '…_local') float32 [context, rotated / 2], from transformers' own module.

    Raises UnsupportedModelError for scaling that depends on the length of the text.
    """
    plain = text_config(dict(config))
    scaling = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
    nested = bool(scaling) and all(isinstance(v, dict) for v in scaling.values())
    tables = scaling.values() if nested else [scaling]
    for table in tables:
        kind = table.get("rope_type", table.get("type")) or "default"
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise UnsupportedModelError(
                f"rotary scaling '{kind}' cannot be written to ONNX", "known: default, linear, llama3, yarn"
            )
    library("torch")
    import torch

    from edgeprune import checkpoint

    rotary = checkpoint.skeleton(plain, dims).get_decoder().rotary_emb  # type: ignore[operator]
    positions = torch.arange(context)[None]
    like = torch.zeros(1)
    wanted = {t.rope for t in traits_of(config, dims)} - {None}
    out: dict[str, np.ndarray] = {}
    for name in wanted:
        kind = {"full": "full_attention", "local": "sliding_attention"}[str(name)]
        with torch.no_grad():
            cos, sin = rotary(like, positions, *([kind] if dims.family == "gemma3_text" else []))
        half = cos.shape[-1] // 2
        out[f"cos_{name}"] = cos[0, :, :half].numpy()
        out[f"sin_{name}"] = sin[0, :, :half].numpy()
    return out


@dataclasses.dataclass(slots=True)
class _Weights:
    """Turns one stretch of the data file after the other into bytes; the last quantized matrix is kept."""

    read_tensor: Callable[[str], np.ndarray]
    tables: Mapping[str, np.ndarray]
    imatrix: Mapping[str, np.ndarray]
    key: tuple[tuple[Source, ...], int] | None = None
    made: tuple[np.ndarray, np.ndarray] | None = None
    last: tuple[str, np.ndarray] | None = None  # parts of a fused tensor follow each other

    def array(self, block: Block) -> np.ndarray:
        if block.kind in ("cos", "sin"):
            value = self.tables[f"{block.kind}_{block.sources[0][0]}"]
        elif block.kind in ("packed", "scales"):
            value = self._quantized(block)[0 if block.kind == "packed" else 1]
        else:
            value = self._joined(block.sources)
            if block.kind == "transposed":
                value = value.T
            if block.add:
                value = value + np.float32(block.add)
        if value.shape != block.shape:
            raise StageError(
                f"{block.sources[0][0]} has shape {list(value.shape)}, the plan says {list(block.shape)}"
            )
        return _as_type(value, block.dtype, block.sources[0][0])

    def _joined(self, sources: Sequence[Source]) -> np.ndarray:
        arrays = [self._tensor(name)[first : first + rows] for name, first, rows in sources]
        for (name, _, rows), array in zip(sources, arrays, strict=True):
            if len(array) != rows:
                raise StageError(f"{name} has fewer rows than the plan says")
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _tensor(self, name: str) -> np.ndarray:
        if self.last is None or self.last[0] != name:
            array = np.asarray(self.read_tensor(name), np.float32)
            if not np.isfinite(array).all():
                raise StageError(f"tensor {name} holds values that are not finite")
            self.last = (name, array)
        return self.last[1]

    def _quantized(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        if self.key != (block.sources, block.bits) or self.made is None:
            weights = self.imatrix.get(block.sources[0][0])
            self.made = blocks_of.quantize(self._joined(block.sources), block.bits, weights)
            self.key = (block.sources, block.bits)
        return self.made


def _as_type(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array, dtype=dtype)
    if dtype == "float16" and np.isinf(out).any():
        raise StageError(
            f"tensor {name} holds {np.abs(array).max():.3g}, beyond fp16 (65504)", "export with fp32 or int8"
        )
    return out


def _write_data(path: Path, graph: Graph, weights: _Weights) -> None:
    with path.open("wb") as f:
        for block in graph.blocks:
            f.write(b"\0" * (block.offset - f.tell()))
            f.write(weights.array(block).data)
        f.flush()
        os.fsync(f.fileno())


def _check_space(path: Path, n_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise ConfigError(
            f"{path} needs {format_bytes(n_bytes)}, but its disk has {format_bytes(free)} free",
            "free some space and run the same command again",
        )


def export(
    path: Path,
    *,
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    read_tensor: Callable[[str], np.ndarray],
    quantization: str,
    tokenizer_kvs: Sequence[Any] = (),
    imatrix: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
    name: str = "model",
    license_name: str | None = None,
    master: Path | None = None,
    tokenizer_folder: Path | None = None,
    context: int | None = None,
) -> int:
    """Write one artifact folder and read it back; returns the bytes of all its files.

    Args:
        read_tensor: HF name to a float array of the shape `dims` gives it; one is in memory at a time.
        imatrix: see `imatrix_names`; weighs the rounding errors of int4.
        tokenizer_folder: Hugging Face folder whose tokenizer files are copied.
        context: positions of the rotary tables; the model's own without it.

    A folder at `path` is replaced once the new one is whole. Raises StageError naming the tensor for a
    wrong shape or a value that fp16 cannot hold.
    """
    check_quantization(quantization)
    cost = FileCost(family, config, tokenizer_folder=tokenizer_folder, context=context)
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    with rundir.friendly_disk_errors(path):
        model, graph = cost.model(dims, quantization)
        _check_space(path, cost.file_bytes(dims, quantization))
        tables = rotary_tables(dims, config, context or dims.max_context)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            (staging / MODEL_FOLDER).mkdir(parents=True)
            weights = _Weights(read_tensor=read_tensor, tables=tables, imatrix=imatrix or {})
            _write_data(staging / MODEL_FOLDER / graph.data_name, graph, weights)
            (staging / MODEL_FOLDER / model_file(quantization)).write_bytes(model.SerializeToString())
            for file in _tokenizer_files(tokenizer_folder):
                shutil.copyfile(file, staging / file.name)
            for file_name, text in cost.texts(dims, quantization).items():
                (staging / file_name).write_text(text, encoding="utf-8")
            n_bytes = verify_readback(
                staging,
                family,
                dims,
                config,
                (),
                quantization,
                tokenizer_folder=tokenizer_folder,
                context=context,
            )
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return n_bytes


# ---------------------------------------------------------------- reading back


def files(folder: Path) -> Iterator[Path]:
    """All files of an artifact folder, sorted."""
    return iter(sorted(p for p in folder.rglob("*") if p.is_file()))


def sha256_folder(folder: Path) -> str:
    """One digest over the names and contents of all files."""
    lines = [f"{rundir.sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files(folder)]
    return rundir.sha256_bytes("".join(lines).encode())


def find_model(folder: Path) -> Path:
    """The model file of an artifact folder. Raises ConfigError with one clear line."""
    if not folder.is_dir():
        raise ConfigError(f"ONNX folder {folder} does not exist", "give a folder of edgeprune export")
    found = sorted((folder / MODEL_FOLDER).glob("*.onnx"))
    if not found:
        raise ConfigError(f"{folder} holds no {MODEL_FOLDER}/*.onnx", "give a folder of edgeprune export")
    data = found[0].with_name(f"{found[0].name}_data")
    for needed in (folder / GENAI_CONFIG, data):
        if not needed.is_file():
            raise ConfigError(f"{folder}: {needed.name} is missing", "export the model again")
    return found[0]


def load_model(path: Path) -> Any:
    """The ModelProto of a model file, its weights left in the data file, whose length is checked.

    Raises ConfigError when either is damaged or cut short.
    """
    onnx = library("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has its own classes
        raise ConfigError(f"{path} is not a readable ONNX file: {error!s:.100}", "export it again") from None
    end = 0
    for tensor in model.graph.initializer:
        place = {e.key: e.value for e in tensor.external_data}
        if place:
            end = max(end, int(place.get("offset", 0)) + int(place.get("length", 0)))
    if not model.graph.node:
        raise ConfigError(f"{path} holds no graph", "export it again")
    data = path.with_name(f"{path.name}_data")
    size = data.stat().st_size if data.is_file() else 0
    if size != end:
        raise ConfigError(f"{data} has {size:,} bytes, its model refers to {end:,}", "export it again")
    return model


def verify_readback(
    path: Path,
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    tokenizer_kvs: Sequence[Any],
    quantization: str,
    *,
    has_imatrix: bool = False,
    name: str = "model",
    license_name: str | None = None,
    tokenizer_folder: Path | None = None,
    context: int | None = None,
) -> int:
    """Check graph, layout, settings and size of a folder against the plan; returns the bytes of all files.

    Raises StageError naming the first difference.
    """
    check(dims)
    cost = FileCost(family, config, tokenizer_folder=tokenizer_folder, context=context)
    try:
        file = find_model(path)
        found = load_model(file)
    except ConfigError as error:
        raise StageError(f"the exported folder cannot be read back: {error}") from None
    planned, _ = cost.model(dims, quantization)
    if file.name != model_file(quantization):
        raise StageError(f"{path.name}: the model is {file.name}, planned {model_file(quantization)}")
    _same_graph(planned, found, file)
    for file_name, text in cost.texts(dims, quantization).items():
        if (path / file_name).read_text(encoding="utf-8") != text:
            raise StageError(f"{path.name}: {file_name} is not what was written")
    n_bytes = sum(p.stat().st_size for p in files(path))
    expected = cost.file_bytes(dims, quantization)
    if n_bytes != expected:
        raise StageError(f"{path.name}: {n_bytes} bytes, planned {expected}")
    return n_bytes


def _same_graph(planned: Any, found: Any, file: Path) -> None:
    for what in ("initializer", "node", "input", "output"):
        ours, theirs = getattr(planned.graph, what), getattr(found.graph, what)
        for a, b in zip(ours, theirs, strict=False):
            if a != b:
                raise StageError(f"{file.name}: {what} '{b.name}' is not what was planned ('{a.name}')")
        if len(ours) != len(theirs):
            raise StageError(f"{file.name}: {len(theirs)} {what}s, planned {len(ours)}")


EXPORTER = Exporter(
    name="onnx",
    summary="ONNX for onnxruntime-genai, optimum and transformers.js; own widths in every layer",
    reference="ONNX Runtime docs/ContribOperators.md",
    suffix="",
    extra="onnx",
    quantizations=tuple(QUANTIZATIONS),
    constraints=constraints,
    file_cost=FileCost,
    export=export,
    verify_readback=verify_readback,
)
