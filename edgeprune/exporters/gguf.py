"""GGUF: a family's own architecture or its carrier for widths per layer; quantized by llama.cpp in a child.

Key and tensor names follow ggml's `docs/gguf.md` and what llama.cpp's loaders of these architectures read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune import graph, registry, rundir
from edgeprune.costs import gguf_types as types_of
from edgeprune.costs.gguf_header import Header, KeyValue, key_value_bytes, pad, read_header, tensor_info_bytes
from edgeprune.errors import ConfigError, MissingExtraError, StageError
from edgeprune.exporters._gguf_metadata import Rope, general, metadata, rope_of, shape_metadata, tokenizer
from edgeprune.exporters.base import Exporter
from edgeprune.families import _gguf as tables
from edgeprune.families._gguf import Piece, TableRow, file_types, layout
from edgeprune.families.base import Family
from edgeprune.gguf_source import llama3_factors, permute_rows
from edgeprune.records import Constraints, ModelDims, UnitRule
from edgeprune.units import format_bytes

if TYPE_CHECKING:  # loads torch
    from edgeprune.recovery.methods.base import Packed

# ---------------------------------------------------------------- shapes


def architecture(family: Family, dims: ModelDims) -> str:
    """The family's own architecture when all layers are alike and complete, else its carrier.

    Raises UnsupportedModelError for shapes that no architecture loads.
    """
    return layout(family, dims).arch.name


def tensor_table(family: Family, dims: ModelDims, config: Mapping[str, Any]) -> tuple[TableRow, ...]:
    """All tensors of the file in the order written: (GGUF name, torch shape, where its rows come from)."""
    freqs = rope_of(config, family.rope_theta).kind == "llama3"
    return tables.tensor_table(family, dims, layout(family, dims, config), rope_freqs=freqs)


def constraints(family: Family, dims: ModelDims, quantization: str) -> Constraints:
    """Shapes that load and keep the tensor types of this quantization."""
    block = types_of.block_size(quantization)
    if block == 256 and dims.hidden % 256:
        block = 32
    block = max(block, 32)
    reasons = []
    # an uneven model is already written under its carrier, and a dense one shows what would be refused
    refusals = {arch.name: arch.refuses(dims) for arch in family.gguf}
    carriers = [arch for arch in family.gguf if arch.per_layer and refusals[arch.name] is None]
    uniform = not carriers
    if uniform:
        carrier = next((arch for arch in family.gguf if arch.per_layer), None)
        but = f", and '{carrier.name}' refuses {refusals[carrier.name]}" if carrier else ""
        reasons.append(f"GGUF has no architecture for '{family.model_type}' with widths per layer{but}")
    one = all(s.n_kv_heads <= 1 for s in dims.layers)
    fewer = any(arch.fewer_heads and refusals[arch.name] is None for arch in family.gguf)
    fixed = one or not fewer
    if one:
        reasons.append("one KV head in every layer: FFN only")
    elif fixed:
        reasons.append(f"heads are fixed: '{family.gguf[0].name}' wants heads times head size = hidden size")
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
    heads_multiple = block // math.gcd(block, dims.head_dim)
    if any(s.n_heads % heads_multiple for s in dims.layers):
        heads_multiple = 1
    if kv_multiple > 1:
        reasons.append(f"KV heads in steps of {kv_multiple}: rows of attn_output fill whole blocks")
    return Constraints(
        format="gguf",
        ffn=UnitRule(
            uniform_across_layers=uniform,
            multiple_of=ffn_multiple,
            min_keep=ffn_multiple,
            fixed=False,
            whole=not uniform,
        ),
        kv=UnitRule(
            uniform_across_layers=uniform,
            multiple_of=kv_multiple,
            min_keep=kv_multiple,
            fixed=fixed,
            whole=any(arch.no_attention for arch in carriers),
        ),
        q=UnitRule(
            uniform_across_layers=uniform,
            multiple_of=heads_multiple,
            min_keep=heads_multiple,
            fixed=not fewer,
        ),
        reasons=tuple(reasons),
    )


# ---------------------------------------------------------------- bytes


# (GGUF name, torch shape, type, bytes)
Row = tuple[str, tuple[int, ...], str, int]
_MOST_PLANS = 64


class FileCost:
    """Exact bytes of any plan at any quantization or mix.

    What depends on the model only is counted once; of the last plans it keeps what their quantizations
    share, so that another mix of a plan costs a few sums.
    """

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
        self.rope = rope_of(config, family.rope_theta)
        self.has_imatrix = has_imatrix
        constant = [*general(name, license_name), *tokenizer(tokenizer_kvs)]
        self._constant_bytes = sum(key_value_bytes(kv) for kv in constant)
        self._plans: dict[ModelDims, _PlanCost] = {}

    def _plan(self, dims: ModelDims) -> _PlanCost:
        found = self._plans.get(dims)
        if found is None:
            table = tensor_table(self.family, dims, self.config)
            # the quantization is one number among these, of the same size for all of them
            shape = shape_metadata(self.family, dims, self.config, self.rope, "F16")
            exact = 24 + self._constant_bytes + sum(key_value_bytes(kv) for kv in shape)
            exact += sum(tensor_info_bytes(name, size) for name, size, _ in table)
            found = _PlanCost(self.family, dims, table, pad(exact), has_imatrix=self.has_imatrix)
            if len(self._plans) >= _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[dims] = found
        return found

    def tensors(self, dims: ModelDims, quantization: str) -> list[Row]:
        """(name, torch shape, type, bytes) of every tensor."""
        return self._plan(dims).tensors(types_of.parts(quantization))

    def file_bytes(self, dims: ModelDims, quantization: str) -> int:
        return self._plan(dims).file_bytes(types_of.parts(quantization))

    def weight_bytes(self, dims: ModelDims, quantization: str) -> int:
        """Bytes of all tensors, without padding."""
        return sum(n for _, _, _, n in self.tensors(dims, quantization))

    def read_bytes(self, dims: ModelDims, quantization: str) -> int:
        """Weight bytes read per decoded token: all but an embedding that is not also the output."""
        rows = self.tensors(dims, quantization)
        return sum(n for name, _, _, n in rows if dims.tied or name != "token_embd.weight")

    def largest_tensor_bytes(self, dims: ModelDims, quantization: str) -> int:
        return max(n for _, _, _, n in self.tensors(dims, quantization))


class _PlanCost:
    """Tensors of one plan, by class of matrix; a mix puts together what was counted before."""

    def __init__(
        self,
        family: Family,
        dims: ModelDims,
        table: Sequence[TableRow],
        header_bytes: int,
        *,
        has_imatrix: bool,
    ) -> None:
        self._family, self._dims, self._table = family, dims, table
        self._header_bytes, self._has_imatrix = header_bytes, has_imatrix
        self._places: dict[str | None, list[int]] = {}
        for place, (name, shape, _) in enumerate(table):
            part = types_of.tensor_class(name) if types_of.may_quantize(name, shape) else None
            self._places.setdefault(part, []).append(place)
        self._bases: dict[str, tuple[list[Row], dict[str | None, int]]] = {}
        self._classes: dict[tuple[str, str], tuple[list[Row], int]] = {}

    def _base(self, quantization: str) -> tuple[list[Row], dict[str | None, int]]:
        """All rows of a pure quantization, and the padded bytes of each class."""
        if quantization not in self._bases:
            kinds = file_types(
                self._family, self._dims, quantization, self._table, has_imatrix=self._has_imatrix
            )
            rows = [(n, s, kinds[n], types_of.tensor_bytes(kinds[n], s)) for n, s, _ in self._table]
            sums = {part: sum(pad(rows[i][3]) for i in places) for part, places in self._places.items()}
            self._bases[quantization] = rows, sums
        return self._bases[quantization]

    def _class(self, part: str, kind: str) -> tuple[list[Row], int]:
        """Rows of a class whose matrices have one type, and their padded bytes."""
        if (part, kind) not in self._classes:
            rows = []
            for name, shape, _ in (self._table[i] for i in self._places.get(part, ())):
                fitting = types_of.fit(kind, shape[-1])
                rows.append((name, shape, fitting, types_of.tensor_bytes(fitting, shape)))
            self._classes[part, kind] = rows, sum(pad(row[3]) for row in rows)
        return self._classes[part, kind]

    def tensors(self, found: types_of.Parts) -> list[Row]:
        out = list(self._base(found.base)[0])
        for part, kind in found.overrides:
            for place, row in zip(self._places.get(part, ()), self._class(part, kind)[0], strict=True):
                out[place] = row
        return out

    def file_bytes(self, found: types_of.Parts) -> int:
        sums = dict(self._base(found.base)[1])
        for part, kind in found.overrides:
            sums[part] = self._class(part, kind)[1]
        return self._header_bytes + sum(sums.values())


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
    library = registry.library("gguf", "gguf")
    table = tensor_table(family, dims, config)
    kinds = file_types(family, dims, dtype, table, has_imatrix=False)
    entries = metadata(family, dims, dtype, config, tokenizer_kvs, name=name, license_name=license_name)
    rope = rope_of(config, family.rope_theta)
    cost = FileCost(family, config, tokenizer_kvs, name=name, license_name=license_name)
    filled = _Rows(family, dims, config, read_tensor)
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
                for tensor, shape, pieces in table:
                    if pieces:
                        array, label = filled.join(pieces), pieces[0].part.tensor
                    else:
                        array, label = _own_tensor(tensor, shape, rope, dims.head_dim), tensor
                    assert array.shape == shape, tensor
                    writer.write_tensor_data(_as_type(array, kinds[tensor], label))
            finally:
                writer.close()


class _Rows:
    """Rows of Hugging Face tensors as the file wants them."""

    def __init__(
        self,
        family: Family,
        dims: ModelDims,
        config: Mapping[str, Any],
        read_tensor: Callable[[str], np.ndarray],
    ) -> None:
        self._family, self._dims, self._read = family, dims, read_tensor
        found = layout(family, dims, config)
        self._norm_order = found.arch.norm_order
        self._q_norm = found.arch.q_norm_factor(config, found.dims, len(found.layers))
        self._shapes = graph.graph_of(family, dims).shapes
        self._last: tuple[str, np.ndarray] | None = None  # parts of a fused tensor follow each other

    def join(self, pieces: Sequence[Piece]) -> np.ndarray:
        parts = [self._piece(piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self, pieces: Sequence[Piece], packed: Mapping[str, Packed], kind: str) -> np.ndarray | None:
        """Rows of a quantized tensor as bytes, or None where one of its parts is not packed as this type."""
        if not pieces or any(p.part.tensor not in packed for p in pieces):
            return None
        parts = []
        for piece in pieces:
            part, known = piece.part, packed[piece.part.tensor]
            if known.type != kind:
                return None
            if known.shape != self._shapes[part.tensor]:
                planned = list(self._shapes[part.tensor])
                raise StageError(f"blocks of {part.tensor} have shape {known.shape}, the plan says {planned}")
            parts.append(self._in_order(known.data[part.offset : part.offset + part.block], piece))
        return np.concatenate(parts)

    def _whole(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            array = np.asarray(self._read(name))
            if array.shape != self._shapes[name]:
                planned = list(self._shapes[name])
                raise StageError(f"{name} has shape {list(array.shape)}, the plan says {planned}")
            self._last = (name, array)
        return self._last[1]

    def _piece(self, piece: Piece) -> np.ndarray:
        part = piece.part
        array = self._whole(part.tensor)[part.offset : part.offset + part.block]
        if piece.role.endswith("norm"):
            array = array.astype(np.float32) + np.float32(self._family.norm_offset)
            return array * np.float32(self._q_norm) if piece.role == "q_norm" else array
        return self._in_order(array, piece)

    def _in_order(self, array: np.ndarray, piece: Piece) -> np.ndarray:
        if piece.role in ("q", "k") and self._norm_order:
            assert piece.layer is not None
            shape = self._dims.layers[piece.layer]
            return permute_rows(array, shape.n_heads if piece.role == "q" else shape.n_kv_heads)
        return array


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
    inputs = {"o": "o_in", "down": "down_in", "gate": "ffn_in", "up": "ffn_in"}
    for name, shape, pieces in tables.tensor_table(family, dims, layout(family, dims)):
        if len(shape) != 2 or not pieces or pieces[0].layer is None:
            continue
        source = f"layers.{pieces[0].layer}.{inputs.get(pieces[0].role, 'attn_in')}"
        if source in stats:
            out[name] = _columns(stats[source], shape[1], source)
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


def _insert(
    path: Path,
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    read_tensor: Callable[[str], np.ndarray],
    packed: Mapping[str, Packed],
) -> None:
    """Replace tensors of a quantized file by the exact blocks that are known of them.

    Raises StageError for blocks that do not decode to the weights.
    """
    library = registry.library("gguf", "gguf")
    header = {t.name: t for t in read_header(path).tensors}
    rows = _Rows(family, dims, config, read_tensor)
    with path.open("r+b") as f:
        for name, _, pieces in tensor_table(family, dims, config):
            info = header[name]
            blocks = rows.blocks(pieces, packed, info.type.name)
            if blocks is None:
                continue
            decoded = library.quants.dequantize(blocks, library.GGMLQuantizationType[info.type.name])
            if not np.array_equal(decoded, rows.join(pieces)):
                raise StageError(
                    f"the blocks kept beside {pieces[0].part.tensor} do not decode to its weights",
                    "the weights were changed after recovery; delete the folder edgeprune_packed",
                )
            assert blocks.nbytes == info.n_bytes, name
            f.seek(info.offset)
            f.write(np.ascontiguousarray(blocks).tobytes())


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
    packed: Mapping[str, Packed] | None = None,
) -> int:
    """Write one file and read it back; returns its bytes.

    `master` is an unquantized file of the same dims to start from (see `write`); without it a temporary
    one is written beside the result. Tensors that are `packed` as the type they get are copied, not rounded.
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
            how = {"quantization": quantization, "types": kinds, "imatrix": imatrix, "threads": threads}
            if packed:
                with rundir.friendly_disk_errors(path), rundir.atomic_path(path) as draft:
                    quantize(master, draft, **how)  # type: ignore[arg-type]
                    _insert(draft, family, dims, config, read_tensor, packed)
            else:
                quantize(master, path, **how)  # type: ignore[arg-type]
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
    summary="GGUF for llama.cpp; widths per layer where an architecture carries them",
    reference="ggml docs/gguf.md",
    suffix=".gguf",
    extra="gguf",
    quantizations=tuple(types_of.QUANTIZATIONS),
    constraints=constraints,
    file_cost=FileCost,
    export=export,
    verify_readback=verify_readback,
)
