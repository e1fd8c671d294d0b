"""`edgeprune predict` and `targets check`: numbers from the formula, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ("--read-bytes", "808000000", "--layers", "16", "--kv-dim", "512", "--quantization", "Q4_K_M")


def _predict(run_cli: Callable[..., Any], *args: str | Path) -> dict[str, Any]:
    ran = run_cli("predict", *args, "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    answer: dict[str, Any] = json.loads(ran.out)
    return answer


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of whoever runs the tests."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))


def test_published_figures(run_cli: Callable[..., Any]) -> None:
    answer = _predict(run_cli, "--target", "jetson-orin-nano-8gb", "--mode", "25W", *PUBLISHED)
    # cache: 2 * 16 * 512 * 128 tokens * 2 bytes; Q6_K and Q4_K work off alike on CUDA
    assert answer["kv_bytes"] == 2 * 16 * 512 * 128 * 2
    ms = (808e6 + answer["kv_bytes"]) / 45.0e9 * 1e3 + 16 * 0.0857
    found = answer["decode_tps"]
    assert found["value"] == pytest.approx(1e3 / ms, rel=1e-3)
    assert found["low"] == pytest.approx(found["value"] / 1.167, rel=1e-3)
    assert found["high"] == pytest.approx(found["value"] * 1.167, rel=1e-3)
    # measured and published: 47.1 at 2176 tokens of context
    assert answer["basis"] == "profile" and "smolhub" in answer["based_on"]
    deep = _predict(
        run_cli, "--target", "jetson-orin-nano-8gb", "--mode", "25W", *PUBLISHED, "--context", "2176"
    )
    assert deep["decode_tps"]["low"] < 47.1 < deep["decode_tps"]["high"]


def test_prefill_from_the_parameters_that_the_bytes_hold(run_cli: Callable[..., Any]) -> None:
    answer = _predict(run_cli, "--target", "apple-m2-max", *PUBLISHED)
    params = 808e6 * (0.7 * 256 / 144 + 0.3 * 256 / 210)
    assert answer["prefill_tps"]["value"] == pytest.approx(8 * 190e9 / (2 * params), rel=1e-3)
    stated = _predict(run_cli, "--target", "apple-m2-max", *PUBLISHED, "--params", "1000000000")
    assert stated["prefill_tps"]["value"] == pytest.approx(8 * 190e9 / 2e9, rel=1e-3)


def test_a_file_of_ones_own_is_known_by_its_facts(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    text = (ROOT / "targets" / "raspberry-pi-5-8gb.toml").read_text()
    own = tmp_path / "my-board.toml"
    own.write_text(text[: text.index("[[speed]]")])
    answer = _predict(run_cli, "--target", own, *PUBLISHED)
    assert answer["basis"] == "facts"
    assert answer["decode_tps"]["high"] / answer["decode_tps"]["low"] > 1.8
    fewer = _predict(run_cli, "--target", own, *PUBLISHED, "--threads", "1")
    assert fewer["decode_tps"]["value"] < answer["decode_tps"]["value"]
    ran = run_cli("targets", "check", own)
    assert ran.code == 0 and "no problems" in ran.out and "facts" in ran.out
    own.write_text(text.replace("cores = 4", "cores = 0").replace("isa =", "iza ="))
    ran = run_cli("targets", "check", own)
    assert ran.code == 2
    assert "did you mean 'isa'" in ran.err and "'isa'" in ran.err
    assert run_cli("targets", "check", "raspberry-pi-5-8gb").code == 2


def test_an_artifact_and_its_folder_agree(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    from tests.builders import tiny_model_with_tokenizer

    folder = tiny_model_with_tokenizer(tmp_path)
    out = tmp_path / "tiny.gguf"
    ran = run_cli("export", folder, "--quantization", "F16", "--out", out)
    assert ran.code == 0, ran.err
    by_file = _predict(run_cli, "--target", "raspberry-pi-5-8gb", "--artifact", out)
    by_folder = _predict(
        run_cli, "--target", "raspberry-pi-5-8gb", "--model", folder, "--quantization", "F16"
    )
    for field in ("read_bytes", "kv_bytes", "layers", "decode_tps", "prefill_tps"):
        assert by_file[field] == by_folder[field], field


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--artifact", "no.gguf"), 2, "file no.gguf does not exist"),
        ((), 2, "no model is named"),
        (("--read-bytes", "5", "--model", "x"), 2, "--model and --read-bytes name the model twice"),
        (("--read-bytes", "5"), 2, "--read-bytes needs --quantization"),
        (("--read-bytes", "5", "--quantization", "Q4_0"), 2, "needs --layers and --kv-dim"),
        ((*PUBLISHED[:-1], "Q4_KM"), 2, "did you mean 'Q4_K_M'"),
        ((*PUBLISHED, "--family", "qwen3_moe"), 4, "'qwen3_moe': mixture of experts"),
        ((*PUBLISHED, "--kv-type", "q8"), 2, "unknown KV cache type 'q8'"),
        ((*PUBLISHED, "--mode", "25W"), 2, "no power mode '25W'"),
        ((*PUBLISHED, "--runtime", "vllm"), 2, "'vllm' is not one of"),
    ],
)
def test_what_is_refused(run_cli: Callable[..., Any], args: tuple[str, ...], code: int, message: str) -> None:
    ran = run_cli("predict", "--target", "raspberry-pi-5-8gb", *args)
    assert ran.code == code
    assert message in ran.err
    assert ran.out == ""


def test_a_family_is_refused_by_its_config(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    ran = run_cli("predict", "--target", "raspberry-pi-5-8gb", "--model", tmp_path, "--quantization", "Q4_0")
    assert ran.code == 4
    assert "'mixtral': mixture of experts" in ran.err


def test_it_is_fast_and_light(run_python: Callable[..., Any]) -> None:
    ran = run_python(
        "import sys; from edgeprune.cli.main import run\n"
        f"code = run(['predict', '--target', 'raspberry-pi-5-8gb', *{PUBLISHED!r}])\n"
        "print(code, [m for m in ('torch', 'transformers', 'llama_cpp', 'numpy') if m in sys.modules])"
    )
    assert ran.out.splitlines()[-1] == "0 []"
