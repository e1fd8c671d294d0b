"""Benchmark items from local files: the official layouts, turned into the fields of the harness's tasks.

Each reader returns the rows of the split that the harness scores, as its data set on the hub has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import ConfigError

Row = dict[str, Any]

# the last fragment of a HellaSwag context begins behind the end of its last sentence
_LAST_FRAGMENT = re.compile(r"^(.*[.!?][\"')]*) ([^.!?]*)$")


def _lines(path: Path) -> list[str]:
    # splitlines would also break at characters that are inside a row
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def _labels(path: Path, n: int) -> list[str]:
    found = [line.strip() for line in _lines(path) if line.strip()]
    if len(found) != n:
        raise ConfigError(f"{path} has {len(found)} labels for {n} items")
    return found


def _boolq(path: Path) -> list[Row]:
    """SuperGLUE's file (label) or BoolQ's own (answer)."""
    return [
        {
            "question": row["question"],
            "passage": row["passage"],
            "idx": row.get("idx", i),
            "label": _yes(row["label"] if "label" in row else row["answer"]),
        }
        for i, row in enumerate(_jsonl(path))
    ]


def _yes(value: Any) -> int:
    # some copies hold the truth as text
    found = {"true": 1, "1": 1, "false": 0, "0": 0}.get(str(value).strip().lower())
    if found is None:
        raise ValueError(f"label {value!r}")
    return found


def _piqa(path: Path) -> list[Row]:
    rows = _jsonl(path)
    labels = _labels(path.with_name(f"{path.stem}-labels.lst"), len(rows))
    return [
        {"goal": r["goal"], "sol1": r["sol1"], "sol2": r["sol2"], "label": int(label)}
        for r, label in zip(rows, labels, strict=True)
    ]


def _hellaswag(path: Path) -> list[Row]:
    if path.suffix == ".jsonl":
        return [
            {
                "activity_label": r["activity_label"],
                "ctx_a": r["ctx_a"],
                "ctx_b": r["ctx_b"],
                "endings": r["endings"],
                "label": str(r["label"]),
            }
            for r in _jsonl(path)
        ]
    lines = _lines(path)
    if len(lines) % 6:
        raise ConfigError(f"{path} has {len(lines)} lines, which are no whole items of 6")
    return [_hellaswag_item(lines[i : i + 6]) for i in range(0, len(lines), 6)]


def _hellaswag_item(lines: Sequence[str]) -> Row:
    """Six lines: 'activity: context', gold, four endings."""
    activity, _, context = lines[0].partition(": ")
    # a whole sentence at the end means that the endings are sentences of their own
    fragment = None if context.endswith(".") else _LAST_FRAGMENT.match(context)
    first, last = fragment.groups() if fragment else (context, "")
    return {
        "activity_label": activity,
        "ctx_a": first,
        "ctx_b": last,
        "endings": list(lines[2:6]),
        "label": str(int(lines[1])),
    }


def _winogrande(path: Path) -> list[Row]:
    rows = _jsonl(path)
    if any("answer" not in r for r in rows):
        labels = _labels(path.with_name(f"{path.stem}-labels.lst"), len(rows))
        rows = [{**r, "answer": label} for r, label in zip(rows, labels, strict=True)]
    return [
        {"sentence": r["sentence"], "option1": r["option1"], "option2": r["option2"], "answer": r["answer"]}
        for r in rows
    ]


def _choices(row: Row) -> Row:
    listed = row["question"]["choices"]
    return {"text": [c["text"] for c in listed], "label": [c["label"] for c in listed]}


def _science(path: Path, stem: str) -> list[Row]:
    """ARC and OpenBookQA are written alike; on the hub the text of the question has another name in each."""
    return [
        {
            "id": r["id"],
            stem: r["question"]["stem"],
            "choices": _choices(r),
            "answerKey": r["answerKey"],
        }
        for r in _jsonl(path)
    ]


def _arc(path: Path) -> list[Row]:
    return _science(path, "question")


def _openbookqa(path: Path) -> list[Row]:
    return _science(path, "question_stem")


# where each task's file may lie below the data folder; the first that exists is read
_FILES: dict[str, tuple[Callable[[Path], list[Row]], tuple[str, ...]]] = {
    "boolq": (_boolq, ("boolq/val.jsonl", "boolq/dev.jsonl", "BoolQ/val.jsonl")),
    "piqa": (_piqa, ("piqa/valid.jsonl", "physicaliqa-train-dev/dev.jsonl")),
    "hellaswag": (
        _hellaswag,
        ("hellaswag/hellaswag_val_full.txt", "hellaswag/hellaswag_val.jsonl", "hellaswag_val.jsonl"),
    ),
    "winogrande": (_winogrande, ("winogrande/dev.jsonl", "winogrande_1.1/dev.jsonl")),
    "arc_easy": (_arc, ("arc/ARC-Easy-Test.jsonl", "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl")),
    "arc_challenge": (
        _arc,
        ("arc/ARC-Challenge-Test.jsonl", "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl"),
    ),
    "openbookqa": (
        _openbookqa,
        ("openbookqa/test.jsonl", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"),
    ),
}
_TEXT_FILES = {
    "wikitext2": ("wikitext-2/wiki.test.raw", "wikitext-2-raw/wiki.test.raw"),
    # the validation split is what LLM-Pruner's scripts read
    "ptb": ("ptb/ptb.valid.txt", "ptb/valid.txt", "ptb/ptb.test.txt", "ptb/test.txt"),
}


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / n for n in names if (folder / n).is_file()), None)


def task_file(folder: Path, task: str) -> Path | None:
    """The file of a task below `folder`, or None."""
    return _first(folder, _FILES[task][1])


def text_file(folder: Path, text: str) -> Path | None:
    return _first(folder, _TEXT_FILES[text])


def expected(name: str) -> str:
    """The first place where a text or task is looked for, for messages."""
    return (_TEXT_FILES[name] if name in _TEXT_FILES else _FILES[name][1])[0]


def read_task(path: Path, task: str) -> list[Row]:
    """Rows of a task's file. Raises ConfigError for a damaged one."""
    try:
        rows = _FILES[task][0](path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} does not have the layout of {task}: {error!r:.100}") from None
    if not rows:
        raise ConfigError(f"{path} has no items")
    return rows


def read_text(path: Path, text: str) -> str:
    """A text with its rows joined by two newlines, as the pruning papers' scripts do.

    WikiText rows keep their own newline where they are not empty, as its data set on the hub has them; this
    gives the 341,469 LLaMA tokens of the test split that those scripts count. PTB rows are bare sentences.
    """
    lines = _lines(path)
    if text == "ptb":
        return "\n\n".join(line.strip() for line in lines)
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
