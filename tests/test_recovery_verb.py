"""`edgeprune recover` as users start it: folders, kill -9, two processes, text of every kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import edgeprune
from edgeprune import tokenizer
from edgeprune.errors import ConfigError
from edgeprune.recovery import text
from tests import builders

ROOT = Path(__file__).resolve().parents[1]
SHORT = (
    "--recovery-mix",
    "1",
    "--recovery-length",
    "16",
    "--recovery-samples",
    "32",
    "--recovery-rate",
    "1e-3",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny dense model and the same with half of every FFN gone."""
    from edgeprune.cli.main import run

    folder = tmp_path_factory.mktemp("models")
    dense = builders.tiny_model_with_tokenizer(folder / "dense")
    args = ["prune", str(dense), "--ratio", "0.3", "--compensation", "none", "--samples", "4"]
    assert run([*args, "--allocator", "uniform", "--length", "16", "--out", str(folder / "pruned")]) == 0
    return dense, folder / "pruned"


def command(models: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    dense, pruned = models
    return ["recover", str(pruned), "--parent", str(dense), "--out", str(out), *SHORT, *more]


def start(args: list[str], *, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *(launch or ("-m", "edgeprune")), *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_folder_comes_out_that_is_closer_to_its_parent(
    models: tuple[Path, Path], tmp_path: Path, run_cli: Callable
) -> None:
    out = tmp_path / "out"
    ran = run_cli(
        *command(models, out, "--recovery", "full", "--recovery-tokens", "2048", "--format", "json")
    )
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["kept"] is True
    assert said["kl_after"] < said["kl_before"]
    assert (said["steps"], said["tokens"], said["stopped"]) == (16, 2048, "the tokens asked for")
    record = json.loads((out / "edgeprune_recovery.json").read_text())
    assert record["kind"] == "recovery_result"
    assert len(record["points"]) >= 3
    assert json.loads((out / "edgeprune_plan.json").read_text())["kind"] == "prune_plan"
    before, after = load_file(models[1] / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert edgeprune.load(out)(torch.tensor([[1, 5, 9]])).logits.shape == (1, 3, 300)
    assert not out.with_name("out.recovery").exists()


def test_a_recovery_that_makes_things_worse_changes_nothing(
    models: tuple[Path, Path], tmp_path: Path, run_cli: Callable
) -> None:
    out = tmp_path / "out"
    args = command(
        models, out, "--recovery", "full", "--recovery-tokens", "512", "--recovery-objective", "lm"
    )
    ran = run_cli(*args, "--recovery-rate", "30")
    assert ran.code == 0, ran.err
    assert "discarded: the validation loss went from" in ran.out
    before, after = load_file(models[1] / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_killed_three_times_the_weights_are_the_same(models: tuple[Path, Path], tmp_path: Path) -> None:
    asked = ("--recovery", "lora", "--recovery-tokens", "16384", "--seed", "2")
    whole = start(command(models, tmp_path / "whole", *asked))
    said = whole.communicate(timeout=240)
    assert whole.returncode == 0, said
    work = tmp_path / "killed.recovery"
    kills = 0
    seen = 0.0
    while kills < 3:
        process = start(command(models, tmp_path / "killed", *asked, "--recovery-checkpoint", "0"))
        found = None
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            found = next(work.glob("artifacts/recovery-*/checkpoint.safetensors"), None)
            if found is not None and found.stat().st_mtime > seen + 0.2:
                break
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        assert found is not None
        seen = found.stat().st_mtime
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    last = start(command(models, tmp_path / "killed", *asked))
    said = last.communicate(timeout=240)
    assert last.returncode == 0, said
    a = load_file(tmp_path / "whole" / "model.safetensors")
    b = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, two = (
        json.loads((tmp_path / name / "edgeprune_recovery.json").read_text()) for name in ("whole", "killed")
    )
    assert [p["kl"] for p in one["points"]] == [p["kl"] for p in two["points"]]
    assert one["kept"]


# accelerate starts several CPU processes by this switch only
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "edgeprune"),
)


@pytest.mark.slow
def test_two_processes_train_as_one(models: tuple[Path, Path], tmp_path: Path) -> None:
    # in bfloat16 the number of rows in a matrix product changes its rounding
    asked = ("--recovery", "full", "--recovery-tokens", "2048", "--recovery-precision", "float32")
    runs = {
        "one": start(command(models, tmp_path / "one", *asked)),
        "two": start(command(models, tmp_path / "two", *asked), launch=LAUNCH),
        "shared": start(command(models, tmp_path / "shared", *asked, "--recovery-shard"), launch=LAUNCH),
    }
    for process in runs.values():
        said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert said[0].count("written to") == 1  # one of the two speaks
    one, two, shared = (
        json.loads((tmp_path / name / "edgeprune_recovery.json").read_text()) for name in runs
    )
    assert (one["processes"], two["processes"], shared["processes"]) == (1, 2, 2)
    assert len(one["points"]) == 9
    assert one["points"][-1]["kl"] < 0.97 * one["points"][0]["kl"]
    for other in (two, shared):
        for a, b in zip(one["points"], other["points"], strict=True):
            assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-5)
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in runs]
    for name, value in weights[0].items():
        for other_weights in weights[1:]:
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- what users write wrongly


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--recovery", "lorra"), "unknown recovery 'lorra' (did you mean 'lora'?)"),
        (("--recovery", "lora", "--recovery-option", "rang=8"), "recovery method lora has no switch 'rang'"),
        (("--recovery", "lora", "--recovery-option", "rank=x"), "recovery switch rank=x is not a number"),
        (
            ("--recovery", "full", "--recovery-data", "nowhere.txt"),
            "recovery data nowhere.txt does not exist",
        ),
        (("--recovery", "auto", "--recovery-tokens", "100"), "--recovery auto shares out minutes"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    models: tuple[Path, Path], tmp_path: Path, run_cli: Callable, more: tuple[str, ...], problem: str
) -> None:
    ran = run_cli(*command(models, tmp_path / "out", *more))
    assert ran.code == 2
    assert problem in ran.err
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_parent_of_another_vocabulary_is_refused(
    models: tuple[Path, Path], tmp_path: Path, run_cli: Callable
) -> None:
    other = builders.tiny_model_with_tokenizer(tmp_path / "other", vocab=301)
    ran = run_cli(
        *command((other, models[1]), tmp_path / "out", "--recovery", "full", "--recovery-tokens", "9")
    )
    assert ran.code == 2
    assert "has 300 tokens and its parent" in ran.err


# ---------------------------------------------------------------- text


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """A tokenizer with a chat template."""
    folder = builders.tiny_model_with_tokenizer(tmp_path / "chatty")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def packed(folder: Path, documents: list, n_tokens: int, separator: int | None = 2) -> text.Rows:
    return text.pack(
        documents,
        lambda one: tokenizer.encode(folder, one),
        lambda: text.Chat(folder),
        n_tokens=n_tokens,
        separator=separator,
    )


def test_the_loss_is_on_answers_only(chatty: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(
        json.dumps([{"instruction": "the fox", "input": "a dog", "output": "jumps over", "category": "x"}])
    )
    documents = text.read(str(path))
    assert documents == [
        [{"role": "user", "content": "the fox\n\na dog"}, {"role": "assistant", "content": "jumps over"}]
    ]
    asked = tokenizer.encode(chatty, "<s>user:the fox\n\na dog</s><s>assistant:")
    answer = tokenizer.encode(chatty, "jumps over</s>")
    rows = packed(chatty, documents, len(asked) + len(answer))
    assert rows.tokens[0].tolist() == asked + answer
    assert rows.learn[0].tolist() == [False] * len(asked) + [True] * len(answer)


def test_every_answer_of_a_conversation_counts(chatty: Path) -> None:
    said = [("user", "the"), ("assistant", "fox"), ("user", "lazy"), ("assistant", "dog")]
    messages = [{"role": role, "content": content} for role, content in said]
    with text.Chat(chatty) as chat:
        pieces = list(chat.pieces(messages))
    assert pieces == [
        ("<s>user:the</s><s>assistant:", False),
        ("fox</s>", True),
        ("<s>user:lazy</s><s>assistant:", False),
        ("dog</s>", True),
    ]


def test_without_a_template_questions_and_answers_stand_plainly(models: tuple[Path, Path]) -> None:
    chat = text.Chat(models[0])
    assert not chat.templated
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    assert list(chat.pieces(messages)) == [("the fox\n\n", False), ("jumps\n\n", True)]


def test_texts_are_packed_with_a_separator(models: tuple[Path, Path]) -> None:
    folder = models[0]
    one, two = (tokenizer.encode(folder, t) for t in ("the quick", "brown fox"))
    whole = [*one, 2, *two, 2]
    n = len(whole) // 2
    rows = packed(folder, ["the quick", "brown fox"], n)
    assert rows.tokens.reshape(-1).tolist() == whole[: 2 * n]
    assert rows.learn[:, 0].tolist() == [False, False]
    assert rows.learn[:, 1:].all()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"text": "x"}\n{"tex": 1}\n', "a.jsonl:2: no text and no instruction in it"),
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.json", "{}", "expected a list of records"),
        ("a.json", '[{"messages": [{"role": "user", "content": "x"}]}]', "no message of role 'assistant'"),
        ("a.txt", " \n", "is empty"),
    ],
)
def test_wrong_data_names_its_place(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        text.read(str(tmp_path / name))


def test_rows_of_a_step_depend_on_the_step_alone() -> None:
    steps = [text.batch_rows(s, n_rows=10, batch=4, seed=1) for s in range(5)]
    seen = np.concatenate(steps)
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert text.batch_rows(3, n_rows=10, batch=4, seed=1).tolist() == steps[3].tolist()
    assert text.batch_rows(3, n_rows=10, batch=4, seed=2).tolist() != steps[3].tolist()


def test_the_last_rows_are_held_out() -> None:
    rows = text.plain_rows(np.arange(90).reshape(30, 3))
    train, held = text.split(rows)
    assert (len(train), len(held)) == (27, 3)
    assert held.tokens[0, 0] == 81
    with pytest.raises(ConfigError, match="single window"):
        text.split(rows.part(0, 1))
