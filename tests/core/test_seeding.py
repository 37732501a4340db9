from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.seeding import substream

NAMES = st.lists(st.one_of(st.integers(), st.text(alphabet="abc", min_size=1)), max_size=3)


@given(st.integers(), NAMES)
def test_the_same_names_give_the_same_numbers(seed, names):
    assert np.array_equal(substream(seed, *names).random(4), substream(seed, *names).random(4))


def test_other_names_give_other_numbers():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, 0, "a"), (0, 12, 3), (0, 1, 23)]
    drawn = {tuple(substream(*key).integers(0, 2**62, 4)) for key in keys}
    assert len(drawn) == len(keys)


def test_what_was_drawn_before_does_not_matter():
    expected = substream(5, "x").random()
    np.random.default_rng(5).random(100)
    substream(5, "y").random(100)
    assert substream(5, "x").random() == expected


def test_numbers_are_uniform_over_names():
    drawn = np.array([substream(0, "sample", row, at).random() for row in range(40) for at in range(50)])
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 40  # p < 1e-5 at 9 degrees


def test_another_process_draws_the_same():
    """No use of Python's hash, which differs from process to process."""
    code = "from tokenary.core.seeding import substream; print(substream(3, 'a', 7).integers(0, 2**62))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1"},
    )
    assert int(found.stdout) == substream(3, "a", 7).integers(0, 2**62)
