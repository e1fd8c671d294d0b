"""Strict parsing and printing of quantities. GB is 10^9 bytes, GiB is 2^30."""

from __future__ import annotations

import re

from edgeprune.errors import ConfigError

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", re.ASCII)


def parse_bytes(text: str, *, what: str = "size") -> int:
    """Read '6GB' or '512 MiB' as bytes. Raises ConfigError on anything ambiguous ('6G', '6', '6gb')."""
    match = _QUANTITY.fullmatch(text)
    shown = text if len(text) <= 40 else text[:37] + "…"
    if match is None:
        raise ConfigError(
            f"{what} '{shown}' is not a number followed by a unit",
            f"write it like 200MB or 1.5GiB; units: {', '.join(BYTE_UNITS)}",
        )
    number, unit = match.groups()
    if unit not in BYTE_UNITS:
        same = [u for u in BYTE_UNITS if u.lower() == unit.lower() or u.lower() == unit.lower() + "b"]
        guess = f"did you mean {' or '.join(number + u for u in same)}? " if same else ""
        raise ConfigError(
            f"{what} '{shown}' has unknown unit '{unit}'", f"{guess}units: {', '.join(BYTE_UNITS)}"
        )
    value = float(number) * BYTE_UNITS[unit]
    if value < 1:
        raise ConfigError(f"{what} '{shown}' must be at least one byte", "give a positive size")
    if value > 2**60:
        raise ConfigError(f"{what} '{shown}' is beyond any device", "check the unit")
    return round(value)


def format_bytes(n: int | float) -> str:
    """Print bytes in decimal units with three digits: 143 MB, 6.00 GB."""
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            if unit == "B":
                return f"{value:.0f} B"
            digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Print a duration as '42 s', '3 min 05 s' or '2 h 10 min'."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"
