"""The text of a sequence under way: whole characters, and nothing that may begin a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what a decoder shows for a character that is not complete


class TextStream:
    """Turns tokens into text as they come.

    Parameters
    ----------
    decode : callable
        Turns token ids into text.
    stop : sequence of str
        Texts that end it; they are no part of it.

    Attributes
    ----------
    text : str
        All whole characters so far, up to a stop text.
    stopped : bool
        Whether a stop text came.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(filter(None, stop))
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._start = self._shown = 0  # tokens up to `_shown` are settled; decoding begins a few before them
        self._settled, self._given = "", 0
        self.text, self.stopped = "", False

    def add(self, token: int) -> bool:
        """Take a token; return whether the text has come to a stop text."""
        if self.stopped:
            return True
        self._ids.append(token)
        seen, new = len(self.text), self._new()
        whole = new.rstrip(_UNFINISHED)
        self.text = self._settled + whole
        if whole == new:
            self._settled, self._start, self._shown = self.text, self._shown, len(self._ids)
        found = (self.text.find(stop, max(0, seen - self._longest)) for stop in self._stop)
        at = min((place for place in found if place >= 0), default=-1)
        if at >= 0:
            self.text, self.stopped = self.text[:at], True
        return self.stopped

    def take(self, last: bool = False) -> str:
        """Return what is new since the last call; with `last` also what was held back."""
        if last and not self.stopped:
            self.text = self._settled + self._new()
        end = len(self.text)
        if not (last or self.stopped):
            end -= self._may_stop()
        new, self._given = self.text[self._given : end], max(self._given, end)
        return new

    def _new(self) -> str:
        """Text behind what is settled. A tokenizer may join a token to the one before it, so both are decoded."""
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _may_stop(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        for length in range(min(len(self.text), self._longest - 1), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
