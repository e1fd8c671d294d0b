"""Mean scores over calibration seeds and how stable their ranks are; worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.records import Axis, RankStability
from edgeprune.stability import average_ranks, mean_scores, rank_stability, spearman


def axis(name: str, unit: str, n_units: int, layer: int = 0) -> Axis:
    return Axis(name=name, unit=unit, layer=layer, n_units=n_units, unit_params=1, slices=())


def test_equal_values_share_their_ranks() -> None:
    assert average_ranks(np.array([10.0, 30.0, 20.0, 20.0])).tolist() == [1.0, 4.0, 2.5, 2.5]
    assert average_ranks(np.array([5.0, 5.0, 5.0])).tolist() == [2.0, 2.0, 2.0]


def test_spearman_by_hand() -> None:
    # no ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1, 1, 0, 2, 2 over five values
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([20, 10, 30, 60, 40])) == pytest.approx(
        1 - 6 * 4 / 120
    )
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, sums of squares 4.5 and 5
    assert spearman(np.array([0, 7, 7, 9]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman(np.array([1, 2, 3]), np.array([-1, -2, -3])) == -1.0
    assert spearman(np.array([1, 2, 3]), np.array([1, 10, 1000])) == 1.0
    assert spearman(np.array([1, 1]), np.array([2, 2])) == 1.0
    assert spearman(np.array([1, 1]), np.array([1, 2])) == 0.0


def test_mean_over_draws() -> None:
    draws = [{"a": np.array([1.0, 3.0])}, {"a": np.array([60.0, 20.0])}]
    assert mean_scores(draws, poolable=True)["a"].tolist() == [30.5, 11.5]
    # divided by 2 and by 40: 0.5, 1.5 and 1.5, 0.5
    assert mean_scores(draws, poolable=False)["a"].tolist() == [1.0, 1.0]
    only = {"a": np.array([0.1, 0.2], dtype=np.float32)}
    assert mean_scores([only], poolable=False)["a"] is only["a"]
    nothing = [{"a": np.zeros(2)}, {"a": np.array([1.0, 3.0])}]
    assert mean_scores(nothing, poolable=False)["a"].tolist() == [0.25, 0.75]


def test_stability_over_axes_and_pairs() -> None:
    axes = [axis("f0", "ffn", 3), axis("f1", "ffn", 3, 1), axis("k0", "kv", 2), axis("k1", "kv", 1, 1)]
    up, down = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    pair, one = np.array([1.0, 2.0]), np.array([4.0])
    draws = [
        {"f0": up, "f1": up, "k0": pair, "k1": one},
        {"f0": up, "f1": up, "k0": pair, "k1": one},
        {"f0": down, "f1": up, "k0": -pair, "k1": one},
    ]
    # f0: pairs 1, -1, -1; f1: 1; the single group has no order
    assert rank_stability(draws, axes) == (
        RankStability(unit="ffn", axes=2, mean=pytest.approx((1 - 1 / 3) / 2), minimum=pytest.approx(-1 / 3)),
        RankStability(unit="kv", axes=1, mean=pytest.approx(-1 / 3), minimum=pytest.approx(-1 / 3)),
    )
    assert rank_stability(draws[:1], axes) == ()
