"""Confidence intervals and standard errors of the evaluations."""

import math

import numpy as np
import pytest

from lcx.evals.support import intervals


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(hits, trials, low, high):
    assert intervals.wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_equation():
    """Its ends are the p at which the observed proportion is z standard deviations of p away."""
    z = 1.959963984540054
    for hits, trials in [(3, 10), (1, 7), (99, 100)]:
        for p in intervals.wilson(hits, trials):
            assert abs(hits / trials - p) == pytest.approx(z * math.sqrt(p * (1 - p) / trials), rel=1e-9)
    assert intervals.wilson(0, 10)[0] == 0 and intervals.wilson(10, 10)[1] == 1
    assert intervals.wilson(10, 10)[0] == pytest.approx(1 - intervals.wilson(0, 10)[1])


def test_mean_and_error():
    mean, error = intervals.mean_and_error([2.0, 6.0, 0.0], [1.0, 1.0, 0.0])  # an empty row does not count
    assert mean == 4 and error == pytest.approx(np.std([2, 6], ddof=1) / math.sqrt(2))
    assert intervals.mean_and_error([3.0], [2.0]) == (1.5, None)
    assert intervals.mean_and_error([0.0], [0.0]) == (None, None)
