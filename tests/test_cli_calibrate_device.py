"""`edgeprune calibrate-device` on this machine: a profile outside the package that predictions use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.config.targets import calibration_path, load_target, read_calibration, with_calibration
from edgeprune.errors import ConfigError
from edgeprune.pipeline import calibrating

FIGURES = ("--read-bytes", "100000000", "--layers", "30", "--kv-dim", "192", "--quantization", "Q4_0")


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


def test_calibrate_then_predict(run_cli: Callable[..., Any], own_data: Path) -> None:
    pytest.importorskip("llama_cpp")
    ran = run_cli("calibrate-device", "--seconds", "5", "--threads", "1", "--format", "json")
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert made["probes"] >= 1 and made["threads"] == 1
    path = Path(made["file"])
    assert path == own_data / "xdg" / "edgeprune" / "devices" / "laptop-cpu.json"
    assert made["bandwidth_gb_per_s"] > 0.1
    # nothing else stays: not the probe files, not the agent
    assert [p for p in (own_data / "home").rglob("*") if p.is_file()] == []

    def predict(*more: str) -> dict[str, Any]:
        ran = run_cli("predict", "--target", "laptop-cpu", *FIGURES, *more, "--format", "json")
        assert ran.code == 0, ran.err
        answer: dict[str, Any] = json.loads(ran.out)
        return answer

    own, published = predict("--threads", "1"), predict("--published", "--threads", "1")
    assert (own["basis"], published["basis"]) == ("calibrated", "facts")
    assert "calibrate-device on" in own["based_on"]

    def width(answer: dict[str, Any]) -> float:
        decode = answer["decode_tps"]
        return float(decode["high"] / decode["low"])

    assert width(own) < width(published)
    saved = path.read_text()
    path.write_text(saved.replace('"schema"', '"skema"'))
    ran = run_cli("predict", "--target", "laptop-cpu", *FIGURES)
    assert ran.code == 2
    assert "run edgeprune calibrate-device again" in ran.err
    # another processor's calibration is not used here
    path.write_text(saved)
    record = read_calibration("laptop-cpu")
    assert record is not None
    target, _ = load_target("laptop-cpu")
    assert with_calibration(target, cpu="another").speeds == ()
    assert with_calibration(target, cpu=record.cpu).speeds == record.speeds


def test_no_calibration_is_no_problem() -> None:
    target, _ = load_target("raspberry-pi-5-8gb")
    assert with_calibration(target) is target
    assert not calibration_path(target.name).exists()


def test_a_target_that_is_another_machine(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("calibrate-device", "--target", "raspberry-pi-5-8gb")
    if ran.code == 0:
        pytest.skip("this machine is an aarch64 itself")
    assert ran.code == 6
    assert "the target is aarch64" in ran.err


def test_the_plan_starts_with_what_tells_most() -> None:
    shapes = [shape for shape, _ in calibrating.plan(32 << 20)]
    assert [s["type"] for s in shapes[:3]] == ["Q4_K", "Q4_0", "Q6_K"]
    assert len({s["type"] for s in shapes}) == 13
    # files are larger than the cache that could hold them
    for shape in shapes[:1]:
        params = shape["layers"] * (2 * 1024 * (1024 + 256) + 3 * 1024 * 3072) + 1024 * 4096
        assert 80e6 < params * 144 / 256 < 120e6


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("shh://x", "device 'shh://x' cannot be reached (did you mean 'ssh'?)"),
        ("ssh://a b", "'ssh://a b' is not a device address"),
        ("local:x", "cannot be reached"),
    ],
)
def test_devices_that_are_none(run_cli: Callable[..., Any], device: str, message: str) -> None:
    ran = run_cli("calibrate-device", "--device", device)
    assert ran.code == 2
    assert message in ran.err


def test_an_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="no power mode"):
        from edgeprune.costs.speed import power_mode

        power_mode(load_target("jetson-orin-nano-8gb")[0], "60W")
