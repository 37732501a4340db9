"""Errors that reach a user: one clear line each, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenaryError(Exception):
    """Base of every error that Tokenary raises on purpose; its text is one line for the user."""


class OptionError(TokenaryError):
    """An option has a value outside its range.

    Parameters
    ----------
    option : str
        Name of the option, as the user wrote it.
    value : object
        The refused value.
    expected : str
        What would have been accepted.
    """

    def __init__(self, option: str, value: object, expected: str):
        super().__init__(f"option {option}={value!r}: expected {expected}")
        self.option, self.value, self.expected = option, value, expected


class UnknownNameError(TokenaryError):
    """A method, model, option or data set of that name does not exist; names the nearest ones.

    Parameters
    ----------
    kind : str
        What was looked for: ``"method"``, ``"model"``, ...
    name : str
        The unknown name.
    known : iterable of str
        All names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known[:12])}"
        super().__init__(f"unknown {kind} {name!r}{hint if known else ''}")
        self.kind, self.name, self.near = kind, name, near


class RecipeError(TokenaryError):
    """A recipe cannot be parsed, or its methods do not compose; the text says why."""


class UnsupportedModelError(TokenaryError):
    """A model lacks what a method needs (no cache, no RoPE, encoder only, ...)."""


class InputError(TokenaryError):
    """What the user handed in cannot be used: an empty prompt, a prompt past the context, a bad file."""


class FetchError(TokenaryError):
    """A download failed, broke off, or did not match its checksum."""
