"""Which neighbouring tokens may become one."""

from __future__ import annotations

import unicodedata
from typing import Literal

from tokenary.tokenize.base import TextTokenizer

Boundary = Literal["pretokens", "word", "word-hyphen", "sentence"]

LONGEST = 1024  # bytes of a merged token: keeps text without any boundary at linear time
KEPT = 1 << 17  # answers that are remembered

#: What a token is to its neighbours: never merged; text with more than white space; text that begins with white space.
NEVER, SOLID, SPACED = 1, 2, 4


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
        self._known: dict[tuple[bytes, bytes], bool] = {}
        self._bytes: dict[int, bytes] = dict.fromkeys(tokenizer.special_ids, b"")
        if tokenizer.unk_id is not None:
            self._bytes[tokenizer.unk_id] = b""

    def bytes_of(self, id: int) -> bytes:
        """Return the bytes of a token; none for one that never merges."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self.tokenizer.token_bytes(id) if id < self.tokenizer.id_limit else b""
        return found

    def kind(self, data: bytes) -> int:
        """Return `NEVER`, `SOLID` and `SPACED` of a token, added up: enough to refuse most pairs unasked."""
        if not data:
            return NEVER
        text = _decoded(data)
        if self.boundary == "sentence" or text is None:
            return 0
        return SOLID * (not text.isspace()) + SPACED * text[0].isspace()

    def allows(self, left: bytes, right: bytes) -> bool:
        """Whether two neighbours may merge; both merge with something."""
        if len(left) + len(right) > LONGEST:
            return False
        if self.boundary == "sentence":
            return True
        key = (left, right)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            found = self._known[key] = self._allows(left, right)
        return found

    def _allows(self, left: bytes, right: bytes) -> bool:
        text = _decoded(left + right)
        if text is None:
            return True  # parts of a character
        if text.isspace():
            return text.count("\n") < 2
        if any(map(str.isspace, text[1:])):
            return False
        if self.boundary == "pretokens":
            splitter = self.tokenizer.tokenizer.pre_tokenizer
            return splitter is None or len(splitter.pre_tokenize_str(text)) == 1
        if self.boundary == "word-hyphen" and _punctuation(right) and not _punctuation(left):
            return right.decode(errors="replace").strip() in ("-", "‐", "‑")
        return True  # one word, as white space stands only in front


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _punctuation(data: bytes) -> bool:
    text = data.decode(errors="replace").strip()
    return bool(text) and all(unicodedata.category(char)[0] in "PS" for char in text)
