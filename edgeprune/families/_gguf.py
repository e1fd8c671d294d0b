"""GGUF tensor names of any family, and which rows of which Hugging Face tensors each one holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune import registry
from edgeprune.costs import gguf_types
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import MATRICES, Family, GgufArch
from edgeprune.records import LayerShape, ModelDims, TensorSlice

_ORDER = (
    ("attn_norm", "attn_norm"),
    ("q", "attn_q"),
    ("k", "attn_k"),
    ("v", "attn_v"),
    ("o", "attn_output"),
    ("q_norm", "attn_q_norm"),
    ("k_norm", "attn_k_norm"),
    ("attn_post_norm", "post_attention_norm"),
    ("ffn_norm", "ffn_norm"),
    ("gate", "ffn_gate"),
    ("up", "ffn_up"),
    ("down", "ffn_down"),
    ("ffn_post_norm", "post_ffw_norm"),
)
ROLE_NAMES: Mapping[str, str] = dict(_ORDER)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one Hugging Face tensor, and what they are."""

    part: TensorSlice
    role: str
    layer: int | None = None


# (GGUF name, torch shape, where its rows come from; nothing where the format adds it)
TableRow = tuple[str, tuple[int, ...], tuple[Piece, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one model lies in a file: its architecture, and the layers that are written."""

    arch: GgufArch
    layers: tuple[int, ...]  # indices in the model; empty layers are the identity and are left out
    dims: ModelDims  # of the file


def empty_ffn_width(dims: ModelDims) -> int:
    """Width of the zero-weight FFN that stands for none: 'deci' drops the attention when it is 0."""
    return 256 if dims.hidden % 256 == 0 else 32


def layout(family: Family, dims: ModelDims, config: Mapping[str, Any] | None = None) -> Layout:
    """The first architecture of the family that loads these sizes; with `config` index rules count too.

    Raises UnsupportedModelError for shapes that none of them loads.
    """
    layers = tuple(i for i, s in enumerate(dims.layers) if s.n_kv_heads or s.n_ff)
    if not layers:
        raise UnsupportedModelError("GGUF: every layer is empty", "keep some layers")
    inner = dataclasses.replace(dims, layers=tuple(dims.layers[i] for i in layers))
    if not inner.layers[0].n_kv_heads:
        raise UnsupportedModelError("GGUF: layer 0 must keep its attention", "keep a KV head there")
    refusals = []
    for arch in family.gguf:
        refusal = arch.refuses(inner)
        if refusal is None and config is not None:
            refusal = arch.index_problem(config, layers)
        if refusal is None:
            return Layout(arch, layers, dataclasses.replace(inner, layers=tuple(_filled(inner))))
        refusals.append(refusal)
    why = refusals[0] if refusals[-1] == refusals[0] else f"{refusals[0]} and {refusals[-1]}"
    raise UnsupportedModelError(
        f"GGUF has no architecture for '{family.model_type}' with {why}",
        "plan with the same widths in every layer",
    )


def _filled(dims: ModelDims) -> list[LayerShape]:
    width = empty_ffn_width(dims)
    return [s if s.n_ff else dataclasses.replace(s, n_ff=width) for s in dims.layers]


def whole(tensor: str, rows: int) -> TensorSlice:
    return TensorSlice(tensor=tensor, dim=0, block=rows)


def layer_rows(family: Family, dims: ModelDims, found: Layout, new: int) -> list[TableRow]:
    """Tensors of layer `new` of the file."""
    old = found.layers[new]
    here = family.layer_roles(dims.layers[old])
    fused = {roles[0]: (name, roles) for name, roles in found.arch.fused.items()}
    inside = {role for roles in found.arch.fused.values() for role in roles}
    rows: list[TableRow] = []
    for role, plain in _ORDER:
        if role not in here or (role in inside and role not in fused):
            continue
        if role not in MATRICES:
            size = dims.head_dim if role in ("q_norm", "k_norm") else dims.hidden
            piece = Piece(whole(family.tensor(role, old), size), role, old)
            rows.append((f"blk.{new}.{plain}.weight", (size,), (piece,)))
            continue
        name, roles = fused.get(role, (plain, (role,)))
        parts = tuple(Piece(family.part(dims, r, old), r, old) for r in roles)
        columns = family.columns(dims, role, old)
        n = sum(p.part.block for p in parts)
        rows.append((f"blk.{new}.{name}.weight", (n, columns), parts))
        if family.has_bias(dims, role):
            parts = tuple(Piece(family.part(dims, r, old, "bias"), r, old) for r in roles)
            rows.append((f"blk.{new}.{name}.bias", (n,), parts))
    if not dims.layers[old].n_ff:
        d, width = dims.hidden, found.dims.layers[new].n_ff
        for name, shape in (
            ("ffn_norm", (d,)),
            ("ffn_gate", (width, d)),
            ("ffn_up", (width, d)),
            ("ffn_down", (d, width)),
        ):
            rows.append((f"blk.{new}.{name}.weight", shape, ()))
    return rows


def tensor_table(
    family: Family, dims: ModelDims, found: Layout, *, rope_freqs: bool = False
) -> tuple[TableRow, ...]:
    """All tensors of the file in the order written."""

    def single(name: str, role: str, *shape: int) -> TableRow:
        return name, shape, (Piece(whole(family.tensor(role), shape[0]), role),)

    rows = [single("token_embd.weight", "embed", dims.vocab, dims.hidden)]
    if rope_freqs:
        rows.append(("rope_freqs.weight", (dims.head_dim // 2,), ()))
    for new in range(len(found.layers)):
        rows += layer_rows(family, dims, found, new)
    rows.append(single("output_norm.weight", "final_norm", dims.hidden))
    if not dims.tied:
        rows.append(single("output.weight", "head", dims.vocab, dims.hidden))
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
    found = layout(family, dims)
    first = found.dims.layers[0]
    # llama.cpp knows 70B models by their 80 layers; only for 'llama' it looks at the heads as well
    big = found.arch.name in ("deci", "qwen2") or (
        found.arch.name == "llama" and first.n_heads != first.n_kv_heads
    )
    return gguf_types.choose_types(
        quantization,
        [(name, shape) for name, shape, _ in table],
        n_layers=len(found.layers),
        n_gqa=first.n_heads // first.n_kv_heads,
        has_imatrix=has_imatrix,
        is_70b=len(found.layers) == 80 and big,
    )


def hf_types(
    family: Family, dims: ModelDims, quantization: str, *, has_imatrix: bool = False
) -> dict[str, str]:
    """Type in the file of every Hugging Face tensor it holds; for a fused tensor that of all its rows.

    Raises UnsupportedModelError when a fused tensor is stored in several types.
    """
    table = tensor_table(family, dims, layout(family, dims))
    types = file_types(family, dims, quantization, table, has_imatrix=has_imatrix)
    out: dict[str, str] = {}
    for name, _, pieces in table:
        for piece in pieces:
            tensor = piece.part.tensor
            if out.setdefault(tensor, types[name]) != types[name]:
                raise UnsupportedModelError(
                    f"{quantization} stores {tensor} partly as {out[tensor]}, partly as {types[name]}",
                    "choose a quantization with one type",
                )
    return out


def architectures() -> dict[str, tuple[Family, GgufArch]]:
    """Every architecture that can be read, and the family it is read as."""
    found: dict[str, tuple[int, Family, GgufArch]] = {}
    for name in registry.names("families"):
        family: Family = registry.load("families", name, "FAMILY")
        for rank, arch in enumerate(family.gguf):
            if arch.name not in found or rank < found[arch.name][0]:
                found[arch.name] = (rank, family, arch)
    return {name: (family, arch) for name, (_, family, arch) in found.items()}
