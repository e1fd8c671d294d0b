"""The model of quality: worked by hand, found again from a made-up truth, honest about its errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import damage
from edgeprune.damage import Estimate, Seen, Term

ONE = (Term(name="a", value=2.0, stderr=1.0),)


def test_without_measurements_the_prior_speaks() -> None:
    model = damage.fit(ONE, [])
    assert (model.terms[0].value, model.terms[0].stderr) == (2.0, 1.0)
    found = model.predict({"a": 0.5, "unknown": 9.0})
    assert found.kl == 1.0
    # of a value of 1: the prior's 0.5, the misfit's 0.25 and the floor of 0.001
    error = math.sqrt(0.5**2 + 0.25**2 + 0.001**2)
    assert found.spread == pytest.approx(math.sqrt(math.log1p(error**2)))
    assert found.low == pytest.approx(math.exp(-1.2816 * found.spread))
    assert found.high == pytest.approx(math.exp(1.2816 * found.spread))


def test_one_measurement_by_hand() -> None:
    # kl = 4 at a feature of 1; the noise is that of the mean of fit and measurement
    model = damage.fit(ONE, [Seen(features={"a": 1.0}, kl=4.0, stderr=0.0)])
    value = model.terms[0].value
    before, misfit = 4.0, 0.25
    for _ in range(damage.ROUNDS):
        weight = 1 / ((misfit * before) ** 2 + 0.001**2)
        by_hand = (2.0 + weight * 4.0) / (1 + weight)
        before = (by_hand + 4.0) / 2
        # one measurement, of which the term has taken up weight / (1 + weight)
        misfit = math.sqrt((2 * 0.25**2 + ((4.0 - by_hand) / before) ** 2) / (2 + 1 / (1 + weight)))
    assert model.misfit == pytest.approx(misfit)
    assert value == pytest.approx(by_hand)
    assert model.terms[0].stderr == pytest.approx((1 + weight) ** -0.5)
    assert 2.0 < value < 4.0


def test_terms_are_found_again() -> None:
    rng = np.random.default_rng(0)
    truth = {"a": 30.0, "b": 5.0, "c": 2.0}
    priors = [Term(name=n, value=10.0, stderr=20.0) for n in truth]
    seen = []
    for _ in range(40):
        features = {name: float(rng.random()) for name in truth}
        kl = sum(truth[n] * v for n, v in features.items()) * float(np.exp(0.05 * rng.standard_normal()))
        seen.append(Seen(features=features, kl=kl, stderr=0.01))
    model = damage.fit(priors, seen)
    for term in model.terms:
        assert abs(term.value - truth[term.name]) < 3 * term.stderr
        assert term.stderr < 2.5
    assert model.terms[0].value == pytest.approx(30.0, rel=0.1)


def test_what_fits_well_leaves_less_over() -> None:
    rng = np.random.default_rng(2)
    priors = [Term(name=n, value=10.0, stderr=20.0) for n in "ab"]

    def drawn(noise: float) -> damage.Model:
        seen = []
        for _ in range(12):
            features = {n: float(rng.uniform(0.5, 1)) for n in "ab"}
            kl = 20 * features["a"] + 5 * features["b"]
            seen.append(
                Seen(features=features, kl=kl * float(np.exp(noise * rng.standard_normal())), stderr=0.0)
            )
        return damage.fit(priors, seen)

    assert damage.fit(priors, []).misfit == 0.25
    # two measurements' worth of 0.25 among twelve of 0.02
    assert 0.09 < drawn(0.02).misfit < 0.12
    assert drawn(0.6).misfit > 0.4


def test_nothing_that_is_given_up_adds_quality() -> None:
    priors = [Term(name="a", value=1.0, stderr=1.0), Term(name="b", value=1.0, stderr=1.0)]
    # b alone would have to be negative
    seen = [
        Seen(features={"a": 1.0}, kl=1.0, stderr=0.001),
        Seen(features={"a": 1.0, "b": 1.0}, kl=0.2, stderr=0.001),
    ]
    model = damage.fit(priors, seen)
    assert all(term.value >= 0 for term in model.terms)
    assert model.terms[1].value == 0 and model.terms[1].stderr == 0.5  # half its prior's


def test_a_dense_candidate_has_no_loss() -> None:
    found = damage.fit(ONE, []).predict({})
    assert (found.kl, found.low) == (0.0, 0.0)
    assert 0.001 < found.high < 0.01


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 5), st.floats(0.05, 1.5), st.floats(0.01, 5))
def test_gain_is_the_mean_of_what_falls_below(kl: float, spread: float, best: float) -> None:
    found = Estimate(kl=kl, spread=spread)
    # 20,000 equally likely values of the lognormal
    p = (np.arange(20_000) + 0.5) / 20_000
    z = math.sqrt(2) * np.array([_inverse_erf(2 * x - 1) for x in p[::20]])
    values = kl * np.exp(spread * z)
    assert found.gain(best) == pytest.approx(
        float(np.maximum(best - values, 0).mean()), abs=0.02 * best + 1e-6
    )
    assert found.below(best) == pytest.approx(float((values < best).mean()), abs=0.01)


def _inverse_erf(y: float) -> float:
    low, high = -6.0, 6.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < y else (low, middle)
    return low


def test_the_interval_is_worth_its_name() -> None:
    """About 80% of what was not fitted falls inside, when errors are as large as they are taken to be."""
    rng = np.random.default_rng(1)
    priors = [Term(name=n, value=10.0, stderr=10.0) for n in "ab"]
    inside = total = 0
    for _ in range(60):
        truth = {n: float(abs(10 + 10 * rng.standard_normal())) for n in "ab"}

        def draw(truth: dict[str, float] = truth) -> Seen:
            features = {n: float(rng.random()) for n in "ab"}
            kl = sum(truth[n] * v for n, v in features.items())
            return Seen(features=features, kl=kl * float(np.exp(0.25 * rng.standard_normal())), stderr=0.0)

        model = damage.fit(priors, [draw() for _ in range(6)])
        for _ in range(20):
            one = draw()
            found = model.predict(one.features)
            inside += found.low <= one.kl <= found.high
            total += 1
    assert 0.72 <= inside / total <= 0.92
