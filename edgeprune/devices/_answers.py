"""Hold what a device answers against its form before anybody works with it: a board may lie, or be broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from edgeprune.errors import DeviceError

_MOST_TEXT = 4096
_MOST_ITEMS = 100_000

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _times(value: Any) -> bool:
    """Nanoseconds; none of them zero, or a speed would be infinite."""
    return isinstance(value, list) and len(value) <= _MOST_ITEMS and all(_whole(v) and v for v in value)


def _some_times(value: Any) -> bool:
    return _times(value) and len(value) > 0


def _table(check: Check) -> Check:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= _MOST_ITEMS
        and all(_text(k) and check(v) for k, v in value.items())
    )


def _form(fields: Mapping[str, Check]) -> Check:
    return lambda value: isinstance(value, dict) and _wrong(fields, value) is None


def _wrong(fields: Mapping[str, Check], value: Mapping[str, Any]) -> str | None:
    return next((name for name, check in fields.items() if not check(value.get(name))), None)


_ENVIRONMENT: Mapping[str, Check] = {
    "governor": _maybe(_text),
    "clocks_hz": _table(_number),
    "temperatures_c": _table(_number),
    "throttled": _maybe(_text),
    "power_mode": _maybe(_text),
    "thermal_throttle_count": _maybe(_text),
    "load_average": _number,
    "on_battery": lambda v: v is None or isinstance(v, bool),
    "busy_s": _maybe(_number),
    "boot_id": _maybe(_text),
}
_SUSTAINED: Mapping[str, Check] = {
    "tps": lambda v: isinstance(v, list) and len(v) <= _MOST_ITEMS and all(map(_number, v)),
    "seconds": _number,
    "joules": _maybe(_number),
    "meter": _maybe(_text),
    "tokens": _whole,
}
FORMS: Mapping[str, Mapping[str, Check]] = {
    "facts": {
        "board": _maybe(_text),
        "cpu": _text,
        "arch": _text,
        "flags": lambda v: isinstance(v, list) and len(v) <= _MOST_ITEMS and all(map(_text, v)),
        "threads": lambda v: _whole(v) and 0 < v <= 4096,
        "memory_bytes": _maybe(_whole),
        "available_bytes": _maybe(_whole),
        "disk_free_bytes": _whole,
        "cache_bytes": _whole,
        "boot_id": _maybe(_text),
        "power_mode": _maybe(_text),
        "llama_cpp": _maybe(_text),
        "llama_bench": _maybe(_text),
    },
    "environment": _ENVIRONMENT,
    "digest": {"bytes": _whole, "sha256": _text},
    "probe": {"bytes": _whole, "read": _table(_whole)},
    "measure": {
        "engine": _text,
        "depth": _whole,
        "engine_version": _text,
        "threads": lambda v: _whole(v) and v > 0,
        "sweep": _table(_number),
        "prefill_ns": _some_times,
        "decode_ns": _some_times,
        "first_token_ns": _times,
        "sustained": _maybe(_form(_SUSTAINED)),
        "load_ns": _whole,
        "before_bytes": _whole,
        "peak_bytes": _whole,
        "available_drop_bytes": _maybe(_whole),
        "tokens_filled": _whole,
        "n_batch": _whole,
        "model_type": _text,
        "model_bytes": _whole,
        "model_params": _whole,
        "build_commit": _text,
        "elapsed_s": _number,
        "own_s": _number,
        "before": _form(_ENVIRONMENT),
        "after": _form(_ENVIRONMENT),
    },
}


def checked(job: str, answer: Any, address: str) -> Any:
    """The `ok` of a job, unchanged. Raises DeviceError of kind 'answer' naming the field that is wrong."""
    fields = FORMS.get(job)
    if fields is None:
        return answer
    if not isinstance(answer, dict):
        raise DeviceError("answer", f"{address}: its answer to '{job}' is no table")
    wrong = _wrong(fields, answer)
    if wrong is not None:
        raise DeviceError("answer", f"{address}: '{wrong}' in its answer to '{job}' cannot be used")
    return answer
