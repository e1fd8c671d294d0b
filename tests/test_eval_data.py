"""Suites, local files of benchmarks, grouping and pairing: all that needs neither torch nor the harness."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import ConfigError
from edgeprune.evaluation import groups, localdata, paired, suites

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="the data folder is not beside the checkout"),
]


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


# ---------------------------------------------------------------- suites


def test_papers_is_all_of_it_and_quick_is_a_part() -> None:
    papers, quick = suites.find("papers"), suites.find("quick")
    assert papers.windows == (128, 2048) and papers.texts == ("wikitext2", "ptb") and len(papers.tasks) == 7
    assert papers.items is None and papers.tokens is None
    assert set(quick.names) < set(papers.names) and quick.items == 100 and quick.tokens == 32_768


def test_a_suite_of_a_users_own(tmp_path: Path) -> None:
    path = put(tmp_path / "mine.toml", 'texts = ["wikitext2"]\nwindows = [64]\ntasks = ["piqa"]\nitems = 5\n')
    assert suites.find(str(path)) == suites.Suite(
        texts=("wikitext2",), windows=(64,), tasks=("piqa",), items=5
    )


def test_every_problem_of_a_suite_is_named_at_once(tmp_path: Path) -> None:
    path = put(tmp_path / "mine.toml", 'tasks = ["piqqa"]\ntexts = ["ptb"]\nwindows = [1]\nitems = 0\n')
    with pytest.raises(ConfigError) as caught:
        suites.find(str(path))
    assert [p.partition("mine.toml: ")[2] for p in caught.value.problems] == [
        "unknown task 'piqqa' (did you mean 'piqa'?)",
        "a window of 1 tokens predicts nothing",
        "items must be at least 1",
    ]


def test_an_unknown_suite_or_task_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown suite 'paper' \(did you mean 'papers'\?\)"):
        suites.find("paper")
    with pytest.raises(ConfigError, match=r"no 'arc-easy' \(did you mean 'arc_easy'\?\)"):
        suites.chosen(suites.find("papers"), names=["arc-easy"], items=None, tokens=None)


def test_tasks_and_limits_narrow_a_suite() -> None:
    got = suites.chosen(suites.find("quick"), names=["wikitext2", "piqa"], items=7, tokens=None)
    assert got == suites.Suite(texts=("wikitext2",), windows=(2048,), tasks=("piqa",), items=7, tokens=32_768)


# ---------------------------------------------------------------- local files


def test_rows_are_joined_as_the_papers_do(tmp_path: Path) -> None:
    wiki = put(tmp_path / "wiki.test.raw", " \n = Title = \n \n Words here . \n")
    # rows: ' ', ' = Title = ', ' ', ' Words here . '; full ones keep their newline, blank ones become empty
    assert localdata.read_text(wiki, "wikitext2") == "\n\n = Title = \n\n\n\n\n Words here . \n"
    assert localdata.read_text(put(tmp_path / "ptb", " no it was n't \n mr. <unk> N \n"), "ptb") == (
        "no it was n't\n\nmr. <unk> N"
    )


def _question(key: str) -> dict[str, Any]:
    choices = [{"text": "moss", "label": "A"}, {"text": "sand", "label": "B"}]
    return {"id": "q1", "question": {"stem": "What grows?", "choices": choices}, "answerKey": key}


LAYOUTS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "boolq of SuperGLUE": (
        "boolq",
        {"boolq/val.jsonl": jsonl({"question": "is it", "passage": "It is.", "idx": 4, "label": True})},
        {"question": "is it", "passage": "It is.", "idx": 4, "label": 1},
    ),
    "boolq with labels as text": (
        "boolq",
        {"boolq/val.jsonl": jsonl({"question": "is it", "passage": "No.", "idx": 0, "label": "false"})},
        {"question": "is it", "passage": "No.", "idx": 0, "label": 0},
    ),
    "boolq's own": (
        "boolq",
        {"boolq/dev.jsonl": jsonl({"question": "is it", "passage": "No.", "title": "T", "answer": False})},
        {"question": "is it", "passage": "No.", "idx": 0, "label": 0},
    ),
    "piqa": (
        "piqa",
        {
            "piqa/valid.jsonl": jsonl({"goal": "open", "sol1": "pull", "sol2": "eat"}),
            "piqa/valid-labels.lst": "1\n",
        },
        {"goal": "open", "sol1": "pull", "sol2": "eat", "label": 1},
    ),
    "hellaswag of six lines": (
        "hellaswag",
        {"hellaswag/hellaswag_val_full.txt": "Cooking: A man cuts. He stirs. the man\n3\na\nb\nc\nd\n"},
        {
            "activity_label": "Cooking",
            "ctx_a": "A man cuts. He stirs.",
            "ctx_b": "the man",
            "endings": ["a", "b", "c", "d"],
            "label": "3",
        },
    ),
    "hellaswag of six lines, whole sentences": (
        "hellaswag",
        {"hellaswag/hellaswag_val_full.txt": "Health: Wash hands. Use soap: a lot.\n0\na\nb\nc\nd\n"},
        {
            "activity_label": "Health",
            "ctx_a": "Wash hands. Use soap: a lot.",
            "ctx_b": "",
            "endings": ["a", "b", "c", "d"],
            "label": "0",
        },
    ),
    "hellaswag's own": (
        "hellaswag",
        {
            "hellaswag_val.jsonl": jsonl(
                {
                    "ind": 24,
                    "activity_label": "Cooking",
                    "ctx_a": "A man cuts.",
                    "ctx_b": "he",
                    "ctx": "A man cuts. he",
                    "endings": ["a", "b", "c", "d"],
                    "label": 2,
                }
            )
        },
        {
            "activity_label": "Cooking",
            "ctx_a": "A man cuts.",
            "ctx_b": "he",
            "endings": ["a", "b", "c", "d"],
            "label": "2",
        },
    ),
    "winogrande": (
        "winogrande",
        {
            "winogrande_1.1/dev.jsonl": jsonl(
                {"qID": "1", "sentence": "Ann beat Bea as _ ran.", "option1": "Ann", "option2": "Bea"}
            ),
            "winogrande_1.1/dev-labels.lst": "2\n",
        },
        {"sentence": "Ann beat Bea as _ ran.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    ),
    "arc": (
        "arc_challenge",
        {"arc/ARC-Challenge-Test.jsonl": jsonl(_question("B"))},
        {
            "id": "q1",
            "question": "What grows?",
            "choices": {"text": ["moss", "sand"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        "openbookqa",
        {"OpenBookQA-V1-Sep2018/Data/Main/test.jsonl": jsonl(_question("A"))},
        {
            "id": "q1",
            "question_stem": "What grows?",
            "choices": {"text": ["moss", "sand"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_official_layout_becomes_the_harness_row(tmp_path: Path, name: str) -> None:
    task, files, wanted = LAYOUTS[name]
    for relative, text in files.items():
        put(tmp_path / relative, text)
    path = localdata.task_file(tmp_path, task)
    assert path is not None
    assert localdata.read_task(path, task) == [wanted]


@pytest.mark.parametrize(
    ("relative", "text", "task", "message"),
    [
        ("boolq/val.jsonl", '{"question": "a"}\n', "boolq", "does not have the layout of boolq"),
        ("boolq/val.jsonl", "not json\n", "boolq", "line 1: not JSON"),
        ("boolq/val.jsonl", "\n", "boolq", "has no items"),
        ("hellaswag/hellaswag_val_full.txt", "a: b\n0\nc\n", "hellaswag", "no whole items of 6"),
        ("piqa/valid.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c"}\n', "piqa", "cannot read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, relative: str, text: str, task: str, message: str) -> None:
    path = put(tmp_path / relative, text)
    with pytest.raises(ConfigError, match=message) as caught:
        localdata.read_task(path, task)
    assert path.parent.name in caught.value.message


COUNTS = {"boolq": 3270, "piqa": 1838, "hellaswag": 10_042, "arc_easy": 2376, "arc_challenge": 1172}
GOLD: dict[str, Callable[[dict[str, Any]], int]] = {
    "boolq": lambda r: int(r["label"]),
    "piqa": lambda r: int(r["label"]),
    "hellaswag": lambda r: int(r["label"]),
    "arc_easy": lambda r: r["choices"]["label"].index(r["answerKey"]),
    "arc_challenge": lambda r: r["choices"]["label"].index(r["answerKey"]),
}


def _raw_golds(task: str) -> list[int]:
    """Golds straight from the files, by another route than the readers."""
    if task == "boolq":
        return [int('"label": "true"' in line) for line in (DATA / "boolq/val.jsonl").open(encoding="utf-8")]
    if task == "piqa":
        return [int(line) for line in (DATA / "piqa/valid-labels.lst").open()]
    if task == "hellaswag":
        text = (DATA / "hellaswag/hellaswag_val_full.txt").read_text(encoding="utf-8").split("\n")
        return [int(line) for line in text[1::6]]
    name = "ARC-Easy-Test" if task == "arc_easy" else "ARC-Challenge-Test"
    rows = [json.loads(line) for line in (DATA / f"arc/{name}.jsonl").open(encoding="utf-8")]
    return [[c["label"] for c in r["question"]["choices"]].index(r["answerKey"]) for r in rows]


@pytest.mark.parametrize("task", [pytest.param(t, marks=needs_data) for t in COUNTS])
def test_counts_and_golds_of_the_local_data(task: str) -> None:
    path = localdata.task_file(DATA, task)
    assert path is not None
    rows = localdata.read_task(path, task)
    golds = [GOLD[task](r) for r in rows]
    assert len(rows) == COUNTS[task]
    assert golds == _raw_golds(task)
    assert len(collections.Counter(golds)) >= 2
    if task == "boolq":
        assert sum(golds) == 2033  # its official share of yes, 62.17%


DEV_COUNTS = {"arc_easy": ("ARC-Easy-Dev", 570), "arc_challenge": ("ARC-Challenge-Dev", 299)}


@pytest.mark.parametrize("task", [pytest.param(t, marks=needs_data) for t in DEV_COUNTS])
def test_the_dev_split_of_arc_has_the_same_layout(task: str) -> None:
    """It is not what the harness scores, so only a file named by hand is read as one."""
    name, count = DEV_COUNTS[task]
    path = DATA / f"arc/{name}.jsonl"
    rows = localdata.read_task(path, task)
    assert len(rows) == count
    raw = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert [r["answerKey"] for r in rows] == [r["answerKey"] for r in raw]
    # letters or digits, three to five choices: the gold is always one of them
    assert {GOLD[task](r) for r in rows} <= set(range(5))
    test = localdata.task_file(DATA, task)
    assert test is not None and test.name == path.name.replace("Dev", "Test")
    assert not {r["id"] for r in rows} & {r["id"] for r in localdata.read_task(test, task)}


# the end of a line is a token too
WIKITEXT = {"wiki.test.raw": 245_569, "wiki.valid.tokens": 217_646, "wiki.train.tokens": 2_088_628}


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_data) for n in WIKITEXT])
def test_the_local_wikitext_has_its_words(name: str) -> None:
    text = (DATA / "wikitext-2" / name).read_text(encoding="utf-8")
    assert len(text.split()) + text.count("\n") == WIKITEXT[name]


@pytest.mark.parametrize("text", [pytest.param("wikitext2", marks=needs_data)])
def test_the_local_wikitext_is_read_whole(text: str) -> None:
    path = localdata.text_file(DATA, text)
    assert path is not None and path.name == "wiki.test.raw"
    assert path.read_text(encoding="utf-8").count("\n") == 4358
    assert len(localdata.read_text(path, text).split()) == 245_569 - 4358


@pytest.mark.parametrize("task", [pytest.param("hellaswag", marks=needs_data)])
def test_hellaswag_is_split_as_its_two_sources(task: str) -> None:
    rows = localdata.read_task(DATA / "hellaswag/hellaswag_val_full.txt", task)
    # ActivityNet contexts end in a fragment, WikiHow ones in a sentence
    assert sum(bool(r["ctx_b"]) for r in rows) == 3243


# ---------------------------------------------------------------- grouping


def test_choices_share_their_first_tokens() -> None:
    made = groups.make([([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6, 7])], max_length=16)
    # inputs are 1 2 3 4 and 1 2 3 4 6: the last token is only predicted
    assert (made.prefix, made.tails) == ((1, 2, 3, 4), ((), (6,)))
    assert (made.starts, made.targets) == ((2, 2), ((4, 5), (4, 6, 7)))
    assert (made.tokens, made.length) == (5, 5)


def test_nothing_shared_is_no_prefix() -> None:
    made = groups.make([([1], [9]), ([2], [9])], max_length=16)
    assert (made.prefix, made.tails, made.starts) == ((), ((1,), (2,)), (0, 0))


def test_a_long_choice_loses_tokens_from_the_left() -> None:
    made = groups.make([([1, 2, 3, 4], [5, 6])], max_length=3)
    # 3 tokens are read and the last target is predicted only: 3 4 5 -> 6
    assert (made.prefix, made.starts, made.targets) == ((3, 4, 5), (1,), ((5, 6),))


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 and 4 tokens cannot be scored with 3"):
        groups.make([([1], [2, 3, 4, 5])], max_length=3)


def test_a_window_predicts_all_but_its_first_token() -> None:
    made = groups.window([7, 8, 9])
    assert (made.prefix, made.tails, made.starts, made.targets) == ((7, 8), ((),), (0,), ((8, 9),))


def test_the_store_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "a" / "task.jsonl"
    with groups.Store(path).open() as f:
        f.write(groups.line_of("x", [-1.5, -2.0], [True, False]))
        f.write('{"h": "y", "ll": [-3')
    again = groups.Store(path)
    assert again.read() == {"x": groups.Scored((-1.5, -2.0), (True, False))}
    end = again.size()
    with again.open() as f:
        f.write(groups.line_of("y", [-3.0], [True]))
    assert again.read()["y"] == groups.Scored((-3.0,), (True,))
    assert again.count(end) == (1, again.size())


# ---------------------------------------------------------------- pairing


def test_mcnemar_by_hand() -> None:
    # 6 discordant items, at most 1 on one side: 2 * (1 + 6) / 2**6
    assert paired.mcnemar(1, 5) == pytest.approx(14 / 64)
    assert paired.mcnemar(3, 3) == 1.0
    assert paired.mcnemar(0, 0) == 1.0
    assert paired.mcnemar(0, 2000) < 1e-300 or paired.mcnemar(0, 2000) == 0.0


def test_paired_accuracy_by_hand() -> None:
    got = paired.accuracy([1, 1, 0, 1, 0], [1, 0, 0, 0, 1])
    assert (got.n, got.only_a, got.only_b) == (5, 2, 1)
    assert got.difference == pytest.approx(0.2)
    assert got.low <= got.difference <= got.high
    assert got.p_value == 1.0


def test_the_bootstrap_has_the_width_of_theory() -> None:
    a = [1.0] * 300 + [0.0] * 100 + [1.0] * 600
    b = [0.0] * 300 + [1.0] * 100 + [1.0] * 600
    got = paired.accuracy(a, b, seed=1)
    # variance of one item's difference: 0.4 - 0.2**2; 1000 items
    half = 1.96 * (0.36 / 1000) ** 0.5
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.05)


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        paired.accuracy([1, 0], [1])
