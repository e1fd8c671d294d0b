"""Decode and prefill speed from a device's speed model; always a value with an interval.

Decoding reads every weight once per token, so for each token

    t = read_bytes / bandwidth + kv_bytes(context) / bandwidth + layers * layer_time

and prefill is bound by arithmetic: two operations per parameter and token.
"""

from __future__ import annotations

from edgeprune.costs.memory import kv_bytes
from edgeprune.records import LaunchFlags, ModelDims, SpeedModel


def predict_decode(
    dims: ModelDims,
    *,
    read_bytes: int,
    flags: LaunchFlags,
    context_tokens: int,
    speed: SpeedModel,
    type_factor: float = 1.0,
) -> tuple[float, float, float]:
    """Decode tokens per second with its 80% interval: (value, low, high).

    `read_bytes` are all tensors of the file less `token_embd` when the head is untied. `context_tokens`
    is how full the cache is. `type_factor` is the share of the bandwidth that this quantization reaches
    on this device (1 unless it was measured): fewer bits are not always faster.
    """
    cache = kv_bytes(dims, context_tokens, flags.kv_type)
    bandwidth = speed.bandwidth_bytes_per_s
    ns = 1e9 * (read_bytes / (bandwidth * type_factor) + cache / bandwidth) + speed.layer_ns * len(
        dims.layers
    )
    return _band(1e9 / ns, speed.relative_error)


def predict_prefill(
    *, params: int, speed: SpeedModel, lookup_params: int = 0
) -> tuple[float, float, float] | None:
    """Prefill tokens per second with its interval, or None when the device's arithmetic rate is unknown.

    `params` are all parameters; `lookup_params` those that are only looked up (an untied embedding).
    The output head is counted although only the last token of a prompt needs it: a cautious figure.
    """
    if speed.compute_flops is None:
        return None
    return _band(speed.compute_flops / (2 * (params - lookup_params)), speed.relative_error)


def first_token_ms(prompt_tokens: int, prefill_tps: float, decode_tps: float) -> float:
    """Milliseconds until the first new token: the prompt, then one decode step."""
    return 1e3 * (prompt_tokens / prefill_tps + 1 / decode_tps)


def _band(value: float, relative_error: float) -> tuple[float, float, float]:
    # the error of a speed model is one of the speed itself; a rate cannot fall to zero
    return value, value * max(0.05, 1 - relative_error), value * (1 + relative_error)
