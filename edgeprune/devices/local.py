"""Facts of this machine, and its state while it measures. Anything that cannot be read is None."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgeprune.config.targets import with_calibration, with_detected
from edgeprune.costs.speed import CONSTANTS
from edgeprune.devices.base import Device, Transport
from edgeprune.errors import ConfigError
from edgeprune.records import DeviceTarget, Environment

# a copy reads and writes every byte; published boards decode at about this share of their peak too
_TRAFFIC_PER_COPY = 2.0
_COPY_BYTES = 128 << 20

# /proc/cpuinfo flag -> the name a target file uses
_ISA = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "fphp": "fp16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}


def detect(*, probe_seconds: float = 0.5) -> dict[str, Any]:
    """Facts of this machine: arch, cpu, cores, isa, memory_bytes, usable_bytes, and what probes measured.

    `memcpy_bytes_per_s` is what one thread copies, `memcpy_all_bytes_per_s` what all of them do together
    (bytes copied, not read plus written; best pass within `probe_seconds`). `peak_bytes_per_s` is the
    memory bandwidth that this stands for. `matmul_float32_flops` and `matmul_int8_ops` are one thread's
    rates with NumPy; None where NumPy is missing. All of them are None when `probe_seconds` is 0.
    `methods` says how each was found.
    """
    info = _cpuinfo()
    memory, usable = memory_bytes()
    one = everything = peak = single = integer = None
    if probe_seconds > 0:
        one = memcpy_bytes_per_s(probe_seconds)
        everything = max(one, memcpy_bytes_per_s(probe_seconds, threads=available_threads()))
        peak = everything * _TRAFFIC_PER_COPY / CONSTANTS.memory_share
        single = matmul_rate("float32", probe_seconds / 2)
        integer = matmul_rate("int8", probe_seconds / 2)
    facts: dict[str, Any] = {
        "arch": platform.machine() or "unknown",
        "cpu": cpu_name(info),
        "cores": cores(),
        "isa": isa(info),
        "memory_bytes": memory,
        "usable_bytes": usable,
        "memcpy_bytes_per_s": one,
        "memcpy_all_bytes_per_s": everything,
        "peak_bytes_per_s": peak,
        "matmul_float32_flops": single,
        "matmul_int8_ops": integer,
        "methods": {
            "cores": "threads this process may run on, less what its CPU quota forbids; "
            "siblings of one physical core counted once",
            "memory_bytes": "MemTotal, or the control group's limit where lower",
            "usable_bytes": "MemAvailable, or what the control group leaves where lower",
            "memcpy_bytes_per_s": f"one thread copying {_COPY_BYTES >> 20} MiB, best pass",
            "memcpy_all_bytes_per_s": "all threads copying at once, best pass",
            "peak_bytes_per_s": f"{_TRAFFIC_PER_COPY:g} x memcpy of all threads / {CONSTANTS.memory_share:g}",
            "matmul_float32_flops": "NumPy product of two 512 x 512 matrices, best pass",
            "matmul_int8_ops": "NumPy product of two 128 x 128 matrices (no BLAS: a lower bound), best pass",
        },
    }
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        facts["core"] = "apple"
    return facts


def describe(target: DeviceTarget, *, probe_seconds: float = 0.5) -> DeviceTarget:
    """A local target with the facts of this machine, and the user's calibration of it where one fits."""
    facts = detect(probe_seconds=probe_seconds)
    names = ("arch", "isa", "cores", "memory_bytes", "usable_bytes", "core")
    found = {n: facts[n] for n in names if facts.get(n)}
    if facts["peak_bytes_per_s"]:
        found["bandwidth_peak_bytes_per_s"] = facts["peak_bytes_per_s"]
    return with_calibration(with_detected(target, found), cpu=facts["cpu"])


def environment() -> Environment:
    """State of this machine now: clock governor, temperature, power, load."""
    throttled = _output("vcgencmd", "get_throttled")
    count = _read(Path("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"))
    return Environment(
        cpu=cpu_name(_cpuinfo()),
        n_cpus=available_threads(),
        governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        temperature_c=_temperature(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        power_mode=_read(Path("/sys/firmware/acpi/platform_profile")),
        throttled=None if throttled is None else throttled.partition("=")[2] or None,
        throttle_count=int(count) if count is not None and count.isdigit() else None,
        on_battery=_on_battery(),
        busy_s=_busy_s(),
    )


# ---------------------------------------------------------------- processor


def available_threads() -> int:
    """Hardware threads this process may use: its affinity, less what a CPU quota forbids."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(threads, math.ceil(quota))) if quota is not None else threads


def cores() -> int:
    """Physical cores among the available threads."""
    threads = available_threads()
    if not hasattr(os, "sched_getaffinity"):
        return threads
    seen = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        core, package = _read(topology / "core_id"), _read(topology / "physical_package_id")
        # boards with several clusters reuse core ids; siblings say it without doubt
        seen.add(_read(topology / "thread_siblings_list") or f"{package}:{core}:{cpu}")
    return max(1, min(threads, len(seen)))


def _cpu_quota() -> float | None:
    """CPUs a control group grants, or None without a limit."""
    for folder in _cgroup_folders("cpu"):
        text = _read(folder / "cpu.max")
        if text is not None:
            quota, _, period = text.partition(" ")
            if quota.isdigit() and period.isdigit() and int(period) > 0:
                return int(quota) / int(period)
        first, second = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if first is not None and second is not None and first.isdigit() and second.isdigit():
            return int(first) / max(1, int(second))
    return None


def _cpuinfo() -> dict[str, str]:
    """First value of each field of /proc/cpuinfo; empty elsewhere."""
    out: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            out.setdefault(name.strip(), value.strip())
    return out


def isa(info: dict[str, str]) -> tuple[str, ...]:
    """Instruction sets that matter to a runtime, by the names target files use."""
    flags = (info.get("flags") or info.get("Features") or "").split()
    if not flags and platform.system() == "Darwin" and platform.machine() == "arm64":
        return ("neon", "dotprod", "fp16")  # every Apple M processor
    return tuple(dict.fromkeys(_ISA[flag] for flag in _ISA if flag in flags))


def cpu_name(info: dict[str, str]) -> str:
    """Model name of the processor; on boards without one, the board's."""
    name = info.get("model name") or info.get("Model") or _read(Path("/proc/device-tree/model"))
    if name is None and platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string")
    return (name or platform.processor() or platform.machine() or "unknown").strip("\x00 ")


# ---------------------------------------------------------------- memory


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, usable) bytes, the control group's limit respected; None where the system does not say."""
    total, usable = _system_memory()
    for folder in _cgroup_folders("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(folder / limit_name)
            if limit is None or not limit.isdigit():
                continue
            if total is not None and int(limit) >= total:
                continue  # no real limit
            total = int(limit)
            used = _read(folder / used_name)
            left = int(limit) - int(used) if used is not None and used.isdigit() else int(limit)
            usable = max(1, left if usable is None else min(usable, left))
    return total, usable


def _system_memory() -> tuple[int | None, int | None]:
    fields = {}
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        parts = line.split()
        if len(parts) >= 2 and parts[1].isdigit():
            fields[parts[0].rstrip(":")] = int(parts[1]) * 1024
    if fields:
        return fields.get("MemTotal"), fields.get("MemAvailable")
    if platform.system() == "Darwin":
        size = _sysctl("hw.memsize")
        if size is not None and size.isdigit():
            # the share devices.md gives for Apple's unified memory
            return int(size), int(size) * 7 // 10
    return None, None


def memcpy_bytes_per_s(seconds: float, *, threads: int = 1) -> float:
    """Bytes that this many threads copy per second together: the fastest pass that fits into `seconds`."""
    each = _COPY_BYTES // threads
    pairs = [(bytearray(each), bytearray(each)) for _ in range(threads)]
    moves = [_move(target, source) for target, source in pairs]
    best, deadline = math.inf, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda move: move(), moves))  # touches every page first
        while True:
            began = time.perf_counter()
            list(pool.map(lambda move: move(), moves))
            now = time.perf_counter()
            best = min(best, now - began)
            if now >= deadline:
                return each * threads / best


def _move(target: bytearray, source: bytearray) -> Callable[[], object]:
    """A copy that lets other threads run, so several add up."""
    size = len(source)
    to = (ctypes.c_char * size).from_buffer(target)
    of = (ctypes.c_char * size).from_buffer(source)
    return lambda: ctypes.memmove(to, of, size)


def matmul_rate(dtype: str, seconds: float) -> float | None:
    """Operations per second of one NumPy matrix product, or None without NumPy; best pass."""
    try:
        import numpy as np
    except ImportError:
        return None
    n = 512 if dtype == "float32" else 128
    a = np.ones((n, n), dtype=dtype)
    a @ a  # starts the library's threads
    best, deadline = math.inf, time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        a @ a
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= deadline:
            return 2 * n**3 / best


# ---------------------------------------------------------------- reading the system


def _cgroup_folders(controller: str) -> list[Path]:
    """Folders that may hold this process's limits: its own group first, then the root."""
    root = Path("/sys/fs/cgroup")
    out = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            out.append(root / path.lstrip("/"))
        elif controller in controllers.split(","):
            out.append(root / controller / path.lstrip("/"))
    return [*out, root, root / controller]


def _temperature() -> float | None:
    """Hottest thermal zone in degrees Celsius."""
    zones = []
    for path in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp")):
        text = _read(path)
        if text is not None and text.lstrip("-").isdigit():
            zones.append(int(text) / 1000)
    return max(zones) if zones else None


def _on_battery() -> bool | None:
    """A battery is being emptied; None where no battery is seen."""
    states = [_read(path) for path in sorted(Path("/sys/class/power_supply").glob("*/status"))]
    if platform.system() == "Darwin":
        said = _output("pmset", "-g", "batt")
        states = [] if said is None or "InternalBattery" not in said else ["Discharging"]
        states = [] if said is not None and "AC Power" in said else states
    return any(state == "Discharging" for state in states) if states else None


def _busy_s() -> float | None:
    """Processor seconds of all programs since the machine started; waiting for disks is not counted."""
    first = (_read(Path("/proc/stat")) or "").partition("\n")[0].split()
    if first[:1] != ["cpu"] or len(first) < 8:
        return None
    user, nice, system, _idle, _wait, irq, soft = map(int, first[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _sysctl(name: str) -> str | None:
    return _output("sysctl", "-n", name)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def transport(address: str, *, config: Path | None = None) -> Transport:
    """A shell on this machine, so that the agent can be used here as it is elsewhere."""
    if address not in ("local", "local://"):
        raise ConfigError(f"'{address}' is not a device address", "write --device local")

    def explain(code: int, words: str) -> tuple[str, str, str | None]:
        return "remote", words or f"the command ended with {code}", None

    return Transport(address="local", argv=lambda line: ["/bin/sh", "-c", line], explain=explain)


DEVICE = Device(
    name="local",
    summary="the machine this program runs on",
    reference="Linux: /proc and /sys (proc(5), cgroups(7)); elsewhere what the system says",
    detect=detect,
    environment=environment,
    available_threads=available_threads,
    transport=transport,
)
