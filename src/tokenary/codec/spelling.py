"""Bytes to token ids and back without loss, and which bytes of a file are text.

The ids of a text spell its bytes exactly, or it is not coded as tokens. Decoding joins the tokens' own bytes, so that
no rule of a tokenizer's decoder (spaces, special tokens) can get in the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenary.core.errors import UnsupportedModelError
from tokenary.hf.tokenizer import Vocabulary
from tokenary.models.lm import LM

#: One character of text in UTF-8: printable, or tab, line feed, carriage return.
_CHARACTER = (
    rb"[\t\n\r\x20-\x7e]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2}"
)
_TEXT = re.compile(rb"(?:" + _CHARACTER + rb")+")
_LEAST, _GAP = 64, 8


def _text_without(missing: frozenset[int]) -> re.Pattern[bytes]:
    """Return the pattern of text whose characters hold none of these bytes."""
    if not missing:
        return _TEXT
    these = b"[" + b"".join(b"\\x%02x" % byte for byte in sorted(missing)) + b"]"
    return re.compile(rb"(?:(?!" + these + rb"|[\xc0-\xff][\x80-\xbf]{0,2}" + these + rb")(?:" + _CHARACTER + rb"))+")


def text_bytes(data: bytes) -> int:
    """Count the bytes that stand in runs of text long enough to be coded as such."""
    lengths = (found.end() - found.start() for found in _TEXT.finditer(data))
    return sum(length for length in lengths if length >= _LEAST)


@dataclass(frozen=True)
class Segment:
    """A piece of a file.

    Attributes
    ----------
    text : bool
        Whether it is coded as tokens.
    data : bytes
        Its bytes.
    tokens : list of int
        What spells them; empty unless `text`.
    """

    text: bool
    data: bytes
    tokens: list[int]


class Spelling:
    """The tokens of a byte-level vocabulary and their bytes.

    Attributes
    ----------
    spellings : list of bytes
        What each id stands for; special tokens stand for their names.
    missing : frozenset of int
        Bytes that no token of one byte stands for; SmolLM2 lacks 21 of the 256.

    Raises
    ------
    UnsupportedModelError
        A model without tokenizer, or one that is not byte-level.
    """

    def __init__(self, lm: LM) -> None:
        backend: Any = getattr(lm.tokenizer, "backend_tokenizer", None)
        vocabulary = None if backend is None else Vocabulary(backend)
        if vocabulary is None or not vocabulary.byte_level:
            raise UnsupportedModelError(f"{lm.name}: compression needs a byte-level tokenizer")
        self._tokenizer = backend
        names = {i: name.encode() for i, name in vocabulary.special.items()}
        self.spellings = [names.get(i, data) for i, data in enumerate(vocabulary.spellings)]
        self._single = {data[0]: i for i, data in enumerate(self.spellings) if len(data) == 1}
        self.missing = frozenset(range(256)) - set(self._single)
        self._text = _text_without(self.missing)
        self._size = min(len(self.spellings), lm.vocab_size)

    def encode(self, data: bytes) -> list[int] | None:
        """Return ids that spell `data`, or None where there are none; bytes that are not UTF-8 stand alone."""
        ids: list[int] = []
        at = 0
        for found in _TEXT.finditer(data):
            alone = self._bytes(data[at : found.start()])
            if alone is None:
                return None
            ids += alone + self._tokenizer.encode(found.group().decode(), add_special_tokens=False).ids
            at = found.end()
        alone = self._bytes(data[at:])
        if alone is None:
            return None
        ids += alone
        return ids if max(ids, default=0) < self._size and self.decode(ids) == data else None

    def decode(self, ids: Sequence[int]) -> bytes:
        """Join the bytes of tokens."""
        return b"".join(self.spellings[i] for i in ids)

    def _bytes(self, data: bytes) -> list[int] | None:
        return None if self.missing.intersection(data) else [self._single[byte] for byte in data]

    def segments(self, data: bytes) -> list[Segment]:
        """Cut data into text and binary pieces by turns; joined they are `data`.

        Text is what reads as UTF-8 without control characters over 64 bytes or more. Gaps of up to 8 bytes are taken
        in where tokens can spell them; text that tokens cannot spell is binary.
        """
        made: list[Segment] = []
        at = 0
        for start, end in self._runs(data):
            tokens = self.encode(data[start:end])
            if tokens is None:
                continue
            if start > at:
                made.append(Segment(False, data[at:start], []))
            made.append(Segment(True, data[start:end], tokens))
            at = end
        if at < len(data):
            made.append(Segment(False, data[at:], []))
        return made

    def _runs(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Spans of text: neighbours with a short gap between them are one, then short ones are dropped."""
        start = end = -1
        for found in self._text.finditer(data):
            if start >= 0 and found.start() - end <= _GAP and not self.missing.intersection(data[end : found.end()]):
                end = found.end()
                continue
            if end - start >= _LEAST:
                yield start, end
            start, end = found.span()
        if start >= 0 and end - start >= _LEAST:
            yield start, end
