"""Which neighbouring tokens may become one."""

from __future__ import annotations

import unicodedata
from typing import Literal

import numba

from tokenary.tokenize.base import TextTokenizer

Boundary = Literal["pretokens", "word", "word-hyphen", "sentence"]

LONGEST = 1024  # bytes of a merged token: keeps text without any boundary at linear time
KEPT = 1 << 18  # answers that are remembered

#: What a token is to its neighbours: never merged; text with more than white space, that begins with white space, with
#: white space farther in; bytes that end inside a character, that begin inside one; and what only the rules know.
NEVER, SOLID, SPACED, INNER, OPEN, TAIL, UNKNOWN = 1, 2, 4, 8, 16, 32, 64


class PairRules:
    """Says which neighbours may become one token; answers are kept, since the same pairs are asked for again and again.

    Special tokens never merge. White space stands only in front of a merged token, except that runs of it may merge, of
    which two newlines are none. Bytes that are no whole characters may always merge. No merged token grows past 1,024
    bytes; the paper states no such limit.

    Parameters
    ----------
    tokenizer : TextTokenizer
        Of the tokens.
    boundary : {"pretokens", "word", "word-hyphen", "sentence"}
        What a merged token may not reach beyond: a piece of the tokenizer's own pre-tokenizer; a word between white
        space; a word without the punctuation behind it, hyphens aside; nothing, white space neither.
    """

    def __init__(self, tokenizer: TextTokenizer, boundary: Boundary = "pretokens") -> None:
        self.tokenizer, self.boundary = tokenizer, boundary
        self._splitter = tokenizer.tokenizer.pre_tokenizer
        self._known: dict[bytes, int] = {}
        self._bytes: dict[int, bytes] = dict.fromkeys(tokenizer.special_ids, b"")
        if tokenizer.unk_id is not None:
            self._bytes[tokenizer.unk_id] = b""

    def bytes_of(self, id: int) -> bytes:
        """Return the bytes of a token; none for one that never merges."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self.tokenizer.token_bytes(id)
        return found

    def kind(self, data: bytes) -> int:
        """Return what a token is to its neighbours, added up: enough to answer for most pairs unasked, see `joined`."""
        if not data:
            return NEVER
        if self.boundary == "sentence":
            return 0
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            return OPEN * (error.reason == "unexpected end of data") + TAIL * (data[0] & 0xC0 == 0x80)
        return SOLID * (not text.isspace()) + SPACED * text[0].isspace() + INNER * any(map(str.isspace, text[1:]))

    @property
    def asks(self) -> bool:
        """Whether the white space of two texts is not enough to say if they may merge."""
        return self.boundary == "word-hyphen" or (self.boundary == "pretokens" and self._splitter is not None)

    def allows(self, left: bytes, right: bytes) -> bool:
        """Whether two neighbours may merge; both merge with something."""
        return self.join(left, right) != NEVER

    def join(self, left: bytes, right: bytes) -> int:
        """Return the kind of two neighbours as one, `NEVER` where they may not merge; both merge with something."""
        data = left + right
        found = self._known.get(data)
        if found is None:
            found = self.kind(data) if self._allows(left, right) else NEVER
            if self.boundary != "word-hyphen":  # there it matters where the border is
                if len(self._known) >= KEPT:
                    self._known.clear()
                self._known[data] = found
        return found

    def _allows(self, left: bytes, right: bytes) -> bool:
        if len(left) + len(right) > LONGEST:
            return False
        if self.boundary == "sentence":
            return True
        text = _decoded(left + right)
        if text is None:
            return True  # parts of a character
        if text.isspace():
            return text.count("\n") < 2
        if any(map(str.isspace, text[1:])):
            return False
        if self.boundary == "pretokens":
            return self._splitter is None or len(self._splitter.pre_tokenize_str(text)) == 1
        if self.boundary == "word-hyphen" and _punctuation(right) and not _punctuation(left):
            return right.decode(errors="replace").strip() in ("-", "‐", "‑")
        return True  # one word, as white space stands only in front


@numba.njit(cache=True)
def joined(left: int, right: int, asks: bool) -> int:
    """Say of kinds what `PairRules.join` says of bytes, or `UNKNOWN`, where they are not enough.

    Bytes that are no whole characters stay so whatever is joined to them, unless the left ones end and the right ones
    begin inside a character.
    """
    if (left | right) & NEVER:
        return NEVER
    text = SOLID | SPACED
    if left & text and right & text:
        if not (left | right) & SOLID:
            return UNKNOWN  # white space only
        if right & SPACED or (left | right) & INNER:
            return NEVER
        return UNKNOWN if asks else SOLID | (left & SPACED)
    if left & OPEN and right & TAIL:
        return UNKNOWN
    return left & TAIL | (right & OPEN if left & text else 0)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _punctuation(data: bytes) -> bool:
    text = data.decode(errors="replace").strip()
    return bool(text) and all(unicodedata.category(char)[0] in "PS" for char in text)
