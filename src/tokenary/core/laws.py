"""Runs a room's laws on a method: what every method of the room must keep, whatever it does inside.

A room states its laws in ``tokenary.<room>.laws.LAWS``: for each slot a tuple of functions ``law(make)``. ``make()``
constructs the method afresh with the options under test, ``make(keep="100%")`` with others beside them. A law returns
where it holds, raises `LawBroken` with a counterexample where it does not, and `NotApplicable` where it says nothing.
Its docstring is its statement. Laws run on toy nets, in seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenary.core.errors import TokenaryError, UnknownNameError
from tokenary.core.recipe import Recipe, Step
from tokenary.core.registry import card, method_class

if TYPE_CHECKING:
    from tokenary.core.method import Method

Make = Callable[..., Any]  # returns the method; a law knows the protocol of its room
LawFunction = Callable[[Make], None]


class LawBroken(Exception):
    """A method breaks a law; the text is the counterexample."""


class NotApplicable(Exception):
    """A law says nothing about this method or these options; the text is why."""


@dataclass(frozen=True)
class Finding:
    """What one law said.

    Parameters
    ----------
    law : str
        Name of the law.
    statement : str
        What it demands, in one line.
    verdict : {"holds", "broken", "skipped"}
        ``skipped`` where it does not apply.
    detail : str
        The counterexample, or why it does not apply.
    seconds : float
        How long it took.
    """

    law: str
    statement: str
    verdict: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class LawReport:
    """What all laws of a room said of one method.

    Parameters
    ----------
    slug : str
        The method.
    options : mapping
        The options it was constructed with, as they were given.
    findings : tuple of Finding
        One a law.
    """

    slug: str
    options: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no law is broken."""
        return not self.broken

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The laws that are broken."""
        return tuple(finding for finding in self.findings if finding.verdict == "broken")

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        options = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in self.options.items()
        }
        return {"slug": self.slug, "options": options, "ok": self.ok, "findings": [asdict(f) for f in self.findings]}

    def __str__(self) -> str:
        """Return one line a law."""
        lines = [f"{self.slug}: {'every law holds' if self.ok else f'{len(self.broken)} laws are broken'}"]
        for finding in self.findings:
            lines.append(f"  {finding.verdict:8}{finding.law}" + (f": {finding.detail}" if finding.detail else ""))
        return "\n".join(lines)


def laws_of(slug: str) -> tuple[LawFunction, ...]:
    """Return the laws that bind a method: those of its slot in its room.

    Raises
    ------
    TokenaryError
        If its room states none for its slot.
    """
    found = card(slug)
    name = f"tokenary.{found.room}.laws"
    stated = importlib.import_module(name).LAWS if importlib.util.find_spec(name) else {}
    if found.slot not in stated:
        raise TokenaryError(f"{slug}: the room {found.room} states no laws for the slot {found.slot!r} yet")
    return stated[found.slot]


def check(slug: str, **options: Any) -> LawReport:
    """Hold a method to the laws of its room.

    Parameters
    ----------
    slug : str
        The method.
    **options
        Of the method.

    Raises
    ------
    UnknownNameError, OptionError
        If there is no such method or option, or a value is out of range.
    """
    return check_class(method_class(slug), laws_of(slug), **options)


def check_class(method: type[Method], laws: tuple[LawFunction, ...], **options: Any) -> LawReport:
    """Hold any class to any laws; see `check`."""

    def make(**more: Any) -> Method:
        return method(**{**options, **more})

    make()  # a wrong option is the user's error, not a broken law
    return LawReport(method.card_of().slug, options, tuple(_apply(law, make) for law in laws))


def _apply(law: LawFunction, make: Make) -> Finding:
    verdict, detail, began = "holds", "", time.perf_counter()
    try:
        law(make)
    except NotApplicable as why:
        verdict, detail = "skipped", str(why)
    except LawBroken as counterexample:
        verdict, detail = "broken", str(counterexample)
    except Exception as error:  # a method that crashes keeps no law
        verdict, detail = "broken", f"{type(error).__name__}: {' '.join(str(error).split())}"
    statement = (inspect.getdoc(law) or "").partition("\n")[0]
    return Finding(law.__name__.replace("_", " "), statement, verdict, detail, time.perf_counter() - began)


def require(condition: object, counterexample: str) -> None:
    """Raise `LawBroken` with the counterexample unless the condition is true."""
    if not condition:
        raise LawBroken(counterexample)


def same_tokens(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], what: str) -> None:
    """Raise `LawBroken` unless the tokens are equal; name the first that differs."""
    require(len(found) == len(expected), f"{what}: {len(found)} sequences instead of {len(expected)}")
    for row, (left, right) in enumerate(zip(found, expected, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
        require(list(left) == list(right), f"{what}: sequence {row} differs from token {at} on")


# ------------------------------------------------------------------------------------ laws of every method


def options_are_checked_and_fixed(make: Make) -> None:
    """Options are those of the schema, unknown ones are refused, and none changes after construction."""
    method = make()
    known, schema = set(method.options), set(type(method).schema().get("properties", {}))
    require(known == schema, f"options {sorted(known)} instead of the schema's {sorted(schema)}")
    try:
        make(no_such_option=1)
    except UnknownNameError:
        pass
    else:
        require(False, "an unknown option is taken")
    try:
        method.options["no_such_option"] = 1
    except TypeError:
        return
    require(False, "the options can be changed after construction")


def the_recipe_survives_json(make: Make) -> None:
    """A recipe with this method reads back from its text and from its JSON form, and builds the same method."""
    method = make()
    options = tuple(sorted((name, str(value)) for name, value in method.options.items()))
    recipe = Recipe((Step(method.card.slug, options),))
    for what, back in (("JSON", Recipe.from_json(recipe.to_json())), ("text", Recipe.parse(str(recipe)))):
        require(back == recipe and back.digest() == recipe.digest(), f"from {what}: {back} instead of {recipe}")
    built = recipe.build()[method.card.slot]
    require(dict(built.options) == dict(method.options), f"built as {built!r} instead of {method!r}")
