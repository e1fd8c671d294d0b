"""The limits of one run: for each the stricter of target, profile and command line, with its origin."""

from __future__ import annotations

import math

from edgeprune import records
from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target
from edgeprune.errors import ConfigError
from edgeprune.records import Budget, DeviceTarget, Limit, Profile

COMMAND_LINE = "command line"


def load_inputs(
    target: str, profile: str, *, memory_bytes: int | None = None
) -> tuple[DeviceTarget, str | None, Profile]:
    """Load target and profile; raises one ConfigError with the problems of both files.

    The sentence is `load_target`'s: which member of a family was taken.
    """
    problems: list[str] = []
    hints: list[str] = []
    device: tuple[DeviceTarget, str | None] | None = None
    use: Profile | None = None
    try:
        device = load_target(target, memory_bytes=memory_bytes)
    except ConfigError as error:
        problems += error.problems
        hints += [error.hint] if error.hint else []
    try:
        use = load_profile(profile)
    except ConfigError as error:
        problems += error.problems
        hints += [error.hint] if error.hint else []
    if device is None or use is None:
        raise ConfigError(problems, "; ".join(hints) or None)
    return device[0], device[1], use


def resolve_budget(
    target: DeviceTarget,
    profile: Profile,
    *,
    memory_bytes: int | None = None,
    file_bytes: int | None = None,
    decode_tps: float | None = None,
    first_token_ms: float | None = None,
    kl: float | None = None,
) -> Budget:
    """Resolve every limit; the keyword arguments are the command line's. On a tie the user's is named.

    Raises ConfigError listing every limit given that is not a positive number.
    """
    given = {
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "decode_tps": decode_tps,
        "first_token_ms": first_token_ms,
        "kl": kl,
    }
    options = {
        "memory_bytes": "--budget",
        "file_bytes": "--max-file",
        "decode_tps": "--min-tps",
        "kl": "--max-kl",
    }
    problems = [
        f"{options.get(name, name)} must be a positive number, not {value}"
        for name, value in given.items()
        if value is not None and not (math.isfinite(value) and value > 0)
    ]
    if problems:
        raise ConfigError(problems)
    from_target = f"target {target.name}"
    from_profile = f"profile {profile.name}"
    memory = _stricter("bytes", "most", (memory_bytes, COMMAND_LINE), (target.usable_bytes, from_target))
    assert memory is not None
    limits = {
        "memory_bytes": memory,
        "file_bytes": _stricter("bytes", "most", (file_bytes, COMMAND_LINE)),
        "decode_tps": _stricter(
            "tokens/s", "least", (decode_tps, COMMAND_LINE), (profile.min_decode_tps, from_profile)
        ),
        "first_token_ms": _stricter(
            "ms", "most", (first_token_ms, COMMAND_LINE), (profile.max_first_token_ms, from_profile)
        ),
        "kl": _stricter("nats/token", "most", (kl, COMMAND_LINE), (profile.max_kl, from_profile)),
    }
    key = records.make_key("budget", records.to_plain(limits))
    return Budget(
        memory_bytes=memory,
        file_bytes=limits["file_bytes"],
        decode_tps=limits["decode_tps"],
        first_token_ms=limits["first_token_ms"],
        kl=limits["kl"],
        key=key,
    )


def _stricter(unit: str, at: str, *offers: tuple[float | None, str]) -> Limit | None:
    known = [(float(v), source) for v, source in offers if v is not None]
    if not known:
        return None
    pick = max if at == "least" else min
    value, source = pick(known, key=lambda offer: offer[0])
    return Limit(value=value, unit=unit, source=source)
