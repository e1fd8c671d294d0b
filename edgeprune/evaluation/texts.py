"""Perplexity of a text in fixed windows that do not overlap; what fills no window is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import quality
from edgeprune.errors import ConfigError
from edgeprune.evaluation import groups as grouping
from edgeprune.evaluation import harness, localdata
from edgeprune.evaluation.engines import Engine
from edgeprune.evaluation.groups import Store
from edgeprune.locate import hub_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """One text in one window; the first token of a window is not predicted."""

    text: str
    source: str  # file or data set with its split
    window: int
    tokens: int  # read: windows times window
    value: float
    stderr: float
    nll: tuple[float, ...]  # per window, nats per predicted token


def read(name: str, data: Path | None) -> tuple[str, str]:
    """(text, where it is from). Raises ConfigError when it cannot be had."""
    if data is not None:
        path = localdata.text_file(data, name)
        if path is None:
            raise ConfigError(f"{data} has no {localdata.expected(name)}")
        return localdata.read_text(path, name), f"{path.parent.name}/{path.name}"
    if name != "wikitext2":
        raise ConfigError(
            f"{name} is not on the hub in a form that can be read",
            f"give a folder with {localdata.expected(name)}",
        )
    try:
        import datasets

        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:  # the hub client raises dozens of classes
        raise ConfigError(f"text {name}: its data could not be had: {hub_reason(error)}") from None
    return "\n\n".join(rows), "Salesforce/wikitext wikitext-2-raw-v1 test"


def perplexity(
    engine: Engine,
    name: str,
    text: str,
    source: str,
    window: int,
    store: Store,
    *,
    tokens: int | None,
    stage: Callable[[int], Any],
) -> Perplexity:
    """Score a text; raises ConfigError when it fills no window or the model cannot read one."""
    if window > engine.max_length:
        raise ConfigError(f"a window of {window} tokens, but the model reads {engine.max_length}")
    ids = engine.encode([(text, True)])[0][:tokens]
    n = len(ids) // window
    if n == 0:
        raise ConfigError(f"{name} has {len(ids)} tokens, which fill no window of {window}")
    rows = [grouping.window(ids[i * window : (i + 1) * window]) for i in range(n)]
    scored = harness.finish(engine, rows, store, stage)
    nll = np.array([-scored[g.h].ll[0] / (window - 1) for g in rows])
    found = quality.perplexity(nll[:, None])
    return Perplexity(
        text=name,
        source=source,
        window=window,
        tokens=n * window,
        value=found.value,
        stderr=found.stderr,
        nll=tuple(float(x) for x in nll),
    )
