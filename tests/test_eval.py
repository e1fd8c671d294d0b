"""The three ways of scoring against one plain forward per choice; resuming; perplexity in windows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from edgeprune import surgery  # noqa: E402
from edgeprune.errors import ConfigError  # noqa: E402
from edgeprune.evaluation import engines, groups, run, suites, texts  # noqa: E402
from edgeprune.evaluation.engines import Settings  # noqa: E402
from edgeprune.evaluation.groups import Group, Pair, Store  # noqa: E402
from edgeprune.pipeline import stages  # noqa: E402
from edgeprune.progress import Silent  # noqa: E402
from tests.builders import FAMILIES, tiny_family, tiny_model_with_tokenizer, tiny_tokenizer  # noqa: E402
from tests.candidates import small_profile  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
F32 = Settings(kv_type="f32")


def items(vocab: int, n: int = 6, seed: int = 0) -> list[list[Pair]]:
    """Items of two to four choices that share their context, a part of it, or nothing."""
    rng = np.random.default_rng(seed)

    def draw(k: int) -> list[int]:
        return [int(t) for t in rng.integers(3, vocab, k)]

    out: list[list[Pair]] = [[(draw(5), draw(1)), (draw(4), draw(2))]]
    for i in range(n):
        context = draw(3 + 5 * i)
        out.append([(context, draw(1 + (i + c) % 4)) for c in range(2 + i % 3)])
    shared = draw(7)
    out.append([([*shared, 5], [9, 10]), ([*shared, 6], [9, 10])])
    return out


def plain(model: Any, pair: Pair) -> tuple[float, bool]:
    """One choice in a forward of its own."""
    context, continuation = pair
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    chances = torch.log_softmax(logits, dim=-1)[len(context) - 1 :]
    wanted = torch.tensor(continuation)
    ll = chances.gather(1, wanted[:, None]).sum()
    return float(ll), bool((chances.argmax(dim=-1) == wanted).all())


def ask(engine: engines.Engine, made: Sequence[Group], path: Path) -> dict[str, groups.Scored]:
    store = Store(path)
    counted: list[int] = []
    engine.score(made, store, counted.append)
    assert sum(counted) == len(made)
    return store.read()


def compare(engine: engines.Engine, folder: Path, path: Path, tolerance: float) -> None:
    model = surgery.load(folder)
    asked = items(model.config.vocab_size)
    made = [groups.make(pairs, 512) for pairs in asked]
    found = ask(engine, made, path)
    for pairs, group in zip(asked, made, strict=True):
        wanted = [plain(model, p) for p in pairs]
        assert found[group.h].ll == pytest.approx([w[0] for w in wanted], abs=tolerance)
        assert found[group.h].greedy == tuple(w[1] for w in wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(tmp_path_factory.mktemp("dense"))


def export(folder: Path, out: Path, form: str, quantization: str) -> Path:
    stages.export(
        str(folder),
        out,
        format_name=form,
        quantization=quantization,
        imatrix_text=None,
        check=False,
        seed=0,
        threads=1,
        progress=Silent(),
    )
    return out


@pytest.fixture(scope="module")
def gguf_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    return export(folder, tmp_path_factory.mktemp("gguf") / "m.gguf", "gguf", "F32")


@pytest.fixture(scope="module")
def onnx_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    return export(folder, tmp_path_factory.mktemp("onnx") / "m", "onnx", "fp32")


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_scores_as_one_forward_per_choice(tmp_path: Path, family: str) -> None:
    folder = tiny_family(tmp_path / "model", family)
    tiny_tokenizer(folder, 300)
    compare(engines.Torch(folder, F32), folder, tmp_path / "s.jsonl", 2e-4)


def test_gguf_scores_as_torch(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    compare(engines.Gguf(gguf_file, F32), folder, tmp_path / "s.jsonl", 1e-3)


def test_exact_leaves_only_what_the_file_rounds(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    halves = Path(shutil.copytree(folder, tmp_path / "halves"))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.half().float() for k, v in weights.items()}, halves / "model.safetensors")
    file = export(halves, tmp_path / "m.gguf", "gguf", "F16")
    scores = tmp_path / "scores"
    compare(engines.Gguf(file, Settings(exact=True)), halves, scores / "s.jsonl", 1e-3)
    assert [p.name for p in scores.iterdir()] == ["s.jsonl"]
    # as it ships, products and cache are rounded to half floats too
    with pytest.raises(AssertionError):
        compare(engines.Gguf(file, Settings()), halves, tmp_path / "t.jsonl", 1e-3)


def test_onnx_scores_as_torch(folder: Path, onnx_folder: Path, tmp_path: Path) -> None:
    compare(engines.Onnx(onnx_folder, F32), folder, tmp_path / "s.jsonl", 1e-3)


def test_each_artifact_tokenizes_alike(folder: Path, gguf_file: Path, onnx_folder: Path) -> None:
    wanted = [("the quick brown fox", True), (" jumps over", False), ("1 lazy dog\n\nagain é", False)]
    first = engines.open_engine(folder, F32).encode(wanted)
    assert all(first)
    assert engines.open_engine(gguf_file, F32).encode(wanted) == first
    assert engines.open_engine(onnx_folder, F32).encode(wanted) == first


def test_an_artifact_is_told_by_what_it_holds(
    folder: Path, gguf_file: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    assert [engines.kind_of(p) for p in (folder, gguf_file, onnx_folder)] == ["torch", "gguf", "onnx"]
    (tmp_path / "x").write_text("no model")
    for wrong, message in (
        (tmp_path / "x", "no GGUF file"),
        (tmp_path, "neither"),
        (tmp_path / "y", "not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            engines.kind_of(wrong)


def test_the_key_says_what_changes_a_score(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    other = tiny_model_with_tokenizer(tmp_path, seed=5)
    keys = [
        engines.Torch(folder, F32).key,
        engines.Torch(folder, Settings(dtype="bfloat16")).key,
        engines.Torch(other, F32).key,
        engines.Gguf(gguf_file, F32).key,
        engines.Gguf(gguf_file, Settings(kv_type="f16")).key,
        engines.Gguf(gguf_file, Settings(exact=True)).key,
    ]
    assert len(set(keys)) == 6
    assert engines.Gguf(gguf_file, Settings(exact=True, kv_type="q8_0")).key == keys[5]
    assert engines.Torch(folder, Settings(kv_type="q8_0", threads=3)).key == keys[0]


def test_batches_are_of_similar_length_and_bounded() -> None:
    made = [groups.window(list(range(3, 3 + n))) for n in (900, 30, 31, 2100, 32, 880, 40)]
    sizes = [[g.tokens for g in batch] for batch in engines._batches(made)]
    assert all(b[0] * len(b) <= 4096 for b in sizes)
    assert [len(b) for b in sizes] == [1, 4, 2]
    assert sorted(t for b in sizes for t in b) == [29, 30, 31, 39, 879, 899, 2099]


# ---------------------------------------------------------------- perplexity

TEXT = "the quick brown fox jumps over the lazy dog and again the lazy fox " * 40


@contextlib.contextmanager
def _quiet(n: int) -> Iterator[Any]:
    with Silent().stage("", n) as bar:
        yield bar


def test_windows_by_hand_on_every_path(
    folder: Path, gguf_file: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    model = surgery.load(folder)
    ids = engines.open_engine(folder, F32).encode([(TEXT, True)])[0][:200]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    with torch.inference_mode():
        logits = model(rows, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    for path in (folder, gguf_file, onnx_folder):
        engine = engines.open_engine(path, F32)
        store = Store(tmp_path / f"{path.name}.jsonl")
        got = texts.perplexity(engine, "t", TEXT, "here", 64, store, tokens=200, stage=_quiet)
        assert got.value == pytest.approx(float(loss.exp()), rel=2e-3)
        assert (got.tokens, len(got.nll), got.window) == (192, 3, 64)


def test_a_text_shorter_than_a_window_or_a_window_too_long_is_refused(folder: Path, tmp_path: Path) -> None:
    engine, store = engines.open_engine(folder, F32), Store(tmp_path / "s.jsonl")
    with pytest.raises(ConfigError, match="fill no window of 64"):
        texts.perplexity(engine, "t", "the fox", "here", 64, store, tokens=None, stage=_quiet)
    with pytest.raises(ConfigError, match="the model reads"):
        texts.perplexity(engine, "t", TEXT, "here", 10**6, store, tokens=None, stage=_quiet)


# ---------------------------------------------------------------- the verb


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "wikitext-2" / "wiki.test.raw"
    path.parent.mkdir(parents=True)
    path.write_text(TEXT.replace(" and ", " and \n "))
    return tmp_path / "data"


def suite_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    return path


def test_eval_prints_the_window_and_compares(
    run_cli: Callable[..., Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    suite = suite_file(tmp_path, 'texts = ["wikitext2"]\nwindows = [32, 64]\n')
    other = tiny_model_with_tokenizer(tmp_path / "other", seed=3)
    args = ("eval", folder, "--suite", suite, "--data", data, "--tokens", "320", "--compare", other)
    out = tmp_path / "out"
    shown = run_cli(*args, "--out", out)
    assert shown.code == 0, shown.err
    head, *rows = shown.out.splitlines()
    assert head.split() == ["text", "window", "tokens", "perplexity", "compared", "nats/token"]
    assert [r.split()[:3] for r in rows] == [["wikitext2", "32", "320"], ["wikitext2", "64", "320"]]
    stored = json.loads((out / "eval.json").read_text())
    mine, theirs = stored["texts"][0], stored["against"]["texts"][0]
    difference = np.log(mine["value"]) - np.log(theirs["reference"])
    assert theirs["nll_difference"] == pytest.approx(difference, abs=1e-9)
    assert theirs["low"] < theirs["nll_difference"] < theirs["high"]
    again = run_cli(*args, "--out", out, "--format", "json")
    assert json.loads(again.out) == stored
    assert "windows of" not in again.err  # nothing was computed twice


def test_everything_missing_is_named_before_anything_is_scored(
    run_cli: Callable[..., Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    suite = suite_file(tmp_path, 'texts = ["wikitext2", "ptb"]\nwindows = [32]\n')
    out = tmp_path / "out"
    ran = run_cli("eval", folder, "--suite", suite, "--data", data, "--out", out)
    assert ran.code == 2
    assert ran.err.splitlines() == [
        f"Error: {data} has no ptb/ptb.valid.txt",
        "Hint: add the files; or score what is there: --tasks wikitext2",
    ]
    assert not out.exists()


@pytest.mark.parametrize("engine", ["torch", "gguf"])
def test_a_killed_evaluation_goes_on(
    engine: str, folder: Path, gguf_file: Path, data: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    path = folder if engine == "torch" else gguf_file
    (data / "wikitext-2" / "wiki.test.raw").write_text(TEXT * 8)
    suite = suite_file(tmp_path, 'texts = ["wikitext2"]\nwindows = [8]\n')
    out = tmp_path / "out"
    args = ["eval", path, "--suite", suite, "--data", data, "--threads", "1"]
    command = [sys.executable, "-m", "edgeprune", *map(str, args), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 240
        while not (stored := list(out.glob("arrays/eval/*/*.jsonl"))) or not stored[0].stat().st_size:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.5)  # a worker of the killed process ends with it
    before = set(Store(stored[0]).read())
    assert before
    assert run_cli(*args, "--out", out).code == 0
    lines = [json.loads(x)["h"] for x in stored[0].read_text().splitlines()]
    assert before <= set(lines)
    assert len(lines) == len(set(lines))  # what was finished was not computed again
    whole = run_cli(*args, "--out", tmp_path / "whole", "--format", "json")
    assert json.loads((out / "eval.json").read_text()) == json.loads(whole.out)


def test_comparing_other_items_is_refused(folder: Path) -> None:
    from edgeprune.evaluation.harness import Answers

    def one(docs: tuple[int, ...]) -> run.Evaluated:
        n = len(docs)
        task = Answers(
            task="piqa",
            total=9,
            docs=docs,
            metrics={"acc": (0.5, 0.1)},
            right={"acc": (1.0,) * n},
            ll=((0.0, 1.0),) * n,
            version="1",
        )
        return run.Evaluated(path="x", kind="torch", key="k", texts=(), tasks=(task,))

    with pytest.raises(ConfigError, match="asked other items"):
        run.compare(one((1, 2)), one((1, 3)), seed=0)
    assert run.compare(one((1, 2)), one((1, 2)), seed=0)["tasks"][0]["metrics"]["acc"]["p_value"] == 1.0
    assert suites.find("papers").names[0] == "wikitext2"


# ---------------------------------------------------------------- the main job


def test_a_run_scores_what_it_selected(
    run_cli: Callable[..., Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    suite = suite_file(tmp_path, 'texts = ["wikitext2"]\nwindows = [32]\ntokens = 640\n')
    out = tmp_path / "run"
    args = ("--target", "laptop-cpu", "--model", folder, "--profile", _profile(tmp_path), "--out", out)
    ran = run_cli(*args, "--budget", "100MB", "--eval", suite, "--eval-data", data, "--threads", "1")
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    found = report["benchmarks"]
    selected = next(c for c in report["candidates"] if c["id"] == report["selected"])
    assert found["path"] == selected["artifact"]["path"] and found["kind"] == "gguf"
    assert found["against"]["kind"] == "torch"
    line = f"perplexity {found['texts'][0]['value']:.2f}"
    assert line in ran.out
    assert line in (out / "bundle" / "README.md").read_text(encoding="utf-8")


PROFILE = small_profile(
    workload=(32, 16, 64),
    bench=(16, 4, 5),
    metric="magnitude",
    calibration_samples=2,
    calibration_tokens=32,
    eval_samples=2,
    eval_tokens=32,
    quantizations=["Q8_0"],
    ratios=[0.1],
    max_measured=1,
)


def _profile(tmp_path: Path) -> Path:
    path = tmp_path / "short.toml"
    path.write_text(PROFILE, encoding="utf-8")
    return path


def test_missing_data_of_a_run_is_said_before_it_starts(
    run_cli: Callable[..., Any], folder: Path, data: Path, tmp_path: Path
) -> None:
    suite = suite_file(tmp_path, 'texts = ["ptb"]\nwindows = [32]\n')
    out = tmp_path / "run"
    args = ("--target", "laptop-cpu", "--model", folder, "--out", out)
    ran = run_cli(*args, "--eval", suite, "--eval-data", data)
    assert (ran.code, out.exists()) == (2, False)
    assert ran.err.splitlines()[0] == f"Error: {data} has no ptb/ptb.valid.txt"
