"""Which type every GGUF tensor gets, and what it takes in bytes. Standard library only.

The recipe is ours and explicit, and it agrees with the one llama.cpp applies when it is given only the
name of a quantization (facts: `src/llama-quant.cpp` of llama-cpp-python 0.3.36).

A *mix* is a quantization with other types for some classes of matrices, written as one name:
`Q4_0+embedding=Q8_0+attention=Q5_1`. Whatever takes a quantization name takes a mix. An overridden class has
one type throughout, llama.cpp's exceptions for single layers included; rows that do not fill its blocks get
what `fit` says. Everything else, and the file type number, stays with the base.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.errors import ConfigError
from edgeprune.registry import suggest


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A tensor type: its number in the file, elements per block, bytes per block."""

    name: str
    id: int
    block: int
    block_bytes: int

    def row_bytes(self, n: int) -> int:
        """Bytes of one row of n elements. Raises ValueError when n does not fill whole blocks."""
        if n % self.block:
            raise ValueError(f"a row of {n} does not fill {self.name} blocks of {self.block}")
        return n // self.block * self.block_bytes


_TABLE = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("IQ1_M", 29, 256, 56),
    ("BF16", 30, 1, 2),
)
TYPES: Mapping[str, GgmlType] = {row[0]: GgmlType(*row) for row in _TABLE}
TYPES_BY_ID: Mapping[int, GgmlType] = {t.id: t for t in TYPES.values()}

# quantization name -> (llama ftype number, default tensor type)
QUANTIZATIONS: Mapping[str, tuple[int, str]] = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_1": (9, "Q5_1"),
    "Q5_0": (8, "Q5_0"),
    "Q4_K_M": (15, "Q4_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_1": (3, "Q4_1"),
    "Q4_0": (2, "Q4_0"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ4_XS": (30, "IQ4_XS"),
    "Q3_K_M": (12, "Q3_K"),
}
FLOATS = ("F32", "F16", "BF16")

# squared error over squared weights of Gaussian weights, quantized without an importance matrix; their
# size changes it by less than 1%; measured 2026-11-22 with benchmarks/type_errors.py
RELATIVE_ERRORS: Mapping[str, float] = {
    "F32": 0.0,
    "F16": 4.278e-8,
    "BF16": 2.737e-6,
    "Q8_0": 2.862e-5,
    "Q6_K": 3.143e-4,
    "Q5_K": 1.304e-3,
    "Q5_1": 1.432e-3,
    "Q5_0": 1.818e-3,
    "Q4_K": 5.092e-3,
    "IQ4_NL": 5.794e-3,
    "IQ4_XS": 5.885e-3,
    "Q4_1": 6.111e-3,
    "Q4_0": 7.370e-3,
    "Q3_K": 2.281e-2,
    "IQ3_S": 2.747e-2,
    "Q2_K": 8.790e-2,
}

_FALLBACK = {"IQ4_XS": "IQ4_NL", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


# what a mix can name, in the order of its canonical form
CLASSES = ("embedding", "attention", "ffn")
# types that llama.cpp makes without an importance matrix; BF16 and F32 hold no more than the F16 they are
# made from, and fewer bits than Q3_K no pure quantization here has either
OVERRIDES = (
    "F16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
)
_CLASS_OF = {
    **dict.fromkeys(("token_embd", "output"), "embedding"),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"), "attention"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "ffn"),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """A quantization taken apart: `overrides` are (class, tensor type) in the order of CLASSES."""

    base: str
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Canonical form."""
        return "+".join([self.base, *(f"{part}={kind}" for part, kind in self.overrides)])


@functools.lru_cache(maxsize=4096)
def parts(name: str) -> Parts:
    """Take a quantization or mix apart; overrides may come in any order.

    Raises ConfigError for an unknown base, class or type, a class named twice, and overrides of floats.
    """
    base, *rest = name.split("+")
    where = f" in '{name}'" if rest else ""
    if base not in QUANTIZATIONS:
        raise ConfigError(
            f"unknown GGUF quantization '{base}'{where}{suggest(base, QUANTIZATIONS)}",
            f"known: {', '.join(QUANTIZATIONS)}",
        )
    if rest and base in FLOATS:
        raise ConfigError(
            f"{base} is not quantized and takes no types by class, as in '{name}'",
            "start from a quantized type, such as Q8_0+embedding=F16",
        )
    found: dict[str, str] = {}
    for item in rest:
        part, equals, kind = item.partition("=")
        if not equals:
            raise ConfigError(
                f"'{item}'{where} is not class=TYPE", "such as Q4_0+embedding=Q8_0+attention=Q5_1"
            )
        if part not in CLASSES:
            raise ConfigError(
                f"unknown class '{part}'{where}{suggest(part, CLASSES)}", f"known: {', '.join(CLASSES)}"
            )
        if kind not in OVERRIDES:
            raise ConfigError(
                f"unknown type '{kind}' for {part}{where}{suggest(kind, OVERRIDES)}",
                f"known: {', '.join(OVERRIDES)}",
            )
        if part in found:
            raise ConfigError(f"'{name}' names {part} twice", "each class takes one type")
        found[part] = kind
    return Parts(base, tuple((part, found[part]) for part in CLASSES if part in found))


def canonical(name: str) -> str:
    """The one spelling of a quantization or mix: overrides in the order of CLASSES. Raises as `parts`."""
    return parts(name).name


def is_mix(name: str) -> bool:
    """Whether the name gives some classes types of their own; it need not be a good one."""
    return "+" in name


def tensor_class(name: str) -> str | None:
    """Class of a matrix by its GGUF name; None for what no mix overrides, biases and norms among it."""
    stem, _, kind = name.rpartition(".")
    return _CLASS_OF.get(stem.rpartition(".")[2]) if kind == "weight" else None


def check_quantization(name: str) -> tuple[int, str]:
    """(llama ftype number, default tensor type), of a mix those of its base. Raises as `parts`."""
    return QUANTIZATIONS[parts(name).base]


def block_size(quantization: str) -> int:
    """Elements that a row of a layer's matrix must be a multiple of to keep the type it is meant to get."""
    found = parts(quantization)
    own = dict(found.overrides)
    default = QUANTIZATIONS[found.base][1]
    return max(TYPES[own.get(part, default)].block for part in ("attention", "ffn"))


def ggml_dims(shape: Sequence[int]) -> tuple[int, ...]:
    """Torch shape to GGUF order (row length first), without trailing ones."""
    dims = list(reversed(shape))
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def tensor_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of one tensor, [rows…, columns], without padding."""
    return TYPES[type_name].row_bytes(shape[-1]) * math.prod(shape[:-1])


def relative_error(type_name: str) -> float:
    """Expected squared error of a matrix of Gaussian weights in this type, over its squared weights.

    Real weights have longer tails, an importance matrix moves errors to where they cost less: take it for the
    order of the types and their rough distance. Raises ConfigError for a type that was not measured.
    """
    if type_name not in RELATIVE_ERRORS:
        raise ConfigError(
            f"no error is known for type '{type_name}'{suggest(type_name, RELATIVE_ERRORS)}",
            f"known: {', '.join(RELATIVE_ERRORS)}",
        )
    return RELATIVE_ERRORS[type_name]


def may_quantize(name: str, shape: Sequence[int]) -> bool:
    """Only matrices named '….weight' that are no norms change their type."""
    return len(ggml_dims(shape)) >= 2 and name.endswith("weight") and not name.endswith("_norm.weight")


def _more_bits(i: int, n: int) -> bool:
    # the first and last eighth, and every third layer between them
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _attn_v(quantization: str, default: str, i: int, n: int, n_gqa: int, is_70b: bool) -> str:
    chosen = default
    if quantization == "Q3_K_M":
        chosen = "Q5_K" if i < 2 else "Q4_K"
    elif quantization in ("IQ4_NL", "IQ4_XS"):
        chosen = "Q5_K" if n_gqa >= 4 else default
    elif quantization in ("Q4_K_M", "Q5_K_M"):
        chosen = "Q6_K" if _more_bits(i, n) else default
    elif quantization == "Q4_K_S":
        chosen = "Q5_K" if i < 4 else default
    return "Q5_K" if is_70b and chosen in ("Q3_K", "Q4_K") else chosen


def _ffn_down(quantization: str, default: str, i: int, n: int, has_imatrix: bool) -> str:
    early = i < n // 8
    if quantization == "Q3_K_M":
        return "Q5_K" if i < n // 16 else "Q4_K"
    if quantization in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(i, n) else default
    if quantization == "Q4_K_S":
        return "Q5_K" if early else default
    if quantization in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if early and not has_imatrix else default
    if quantization in ("Q4_0", "Q5_0") and early and has_imatrix:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[quantization]
    return default


def _output(default: str, columns: int) -> str:
    if columns % TYPES[default].block:
        return "Q8_0"
    return default if default == "Q8_0" else "Q6_K"


def fit(type_name: str, columns: int) -> str:
    """The type itself, or what takes its place when rows do not fill whole blocks."""
    if columns % TYPES[type_name].block == 0:
        return type_name
    smaller = _FALLBACK.get(type_name, type_name)
    return smaller if columns % TYPES[smaller].block == 0 else "F16"


def choose_types(
    quantization: str,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    *,
    n_layers: int,
    n_gqa: int,
    has_imatrix: bool,
    is_70b: bool = False,
) -> dict[str, str]:
    """Type of every tensor of a llama-like model.

    Args:
        quantization: name of one, or a mix.
        tensors: (GGUF name, torch shape), any order.
        n_layers: block_count of the file; the rules count layers by it.
        n_gqa: query heads per KV head of layer 0, which is the one llama.cpp looks at.
        is_70b: llama.cpp takes the model for Llama 70B and gives its small V matrices more bits.
    """
    found = parts(quantization)
    quantization, own = found.base, dict(found.overrides)
    default = QUANTIZATIONS[quantization][1]
    floats = quantization in FLOATS
    names = [name for name, _ in tensors]
    tied = "output.weight" not in names
    # a fused matrix counts as the V that it holds
    wide_v = {n: i for i, n in enumerate(_by_layer(names, (".attn_v.weight", ".attn_qkv.weight")))}
    down = {n: i for i, n in enumerate(_by_layer(names, ".ffn_down.weight"))}
    out: dict[str, str] = {}
    for name, shape in tensors:
        if not may_quantize(name, shape):
            out[name] = "F32"
        elif floats:
            out[name] = default
        else:
            part = tensor_class(name) or ""
            if part in own:
                chosen = own[part]
            elif name == "output.weight" or (tied and name == "token_embd.weight"):
                chosen = _output(default, shape[-1])
            elif name in wide_v:
                chosen = _attn_v(quantization, default, wide_v[name], len(wide_v), n_gqa, is_70b)
            elif name in down:
                chosen = _ffn_down(quantization, default, down[name], n_layers, has_imatrix)
            elif quantization == "Q3_K_M" and name.endswith(".attn_output.weight"):
                chosen = "Q4_K"
            else:
                chosen = default
            out[name] = fit(chosen, shape[-1])
    return out


def _by_layer(names: Sequence[str], suffix: str | tuple[str, ...]) -> list[str]:
    return sorted((n for n in names if n.endswith(suffix)), key=lambda n: int(n.split(".")[1]))


def quantize_overrides(types: Mapping[str, str]) -> list[tuple[str, int]]:
    """(anchored pattern, ggml type number) for every matrix, as llama_model_quantize takes them."""
    return [(f"^{re.escape(name)}$", TYPES[type_name].id) for name, type_name in types.items()]
