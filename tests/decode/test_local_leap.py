from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.errors import OptionError
from tokenary.decode.confidence import Confidence
from tokenary.decode.denoise_laws import RAGGED, net, run, texts
from tokenary.decode.local_leap import LocalLeap, calibrate, leap

INF = float("-inf")


def slow(row, anchor, relaxed, radius):
    """The paper's rule, position by position."""
    anchors = [i for i, c in enumerate(row) if c >= anchor]
    best = max(range(len(row)), key=lambda i: (row[i], -i))
    chosen = []
    for i, c in enumerate(row):
        near = any(abs(i - a) <= radius for a in anchors)
        chosen.append(c > INF and (c >= (relaxed if near else anchor) or i == best))
    return chosen


@st.composite
def rows(draw):
    size = draw(st.integers(1, 24))
    number = st.one_of(st.just(INF), st.floats(0, 1), st.sampled_from([0.75, 0.9]))
    found = draw(st.lists(number, min_size=size, max_size=size))
    found[draw(st.integers(0, size - 1))] = draw(st.floats(0.01, 1))
    return found


@given(st.lists(rows(), min_size=1, max_size=1), st.floats(0.5, 1), st.floats(0.1, 0.5), st.integers(0, 30))
def test_leap_is_the_rule(batch, anchor, relaxed, radius):
    confidence = torch.tensor(batch, dtype=torch.float64)
    assert leap(confidence, anchor, relaxed, radius).tolist() == [slow(r, anchor, relaxed, radius) for r in batch]


def test_rows_are_independent():
    confidence = torch.tensor([[0.95, 0.8, 0.1, 0.8], [0.1, 0.8, 0.1, 0.7]], dtype=torch.float64)
    assert leap(confidence, 0.9, 0.75, 1).tolist() == [[True, True, False, False], [False, True, False, False]]
    assert leap(confidence, 0.9, 0.75, 10**6).tolist()[0] == [True, True, False, True]  # an anchor anywhere


def test_equal_thresholds_are_one_global_threshold():
    model = net()
    ours, plain = LocalLeap(anchor=0.5, relaxed=0.5), Confidence(threshold=0.5)
    left, right = run(model, ours, RAGGED), run(model, plain, RAGGED)
    assert texts(left) == texts(right)
    assert [s.trace for s in left.sequences] == [s.trace for s in right.sequences]


def test_it_needs_fewer_passes_than_its_strict_threshold_alone():
    """Per pass it commits a superset; over a whole text of a sharp net that shows."""
    model = net()
    strict = run(model, Confidence(threshold=0.8), RAGGED)
    ours = run(model, LocalLeap(anchor=0.8, relaxed=0.3, radius=4), RAGGED)
    passes = [sum(s.trace.passes for s in loop.sequences) for loop in (ours, strict)]
    assert passes[0] < passes[1]


def test_calibration_finds_the_lowest_threshold_that_is_right_often_enough():
    confidence = torch.tensor([0.9, 0.8, 0.8, 0.7, 0.2])
    right = torch.tensor([True, True, False, True, False])
    assert calibrate([confidence], [right], 0.9) == pytest.approx(0.9)
    assert calibrate([confidence[:2], confidence[2:]], [right[:2], right[2:]], 0.75) == pytest.approx(0.7)
    assert calibrate([confidence], [~right], 0.9) == 1.0
    with pytest.raises(OptionError):
        calibrate([confidence], [right], 0)


@pytest.mark.parametrize("options", [{"anchor": 0.5, "relaxed": 0.6}, {"radius": -1}, {"anchor": 1.5}, {"block": -1}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        LocalLeap(**options)
