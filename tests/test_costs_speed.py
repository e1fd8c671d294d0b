"""The speed model against latencies worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from edgeprune.costs.speed import first_token_ms, predict_decode, predict_prefill
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
        DIMS, read_bytes=100_000_000, flags=FLAGS, context_tokens=1000, speed=SPEED
    )
    assert tps == pytest.approx(1000 / 11.512, rel=1e-12)
    assert low == pytest.approx(0.8 * tps)
    assert high == pytest.approx(1.2 * tps)


def test_a_slow_type_costs_its_share_of_the_weights_only() -> None:
    # weights 10 ms / 0.5 = 20 ms, the rest as above
    tps, _, _ = predict_decode(
        DIMS, read_bytes=100_000_000, flags=FLAGS, context_tokens=1000, speed=SPEED, type_factor=0.5
    )
    assert tps == pytest.approx(1000 / 21.512, rel=1e-12)


def test_a_smaller_cache_type_is_faster_and_only_by_its_bytes() -> None:
    flags = dataclasses.replace(FLAGS, kv_type="q8_0")
    # 5.12 MB * 17/32 = 2.72 MB -> 0.272 ms
    tps, _, _ = predict_decode(DIMS, read_bytes=100_000_000, flags=flags, context_tokens=1000, speed=SPEED)
    assert tps == pytest.approx(1000 / 11.272, rel=1e-12)


def test_the_low_end_stays_above_zero() -> None:
    wide = dataclasses.replace(SPEED, relative_error=1.5)
    _, low, _ = predict_decode(DIMS, read_bytes=1_000_000, flags=FLAGS, context_tokens=0, speed=wide)
    assert low > 0


def test_prefill_from_arithmetic() -> None:
    # 50 GFLOPS / (2 * 100M parameters) = 250 tokens/s; 20M of 120M are only looked up
    found = predict_prefill(params=120_000_000, lookup_params=20_000_000, speed=SPEED)
    assert found == (pytest.approx(250.0), pytest.approx(200.0), pytest.approx(300.0))
    assert predict_prefill(params=1, speed=dataclasses.replace(SPEED, compute_flops=None)) is None


def test_first_token() -> None:
    # 500 tokens at 250/s = 2 s, one step at 50/s = 20 ms
    assert first_token_ms(500, 250.0, 50.0) == pytest.approx(2020.0)
