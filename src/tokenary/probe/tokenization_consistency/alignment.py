"""Words of a text given as ids, and where each word of a passage went in what was written from it.

Everything is counted in bytes of the tokens. Decoding spans one by one would not do: a decoder may strip a space at the
start, and a character may be spread over several tokens.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import regex

WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+(?:['’\-][\p{L}\p{M}\p{N}_]+)*")
SPACE = b" \t\n\r\x0b\x0c"


@dataclass(frozen=True)
class Span:
    """A word in its tokens.

    Parameters
    ----------
    ids : tuple of int
        All tokens that hold a byte of the word or of the white space right before it.
    pieces : tuple of bytes
        What of each of them belongs to the word and that white space.
    """

    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


class Text:
    """A text as tokens.

    Parameters
    ----------
    ids : sequence of int
        The tokens as they came, never encoded anew.
    spellings : sequence of bytes
        Bytes of every token of the vocabulary; empty for special ones.

    Attributes
    ----------
    data : bytes
        The whole text.
    words : list of (int, int)
        Start and stop of each word, in bytes.
    surfaces : list of str
        The words.
    """

    def __init__(self, ids: Sequence[int], spellings: Sequence[bytes]) -> None:
        self.ids = list(ids)
        self.pieces = [spellings[i] if i < len(spellings) else b"" for i in ids]
        self.ends = list(accumulate(map(len, self.pieces)))
        self.data = b"".join(self.pieces)
        self.words: list[tuple[int, int]] = []
        self.surfaces: list[str] = []
        text, char, byte = self.data.decode(errors="surrogateescape"), 0, 0
        for found in WORD.finditer(text):
            start = byte + _size(text[char : found.start()])
            char, byte = found.end(), start + _size(found[0])
            self.words.append((start, byte))
            self.surfaces.append(found[0])

    def span(self, start: int, stop: int) -> Span:
        """Return the word at these bytes, with the white space right before it."""
        start = len(self.data[:start].rstrip(SPACE))
        first, last = bisect_right(self.ends, start), bisect_right(self.ends, stop - 1)
        pieces = []
        for i in range(first, last + 1):
            begin = self.ends[i] - len(self.pieces[i])
            pieces.append(self.pieces[i][max(0, start - begin) : stop - begin])
        kept = [(self.ids[first + n], piece) for n, piece in enumerate(pieces) if piece]
        return Span(tuple(i for i, _ in kept), tuple(piece for _, piece in kept))

    def cut(self, at: int) -> int | None:
        """Return how many tokens end at or before a byte; None where one goes across."""
        count = bisect_right(self.ends, at)
        return count if (self.ends[count - 1] if count else 0) == at else None

    def initial(self, start: int) -> bool:
        """Whether a word that starts here begins a sentence."""
        before = self.data[:start].decode(errors="replace").rstrip(" \t\r\n\"'“‘([")
        return not before or before[-1] in ".!?"

    def bracketed(self, start: int, stop: int) -> bool:
        """Whether the bytes stand in brackets."""
        return self.data[:start].rstrip(SPACE).endswith(b"[") and self.data[stop:].lstrip(SPACE).startswith(b"]")


@dataclass(frozen=True)
class Place:
    """Where a word of the passage went.

    Parameters
    ----------
    kept : bool
        Whether it stands there letter by letter, perhaps with other white space around it.
    start, stop : int
        Bytes of the written text: of the word, or of all that stands in the place of it and its changed neighbours.
    """

    kept: bool
    start: int
    stop: int


def align(source: Text, written: Text) -> list[Place | None]:
    """Find every word of the passage in the written text; None where nothing stands in its place."""
    places: list[Place | None] = [None] * len(source.words)
    matcher = difflib.SequenceMatcher(None, source.surfaces, written.surfaces, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
                places[i] = Place(True, *written.words[j])
        elif kind == "replace":
            start, stop = written.words[j1][0], written.words[j2 - 1][1]
            ours = source.data[source.words[i1][0] : source.words[i2 - 1][1]]
            if _letters(ours) == _letters(written.data[start:stop]):
                places[i1:i2] = _respaced(source, range(i1, i2), written, start)
            else:
                places[i1:i2] = [Place(False, start, stop)] * (i2 - i1)
    return places


def _respaced(source: Text, words: range, written: Text, start: int) -> list[Place | None]:
    """Find words in a text of the same letters with other white space."""
    origin, data = source.words[words[0]][0], written.data
    at = [i for i in range(start, len(data)) if not data[i : i + 1].isspace()]
    found: list[Place | None] = []
    for i in words:
        begin, end = source.words[i]
        first = len(_letters(source.data[origin:begin]))
        left, right = at[first], at[first + end - begin - 1] + 1
        found.append(Place(data[left:right] == source.data[begin:end], left, right))
    return found


def _letters(data: bytes) -> bytes:
    return b"".join(data.split())


def _size(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))
