"""The main job from Python: `edgeprune.fit(model, target=…, budget=…)`, with the command line's records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import records, registry, rundir
from edgeprune.errors import ConfigError
from edgeprune.progress import Progress, Silent
from edgeprune.records import Candidate, DeviceTarget, Profile
from edgeprune.units import parse_bytes

# what the command line says when an option is left out
_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(("metric", "calibration", "eval_text", "mode")),
    "quantizations": (),
}
_NAMED = frozenset(
    (
        *("target", "budget_bytes", "model", "profile", "device", "out", "file_bytes", "min_tps", "max_kl"),
        *("seed", "threads", "max_candidates", "command", "label"),
    )
)
# what need not be said to get the same run again
_USUAL = (("profile", "chat-2k"), ("device", "local"), ("seed", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished run. Paths are absolute; `report` is the whole of report.json."""

    folder: Path
    headline: str
    answers: tuple[Mapping[str, Any], ...]  # what to do and to expect, with the figures behind it
    selected: Candidate | None  # None: nothing met the limits
    ties: tuple[Candidate, ...]  # whose quality cannot be told from the selected one's
    candidates: tuple[Candidate, ...]
    target: DeviceTarget
    profile: Profile
    report: Mapping[str, Any]

    @property
    def file(self) -> Path | None:
        """The selected model file."""
        if self.selected is None or self.selected.artifact is None:
            return None
        return self.folder / self.selected.artifact.path

    @property
    def page(self) -> Path:
        """report.html of the run."""
        return self.folder / "report.html"

    @property
    def launch(self) -> str | None:
        """A llama-server command with the flags that were measured, to be run in `folder`."""
        found = self.report["launch"]
        return None if found is None else str(found)


def fit(
    model: str | Path | None = None,
    *,
    target: str | Path,
    budget: int | str | None = None,
    profile: str | Path = "chat-2k",
    device: str = "local",
    out: str | Path | None = None,
    max_file: int | str | None = None,
    min_tps: float | None = None,
    max_kl: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    max_candidates: int | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Result:
    """Make the best model that fits a device, as the command line's main job does.

    Args:
        model: Hugging Face folder or id, or a GGUF file. None: SmolLM2-135M-Instruct.
        target: Name of a target or a file; see `edgeprune targets`.
        budget: Memory the model may take, in bytes or as text such as "200MB". None: what the target spares.
        profile: Name of a use case or a file; see `edgeprune profiles`.
        device: Where to measure: local or ssh://user@host.
        out: Run folder; a run that was interrupted goes on there. None: a folder in edgeprune-runs/.
        max_file: Largest file to ship, in bytes or as text.
        min_tps: Slowest decode allowed, tokens per second.
        max_kl: Largest KL to the dense model, nats per token.
        seed: Seed of all sampling.
        threads: Threads to use. None: the best found.
        max_candidates: Measure at most so many.
        progress: Where stages are reported; None: nowhere.
        **more: Any other field of `edgeprune.pipeline.RunOptions`, such as metric="saap".

    Raises:
        ConfigError: for bad input, all problems at once.
        InfeasibleError: when nothing meets the limits; `edgeprune.api.read` then reads what was measured.
    """
    # torch is loaded when a job starts, not with the package
    from edgeprune import pipeline

    asked = {
        "model": None if model is None else str(model),
        "target": str(target),
        "budget": budget,
        "profile": str(profile),
        "device": device,
        "out": None if out is None else str(out),
        "max_file": max_file,
        "min_tps": min_tps,
        "max_kl": max_kl,
        "seed": seed,
        "threads": threads,
        "max_candidates": max_candidates,
        **more,
    }
    size = None if budget is None else str(budget)
    folder = Path(out or rundir.default_root(asked["model"], asked["target"], asked["profile"], size))
    fields: dict[str, Any] = {
        **{k: v for k, v in asked.items() if k not in ("budget", "max_file")},
        **_more(pipeline.RunOptions, more),
        "budget_bytes": _bytes(budget, "budget"),
        "file_bytes": _bytes(max_file, "max_file"),
        "out": folder,
        "command": _command(asked),
    }
    pipeline.run(pipeline.RunOptions(**fields), progress or Silent())
    return read(folder)


def read(folder: str | Path) -> Result:
    """The result of a finished run. Raises ConfigError when there is none."""
    from edgeprune.pipeline import light

    root = Path(folder).absolute()
    report = light.load_report(root)
    rows = tuple(records.from_plain(Candidate, row) for row in report["candidates"])
    by_id = {c.id: c for c in rows}
    return Result(
        folder=root,
        headline=report["headline"],
        answers=tuple(report.get("answers") or ()),
        selected=by_id.get(report["selected"]),
        ties=tuple(by_id[name] for name in report["ties"] if name in by_id),
        candidates=rows,
        target=records.from_plain(DeviceTarget, report["target"]),
        profile=records.from_plain(Profile, report["profile"]),
        report=report,
    )


def _more(kind: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(kind)} - _NAMED
    problems = [f"fit: unknown argument '{n}'{registry.suggest(n, known)}" for n in more if n not in known]
    if problems:
        raise ConfigError(problems, f"known: {', '.join(sorted(known))}")
    return {**_DEFAULTS, **more}


def _bytes(value: int | str | None, what: str) -> int | None:
    return parse_bytes(value, what=what) if isinstance(value, str) else value


def _command(asked: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes this run again, as a command line: reports carry it."""
    shown = ", ".join(f"{k}={v!r}" for k, v in asked.items() if v is not None and (k, v) not in _USUAL)
    return ("python", "-c", f"import edgeprune; edgeprune.fit({shown})")
