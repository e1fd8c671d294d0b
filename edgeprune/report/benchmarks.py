"""What `--eval` found, as lines that the terminal and the model card share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lines(found: Mapping[str, Any]) -> list[str]:
    """One line per text and window, and per task and metric, each beside the dense parent."""
    against = found["against"]
    out = []
    for i, text in enumerate(found["texts"]):
        other = f", dense {against['texts'][i]['reference']:.2f}" if against else ""
        out.append(
            f"{text['text']} in windows of {text['window']} tokens ({text['tokens']:,} tokens): "
            f"perplexity {text['value']:.2f} ± {text['stderr']:.2f}{other}"
        )
    for i, task in enumerate(found["tasks"]):
        for name, m in task["metrics"].items():
            out.append(
                f"{task['task']}, {name} on {task['items']:,} of {task['of']:,} items: "
                f"{100 * m['value']:.2f}% ± {100 * m['stderr']:.2f}"
                f"{_paired(against['tasks'][i]['metrics'][name]) if against else ''}"
            )
    return out


def _paired(p: Mapping[str, Any]) -> str:
    return (
        f", dense {100 * p['reference']:.2f}%; difference {100 * p['difference']:+.2f} "
        f"(95%: {100 * p['low']:+.2f} to {100 * p['high']:+.2f}), McNemar p = {p['p_value']:.3f}"
    )
