"""The speed model against latencies worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from edgeprune.config.targets import load_target
from edgeprune.costs.gguf_types import QUANTIZATIONS
from edgeprune.costs.speed import (
    CONSTANTS,
    Hardware,
    check_family,
    decode_ns,
    first_token_ms,
    mix_of,
    predict_decode,
    predict_prefill,
    speed_model,
)
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.records import LaunchFlags, LayerShape, ModelDims, SpeedModel

DIMS = ModelDims(
    family="llama",
    vocab=1000,
    hidden=256,
    head_dim=64,
    max_context=2048,
    tied=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    rms_eps=1e-5,
    layers=(LayerShape(n_heads=4, n_kv_heads=2, n_ff=512),) * 10,
)
FLAGS = LaunchFlags(context_tokens=2048, ubatch=128, kv_type="f16", mmap=False)
SPEED = SpeedModel(
    runtime="llama-cpp",
    mode="15W",
    bandwidth_bytes_per_s=10e9,
    layer_ns=100_000.0,
    compute_flops=50e9,
    relative_error=0.2,
    source="made up",
)


def test_decode_latency_term_by_term() -> None:
    # weights 100 MB / 10 GB/s = 10 ms; cache 2*1000*20 heads*64*2 B = 5.12 MB -> 0.512 ms; 10 layers -> 1 ms
    tps, low, high = predict_decode(
        DIMS, read={"Q4_K": 100_000_000}, flags=FLAGS, context_tokens=1000, speed=SPEED
    )
    assert tps == pytest.approx(1000 / 11.512, rel=1e-12)
    assert low == pytest.approx(tps / 1.2)
    assert high == pytest.approx(1.2 * tps)


def test_a_slow_type_costs_its_share_of_the_weights_only() -> None:
    # weights 10 ms / 0.5 = 20 ms, the rest as above
    slow = dataclasses.replace(SPEED, type_factors={"Q3_K": 0.5})
    tps, _, _ = predict_decode(DIMS, read={"Q3_K": 100_000_000}, flags=FLAGS, context_tokens=1000, speed=slow)
    assert tps == pytest.approx(1000 / 21.512, rel=1e-12)


def test_a_mix_costs_the_sum_of_its_types() -> None:
    # Q4_K_M: 70 MB at full rate 7 ms, 30 MB of Q6_K at half 6 ms
    slow = dataclasses.replace(SPEED, layer_ns=0.0, token_ns=1e6, type_factors={"Q6_K": 0.5})
    assert decode_ns({"Q4_K_M": 100_000_000}, 0, 10, slow) == pytest.approx(14e6)


def test_rates_have_two_limits() -> None:
    constants = dataclasses.replace(CONSTANTS, memory_share=0.5, arm=10.0, gpu_share=0.5, gpu_rate=10.0)
    wide = Hardware(peak=1e6, threads=4, core="arm")
    # nothing but the four cores limits: 4 x 10, and Q4_K at 0.75 of that
    assert wide.rate({"Q4_0": 1.0}, constants) == pytest.approx(40.0)
    assert wide.rate({"Q4_K": 1.0}, constants) == pytest.approx(30.0)
    # half at 40 and half at 30: harmonic mean
    assert wide.rate({"Q4_0": 1.0, "Q4_K": 1.0}, constants) == pytest.approx(2 / (1 / 40 + 1 / 30))
    narrow = Hardware(peak=2.0, threads=32, core="arm")
    assert narrow.rate({"Q4_0": 1.0}, constants) == pytest.approx(1.0, rel=1e-6)
    assert narrow.rate({"Q2_K": 1.0}, constants) == pytest.approx(1.0, rel=1e-3)  # memory hides slow types
    equal = Hardware(peak=20.0, threads=1, core="arm")
    assert equal.rate({"Q4_0": 1.0}, constants) == pytest.approx(10 / 2 ** (1 / 3))
    gpu = Hardware(peak=1e6, threads=0, core="arm", gpu_sm_ghz=5.0)
    assert gpu.rate({"Q4_K": 1.0}, constants) == pytest.approx(50.0)


def test_a_target_is_a_profile_or_facts() -> None:
    pi, _ = load_target("raspberry-pi-5-8gb")
    known = speed_model(pi)
    assert (known.basis, known.bandwidth_bytes_per_s, known.relative_error) == ("profile", 9.8e9, 0.165)
    facts = speed_model(dataclasses.replace(pi, speeds=()))
    assert facts.basis == "facts"
    assert facts.relative_error == pytest.approx(math.expm1(CONSTANTS.cpu_error))
    assert facts.bandwidth_bytes_per_s == pytest.approx(9.8e9, rel=0.1)
    # one thread of four: the profile follows the facts, with a wider band
    single = speed_model(pi, threads=1)
    base = Hardware(peak=17.07, threads=4, core="arm")
    one = dataclasses.replace(base, threads=1)
    mix = mix_of("Q4_K_M")
    assert single.bandwidth_bytes_per_s == pytest.approx(9.8e9 * one.rate(mix) / base.rate(mix))
    assert single.relative_error > known.relative_error


def test_power_modes_and_backends() -> None:
    nano, _ = load_target("jetson-orin-nano-8gb")
    speeds = [speed_model(nano, mode=m).bandwidth_bytes_per_s for m in ("7W", "15W", "25W", "MAXN_SUPER")]
    assert speeds == sorted(speeds)
    assert speed_model(nano).mode == "15W"
    cpu = speed_model(nano, mode="25W", backend="cpu")
    assert (cpu.backend, cpu.basis) == ("cpu", "facts")
    with pytest.raises(ConfigError, match=r"no power mode '26W' \(did you mean '2?5W'"):
        speed_model(nano, mode="26W")
    pi, _ = load_target("raspberry-pi-5-8gb")
    with pytest.raises(ConfigError, match="describes no GPU"):
        speed_model(pi, backend="gpu")


def test_a_calibration_comes_first() -> None:
    pi, _ = load_target("raspberry-pi-5-8gb")
    own = dataclasses.replace(
        SPEED, mode="", basis="calibrated", threads=4, relative_error=0.05, type_factors={"Q4_K": 0.9}
    )
    found = speed_model(dataclasses.replace(pi, speeds=(*pi.speeds, own)))
    assert (found.basis, found.relative_error, found.type_factors["Q4_K"]) == ("calibrated", 0.05, 0.9)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3_moe", "mixture of experts"),
        ("mamba", "state-space"),
        ("gemma3n", "per-layer embeddings"),
        ("lfm2", "convolution"),
    ],
)
def test_families_that_are_not_covered(name: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{name}': .*{why}"):
        check_family(name)
    check_family("llama")


def test_every_quantization_has_a_rate() -> None:
    for quantization in QUANTIZATIONS:
        assert sum(mix_of(quantization).values()) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="did you mean 'Q4_K_M'"):
        mix_of("Q4_KM")


def test_a_smaller_cache_type_is_faster_and_only_by_its_bytes() -> None:
    flags = dataclasses.replace(FLAGS, kv_type="q8_0")
    # 5.12 MB * 17/32 = 2.72 MB -> 0.272 ms
    tps, _, _ = predict_decode(
        DIMS, read={"Q4_K": 100_000_000}, flags=flags, context_tokens=1000, speed=SPEED
    )
    assert tps == pytest.approx(1000 / 11.272, rel=1e-12)


def test_the_low_end_stays_above_zero() -> None:
    wide = dataclasses.replace(SPEED, relative_error=1.5)
    _, low, _ = predict_decode(DIMS, read={"Q4_K": 1_000_000}, flags=FLAGS, context_tokens=0, speed=wide)
    assert low > 0


def test_prefill_from_arithmetic() -> None:
    # 50 GFLOPS / (2 * 100M parameters) = 250 tokens/s; 20M of 120M are only looked up
    found = predict_prefill(params=120_000_000, lookup_params=20_000_000, speed=SPEED)
    assert found == (pytest.approx(250.0), pytest.approx(250 / 1.2), pytest.approx(300.0))
    assert predict_prefill(params=1, speed=dataclasses.replace(SPEED, compute_flops=None)) is None


def test_first_token() -> None:
    # 500 tokens at 250/s = 2 s, one step at 50/s = 20 ms
    assert first_token_ms(500, 250.0, 50.0) == pytest.approx(2020.0)
