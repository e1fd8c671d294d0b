"""Pruned, trimmed and trained in one command: text, teacher and student speak of the same tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

import numpy as np
import torch
from builders import logits, tiny_llama
from safetensors.torch import load_file
from test_tokenizer import CORPUS, train_bpe

import edgeprune
from edgeprune import checkpoint, records, rundir, tokenizer, vocabulary
from edgeprune.errors import ConfigError
from edgeprune.pipeline import recovering, trimming
from edgeprune.pipeline.parent import Parent, open_folder
from edgeprune.progress import Progress, Silent
from edgeprune.records import VocabTrimming
from edgeprune.recovery.recipe import RecoveryRecipe

ROOT = Path(__file__).resolve().parents[1]
TEXT = CORPUS[0] + "\n\n" + CORPUS[3] + "\nAgain, the lazy fox.\n"
RECIPE = (
    *("--recovery", "full", "--recovery-mix", "1", "--recovery-length", "16", "--recovery-samples", "32"),
    *("--recovery-rate", "1e-3"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied Llama of 640 rows and 600 tokens; its end token is the 600th."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama(folder, vocab=640, hidden=64, heads=4, kv_heads=2, ff=128, layers=2)
    train_bpe(folder / "tok", "gpt-2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tok" / name).rename(folder / name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 0, "eos_token_id": [599, 1], "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join([TEXT, *(f"{CORPUS[3]} {i}" for i in range(40))]), encoding="utf-8")
    return path


def command(model: Path, text: Path, ratio: str = "0.3") -> tuple[Any, ...]:
    """Prune and trim, without training."""
    return (
        *("prune", model, "--ratio", ratio, "--metric", "magnitude", "--allocator", "uniform"),
        *("--compensation", "none", "--calibration", text, "--trim-vocab", text),
    )


@pytest.fixture(scope="module")
def small(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned and trimmed, not trained."""
    from edgeprune.cli.main import run

    out = tmp_path_factory.mktemp("small") / "small"
    assert run([str(a) for a in (*command(model, text), "--out", out)]) == 0
    return out


def kept_of(folder: Path) -> list[int]:
    record = records.loads(VocabTrimming, (folder / trimming.RECORD_FILE).read_text())
    return list(vocabulary.read_runs(record.kept))


def kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean KL over positions, from logits [n_tokens, vocab]."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_teacher_is_the_parent_over_kept_rows(model: Path, small: Path) -> None:
    parent, pruned = open_folder(model), open_folder(small)
    teacher = trimming.like(parent, pruned)
    kept = kept_of(small)
    assert teacher.graph.dims == dataclasses.replace(parent.graph.dims, vocab=len(kept))
    assert len(kept) % 64 == 0 and len(kept) < 640
    assert teacher.source.config["eos_token_id"] == [kept.index(599), kept.index(1)]
    assert teacher.key not in (parent.key, pruned.key)
    ids, mine = tokenizer.encode(model, TEXT)[:60], tokenizer.encode(teacher.folder, TEXT)[:60]
    assert [kept[i] for i in mine] == ids
    made = checkpoint.assemble(teacher.source, teacher.graph.dims)
    assert np.array_equal(logits(made, mine), logits(edgeprune.load(model), ids)[:, kept])
    # the same vocabulary on both sides: nothing to do
    assert trimming.like(parent, parent) is parent
    assert trimming.like(pruned, pruned) is pruned


def windows(parent: Parent, text: Path | None, folder: Path) -> np.ndarray:
    recipe = RecoveryRecipe(method="full", data=str(text) if text else None, tokens=64, length=16, samples=8)
    folder.mkdir()
    found = recovering.training_text(parent, recipe, folder, Silent())
    return np.concatenate([found.rows.tokens, found.held.tokens])


def test_training_text_has_the_ids_of_the_trimmed_tokenizer(
    model: Path, small: Path, text: Path, tmp_path: Path
) -> None:
    teacher = trimming.like(open_folder(model), open_folder(small))
    kept = kept_of(small)
    whole = [*tokenizer.encode(model, text.read_text()), 599]  # the parent's end token behind the text
    rows = windows(teacher, text, tmp_path / "given")
    assert [kept[i] for i in rows.reshape(-1)] == whole[: rows.size] and len(whole) - rows.size < 16
    written = windows(teacher, None, tmp_path / "written")
    assert written.shape == (8, 16) and written.max() < len(kept)
    assert written[0, 0] == kept.index(0)  # a conversation begins with the parent's first token


def test_one_command_is_the_two_after_each_other(
    run_cli: Callable[..., Any], model: Path, text: Path, small: Path, tmp_path: Path
) -> None:
    out, two = tmp_path / "one", tmp_path / "two"
    ran = run_cli(
        *command(model, text), *RECIPE, "--recovery-tokens", "4096", "--out", out, "--format", "json"
    )
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    kept = kept_of(out)
    assert said["vocabulary"]["tokens_after"] == len(kept) and kept == kept_of(small)
    recovery = said["recovery"]
    assert recovery["kept"] and recovery["kl_after"] < 0.9 * recovery["kl_before"]
    assert (recovery["text"], recovery["tokens"]) == (str(text), 4096)
    # the same, reckoned here: against the whole parent's logits of the tokens that stay
    ids = tokenizer.encode(out, TEXT)[:60]
    teacher = logits(edgeprune.load(model), [kept[i] for i in ids])[:, kept]
    before, after = (kl(teacher, logits(edgeprune.load(f), ids)) for f in (small, out))
    assert after < 0.9 * before
    weights, dense = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights[name], dense[name][kept])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]
    assert json.loads((out / "edgeprune_plan.json").read_text())["dims"]["vocab"] == len(kept)
    # recover alone finds out from the folder which tokens its parent must leave out
    again = ("recover", small, "--parent", model, *RECIPE, "--recovery-tokens", "4096")
    ran = run_cli(*again, "--recovery-data", text, "--out", two)
    assert ran.code == 0, ran.err
    other = load_file(two / "model.safetensors")
    assert set(other) == set(weights) and all(torch.equal(other[n], weights[n]) for n in weights)


def test_with_nothing_cut_there_is_nothing_to_learn(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    """Ratio 0: the teacher is the trimmed model itself, so the KL is 0 and the rows stay the parent's."""
    out = tmp_path / "out"
    ran = run_cli(
        *command(model, text, "0"),
        *(*RECIPE, "--recovery-precision", "float32", "--recovery-tokens", "512"),
        *("--out", out, "--format", "json"),
    )
    assert ran.code == 0, ran.err
    recovery = json.loads(ran.out)["recovery"]
    assert abs(recovery["kl_before"]) < 1e-6 and not recovery["kept"]
    kept = kept_of(out)
    ids = tokenizer.encode(out, TEXT)[:60]
    whole = logits(edgeprune.load(model), [kept[i] for i in ids])
    assert np.array_equal(logits(edgeprune.load(out), ids), whole[:, kept])


def test_a_gguf_parent(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    parent, out = tmp_path / "parent.gguf", tmp_path / "out"
    ran = run_cli("export", model, "--quantization", "F32", "--no-verify", "--out", parent)
    assert ran.code == 0, ran.err
    ran = run_cli(
        *command(parent, text), *RECIPE, "--recovery-tokens", "1024", "--out", out, "--format", "json"
    )
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["recovery"]["kl_after"] < said["recovery"]["kl_before"]
    kept = kept_of(out)
    assert [kept[i] for i in tokenizer.encode(out, TEXT)] == tokenizer.encode(model, TEXT)


@pytest.mark.parametrize("wrong", ["another row", "too few", "twice", "beyond", "another tokenizer"])
def test_a_record_that_does_not_fit_is_refused(model: Path, small: Path, tmp_path: Path, wrong: str) -> None:
    folder, parent = Path(shutil.copytree(small, tmp_path / "m")), model
    kept = kept_of(folder)
    gone = next(i for i in range(300, 640) if i not in kept)
    if wrong == "another tokenizer":
        parent = Path(shutil.copytree(model, tmp_path / "parent"))
        plain = json.loads((parent / "tokenizer.json").read_text())
        vocab = plain["model"]["vocab"]
        a, b = (t for t, i in vocab.items() if i in kept[100:102])
        vocab[a], vocab[b] = vocab[b], vocab[a]
        (parent / "tokenizer.json").write_text(json.dumps(plain))
    else:
        others = {
            "another row": sorted([*kept[:-1], gone]),
            "too few": kept[:-1],
            "twice": [*kept[:-1], kept[-2]],
            "beyond": [*kept[:-1], 640],
        }
        path = folder / trimming.RECORD_FILE
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "kept": ",".join(map(str, others[wrong]))}))
    with pytest.raises(ConfigError, match="does not say which tokens of"):
        trimming.like(open_folder(parent), open_folder(folder))


def test_a_parent_of_other_size_is_refused(
    run_cli: Callable[..., Any], model: Path, small: Path, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "other", vocab=700, hidden=64, heads=4, kv_heads=2, ff=128, layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, tmp_path / "other" / name)
    ran = run_cli(
        *("recover", small, "--parent", tmp_path / "other", *RECIPE),
        *("--recovery-tokens", "64", "--out", tmp_path / "out"),
    )
    assert ran.code == 2 and f"has {len(kept_of(small))} tokens and its parent other 700" in ran.err


def test_another_text_of_the_same_name_is_cut_anew(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed command had pruned is taken up only when its texts are still the same."""
    words = Path(shutil.copyfile(text, tmp_path / "words.txt"))
    cuts = []

    def cut(folder: Path, _: Progress) -> dict[str, Any]:
        cuts.append(words.read_text())
        shutil.copytree(model, folder, dirs_exist_ok=True)
        return {}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recovering, "recover", killed)
    asked = {"model": model, "calibration": None, "trim_vocab": (str(words),)}
    recipe = RecoveryRecipe(method="full", tokens=64)
    for content in ("a fox", "a fox", "a dog"):
        words.write_text(content)
        with pytest.raises(KeyboardInterrupt):
            recovering.prune_and_recover(
                str(model), tmp_path / "out", cut=cut, asked=asked, recipe=recipe, progress=Silent()
            )
    assert cuts == ["a fox", "a dog"]


# ---------------------------------------------------------------- killed


def start(args: tuple[Any, ...]) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_while_training_it_goes_on(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    def asked(out: Path) -> tuple[Any, ...]:
        more = ("--recovery-tokens", "8192", "--recovery-checkpoint", "0", "--out", out, "--format", "json")
        return (*command(model, text), *RECIPE, *more)

    out = tmp_path / "killed"
    process = start(asked(out))
    until = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < until:
        if next(tmp_path.glob("killed.recovery/artifacts/recovery-*/checkpoint.safetensors"), None):
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    facts = tmp_path / "killed.pruned" / "edgeprune_staged.json"
    before = facts.stat().st_mtime_ns
    said = json.loads(facts.read_text())
    assert said["plan"]["vocabulary"]["tokens_after"] == len(kept_of(facts.parent))
    made = []
    real = rundir.write_text

    def seen(path: Path, content: str) -> None:
        made.append((Path(path).name, facts.stat().st_mtime_ns if facts.exists() else None))
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "write_text", seen)
        ran = run_cli(*asked(out))
    assert ran.code == 0, ran.err
    # the cut was not made again
    assert "edgeprune_staged.json" not in [name for name, _ in made]
    assert {stamp for _, stamp in made} <= {before, None}
    whole = tmp_path / "whole"
    assert run_cli(*asked(whole)).code == 0
    a, b = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    points = [
        [p["kl"] for p in json.loads((f / "edgeprune_recovery.json").read_text())["points"]]
        for f in (out, whole)
    ]
    assert points[0] == points[1] and points[0][-1] < points[0][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]
