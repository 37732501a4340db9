"""Which numerals a text holds, and how they split into groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from tokenary.core.errors import InputError

#: Marks stand behind the digits of a group. Characters of the last private plane, which no text that is written uses.
PLANE = 0x10FE00
DIGITS, BEGIN, POINT = (chr(PLANE + 128 + i) for i in range(3))

Form = Literal["lossless", "paper"]
Variant = Literal["compound", "marker"]


class Group(NamedTuple):
    """Digits and the power of ``10 ** group`` of the last of them; below 0 in the fraction."""

    digits: str
    level: int


class Piece(NamedTuple):
    """A stretch of a text: a group of a numeral, or what lies between (``level`` None)."""

    text: str
    level: int | None
    start: int
    end: int


def mark_of(level: int) -> str:
    """Return the character that marks a level in text: one a level, whatever the number of levels."""
    return chr(PLANE + (level if level >= 0 else 63 - level))


def level_of(mark: str) -> int:
    """Return the level of a mark; the inverse of `mark_of`."""
    offset = ord(mark) - PLANE
    return offset if offset < 64 else 63 - offset


def suffix_name(level: int) -> str:
    """Return a level's suffix as the paper writes it: k, m, b, t, q (then q2, q3, ...), and p, pp, ..."""
    if level < 0:
        return "p" * -level
    return ["", "k", "m", "b", "t", "q"][level] if level < 6 else f"q{level - 4}"


@dataclass(frozen=True)
class Scheme:
    """The rules of grouping; see `TriadicSuffix` for the fields."""

    form: Form = "lossless"
    variant: Variant = "compound"
    group: int = 3
    integer_groups: int = 6
    fraction_groups: int = 5
    separators: bool = True
    identifiers: bool = False

    # ------------------------------------------------------------------ numerals

    @property
    def body(self) -> str:
        """Pattern of the digits, separators and point of a numeral that fits the levels."""
        most = self.group * self.integer_groups
        fraction = rf"\.[0-9]{{1,{self.group * self.fraction_groups}}}"
        integers = [rf"[0-9]{{1,{most}}}"]
        # A separator stands every three digits, so it must fall between two groups.
        if self.separators and self.group in (1, 3) and most >= 6:
            integers.insert(0, rf"[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,{(most - 3) // 3}}}")
        return rf"(?:(?:{'|'.join(integers)})(?:{fraction})?|{fraction})"

    @property
    def before(self) -> str:
        """What must not stand before a numeral: a name, a version or address, a date or time, a list of separators."""
        name = r"(?<![0-9.])" if self.identifiers else r"(?<![\w.])"
        comma = r"(?<![0-9],)" if self.separators else ""
        third = "".join(rf"(?<![0-9][-/:][0-9]{{{n}}}[-/:])" for n in range(1, 5))
        return rf"{name}{comma}{third}(?!(?<=[0-9][-/:])[0-9]+[-/:][0-9])(?![0-9]+([-/:])[0-9]+\1[0-9])"

    @property
    def after(self) -> str:
        """What must not stand behind a numeral."""
        return (r"(?![0-9])" if self.identifiers else r"(?!\w)") + r"(?!\.[0-9])" + r"(?!,[0-9])" * self.separators

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{self.before}({self.body})(?:[eE][+-]?([0-9]{{1,{self.group}}}))?{self.after}")

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of every numeral of a text; mantissa and exponent are two."""
        for found in self._pattern.finditer(text):
            yield found.span(2)
            if found.group(3) is not None:
                yield found.span(3)

    # ------------------------------------------------------------------ groups

    def split(self, number: str) -> list[Group]:
        """Split one numeral into its groups, most significant first.

        Parameters
        ----------
        number : str
            Digits with an optional point; thousands separators are left out, as `segment` keeps them in its pieces.

        Raises
        ------
        InputError
            Not a numeral, or one with more digits than there are levels for.
        """
        if not re.fullmatch(self.body, number, re.ASCII):
            raise InputError(
                f"{number!r} is no numeral of at most {self.integer_groups} + {self.fraction_groups} groups"
            )
        return [Group(piece.text, piece.level) for piece in self._split(number, 0) if piece.level is not None]

    def _split(self, number: str, offset: int) -> Iterator[Piece]:
        """Yield groups, and the separators between them, with their places in the text."""
        size = self.group
        integer, point, fraction = number.partition(".")
        plain = integer.replace(",", "")
        at, first = offset, len(plain) % size or size
        if not plain and self.form == "paper":
            yield Piece("0" * size, 0, offset, offset)
        taken = 0
        while taken < len(plain):
            width = first if taken == 0 else size
            if number[at - offset] == ",":
                if self.form == "lossless":
                    yield Piece(",", None, at, at + 1)
                at += 1
            digits, taken = plain[taken : taken + width], taken + width
            shown = digits.rjust(size, "0") if self.form == "paper" else digits
            yield Piece(shown, (len(plain) - taken) // size, at, at + width)
            at += width
        at += len(point)
        for level, start in enumerate(range(0, len(fraction), size), start=1):
            digits = fraction[start : start + size]
            shown = digits.ljust(size, "0") if self.form == "paper" else digits
            yield Piece(shown, -level, at + start, at + start + len(digits))

    def segment(self, text: str) -> Iterator[Piece]:
        """Yield a text as pieces with offsets, in order; the point of a fraction belongs to no piece."""
        end = 0
        for start, stop in self.find(text):
            if start > end:
                yield Piece(text[end:start], None, end, start)
            yield from self._split(text[start:stop], start)
            end = stop
        if end < len(text):
            yield Piece(text[end:], None, end, len(text))

    def mark(self, text: str) -> str:
        """Return the text with every numeral written as marked groups, which the added tokens match.

        Raises
        ------
        InputError
            The text holds a mark already.
        """
        if stray := re.search(f"[{chr(PLANE)}-{POINT}]", text):
            raise InputError(f"the text holds U+{ord(stray[0]):X}, which marks groups")
        return "".join(p.text if p.level is None else self.token(p.text, p.level) for p in self.segment(text))

    def token(self, digits: str, level: int) -> str:
        """Return the text of a group with its mark."""
        if self.variant == "compound":
            return digits + mark_of(level)
        return digits + DIGITS + (mark_of(level) if level else "")

    # ------------------------------------------------------------------ the vocabulary

    @property
    def levels(self) -> range:
        """Every level, the highest first."""
        return range(self.integer_groups - 1, -self.fraction_groups - 1, -1)

    def digit_strings(self) -> list[str]:
        """Return the digits that a group may hold: all of full length, and shorter ones in the lossless form."""
        widths = range(1 if self.form == "lossless" else self.group, self.group + 1)
        return [f"{value:0{width}}" for width in widths for value in range(10**width)]

    def vocabulary(self) -> dict[str, tuple[str, int | None]]:
        """Map the text of every token to its digits (none for a marker) and its level (None for plain digits)."""
        strings = self.digit_strings()
        if self.variant == "compound":
            return {digits + mark_of(level): (digits, level) for level in self.levels for digits in strings}
        plain: dict[str, tuple[str, int | None]] = {digits + DIGITS: (digits, None) for digits in strings}
        return plain | {mark_of(level): ("", level) for level in self.levels if level}
