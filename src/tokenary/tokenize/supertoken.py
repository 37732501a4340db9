"""Supertokens: BPE over chunks of random length, so that tokens may span several words (appendix of arXiv 2505.09738).

A text is cut into chunks whose lengths in characters are drawn from a fixed mixture; merges are learned inside chunks,
with no regard for spaces. In use nothing is cut but line ends (or nothing at all), so that a token of several words
fires wherever its merges apply. The paper names a distribution of lengths but not which: `MIXTURE` is our choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tokenary.core.errors import OptionError
from tokenary.core.seeding import substream
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.training import train_bpe

#: Least and most characters of a chunk, and how often its length is drawn from there.
MIXTURE = ((1, 12, 0.5), (13, 30, 0.35), (31, 60, 0.15))
LINES = r"[^\n]*\n+|[^\n]+"

Mixture = Sequence[tuple[int, int, float]]


def train_supertokens(
    texts: Iterable[str],
    vocab_size: int,
    mixture: Mixture = MIXTURE,
    whole: bool = False,
    seed: int = 0,
    name: str = "supertoken",
    progress: bool = False,
) -> TextTokenizer:
    """Train a supertoken vocabulary.

    Parameters
    ----------
    texts : iterable of str
        Read once.
    vocab_size : int
        Tokens, the 256 bytes included.
    mixture : sequence of (int, int, float)
        Ranges of the chunks' lengths in characters, and the share of each.
    whole : bool
        In use merge over the whole text; else within lines, which also lets `tokenizers` remember short ones.
    seed : int
        Of the chunks.
    name : str
        For people.
    progress : bool
        Draw the progress bar of `tokenizers`.

    Raises
    ------
    OptionError
        A mixture of empty ranges, or of shares that do not add up to 1.
    InputError
        The texts are empty.
    """
    if any(not 1 <= low <= high for low, high, _ in mixture) or abs(sum(part[2] for part in mixture) - 1) > 1e-9:
        raise OptionError("mixture", mixture, "ranges of at least 1 character whose shares add up to 1")
    chunks = (chunk for i, text in enumerate(texts) for chunk in chunked(text, mixture, seed, i))
    return train_bpe(chunks, vocab_size, pattern=None if whole else LINES, name=name, progress=progress)


def chunked(text: str, mixture: Mixture = MIXTURE, seed: int = 0, number: int = 0) -> Iterator[str]:
    """Cut a text into chunks of random length; joined they are the text."""
    stream = substream(seed, "supertoken", number)
    low, high, shares = (np.array(part) for part in zip(*mixture, strict=True))
    at = 0
    while at < len(text):
        which = stream.choice(len(shares), 1024, p=shares)
        for length in stream.integers(low[which], high[which] + 1):
            if at < len(text):
                yield text[at : at + int(length)]
            at += int(length)
