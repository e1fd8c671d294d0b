"""Quantized groups that are tuned without leaving their type: the arithmetic behind method `group`.

A block of 32 columns of one row decodes to d * q + m: d and m are half floats, q an integer of 4 or 5 bits.
d * q has at most 16 significant bits, so float32 holds it exactly and only the sum is rounded: every decoder
gives the same values, with fused multiply-add or without.

The scheme (pooled input, adapter merged into the minima) is QA-LoRA's, arXiv:2309.14717. SAAP
(arXiv:2412.15127) is told to quantize and tune groups of columns on their own; that this is the same scheme
is our reconstruction. Half rounding inside the forward pass, least squares and trained scales are ours.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgeprune import registry
from edgeprune.costs import gguf_types
from edgeprune.errors import ConfigError, StageError

GROUP = 32  # columns; a block of the file
BITS: Mapping[str, int] = {"Q4_1": 4, "Q5_1": 5}  # the types whose blocks have a minimum of their own
INITS = ("minmax", "least-squares")

_CHUNK = 1 << 22  # elements worked on at once
_SHRINKS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)  # share of the range that a first guess leaves out
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Quantized:
    """One matrix in groups. `scale` and `minimum` are float32 [out, K] and hold half floats exactly."""

    type: str
    codes: torch.Tensor  # uint8 [out, K, 32]
    scale: torch.Tensor
    minimum: torch.Tensor

    def values(self) -> torch.Tensor:
        """What the file decodes to, float32 [out, in]."""
        return decode(self.codes, self.scale, self.minimum)


def decode(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of codes [out, K, 32] with d and m [out, K]."""
    return (codes.to(scale.dtype) * scale[..., None] + minimum[..., None]).flatten(1)


def check_type(quantization: str | None) -> None:
    """Raises ConfigError for an export type whose blocks have no minima, or none at all."""
    if quantization is None:
        raise ConfigError(
            "recovery method 'group' tunes quantized weights and wants to know the export type",
            f"name it with --quantization {' or '.join(BITS)}",
        )
    if gguf_types.is_mix(quantization):
        raise ConfigError(
            f"recovery method 'group' tunes one type, and {gguf_types.canonical(quantization)} is a mix",
            f"use it with {' or '.join(BITS)} alone, or choose another --recovery method",
        )
    default = gguf_types.check_quantization(quantization)[1]
    if default not in BITS:
        raise ConfigError(
            f"recovery method 'group' cannot tune {quantization}: its blocks have no minimum of their own",
            f"use it with {' or '.join(BITS)}, or choose another --recovery method",
        )


# ---------------------------------------------------------------- importance


def input_squares(model: nn.Module, tokens: np.ndarray, *, half_precision: bool) -> dict[str, torch.Tensor]:
    """Mean squared input of every column of every Linear, float32 [in] by weight name, on tokens [N, T]."""
    sums: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().to(torch.float32).flatten(0, -2)
            found = x.square().sum(0)
            sums[name] = sums[name] + found if name in sums else found

        return hook

    handles = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half_precision):
            for row in tokens:
                model(torch.from_numpy(row.astype(np.int64))[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (value / tokens.size).cpu() for name, value in sums.items()}


# ---------------------------------------------------------------- quantizing


def quantize(
    weight: torch.Tensor,
    type_name: str,
    *,
    init: str = "least-squares",
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> Quantized:
    """Quantize a matrix [out, in] by groups; in must be a multiple of 32.

    Args:
        init: 'minmax': d = (max - min) / (2^b - 1) and m = min; 'least-squares': the d and m with the least
            squared error among a few starts, never worse than 'minmax'.
        importance: weight of each column's error, [in]; least squares only. Larger weights then count more.

    Raises StageError for values that are not finite or beyond half floats.
    """
    if init not in INITS:
        raise ConfigError(f"unknown init '{init}'", f"known: {', '.join(INITS)}")
    columns = weight.shape[1]
    if columns % GROUP:
        raise StageError(f"{name}: rows of {columns} do not fill groups of {GROUP}")
    levels = (1 << BITS[type_name]) - 1
    per = None
    if importance is not None:
        per = importance.to(device=weight.device, dtype=torch.float32).reshape(-1, GROUP)
        # a group whose inputs were never seen counts evenly
        per = torch.where(per.sum(-1, keepdim=True) > 0, per, torch.ones_like(per))
        per = per / per.mean(-1, keepdim=True)
    parts = []
    for chunk in weight.detach().split(max(1, _CHUNK // columns)):
        values = chunk.to(torch.float32).unflatten(1, (columns // GROUP, GROUP))
        if not bool(torch.isfinite(values).all()):
            raise StageError(f"tensor {name} holds values that are not finite")
        found = _min_max(values, levels)
        if not bool(torch.isfinite(found[1]).all() and torch.isfinite(found[2]).all()):
            largest = float(values.abs().max())
            raise StageError(f"tensor {name} holds {largest:.3g}, beyond the half floats of {type_name}")
        if init == "least-squares":
            found = _least_squares(values, levels, error_weights(values, per), found)
        parts.append(found)
    codes, scale, minimum = (torch.cat(column) for column in zip(*parts, strict=True))
    return Quantized(type_name, codes.to(torch.uint8), scale, minimum)


_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _min_max(values: torch.Tensor, levels: int) -> _Found:
    low, high = values.amin(-1), values.amax(-1)
    scale, minimum = half((high - low) / levels), half(low)
    return _codes(values, scale, minimum, levels), scale, minimum


def _codes(values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int) -> torch.Tensor:
    """The nearest codes for rounded d and m, as floats; 0 where d is 0."""
    inverse = torch.where(scale != 0, 1 / scale, 0)
    return ((values - minimum[..., None]) * inverse[..., None]).round_().clamp_(0, levels)


def error_weights(values: torch.Tensor, per: torch.Tensor | None) -> torch.Tensor:
    """What the squared error of each value counts; `per` is the importance of the columns, [K, 32]."""
    if per is None:
        return torch.ones_like(values)
    # large weights count more, as in llama.cpp's own choice with an importance matrix
    return per * (values.square() + values.square().mean((-1, -2), keepdim=True)).sqrt()


def _least_squares(values: torch.Tensor, levels: int, weight: torch.Tensor, start: _Found) -> _Found:
    """Alternate codes and the closed form of d and m from several starts; the best rounded one per group."""
    total = weight.sum(-1)
    best = start
    least = _error(values, weight, start)
    low, high = values.amin(-1), values.amax(-1)
    for shrink in _SHRINKS:
        scale = (high - low) * (1 - shrink) / levels
        minimum = low + (high - low) * (shrink / 2)
        for _ in range(_ROUNDS):
            codes = _codes(values, scale, minimum, levels)
            # weighted regression of the values on their codes
            mean_q, mean_v = (codes * weight).sum(-1) / total, (values * weight).sum(-1) / total
            centred = (codes - mean_q[..., None]) * weight
            spread = (centred * codes).sum(-1)
            slope = (centred * values).sum(-1) / spread
            scale = torch.where(spread > 0, slope, scale)
            minimum = mean_v - scale * mean_q
        rounded = half(scale), half(minimum)
        tried = (_codes(values, *rounded, levels), *rounded)
        error = _error(values, weight, tried)
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better[..., None], tried[0], best[0]),
            torch.where(better, tried[1], best[1]),
            torch.where(better, tried[2], best[2]),
        )
    return best


def _error(values: torch.Tensor, weight: torch.Tensor, found: _Found) -> torch.Tensor:
    codes, scale, minimum = found
    off = codes * scale[..., None] + minimum[..., None] - values
    return (off.square_() * weight).sum(-1)


def half(value: torch.Tensor) -> torch.Tensor:
    """Round to half floats, ties to even, and keep the type."""
    return value.to(torch.float16).to(value.dtype)


class _HalfStraight(torch.autograd.Function):
    """Rounds to half floats on the way forward; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return half(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


# ---------------------------------------------------------------- blocks of the file


def pack(quantized: Quantized) -> np.ndarray:
    """The rows of a GGUF tensor, uint8 [out, K * bytes per block]."""
    codes = quantized.codes.cpu().numpy()
    parts = [_half_bytes(quantized.scale), _half_bytes(quantized.minimum)]
    if BITS[quantized.type] == 5:
        parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
    low, high = codes[..., :16] & 15, codes[..., 16:] & 15
    parts.append(low | (high << 4))
    out: np.ndarray = np.concatenate(parts, axis=-1)
    assert out.shape[-1] == gguf_types.TYPES[quantized.type].block_bytes
    return out.reshape(codes.shape[0], -1)


def _half_bytes(value: torch.Tensor) -> np.ndarray:
    exact = value.cpu().numpy().astype("<f2")
    return exact.view(np.uint8).reshape(*exact.shape, 2)


def unpack(raw: np.ndarray, type_name: str) -> Quantized:
    """Undo `pack`."""
    blocks = raw.reshape(raw.shape[0], -1, gguf_types.TYPES[type_name].block_bytes)
    scale, minimum = (
        np.ascontiguousarray(blocks[..., i : i + 2]).view("<f2")[..., 0].astype(np.float32) for i in (0, 2)
    )
    nibbles = blocks[..., -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    if BITS[type_name] == 5:
        codes |= np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little") << 4
    made = (torch.from_numpy(np.ascontiguousarray(a)) for a in (codes, scale, minimum))
    return Quantized(type_name, *made)


def as_stored(weight: torch.Tensor, type_name: str, *, name: str = "weight") -> tuple[np.ndarray, np.ndarray]:
    """A matrix that is not tuned, as the file will hold it: (its rows as bytes, the values they decode to).

    For float types the bytes are the values. Raises StageError for values beyond the type.
    """
    values = np.ascontiguousarray(weight.detach().to(torch.float32).cpu().numpy())
    if not np.isfinite(values).all():
        raise StageError(f"tensor {name} holds values that are not finite")
    library = registry.library("gguf", "gguf")
    kind = library.GGMLQuantizationType[type_name]
    with np.errstate(over="ignore"):
        try:
            raw = library.quants.quantize(values, kind)
        except NotImplementedError:
            raw = _quantize_by_ggml(values, type_name)
    decoded = np.asarray(library.quants.dequantize(raw, kind), np.float32).reshape(values.shape)
    if not np.isfinite(decoded).all():
        raise StageError(f"tensor {name} holds {np.abs(values).max():.3g}, beyond {type_name}")
    return raw.view(np.uint8).reshape(values.shape[0], -1), decoded


def _quantize_by_ggml(values: np.ndarray, type_name: str) -> np.ndarray:
    """Types that only the runtime itself can write (K-quants)."""
    call = registry.library("llama_cpp._ggml", "gguf").libggml.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer = ctypes.POINTER(ctypes.c_float)
    call.argtypes = [ctypes.c_int, pointer, ctypes.c_void_p, *[ctypes.c_int64] * 3, pointer]
    kind = gguf_types.TYPES[type_name]
    rows, columns = values.shape
    out = np.empty((rows, kind.row_bytes(columns)), np.uint8)
    written = call(kind.id, values.ctypes.data_as(pointer), out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise StageError(f"ggml wrote {written} bytes of {type_name}, expected {out.nbytes}")
    return out


# ---------------------------------------------------------------- adapter


class GroupLinear(nn.Module):
    """A quantized Linear whose minima, and with `scales` its scales, are trained.

    With rank r: y = Wq x + s B A x̄, x̄ the mean of x over each group, A [r, K], B [out, r], B starts at 0.
    Merging adds s (BA) / 32 to the minima. With rank 0 the minima are trained one by one, in steps of d.
    Minima are rounded to half floats already here (the gradient ignores it), so merging changes nothing.
    """

    def __init__(
        self,
        linear: nn.Linear,
        quantized: Quantized,
        *,
        rank: int,
        alpha: float,
        scales: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        rows, groups = quantized.scale.shape
        like = linear.weight
        self.type = quantized.type
        self.rank = min(rank, rows, groups)
        self.scaling = alpha / self.rank if self.rank else 1.0
        self.bias = linear.bias
        # no buffers: several processes would send those to each other before every step
        self.codes, self.scale, self.minimum = quantized.codes, quantized.scale, quantized.minimum
        self.weight = None if scales else quantized.values().to(like.dtype)
        if self.rank:
            first = torch.randn(self.rank, groups, generator=generator) / math.sqrt(groups)
            self.a = nn.Parameter(first.to(like.device))
            self.b = nn.Parameter(torch.zeros(rows, self.rank, device=like.device))
        else:
            self.steps = nn.Parameter(torch.zeros(rows, groups, device=like.device))
        self.stretch = nn.Parameter(torch.zeros(rows, groups, device=like.device)) if scales else None

    def _apply(self, fn: Any, recurse: bool = True) -> GroupLinear:
        super()._apply(fn, recurse)
        self.codes, self.scale, self.minimum = fn(self.codes), fn(self.scale), fn(self.minimum)
        self.weight = None if self.weight is None else fn(self.weight)
        return self

    def minima(self) -> torch.Tensor:
        """The minima as they would be merged now, [out, K], half floats."""
        if not self.rank:
            return _HalfStraight.apply(self.minimum + self.scale * self.steps)
        # a product in bfloat16 would not be what is merged
        with torch.autocast(self.b.device.type, enabled=False):
            return _HalfStraight.apply(self.minimum + self.scaling / GROUP * (self.b @ self.a))

    def scales(self) -> torch.Tensor:
        """The scales as they would be merged now, [out, K], half floats."""
        if self.stretch is None:
            return self.scale
        return _HalfStraight.apply(self.scale * (1 + self.stretch))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stretch is not None:
            values = decode(self.codes, self.scales(), self.minima())
            return F.linear(x, values.to(x.dtype), self.bias)
        pooled = x.unflatten(-1, (-1, GROUP)).sum(-1)
        shift = self.minima() - self.minimum
        return F.linear(x, self.weight, self.bias) + F.linear(pooled, shift.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> Quantized:
        """The tuned matrix: the same codes with the new minima (and scales)."""
        scale, minimum = self.scales().detach(), self.minima().detach()
        if not bool(torch.isfinite(scale).all() and torch.isfinite(minimum).all()):
            raise StageError("group tuning left the range of half floats", "lower the learning rate")
        return Quantized(self.type, self.codes, scale, minimum)
