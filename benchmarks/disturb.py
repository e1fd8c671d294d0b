"""Disturb whole runs on purpose, go on, and hold what comes out against an undisturbed run.

    sudo .venv/bin/python benchmarks/disturb.py --write
    .venv/bin/python benchmarks/disturb.py --kinds kill term --most 10

The job is the whole of `edgeprune --target …` on a tiny random model: sampling, scoring, planning, recovery,
export, verification, measurement, choice. Kinds: kill (SIGKILL), term, ctrl-c, ctrl-c-twice, each at every
stage boundary and at random moments; write (SIGKILL before a finished file takes its place: records, weights,
checkpoints of recovery, exports, bundle, report); disk (a full tmpfs), file (a limit on file size), memory (a
cgroup that is too small), refused-memory (malloc fails), network (a namespace without one, then killed),
clock (the date jumps while it runs), second (another run in the same folder), torn (a record cut in half
between two runs).

What must be the same as in the undisturbed run: `selected`, ties, the sha256 of every artifact, the quality
of every candidate and what recovery reached, all to the last bit. Speed differs from run to run, so the job
is one whose answer cannot hinge on it: no limit on speed, and candidates that do not tie in quality, which
is checked on the undisturbed run. Boundaries and writes are those of the undisturbed run; a run stops itself
there (_stop_at/sitecustomize.py), so that every one is met, one after the other in the same folder, before
anything is left to chance. Also counted: a record that was there before a disturbance and is gone or
changed behind it, a stage done twice, a traceback, a process that stays.

Mounts, cgroups and namespaces want root; without it those kinds are left out, and the result says so.
Writes benchmarks/results/disturb.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import RESULTS, ROOT, edgeprune, write_results

MARK = "EDGEPRUNE_DISTURBED"
PROFILE = """\
title = "a whole run in seconds"
[workload]
prompt_tokens = 64
new_tokens = 32
context_tokens = 128
[recipe]
metric = "llm-bip"
allocators = ["uniform"]
calibration_samples = 4
calibration_tokens = 64
eval_samples = 4
eval_tokens = 64
formats = ["gguf"]
quantizations = ["Q8_0"]
ratios = [0.2, 0.4]
max_measured = 2
[bench]
prompt_tokens = 32
new_tokens = 8
repeats = 2
"""
RECOVERY = (
    *("--recovery", "full", "--recovery-mix", "1", "--recovery-tokens", "24576", "--recovery-length", "32"),
    *("--recovery-samples", "768", "--recovery-rate", "3e-4", "--recovery-checkpoint", "0.2"),
)
SIGNALS = {
    "kill": (signal.SIGKILL, 1, (-9,)),
    "term": (signal.SIGTERM, 1, (143, -15)),
    "ctrl-c": (signal.SIGINT, 1, (130,)),
    "ctrl-c-twice": (signal.SIGINT, 2, (130, -2)),
}
SIGNALS_AND_WRITES = {**SIGNALS, "write": SIGNALS["kill"]}
STOPS = Path(__file__).resolve().parent / "_stop_at"
# a boundary by its number, the name of a file, seconds
Moment = int | str | float
KINDS = (
    *SIGNALS_AND_WRITES,
    "disk",
    "file",
    "memory",
    "refused-memory",
    "network",
    "clock",
    "second",
    "torn",
)
MOST_S = 600.0  # of one run; the machine may be busy


# ---------------------------------------------------------------- the job


def make_model(folder: Path) -> Path:
    """A tiny llama with a tokenizer of 800 tokens learned from our own documentation."""
    sys.path.insert(0, str(ROOT / "tests"))
    from builders import tiny_llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tiny_llama(folder, hidden=128, heads=4, kv_heads=2, ff=512, layers=3, vocab=800)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train([str(ROOT / "README.md")], trainer)
    tok.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def command(model: Path, profile: Path, *more: str) -> list[str]:
    """The job, with a limit on the file that the dense model misses; training changes much: nothing ties."""
    said = subprocess.run(edgeprune("inspect", str(model), "--format", "json"), capture_output=True, cwd=ROOT)
    rows = json.loads(said.stdout)["gguf"]
    dense = next(row["file_bytes"] for row in rows if row["quantization"] == "Q8_0")
    args = edgeprune("--target", "laptop-cpu", "--budget", "1GB", "--model", str(model))
    args += ["--profile", str(profile), "--max-file", f"{round(0.75 * dense)}B", "--threads", "1"]
    return [*args, "--format", "json", *more]


def events(folder: Path) -> list[tuple[str, str, str]]:
    """(event, stage, key) of the log; a line that was cut short is left out."""
    out = []
    with contextlib.suppress(OSError):
        for line in (folder / "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                row = json.loads(line)
                out.append((row["event"], row["stage"], row["key"]))
    return out


def boundaries(folder: Path) -> list[tuple[str, str, str]]:
    """Starts and ends of stages, in order; stages of one name differ in their key."""
    return [row for row in events(folder) if row[0] != "skip"]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a disturbance must not change; files are hashed again."""
    report = json.loads((folder / "report.json").read_text())
    rows = {}
    for c in report["candidates"]:
        found = None
        if c["artifact"] is not None:
            data = (folder / c["artifact"]["path"]).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            found = found if found == c["artifact"]["sha256"] else f"{found} is not what the report says"
        quality = c["quality"] and [c["quality"]["kl"], c["quality"]["perplexity"]]
        rows[c["id"]] = [found, quality, c["error"]]
    return {
        "selected": report["selected"],
        "ties": report["ties"],
        "candidates": rows,
        "recovered": {name: said["kl_after"] for name, said in report["recoveries"].items()},
    }


def kept(folder: Path) -> dict[str, str]:
    """Finished records and their contents' hash; of what the search has taken up, the candidates in order."""
    found = {}
    for path in (folder / "records").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged on purpose, now and then
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name.startswith("search_log-"):  # grows by design: what is there must stay
                found[path.name] = "".join(
                    step["id"] + "\n" for step in json.loads(path.read_bytes())["steps"]
                )
    return found


def marked(mark: str) -> set[int]:
    """Processes of one run that are still there."""
    out = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                out.add(int(path.parent.name))
    return out


def has_stopped(pid: int) -> bool:
    """Does a process stand still, by SIGSTOP?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


# ---------------------------------------------------------------- what may be missing here


def may_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def may_mount() -> bool:
    """Mounts are made in a namespace of our own, so that none can stay; see `main`."""
    return os.environ.get(f"{MARK}_MOUNTS") == "private"


def clock_library() -> str | None:
    """libfaketime's file, of the PyPI package of that name."""
    spec = importlib.util.find_spec("libfaketime")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).rglob("libfaketime.so.1")):
            return str(path)
    return None


class Group:
    """A memory cgroup of version 1 or 2 for the runs. Raises OSError where none can be made."""

    def __init__(self) -> None:
        name = f"edgeprune-disturb-{os.getpid()}"
        for root, files in (
            ("/sys/fs/cgroup", ("memory.max", "memory.peak", "anon")),
            ("/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "total_rss")),
        ):
            self.path, (self._limit, self._peak, self._held) = Path(root, name), files
            with contextlib.suppress(OSError):
                self.path.mkdir()
                if (self.path / self._limit).exists():
                    return
                self.path.rmdir()
        raise OSError("no memory cgroup can be made here")

    def most(self, n_bytes: int | None) -> None:
        none = "max" if self._limit == "memory.max" else "-1"
        (self.path / self._limit).write_text(none if n_bytes is None else str(n_bytes))

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        return int((self.path / self._peak).read_text())

    def close_in(self, room: int) -> None:
        """What is held now and `room` bytes more; version 1 refuses a limit that it cannot reach."""
        stat = dict(x.split() for x in (self.path / "memory.stat").read_text().splitlines())
        for more in (0, 16 << 20, 64 << 20, 256 << 20):
            with contextlib.suppress(OSError):
                self.most(int(stat[self._held]) + room + more)
                return

    def remove(self) -> None:
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)


# ---------------------------------------------------------------- one disturbance


@dataclass
class Row:
    """One disturbance: what was done, when, and what came of it."""

    kind: str
    series: str
    moment: str
    hit: str
    exit_code: int | None
    line: str
    lost: int = 0  # records that were there before and are gone or changed
    traceback: bool = False
    wrong_exit: bool = False
    left_running: int = 0


@dataclass
class Bench:
    """The job, the undisturbed run, and what was done so far."""

    scratch: Path
    job: list[str]
    seed: int
    whole_s: float = 0.0
    start_s: float = 0.0  # until the first stage: loading libraries
    calm: dict[str, Any] = field(default_factory=dict)
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # of finished files, in the run folder
    rows: list[Row] = field(default_factory=list)
    different: list[dict[str, Any]] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    scrap: list[str] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)
    finals: int = 0
    deadline: float | None = None  # of the clock; behind it series go to their end undisturbed

    def start(
        self,
        folder: Path,
        *,
        prefix: Sequence[str] = (),
        before: Callable[[], None] | None = None,
        stop_at: Moment | None = None,
        **env: str,
    ) -> tuple[subprocess.Popen[str], str]:
        mark = uuid.uuid4().hex
        if isinstance(stop_at, int):
            event, stage, key = self.steps[stop_at]
            env["EDGEPRUNE_STOP_AT"] = f"log {event} {key} {stage}"
        elif isinstance(stop_at, str):
            env["EDGEPRUNE_STOP_AT"] = f"rename {(folder / stop_at).absolute()}"
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(STOPS), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [*prefix, *self.job, "--out", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", MARK: mark, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=before,
        )
        return process, mark

    def undisturbed(self) -> None:
        folder = self.scratch / "calm"
        began = time.monotonic()
        names = self.scratch / "renames"
        process, _ = self.start(folder, EDGEPRUNE_RENAMES=str(names))
        while not boundaries(folder) and process.poll() is None:
            time.sleep(0.01)
        self.start_s = time.monotonic() - began
        _, err = process.communicate(timeout=MOST_S)
        self.whole_s = time.monotonic() - began
        if process.returncode != 0:
            raise SystemExit(f"the undisturbed run ended with {process.returncode}:\n{err}")
        self.calm, self.steps = outcome(folder), boundaries(folder)
        inside = [
            Path(p) for p in names.read_text().splitlines() if Path(p).is_relative_to(folder.absolute())
        ]
        self.places = list(dict.fromkeys(str(p.relative_to(folder.absolute())) for p in inside))
        hinges = self.calm["ties"] or any(row[2] for row in self.calm["candidates"].values())
        if hinges or self.calm["selected"] is None or not self.calm["recovered"]:
            raise SystemExit(f"this job's answer would hinge on speed: {self.calm}")

    # ------------------------------------------------ waiting

    def until(
        self, process: subprocess.Popen[str], folder: Path, moment: Moment, *, stops: bool = False
    ) -> bool:
        """Wait for a moment; False when the run was over before. `stops`: it stops itself there."""
        if isinstance(moment, float):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment)
        elif stops:
            while process.poll() is None and not has_stopped(process.pid):
                time.sleep(0.004)
        elif isinstance(moment, int):
            while self.steps[moment] not in boundaries(folder) and process.poll() is None:
                time.sleep(0.004)
        return process.poll() is None

    def ended(
        self,
        kind: str,
        series: str,
        moment: str,
        folder: Path,
        process: subprocess.Popen[str],
        mark: str,
        had: dict[str, str],
        codes: tuple[int, ...],
        hit: str | None = None,
    ) -> Row:
        """Collect a disturbed run and note what it did to what was there."""
        try:
            _, err = process.communicate(timeout=MOST_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
        now = kept(folder)
        seen = events(folder)
        deadline = time.monotonic() + 20
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = [x for x in err.splitlines() if x.strip()]
        said = next((x for x in lines if x.startswith("Error: ")), lines[-1] if lines else "")
        row = Row(
            kind=kind,
            series=series,
            moment=moment,
            hit=hit or (" ".join(seen[-1][:2]) if seen else "nothing started"),
            exit_code=process.returncode,
            line=said.replace(str(self.scratch), "…")[:200],
            lost=sum(not now.get(name, "").startswith(digest) for name, digest in had.items()),
            traceback="Traceback" in err,
            wrong_exit=process.returncode not in codes,
            left_running=len(marked(mark)),
        )
        self.rows.append(row)
        print(
            f"{len(self.rows):4} {kind:15} {moment:>9} exit {row.exit_code!s:>4}  "
            f"{row.hit:45.45} {row.line:.90}",
            flush=True,
        )
        if row.traceback or row.wrong_exit:
            print(err[-3000:], flush=True)
        return row

    def finish(self, folder: Path, series: str) -> None:
        """Run to the end without more disturbance and compare."""
        process, _ = self.start(folder)
        _, err = process.communicate(timeout=MOST_S)
        if process.returncode != 0:
            self.different.append({"series": series, "exit_code": process.returncode, "line": err[-300:]})
            return
        self.compare(folder, series)

    def compare(self, folder: Path, series: str) -> None:
        self.finals += 1
        found = outcome(folder)
        for name in self.calm:
            if found[name] != self.calm[name]:
                self.different.append({"series": series, "what": name, "found": found[name]})
        done = Counter((stage, key) for event, stage, key in events(folder) if event == "done")
        if series != "torn":
            self.twice += [f"{series}: {stage}" for (stage, _), n in done.items() if n > 1]
        self.scrap += [f"{series}: {p.name}" for p in folder.rglob("*.part")]
        print(f"     series {series}: {found['selected']}, compared", flush=True)

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def fresh(self, series: str) -> Path:
        self.names[series] += 1
        return self.scratch / f"{series}-{self.names[series]}"

    def rng(self, series: str) -> random.Random:
        """Draws of one series, whatever runs beside it."""
        return random.Random(f"{self.seed} {series}")

    # ------------------------------------------------ kinds

    def signals(self, series: str, plan: Sequence[tuple[str, Moment]]) -> None:
        """One run folder, interrupted by each (signal, moment) in turn; a moment already past is left out."""
        folder = self.fresh(series)
        for kind, moment in plan:
            if self.late():
                break
            if isinstance(moment, int) and self.steps[moment] in boundaries(folder):
                continue
            had = kept(folder)
            process, mark = self.start(folder, stop_at=moment)
            if not self.until(process, folder, moment, stops=True):
                process.communicate()
                self.compare(folder, series)  # it was over before
                folder = self.fresh(series)
                continue
            number, times, codes = SIGNALS_AND_WRITES[kind]
            for _ in range(times):
                with contextlib.suppress(ProcessLookupError):
                    # Ctrl-C reaches every process of the terminal; the others the main one only
                    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)  # it stopped itself
            shown = f"{moment:.1f} s" if isinstance(moment, float) else f"step {moment}"
            hit = None
            if isinstance(moment, int) and self.steps[moment] != boundaries(folder)[-1]:
                shown = f"near {moment}"
            if isinstance(moment, str):
                shown, hit = "rename", shorter(moment)
            self.ended(kind, series, shown, folder, process, mark, had, codes, hit)
        self.finish(folder, series)

    def disk(self, n: int) -> None:
        """A tmpfs that has room for a little more than what is there, a little larger each time."""
        outer, rng = self.fresh("disk"), self.rng("disk")
        outer.mkdir()
        size = 64 << 10
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(outer)], check=True)
        try:
            folder = outer / "run"
            for i in range(n):
                if self.late():
                    break
                had = kept(folder)
                process, mark = self.start(folder)
                self.ended("disk", "disk", f"{size >> 10} KiB", folder, process, mark, had, (2,))
                if process.returncode == 0:
                    break
                used = size - os.statvfs(outer).f_bavail * os.statvfs(outer).f_frsize
                size = used + rng.choice((8, 64, 300, 1000, 2500)) * 1024 + (i + 1) * 4096
                subprocess.run(["mount", "-o", f"remount,size={size}", str(outer)], check=True)
            subprocess.run(["mount", "-o", "remount,size=500m", str(outer)], check=True)
            self.finish(folder, "disk")
        finally:
            subprocess.run(["umount", str(outer)], check=True)

    def files(self, n: int) -> None:
        """No file may grow beyond a size: as a quota, at another place each time."""
        folder, rng = self.fresh("file"), self.rng("file")
        for i in range(n):
            most = int(2 ** rng.uniform(13 + i * 8 / n, 14 + i * 8 / n))
            if self.late():
                break
            had = kept(folder)

            def limit(most: int = most) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

            process, mark = self.start(folder, before=limit)
            self.ended("file", "file", f"{most >> 10} KiB", folder, process, mark, had, (2, 6))
            if process.returncode == 0:
                break
        self.finish(folder, "file")

    def memory(self, n: int) -> None:
        """A cgroup smaller than the job: the kernel kills what asks, the main process or a worker.

        Every other time the limit is there from the start, else it closes in at a stage boundary.
        """
        group, rng = Group(), self.rng("memory")
        try:
            group.most(None)
            process, _ = self.start(self.fresh("memory"), before=group.enter)
            process.communicate(timeout=MOST_S)
            need = group.peak()
            folder = self.fresh("memory")
            for i in range(n):
                part, moment = rng.uniform(0.6, 0.95), (i * len(self.steps)) // n
                if self.late():
                    break
                group.most(None if i % 2 else round(part * need))
                had = kept(folder)
                process, mark = self.start(folder, before=group.enter)
                shown = f"{100 * part:.0f}%"
                if i % 2:
                    shown = f"step {moment}"
                    if self.until(process, folder, moment):
                        group.close_in(rng.randrange(1 << 20, 12 << 20))
                # 0: only a worker was killed, its candidate has an error; 3, 6: every one has
                self.ended("memory", "memory", shown, folder, process, mark, had, (-9, 0, 3, 6))
            group.most(None)
            self.finish(folder, "memory")
        finally:
            group.remove()

    def refused_memory(self, n: int) -> None:
        """Allocations fail in the main process and its workers."""
        folder, rng = self.fresh("refused-memory"), self.rng("refused-memory")
        for i in range(n):
            most = round((0.1 + 0.5 * i / n + rng.uniform(0, 0.1)) * 2**30)
            if self.late():
                break
            had = kept(folder)

            def limit(most: int = most) -> None:
                resource.setrlimit(resource.RLIMIT_DATA, (most, most))

            process, mark = self.start(folder, before=limit)
            self.ended(
                "refused-memory",
                "refused-memory",
                f"{most >> 20} MiB",
                folder,
                process,
                mark,
                had,
                # signals: the page's chart library, or torch, ends the program itself when it gets none
                (0, 3, 5, 6, -5, -6, -11),
            )
        self.finish(folder, "refused-memory")

    def network(self, n: int) -> None:
        """Nothing but this process's own memory and disk: no interface is up. Killed on the way."""
        folder = self.fresh("network")
        for i in range(n):
            had = kept(folder)
            process, mark = self.start(folder, prefix=("unshare", "-n"))
            moment = (i + 1) * len(self.steps) // (n + 1)
            if not self.until(process, folder, moment):
                break
            process.kill()
            self.ended("network", "network", f"step {moment}", folder, process, mark, had, (-9,))
        had = kept(folder)
        process, mark = self.start(folder, prefix=("unshare", "-n"))
        self.ended("network", "network", "whole run", folder, process, mark, had, (0,))
        self.compare(folder, "network")

    def clock(self, n: int, library: str) -> None:
        """The date jumps by years, forward and back, at stage boundaries of runs that go on."""
        rng = self.rng("clock")
        for _ in range(max(1, n // 5)):
            if self.late():
                break
            folder = self.fresh("clock")
            stamp = folder.with_suffix(".offset")
            stamp.write_text("+0")
            had = kept(folder)
            env = {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(stamp), "FAKETIME_NO_CACHE": "1"}
            process, mark = self.start(folder, **env, DONT_FAKE_MONOTONIC="1", FAKETIME_DONT_RESET="1")
            jumps = sorted(rng.sample(range(len(self.steps) - 2), min(5, len(self.steps) - 2)))
            for moment in jumps:
                if not self.until(process, folder, moment):
                    break
                offset = rng.choice((-20, -3, 3, 12)) * 365 + rng.randrange(300)
                stamp.write_text(f"{offset:+d}d")
                if moment != jumps[-1]:
                    hit = " ".join(self.steps[moment][:2])
                    self.rows.append(Row("clock", "clock", f"{offset:+d} d", hit, None, "goes on"))
                    print(f"{len(self.rows):4} clock {offset:+d} d at {hit}", flush=True)
            hit = " ".join(self.steps[jumps[-1]][:2])
            self.ended("clock", "clock", f"{offset:+d} d", folder, process, mark, had, (0,), hit)
            self.compare(folder, "clock")

    def second(self, n: int) -> None:
        """While one run works another is started in the same folder: it is told so, the first goes on."""
        folder = self.fresh("second")
        first, _ = self.start(folder)
        for i in range(n):
            if not self.until(first, folder, i * (len(self.steps) - 1) // n):
                break
            had = kept(folder)
            other, mark = self.start(folder)
            row = self.ended("second", "second", f"no. {i + 1}", folder, other, mark, had, (0, 2))
            # 0: the first was over before this one looked
            row.wrong_exit |= row.exit_code == 2 and "another edgeprune run is using" not in row.line
            row.wrong_exit |= row.exit_code == 0 and first.poll() is None
        _, err = first.communicate(timeout=MOST_S)
        if first.returncode != 0:
            self.different.append({"series": "second", "exit_code": first.returncode, "line": err[-300:]})
        else:
            self.compare(folder, "second")

    def torn(self, n: int) -> None:
        """A finished record is cut in half, as a disk without power may leave it."""
        folder, rng = self.fresh("torn"), self.rng("torn")
        process, _ = self.start(folder)
        process.communicate(timeout=MOST_S)
        for _ in range(n):
            if self.late():
                break
            path = rng.choice(sorted((folder / "records").glob("*.json")))
            had = {k: v for k, v in kept(folder).items() if k != path.name}
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            process, mark = self.start(folder)
            self.ended("torn", "torn", "between", folder, process, mark, had, (0,), path.name[:40])
            self.compare(folder, "torn")


def plans(bench: Bench, most: int | None) -> Iterator[tuple[str, list[tuple[str, Moment]]]]:
    """Series of signals: SIGKILL at every boundary and before every write, the others in turn, chance last.

    Behind a kill a run starts anew, and what it does first it does again: moments go up within a series.
    """
    steps, rng = len(bench.steps), bench.rng("plans")
    take = range(steps) if most is None else sorted(rng.sample(range(steps), min(most, steps)))
    yield "kill", [("kill", i) for i in take]
    files = range(len(bench.places))
    some = files if most is None else sorted(rng.sample(files, min(most, len(files))))
    yield "write", [("write", bench.places[i]) for i in some]
    others = [k for k in SIGNALS if k != "kill"]
    for shift, name in enumerate(others if most is None else others[:1]):
        yield name, [(others[(i + shift) % 3] if most else name, i) for i in take if most or i % 3 == shift]
    n = 16 if most is None else max(1, most // 4)
    rest = bench.whole_s - bench.start_s
    yield (
        "random",
        [
            (rng.choice(list(SIGNALS)), max(0.5, bench.start_s + rng.uniform(-0.3, 0.4) * rest))
            for _ in range(n)
        ],
    )


def not_killed_at(bench: Bench) -> list[str]:
    """Boundaries of the undisturbed run that no SIGKILL met."""
    hit = {row.moment for row in bench.rows if row.kind == "kill"}
    return [
        f"{i}: {event} {stage}" for i, (event, stage, _) in enumerate(bench.steps) if f"step {i}" not in hit
    ]


def not_killed_before(bench: Bench) -> list[str]:
    """Files before whose taking place no SIGKILL came."""
    hit = {row.hit for row in bench.rows if row.kind == "write"}
    return [place for place in bench.places if shorter(place) not in hit]


def shorter(place: str) -> str:
    return re.sub(r"[0-9a-f]{40,}", "…", place)


def summary(bench: Bench, left_out: dict[str, str]) -> dict[str, Any]:
    by_kind: dict[str, dict[str, Any]] = {}
    for row in bench.rows:
        told = by_kind.setdefault(
            row.kind,
            {"injected": 0, "exit_codes": {}, "stages_hit": 0, "lost": 0, "tracebacks": 0, "wrong_exits": 0},
        )
        told["injected"] += 1
        code = str(row.exit_code)
        told["exit_codes"][code] = told["exit_codes"].get(code, 0) + 1
        told["lost"] += row.lost
        told["tracebacks"] += row.traceback
        told["wrong_exits"] += row.wrong_exit
    for kind, told in by_kind.items():
        told["stages_hit"] = len({r.hit for r in bench.rows if r.kind == kind})
    return {
        "undisturbed_s": round(bench.whole_s, 1),
        "stage_boundaries": len(bench.steps),
        "stage_boundaries_not_killed_at": not_killed_at(bench),
        "writes": len(bench.places),
        "writes_not_killed_before": not_killed_before(bench),
        "injected": len(bench.rows),
        "runs_compared": bench.finals,
        "different": bench.different,
        "records_lost": sum(r.lost for r in bench.rows),
        "stages_done_twice": bench.twice,
        "temporary_files_left": bench.scrap,
        "processes_left": sum(r.left_running for r in bench.rows),
        "tracebacks": sum(r.traceback for r in bench.rows),
        "wrong_exits": sum(r.wrong_exit for r in bench.rows),
        "by_kind": by_kind,
        "left_out": left_out,
        "expected": bench.calm,
        "disturbances": [vars(r) for r in bench.rows],
    }


def together(found: dict[str, Any]) -> dict[str, Any]:
    """This campaign in place of an earlier one of the same kinds, and the sums over all."""
    path = RESULTS / "disturb.json"
    known = json.loads(path.read_text())["rows"]["campaigns"] if path.is_file() else []
    campaigns = [c for c in known if c["kinds"] != found["kinds"]] + [found]
    sums = ("injected", "runs_compared", "records_lost", "processes_left", "tracebacks", "wrong_exits")
    return {
        **{name: sum(c[name] for c in campaigns) for name in sums},
        "different": sum(len(c["different"]) for c in campaigns),
        "stages_done_twice": sum(len(c["stages_done_twice"]) for c in campaigns),
        "campaigns": campaigns,
    }


def clean(found: dict[str, Any]) -> bool:
    return not any(
        found[name]
        for name in (
            *("different", "records_lost", "stages_done_twice", "temporary_files_left"),
            *("processes_left", "tracebacks", "wrong_exits"),
        )
    )


def campaign(
    scratch: Path,
    kinds: Sequence[str],
    *,
    seed: int = 0,
    most: int | None = None,
    jobs: int = 1,
    minutes: float | None = None,
) -> dict[str, Any]:
    """All series of these kinds; `most` disturbances of each at most, `jobs` series at a time.

    After `minutes` nothing more is injected, and each series that was begun is run to its end.
    """
    began = time.monotonic()
    model = make_model(scratch / "tiny")
    (scratch / "seconds.toml").write_text(PROFILE)
    bench = Bench(scratch, command(model, scratch / "seconds.toml", *RECOVERY), seed)
    bench.undisturbed()
    bench.deadline = None if minutes is None else began + 60 * minutes
    print(
        f"undisturbed: {bench.whole_s:.1f} s ({bench.start_s:.1f} s until the first stage), "
        f"{len(bench.steps)} boundaries, {len(bench.places)} writes, selected {bench.calm['selected']}",
        flush=True,
    )
    n = 10 if most is None else most
    library = clock_library()
    able = {
        "disk": (may_mount(), "no tmpfs can be mounted here", lambda: bench.disk(n)),
        "file": (True, "", lambda: bench.files(n)),
        "memory": (True, "", lambda: bench.memory(n)),
        "refused-memory": (True, "", lambda: bench.refused_memory(n)),
        "network": (may_unshare(), "no network namespace can be made", lambda: bench.network(min(n, 4))),
        "clock": (library is not None, "pip install libfaketime", lambda: bench.clock(n, str(library))),
        "second": (True, "", lambda: bench.second(min(n, 6))),
        "torn": (True, "", lambda: bench.torn(min(n, 6))),
    }
    left_out = {kind: why for kind, (can, why, _) in able.items() if kind in kinds and not can}
    work: dict[str, Callable[[], None]] = {}
    for series, plan in plans(bench, most):
        chosen = [(kind, moment) for kind, moment in plan if kind in kinds]
        if chosen:
            work[series] = functools.partial(bench.signals, series, chosen)
    work |= {kind: go for kind, (can, _, go) in able.items() if kind in kinds and can}
    if "random" in work:
        work["random"] = work.pop("random")  # chance comes last
    with ThreadPoolExecutor(jobs) as pool:
        going = {name: pool.submit(go) for name, go in work.items()}
    for name, done in going.items():
        error = done.exception()
        if isinstance(error, OSError):
            left_out[name] = str(error)
        elif error is not None:
            raise error
    return {"kinds": list(kinds), **summary(bench, left_out)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ask.add_argument("--most", type=int, help="disturbances of a kind; default: every stage boundary")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--minutes", type=float, help="inject nothing more after this time")
    ask.add_argument("--jobs", type=int, default=1, help="series at a time")
    ask.add_argument("--write", action="store_true", help="write benchmarks/results/disturb.json")
    given = ask.parse_args()
    # started in the background of a shell it is ignored, and would be by every run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not may_mount() and os.geteuid() == 0 and "disk" in given.kinds:
        # a mount namespace of our own: whatever is mounted is gone with this process
        with contextlib.suppress(OSError):
            again = ["unshare", "-m", "--propagation", "private", sys.executable, *sys.argv]
            os.environ[f"{MARK}_MOUNTS"] = "private"
            os.execvp("unshare", again)
    with tempfile.TemporaryDirectory(prefix="edgeprune-disturb-") as made:
        found = campaign(
            Path(made), given.kinds, seed=given.seed, most=given.most, jobs=given.jobs, minutes=given.minutes
        )
    for name, value in found.items():
        if name not in ("expected", "disturbances"):
            print(f"{name}: {value}")
    if given.write:
        print("written to", write_results("disturb", together(found)).relative_to(ROOT))
    sys.exit(0 if clean(found) else 1)


if __name__ == "__main__":
    main()
