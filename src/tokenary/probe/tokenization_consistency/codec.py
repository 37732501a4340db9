"""The tokenizer of a model, counted in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import rust_tokenizer
from tokenary.models.lm import LM
from tokenary.probe.tokenization_consistency.alignment import Text
from tokenary.probe.tokenization_consistency.masking import Completions


class Codec:
    """The tokenizer of a model, counted in bytes.

    Attributes
    ----------
    vocabulary : Vocabulary
        Bytes of every token.
    """

    def __init__(self, lm: LM) -> None:
        assert lm.tokenizer is not None
        self._tokenizer = rust_tokenizer(lm.tokenizer)
        self.vocabulary = Vocabulary(self._tokenizer)

    @cached_property
    def completions(self) -> Completions:
        """The tokens that complete a word."""
        return Completions(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Encode a text without special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> Text:
        """Return ids as a text."""
        return Text(ids, self.vocabulary.spellings)

    def own(self, text: str) -> Text:
        """Encode a text as it stands inside a longer one, where a tokenizer puts no word start before it."""
        data, found = text.encode(), self.text(self.encode(text))
        if found.data != data:
            inner = self.text(self.encode("\n" + text))
            count = inner.cut(len(inner.data) - len(data))
            if count is not None and inner.data.endswith(b"\n" + data):
                return self.text(inner.ids[count:])
        return found

    def ids(self, pieces: Sequence[bytes]) -> list[int]:
        """Return the ids of tokens given by their bytes."""
        return [self.vocabulary.id_of[piece] for piece in pieces]


def splice(text: Text, start: int, stop: int, ids: Sequence[int]) -> list[int] | None:
    """Return the ids with others in the place of some bytes; None where those do not begin and end with tokens."""
    first, last = text.cut(start), text.cut(stop)
    return None if first is None or last is None else [*text.ids[:first], *ids, *text.ids[last:]]
