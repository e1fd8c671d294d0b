"""The fit of a device's speed model: known models are found again from the times they give."""

from __future__ import annotations

import dataclasses
import random

import pytest

from edgeprune.costs import speed_fit
from edgeprune.costs.speed import decode_ns
from edgeprune.costs.speed_fit import Probe
from edgeprune.records import SpeedModel

KINDS = {"Q4_K": 1.0, "Q6_K": 1.0, "Q8_0": 1.0, "Q4_0": 1.0, "Q3_K": 0.5, "KV": 1.0}
START = SpeedModel(
    runtime="llama-cpp",
    mode="",
    bandwidth_bytes_per_s=20e9,
    layer_ns=37_000.0,
    compute_flops=None,
    relative_error=0.4,
    source="facts",
    basis="facts",
    type_factors=KINDS,
)
TRUE = dataclasses.replace(
    START,
    bandwidth_bytes_per_s=9e9,
    layer_ns=80_000.0,
    token_ns=100_000.0,
    type_factors={"Q4_K": 1.0, "Q6_K": 1.0, "Q8_0": 1.4, "Q4_0": 1.1, "Q3_K": 0.5, "KV": 0.6},
)


def _probe(kind: str, n_bytes: float, layers: int, cache: float = 0.0, model: SpeedModel = TRUE) -> Probe:
    read = {kind: n_bytes}
    return Probe(read=read, cache=cache, layers=layers, ns=decode_ns(read, cache, layers, model))


PROBES = [
    _probe("Q4_K", 100e6, 14),
    _probe("Q4_0", 20e6, 64),
    _probe("Q6_K", 100e6, 10),
    _probe("Q4_0", 20e6, 16, cache=40e6),
    _probe("Q8_0", 100e6, 8),
    _probe("Q4_0", 100e6, 14),
]


def test_a_known_model_is_found_again() -> None:
    found = speed_fit.fit(PROBES, START)
    for kind in ("Q4_K", "Q6_K", "Q8_0", "Q4_0"):
        rate = found.bandwidth_bytes_per_s * found.type_factors[kind]
        true = TRUE.bandwidth_bytes_per_s * TRUE.type_factors[kind]
        assert rate == pytest.approx(true, rel=0.03), kind
    assert found.layer_ns == pytest.approx(80_000, rel=0.15)
    assert max(abs(r) for r in speed_fit.residuals(PROBES, found)) < 0.02
    # other sizes, a mix and a filled cache
    for read, cache, layers in (({"Q4_K": 500e6, "Q8_0": 90e6}, 0.0, 30), ({"Q4_K_M": 700e6}, 200e6, 22)):
        assert decode_ns(read, cache, layers, found) == pytest.approx(
            decode_ns(read, cache, layers, TRUE), rel=0.06
        )


def test_a_type_that_was_not_measured_follows_the_others() -> None:
    found = speed_fit.fit(PROBES, START)
    # Q3_K started at half the rate of Q4_K, and the whole device is slower than the start
    assert found.type_factors["Q3_K"] == pytest.approx(0.5, rel=0.25)


def test_noise_does_not_make_a_rate_negative_or_infinite() -> None:
    rng = random.Random(0)
    for _ in range(20):
        noisy = [dataclasses.replace(p, ns=p.ns * rng.uniform(0.7, 1.4)) for p in PROBES]
        found = speed_fit.fit(noisy, START)
        assert found.layer_ns >= 0 and found.token_ns >= 0
        assert all(0.05 < f < 20 for f in found.type_factors.values())
        assert 3e9 < found.bandwidth_bytes_per_s < 27e9


def test_one_probe_is_enough_to_scale_the_start() -> None:
    found = speed_fit.fit(PROBES[:1], START)
    assert decode_ns({"Q4_K": 100e6}, 0, 14, found) == pytest.approx(PROBES[0].ns, rel=0.02)
    # 2.2 times slower than the start said
    assert 7e9 < found.bandwidth_bytes_per_s < 11e9
