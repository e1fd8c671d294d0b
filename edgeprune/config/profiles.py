"""Read `profiles/*.toml`: workload, limits and recipe of one use case, no hardware numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from edgeprune import records
from edgeprune.config import toml
from edgeprune.records import BenchProtocol, Profile, Recipe, Workload

DEFAULT = "chat-2k"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    min_decode_tps: float | None = None
    max_first_token_ms: float | None = None
    max_kl: float | None = None
    max_energy_j: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProfileFile:
    title: str
    workload: Workload
    recipe: Recipe
    bench: BenchProtocol
    limits: _Limits = _Limits()


def list_profiles() -> tuple[str, ...]:
    """List the shipped profiles by name, without opening a file."""
    return toml.list_names("profiles")


def read_profile(path: Path) -> Profile:
    """Read one profile file. Raises ConfigError with every problem in it."""
    data = toml.read(path)
    name = toml.name_of(path)
    shown = toml.display(path)
    problems: list[str] = []
    file = toml.build(_ProfileFile, data, shown, problems)
    if file is not None:
        problems += _profile_problems(file, shown)
    toml.raise_all(problems)
    assert file is not None
    profile = Profile(
        name=name,
        title=file.title,
        workload=file.workload,
        min_decode_tps=file.limits.min_decode_tps,
        max_first_token_ms=file.limits.max_first_token_ms,
        max_kl=file.limits.max_kl,
        max_energy_j=file.limits.max_energy_j,
        min_agreement=file.limits.min_agreement,
        recipe=file.recipe,
        bench=file.bench,
        key="",
    )
    return dataclasses.replace(profile, key=records.make_key("profile", records.to_plain(profile)))


def load_profile(name_or_path: str) -> Profile:
    """Return a profile by shipped name or path. Raises ConfigError."""
    return read_profile(toml.find("profiles", name_or_path))


def _profile_problems(file: _ProfileFile, shown: str) -> list[str]:
    problems: list[str] = []

    def need(condition: bool, message: str) -> None:
        toml.check(condition, problems, f"{shown}: {message}")

    for section, table in (("workload", file.workload), ("bench", file.bench)):
        for field in dataclasses.fields(table):
            need(getattr(table, field.name) >= 1, f"[{section}] '{field.name}' must be at least 1")
    work = file.workload
    need(
        work.prompt_tokens + work.new_tokens <= work.context_tokens,
        f"[workload] prompt and new tokens ({work.prompt_tokens} + {work.new_tokens}) "
        f"exceed 'context_tokens' {work.context_tokens}",
    )
    need(
        file.bench.prompt_tokens + file.bench.new_tokens <= work.context_tokens,
        "[bench] prompt and new tokens exceed the [workload] 'context_tokens'",
    )
    recipe = file.recipe
    for name in ("calibration_samples", "calibration_tokens", "eval_samples", "max_measured"):
        need(getattr(recipe, name) >= 1, f"[recipe] '{name}' must be at least 1")
    need(recipe.eval_tokens >= 2, "[recipe] 'eval_tokens' must be at least 2")
    for name in ("calibration_tokens", "eval_tokens"):
        need(getattr(recipe, name) <= work.context_tokens, f"[recipe] '{name}' exceeds 'context_tokens'")
    for name in ("allocators", "formats", "quantizations"):
        values = getattr(recipe, name)
        need(bool(values), f"[recipe] '{name}' must not be empty")
        need(len(set(values)) == len(values), f"[recipe] '{name}' names something twice")
    need(all(0 < r < 1 for r in recipe.ratios), "[recipe] 'ratios' must lie between 0 and 1")
    need(list(recipe.ratios) == sorted(set(recipe.ratios)), "[recipe] 'ratios' must rise")
    for field in dataclasses.fields(_Limits):
        value = getattr(file.limits, field.name)
        need(value is None or value > 0, f"[limits] '{field.name}' must be positive")
    share = file.limits.min_agreement
    need(share is None or share <= 1, "[limits] 'min_agreement' is a share of tokens and must be at most 1")
    return problems
