"""Many lanes in step: in each round every lane codes one token, and the model reads all of them in one pass.

A round: the ensemble says which lanes need the model; those read what they have not read yet, a token or the gap that
skipped tokens left; then each lane in turn codes its token and teaches the ensemble. The decoder does the same.
Where a reader is `exact` the encoder, which knows the text, reads ahead in long pieces: logits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tokenary.codec.base import Ensemble, Lanes
from tokenary.codec.coder import Decoder, Encoder

Progress = Callable[[int, int], None]  # tokens and bytes so far
_AHEAD = 32


class Feed:
    """Brings tokens to the model as late as possible, in the pieces that a decoder can know.

    Parameters
    ----------
    reader : Lanes
        The model.
    lanes : int
        Texts.
    start : int
        Token that every text begins behind.
    """

    def __init__(self, reader: Lanes, lanes: int, start: int) -> None:
        self.reader = reader
        self.waiting: list[list[int]] = [[start] for _ in range(lanes)]

    def add(self, lane: int, token: int) -> None:
        """Append a token to a lane."""
        self.waiting[lane].append(token)

    def logits(self, lanes: Sequence[int]) -> NDArray[np.float32]:
        """Logits (lanes, V) of the next token of each of these lanes."""
        last: dict[int, NDArray[np.float32]] = {}
        while any(self.waiting[lane] for lane in lanes):
            pieces: list[list[int]] = [[] for _ in self.waiting]
            for lane in lanes:
                pieces[lane] = self.waiting[lane][: self.reader.drop]
                self.waiting[lane] = self.waiting[lane][self.reader.drop :]
            states = self.reader.read(pieces)
            last.update({lane: states[lane][-1] for lane in lanes if pieces[lane]})
        return self.reader.logits(np.stack([last[lane] for lane in lanes]))


class FeedAhead:
    """Brings the tokens of known texts to an exact reader in pieces of `_AHEAD`."""

    def __init__(self, reader: Lanes, texts: Sequence[Sequence[int]], start: int) -> None:
        self.reader, self.piece = reader, min(_AHEAD, reader.drop)
        self.texts = [[start, *text[:-1]] for text in texts]
        self.at = [0] * len(texts)
        self.first, self.states = 0, [np.empty((0, 0), np.float32)] * len(texts)

    def add(self, lane: int, token: int) -> None:
        """Go on by a token."""
        self.at[lane] += 1

    def logits(self, lanes: Sequence[int]) -> NDArray[np.float32]:
        """Logits (lanes, V) of the next token of each of these lanes."""
        here = self.at[lanes[0]]  # lanes advance together
        while here >= self.first + len(self.states[lanes[0]]):
            self.first += len(self.states[lanes[0]])
            self.states = self.reader.read([text[self.first : self.first + self.piece] for text in self.texts])
        return self.reader.logits(np.stack([self.states[lane][here - self.first] for lane in lanes]))


def rounds(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the lanes that have a token left, round by round; earlier lanes are never shorter than later ones."""
    for number in range(max(lengths, default=0)):
        yield [lane for lane, length in enumerate(lengths) if number < length]


def encode(
    reader: Lanes, ensemble: Ensemble, texts: Sequence[Sequence[int]], start: int, progress: Progress | None = None
) -> list[bytes]:
    """Code texts of token ids side by side; return the bytes of each lane."""
    coders = [Encoder() for _ in texts]
    feed = FeedAhead(reader, texts, start) if reader.exact else Feed(reader, len(texts), start)

    def code(lane: int, number: int, weights: NDArray[np.float64]) -> int:
        coders[lane].put(texts[lane][number], weights)
        return texts[lane][number]

    for done in _run(feed, ensemble, [len(text) for text in texts], code):
        if progress is not None:
            progress(done, sum(map(len, coders)))
    return [coder.finish() for coder in coders]


def decode(
    reader: Lanes,
    ensemble: Ensemble,
    lengths: Sequence[int],
    coded: Sequence[bytes],
    start: int,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Read texts of these lengths back from the bytes of their lanes."""
    coders, size = [Decoder(data) for data in coded], sum(map(len, coded))
    texts: list[list[int]] = [[] for _ in coded]

    def code(lane: int, number: int, weights: NDArray[np.float64]) -> int:
        texts[lane].append(coders[lane].get(weights))
        return texts[lane][-1]

    for done in _run(Feed(reader, len(coded), start), ensemble, lengths, code):
        if progress is not None:
            progress(done, size)
    return texts


def _run(
    feed: Feed | FeedAhead,
    ensemble: Ensemble,
    lengths: Sequence[int],
    code: Callable[[int, int, NDArray[np.float64]], int],
) -> Iterator[int]:
    """Run the rounds; yield the number of tokens that are done."""
    done = 0
    for number, lanes in enumerate(rounds(lengths)):
        needed = [lane for lane, needs in zip(lanes, ensemble.plan(lanes), strict=True) if needs]
        logits = dict(zip(needed, feed.logits(needed), strict=True)) if needed else {}
        for lane in lanes:
            token = code(lane, number, ensemble.weights(lane, logits.get(lane)))
            ensemble.update(lane, token)
            feed.add(lane, token)
        done += len(lanes)
        yield done


def cut(tokens: Sequence[int], lanes: int) -> list[Sequence[int]]:
    """Cut tokens into consecutive lanes of equal length; the first ones may have one more."""
    ends = np.cumsum(lane_lengths(len(tokens), lanes)).tolist()
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def lane_lengths(tokens: int, lanes: int) -> list[int]:
    """Lengths of the lanes that `cut` makes."""
    return [tokens // lanes + (lane < tokens % lanes) for lane in range(lanes)]
