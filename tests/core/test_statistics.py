"""Intervals and ranks against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenary.core.statistics import Interval, interval, spearman


def test_an_interval_is_the_middle_of_the_draws():
    draws = np.random.default_rng(0).permutation(np.arange(1001) / 1000)
    found = interval(0.4, draws, 0.9)
    assert found == Interval(0.4, pytest.approx(0.05), pytest.approx(0.95)) and found.moved
    assert interval(0.0, draws - 0.5).moved is False
    assert interval(0.4, draws).error == pytest.approx(0.95 / 3.92)


def test_where_draws_are_not_defined_there_is_no_interval():
    draws = np.linspace(0, 1, 1000)
    draws[:9] = math.nan
    assert not math.isnan(interval(0.5, draws).low)
    draws[:11] = math.nan
    found = interval(0.5, draws)
    assert math.isnan(found.low) and found.error == math.inf and not found.moved
    assert found.to_json() == {"value": 0.5, "low": None, "high": None}
    assert math.isnan(interval(0.5, np.array([])).high)


def test_ranks_share_their_place_where_values_are_equal():
    assert spearman([0.1, 0.2, 0.9], [1, 2, 3]) == pytest.approx(1.0)
    assert spearman([0.9, 0.5, 0.1], [0, 0, 1]) == pytest.approx(-0.866, abs=1e-3)
    assert spearman([0.5, 0.5, 0.9, 0.2], [0, 1, 1, 0]) == pytest.approx(
        np.corrcoef([2.5, 2.5, 4, 1], [0, 1, 1, 0])[0, 1]
    )
    assert spearman([0.1, 0.2, 0.3], [1, 1, 1]) is None and spearman([0.1], [1]) is None
