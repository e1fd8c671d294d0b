"""Measure candidates where they will run, and hold the chosen one against its budget.

On a device the artifact is copied once per lane and removed after it. What a lane gets back are the same
records that a local measurement gives; the device's whole answer, with every raw sample, lies beside them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import edgeprune
from edgeprune import bench, rundir
from edgeprune.costs import speed
from edgeprune.devices._session import Session
from edgeprune.errors import DeviceError
from edgeprune.pipeline import calibrating
from edgeprune.records import (
    BenchProtocol,
    BenchResult,
    DeviceTarget,
    LaunchFlags,
    MemoryResult,
    make_key,
    to_plain,
)

FINALISTS = ("killed", "crashed", "load")  # what a run under a hard limit may die of
TIMEOUT_S = 1800.0


@dataclass(slots=True, kw_only=True)
class DeviceBench:
    """A connected device that measures the artifacts of a run."""

    run: rundir.RunDir
    session: Session
    backend: str
    local: bool  # the artifact is where the agent is
    sustained_s: float
    _there: dict[str, str] = field(default_factory=dict)  # sha256 -> path on the device

    @property
    def name(self) -> str:
        """What records call this machine."""
        facts = self.session.facts
        board = facts["board"] or facts["cpu"]
        mode = f", {facts['power_mode']}" if facts["power_mode"] else ""
        return f"{board} ({self.session.transport.address}{mode})"

    @property
    def runtime_version(self) -> str:
        facts = self.session.facts
        return str(facts["llama_cpp"] or facts["llama_bench"])

    def threads(self) -> int:
        return int(self.session.facts["threads"])

    def memory(
        self,
        path: Path,
        *,
        sha256: str,
        flags: LaunchFlags,
        key: str,
        threads: int,
        limit_bytes: int | None = None,
    ) -> MemoryResult:
        """Peak memory with the whole context filled; over `limit_bytes` the process is killed."""
        found = self._measure(
            path,
            sha256,
            key,
            {
                "n_prompt": 8,
                "n_gen": 4,
                "repeats": 1,
                "threads": threads,
                "fill": True,
                "flags": to_plain(flags),
                "memory_limit_bytes": limit_bytes,
            },
        )
        peak = found["peak_bytes"]
        if self.backend == "gpu":
            # what a GPU holds is in no process's resident size; on a shared memory it is missing from it
            peak = max(peak, found["available_drop_bytes"] or 0)
        return MemoryResult(
            artifact_sha256=sha256,
            device=self.name,
            flags=flags,
            peak_bytes=peak,
            before_bytes=found["before_bytes"],
            tokens_filled=found["tokens_filled"],
            load_ns=found["load_ns"],
            key=key,
        )

    def bench(
        self,
        path: Path,
        *,
        sha256: str,
        flags: LaunchFlags,
        protocol: BenchProtocol,
        threads: int | None,
        key: str,
    ) -> BenchResult:
        """Prefill, decode, first token and a sustained run; the thread count is swept when None."""
        began = datetime.datetime.now(datetime.timezone.utc)
        found = self._measure(
            path,
            sha256,
            key,
            {
                "n_prompt": protocol.prompt_tokens,
                "n_gen": protocol.new_tokens,
                "repeats": protocol.repeats,
                "threads": threads,
                "sweep": [] if threads else list(bench.thread_counts(self.threads())),
                "sustained_s": self.sustained_s,
                "flags": to_plain(flags),
            },
        )
        joules, meter = energy(found["sustained"])
        state, after = (
            calibrating.state_of(found[when], cpu=self.session.facts["cpu"], threads=self.threads())
            for when in ("before", "after")
        )
        return BenchResult(
            artifact_sha256=sha256,
            device=self.name,
            runtime=found["engine"],
            runtime_version=found["engine_version"],
            simulated=False,
            n_threads=found["threads"],
            flags=flags,
            n_prompt=protocol.prompt_tokens,
            n_gen=protocol.new_tokens,
            prefill_ns=tuple(found["prefill_ns"]),
            decode_ns=tuple(found["decode_ns"]),
            load_ns=found["load_ns"],
            thread_sweep=found["sweep"],
            environment=state,
            key=key,
            model_type=found["model_type"],
            model_bytes=found["model_bytes"],
            model_params=found["model_params"],
            n_batch=found["n_batch"],
            build_commit=found["build_commit"],
            test_time=began.strftime("%Y-%m-%dT%H:%M:%SZ"),
            doubts=bench.doubts(
                state,
                after,
                elapsed_s=found["elapsed_s"],
                own_s=found["own_s"],
                spread=bench.relative_spread(protocol.new_tokens, found["decode_ns"]),
            ),
            joules_per_token=joules,
            meter=meter,
        )

    def drop(self, sha256: str) -> None:
        """Remove the copy of an artifact whose lane is over."""
        path = self._there.pop(sha256, None)
        if path is not None and not self.local and not self.session.keep:
            self.session.remove(path)

    def _measure(self, path: Path, sha256: str, key: str, job: dict[str, Any]) -> dict[str, Any]:
        where = str(path.absolute())
        if not self.local:
            # asked every time: a device that was restarted may have lost its files
            where = self._there[sha256] = self.session.send(path, sha256)
        found = self.session.measure({**job, "path": where, "backend": self.backend}, timeout_s=TIMEOUT_S)
        before, after = found["before"]["boot_id"], found["after"]["boot_id"]
        if before != after:
            raise DeviceError("reboot", f"{self.session.transport.address} was restarted while it measured")
        answer = {"facts": self.session.facts, "job": job, "answer": found}
        rundir.write_text(
            self.run.root / "arrays" / f"device-{key}.json", json.dumps(answer, indent=1) + "\n"
        )
        return found


def energy(sustained: Mapping[str, Any] | None) -> tuple[float | None, str | None]:
    """(Joules per generated token, meter) of a device's sustained run; (None, None) where nothing metered it.

    What the meter sees is the whole package or board, idle power and the run's own prompts included.
    """
    if sustained is None or not sustained.get("tokens") or not (sustained.get("joules") or 0) > 0:
        return None, None
    return sustained["joules"] / sustained["tokens"], sustained.get("meter")


@contextlib.contextmanager
def connect(
    device: str,
    run: rundir.RunDir,
    target: DeviceTarget,
    *,
    mode: str | None,
    ssh_config: Path | None,
    python: str | None,
    llama_bench: str | None,
    keep: bool,
    sustained_s: float,
    say: Callable[[str], None],
) -> Iterator[DeviceBench]:
    """The device of a run, checked before any work is done; its folder there goes with the run."""
    is_local = device == "local"
    # the same run folder finds its copies again
    name = f"run-{rundir.sha256_bytes(str(run.root.resolve()).encode())[:12]}"
    with calibrating.open_session(
        device,
        name=name,
        ssh_config=ssh_config,
        python=python,
        llama_bench=llama_bench,
        keep=keep,
        say=say,
    ) as session:
        if not is_local:
            session.preflight(arch=target.arch, mode=mode)
        backend = "cpu" if is_local else speed.default_backend(target)
        yield DeviceBench(run=run, session=session, backend=backend, local=is_local, sustained_s=sustained_s)


def hold(
    device: DeviceBench,
    path: Path,
    *,
    sha256: str,
    flags: LaunchFlags,
    limit_bytes: float,
    threads: int,
) -> str | None:
    """Run a finalist under a hard limit with the whole context filled; why it was killed, or None.

    What counts is taken from the moment before the model is opened, as in every measured peak.
    """
    limit = round(limit_bytes)
    key = make_key("hold", sha256, flags, limit, device.name, device.runtime_version, edgeprune.__version__)

    def compute() -> MemoryResult:
        return device.memory(path, sha256=sha256, flags=flags, key=key, threads=threads, limit_bytes=limit)

    try:
        device.run.stage(MemoryResult, key, compute, name=f"hold {path.name}")
    except DeviceError as error:
        if error.kind in FINALISTS:
            return f"under a hard limit of its budget with a full context: {error.message}"
        raise
    return None
