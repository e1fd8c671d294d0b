from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune import records
from edgeprune.config.budget import load_inputs, resolve_budget
from edgeprune.config.profiles import load_profile
from edgeprune.config.targets import load_target, with_detected
from edgeprune.errors import ConfigError
from edgeprune.records import DeviceTarget, Fact, Limit, Profile

TARGET = """
title = "test board"
arch = "aarch64"
isa = ["neon"]
cores = 4
memory = "2GiB"
usable = "1.5GiB"
bandwidth_peak_gb_per_s = 10
formats = ["gguf"]
default_mode = "5W"

[sources]
arch = "sheet"
isa = "sheet"
cores = "sheet"
memory = "sheet"
usable = "guess"
bandwidth_peak_gb_per_s = "sheet"
formats = "tried"

[[mode]]
name = "5W"
bandwidth_peak_gb_per_s = 10.0
source = "sheet"

[[speed]]
runtime = "llama-cpp"
mode = "5W"
bandwidth_gb_per_s = 4.5
layer_ms = 0.25
relative_error = 0.2
source = "fit"
"""

PROFILE = """
title = "test use"
[workload]
prompt_tokens = 100
new_tokens = 28
context_tokens = 256
[limits]
min_decode_tps = 5
max_kl = 0.5
[recipe]
metric = "random"
allocators = ["uniform"]
calibration_samples = 2
calibration_tokens = 64
eval_samples = 2
eval_tokens = 64
formats = ["gguf"]
quantizations = ["F16", "Q4_0"]
ratios = [0.1, 0.2]
max_measured = 3
[bench]
prompt_tokens = 32
new_tokens = 8
repeats = 5
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def call(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return call


def problems_of(load: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load()
    return caught.value.problems


def test_a_target_file_becomes_a_record(write: Callable[[str, str], str]) -> None:
    target, sentence = load_target(write("board.toml", TARGET))
    assert sentence is None
    assert (target.name, target.cores, target.isa) == ("board", 4, ("neon",))
    assert target.memory_bytes == 2 * 2**30
    assert target.usable_bytes == 3 * 2**29
    assert target.bandwidth_peak_bytes_per_s == 10e9
    assert target.runtime_overhead_bytes == 0
    assert target.power_modes[0].name == target.default_mode == "5W"
    speed = target.speeds[0]
    assert (speed.bandwidth_bytes_per_s, speed.layer_ns, speed.compute_flops) == (4.5e9, 0.25e6, None)
    assert Fact(field="usable_bytes", source="guess") in target.facts


def test_key_follows_content(write: Callable[[str, str], str]) -> None:
    first, _ = load_target(write("board.toml", TARGET))
    same, _ = load_target(write("board.toml", TARGET + "\n# a comment\n"))
    other, _ = load_target(write("board.toml", TARGET.replace("cores = 4", "cores = 8")))
    assert first.key == same.key
    assert first.key != other.key
    assert len(first.key) == 16


def test_a_profile_file_becomes_a_record(write: Callable[[str, str], str]) -> None:
    profile = load_profile(write("use.toml", PROFILE))
    assert profile.name == "use"
    assert profile.workload.context_tokens == 256
    assert (profile.min_decode_tps, profile.max_first_token_ms, profile.max_kl) == (5.0, None, 0.5)
    assert profile.recipe.ratios == (0.1, 0.2)


def test_unknown_keys_are_refused_with_a_guess(write: Callable[[str, str], str]) -> None:
    path = write("use.toml", PROFILE.replace("metric =", "metrik ="))
    assert problems_of(lambda: load_profile(path)) == (
        f"{path}: [recipe] unknown key 'metrik' (did you mean 'metric'?)",
        f"{path}: [recipe] missing key 'metric'",
    )


def test_every_problem_is_named_at_once(write: Callable[[str, str], str]) -> None:
    text = (
        TARGET.replace("cores = 4", 'cores = "four"')
        .replace('memory = "2GiB"', 'memory = "2G"')
        .replace("layer_ms = 0.25", "layer_ms = true")
        .replace('title = "test board"\n', "")
        .replace('isa = ["neon"]', "isa = [7]")
    )
    path = write("board.toml", text)
    assert problems_of(lambda: load_target(path)) == (
        f"{path}: missing key 'title'",
        f"{path}: 'isa[0]' must be text, found 7",
        f"{path}: 'cores' must be a whole number, found 'four'",
        f"{path}: 'memory' '2G' has unknown unit 'G' "
        "(did you mean 2GB? units: B, kB, KB, MB, GB, TB, KiB, MiB, GiB, TiB)",
        f"{path}: [[speed]] 1 'layer_ms' must be a number, found True",
    )


def test_problems_of_both_files_come_together(write: Callable[[str, str], str]) -> None:
    board = write("board.toml", TARGET.replace("cores = 4", "cores = 0"))
    use = write("use.toml", PROFILE.replace("repeats = 5", "repeats = 0"))
    assert problems_of(lambda: load_inputs(board, use)) == (
        f"{board}: 'cores' must be at least 1",
        f"{use}: [bench] 'repeats' must be at least 1",
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('usable = "1.5GiB"', 'usable = "3GiB"', "'usable' must not exceed 'memory'"),
        ('cores = "sheet"\n', "", "[sources] must say where 'cores' comes from"),
        ('cores = "sheet"\n', 'cores = " "\n', "[sources] must say where 'cores' comes from"),
        (
            'cores = "sheet"\n',
            'cores = "sheet"\ncorse = "sheet"\n',
            "[sources] unknown key 'corse' (did you mean 'cores'?)",
        ),
        ('default_mode = "5W"\n', "", "'default_mode' must name one of the [[mode]] entries"),
        ('default_mode = "5W"', 'default_mode = "6W"', "'default_mode' '6W' is not a [[mode]]"),
        ('mode = "5W"\nb', 'mode = "9W"\nb', "[[speed]] llama-cpp 9W: 'mode' '9W' is not a [[mode]]"),
        (
            "relative_error = 0.2",
            "relative_error = 1.5",
            "[[speed]] llama-cpp 5W: 'relative_error' must be between 0 and 1",
        ),
        ("layer_ms = 0.25", "layer_ms = nan", "[[speed]] 1 'layer_ms' must be a finite number"),
        ('source = "fit"', 'source = ""', "[[speed]] llama-cpp 5W: 'source' is empty"),
        ('formats = ["gguf"]', "formats = []", "'formats' must name at least one export format"),
    ],
)
def test_a_target_that_makes_no_sense(
    write: Callable[[str, str], str], old: str, new: str, problem: str
) -> None:
    assert old in TARGET
    path = write("board.toml", TARGET.replace(old, new, 1))
    found = problems_of(lambda: load_target(path))
    assert any(p.startswith(f"{path}: {problem}") for p in found), found


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "context_tokens = 256",
            "context_tokens = 100",
            "[workload] prompt and new tokens (100 + 28) exceed",
        ),
        ("ratios = [0.1, 0.2]", "ratios = [0.2, 0.1]", "[recipe] 'ratios' must rise"),
        ("ratios = [0.1, 0.2]", "ratios = [0.0]", "[recipe] 'ratios' must lie between 0 and 1"),
        ('["F16", "Q4_0"]', '["F16", "F16"]', "[recipe] 'quantizations' names something twice"),
        ('["F16", "Q4_0"]', "[]", "[recipe] 'quantizations' must not be empty"),
        ("max_kl = 0.5", "max_kl = 0", "[limits] 'max_kl' must be positive"),
        ("max_kl = 0.5", "max_energy_j = -1", "[limits] 'max_energy_j' must be positive"),
        (
            "max_kl = 0.5",
            "min_agreement = 80",
            "[limits] 'min_agreement' is a share of tokens and must be at most 1",
        ),
        ("new_tokens = 8", "new_tokens = 0", "[bench] 'new_tokens' must be at least 1"),
        ("calibration_tokens = 64", "calibration_tokens = 512", "[recipe] 'calibration_tokens' exceeds"),
    ],
)
def test_a_profile_that_makes_no_sense(
    write: Callable[[str, str], str], old: str, new: str, problem: str
) -> None:
    assert old in PROFILE
    path = write("use.toml", PROFILE.replace(old, new, 1))
    found = problems_of(lambda: load_profile(path))
    assert any(p.startswith(f"{path}: {problem}") for p in found), found


def test_broken_toml_names_the_line(write: Callable[[str, str], str]) -> None:
    path = write("board.toml", "title = \n")
    (problem,) = problems_of(lambda: load_target(path))
    assert problem.startswith(f"{path}: not valid TOML: ")
    assert "line 1" in problem


def test_not_text_and_too_large(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"a = 1\n\xff\xfe")
    assert problems_of(lambda: load_target(str(binary))) == (f"{binary}: not UTF-8 text (byte 6)",)
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (2**20 + 1))
    assert problems_of(lambda: load_target(str(large))) == (f"{large}: too large for a data file",)
    deep = tmp_path / "deep.toml"
    deep.write_text("a = " + "[" * 5000 + "]" * 5000)
    (problem,) = problems_of(lambda: load_target(str(deep)))
    assert problem.startswith(f"{deep}: not valid TOML: ")


def test_unknown_names_are_guessed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_target("jetson-orion")
    assert caught.value.problems == ("unknown target 'jetson-orion' (did you mean 'jetson-orin'?)",)
    assert "raspberry-pi-5-8gb" in str(caught.value.hint)
    assert problems_of(lambda: load_profile("chat2k")) == (
        "unknown profile 'chat2k' (did you mean 'chat-2k'?)",
    )
    assert problems_of(lambda: load_target("./nowhere.toml")) == (
        "target file './nowhere.toml' does not exist",
    )


@pytest.mark.parametrize(
    ("memory", "taken"),
    [
        (None, "jetson-orin-nano-4gb"),
        (2 * 2**30, "jetson-orin-nano-4gb"),
        (2 * 2**30 + 1, "jetson-orin-nano-8gb"),
        (6 * 10**9, "jetson-orin-nano-8gb"),
        (7 * 10**9, "jetson-orin-nx-16gb"),
        (20 * 10**9, "jetson-agx-orin-32gb"),
        (50 * 10**9, "jetson-agx-orin-64gb"),
        (10**12, "jetson-agx-orin-64gb"),
    ],
)
def test_a_family_takes_the_smallest_module_that_holds_the_budget(memory: int | None, taken: str) -> None:
    target, sentence = load_target("jetson-orin", memory_bytes=memory)
    assert target.name == taken
    assert target.family == "jetson-orin"
    assert sentence is not None
    assert sentence.startswith(f"target jetson-orin: took {taken} (")
    assert "name another with --target: " in sentence
    assert taken not in sentence.split("--target: ")[1].split(", ")


def test_a_family_file_of_ones_own(write: Callable[[str, str], str]) -> None:
    write("small.toml", TARGET)
    write("big.toml", TARGET.replace('"1.5GiB"', '"2GiB"'))
    family = write("both.toml", 'title = "both"\nmembers = ["big", "small"]\n')
    assert load_target(family)[0].name == "small"
    assert load_target(family, memory_bytes=2 * 2**30)[0].name == "big"
    bad = write("bad.toml", 'title = "x"\nmembers = ["smal"]\n')
    assert problems_of(lambda: load_target(bad)) == (f"{bad}: unknown member 'smal' (did you mean 'small'?)",)


def test_budget_takes_the_stricter_and_says_whose(
    make_target: Callable[..., DeviceTarget], make_profile: Callable[..., Profile]
) -> None:
    target = make_target(name="board", usable_bytes=1000)
    profile = make_profile(name="use", min_decode_tps=5.0, max_first_token_ms=300.0, max_kl=0.4)

    plain = resolve_budget(target, profile)
    assert plain.memory_bytes == Limit(value=1000.0, unit="bytes", source="target board")
    assert plain.file_bytes is None
    assert plain.decode_tps == Limit(value=5.0, unit="tokens/s", source="profile use")
    assert plain.first_token_ms == Limit(value=300.0, unit="ms", source="profile use")
    assert plain.kl == Limit(value=0.4, unit="nats/token", source="profile use")

    strict = resolve_budget(
        target, profile, memory_bytes=600, file_bytes=500, decode_tps=9.0, first_token_ms=100.0, kl=0.1
    )
    assert [
        (limit.value, limit.source)
        for limit in (
            strict.memory_bytes,
            strict.file_bytes,
            strict.decode_tps,
            strict.first_token_ms,
            strict.kl,
        )
        if limit is not None
    ] == [
        (600.0, "command line"),
        (500.0, "command line"),
        (9.0, "command line"),
        (100.0, "command line"),
        (0.1, "command line"),
    ]

    loose = resolve_budget(target, profile, memory_bytes=5000, decode_tps=1.0, first_token_ms=900.0, kl=3.0)
    assert loose.memory_bytes.source == "target board"
    assert loose.decode_tps is not None and loose.decode_tps.value == 5.0
    assert loose.first_token_ms is not None and loose.first_token_ms.source == "profile use"
    assert loose.kl is not None and loose.kl.value == 0.4
    assert loose.key == plain.key != strict.key
    assert resolve_budget(target, profile, memory_bytes=1000).memory_bytes.source == "command line"


def test_budget_refuses_what_is_no_limit(
    make_target: Callable[..., DeviceTarget], make_profile: Callable[..., Profile]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_budget(make_target(), make_profile(), memory_bytes=0, decode_tps=float("nan"), kl=-1.0)
    assert caught.value.problems == (
        "--budget must be a positive number, not 0",
        "--min-tps must be a positive number, not nan",
        "--max-kl must be a positive number, not -1.0",
    )


def test_energy_and_agreement_are_resolved_like_the_others(
    make_target: Callable[..., DeviceTarget], make_profile: Callable[..., Profile]
) -> None:
    profile = make_profile(name="use", max_energy_j=0.5, min_agreement=0.8)
    plain = resolve_budget(make_target(), profile)
    assert plain.energy_j == Limit(value=0.5, unit="J/token", source="profile use")
    assert plain.agreement == Limit(value=0.8, unit="of tokens", source="profile use")
    strict = resolve_budget(make_target(), profile, energy_j=0.4, agreement=0.9)
    assert strict.energy_j == Limit(value=0.4, unit="J/token", source="command line")
    assert strict.agreement == Limit(value=0.9, unit="of tokens", source="command line")
    loose = resolve_budget(make_target(), profile, energy_j=0.6, agreement=0.7)
    assert (loose.energy_j, loose.agreement) == (plain.energy_j, plain.agreement)
    with pytest.raises(ConfigError) as caught:
        resolve_budget(make_target(), profile, energy_j=0.0, first_token_ms=-5.0, agreement=float("nan"))
    assert caught.value.problems == (
        "--max-first-token must be a positive number, not -5.0",
        "--max-energy must be a positive number, not 0.0",
        "--min-agreement must be a positive number, not nan",
    )
    with pytest.raises(ConfigError) as caught:
        resolve_budget(make_target(), profile, agreement=80.0)
    assert caught.value.problems == (
        "--min-agreement is a share of tokens, such as 0.9, and must be at most 1, not 80.0",
    )


def test_an_objective_needs_a_floor_of_quality(
    make_target: Callable[..., DeviceTarget], make_profile: Callable[..., Profile]
) -> None:
    target, bare = make_target(), make_profile(max_kl=None, min_agreement=None)
    assert resolve_budget(target, bare).objective == "quality"
    for objective, wins in (("speed", "fastest"), ("size", "smallest")):
        with pytest.raises(ConfigError) as caught:
            resolve_budget(target, bare, objective=objective)
        assert caught.value.problems == (
            f"--objective {objective} needs a floor of quality: without one the {wins} model wins, "
            "however bad it is",
        )
        assert caught.value.hint is not None and caught.value.hint.startswith("add --max-kl 0.2 ")
        for floor in ({"kl": 0.2}, {"agreement": 0.8}):
            assert resolve_budget(target, bare, objective=objective, **floor).objective == objective
        assert resolve_budget(target, make_profile(max_kl=0.3), objective=objective).kl is not None
    with pytest.raises(ConfigError) as caught:
        resolve_budget(target, bare, objective="sped", kl=0.2)
    assert caught.value.problems == ("unknown objective 'sped' (did you mean 'speed'?)",)
    keys = {resolve_budget(target, bare, objective=o, kl=0.2).key for o in ("quality", "speed", "size")}
    assert len(keys) == 3


def test_detected_facts_replace_class_values() -> None:
    target, _ = load_target("laptop-cpu")
    found = with_detected(
        target,
        {
            "memory_bytes": 8_000_000_000,
            "cores": 2,
            "isa": ("avx2", "avx512f"),
            "bandwidth_peak_bytes_per_s": 50,
        },
    )
    assert (found.memory_bytes, found.cores, found.isa) == (8_000_000_000, 2, ("avx2", "avx512f"))
    assert found.bandwidth_peak_bytes_per_s == 50.0
    assert found.usable_bytes == int(8_000_000_000 * 10.5 / 15)
    sources = {f.field: f.source for f in found.facts}
    assert sources["cores"] == sources["memory_bytes"] == "detected on this machine"
    assert sources["usable_bytes"] == "70% of the memory detected on this machine"
    assert sources["arch"] == "class value, replaced by detection"
    assert len(sources) == len(found.facts)
    assert found.key != target.key
    explicit = with_detected(target, {"memory_bytes": 8_000_000_000, "usable_bytes": 5_000_000_000})
    assert explicit.usable_bytes == 5_000_000_000
    assert records.loads(DeviceTarget, records.dumps(found)) == found


def test_detection_is_for_this_machine_only() -> None:
    pi, _ = load_target("raspberry-pi-5-8gb")
    assert problems_of(lambda: with_detected(pi, {"cores": 2})) == (
        "target raspberry-pi-5-8gb is another device; nothing detected here applies to it",
    )
    laptop, _ = load_target("laptop-cpu")
    assert problems_of(lambda: with_detected(laptop, {"coars": 2, "cores": 0, "arch": 7})) == (
        "detected fact 'coars' is unknown (did you mean 'cores'?)",
        "detected fact 'cores' cannot be 0",
        "detected fact 'arch' cannot be 7",
    )


def test_records_survive_replacement(make_target: Callable[..., DeviceTarget]) -> None:
    target = make_target(cores=2)
    assert target.cores == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.cores = 3  # type: ignore[misc]
