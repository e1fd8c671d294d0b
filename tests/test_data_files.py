"""Every shipped TOML file, found by walking the folders, and every pair of target and profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune import records, registry
from edgeprune.config.budget import resolve_budget
from edgeprune.config.profiles import list_profiles, load_profile
from edgeprune.config.targets import TargetFamily, list_targets, load_target, read_target
from edgeprune.costs.speed import speed_model
from edgeprune.records import DeviceTarget, Profile

ROOT = Path(__file__).resolve().parents[1]
TARGETS = sorted((ROOT / "targets").rglob("*.toml"))
PROFILES = sorted((ROOT / "profiles").rglob("*.toml"))
DEVICES = [p.stem for p in TARGETS if "members" not in p.read_text()]


def test_the_folders_are_what_is_listed() -> None:
    assert len(TARGETS) >= 14
    assert len(PROFILES) >= 3
    assert tuple(sorted(p.stem for p in TARGETS)) == list_targets()
    assert tuple(sorted(p.stem for p in PROFILES)) == list_profiles()
    assert {"laptop-cpu", "jetson-orin", "raspberry-pi-4-4gb", "raspberry-pi-5-16gb"} <= set(list_targets())
    assert {"chat-2k", "assistant-8k", "tiny-512"} == set(list_profiles())


@pytest.mark.parametrize("path", TARGETS, ids=lambda p: p.stem)
def test_target_file(path: Path) -> None:
    target = read_target(path)
    if isinstance(target, TargetFamily):
        for name in target.members:
            member = read_target(path.parent / f"{name}.toml")
            assert isinstance(member, DeviceTarget)
            assert member.family == target.name
        return
    assert target.name == path.stem
    assert target.bandwidth_peak_bytes_per_s >= max(
        (m.bandwidth_peak_bytes_per_s for m in target.power_modes), default=0
    )
    assert 0.5 <= target.usable_bytes / target.memory_bytes <= 0.95
    assert {f.field for f in target.facts} >= {
        "arch",
        "isa",
        "cores",
        "memory_bytes",
        "usable_bytes",
        "bandwidth_peak_bytes_per_s",
        "formats",
    }
    # every mode has a speed to predict with, and no runtime reads faster than the memory delivers
    modes = {m.name: m.bandwidth_peak_bytes_per_s for m in target.power_modes} or {
        None: target.bandwidth_peak_bytes_per_s
    }
    for mode, peak in modes.items():
        speed = speed_model(target, mode=mode)
        assert speed.runtime in registry.names("runtimes")
        assert 0.1 * peak < speed.bandwidth_bytes_per_s < peak
        # a device without published rows of its own is known less well
        assert speed.relative_error >= (0.1 if speed.basis == "profile" else 0.25)
    assert set(target.formats) <= set(registry.names("exporters"))
    assert records.loads(DeviceTarget, records.dumps(target)) == target


def test_only_one_target_is_this_machine() -> None:
    assert [n for n in DEVICES if load_target(n)[0].local] == ["laptop-cpu"]


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profile_file(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.recipe.metric in registry.names("metrics")
    assert set(profile.recipe.formats) <= set(registry.names("exporters"))
    assert profile.bench.repeats >= 5
    assert records.loads(Profile, records.dumps(profile)) == profile


def test_the_default_profile_is_what_the_readme_promises() -> None:
    profile = load_profile("chat-2k")
    assert profile.workload.context_tokens == 2048
    assert profile.recipe.quantizations == ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")
    assert profile.recipe.max_measured == 14 and profile.recipe.mixes


@pytest.mark.parametrize("profile", [p.stem for p in PROFILES])
@pytest.mark.parametrize("target", DEVICES)
def test_every_pair_resolves(target: str, profile: str) -> None:
    device, _ = load_target(target)
    use = load_profile(profile)
    budget = resolve_budget(device, use)
    assert budget.memory_bytes.value == device.usable_bytes
    assert budget.memory_bytes.source == f"target {target}"
    # what the recipe exports must be loadable on the device
    assert set(use.recipe.formats) & set(device.formats)
