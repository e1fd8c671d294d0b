"""Method `group` from the trainer to the file: resuming, the recovered folder, and its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import torch
from builders import tiny_family, tiny_model_with_tokenizer, tiny_tokenizer
from candidates import small_profile
from safetensors.torch import load_file

from edgeprune import checkpoint, graph
from edgeprune.errors import ConfigError
from edgeprune.exporters import gguf as exporter
from edgeprune.gguf_source import GgufSource
from edgeprune.pipeline import recovering
from edgeprune.progress import Silent
from edgeprune.recovery import packed, run
from edgeprune.recovery.recipe import RecoveryRecipe
from edgeprune.recovery.text import plain_rows, split

VOCAB, LENGTH = 300, 24
PROFILE = small_profile()


def recipe(**over: object) -> RecoveryRecipe:
    given: dict = {
        "method": "group",
        "quantization": "Q4_1",
        "tokens": 24 * 8 * LENGTH,
        "rate": 0.05,
        "mix": 1.0,  # the text is random, only the parent has something to teach
        "length": LENGTH,
        "seed": 5,
    }
    return RecoveryRecipe(**(given | over))


def folder_of(path: Path, family: str, seed: int = 0) -> Path:
    tiny_family(path, family, seed=seed, vocab_size=VOCAB, num_hidden_layers=2)
    tiny_tokenizer(path, VOCAB)
    return path


class Killed(BaseException):
    """Stands for the end of the process."""


def test_stopped_three_times_ends_with_the_same_blocks(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "llama")
    source = checkpoint.SafetensorsSource(folder)
    dims = graph.build(source.config).dims
    words = np.random.default_rng(0).integers(3, VOCAB, 31)
    rows, held = split(plain_rows(np.resize(words, (48, LENGTH))))  # the same words again and again

    def recover(where: str, stop: int | None = None) -> run.Recovered:
        def after_step(done: int) -> None:
            if done == stop:
                raise Killed

        return run.recover(
            source,
            dims,
            dense=dims,
            parent=lambda dtype: checkpoint.load_model(folder, dtype=dtype),
            rows=rows,
            held=held,
            recipe=recipe(checkpoint_s=0.0),
            folder=tmp_path / where,
            progress=Silent(),
            after_step=after_step,
        )

    whole = recover("whole")
    assert whole.kept
    assert whole.trained.best.kl < 0.9 * whole.trained.points[0].kl
    for step in (3, 7, 8):
        with pytest.raises(Killed):
            recover("killed", step)
    parts = recover("killed")
    assert parts.trained.losses == whole.trained.losses
    assert set(parts.packed) == set(whole.packed) == {n for n in whole.tensors if n in whole.packed}
    for name, blocks in whole.packed.items():
        assert np.array_equal(parts.packed[name].data, blocks.data), name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recovered_folder_is_exported_as_trained(tmp_path: Path, family: str) -> None:
    """The folder holds float32 weights and their blocks; every matrix of the file is equal to them."""
    parent = folder_of(tmp_path / "parent", family)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog again and again. " * 200)
    out = tmp_path / "out"
    asked = recipe(data=str(text), tokens=12 * 8 * LENGTH)
    result = recovering.recover(parent, out, parent_model=str(parent), recipe=asked, progress=Silent())
    assert result.kept
    assert result.quantization == "Q4_1"
    assert not (tmp_path / "out.recovery").exists()
    source = checkpoint.SafetensorsSource(out)
    dims = graph.build(source.config).dims
    path = tmp_path / "out.gguf"
    exporter.export(
        path,
        family=graph.find_family(dims.family),
        dims=dims,
        config=source.config,
        tokenizer_kvs=[],
        read_tensor=lambda name: checkpoint.to_float32(source.tensor(name)),
        quantization="Q4_1",
        packed=packed.load(out),
    )
    file, seen = GgufSource(path), set()
    for name in source.names():
        weight = source.tensor(name)
        if weight.ndim == 2:
            assert weight.dtype == torch.float32
            assert np.array_equal(file.tensor(name), weight.numpy()), name
            seen.add(file.types[name])
    assert seen == {"Q4_1", "Q8_0"}
    assert not torch.equal(source.tensor("model.layers.0.mlp.up_proj.weight"), _first(parent))


def _first(folder: Path) -> torch.Tensor:
    return checkpoint.SafetensorsSource(folder).tensor("model.layers.0.mlp.up_proj.weight")


def test_a_type_without_minima_is_refused_by_the_verb(tmp_path: Path) -> None:
    parent = folder_of(tmp_path / "parent", "llama")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 400)
    with pytest.raises(ConfigError) as error:
        recovering.recover(
            parent,
            tmp_path / "out",
            parent_model=str(parent),
            recipe=recipe(data=str(text), quantization="Q4_0"),
            progress=Silent(),
        )
    assert error.value.message == (
        "recovery method 'group' cannot tune Q4_0: its blocks have no minimum of their own"
    )
    assert not (tmp_path / "out").exists()


def test_the_main_job_ships_the_tuned_blocks(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    """`--recovery group --quantization Q4_1`: the pruned candidate's file holds the recovered weights."""
    parent = tiny_model_with_tokenizer(
        tmp_path / "tiny", hidden=128, heads=4, kv_heads=2, ff=256, layers=2, vocab=VOCAB
    )
    (tmp_path / "p.toml").write_text(PROFILE)
    out = tmp_path / "run"
    ran = run_cli(
        *("--target", "laptop-cpu", "--profile", tmp_path / "p.toml", "--model", parent, "--out", out),
        *(
            "--quantization",
            "Q4_1",
            "--recovery",
            "group",
            "--recovery-tokens",
            "6144",
            "--recovery-rate",
            0.05,
        ),
        *("--recovery-length", "32", "--recovery-samples", "48"),
    )
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    (recovered,) = report["recoveries"].values()
    assert recovered["quantization"] == "Q4_1"
    assert recovered["kept"]
    (weights,) = (out / "arrays").glob("recovered-*.safetensors")
    tuned = load_file(weights)
    # beside the dense file and the plain cut's
    (path,) = (out / "artifacts").glob("*-group-*-Q4_1.gguf")
    file = GgufSource(path)
    equal = [n for n, value in tuned.items() if np.array_equal(file.tensor(n), value.numpy())]
    assert sorted(equal) == sorted(tuned)
    assert {file.types[n] for n in tuned} == {"Q4_1", "Q8_0"}


def test_the_main_job_wants_one_type(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = run_cli(
        *("--target", "laptop-cpu", "--out", tmp_path / "run", "--recovery", "group"),
        *("--quantization", "Q4_1", "--quantization", "Q4_0"),
    )
    assert ran.code == 2
    assert "--recovery group trains through one quantization, and this job tries several" in ran.err
    ran = run_cli(
        *(
            "--target",
            "laptop-cpu",
            "--out",
            tmp_path / "run",
            "--recovery",
            "group",
            "--quantization",
            "Q8_0",
        )
    )
    assert ran.code == 2
    assert "recovery method 'group' cannot tune Q8_0: its blocks have no minimum of their own" in ran.err
