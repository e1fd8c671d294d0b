"""Read `targets/*.toml`: one device, or a family that resolves to its smallest fitting member."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from edgeprune import records
from edgeprune.config import toml
from edgeprune.config.toml import Size
from edgeprune.errors import ConfigError
from edgeprune.records import DeviceCalibration, DeviceTarget, Fact, PowerMode, SpeedModel
from edgeprune.registry import suggest
from edgeprune.units import format_bytes

DETECTED = "detected on this machine"

# every figure of a target file has an entry of the same name in its [sources]
_FIGURES = (
    "arch",
    "isa",
    "cores",
    "memory",
    "usable",
    "bandwidth_peak_gb_per_s",
    "runtime_overhead",
    "formats",
    "threads",
    "core",
    "gpu_sm_ghz",
)
# the classes that the speed constants are known for
CORES = ("x86", "arm", "arm-basic", "apple")
_FIELDS = {
    "memory": "memory_bytes",
    "usable": "usable_bytes",
    "bandwidth_peak_gb_per_s": "bandwidth_peak_bytes_per_s",
    "runtime_overhead": "runtime_overhead_bytes",
}
_DETECTABLE = {
    "title": str,
    "arch": str,
    "isa": tuple,
    "cores": int,
    "memory_bytes": int,
    "usable_bytes": int,
    "bandwidth_peak_bytes_per_s": float,
    "threads": int,
    "core": str,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mode:
    name: str
    bandwidth_peak_gb_per_s: float
    source: str
    gpu_sm_ghz: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Speed:
    runtime: str
    mode: str
    bandwidth_gb_per_s: float
    layer_ms: float
    relative_error: float
    source: str
    compute_gflops: float | None = None
    backend: str = "cpu"
    prefill_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _TargetFile:
    title: str
    arch: str
    isa: tuple[str, ...]
    cores: int
    memory: Size
    usable: Size
    bandwidth_peak_gb_per_s: float
    formats: tuple[str, ...]
    sources: dict[str, str]
    family: str | None = None
    default_mode: str | None = None
    runtime_overhead: Size | None = None
    threads: int | None = None
    core: str | None = None
    gpu_sm_ghz: float | None = None
    local: bool = False
    notes: tuple[str, ...] = ()
    mode: tuple[_Mode, ...] = ()
    speed: tuple[_Speed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _FamilyFile:
    title: str
    members: tuple[str, ...]  # smallest first where the usable memory is equal


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFamily:
    """Several modules sold under one name."""

    name: str
    title: str
    members: tuple[str, ...]


def list_targets() -> tuple[str, ...]:
    """List the shipped targets and families by name, without opening a file."""
    return toml.list_names("targets")


def read_target(path: Path) -> DeviceTarget | TargetFamily:
    """Read one target file. Raises ConfigError with every problem in it."""
    data = toml.read(path)
    name = toml.name_of(path)
    shown = toml.display(path)
    problems: list[str] = []
    if "members" in data:
        family = toml.build(_FamilyFile, data, shown, problems)
        if family is not None:
            problems += _family_problems(family, path, shown)
        toml.raise_all(problems)
        assert family is not None
        return TargetFamily(name=name, title=family.title, members=family.members)
    file = toml.build(_TargetFile, data, shown, problems)
    if file is not None:
        problems += _target_problems(file, shown)
    toml.raise_all(problems)
    assert file is not None
    return _record(name, file)


def load_target(name_or_path: str, *, memory_bytes: int | None = None) -> tuple[DeviceTarget, str | None]:
    """Return a target; for a family also the sentence that says which member it took.

    A family resolves to the member with the least usable memory that holds `memory_bytes`: the first
    one without a budget, the largest when none holds it (the target's own limit is then the budget).
    """
    path = toml.find("targets", name_or_path)
    found = read_target(path)
    if isinstance(found, DeviceTarget):
        return found, None
    members = family_members(found, path)
    ordered = sorted(members, key=lambda t: t.usable_bytes)
    fitting = [t for t in ordered if memory_bytes is None or t.usable_bytes >= memory_bytes]
    taken = fitting[0] if fitting else ordered[-1]
    others = ", ".join(t.name for t in members if t.name != taken.name)
    if memory_bytes is None:
        why = "no budget was given and it is the smallest module"
    elif fitting:
        why = f"it is the smallest module whose usable {format_bytes(taken.usable_bytes)} hold the budget"
    else:
        why = (
            f"no module holds {format_bytes(memory_bytes)} and it is the largest, "
            f"with {format_bytes(taken.usable_bytes)} usable"
        )
    return taken, f"target {found.name}: took {taken.name} ({why}); name another with --target: {others}"


def family_members(family: TargetFamily, path: Path) -> tuple[DeviceTarget, ...]:
    """Read the members of a family, in the order its file lists them."""
    members: list[DeviceTarget] = []
    for name in family.members:
        beside = path.parent / f"{name}.toml"
        member = read_target(beside if beside.is_file() else toml.find("targets", name))
        if not isinstance(member, DeviceTarget):
            raise ConfigError(f"{toml.display(path)}: member '{name}' is itself a family")
        members.append(member)
    return tuple(members)


def with_detected(
    target: DeviceTarget, facts: dict[str, int | float | str | tuple[str, ...]]
) -> DeviceTarget:
    """Replace class values of a local target by what was detected; their source says so.

    A detected `memory_bytes` without `usable_bytes` keeps the class's share of usable memory. Raises
    ConfigError for a target that is not this machine, or a fact it has no place for.
    """
    if not target.local:
        raise ConfigError(f"target {target.name} is another device; nothing detected here applies to it")
    problems: list[str] = []
    values: dict[str, int | float | str | tuple[str, ...]] = {}
    for field, value in facts.items():
        kind = _DETECTABLE.get(field)
        if kind is None:
            problems.append(f"detected fact '{field}' is unknown{suggest(field, _DETECTABLE)}")
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, (int, float)) and value <= 0):
            problems.append(f"detected fact '{field}' cannot be {value!r}")
            continue
        values[field] = value
    toml.raise_all(problems)
    memory = values.get("memory_bytes")
    sources = dict.fromkeys(values, DETECTED)
    if isinstance(memory, int) and "usable_bytes" not in values:
        share = target.usable_bytes / target.memory_bytes
        values["usable_bytes"] = int(memory * share)
        sources["usable_bytes"] = f"{share:.0%} of the memory {DETECTED}"
    kept = tuple(f for f in target.facts if f.field not in sources)
    facts_now = kept + tuple(Fact(field=f, source=s) for f, s in sources.items())
    changes: dict[str, object] = {**values, "facts": facts_now, "key": ""}
    return _keyed(dataclasses.replace(target, **changes))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the user's own calibrations


def calibration_path(target: str) -> Path:
    """Where the calibration of a target is kept, whether it exists or not."""
    return toml.user_data_folder() / "devices" / f"{target}.json"


def read_calibration(target: str) -> DeviceCalibration | None:
    """The user's calibration of a target, or None. Raises ConfigError for a damaged file."""
    path = calibration_path(target)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        again = "run edgeprune calibrate-device again"
        raise ConfigError(f"{path}: cannot be read: {error}", again) from None
    try:
        return records.loads(DeviceCalibration, text, where=str(path))
    except ConfigError as error:
        raise ConfigError(error.problems, f"delete {path} or run edgeprune calibrate-device again") from None


def with_calibration(target: DeviceTarget, *, cpu: str | None = None) -> DeviceTarget:
    """Put the user's calibration of this target before its published speeds.

    With `cpu` a calibration that was made on another processor is left out.
    """
    found = read_calibration(target.name)
    if found is None or (cpu is not None and found.cpu != cpu):
        return target
    return _keyed(dataclasses.replace(target, speeds=(*found.speeds, *target.speeds), key=""))


def _record(name: str, file: _TargetFile) -> DeviceTarget:
    return _keyed(
        DeviceTarget(
            name=name,
            title=file.title,
            family=file.family,
            arch=file.arch,
            isa=file.isa,
            cores=file.cores,
            memory_bytes=file.memory,
            usable_bytes=file.usable,
            bandwidth_peak_bytes_per_s=file.bandwidth_peak_gb_per_s * 1e9,
            power_modes=tuple(
                PowerMode(
                    name=m.name,
                    bandwidth_peak_bytes_per_s=m.bandwidth_peak_gb_per_s * 1e9,
                    source=m.source,
                    gpu_sm_ghz=m.gpu_sm_ghz,
                )
                for m in file.mode
            ),
            default_mode=file.default_mode,
            formats=file.formats,
            runtime_overhead_bytes=file.runtime_overhead or 0,
            speeds=tuple(
                SpeedModel(
                    runtime=s.runtime,
                    mode=s.mode,
                    bandwidth_bytes_per_s=s.bandwidth_gb_per_s * 1e9,
                    layer_ns=s.layer_ms * 1e6,
                    compute_flops=None if s.compute_gflops is None else s.compute_gflops * 1e9,
                    relative_error=s.relative_error,
                    source=s.source,
                    backend=s.backend,
                    prefill_error=s.prefill_error,
                )
                for s in file.speed
            ),
            local=file.local,
            facts=tuple(Fact(field=_FIELDS.get(k, k), source=v) for k, v in file.sources.items()),
            notes=file.notes,
            key="",
            threads=file.threads,
            core=file.core,
            gpu_sm_ghz=file.gpu_sm_ghz,
        )
    )


def _keyed(target: DeviceTarget) -> DeviceTarget:
    plain = records.to_plain(dataclasses.replace(target, key=""))
    return dataclasses.replace(target, key=records.make_key("device_target", plain))


def _family_problems(family: _FamilyFile, path: Path, shown: str) -> list[str]:
    problems: list[str] = []
    toml.check(bool(family.members), problems, f"{shown}: 'members' must name at least one target")
    known = {p.stem for p in path.parent.glob("*.toml")} | set(list_targets())
    for name in family.members:
        toml.check(name in known, problems, f"{shown}: unknown member '{name}'{suggest(name, known)}")
    return problems


def _target_problems(file: _TargetFile, shown: str) -> list[str]:
    problems: list[str] = []

    def need(condition: bool, message: str) -> None:
        toml.check(condition, problems, f"{shown}: {message}")

    need(file.cores >= 1, "'cores' must be at least 1")
    need(file.threads is None or file.threads >= 1, "'threads' must be at least 1")
    need(file.core is None or file.core in CORES, f"'core' must be one of {', '.join(CORES)}")
    need(file.gpu_sm_ghz is None or file.gpu_sm_ghz > 0, "'gpu_sm_ghz' must be positive")
    need(file.usable <= file.memory, "'usable' must not exceed 'memory'")
    need(file.bandwidth_peak_gb_per_s > 0, "'bandwidth_peak_gb_per_s' must be positive")
    need(bool(file.formats), "'formats' must name at least one export format")
    present = [f for f in _FIGURES if getattr(file, f) is not None]
    for figure in present:
        need(bool(file.sources.get(figure, "").strip()), f"[sources] must say where '{figure}' comes from")
    for key in file.sources:
        need(key in present, f"[sources] unknown key '{key}'{suggest(key, present)}")
    modes = [m.name for m in file.mode]
    need(len(set(modes)) == len(modes), "two [[mode]] entries have the same name")
    for mode in file.mode:
        need(
            mode.bandwidth_peak_gb_per_s > 0,
            f"[[mode]] {mode.name}: 'bandwidth_peak_gb_per_s' must be positive",
        )
        need(
            mode.gpu_sm_ghz is None or mode.gpu_sm_ghz > 0,
            f"[[mode]] {mode.name}: 'gpu_sm_ghz' must be positive",
        )
        need(bool(mode.source.strip()), f"[[mode]] {mode.name}: 'source' is empty")
    if file.default_mode is None:
        need(not modes, "'default_mode' must name one of the [[mode]] entries")
    else:
        need(
            file.default_mode in modes,
            f"'default_mode' {file.default_mode!r} is not a [[mode]]{suggest(file.default_mode, modes)}",
        )
    pairs = [(s.runtime, s.mode, s.backend) for s in file.speed]
    need(len(set(pairs)) == len(pairs), "two [[speed]] entries are for the same runtime, mode and backend")
    for speed in file.speed:
        at = f"[[speed]] {speed.runtime} {speed.mode or '(no mode)'}:"
        need(
            speed.mode in modes if modes else speed.mode == "",
            f"{at} 'mode' {speed.mode!r} is not a [[mode]]{suggest(speed.mode, modes)}",
        )
        need(speed.bandwidth_gb_per_s > 0, f"{at} 'bandwidth_gb_per_s' must be positive")
        need(speed.backend in ("cpu", "gpu"), f"{at} 'backend' must be cpu or gpu")
        need(speed.prefill_error is None or speed.prefill_error > 0, f"{at} 'prefill_error' must be positive")
        need(speed.layer_ms >= 0, f"{at} 'layer_ms' must not be negative")
        need(0 < speed.relative_error < 1, f"{at} 'relative_error' must be between 0 and 1")
        need(
            speed.compute_gflops is None or speed.compute_gflops > 0,
            f"{at} 'compute_gflops' must be positive",
        )
        need(bool(speed.source.strip()), f"{at} 'source' is empty")
    return problems
