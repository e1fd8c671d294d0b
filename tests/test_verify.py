"""Logits compared by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeprune.verify import Comparison, compare


def test_two_tokens_by_hand() -> None:
    # softmax of (ln 3, 0) is (3/4, 1/4), of (0, 0) is (1/2, 1/2)
    expected = np.array([[math.log(3), 0.0], [0.0, 0.0]], np.float32)
    found = np.array([[0.0, 0.0], [0.0, 0.0]], np.float32)
    result = compare(expected, found)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert result.tokens == 2
    assert result.kl == pytest.approx(kl / 2, rel=1e-6)
    assert result.max_abs_diff == pytest.approx(math.log(3))
    assert (result.same_argmax, result.explained_argmax) == (2, 0)


def test_a_shift_of_all_logits_changes_nothing_but_the_difference() -> None:
    expected = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    result = compare(expected, expected + 3)
    assert result.kl < 1e-9
    assert result.max_abs_diff == pytest.approx(3, rel=1e-5)
    assert result.same_argmax == 5


def test_a_close_call_is_explained_and_a_clear_one_is_not() -> None:
    expected = np.array([[1.00, 1.04, 0.0], [1.00, 1.06, 0.0]], np.float32)
    found = np.array([[1.05, 1.00, 0.0], [1.07, 1.00, 0.0]], np.float32)
    result = compare(expected, found)
    assert (result.same_argmax, result.explained_argmax) == (0, 1)


@pytest.mark.parametrize(
    ("kl", "same", "explained", "diff", "exact", "reason"),
    [
        (1e-3, 10, 0, 0.1, True, None),
        (1e-6, 9, 1, 0.1, True, None),
        (
            2e-3,
            10,
            0,
            0.1,
            True,
            "the exported file differs from torch: KL 2.00e-03 nats per token, limit 1e-03",
        ),
        (2e-3, 10, 0, 0.1, False, None),
        (
            1e-6,
            7,
            1,
            0.1,
            True,
            "the exported file predicts another token than torch at 2 of 10 positions",
        ),
        (1e-6, 1, 0, 0.1, False, None),
    ],
)
def test_failures(kl: float, same: int, explained: int, diff: float, exact: bool, reason: str | None) -> None:
    result = Comparison(tokens=10, kl=kl, max_abs_diff=diff, same_argmax=same, explained_argmax=explained)
    assert result.failure(exact=exact) == reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_logits_that_are_not_finite_fail(bad: float, exact: bool) -> None:
    expected = np.zeros((2, 3), np.float32)
    found = np.array([[0.0, 0.0, 0.0], [0.0, bad, 0.0]], np.float32)
    result = compare(expected, found)
    assert (result.kl, result.max_abs_diff, result.not_finite) == (0.0, 0.0, 1)  # finite, as records must be
    assert result.failure(exact=exact) == (
        "the exported file gives logits that are not finite at 1 of 2 positions"
    )


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"logits have shapes \(1, 3\) and \(1, 4\)"):
        compare(np.zeros((1, 3)), np.zeros((1, 4)))
