"""Peak memory of llama.cpp on a CPU, predicted term by term.

    peak = weights + copies + KV cache + compute buffer + tokenizer + fixed

It is the growth of a fresh process's peak resident size (VmHWM) from just before the model is opened
until its whole context is filled, so reserved memory that is never touched does not count. The
constants were fitted with `benchmarks/memory.py`, whose results say how far off the prediction is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeprune.errors import ConfigError
from edgeprune.records import LaunchFlags, MemoryParts, ModelDims
from edgeprune.registry import suggest

# bytes per element; a quantized block holds 32 elements and their scales
KV_ELEMENT_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

# code pages of the library, an empty graph and the scheduler's tables
_FIXED_BYTES = 4.0e6
# graph nodes and tensor headers of one layer
_LAYER_BYTES = 0.11e6
# cell tables of the cache, and the batch that carries the prompt
_CONTEXT_TOKEN_BYTES = 290
# the token table, and one row of logits in the graph and one outside
_VOCAB_BYTES = 51
# look-up tables of a tokenizer per token (merges included), and its character tables
_TOKENIZER_TOKEN_BYTES = {"bpe": 230, "spm": 110, "none": 0}
_TOKENIZER_FIXED_BYTES = {"bpe": 2.9e6, "spm": 0.9e6, "none": 0.0}

# type -> rows must be a multiple of this, per instruction set; from ggml's CPU repacking rules
_REPACK = {
    "avx2": {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8},
    "avx512": {"Q2_K": 8},
    "dotprod": {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "Q8_0": 4},
    "i8mm": {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "Q8_0": 4},
}


def repacked_types(isa: Iterable[str]) -> dict[str, int]:
    """Types that llama.cpp copies into another layout on such a CPU, and the row multiple it needs.

    `isa` names as in a target file, upper or lower case; a CPU without any of them repacks nothing.
    """
    known = {name.lower() for name in isa}
    out: dict[str, int] = {}
    for feature, kinds in _REPACK.items():
        if feature in known or (feature == "avx512" and "avx512f" in known):
            for kind, multiple in kinds.items():
                out[kind] = min(multiple, out.get(kind, multiple))
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a GGUF file: its name, ggml type ('Q4_0'), [rows, columns] and bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Repacked:
    """Bytes of a file's tensors that are held in another layout."""

    copied_bytes: int  # all such copies; with mmap they lie beside the mapped file
    tied_bytes: int  # the part that is a second copy even without mmap: the tied output


def repacked(tensors: Sequence[StoredTensor], isa: Iterable[str]) -> Repacked:
    """Work out which weights a CPU with these instructions repacks.

    Only matrices are repacked, and the embedding only where it is the output too (no `output.weight`):
    rows are looked up in the original, the product uses the copy.
    """
    kinds = repacked_types(isa)
    tied = all(t.name != "output.weight" for t in tensors)
    copied = twice = 0
    for tensor in tensors:
        multiple = kinds.get(tensor.type)
        if multiple is None or len(tensor.shape) != 2 or tensor.shape[0] % multiple:
            continue
        if tensor.name == "token_embd.weight":
            if not tied:
                continue
            twice += tensor.bytes
        copied += tensor.bytes
    return Repacked(copied_bytes=copied, tied_bytes=twice)


def kv_bytes(dims: ModelDims, context: int, kv_type: str) -> int:
    """Bytes of the KV cache: sum over layers of 2 * context * n_kv * head_dim * bytes per element."""
    if kv_type not in KV_ELEMENT_BYTES:
        raise ConfigError(
            f"unknown KV cache type '{kv_type}'{suggest(kv_type, KV_ELEMENT_BYTES)}",
            f"known: {', '.join(KV_ELEMENT_BYTES)}",
        )
    heads = sum(layer.n_kv_heads for layer in dims.layers)
    return round(2 * context * heads * dims.head_dim * KV_ELEMENT_BYTES[kv_type])


def compute_bytes(dims: ModelDims, flags: LaunchFlags) -> int:
    """Bytes of intermediate results that are alive together, for a micro-batch of u tokens.

    Two moments compete, in the layer where each is largest: behind the FFN's products (gate, up, their
    product in float32 and its 2-byte form: 14 bytes a channel, with the residual and its norm), and in
    attention (residual, q before and after rotation, output; k and v). Beside either lies the mask, two
    bytes per micro-batch token and context token. The last layer's FFN sees one token only.
    Without flash attention the scores of all heads come on top, in float32 and their 2-byte form.
    """
    u = min(flags.ubatch, flags.context_tokens)
    hidden, head = dims.hidden, dims.head_dim
    ffn = max((14 * layer.n_ff + 8 * hidden for layer in dims.layers[:-1]), default=0)
    attention = max(
        (
            4 * (hidden + 3 * layer.n_heads * head + 2 * layer.n_kv_heads * head)
            for layer in dims.layers
            if layer.n_heads
        ),
        default=0,
    )
    mask = 2 * flags.context_tokens
    scores = 0
    if not flags.flash_attention:
        scores = 6 * flags.context_tokens * max((layer.n_heads for layer in dims.layers), default=0)
    return u * (max(ffn, attention + scores) + mask)


def predict_parts(
    dims: ModelDims,
    *,
    weight_bytes: int,
    flags: LaunchFlags,
    repacked: Repacked | None = None,
    tokenizer: str = "bpe",
    overhead_bytes: int = 0,
) -> MemoryParts:
    """Terms of a llama.cpp process's peak with its whole context filled, as `VmHWM` shows it on a CPU.

    `weight_bytes` are all tensors of the file. `repacked` says which of them this CPU copies: with mmap
    the copies come on top of the mapped file; without mmap only the tied output exists twice.
    `tokenizer` is bpe, spm or none. `overhead_bytes` is the target's own, e.g. a CUDA context.
    """
    copies = 0
    if repacked is not None:
        copies = repacked.copied_bytes if flags.mmap else repacked.tied_bytes
    runtime = (
        _FIXED_BYTES
        + _LAYER_BYTES * len(dims.layers)
        + _CONTEXT_TOKEN_BYTES * flags.context_tokens
        + (_VOCAB_BYTES + _TOKENIZER_TOKEN_BYTES[tokenizer]) * dims.vocab
        + _TOKENIZER_FIXED_BYTES[tokenizer]
    )
    return MemoryParts(
        weights_bytes=weight_bytes,
        copies_bytes=copies,
        kv_bytes=kv_bytes(dims, flags.context_tokens, flags.kv_type),
        compute_bytes=compute_bytes(dims, flags),
        runtime_bytes=round(runtime),
        target_bytes=overhead_bytes,
    )


def total(parts: MemoryParts) -> int:
    """The peak that the parts add up to."""
    return (
        parts.weights_bytes
        + parts.copies_bytes
        + parts.kv_bytes
        + parts.compute_bytes
        + parts.runtime_bytes
        + parts.target_bytes
    )


def predict_peak_memory(
    dims: ModelDims,
    *,
    weight_bytes: int,
    flags: LaunchFlags,
    repacked: Repacked | None = None,
    tokenizer: str = "bpe",
    overhead_bytes: int = 0,
) -> int:
    """Peak bytes: the sum of `predict_parts`."""
    return total(
        predict_parts(
            dims,
            weight_bytes=weight_bytes,
            flags=flags,
            repacked=repacked,
            tokenizer=tokenizer,
            overhead_bytes=overhead_bytes,
        )
    )
