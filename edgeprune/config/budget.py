"""The limits of one run: for each the stricter of target, profile and command line, with its origin."""

from __future__ import annotations

import math

from edgeprune import records
from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target
from edgeprune.errors import ConfigError
from edgeprune.records import Budget, DeviceTarget, Limit, Profile
from edgeprune.registry import suggest

COMMAND_LINE = "command line"
OBJECTIVES = ("quality", "speed", "size")


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
    energy_j: float | None = None,
    agreement: float | None = None,
    objective: str = "quality",
) -> Budget:
    """Resolve every limit; the keyword arguments are the command line's. On a tie the user's is named.

    Raises ConfigError listing every limit given that is not a positive number, and where the objective has
    no floor of quality to stop at.
    """
    given = {
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "decode_tps": decode_tps,
        "first_token_ms": first_token_ms,
        "kl": kl,
        "energy_j": energy_j,
        "agreement": agreement,
    }
    options = {
        "memory_bytes": "--budget",
        "file_bytes": "--max-file",
        "decode_tps": "--min-tps",
        "first_token_ms": "--max-first-token",
        "kl": "--max-kl",
        "energy_j": "--max-energy",
        "agreement": "--min-agreement",
    }
    problems = [
        f"{options[name]} must be a positive number, not {value}"
        for name, value in given.items()
        if value is not None and not (math.isfinite(value) and value > 0)
    ]
    if not problems and agreement is not None and agreement > 1:
        problems.append(
            f"--min-agreement is a share of tokens, such as 0.9, and must be at most 1, not {agreement}"
        )
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
        "energy_j": _stricter(
            "J/token", "most", (energy_j, COMMAND_LINE), (profile.max_energy_j, from_profile)
        ),
        "agreement": _stricter(
            "of tokens", "least", (agreement, COMMAND_LINE), (profile.min_agreement, from_profile)
        ),
    }
    check_objective(objective, floor=limits["kl"] is not None or limits["agreement"] is not None)
    return Budget(
        memory_bytes=memory,
        file_bytes=limits["file_bytes"],
        decode_tps=limits["decode_tps"],
        first_token_ms=limits["first_token_ms"],
        kl=limits["kl"],
        energy_j=limits["energy_j"],
        agreement=limits["agreement"],
        objective=objective,
        key=records.make_key("budget", records.to_plain(limits), objective),
    )


def check_objective(objective: str, *, floor: bool) -> None:
    """Refuse an objective that is unknown, or that would take the worst model because nothing stops it."""
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"unknown objective '{objective}'{suggest(objective, OBJECTIVES)}",
            f"known: {', '.join(OBJECTIVES)}",
        )
    if objective != "quality" and not floor:
        wins = "fastest" if objective == "speed" else "smallest"
        raise ConfigError(
            f"--objective {objective} needs a floor of quality: without one the {wins} model wins, "
            "however bad it is",
            "add --max-kl 0.2 or --min-agreement 0.75, about what Q4_0 alone costs the default model",
        )


def _stricter(unit: str, at: str, *offers: tuple[float | None, str]) -> Limit | None:
    known = [(float(v), source) for v, source in offers if v is not None]
    if not known:
        return None
    pick = max if at == "least" else min
    value, source = pick(known, key=lambda offer: offer[0])
    return Limit(value=value, unit=unit, source=source)
