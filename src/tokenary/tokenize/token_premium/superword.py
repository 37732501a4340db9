"""Superwords: merges that go on across spaces, after most of the vocabulary was learned inside words (SuperBPE).

Phase 1 is ordinary BPE up to a share of the vocabulary. Phase 2 goes on merging the most frequent pair with pieces that
no longer end at single spaces, but still at line ends, digits and punctuation, and makes no token of more than
`most_words` words. The merges of both phases are one list: inside a word the first phase decides, as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import regex

from tokenary.core.errors import OptionError
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.training import (
    SUPERWORD_PATTERN,
    PairTable,
    byte_level,
    merges_of,
    pieces_of,
    train_bpe,
    word_count,
)


def train_superwords(
    texts: Sequence[str],
    vocab_size: int,
    transition: float = 0.9,
    most_words: int = 4,
    name: str = "superword",
    done: Callable[[int, int], None] = lambda merges, total: None,
) -> TextTokenizer:
    """Train a superword vocabulary.

    Parameters
    ----------
    texts : sequence of str
        The corpus; it is read twice.
    vocab_size : int
        Tokens in the end.
    transition : float
        Share of the vocabulary that phase 1 learns, 0.8 to 0.9 in the literature.
    most_words : int
        Words that a token may hold.
    name : str
        For people.
    done : callable
        Told merges of phase 2 and their number.

    Raises
    ------
    OptionError
        An option out of range.
    """
    if not 0 < transition <= 1:
        raise OptionError("transition", transition, "a share in (0, 1]")
    if most_words < 1:
        raise OptionError("most_words", most_words, "at least 1")
    inside = train_bpe(texts, max(257, round(transition * vocab_size)), name=name)
    merges = merges_of(inside)
    pieces = pieces_of(merges)
    made = set(pieces)
    table = PairTable(_encoded(inside, texts))
    total = vocab_size - len(pieces)
    while len(pieces) < vocab_size and (best := table.top(1)):
        left, right, count = best[0]
        if count < 2:
            break
        together = pieces[left] + pieces[right]
        if together in made or word_count(together) > most_words:
            table.ban(left, right)
            continue
        table.merge(left, right, len(pieces))
        merges.append((left, right))
        pieces.append(together)
        made.add(together)
        done(total - (vocab_size - len(pieces)), total)
    return byte_level(merges, SUPERWORD_PATTERN, name)


def _encoded(tokenizer: TextTokenizer, texts: Sequence[str]) -> np.ndarray:
    """Ids of phase 1, -1 between the pieces of phase 2."""
    chunks = [match.group() for text in texts for match in regex.finditer(SUPERWORD_PATTERN, text)]
    border = np.array([-1], np.int32)
    found: list[np.ndarray] = []
    for start in range(0, len(chunks), 4096):
        for row in tokenizer.encode_batch(chunks[start : start + 4096]):
            found += [row, border]
    return np.concatenate(found) if found else np.zeros(0, np.int32)
