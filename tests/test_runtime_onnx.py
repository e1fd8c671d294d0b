"""The ONNX runtimes as jobs, and the verbs export and bench on ONNX folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime_genai", reason="the extra 'onnx' is not installed")

import builders

from edgeprune import registry
from edgeprune.errors import MissingExtraError, StageError
from edgeprune.records import LaunchFlags
from edgeprune.runtimes import _onnx_parent as parent
from edgeprune.runtimes import onnx_genai, onnxruntime

ENGINES = (onnx_genai, onnxruntime)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 folder made by the verb itself, with a tokenizer."""
    from edgeprune.cli.main import run

    folder = tmp_path_factory.mktemp("onnx")
    builders.tiny_model_with_tokenizer(folder / "hf", context=128)
    command = ["export", folder / "hf", "--format", "onnx", "--quantization", "int4", "--threads", "1"]
    assert run([*map(str, command), "--out", str(folder / "out")]) == 0
    return folder / "out"


def flags(context: int = 96, **over: Any) -> LaunchFlags:
    return LaunchFlags(**{"context_tokens": context, "ubatch": 16, "kv_type": "f32", "mmap": True, **over})


def test_the_registry_finds_plug_ins_only() -> None:
    assert {"onnx-genai", "onnxruntime", "llama-cpp"} <= set(registry.names("runtimes"))
    assert "onnx" in registry.names("exporters")
    for name in ("onnx-genai", "onnxruntime"):
        runtime = registry.load("runtimes", name, "RUNTIME")
        assert (runtime.name, runtime.formats, runtime.extra) == (name, ("onnx",), "onnx")
        assert runtime.available() is None
        assert runtime.version()[0].isdigit()


@pytest.mark.parametrize("engine", ENGINES)
def test_bench_times_prefill_and_decode_apart(engine: Any, exported: Path) -> None:
    times = engine.bench(
        exported, flags=flags(), n_prompt=40, n_gen=10, repeats=3, threads=None, sweep=(1, 2), sweep_tokens=4
    )
    assert len(times.prefill_ns) == len(times.decode_ns) == 3
    assert min(times.prefill_ns) > 0 and min(times.decode_ns) > 0
    assert set(times.sweep) == {"1", "2"}
    assert times.threads == max((1, 2), key=lambda n: times.sweep[str(n)])
    assert (times.model_type, times.n_batch) == ("onnx int4", 16)
    # tiny_config: 300 x 64 twice, and per layer q 64x64, k and v 32x64, o 64x64, three of 128x64, two norms
    per_layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64 + 2 * 64
    assert times.model_params == 2 * 300 * 64 + 3 * per_layer + 64


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_fills_the_context(engine: Any, exported: Path) -> None:
    peak = engine.memory(exported, flags=flags())
    assert peak.tokens_filled == 96
    assert 0 < peak.peak_bytes < 400_000_000
    assert peak.before_bytes > 0


def test_logits_of_windows(exported: Path, tmp_path: Path) -> None:
    windows = np.random.default_rng(3).integers(3, 290, (2, 30)).astype(np.int32)
    found = onnxruntime.logits(exported, windows, tmp_path / "logits.f32")
    assert found.shape == (2, 30, 300)
    assert np.isfinite(found).all()
    again = onnxruntime.logits(exported, windows[1:], tmp_path / "one.f32")
    assert np.array_equal(again[0], found[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_context_too_short_is_one_line(engine: Any, exported: Path) -> None:
    with pytest.raises(StageError, match=r"40 \+ 10 tokens do not fit into a context of 48 tokens"):
        engine.bench(exported, flags=flags(48), n_prompt=40, n_gen=10, repeats=1, threads=1)


def test_a_graph_the_library_refuses_is_one_line(exported: Path, tmp_path: Path) -> None:
    import shutil

    import onnx

    folder = shutil.copytree(exported, tmp_path / "copy")
    file = folder / "onnx" / "model_q4.onnx"
    model = onnx.load(str(file), load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    file.write_bytes(model.SerializeToString())
    for engine in ENGINES:
        with pytest.raises(StageError, match="ONNX Runtime cannot load copy: ") as caught:
            engine.greedy(folder, [1], 1)
        assert "\n" not in str(caught.value)


def test_the_cache_type_is_the_folder_s(exported: Path) -> None:
    assert parent.kv_type(exported) == "f32"


def test_a_missing_library_is_exit_5_naming_the_extra(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime_genai" else real(name)
    )
    with pytest.raises(MissingExtraError) as caught:
        onnx_genai.greedy(exported, [1], 1)
    assert caught.value.exit_code == 5
    assert caught.value.hint == "pip install 'edgeprune[onnx]'"
    assert onnx_genai.RUNTIME.available() == "the library onnxruntime-genai is not installed"
    assert onnxruntime.RUNTIME.available() is None


# ---------------------------------------------------------------- the verbs


def test_export_says_what_it_verified(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    builders.tiny_model_with_tokenizer(tmp_path / "hf", context=128, tied=True)
    given = ("export", tmp_path / "hf", "--format", "onnx", "--quantization", "fp32", "--threads", "1")
    done = run_cli(*given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines() if line.strip())
    assert facts["quantization"] == "fp32"
    assert facts["predicted"] == facts["real"]
    assert facts["verified"].startswith("same most likely token at 128 of 128 positions")
    # a second time over the first
    assert run_cli(*given, "--no-verify", "--out", tmp_path / "out").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    refused = run_cli(*given, "--out", tmp_path / "mine")
    assert refused.code == 2 and "is not an ONNX export" in refused.err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep"


def test_export_refuses_a_gguf_type(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    builders.tiny_model_with_tokenizer(tmp_path / "hf")
    done = run_cli(
        *("export", tmp_path / "hf", "--format", "onnx", "--quantization", "Q4_0", "--out", tmp_path / "o")
    )
    assert done.code == 2
    assert "unknown ONNX quantization 'Q4_0'" in done.err and "fp32, fp16, int8, int4" in done.err


def test_bench_takes_a_folder(run_cli: Callable[..., Any], exported: Path) -> None:
    given = ("--prompt", "32", "--new", "8", "--repeats", "2", "--threads", "1", "--memory")
    done = run_cli("bench", exported, *given, "--format", "json")
    assert done.code == 0, done.err
    prefill, decode = json.loads(done.out)
    assert (prefill["n_prompt"], decode["n_gen"], decode["n_depth"]) == (32, 8, 32)
    assert prefill["type_k"] == "f32" and prefill["model_type"] == "onnx int4"
    assert decode["avg_ts"] > 0 and decode["peak_memory_bytes"] > 0
    empty = run_cli("bench", exported.parent)
    assert empty.code == 2 and "holds no onnx/*.onnx" in empty.err


def test_importance_changes_the_rounding_only(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    builders.tiny_model_with_tokenizer(tmp_path / "hf", context=128)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog again and again " * 60)
    given = ("export", tmp_path / "hf", "--format", "onnx", "--no-verify", "--threads", "1")
    assert run_cli(*given, "--out", tmp_path / "plain").code == 0
    done = run_cli(*given, "--imatrix-calibration", text, "--out", tmp_path / "weighed")
    assert done.code == 0, done.err
    assert "int4 with importance matrix" in done.out
    plain, weighed = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("plain", "weighed")
    )
    assert plain.keys() == weighed.keys()
    assert [str(p) for p in plain if plain[p] != weighed[p]] == ["onnx/model_q4.onnx_data"]
