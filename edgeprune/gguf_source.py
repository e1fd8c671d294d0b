"""Read a GGUF parent: config.json values, tensors dequantized one by one under their HF names, tokenizer.

Nothing the file says is believed before it was held against the file's size (see costs.gguf_header).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import graph, registry
from edgeprune.costs.gguf_header import Header, KeyValue, TensorInfo, read_header
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.families._gguf import Layout, Piece, architectures, tensor_table
from edgeprune.families.base import LAYER_LIST_KEY, Family, GgufArch
from edgeprune.records import ModelDims

_MOST_LAYERS = 1024

# (tensor of the file or None for a bias it leaves out, first row in it, what the rows are)
_Source = tuple[TensorInfo | None, int, Piece]


class GgufSource:
    """One GGUF file as a model: `config` like a config.json, tensors under Hugging Face names.

    Attributes:
        config: config.json values of the model, in the form transformers 5 reads.
        types: HF name to GGML type name of the tensors in the file.
        tokenizer_kvs: all `tokenizer.*` metadata, verbatim.
        general: `general.*` metadata that are strings, without the prefix (name, license, …).

    Raises ConfigError for a damaged file, UnsupportedModelError for a model that is not covered.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header: Header = read_header(self.path)
        self._values = self.header.values()
        arch = self._values.get("general.architecture")
        known = architectures()
        if not isinstance(arch, str) or arch not in known:
            raise UnsupportedModelError(
                f"{self.path}: GGUF architecture {arch!r:.60} is not supported",
                f"known architectures: {', '.join(known)}",
            )
        self.arch = arch
        self.family: Family = known[arch][0]
        self._rules: GgufArch = known[arch][1]
        self._tensors = {t.name: t for t in self.header.tensors}
        self.tokenizer_kvs: tuple[KeyValue, ...] = tuple(
            kv for kv in self.header.metadata if kv.key.startswith("tokenizer.")
        )
        self.general: dict[str, str] = {
            kv.key.removeprefix("general."): kv.value
            for kv in self.header.metadata
            if kv.key.startswith("general.") and isinstance(kv.value, str)
        }
        self.config: dict[str, Any] = self._read_config()
        self.dims: ModelDims = self.family.read_dims(self.config)
        self._map = self._map_tensors()
        self.types: dict[str, str] = {
            hf: pieces[0][0].type.name for hf, (pieces, _) in self._map.items() if pieces[0][0] is not None
        }

    # ------------------------------------------------------------ tensors

    def names(self) -> tuple[str, ...]:
        """HF names of all tensors."""
        return tuple(self._map)

    def shape(self, hf_name: str) -> tuple[int, ...]:
        return self._entry(hf_name)[1]

    def tensor(self, hf_name: str) -> np.ndarray:
        """One tensor as float32 in HF row order. Raises ConfigError for an unknown name."""
        pieces, shape = self._entry(hf_name)
        held: dict[str, np.ndarray] = {}
        parts = []
        for info, start, piece in pieces:
            if info is None:
                return np.zeros(shape, np.float32)
            if info.name not in held:
                held[info.name] = _dequantize(self.path, info)
            parts.append(self._as_hf(held[info.name][start : start + piece.part.block], piece))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _as_hf(self, rows: np.ndarray, piece: Piece) -> np.ndarray:
        if piece.role.endswith("norm"):
            return rows - np.float32(self.family.norm_offset) if self.family.norm_offset else rows
        if piece.role in ("q", "k") and self._rules.norm_order:
            assert piece.layer is not None
            widths = self.dims.layers[piece.layer]
            return unpermute_rows(rows, widths.n_heads if piece.role == "q" else widths.n_kv_heads)
        return rows

    def _entry(self, hf_name: str) -> tuple[list[_Source], tuple[int, ...]]:
        if hf_name not in self._map:
            raise ConfigError(f"{self.path}: no tensor '{hf_name}'")
        return self._map[hf_name]

    def _map_tensors(self) -> dict[str, tuple[list[_Source], tuple[int, ...]]]:
        """HF name -> where its rows are in the file, in their order, and its shape."""
        shapes = graph.graph_of(self.family, self.dims).shapes
        # every layer of a file is written, complete or not
        as_read = Layout(self._rules, tuple(range(len(self.dims.layers))), self.dims)
        parts: dict[str, list[_Source]] = {hf: [] for hf in shapes}
        problems = []
        known = {"rope_freqs.weight"}
        for name, shape, pieces in tensor_table(self.family, self.dims, as_read):
            known.add(name)
            info = self._tensors.get(name)
            if info is None and pieces and not name.endswith(".bias"):
                problems.append(f"{self.path}: tensor '{name}' is missing")
            elif info is not None and info.shape != shape:
                problems.append(
                    f"{self.path}: tensor '{name}' has shape {list(info.shape)}, expected {list(shape)}"
                )
            start = 0
            for piece in pieces:
                parts[piece.part.tensor].append((info, start, piece))
                start += piece.part.block
        odd = sorted(set(self._tensors) - known)
        if problems:
            raise ConfigError(problems[:5], "the file is damaged or incomplete; fetch it again")
        if odd:
            raise UnsupportedModelError(f"{self.path}: tensor '{odd[0]}' is not part of a {self.arch} model")
        return {hf: (sorted(parts[hf], key=lambda p: p[2].part.offset), shapes[hf]) for hf in shapes}

    # ------------------------------------------------------------ config

    def _fail(self, key: str, value: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: metadata '{key}' is {value!r:.60}, expected {expected}")

    def _int(self, key: str, default: int | None = None) -> int:
        full = f"{self.arch}.{key}"
        value = self._values.get(full, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 30:
            raise self._fail(full, value, "a positive integer")
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        full = f"{self.arch}.{key}"
        value = self._values.get(full, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._fail(full, value, "a positive number")
        return _shortest(value)

    def _widths(self, key: str, n_layers: int, default: list[int] | None = None) -> list[int]:
        full = f"{self.arch}.{key}"
        value = self._values.get(full, default)
        if type(value) is int:
            value = [value] * n_layers
        values = list(value) if isinstance(value, tuple | list) else []
        if len(values) != n_layers or not all(type(v) is int and 0 <= v <= 1 << 20 for v in values):
            raise self._fail(full, value, f"a width, or a list of {n_layers}")
        return values

    def _read_config(self) -> dict[str, Any]:
        n_layers = self._int("block_count")
        if n_layers > _MOST_LAYERS:
            raise self._fail(f"{self.arch}.block_count", n_layers, f"at most {_MOST_LAYERS}")
        if self._values.get(f"{self.arch}.expert_count"):
            raise UnsupportedModelError(f"{self.path}: mixtures of experts are not supported")
        heads = self._widths("attention.head_count", n_layers)
        kv_heads = self._widths("attention.head_count_kv", n_layers, heads)
        ff = self._widths("feed_forward_length", n_layers)
        hidden = self._int("embedding_length")
        if not max(heads) or not max(ff):
            raise UnsupportedModelError(f"{self.path}: no layer has attention and an FFN")
        embed = self._tensors.get("token_embd.weight")
        if embed is None or len(embed.dims) != 2:
            raise ConfigError(f"{self.path}: tensor 'token_embd.weight' is missing or no matrix")
        head_dim = self._int("attention.key_length", max(1, hidden // max(heads)))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._int(key, head_dim) != head_dim:
                raise UnsupportedModelError(
                    f"{self.path}: '{key}' {self._int(key)} differs from the head size {head_dim}"
                )
        parts = [name.split(".") for name in self._tensors]
        biases = {p[2] for p in parts if len(p) == 4 and p[3] == "bias"}
        config: dict[str, Any] = {
            "model_type": self.family.model_type,
            "architectures": [self.family.hf_class],
            "vocab_size": embed.dims[1],
            "hidden_size": hidden,
            "intermediate_size": max(ff),
            "num_hidden_layers": n_layers,
            "num_attention_heads": max(heads),
            "num_key_value_heads": max(kv_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._int("context_length"),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._read_rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": bool(biases & {"attn_q", "attn_k", "attn_v", "attn_output"}),
            "mlp_bias": bool(biases & {"ffn_gate", "ffn_up", "ffn_down"}),
            "initializer_range": 0.02,
            "dtype": "float32",
        }
        rows = [list(row) for row in zip(heads, kv_heads, ff, strict=True)]
        if any(row != rows[0] for row in rows) or 0 in rows[0]:
            config[LAYER_LIST_KEY] = rows
        for name in ("bos", "eos", "padding"):
            value = self._values.get(f"tokenizer.ggml.{name}_token_id")
            there = type(value) is int and 0 <= value < embed.dims[1]
            # said even where there is none: a family's default may lie beyond a small vocabulary
            config[f"{'pad' if name == 'padding' else name}_token_id"] = value if there else None
        prefix = f"{self.arch}."
        values = {k.removeprefix(prefix): v for k, v in self._values.items() if k.startswith(prefix)}
        return self.family.read_gguf(values, config)

    def _read_rope(self, head_dim: int) -> dict[str, Any]:
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": self._float("rope.freq_base", self.family.rope_theta),
        }
        kind = self._values.get(f"{self.arch}.rope.scaling.type", "none")
        factor = self._float("rope.scaling.factor", 1.0)
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            rope.update(rope_type=kind, factor=factor)
            if kind == "yarn":
                key = "rope.scaling.original_context_length"
                rope["original_max_position_embeddings"] = self._int(key, self._int("context_length"))
        elif kind not in ("none", "linear"):
            raise UnsupportedModelError(f"{self.path}: rotary scaling {kind!r:.40} is not supported")
        freqs = self._tensors.get("rope_freqs.weight")
        if freqs is not None:
            if freqs.dims != (head_dim // 2,):
                raise ConfigError(f"{self.path}: tensor 'rope_freqs.weight' has shape {list(freqs.shape)}")
            rope.update(self._llama3_rope(_dequantize(self.path, freqs), rope["rope_theta"], head_dim))
        return rope

    def _llama3_rope(self, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
        """The file keeps only the factors; find the published settings that give them."""
        factor = _shortest(factors.max())
        for power in range(4, 24):
            for low, high in ((1.0, 4.0), (1.0, 32.0)):
                guess = llama3_factors(theta, head_dim, factor, low, high, 2**power)
                if np.allclose(guess, factors, rtol=1e-4):
                    return {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": low,
                        "high_freq_factor": high,
                        "original_max_position_embeddings": 2**power,
                    }
        raise UnsupportedModelError(
            f"{self.path}: the rotary factors are none of Llama 3's", "use the Hugging Face model instead"
        )


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 of the file stands for: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def permute_rows(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Rotary halves [x0…, y0…] of each head to the pairs (x0, y0), … of llama.cpp; weight or bias."""
    half = array.shape[0] // n_heads // 2
    out: np.ndarray = array.reshape(n_heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return out


def unpermute_rows(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo `permute_rows`."""
    half = array.shape[0] // n_heads // 2
    out: np.ndarray = array.reshape(n_heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return out


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What Llama 3 scaling divides each rotary frequency by, [head_dim / 2] float64."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    # turns a frequency makes within the original context: many stay, few are stretched, between is blended
    turns = original * frequency / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    out: np.ndarray = 1.0 / ((1.0 - kept) / factor + kept)
    return out


def _dequantize(path: Path, info: TensorInfo) -> np.ndarray:
    """One tensor as float32 in torch shape; reads only its own bytes."""
    try:
        with path.open("rb") as f:
            f.seek(info.offset)
            raw = np.fromfile(f, np.uint8, info.n_bytes)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if raw.size != info.n_bytes:
        raise ConfigError(f"{path}: ends inside tensor '{info.name}'")
    if info.type.name == "F32":
        return raw.view("<f4").reshape(info.shape)
    if info.type.name == "F16":
        return raw.view("<f2").astype(np.float32).reshape(info.shape)
    library = registry.library("gguf", "gguf")
    rows = raw.reshape(-1, info.type.row_bytes(info.dims[0]))
    out = library.quants.dequantize(rows, library.GGMLQuantizationType[info.type.name])
    return np.asarray(out, np.float32).reshape(info.shape)
