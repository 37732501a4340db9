"""Marked groups read back to text, with an eye on what no encoder writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from tokenary.core.errors import InputError
from tokenary.tokenize.triadic_suffix.scheme import DIGITS, PLANE, Group, Scheme, level_of, suffix_name


class Fault(NamedTuple):
    """A numeral that no encoder writes: where its valid prefix ends in the decoded text, and what is wrong."""

    at: int
    reason: str


class Decoded(NamedTuple):
    """A decoded text and the numerals in it that were cut short."""

    text: str
    faults: tuple[Fault, ...]


def unmark(scheme: Scheme, marked: str, strict: bool = True) -> Decoded:
    """Read marked text back.

    Parameters
    ----------
    scheme : Scheme
        Of the groups.
    marked : str
        What `Scheme.mark` writes, or a model wrote.
    strict : bool
        Whether a numeral with a gap, a repeated or rising suffix, a short group in the middle, a fraction before its
        point or a missing unit group raises; else its longest valid prefix is kept and flagged.

    Raises
    ------
    InputError
        Such a numeral, if strict.
    """
    parts: list[str] = []
    faults: list[Fault] = []
    length = 0
    for part, reason in _read(scheme, marked):
        parts.append(part)
        length += len(part)
        if reason and strict:
            raise InputError(f"no number: {reason}")
        if reason:
            faults.append(Fault(length, reason))
    return Decoded("".join(parts), tuple(faults))


@cache
def _pattern(variant: str) -> re.Pattern[str]:
    """Digits and their mark; a unit group of the marker variant is digits alone, and group 3 a marker without any."""
    marks = f"[{chr(PLANE)}-{chr(PLANE + 127)}]"
    digits = "(?<![0-9])([0-9]*+)"  # from the start of a run of digits, or a long one would be read again and again
    return re.compile(f"{digits}({marks})" if variant == "compound" else f"{digits}(?:{DIGITS}({marks})?|({marks}))")


def _read(scheme: Scheme, marked: str) -> Iterator[tuple[str, str]]:
    """Yield numerals and what lies between, each with what is wrong behind it, if anything."""
    numeral, end = _Numeral(scheme), 0
    for found in _pattern(scheme.variant).finditer(marked):
        between = marked[end : found.start()]
        comma = between == "," and numeral.takes_separator
        if between and not comma:
            yield numeral.finished()
            yield between, ""
            numeral = _Numeral(scheme)
        if scheme.variant == "marker" and found[3]:
            numeral.reject(f"a marker {suffix_name(level_of(found[3]))} without digits")
        numeral.add(Group(found[1], level_of(found[2]) if found[2] else 0), comma)
        end = found.end()
    yield numeral.finished()
    yield marked[end:], ""


class _Numeral:
    """A numeral under way: its groups as long as they are valid."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.groups: list[Group] = []
        self.parts: list[str] = []
        self.fault = ""

    @property
    def takes_separator(self) -> bool:
        """Whether a comma may follow as a part of the numeral."""
        padded = self.scheme.form == "paper"
        return bool(self.groups) and self.groups[-1].level > 0 and self.scheme.separators and not padded

    def reject(self, reason: str) -> None:
        """End the valid prefix here."""
        self.fault = self.fault or reason

    def add(self, group: Group, comma: bool) -> None:
        """Take one more group."""
        self.reject(self._wrong(group))
        if not self.fault:
            self.groups.append(group)
            self.parts.append("," * comma + "." * (group.level == -1) + group.digits)

    def _wrong(self, group: Group) -> str:
        """Say why a group may not come next, or nothing."""
        (digits, level), size = group, self.scheme.group
        name, last = suffix_name(level), self.groups[-1] if self.groups else None
        if last and level >= 0 and last.level <= 0:
            return f"suffix {name!r} after {suffix_name(last.level)!r}"
        if level not in self.scheme.levels:
            return f"no such level as {name}"
        shortest = size if self.scheme.form == "paper" or (last and level >= 0) else 1
        if not shortest <= len(digits) <= size:
            return f"a group of {len(digits)} digits at {name!r}"
        if last and last.level < 0 and len(last.digits) < size:
            return f"a short group {last.digits!r} in the middle"
        if last and level != last.level - 1:
            return f"suffix {name!r} after {suffix_name(last.level)!r}"
        if not last and level < 0 and (level < -1 or self.scheme.form == "paper"):
            return f"a fraction begins with {name}"
        return ""

    def finished(self) -> tuple[str, str]:
        """Return the text of the valid prefix, and what is wrong behind it."""
        if self.groups and self.groups[-1].level > 0:
            self.reject(f"ends at {suffix_name(self.groups[-1].level)} without its unit group")
        parts = self.parts
        if self.scheme.form == "paper" and parts:  # the zeros of the padding are lost
            if self.groups[0].level >= 0:
                parts[0] = parts[0].lstrip("0") or "0"
            if self.groups[-1].level < 0:
                digits = self.groups[-1].digits
                parts[-1] = parts[-1].removesuffix(digits) + digits[0] + digits[1:].rstrip("0")
        return "".join(parts), self.fault
