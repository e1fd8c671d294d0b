"""Quality figures against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeprune import quality


def test_mean_and_stderr_over_windows() -> None:
    # window means 1, 2, 6: mean 3, variance (4+1+9)/2 = 7, stderr sqrt(7/3)
    values = np.array([[0.0, 2.0], [1.0, 3.0], [5.0, 7.0]])
    got = quality.mean_with_stderr(values)
    assert got.value == 3.0
    assert got.stderr == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    assert got.units == 3


def test_tokens_of_one_window_do_not_count_as_independent() -> None:
    # every token of a window equal: four windows of 100 tokens say no more than four numbers
    values = np.repeat(np.array([[1.0], [2.0], [3.0], [4.0]]), 100, axis=1)
    assert quality.mean_with_stderr(values).stderr == pytest.approx(math.sqrt(5 / 3) / 2, rel=1e-12)


def test_single_window_falls_back_to_tokens() -> None:
    got = quality.mean_with_stderr(np.array([[1.0, 3.0]]))
    # mean 2, variance 2, stderr sqrt(2/2) = 1
    assert (got.value, got.stderr, got.units) == (2.0, pytest.approx(1.0), 2)


def test_perplexity_by_the_delta_method() -> None:
    # window means ln 2 and ln 8: mean ln 4, stderr of the mean = (ln 8 - ln 2) / 2 = ln 2
    got = quality.perplexity(np.array([[math.log(2)] * 2, [math.log(8)] * 2]))
    assert got.value == pytest.approx(4.0, rel=1e-12)
    assert got.stderr == pytest.approx(4 * math.log(2), rel=1e-12)


def test_perplexity_of_a_broken_model_is_finite() -> None:
    assert math.isfinite(quality.perplexity(np.full((2, 2), 1e5)).value)


def test_kl_below_zero_by_rounding_reads_as_zero() -> None:
    assert quality.kl(np.full((2, 3), -1e-9)).value == 0.0
    assert quality.kl(np.full((2, 3), 0.25)).value == 0.25


def test_agreement_counts_equal_positions() -> None:
    got = quality.agreement(np.array([[1, 2, 3, 4]] * 2), np.array([[1, 2, 3, 5]] * 2))
    assert got.value == 0.75
    assert got.stderr == 0.0


def test_paired_difference_finds_what_single_intervals_hide() -> None:
    hard = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    a, b = hard + 0.1, hard + np.array([[0.0], [0.01], [0.0], [0.01], [0.0]])
    # differences 0.1 0.09 0.1 0.09 0.1: mean 0.096, s^2 = (3*0.004^2 + 2*0.006^2)/4 = 3e-5
    got = quality.paired_difference(a, b)
    stderr = math.sqrt(3e-5 / 5)
    assert got.difference == pytest.approx(0.096, rel=1e-9)
    assert got.stderr == pytest.approx(stderr, rel=1e-9)
    assert got.low == pytest.approx(0.096 - 2.776 * stderr, rel=1e-9)
    assert got.high == pytest.approx(0.096 + 2.776 * stderr, rel=1e-9)
    assert not got.tie
    own = quality.mean_with_stderr(a).stderr
    assert own > 0.096  # unpaired, the two would overlap


def test_paired_difference_with_itself_is_a_tie() -> None:
    a = np.random.default_rng(0).random((4, 8))
    got = quality.paired_difference(a, a)
    assert (got.difference, got.low, got.high, got.tie) == (0.0, 0.0, 0.0, True)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        quality.paired_difference(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="filled array"):
        quality.mean_with_stderr(np.zeros((0, 3)))


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (30, 2.0423), (31, 2.0395), (60, 2.0003), (1000, 1.9623)]
)
def test_t_quantile(degrees: int, quantile: float) -> None:
    assert quality.t95(degrees) == pytest.approx(quantile, abs=4e-4)
