"""Block quantization in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

import numpy as np

BLOCK = 32
# elements handled at once: the temporaries then stay in a core's cache
_CHUNK = 1 << 18
# relative changes of a block's scale that are tried; more brings nothing that can be measured
_TRIES = (-0.1, -0.05, 0.05, 0.1)


def n_blocks(columns: int) -> int:
    """Blocks of a row; the last one is filled up with zeros."""
    return -(-columns // BLOCK)


def packed_bytes(shape: tuple[int, int], bits: int) -> int:
    """Bytes of the packed values of a matrix [rows, columns]."""
    return shape[0] * n_blocks(shape[1]) * BLOCK * bits // 8


def quantize(
    matrix: np.ndarray, bits: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix [rows, columns] to signed blocks of 32 along its rows.

    Args:
        bits: 4 or 8; values are stored with 2**(bits-1) added, two 4-bit values a byte, the first one low.
        importance: weight of the squared error per column, such as the mean squared input.

    Returns uint8 [rows, blocks, bytes of a block] and float32 scales [rows, blocks].
    """
    rows, columns = matrix.shape
    blocks = n_blocks(columns)
    packed = np.empty((rows, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    weights = None
    if importance is not None and bits == 4:
        weights = np.zeros(blocks * BLOCK, np.float32)
        weights[:columns] = importance / max(float(np.mean(importance)), 1e-30) + 1e-6
        weights = weights.reshape(1, blocks, BLOCK)
    step = max(1, _CHUNK // max(1, blocks * BLOCK))
    for start in range(0, rows, step):
        part = np.asarray(matrix[start : start + step], np.float32)
        if blocks * BLOCK != columns:
            part = np.pad(part, ((0, 0), (0, blocks * BLOCK - columns)))
        values = part.reshape(len(part), blocks, BLOCK)
        here = slice(start, start + len(part))
        if bits == 8:
            packed[here], scales[here] = _eight(values)
        else:
            packed[here], scales[here] = _four(values, weights)
    return packed, scales


def dequantize(packed: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The matrix [rows, columns] that the blocks stand for, float32."""
    if bits == 4:
        values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], BLOCK)
    else:
        values = packed
    out = (values.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return out.reshape(len(packed), -1)[:, :columns]


def _eight(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(values).max(axis=2) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    levels = np.rint(values * inverse[..., None]) + 128
    return np.clip(levels, 0, 255).astype(np.uint8), scale


def _four(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    # the value of the largest size gets the level -8, which has no positive twin
    at = np.abs(values).argmax(axis=2)
    extreme = np.take_along_axis(values, at[..., None], axis=2)[..., 0]
    scale = extreme / np.float32(-8)
    weighted = values if weights is None else values * weights
    best, best_scale, best_gain = _fit(values, weighted, weights, scale)
    for change in _TRIES:
        levels, fitted, gain = _fit(values, weighted, weights, scale * np.float32(1 + change))
        better = gain > best_gain
        best[better] = levels[better]
        best_scale = np.where(better, fitted, best_scale)
        best_gain = np.where(better, gain, best_gain)
    whole = (best + 8).astype(np.uint8)
    return whole[..., 0::2] | (whole[..., 1::2] << 4), best_scale


def _fit(
    values: np.ndarray, weighted: np.ndarray, weights: np.ndarray | None, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels at a scale, the least-squares scale for them, and by how much that reduces the squared error."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    levels = np.rint(values * inverse[..., None])
    np.clip(levels, -8, 7, out=levels)
    cross = np.einsum("rbi,rbi->rb", weighted, levels)
    size = np.einsum("rbi,rbi->rb", levels if weights is None else levels * weights, levels)
    fitted = np.divide(cross, size, out=np.zeros_like(cross), where=size > 0)
    return levels, fitted.astype(np.float32), cross * fitted
