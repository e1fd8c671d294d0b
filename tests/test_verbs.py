"""The single-stage verbs on tiny models: numbers, files, exit codes and error lines."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import torch
from builders import logits, tiny_model_with_tokenizer
from candidates import budget, candidate, small_profile, write_report
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

import edgeprune
from edgeprune import rundir, selection
from edgeprune.records import PrunePlan, QualityResult, dumps, loads

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 300, 40)]
# per layer: q, k, v, o of 64 x 64, 64 x 32, 64 x 32, 64 x 64; gate, up, down of 128 x 64; two norms
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 128 * 64 + 2 * 64
DECODER = 3 * LAYER
TOTAL = DECODER + 2 * 300 * 64 + 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_with_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [
        f"The quick brown fox jumps over dog number {i} again, and {7 * i} times more." for i in range(60)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# the metric alone, nothing around it
PLAIN = ("--allocator", "uniform", "--compensation", "none")


def asked(text: Path, *more: str | Path) -> tuple[str | Path, ...]:
    """Options of a small calibration, and more."""
    return ("--calibration", text, "--samples", "4", "--length", "32", *more)


def count(folder: Path) -> int:
    return sum(t.numel() for t in load_file(folder / "model.safetensors").values())


# ---------------------------------------------------------------- inspect


def test_inspect(run_cli: Callable[..., Any], model: Path) -> None:
    ran = run_cli("inspect", model, "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert (found["parameters"], found["decoder_parameters"]) == (TOTAL, DECODER) == (149_440, 110_976)
    assert found["embedding_parameters"] == TOTAL - DECODER
    assert found["embedding_share"] == pytest.approx((TOTAL - DECODER) / TOTAL)
    assert (found["heads"], found["kv_heads"], found["ffn_width"]) == ([4] * 3, [2] * 3, [128] * 3)
    assert (found["family"], found["vocabulary"], found["tied"]) == ("llama", 300, False)
    kv, ffn = found["axes"]
    # a KV group: two heads of q and o, one of k and v; a channel: a row of gate and up, a column of down
    assert (kv["units"], kv["params_per_unit"]) == (6, 6 * 16 * 64)
    assert (ffn["units"], ffn["params_per_unit"]) == (384, 3 * 64)
    q4 = next(row for row in found["gguf"] if row["quantization"] == "Q4_0")
    assert (q4["ffn_multiple"], q4["kv_multiple"], q4["uniform_across_layers"]) == (32, 1, False)
    table = run_cli("inspect", model).out
    assert "parameters         149,440\n" in table
    assert f"Q4_0            {q4['file_bytes']:,}" in table


def test_inspect_reads_no_weights_and_no_torch(
    run_python: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom edgeprune.cli.main import run\ncode = run(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'gguf', 'llama_cpp'} & set(sys.modules)\nsys.exit(code)"
    )
    assert run_python(code, "inspect", str(model)).code == 0


def test_inspect_predicts_the_bytes_of_every_file(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    rows = json.loads(run_cli("inspect", model, "--format", "json").out)["gguf"]
    for quantization in ("F16", "Q8_0", "Q4_0"):
        out = tmp_path / f"{quantization}.gguf"
        args = ("export", model, "--quantization", quantization, "--out", out, "--no-verify")
        assert run_cli(*args).code == 0
        predicted = next(r["file_bytes"] for r in rows if r["quantization"] == quantization)
        assert out.stat().st_size == predicted
        found = json.loads(run_cli("inspect", out, "--format", "json").out)
        assert (found["parameters"], found["decoder_parameters"]) == (TOTAL, DECODER)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of whole words, which GGUF has no name for."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tiny_model_with_tokenizer(tmp_path_factory.mktemp("wordy") / "tiny")
    words = {f"w{i}": i for i in range(299)} | {"<unk>": 299}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder


UNTOLD = "tokenizer.json: not a BPE tokenizer and not a unigram one"


def test_inspect_without_a_gguf_tokenizer(run_cli: Callable[..., Any], model: Path, wordy: Path) -> None:
    ran = run_cli("inspect", wordy, "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    found, known = json.loads(ran.out), json.loads(run_cli("inspect", model, "--format", "json").out)
    assert found["gguf"] == [] and len(known["gguf"]) > 5
    assert found["gguf_refused"] == f"{wordy / UNTOLD}" and known["gguf_refused"] is None
    other = {"path", "gguf", "gguf_refused"}
    assert {k: v for k, v in found.items() if k not in other} == {
        k: v for k, v in known.items() if k not in other
    }
    table, whole = run_cli("inspect", wordy).out.splitlines(), run_cli("inspect", model).out.splitlines()
    end = whole.index("", whole.index("") + 1) + 1  # where the GGUF types begin
    assert table[1:end] == whole[1:end]
    assert table[end:] == [
        f"no GGUF file, so neither its bytes nor the memory it needs can be given: {wordy / UNTOLD}"
    ]


def test_the_line_has_no_control_characters(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["normalizer"] = {"type": "\x1b[2J\n"}
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    ran = run_cli("inspect", folder)
    assert ran.code == 0 and "normalizer \\x1b[2J\\n is not" in ran.out and "\x1b" not in ran.out


def test_plan_without_a_gguf_tokenizer(run_cli: Callable[..., Any], wordy: Path, tmp_path: Path) -> None:
    """A ratio needs no file's bytes: it is planned and cut. A budget, a GGUF file and the job do."""
    scores, plan, out = tmp_path / "s.safetensors", tmp_path / "plan.json", tmp_path / "pruned"
    assert run_cli("score", wordy, "--metric", "magnitude", "--out", scores).code == 0
    common = ("plan", wordy, "--scores", scores, "--out", plan)
    ran = run_cli(*common, "--budget", "200MB", "--quantization", "Q4_0")
    fails(
        ran,
        4,
        f"memory is predicted for GGUF files, and tiny cannot be one: {wordy / UNTOLD}",
        hint="give --ratio instead of --budget; prune and export --format onnx take this model",
    )
    assert not plan.exists()
    ran = run_cli(*common, "--ratio", "0.2", "--quantization", "Q4_0")
    assert ran.code == 0, ran.err
    made = loads(PrunePlan, plan.read_text())
    assert 0 < made.ratio <= 0.25 and all(s.n_ff % 32 == 0 for s in made.dims.layers)
    assert run_cli("prune", wordy, "--plan", plan, "--out", out).code == 0
    assert count(out) == TOTAL - round(made.ratio * DECODER)
    ran = run_cli("inspect", out, "--format", "json")
    assert ran.code == 0 and json.loads(ran.out)["parameters"] == count(out)
    ran = run_cli("export", out, "--quantization", "F16", "--out", tmp_path / "a.gguf")
    fails(ran, 4, f"{out / UNTOLD}")
    profile = tmp_path / "seconds.toml"
    profile.write_text(small_profile())
    job = ("--model", wordy, "--target", "laptop-cpu", "--budget", "200MB", "--profile", profile)
    ran = run_cli(*job, "--out", tmp_path / "run")
    fails(ran, 4, f"{wordy / UNTOLD}")


# ---------------------------------------------------------------- prune


def test_prune(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "pruned"
    ran = run_cli(
        *("prune", model, "--metric", "llm-bip", "--ratio", "0.2", "--allocator", "uniform"),
        *("--calibration", text, "--samples", "10", "--length", "32", "--seed", "0", "--width-multiple", "1"),
        *("--compensation", "none", "--out", out),
    )
    assert ran.code == 0
    # a fifth of a layer is 7398.4 parameters: 38.5 channels of 192, so 89 stay and 39 go
    removed = 3 * 39 * 192
    assert ran.out.splitlines() == [
        "requested   20.0% of decoder-layer parameters",
        f"reached     {100 * removed / DECODER:.1f}% of decoder-layer parameters, "
        f"{100 * removed / TOTAL:.1f}% of all",
        f"parameters  {TOTAL - removed:,} of {TOTAL:,}",
        "KV groups   2 of 2 in each of 3 layers",
        "FFN width   89 of 128 in each of 3 layers",
        f"written to  {out}",
    ]
    assert count(out) == TOTAL - removed
    plan = loads(PrunePlan, (out / "edgeprune_plan.json").read_text())
    assert plan.ratio == pytest.approx(removed / DECODER, abs=1e-12)
    assert (plan.metric, plan.allocator, plan.requested_ratio, plan.uniform) == (
        "llm-bip",
        "uniform",
        0.2,
        True,
    )
    assert {len(units) for units in plan.kept.values()} == {89}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]
    assert [p.name for p in out.parent.iterdir()] == ["pruned"]  # no scratch is left
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    # stock transformers and ours agree
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(out).float().eval()
    assert np.abs(logits(stock, TOKENS) - logits(edgeprune.load(out), TOKENS)).max() < 1e-5
    assert len(AutoTokenizer.from_pretrained(out)) <= 300
    # the same again gives the same, and replaces it
    before = (out / "model.safetensors").read_bytes()
    assert run_cli(*("prune", model, "--ratio", "0.2", "--calibration", text, "--samples", "10"),
                   *("--metric", "llm-bip", "--length", "32", "--width-multiple", "1", *PLAIN),
                   *("--out", out)).code == 0  # fmt: skip
    assert (out / "model.safetensors").read_bytes() == before


def test_prune_nothing_keeps_every_bit(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run_cli("prune", model, "--metric", "magnitude", "--ratio", "0", "--out", out, *asked(text))
    assert ran.code == 0
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_prune_per_layer_and_protected(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run_cli(
        *("prune", model, "--metric-option", "form=C", "--ratio", "0.25", "--allocator", "global"),
        *(
            "--compensation",
            "none",
            "--width-multiple",
            "8",
            "--protect-first",
            "1",
            "--out",
            out,
            "--format",
            "json",
        ),
        *asked(text),
    )
    assert ran.code == 0
    found = json.loads(ran.out)
    layers = found["layers"]
    assert layers[0] == [4, 2, 128]
    assert all(row[2] % 8 == 0 for row in layers)
    assert not found["uniform"]
    assert abs(found["ratio"] - 0.25) < 8 * 192 * 2 / DECODER
    assert count(out) == found["parameters"]
    loaded = edgeprune.load(out)
    assert [layer.mlp.up_proj.out_features for layer in loaded.model.layers] == [row[2] for row in layers]
    assert logits(loaded, TOKENS).shape == (40, 300)


def test_prune_a_gguf(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    assert (
        run_cli("export", model, "--quantization", "F16", "--out", tmp_path / "m.gguf", "--no-verify").code
        == 0
    )
    ran = run_cli(
        *("prune", tmp_path / "m.gguf", "--ratio", "0.3", "--out", tmp_path / "out"), *PLAIN, *asked(text)
    )
    assert ran.code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]
    # 11,097.6 of a layer: 57.8 channels, the nearest multiple of 32 leaves 64
    assert count(tmp_path / "out") == TOTAL - 3 * 64 * 192
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert logits(edgeprune.load(tmp_path / "out"), TOKENS).shape == (40, 300)


# ---------------------------------------------------------------- score and plan


@pytest.fixture(scope="module")
def scores(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeprune.cli.main import run

    out = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    args = ("score", model, "--metric-option", "form=C", "--out", out, *asked(text))
    assert run([str(a) for a in args]) == 0
    return out


_PLAN = """
import sys
from edgeprune.cli.main import run
code = run(sys.argv[1:])
heavy = {"torch", "transformers", "gguf", "llama_cpp", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_plan_is_arithmetic(
    run_python: Callable[..., Any], run_cli: Callable[..., Any], model: Path, scores: Path, tmp_path: Path
) -> None:
    args = ("plan", str(model), "--scores", str(scores), "--ratio", "0.3", "--allocator", "global")
    ran = run_python(_PLAN, *args, "--width-multiple", "8", "--out", str(tmp_path / "plan.json"))
    assert (ran.code, ran.err) == (0, "")
    plan = loads(PrunePlan, (tmp_path / "plan.json").read_text())
    assert (plan.metric, plan.allocator) == ("llm-bip", "global")
    assert abs(plan.ratio - 0.3) < 0.02
    pruned = run_cli("prune", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert pruned.code == 0
    assert count(tmp_path / "out") == round(TOTAL * (1 - plan.ratio_all))
    assert (tmp_path / "out" / "edgeprune_plan.json").read_text() == (tmp_path / "plan.json").read_text()


def test_plan_equals_what_prune_does(
    run_cli: Callable[..., Any], model: Path, text: Path, scores: Path, tmp_path: Path
) -> None:
    wanted = ("--ratio", "0.4", "--protect-last", "1", "--width-multiple", "16")
    assert run_cli("plan", model, "--scores", scores, *wanted, "--out", tmp_path / "plan.json").code == 0
    args = ("prune", model, "--metric-option", "form=C", *wanted, *PLAIN, "--out", tmp_path / "out")
    args = (*args, *asked(text))
    assert run_cli(*args).code == 0
    planned = loads(PrunePlan, (tmp_path / "plan.json").read_text())
    done = loads(PrunePlan, (tmp_path / "out" / "edgeprune_plan.json").read_text())
    assert planned.kept == done.kept
    assert {name.split(".")[1] for name in planned.kept} == {"0", "1"}


def test_plan_for_a_budget(run_cli: Callable[..., Any], model: Path, scores: Path, tmp_path: Path) -> None:
    base = ("plan", model, "--scores", scores, "--quantization", "Q8_0", "--context", "256")
    out = tmp_path / "plan.json"
    ran = run_cli(*base, "--budget", "1GB", "--out", out)
    assert ran.code == 0
    assert ran.out.startswith("requested   the least that fits 1GB at Q8_0\nreached     0.0% ")
    ran = run_cli(*base, "--budget", "1kB", "--out", tmp_path / "none.json")
    assert (ran.code, ran.out) == (3, "")
    # one of two groups and 32 of 128 channels stay in each layer
    top = 3 * (6144 + 96 * 192) / DECODER
    first = ran.err.splitlines()[0]
    assert first.startswith(
        "Error: no plan fits 1.00 kB at Q8_0 and a context of 256 tokens: "
        f"the smallest, ratio {top:.3f}, is predicted to need "
    )
    assert not (tmp_path / "none.json").exists()


def test_score_is_recorded(scores: Path, model: Path) -> None:
    record = json.loads(scores.with_suffix(".json").read_text())
    assert record["kind"] == "score_file"
    assert record["scores"]["metric"] == "llm-bip"
    assert record["scores"]["options"]["form"] == "C"
    assert record["tokens"]["n_samples"] == 4 and record["tokens"]["n_tokens"] == 32
    assert record["scores"]["arrays_sha256"] == rundir.sha256_file(scores)
    assert sorted(p.name for p in scores.parent.iterdir()) == ["scores.json", "scores.safetensors"]


# ---------------------------------------------------------------- export and bench


def test_export_is_verified(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    ran = run_cli("export", model, "--format", "gguf", "--quantization", "Q8_0", "--out", out)
    assert ran.code == 0
    lines = dict(line.split(None, 1) for line in ran.out.splitlines() if not line.startswith("written"))
    size = out.stat().st_size
    assert lines["predicted"] == lines["real"] == f"{size:,} bytes"
    assert "of 256 positions, KL to torch " in lines["verified"]
    assert lines["sha256"] == rundir.sha256_file(out)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_export_with_an_importance_matrix(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    args = ("export", model, "--quantization", "Q4_0", "--imatrix-calibration", text, "--out", out)
    ran = run_cli(*args, "--no-verify")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "quantization  Q4_0 with importance matrix"
    assert lines[1].split(None, 1)[1] == lines[2].split(None, 1)[1] == f"{out.stat().st_size:,} bytes"
    assert lines[3] == "verified      not verified"


def test_a_file_that_cannot_be_right_is_not_left_behind(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6  # beyond F16
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    ran = run_cli("export", folder, "--quantization", "F16", "--out", tmp_path / "m.gguf", "--no-verify")
    assert (ran.code, ran.out) == (6, "")
    errors = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "model.layers.1.mlp.up_proj.weight" in errors[0]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


BENCH_FIELDS = {
    "build_commit", "cpu_info", "model_filename", "model_type", "model_size", "model_n_params", "n_batch",
    "n_ubatch", "n_threads", "type_k", "type_v", "use_mmap", "flash_attn", "n_prompt", "n_gen", "n_depth",
    "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip


def test_bench(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert run_cli("export", model, "--quantization", "Q8_0", "--out", out, "--no-verify").code == 0
    ran = run_cli(
        *("bench", out, "--format", "json", "--prompt", "16", "--new", "8", "--repeats", "3"),
        *(
            "--threads",
            "1",
            "--context",
            "64",
            "--ubatch",
            "32",
            "--kv-type",
            "f32",
            "--no-mmap",
            "--memory",
        ),
    )
    assert (ran.code, ran.err) == (0, "")
    prefill, decode = json.loads(ran.out)
    for row in (prefill, decode):
        assert set(row) >= BENCH_FIELDS
        assert len(row["samples_ns"]) == 3 and all(ns > 0 for ns in row["samples_ns"])
        assert (row["n_threads"], row["n_ubatch"], row["type_k"], row["use_mmap"]) == (1, 32, "f32", False)
        assert row["model_n_params"] == TOTAL
        assert 0 < row["peak_memory_bytes"] < 100e6
        n = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([n * 1e9 / ns for ns in row["samples_ns"]])
    assert (prefill["n_prompt"], prefill["n_gen"], decode["n_prompt"], decode["n_gen"]) == (16, 0, 0, 8)
    table = run_cli("bench", out, "--prompt", "16", "--new", "8", "--repeats", "1", "--threads", "1").out
    assert "prefill 16" in table and "decode 8 behind 16" in table and "peak memory" not in table


# ---------------------------------------------------------------- select and report


@pytest.fixture
def finished(tmp_path: Path, make_target: Callable[..., Any], make_profile: Callable[..., Any]) -> Path:
    """A run that measured three candidates of a 200 MB budget and chose the dense one."""
    limits = budget(200e6)
    found = [
        candidate("dense", kl=0.10, memory=190_000_000, tps=40.0),
        candidate("close", ratio=0.1, kl=0.101, memory=180_000_000, tps=41.0),
        candidate("small", ratio=0.4, kl=0.9, memory=120_000_000, tps=80.0),
        candidate("never", ratio=0.8, memory=None, predicted_memory=90_000_000),
    ]
    found = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in found]
    chosen = selection.select(limits, found, lambda a, b: False)
    return write_report(
        tmp_path / "run", found, target=make_target(), profile=make_profile(), limits=limits, chosen=chosen
    )


def test_report_prints_what_was_found(run_cli: Callable[..., Any], finished: Path) -> None:
    ran = run_cli("report", finished)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Do not prune: the dense model at Q4_0 is the best that fits")
    assert "limit memory: 200 MB (from command line)" in ran.out
    report = json.loads(run_cli("report", finished, "--format", "json").out)
    assert report == json.loads((finished / "report.json").read_text())
    assert report["selected"] == "dense"


def test_select_under_other_limits(run_cli: Callable[..., Any], finished: Path) -> None:
    before = (finished / "report.json").read_bytes()
    again = json.loads(run_cli("select", finished, "--format", "json").out)
    # 0.100 ± 0.001 and 0.101 ± 0.001 overlap
    assert (again["selected"], again["ties"]) == ("dense", ["close"])
    tight = json.loads(run_cli("select", finished, "--budget", "185MB", "--format", "json").out)
    assert (tight["selected"], tight["ties"]) == ("close", [])
    assert tight["budget"]["memory"] == {"value": 185e6, "unit": "bytes", "from": "command line"}
    assert tight["launch"].startswith("llama-server -m artifacts/close.gguf -c 2048 ")
    meets = {c["id"]: c["meets"] for c in tight["candidates"]}
    assert meets["dense"] == {"memory": False}
    reasons = {c["id"]: c["reason"] for c in tight["candidates"]}
    assert reasons["dense"] == "misses memory: 190 MB measured, 5.00 MB over 185 MB"
    assert reasons["never"] == (
        "not measured in this run; predicted to meet these limits: run the job again with them"
    )
    fast = json.loads(run_cli("select", finished, "--min-tps", "60", "--format", "json").out)
    assert fast["selected"] == "small"
    assert (finished / "report.json").read_bytes() == before


def test_select_by_another_objective(run_cli: Callable[..., Any], finished: Path) -> None:
    ran = run_cli("select", finished, "--objective", "speed")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[0] == (
        "Error: --objective speed needs a floor of quality: without one the fastest model wins, "
        "however bad it is"
    )
    wanted = ("--objective", "speed", "--max-kl", "1", "--format", "json")
    fast = json.loads(run_cli("select", finished, *wanted).out)
    assert (fast["selected"], fast["objective"]) == ("small", "speed")
    assert [a["code"] for a in fast["answers"]][:2] == ["prune", "for-objective"]
    tight = json.loads(run_cli("select", finished, *wanted[:2], "--max-kl", "0.2", *wanted[4:]).out)
    # 40 and 41 tokens/s are one speed, and their quality cannot be told apart
    assert (tight["selected"], tight["ties"]) == ("dense", ["close"])
    limits = ("--min-agreement", "0.9", "--max-energy", "2", "--max-first-token", "500")
    size = json.loads(run_cli("select", finished, "--objective", "size", *limits, "--format", "json").out)
    assert size["budget"]["agreement"] == {"value": 0.9, "unit": "of tokens", "from": "command line"}
    # three files of one size: the best of them
    assert (size["selected"], size["objective"]) == ("dense", "size")
    unchecked = [a["figures"]["limit"] for a in size["answers"] if a["code"] == "not-checked"]
    assert unchecked == ["energy", "first_token"]


def test_select_when_nothing_fits(run_cli: Callable[..., Any], finished: Path) -> None:
    ran = run_cli("select", finished, "--max-kl", "0.01", "--budget", "185MB")
    assert ran.code == 3
    assert "Nothing fits the budget. Nearest: " in ran.out
    assert ran.err.splitlines()[0].startswith("Error: Nothing fits the budget. Nearest: ")


def test_select_pairs_tokens_where_the_arrays_are(run_cli: Callable[..., Any], finished: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.random((8, 16))
    for name, kl, array in (
        ("dense", 0.10, base),
        ("close", 0.101, base + 0.001 + 1e-5 * rng.random((8, 16))),
    ):
        with rundir.RunDir(finished) as run:
            save_numpy({"kl": array.astype(np.float32)}, run.path(f"arrays/{name}.safetensors"))
            record = QualityResult(
                artifact_sha256=f"sha-{name}",
                text="made up",
                tokens=128,
                kl=kl,
                kl_stderr=0.001,
                perplexity=20.0,
                perplexity_stderr=1.0,
                agreement=0.9,
                dense_perplexity=20.0,
                kl_arrays=f"arrays/{name}.safetensors",
                key=name,
            )
            rundir.write_text(run.record_path(record.kind, name), dumps(record))
    # every token is worse by the same amount: paired, that is no tie
    again = json.loads(run_cli("select", finished, "--format", "json").out)
    assert (again["selected"], again["ties"]) == ("dense", [])


# ---------------------------------------------------------------- wrong input


def fails(ran: Any, code: int, *errors: str, hint: str | None = None) -> None:
    lines = [line for line in ran.err.splitlines() if line.startswith(("Error: ", "Hint: "))]
    assert [line for line in lines if line.startswith("Error: ")] == [f"Error: {e}" for e in errors]
    if hint is not None:
        assert lines[-1] == f"Hint: {hint}"
    assert ran.code == code
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_unknown_names(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    ran = run_cli("prune", model, "--metric", "llm-bop", "--ratio", "0.2", *out)
    fails(ran, 2, "unknown metric 'llm-bop' (did you mean 'llm-bip'?)")
    ran = run_cli("prune", model, "--allocator", "unifrom", "--ratio", "0.2", *out)
    fails(
        ran,
        2,
        "unknown allocator 'unifrom' (did you mean 'uniform'?)",
        hint="known: global, inner, search, sensitivity, uniform",
    )
    ran = run_cli("prune", model, "--metric-option", "form=D", "--ratio", "0.2", *out)
    fails(ran, 2, "metric llm-bip: form=D is not one of A, B, C")
    ran = run_cli("prune", model, "--metric-option", "form", "--ratio", "0.2", *out)
    fails(
        ran,
        2,
        "Invalid value for '--metric-option': 'form' is not KEY=VALUE, such as form=C.",
        hint="see edgeprune prune --help",
    )
    ran = run_cli("export", model, "--quantization", "Q8_O", "--out", tmp_path / "m.gguf")
    fails(ran, 2, "unknown GGUF quantization 'Q8_O' (did you mean 'Q8_0'?)")
    ran = run_cli("export", model, "--format", "gguff", "--out", tmp_path / "m.gguf")
    fails(ran, 2, "unknown exporter 'gguff' (did you mean 'gguf'?)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "nan"])
def test_bad_ratio(run_cli: Callable[..., Any], model: Path, tmp_path: Path, ratio: str) -> None:
    ran = run_cli("prune", model, "--ratio", ratio, "--out", tmp_path / "out")
    fails(ran, 2, f"ratio {ratio} is not between 0 and 1", hint="0.2 removes a fifth of the decoder layers")
    assert list(tmp_path.iterdir()) == []


def test_unreachable_ratio(run_cli: Callable[..., Any], model: Path, scores: Path, tmp_path: Path) -> None:
    top = 3 * (6144 + 96 * 192) / DECODER
    ran = run_cli("prune", model, "--ratio", "0.9", "--out", tmp_path / "out")
    fails(ran, 3, f"ratio 0.900 cannot be reached: the highest reachable is {top:.3f}", hint="ask for less")
    args = ("plan", model, "--scores", scores, "--ratio", "0.6", "--protect-first", "2")
    ran = run_cli(*args, "--out", tmp_path / "plan.json")
    fails(
        ran,
        3,
        f"ratio 0.600 cannot be reached with 2 protected layers: the highest reachable is {top / 3:.3f}",
        hint="ask for less, or protect fewer layers",
    )
    assert list(tmp_path.iterdir()) == []


def test_pooling_is_refused_before_the_slow_part(
    run_cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    ran = run_cli("prune", model, "--ratio", "0.2", "--allocator", "global", "--out", tmp_path / "out")
    fails(ran, 2, "scores of llm-bip do not share one scale across layers, so they cannot be pooled")
    assert "calibrate" not in ran.err and "sample" not in ran.err


def test_options_that_exclude_each_other(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    fails(run_cli("prune", model, *out), 2, "give either --ratio or --plan")
    ran = run_cli("prune", model, "--plan", "p.json", "--metric", "random", "--seed", "1", *out)
    fails(ran, 2, "--plan already says what stays; leave out --metric, --seed")
    base = ("plan", model, "--scores", "s.safetensors")
    fails(run_cli(*base, *out), 2, "give either --ratio or --budget")
    ran = run_cli(*base, "--budget", "1GB", *out)
    fails(ran, 2, "--budget needs --quantization: bytes depend on it")
    ran = run_cli(*base, "--budget", "1G", "--quantization", "Q4_0", *out)
    fails(ran, 2, "--budget '1G' has unknown unit 'G'")


def test_missing_files(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    for verb in (("inspect",), ("prune", "--ratio", "0.2", *out)):
        ran = run_cli(verb[0], "./none", *verb[1:])
        fails(ran, 2, "model './none' does not exist")
    ran = run_cli("prune", model, "--ratio", "0.2", "--calibration", "none.txt", *out)
    fails(ran, 2, "text file none.txt does not exist or is not a file")
    ran = run_cli("plan", model, "--scores", "none.safetensors", "--ratio", "0.2", *out)
    fails(ran, 2, "score file none.safetensors does not exist", hint="write it with: edgeprune score")
    ran = run_cli("prune", model, "--plan", "none.json", *out)
    fails(ran, 2, "plan file none.json does not exist", hint="write it with: edgeprune plan")
    fails(run_cli("bench", "none.gguf"), 2, "file none.gguf does not exist")
    fails(run_cli("report", "./none"), 2, "run folder none does not exist")
    fails(run_cli("select", tmp_path), 2, f"{tmp_path} has no report.json: no run has finished there")
    assert list(tmp_path.iterdir()) == []


def test_short_text(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the quick brown fox")
    ran = run_cli("prune", model, "--ratio", "0.2", "--calibration", text, "--out", tmp_path / "out")
    errors = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert ran.code == 2
    assert len(errors) == 1
    assert errors[0].startswith(f"Error: {text} has ") and errors[0].endswith("32 windows of 128 need 4096")
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_truncated_safetensors(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as f:
        f.truncate(size - 1000)
    message = f"{path} is damaged or truncated: it has {size - 1000} bytes, its header says {size}"
    fails(run_cli("inspect", folder), 2, message, hint="download it again")
    fails(run_cli("prune", folder, "--ratio", "0.2", "--out", tmp_path / "out"), 2, message)
    fails(run_cli("export", folder, "--out", tmp_path / "m.gguf"), 2, message)
    with path.open("r+b") as f:
        f.truncate(5)
    fails(run_cli("inspect", folder), 2, f"{path} is damaged or truncated: 5 bytes do not hold its header")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_damaged_gguf(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"PK\x03\x04" + bytes(100))
    hint = "it does not start with 'GGUF'"
    fails(run_cli("bench", junk), 2, f"{junk}: not a GGUF file", hint=hint)
    fails(run_cli("inspect", junk), 2, f"{junk}: not a GGUF file", hint=hint)
    cut = tmp_path / "cut.gguf"
    assert run_cli("export", model, "--quantization", "F16", "--out", cut, "--no-verify").code == 0
    with cut.open("r+b") as f:
        f.truncate(cut.stat().st_size - 1000)
    message = f"{cut}: tensor 'output.weight' lies beyond the end of the file"
    hint = "the file is damaged or incomplete; fetch it again"
    for args in (("bench", cut), ("inspect", cut), ("prune", cut, "--ratio", "0.2", "--out", tmp_path / "o")):
        fails(run_cli(*args), 2, message, hint=hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "junk.gguf"]


def test_unknown_family(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gptj"}))
    from edgeprune import registry

    known = f"known families: {', '.join(registry.names('families'))}"
    assert "llama" in known
    for args in (
        ("inspect", folder),
        ("prune", folder, "--ratio", "0.2", "--out", tmp_path / "out"),
        ("score", folder, "--out", tmp_path / "s.safetensors"),
        ("export", folder, "--out", tmp_path / "m.gguf"),
    ):
        fails(run_cli(*args), 4, "model family 'gptj' is not supported", hint=known)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_pickles_are_not_opened(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = f"{folder} holds only pytorch_model.bin, a pickle, which can run code when loaded"
    hint = "save the model as safetensors first: model.save_pretrained(folder, safe_serialization=True)"
    fails(run_cli("inspect", folder), 2, message, hint=hint)
    fails(run_cli("prune", folder, "--ratio", "0.2", "--out", tmp_path / "out"), 2, message, hint=hint)


def test_out_that_exists(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    args = ("prune", model, "--metric", "magnitude", "--ratio", "0.2", *PLAIN)
    ran = run_cli(*args, "--out", taken)
    fails(
        ran,
        2,
        f"--out {taken} exists and was not written by edgeprune prune",
        hint="name a new folder, or delete it",
    )
    fails(run_cli(*args, "--out", taken / "thesis.txt"), 2, f"--out {taken / 'thesis.txt'} is a file")
    assert (taken / "thesis.txt").read_text() == "years of work"
    assert run_cli(*args, "--out", tmp_path / "out").code == 0
    again = run_cli(
        "prune",
        tmp_path / "out",
        "--metric",
        "magnitude",
        "--ratio",
        "0.2",
        *PLAIN,
        "--out",
        tmp_path / "out",
    )
    fails(again, 2, f"--out {tmp_path / 'out'} is the model itself", hint="name a new folder")
    fails(run_cli("export", model, "--out", taken), 2, "--out 'taken' must end in .gguf")
    (tmp_path / "notes.gguf").write_text("not a model")
    ran = run_cli("export", model, "--out", tmp_path / "notes.gguf")
    fails(ran, 2, f"--out {tmp_path / 'notes.gguf'} exists and is not a GGUF file", hint="name another file")
    fails(
        run_cli("score", model, "--out", tmp_path / "s.npz"),
        2,
        f"--out '{tmp_path / 's.npz'}' must end in .safetensors",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(run_cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    ran = run_cli("prune", model, "--metric", "magnitude", "--ratio", "0.2", *PLAIN, "--out", locked / "out")
    fails(
        ran, 2, f"cannot write {locked / 'out'}: Permission denied", hint="choose another folder with --out"
    )
    assert list(locked.iterdir()) == []


def test_scores_and_plans_of_another_model(
    run_cli: Callable[..., Any], model: Path, scores: Path, tmp_path: Path
) -> None:
    other = tiny_model_with_tokenizer(tmp_path / "other", ff=96)
    ran = run_cli("plan", other, "--scores", scores, "--ratio", "0.2", "--out", tmp_path / "p.json")
    fails(ran, 2, f"{scores} holds scores of tiny, not of other", hint="score this model")
    plan = tmp_path / "plan.json"
    assert run_cli("plan", model, "--scores", scores, "--ratio", "0.2", "--out", plan).code == 0
    ran = run_cli("prune", other, "--plan", plan, "--out", tmp_path / "out")
    assert ran.code == 2
    assert f"{plan}: " in ran.err or f"{plan} was made for another model" in ran.err
    kept = json.loads(plan.read_text())
    kept["kept"]["layers.0.ffn"] = [5, 3]
    plan.write_text(json.dumps(kept))
    ran = run_cli("prune", model, "--plan", plan, "--out", tmp_path / "out")
    fails(ran, 2, f"{plan}: 'layers.0.ffn' does not list units of this model")
    plan.write_text("{")
    ran = run_cli("prune", model, "--plan", plan, "--out", tmp_path / "out")
    assert ran.code == 2 and f"Error: {plan}: not JSON: " in ran.err
    assert not (tmp_path / "out").exists()


def test_changed_scores_are_noticed(
    run_cli: Callable[..., Any], model: Path, scores: Path, tmp_path: Path
) -> None:
    for path in (scores, scores.with_suffix(".json")):
        shutil.copy(path, tmp_path / path.name)
    mine = tmp_path / scores.name
    mine.write_bytes(mine.read_bytes()[:-4])
    ran = run_cli("plan", model, "--scores", mine, "--ratio", "0.2", "--out", tmp_path / "p.json")
    fails(ran, 2, f"{mine} is not the file that {mine.with_suffix('.json')} describes")


def test_bench_figures_are_checked_together(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = run_cli("bench", "m.gguf", "--prompt", "64", "--new", "64", "--context", "100", "--kv-type", "q8")
    assert ran.code == 2
    first, second = (line for line in ran.err.splitlines() if line.startswith("Error: "))
    assert first == "Error: --context 100 is shorter than --prompt 64 and --new 64 together"
    assert second.startswith("Error: unknown KV cache type 'q8' (did you mean 'q8_0'?); known: f32, f16, ")


def test_damaged_report(run_cli: Callable[..., Any], finished: Path) -> None:
    path = finished / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in report.items() if k != "candidates"}))
    fails(run_cli("report", finished), 2, f"{path}: missing key 'candidates'")
    report["candidates"][0]["ratio"] = "a lot"
    path.write_text(json.dumps(report))
    ran = run_cli("select", finished)
    fails(ran, 2, f"{path}: candidates[0].ratio: expected float, found 'a lot'")


@pytest.mark.parametrize("verb", ["select", "bundle", "report"])
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["candidates"][0].update(ratio=0.123),
        lambda r: r["candidates"][0]["measured"].update(decode_tps=1e6),
        lambda r: r.update(selected=r["candidates"][-1]["id"]),
        lambda r: r["budget"]["memory"].update(value=1e12),
        lambda r: r.update(headline="the best"),
        lambda r: r.pop("digest"),
    ],
)
def test_a_report_changed_by_hand_is_refused(
    run_cli: Callable[..., Any],
    finished: Path,
    tmp_path: Path,
    change: Callable[[Any], Any],
    verb: str,
) -> None:
    folder = finished
    path = folder / "report.json"
    assert run_cli("select", folder).code == 0
    # another layout of the same figures is no change
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert run_cli("select", folder).code == 0
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    ran = run_cli(verb, folder, *(("--out", tmp_path / "out") if verb == "bundle" else ()))
    why = "was changed after the run wrote it" if "digest" in report else "missing key 'digest'"
    assert (ran.code, ran.out) == (2, "")
    assert f"Error: {path}" in ran.err and why in ran.err
    assert not (tmp_path / "out").exists()
