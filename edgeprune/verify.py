"""Compare an exported file's logits with torch's on the same tokens. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# F16 weights make llama.cpp round activations to F16 too; torch's top two tokens may be closer than that
NOISE_LOGITS = 0.05
MOST_KL = 1e-3  # nats per token, F16 and F32 files


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    tokens: int
    kl: float  # nats per token, torch || file
    max_abs_diff: float
    same_argmax: int
    explained_argmax: int  # differing positions where torch's top two are within NOISE_LOGITS
    not_finite: int = 0  # positions with NaN or infinite logits; no other figure counts them

    def failure(self, *, exact: bool) -> str | None:
        """Why the file cannot be trusted, or None. `exact` for F16 and F32; others only report their KL."""
        if self.not_finite:
            return (
                f"the exported file gives logits that are not finite at {self.not_finite} of "
                f"{self.tokens} positions"
            )
        if not exact:
            return None
        if self.kl > MOST_KL:
            return (
                f"the exported file differs from torch: KL {self.kl:.2e} nats per token, limit {MOST_KL:.0e}"
            )
        wrong = self.tokens - self.same_argmax - self.explained_argmax
        if wrong:
            return (
                f"the exported file predicts another token than torch at {wrong} of {self.tokens} positions"
            )
        return None


def compare(torch_logits: np.ndarray, file_logits: np.ndarray) -> Comparison:
    """Both [tokens, vocab]; rows are handled one by one to bound memory. Raises ValueError on shapes."""
    if torch_logits.shape != file_logits.shape:
        raise ValueError(f"logits have shapes {torch_logits.shape} and {file_logits.shape}")
    kl, worst, same, explained, broken = 0.0, 0.0, 0, 0, 0
    for expected, found in zip(torch_logits, file_logits, strict=True):
        p = expected.astype(np.float64)
        q = found.astype(np.float64)
        if not (np.isfinite(p).all() and np.isfinite(q).all()):
            broken += 1
            continue
        worst = max(worst, float(np.abs(p - q).max()))
        log_p = p - p.max()
        log_p -= np.log(np.exp(log_p).sum())
        log_q = q - q.max()
        log_q -= np.log(np.exp(log_q).sum())
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        top, other = int(p.argmax()), int(q.argmax())
        if top == other:
            same += 1
        elif p[top] - p[other] < NOISE_LOGITS:
            explained += 1
    n = len(torch_logits)
    return Comparison(
        tokens=n,
        kl=max(0.0, kl / max(n - broken, 1)),
        max_abs_diff=worst,
        same_argmax=same,
        explained_argmax=explained,
        not_finite=broken,
    )
