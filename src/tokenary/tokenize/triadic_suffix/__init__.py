"""Triadic Suffix Tokenization (2026, arXiv 2604.11582): numbers as groups of three digits that say their magnitude.

The integer part is grouped from the right, the fraction from the left; the token of a group holds its digits *and* its
power of a thousand, so that the same digits at the same magnitude are always the same token::

    1234567.89   ->   1m 234k 567 89p          1m = (1, 10**6), 89p = (89, 10**-3), the point is where p begins

``variant=compound`` adds a token for every (digits, magnitude): 11 levels of a thousand groups, the unit level being
plain triads. ``variant=marker`` adds the triads, and a marker for each of the ten other levels, written behind its
group.

``form=paper`` pads groups to three digits (``001m ... 890p``): the value survives, the text does not (0.1 and 0.10
are one). ``form=lossless``, our default, has tokens for short groups at both ends, and keeps thousands separators, so
that every text comes back as it was. The paper reports no experiment; the first rows of the added tokens (the mean of
their digits and a vector that a level shares), strict decoding and the rules for a tokenizer.json are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field
from tokenizers import Encoding, Tokenizer

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.method import Method
from tokenary.core.token_map import TokenMap
from tokenary.tokenize.backend import backend
from tokenary.tokenize.triadic_suffix.install import extend_model, extend_tokenizer, without_restoring
from tokenary.tokenize.triadic_suffix.reading import Decoded, Fault, unmark
from tokenary.tokenize.triadic_suffix.scheme import Form, Group, Piece, Scheme, Variant, suffix_name

__all__ = ["Decoded", "Fault", "Group", "Piece", "Scheme", "TriadicSuffix", "TriadicTokenizer", "suffix_name", "unmark"]

CARD = Card(
    slug="triadic-suffix",
    cls="TriadicSuffix",
    room="tokenize",
    slot="numbers",
    title="A Triadic Suffix Tokenization Scheme for Numerical Reasoning",
    summary="writes every number as three-digit groups that carry their magnitude, in an existing tokenizer and model",
    paper="2604.11582",
    year=2026,
    lossless=True,
    training="minutes",
)


class TriadicSuffix(Method):
    """Groups the numerals of a text, and teaches a tokenizer and a model the groups.

    A numeral is a run of digits with an optional point; a sign and the ``e`` of an exponent stay outside, the exponent
    is a numeral of its own. Names, versions, addresses, dates and times are left as they are, and so is the whole of a
    numeral with more digits than there are levels for.

    Parameters
    ----------
    form : {"lossless", "paper"}
        Whether short groups keep their digits, or are padded with zeros.
    variant : {"compound", "marker"}
        A token for digits and magnitude together, or one for each.
    group : int
        Digits of a group; the paper's name says three, and it supposes that one suits very small models.
    integer_groups, fraction_groups : int
        Levels before and behind the point. More than the paper's 6 and 5 extend the series (q2, q3, ...; pppppp).
    separators : bool
        Read ``1,234,567`` as one number where its groups are well formed; then digits around any other comma are left
        alone. Without it a comma ends a number, as in tables and code.
    identifiers : bool
        Also group digits inside words: ``abc123``, ``5km``.
    """

    def __init__(
        self,
        form: Form = "lossless",
        variant: Variant = "compound",
        group: Annotated[int, Field(ge=1, le=4)] = 3,
        integer_groups: Annotated[int, Field(ge=1, le=32)] = 6,
        fraction_groups: Annotated[int, Field(ge=1, le=32)] = 5,
        separators: bool = True,
        identifiers: bool = False,
    ) -> None:
        if group == 4 and variant == "compound" and integer_groups + fraction_groups > 11:
            raise OptionError("group", group, "at most 3 with so many levels: each of them takes 11,110 tokens")
        self.scheme = Scheme(form, variant, group, integer_groups, fraction_groups, separators, identifiers)

    def split(self, number: str) -> list[Group]:
        """Split one numeral into groups, most significant first; `InputError` where it is none or too long."""
        return self.scheme.split(number)

    def segment(self, text: str) -> list[Piece]:
        """Split a text into groups and what lies between, with offsets."""
        return list(self.scheme.segment(text))

    def mark(self, text: str) -> str:
        """Write every numeral as marked groups: the text pre-processor for a tokenizer with the added tokens."""
        return self.scheme.mark(text)

    def unmark(self, marked: str, strict: bool = True) -> Decoded:
        """Read marked text back; a numeral that no encoder writes raises, or is cut short and flagged."""
        return unmark(self.scheme, marked, strict)

    def show(self, text: str) -> str:
        """Write a text with visible suffixes, for people: ``1m 234k 567 89p``."""
        shown = [(p.text if p.level is None else p.text + suffix_name(p.level), p.level) for p in self.segment(text)]
        return "".join(t + " " * (level is not None) for t, level in shown).rstrip()

    def extend(self, tokenizer: Any, rules: bool = True) -> TriadicTokenizer:
        """Return an extended copy of a tokenizer.

        Parameters
        ----------
        tokenizer : Tokenizer or transformers tokenizer
            Any that has a ``tokenizer.json``.
        rules : bool
            Whether the new ``tokenizer.json`` finds numerals itself, so that it works in any program; without rules
            texts are marked here, which is faster.

        Raises
        ------
        UnsupportedModelError
            The normalizer changes added tokens, or texts with numerals would not come back; see `extend_tokenizer`.
        """
        return TriadicTokenizer(self.scheme, backend(tokenizer), extend_tokenizer(tokenizer, self.scheme, rules), rules)


class TriadicTokenizer:
    """A tokenizer with the groups of a scheme.

    Attributes
    ----------
    scheme : Scheme
        Of the groups.
    base, tokenizer : Tokenizer
        Before and after; ``tokenizer.save(path)`` writes the ``tokenizer.json``.
    rules : bool
        Whether `tokenizer` marks numerals itself.
    """

    def __init__(self, scheme: Scheme, base: Tokenizer, tokenizer: Tokenizer, rules: bool) -> None:
        self.scheme, self.base, self.tokenizer, self.rules = scheme, base, tokenizer, rules

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Encode a text; offsets are those of the text as it was given only where ``rules`` is true."""
        marked = text if self.rules else self.scheme.mark(text)
        return self.tokenizer.encode(marked, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Encoding]:
        """Encode texts in parallel."""
        marked = list(texts) if self.rules else [self.scheme.mark(text) for text in texts]
        return self.tokenizer.encode_batch(marked, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], strict: bool = True) -> Decoded:
        """Decode ids.

        Parameters
        ----------
        ids : sequence of int
            What `encode` or a model wrote.
        strict : bool
            Whether a numeral that no encoder writes raises; else it is cut short and flagged. The decoder of
            the ``tokenizer.json`` looks for no faults: it writes all digits.

        Raises
        ------
        InputError
            Such a numeral, if strict.
        """
        return unmark(self.scheme, self._raw.decode(list(ids), skip_special_tokens=False), strict)

    @cached_property
    def _raw(self) -> Tokenizer:
        return without_restoring(self.tokenizer, self.scheme)

    def for_transformers(self, like: Any = None) -> Any:
        """Return a transformers tokenizer: special tokens, chat template and context length are those of ``like``."""
        from transformers import PreTrainedTokenizerFast

        if like is None:
            return PreTrainedTokenizerFast(tokenizer_object=self.tokenizer)
        return PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer,
            chat_template=like.chat_template,
            model_max_length=like.model_max_length,
            padding_side=like.padding_side,
            **like.special_tokens_map,
        )

    def extend_model(self, model: Any, seed: int = 0, scale: float = 0.1) -> TokenMap:
        """Give a model rows for the groups, in place; see `install.extend_model`."""
        return extend_model(model, self.base, self.tokenizer, self.scheme, seed, scale)
