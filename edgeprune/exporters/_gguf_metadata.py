"""Metadata of an exported GGUF file; key names follow ggml's `docs/gguf.md` and llama.cpp's loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.costs import gguf_types as types_of
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import UnsupportedModelError
from edgeprune.families._gguf import layout
from edgeprune.families.base import Family
from edgeprune.records import ModelDims

QUANTIZATION_VERSION = 2  # of ggml's block layouts; llama.cpp writes the same number
_GENERAL_TYPE = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of a config.json; `kind` is default, linear, llama3 or yarn."""

    theta: float
    kind: str
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def rope_of(config: Mapping[str, Any], theta: float = 10000.0) -> Rope:
    """Read both spellings of config.json (transformers 4 and 5). Raises UnsupportedModelError.

    Where kinds of layers differ it is the one of full attention. `theta` is the family's default.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(scaling, Mapping) and isinstance(scaling.get("full_attention"), Mapping):
        scaling = scaling["full_attention"]
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
            theta=float(scaling.get("rope_theta") or config.get("rope_theta") or theta),
            kind=kind,
            factor=float(scaling["factor"]) if kind != "default" else 1.0,
            original_context=int(original or 2048),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"config.json: rotary scaling '{kind}' is incomplete: {error}") from None


def _per_layer(key: str, values: Sequence[int]) -> KeyValue:
    if all(v == values[0] for v in values):
        return KeyValue(key, "UINT32", values[0])
    return KeyValue(key, "ARRAY", tuple(values), "INT32")


def general(name: str, license_name: str | None) -> list[KeyValue]:
    out = [KeyValue("general.type", "STRING", _GENERAL_TYPE), KeyValue("general.name", "STRING", name)]
    if license_name:
        out.append(KeyValue("general.license", "STRING", license_name))
    return out


def shape_metadata(
    family: Family, dims: ModelDims, config: Mapping[str, Any], rope: Rope, quantization: str
) -> list[KeyValue]:
    """What depends on the model's sizes. Raises UnsupportedModelError for sizes that do not load."""
    found = layout(family, dims, config)
    arch, layers = found.arch.name, found.dims.layers
    out = [
        KeyValue("general.architecture", "STRING", arch),
        KeyValue("general.file_type", "UINT32", types_of.check_quantization(quantization)[0]),
        KeyValue("general.quantization_version", "UINT32", QUANTIZATION_VERSION),
        KeyValue(f"{arch}.vocab_size", "UINT32", dims.vocab),
        KeyValue(f"{arch}.block_count", "UINT32", len(layers)),
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
    own = found.arch.keys(config, found.dims, found.layers)
    return out + [dataclasses.replace(kv, key=f"{arch}.{kv.key}") for kv in own]


def tokenizer(kvs: Sequence[KeyValue]) -> list[KeyValue]:
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
    shape = shape_metadata(family, dims, config, rope_of(config, family.rope_theta), quantization)
    return [shape[0], *general(name, license_name), *shape[1:], *tokenizer(tokenizer_kvs)]
