"""lm-evaluation-harness around our engines: its task definitions, prompts and metrics; our forward passes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from edgeprune.errors import ConfigError, MissingExtraError
from edgeprune.evaluation import groups as grouping
from edgeprune.evaluation import localdata
from edgeprune.evaluation.engines import Engine
from edgeprune.evaluation.groups import Pair, Scored, Store
from edgeprune.locate import hub_reason

EXTRA = "eval"
# below the harness's folder of tasks
_DEFINITIONS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
# the split that the harness scores
_SPLITS = {
    **dict.fromkeys(_DEFINITIONS, "validation"),
    **dict.fromkeys(("arc_easy", "arc_challenge"), "test"),
}
_SPLITS["openbookqa"] = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One model's answers to one task: figures of the harness, and every item's own."""

    task: str
    total: int  # items of the whole split
    docs: tuple[int, ...]  # which of them were asked
    metrics: dict[str, tuple[float, float]]  # acc, acc_norm -> value, standard error
    right: dict[str, tuple[float, ...]]  # the same per item, 0 or 1
    ll: tuple[tuple[float, ...], ...]  # log-likelihood of each choice, nats
    version: str


def check() -> None:
    """Raises MissingExtraError when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", EXTRA)


def version() -> str:
    return importlib.metadata.version("lm-eval")


def open_task(name: str, data: Path | None) -> Any:
    """The harness's own task, with its data from `data` or, without it, from the hub.

    Raises ConfigError when the data cannot be had.
    """
    check()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / _DEFINITIONS[name])
    config = {k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}
    if data is not None:
        path = localdata.task_file(data, name)
        if path is None:
            raise ConfigError(f"{data} has no {localdata.expected(name)}")
        rows = localdata.read_task(path, name)

        def local(**_: Any) -> Any:
            return datasets.DatasetDict({_SPLITS[name]: datasets.Dataset.from_list(rows)})

        config["custom_dataset"] = local
        # few-shot examples come from these, and none are asked for
        config["training_split"] = None
        if _SPLITS[name] == "test":
            config["validation_split"] = None
    if "process_docs" in config:
        config["process_docs"] = _once(config["process_docs"])
    try:
        with _no_bars():
            return ConfigurableTask(config=config)
    except Exception as error:  # the hub client and the harness raise dozens of classes
        raise ConfigError(f"task {name}: its data could not be had: {hub_reason(error)}") from None


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The harness goes through all documents each time it asks for them; they stay the same."""
    made: dict[str, Any] = {}

    def processed(dataset: Any) -> Any:
        key = str(getattr(dataset, "_fingerprint", id(dataset)))
        if key not in made:
            made[key] = process(dataset)
        return made[key]

    return processed


@contextlib.contextmanager
def _no_bars() -> Iterator[TextIO]:
    """Keep the libraries' own bars off stderr, and yield the stream that ours go to."""
    shown = sys.stderr
    with contextlib.redirect_stderr(io.StringIO()):
        yield shown


def chosen_docs(total: int, items: int | None, seed: int) -> list[int]:
    """A random subset that holds every smaller subset of the same seed."""
    if items is None or items >= total:
        return list(range(total))
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(total)[:items])


def answer(
    engine: Engine,
    task: Any,
    store: Store,
    *,
    items: int | None,
    seed: int,
    stage: Callable[[int], Any],
) -> Answers:
    """Ask one task; items that the store holds are not computed again. `stage` opens its progress."""
    from lm_eval import evaluator

    name = str(task.config.task)
    with _no_bars():
        total = len(list(task.eval_docs))
    docs = chosen_docs(total, items, seed)
    with _no_bars() as shown:
        lm = _model(engine, store, stage, shown)
        found = evaluator.evaluate(lm, {"tasks": {name: task}}, samples={name: docs}, bootstrap_iters=0)
    if found is None:
        raise AssertionError("the harness gave no results")
    samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    measured = [m for m in ("acc", "acc_norm") if m in samples[0]]
    right = {m: tuple(float(s[m]) for s in samples) for m in measured}
    return Answers(
        task=name,
        total=total,
        docs=tuple(int(s["doc_id"]) for s in samples),
        metrics={m: _mean(right[m]) for m in measured},
        right=right,
        ll=tuple(tuple(float(r[0]) for r in s["filtered_resps"]) for s in samples),
        version=str(found["versions"][name]),
    )


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (sample standard deviation, as the harness takes it)."""
    n = len(values)
    stderr = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return float(np.mean(values)), stderr


def _model(engine: Engine, store: Store, stage: Callable[[int], Any], shown: TextIO) -> Any:
    """An LM of the harness that passes its requests to an engine; made here because its base is optional."""
    from lm_eval.api.model import TemplateLM

    class ArtifactLM(TemplateLM):  # type: ignore[misc]
        """Token strings as the harness makes them, scores from the artifact."""

        def __init__(self) -> None:
            super().__init__()
            self._ids: dict[tuple[str, bool], list[int]] = {}
            self._items: list[Any] = []

        @property
        def eot_token_id(self) -> int:
            return engine.prefix_token

        @property
        def tokenizer_name(self) -> str:
            return engine.key

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self._ids[string, add_special_tokens is not False]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            self._items = [(r.task_name, r.doc_id) for r in requests]
            self._tokenize([r.args for r in requests])
            return super().loglikelihood(requests, disable_tqdm=True)

        def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> None:
            """All strings that the harness will ask for, in one go: a runtime may start a process for it."""
            wanted: dict[tuple[str, bool], None] = {}
            for context, continuation in pairs:
                if not context:
                    wanted[continuation, False] = None
                    continue
                bare = context.rstrip()
                wanted[context + continuation, True] = None
                wanted[bare, True] = None
            self._ids = dict(zip(wanted, engine.encode(list(wanted)), strict=True))

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            by_item: dict[Any, list[int]] = {}
            for i, item in enumerate(self._items):
                by_item.setdefault(item, []).append(i)
            pairs: list[Pair] = [(list(r[1]), list(r[2])) for r in requests]
            grouped = {
                item: grouping.make([pairs[i] for i in at], engine.max_length) for item, at in by_item.items()
            }
            with contextlib.redirect_stderr(shown):
                scored = finish(engine, list(grouped.values()), store, stage)
            out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for item, at in by_item.items():
                found = scored[grouped[item].h]
                for k, i in enumerate(at):
                    out[i] = (found.ll[k], found.greedy[k])
            return out

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("texts are scored in fixed windows, see evaluation/texts.py")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("none of these tasks generates")

    return ArtifactLM()


def finish(
    engine: Engine, wanted: Sequence[grouping.Group], store: Store, stage: Callable[[int], Any]
) -> dict[str, Scored]:
    """Score what the store does not hold yet and return all of it."""
    found = store.read()
    missing = {g.h: g for g in wanted if g.h not in found}
    if missing:
        with stage(len(missing)) as bar:
            engine.score(list(missing.values()), store, bar.advance)
        found = store.read()
    return {g.h: found[g.h] for g in wanted}
