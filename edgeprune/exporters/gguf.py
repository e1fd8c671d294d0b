"""GGUF: `llama` for uniform plans, the carrier `deci` for others; quantized by llama.cpp in a child process.

Key and tensor names follow ggml's `docs/gguf.md` and what llama.cpp's loaders of these architectures read.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgeprune import rundir
from edgeprune.costs import gguf_types as types_of
from edgeprune.costs.gguf_header import Header, KeyValue, key_value_bytes, pad, read_header, tensor_info_bytes
from edgeprune.errors import ConfigError, MissingExtraError, StageError, UnsupportedModelError
from edgeprune.exporters.base import Exporter
from edgeprune.families.base import Family
from edgeprune.gguf_source import llama3_factors, permute_rows
from edgeprune.records import Constraints, LayerShape, ModelDims, UnitRule
from edgeprune.units import format_bytes

QUANTIZATION_VERSION = 2  # of ggml's block layouts; llama.cpp writes the same number
_GENERAL_TYPE = "model"

# (name, torch shape, Hugging Face name or None for what the format adds)
TableRow = tuple[str, tuple[int, ...], str | None]


# ---------------------------------------------------------------- rotary scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of a config.json; `kind` is default, linear, llama3 or yarn."""

    theta: float
    kind: str
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Read both spellings of config.json (transformers 4 and 5). Raises UnsupportedModelError."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModelError(f"config.json: rotary scaling {scaling!r:.60} is not a table")
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind not in ("default", "linear", "llama3", "yarn") or partial not in (None, 1.0, 1):
        raise UnsupportedModelError(
            f"rotary scaling '{kind}' cannot be written to GGUF", "known: default, linear, llama3, yarn"
        )
    extras = [k for k in ("attention_factor", "mscale", "mscale_all_dim") if scaling.get(k) is not None]
    if kind == "yarn" and extras:
        raise UnsupportedModelError(f"yarn rotary scaling with {', '.join(extras)} is not covered")
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    try:
        return Rope(
            theta=float(scaling.get("rope_theta", config.get("rope_theta") or 10000.0)),
            kind=kind,
            factor=float(scaling["factor"]) if kind != "default" else 1.0,
            original_context=int(original or 2048),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"config.json: rotary scaling '{kind}' is incomplete: {error}") from None


# ---------------------------------------------------------------- shapes


def architecture(family: Family, dims: ModelDims) -> str:
    """The family's own architecture when all layers are alike and complete, else its carrier.

    Raises UnsupportedModelError for shapes that no architecture loads.
    """
    first = dims.layers[0]
    if not first.n_kv_heads:
        raise UnsupportedModelError("GGUF: layer 0 must keep its attention", "keep a KV head there")
    if all(s == first for s in dims.layers) and first.n_ff:
        return family.gguf_arch
    if family.gguf_carrier is None:
        raise UnsupportedModelError(
            f"GGUF has no architecture for '{family.model_type}' with different widths per layer",
            "plan with the same widths in every layer",
        )
    return family.gguf_carrier


def empty_ffn_width(dims: ModelDims) -> int:
    """Width of the zero-weight FFN that stands for none: 'deci' drops the attention when it is 0."""
    return 256 if dims.hidden % 256 == 0 else 32


def _file_layers(dims: ModelDims) -> list[LayerShape]:
    width = empty_ffn_width(dims)
    return [s if s.n_ff else dataclasses.replace(s, n_ff=width) for s in dims.layers]


_LAYER_ROLES = (
    ("attn_norm", "attn_norm"),
    ("q", "attn_q"),
    ("k", "attn_k"),
    ("v", "attn_v"),
    ("o", "attn_output"),
    ("ffn_norm", "ffn_norm"),
    ("gate", "ffn_gate"),
    ("up", "ffn_up"),
    ("down", "ffn_down"),
)


def tensor_table(family: Family, dims: ModelDims, config: Mapping[str, Any]) -> tuple[TableRow, ...]:
    """All tensors of the file in the order written: (GGUF name, torch shape, HF name or None)."""
    architecture(family, dims)
    rows: list[TableRow] = [("token_embd.weight", (dims.vocab, dims.hidden), family.tensor("embed"))]
    if rope_of(config).kind == "llama3":
        rows.append(("rope_freqs.weight", (dims.head_dim // 2,), None))
    for layer, shape in enumerate(dims.layers):
        shapes = family.layer_shapes(dims, layer)
        for role, name in _LAYER_ROLES:
            for suffix in ("weight", "bias"):
                hf = family.tensor(role, layer, suffix)
                if hf in shapes:
                    rows.append((f"blk.{layer}.{name}.{suffix}", shapes[hf], hf))
        if not shape.n_ff:
            d, width = dims.hidden, empty_ffn_width(dims)
            for name, size in (
                ("ffn_norm", (d,)),
                ("ffn_gate", (width, d)),
                ("ffn_up", (width, d)),
                ("ffn_down", (d, width)),
            ):
                rows.append((f"blk.{layer}.{name}.weight", size, None))
    rows.append(("output_norm.weight", (dims.hidden,), family.tensor("final_norm")))
    if not dims.tied:
        rows.append(("output.weight", (dims.vocab, dims.hidden), family.tensor("head")))
    return tuple(rows)


def file_types(
    family: Family,
    dims: ModelDims,
    quantization: str,
    table: Sequence[TableRow],
    *,
    has_imatrix: bool,
) -> dict[str, str]:
    """Type of every tensor of the exported file."""
    first = dims.layers[0]
    carrier = architecture(family, dims) != family.gguf_arch
    return types_of.choose_types(
        quantization,
        [(name, shape) for name, shape, _ in table],
        n_layers=len(dims.layers),
        n_gqa=first.n_heads // first.n_kv_heads,
        has_imatrix=has_imatrix,
        # llama.cpp knows Llama 70B by its 80 layers; 'deci' does not look at the heads
        is_70b=len(dims.layers) == 80 and (carrier or first.n_heads != first.n_kv_heads),
    )


def constraints(family: Family, dims: ModelDims, quantization: str) -> Constraints:
    """Shapes that load and keep the tensor types of this quantization."""
    block = types_of.block_size(quantization)
    if block == 256 and dims.hidden % 256:
        block = 32
    block = max(block, 32)
    uniform = family.gguf_carrier is None
    reasons = []
    if uniform:
        reasons.append(f"GGUF has no architecture for '{family.model_type}' with widths per layer")
    widest = max(s.n_ff for s in dims.layers)
    ffn_multiple = block
    while ffn_multiple > max(widest, 1):
        ffn_multiple //= 2
    reasons.append(f"FFN width in steps of {ffn_multiple}: rows of ffn_down fill whole {quantization} blocks")
    first = dims.layers[0]
    group = first.n_heads // first.n_kv_heads * dims.head_dim if first.n_kv_heads else block
    kv_multiple = block // math.gcd(block, group)
    if any(s.n_kv_heads % kv_multiple for s in dims.layers):
        kv_multiple = 1
    if kv_multiple > 1:
        reasons.append(f"KV heads in steps of {kv_multiple}: rows of attn_output fill whole blocks")
    return Constraints(
        format="gguf",
        ffn=UnitRule(
            uniform_across_layers=uniform, multiple_of=ffn_multiple, min_keep=ffn_multiple, fixed=False
        ),
        kv=UnitRule(
            uniform_across_layers=uniform, multiple_of=kv_multiple, min_keep=kv_multiple, fixed=False
        ),
        reasons=tuple(reasons),
    )


# ---------------------------------------------------------------- metadata


def _per_layer(key: str, values: Sequence[int]) -> KeyValue:
    if all(v == values[0] for v in values):
        return KeyValue(key, "UINT32", values[0])
    return KeyValue(key, "ARRAY", tuple(values), "INT32")


def _general(name: str, license_name: str | None) -> list[KeyValue]:
    out = [KeyValue("general.type", "STRING", _GENERAL_TYPE), KeyValue("general.name", "STRING", name)]
    if license_name:
        out.append(KeyValue("general.license", "STRING", license_name))
    return out


def _shape_metadata(family: Family, dims: ModelDims, rope: Rope, quantization: str) -> list[KeyValue]:
    arch = architecture(family, dims)
    layers = _file_layers(dims)
    out = [
        KeyValue("general.architecture", "STRING", arch),
        KeyValue("general.file_type", "UINT32", types_of.check_quantization(quantization)[0]),
        KeyValue("general.quantization_version", "UINT32", QUANTIZATION_VERSION),
        KeyValue(f"{arch}.vocab_size", "UINT32", dims.vocab),
        KeyValue(f"{arch}.block_count", "UINT32", len(dims.layers)),
        KeyValue(f"{arch}.context_length", "UINT32", dims.max_context),
        KeyValue(f"{arch}.embedding_length", "UINT32", dims.hidden),
        _per_layer(f"{arch}.feed_forward_length", [s.n_ff for s in layers]),
        _per_layer(f"{arch}.attention.head_count", [s.n_heads for s in layers]),
        _per_layer(f"{arch}.attention.head_count_kv", [s.n_kv_heads for s in layers]),
        KeyValue(f"{arch}.attention.key_length", "UINT32", dims.head_dim),
        KeyValue(f"{arch}.attention.value_length", "UINT32", dims.head_dim),
        KeyValue(f"{arch}.attention.layer_norm_rms_epsilon", "FLOAT32", dims.rms_eps),
        KeyValue(f"{arch}.rope.dimension_count", "UINT32", dims.head_dim),
        KeyValue(f"{arch}.rope.freq_base", "FLOAT32", rope.theta),
    ]
    if rope.kind in ("linear", "yarn"):
        out.append(KeyValue(f"{arch}.rope.scaling.type", "STRING", rope.kind))
        out.append(KeyValue(f"{arch}.rope.scaling.factor", "FLOAT32", rope.factor))
    if rope.kind == "yarn":
        key = f"{arch}.rope.scaling.original_context_length"
        out.append(KeyValue(key, "UINT32", rope.original_context))
    return out


def _tokenizer(kvs: Sequence[KeyValue]) -> list[KeyValue]:
    if not kvs:
        return [KeyValue("tokenizer.ggml.model", "STRING", "no_vocab")]
    # the format's own writer refuses empty arrays, and they say nothing
    return [kv for kv in kvs if kv.type != "ARRAY" or len(kv.value)]


def metadata(
    family: Family,
    dims: ModelDims,
    quantization: str,
    config: Mapping[str, Any],
    tokenizer_kvs: Sequence[KeyValue],
    *,
    name: str = "model",
    license_name: str | None = None,
) -> list[KeyValue]:
    """All metadata of the exported file, in the order written."""
    shape = _shape_metadata(family, dims, rope_of(config), quantization)
    return [shape[0], *_general(name, license_name), *shape[1:], *_tokenizer(tokenizer_kvs)]


class FileCost:
    """Exact bytes of any plan at any quantization; the constant part is counted once."""

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        tokenizer_kvs: Sequence[KeyValue],
        *,
        name: str = "model",
        license_name: str | None = None,
        has_imatrix: bool = True,
    ) -> None:
        self.family = family
        self.config = config
        self.rope = rope_of(config)
        self.has_imatrix = has_imatrix
        constant = [*_general(name, license_name), *_tokenizer(tokenizer_kvs)]
        self._constant_bytes = sum(key_value_bytes(kv) for kv in constant)

    def tensors(self, dims: ModelDims, quantization: str) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name, torch shape, type, bytes) of every tensor."""
        table = tensor_table(self.family, dims, self.config)
        kinds = file_types(self.family, dims, quantization, table, has_imatrix=self.has_imatrix)
        return [(n, s, kinds[n], types_of.tensor_bytes(kinds[n], s)) for n, s, _ in table]

    def file_bytes(self, dims: ModelDims, quantization: str) -> int:
        rows = self.tensors(dims, quantization)
        shape = _shape_metadata(self.family, dims, self.rope, quantization)
        exact = 24 + self._constant_bytes + sum(key_value_bytes(kv) for kv in shape)
        exact += sum(tensor_info_bytes(name, size) for name, size, _, _ in rows)
        return pad(exact) + sum(pad(n) for _, _, _, n in rows)

    def weight_bytes(self, dims: ModelDims, quantization: str) -> int:
        """Bytes of all tensors, without padding."""
        return sum(n for _, _, _, n in self.tensors(dims, quantization))

    def read_bytes(self, dims: ModelDims, quantization: str) -> int:
        """Weight bytes read per decoded token: all but an embedding that is not also the output."""
        rows = self.tensors(dims, quantization)
        return sum(n for name, _, _, n in rows if dims.tied or name != "token_embd.weight")

    def largest_tensor_bytes(self, dims: ModelDims, quantization: str) -> int:
        return max(n for _, _, _, n in self.tensors(dims, quantization))


def predict_file_bytes(
    family: Family,
    dims: ModelDims,
    quantization: str,
    config: Mapping[str, Any],
    tokenizer_kvs: Sequence[KeyValue],
    *,
    has_imatrix: bool,
    name: str = "model",
    license_name: str | None = None,
) -> int:
    """Bytes of the exported file, exactly. For many plans of one model use FileCost."""
    cost = FileCost(
        family, config, tokenizer_kvs, name=name, license_name=license_name, has_imatrix=has_imatrix
    )
    return cost.file_bytes(dims, quantization)


# ---------------------------------------------------------------- writing


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(name, "gguf") from None


def _own_tensor(name: str, shape: tuple[int, ...], rope: Rope, head_dim: int) -> np.ndarray:
    if name == "rope_freqs.weight":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        factors = llama3_factors(rope.theta, head_dim, rope.factor, low, high, rope.original_context)
        return factors.astype(np.float32)
    if name.endswith("_norm.weight"):
        return np.ones(shape, np.float32)
    return np.zeros(shape, np.float32)


def _check_space(path: Path, n_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise ConfigError(
            f"{path} needs {format_bytes(n_bytes)}, but its disk has {format_bytes(free)} free",
            "free some space and run the same command again",
        )


def write(
    path: Path,
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    tokenizer_kvs: Sequence[KeyValue],
    read_tensor: Callable[[str], np.ndarray],
    *,
    dtype: str = "F16",
    name: str = "model",
    license_name: str | None = None,
) -> None:
    """Write an unquantized file, one tensor in memory at a time.

    Args:
        read_tensor: HF name to a float array of the shape `dims` gives it.
        dtype: 'F16' or 'F32' for matrices; norms and biases are F32 always.

    Raises StageError naming the tensor for a wrong shape, or a value that F16 cannot hold.
    """
    if dtype not in ("F16", "F32"):
        raise ConfigError(f"an unquantized GGUF is F16 or F32, not '{dtype}'")
    library = _library("gguf")
    table = tensor_table(family, dims, config)
    kinds = file_types(family, dims, dtype, table, has_imatrix=False)
    entries = metadata(family, dims, dtype, config, tokenizer_kvs, name=name, license_name=license_name)
    rope = rope_of(config)
    cost = FileCost(family, config, tokenizer_kvs, name=name, license_name=license_name)
    permuted = _permuted_rows(family, dims)
    with rundir.friendly_disk_errors(path):
        _check_space(path, cost.file_bytes(dims, dtype))
        with rundir.atomic_path(path) as temporary:
            writer = library.GGUFWriter(temporary, entries[0].value)
            try:
                for kv in entries[1:]:
                    item = library.GGUFValueType[kv.item] if kv.item else None
                    value = list(kv.value) if kv.type == "ARRAY" else kv.value
                    writer.add_key_value(kv.key, value, library.GGUFValueType[kv.type], item)
                for tensor, shape, _ in table:
                    kind = np.dtype(np.float16 if kinds[tensor] == "F16" else np.float32)
                    writer.add_tensor_info(tensor, shape, kind, math.prod(shape) * kind.itemsize)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor, shape, hf in table:
                    if hf is None:
                        array = _own_tensor(tensor, shape, rope, dims.head_dim)
                    else:
                        array = np.asarray(read_tensor(hf))
                    if array.shape != shape:
                        raise StageError(f"{hf} has shape {list(array.shape)}, the plan says {list(shape)}")
                    if hf in permuted:
                        array = permute_rows(array, permuted[hf])
                    writer.write_tensor_data(_as_type(array, kinds[tensor], hf or tensor))
            finally:
                writer.close()


def _permuted_rows(family: Family, dims: ModelDims) -> dict[str | None, int]:
    """HF names of the tensors whose rows change order, with their head count."""
    out: dict[str | None, int] = {}
    for layer, shape in enumerate(dims.layers if family.gguf_permute_qk else ()):
        for suffix in ("weight", "bias"):
            out[family.tensor("q", layer, suffix)] = shape.n_heads
            out[family.tensor("k", layer, suffix)] = shape.n_kv_heads
    return out


def _as_type(array: np.ndarray, kind: str, name: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise StageError(f"tensor {name} holds values that are not finite")
    target = np.float16 if kind == "F16" else np.float32
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array, dtype=target)
    if target is np.float16 and np.isinf(out).any():
        raise StageError(
            f"tensor {name} holds {np.abs(array).max():.3g}, beyond F16 (65504)", "export with F32 or BF16"
        )
    return out


# ---------------------------------------------------------------- quantizing


def imatrix_names(family: Family, dims: ModelDims, stats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Importance matrix of the file: GGUF tensor name to mean squared input per column, float32.

    Args:
        stats: 'layers.{l}.attn_in', '.o_in', '.ffn_in', '.down_in', and optionally 'head_in'; the
            columns are those of the pruned model. Rotary order only moves rows, so no column moves.
    """
    out: dict[str, np.ndarray] = {}
    for layer, shape in enumerate(dims.layers):
        wanted = []
        if shape.n_kv_heads:
            wanted += [("attn_in", n, dims.hidden) for n in ("attn_q", "attn_k", "attn_v")]
            wanted.append(("o_in", "attn_output", shape.n_heads * dims.head_dim))
        if shape.n_ff:
            wanted += [("ffn_in", n, dims.hidden) for n in ("ffn_gate", "ffn_up")]
            wanted.append(("down_in", "ffn_down", shape.n_ff))
        for source, name, columns in wanted:
            array = stats.get(f"layers.{layer}.{source}")
            if array is not None:
                out[f"blk.{layer}.{name}.weight"] = _columns(array, columns, f"layers.{layer}.{source}")
    if "head_in" in stats:
        name = "token_embd.weight" if dims.tied else "output.weight"
        out[name] = _columns(stats["head_in"], dims.hidden, "head_in")
    return out


def _columns(array: np.ndarray, columns: int, name: str) -> np.ndarray:
    out = np.ascontiguousarray(array, dtype=np.float32)
    if out.shape != (columns,):
        raise StageError(f"importance '{name}' has shape {list(out.shape)}, the tensor has {columns} columns")
    if not np.isfinite(out).all() or (out < 0).any():
        raise StageError(f"importance '{name}' holds values that are not finite and positive")
    return out


def quantize(
    master: Path,
    out: Path,
    *,
    quantization: str,
    types: Mapping[str, str],
    imatrix: Mapping[str, np.ndarray] | None,
    threads: int,
) -> None:
    """Quantize a file with llama.cpp in a fresh process, so that its abort is our error and not our end.

    `types` decides every matrix. `imatrix` None or empty means none. Raises StageError with the last words.
    """
    ftype, default = types_of.check_quantization(quantization)
    overrides = [] if not types or default in types_of.FLOATS else _matrices(types)
    with (
        rundir.friendly_disk_errors(out),
        rundir.atomic_path(out) as temporary,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as folder,
    ):
        arrays = Path(folder) / "imatrix.npz"
        if imatrix:
            np.savez(arrays, **imatrix)  # type: ignore[arg-type]
        job = {
            "master": str(master.resolve()),
            "out": str(temporary.resolve()),
            "ftype": ftype,
            "overrides": overrides,
            "imatrix": str(arrays.resolve()) if imatrix else None,
            "threads": threads,
        }
        job_path = Path(folder) / "job.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        try:
            _run_child(job_path, out)
        except StageError as error:
            # looked at before the unfinished file goes and makes room again
            if rundir.disk_is_full(out):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
            raise


def _matrices(types: Mapping[str, str]) -> list[tuple[str, int]]:
    return types_of.quantize_overrides({n: t for n, t in types.items() if t != "F32"})


def _run_child(job: Path, out: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune.exporters._gguf_quantize", str(job.resolve())],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "fail" in line.lower() or "error" in line.lower()] or lines
    if "No module named 'llama_cpp'" in done.stderr:
        raise MissingExtraError("llama_cpp", "gguf")
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise StageError(f"quantizing {out.name} failed ({how}): {telling[-1] if telling else 'no message'}")


def export(
    path: Path,
    *,
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    tokenizer_kvs: Sequence[KeyValue],
    read_tensor: Callable[[str], np.ndarray],
    quantization: str,
    imatrix: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
    name: str = "model",
    license_name: str | None = None,
    master: Path | None = None,
) -> int:
    """Write one file and read it back; returns its bytes.

    `master` is an unquantized file of the same dims to start from (see `write`); without it a temporary
    one is written beside the result.
    """
    default = types_of.check_quantization(quantization)[1]
    given = (family, dims, config, tokenizer_kvs)
    labels = {"name": name, "license_name": license_name}
    has_imatrix = bool(imatrix)
    if quantization in ("F16", "F32"):
        write(path, *given, read_tensor, dtype=quantization, **labels)  # type: ignore[arg-type]
    else:
        cost = FileCost(family, config, tokenizer_kvs, has_imatrix=has_imatrix, **labels)  # type: ignore[arg-type]
        _check_space(path, cost.file_bytes(dims, quantization))
        own = None
        if master is None:
            own = master = path.with_name(f".{path.name}.master.part")
            write(own, *given, read_tensor, dtype="F32" if default == "BF16" else "F16", **labels)  # type: ignore[arg-type]
        try:
            kinds = {n: t for n, _, t, _ in cost.tensors(dims, quantization)}
            quantize(master, path, quantization=quantization, types=kinds, imatrix=imatrix, threads=threads)
        finally:
            if own is not None:
                own.unlink(missing_ok=True)
    return verify_readback(path, *given, quantization, has_imatrix=has_imatrix, **labels)  # type: ignore[arg-type]


# ---------------------------------------------------------------- reading back


def verify_readback(
    path: Path,
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    tokenizer_kvs: Sequence[KeyValue],
    quantization: str,
    *,
    has_imatrix: bool,
    name: str = "model",
    license_name: str | None = None,
) -> int:
    """Check names, shapes, types, metadata and size of a file against the plan; returns its bytes.

    Raises StageError naming the first difference.
    """
    try:
        header = read_header(path)
    except ConfigError as error:
        raise StageError(f"the exported file cannot be read back: {error}") from None
    cost = FileCost(
        family, config, tokenizer_kvs, name=name, license_name=license_name, has_imatrix=has_imatrix
    )
    _same_tensors(header, cost.tensors(dims, quantization), path)
    entries = metadata(
        family, dims, quantization, config, tokenizer_kvs, name=name, license_name=license_name
    )
    found = {kv.key: kv for kv in header.metadata}
    for kv in entries:
        if kv.key not in found:
            raise StageError(f"{path.name}: metadata '{kv.key}' is missing")
        if not _same_value(kv, found[kv.key]):
            raise StageError(f"{path.name}: metadata '{kv.key}' is not what was written")
    extra = sorted(set(found) - {kv.key for kv in entries})
    if extra:
        raise StageError(f"{path.name}: unplanned metadata '{extra[0]}'")
    expected = cost.file_bytes(dims, quantization)
    if header.file_bytes != expected:
        raise StageError(f"{path.name}: {header.file_bytes} bytes, planned {expected}")
    return header.file_bytes


def _same_tensors(header: Header, rows: Sequence[tuple[str, tuple[int, ...], str, int]], path: Path) -> None:
    found = {t.name: t for t in header.tensors}
    planned = {name for name, *_ in rows}
    odd = sorted(planned ^ set(found))
    if odd:
        what = "missing" if odd[0] in planned else "unplanned"
        raise StageError(f"{path.name}: tensor '{odd[0]}' is {what}")
    for name, shape, kind, _ in rows:
        tensor = found[name]
        if tensor.dims != types_of.ggml_dims(shape):
            raise StageError(f"{path.name}: tensor '{name}' has shape {tensor.shape}, planned {shape}")
        if tensor.type.name != kind:
            raise StageError(f"{path.name}: tensor '{name}' is {tensor.type.name}, planned {kind}")


def _same_value(planned: KeyValue, found: KeyValue) -> bool:
    if (planned.type, planned.item) != (found.type, found.item):
        return False
    if "FLOAT32" in (planned.type, planned.item):
        return bool(np.array_equal(np.float32(planned.value), np.float32(found.value)))
    value = tuple(planned.value) if planned.type == "ARRAY" else planned.value
    return bool(value == found.value)


EXPORTER = Exporter(
    name="gguf",
    summary="GGUF for llama.cpp; widths per layer through the 'deci' architecture",
    reference="ggml docs/gguf.md",
    suffix=".gguf",
    extra="gguf",
    quantizations=tuple(types_of.QUANTIZATIONS),
    constraints=constraints,
    file_cost=FileCost,
    export=export,
    verify_readback=verify_readback,
)
