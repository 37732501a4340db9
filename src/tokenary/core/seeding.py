"""Seeds without global state: every draw is named by what it is for, not by when it happens."""

from __future__ import annotations

import hashlib

import numpy as np


def substream(seed: int, *names: int | str) -> np.random.Generator:
    """Return a random generator for one named purpose.

    The same names give the same numbers whatever was drawn before, in whatever batch: this is what makes a
    sampled text independent of its neighbours and of how many tokens one pass yields.

    Parameters
    ----------
    seed : int
        The user's seed.
    *names : int or str
        What the draws are for, for example ``("sample", row, position)``.
    """
    text = ":".join(map(str, (seed, *names))).encode()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(hashlib.sha256(text).digest()[:16], np.uint64)))
