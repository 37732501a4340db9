"""Recipes: methods of different slots put together, checked before any work is done.

The text form is ``slug:option=value,option=value + slug:...``, for example
``token-recycling:nodes=24 + keyformer:keep=50%``. The empty recipe is ``plain``: greedy or sampled
decoding over a full cache.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenary.core.card import Card
from tokenary.core.errors import RecipeError
from tokenary.core.registry import card, cards, method_class

#: Slots of the methods that take part in writing a text; methods that take others have commands of their own.
WRITING = ("draft", "choose", "strategy", "keep", "store", "read", "unmask", "window")


@dataclass(frozen=True)
class Step:
    """One method of a recipe, with the options as they were written.

    Parameters
    ----------
    slug : str
        The method.
    options : tuple of (str, str)
        Option names and their text, sorted by name.
    """

    slug: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Step:
        """Read ``slug:option=value,option=value``."""
        slug, _, rest = text.strip().partition(":")
        options: dict[str, str] = {}
        # A comma separates options only where a new name=... follows, so that values may hold commas.
        for part in re.split(r",(?=\s*\w+=)", rest) if rest else []:
            name, equals, value = part.partition("=")
            name = name.strip()
            if not equals or not name:
                raise RecipeError(f"cannot read {part.strip()!r} in {text.strip()!r}: options are name=value")
            if name in options:
                raise RecipeError(f"option {name} is given twice in {text.strip()!r}")
            options[name] = value.strip()
        return cls(slug.strip(), tuple(sorted(options.items())))

    @property
    def card(self) -> Card:
        """The card of the method."""
        return card(self.slug)

    def build(self) -> Any:
        """Construct the method; its options are checked here.

        Raises
        ------
        OptionError, UnknownNameError
            If an option has a wrong value or does not exist.
        """
        found = method_class(self.slug)
        options: dict[str, str] = dict(self.options)
        if "bytes" in options and "keep" in inspect.signature(found).parameters:
            if "keep" in options:
                raise RecipeError(f"{self.slug}: give keep or bytes, not both")
            options["keep"] = options.pop("bytes")
        return found(**options)

    def __str__(self) -> str:
        return self.slug + (":" if self.options else "") + ",".join(f"{name}={value}" for name, value in self.options)


def _split(text: str) -> list[str]:
    """Split a recipe at every + with space around it, and at others where a known method follows.

    An option may hold a +, as regular expressions do.
    """
    known = "|".join(sorted(["plain", *(each.slug for each in cards())], key=len, reverse=True))
    return re.split(rf"(?:^|\s)\+(?:\s|$)|\+(?=\s*(?:{known})(?:[:+\s]|$))", text)


@dataclass(frozen=True)
class Recipe:
    """Methods that work together; immutable and hashable.

    Parameters
    ----------
    steps : tuple of Step
        At most one method a slot; the order carries no meaning.
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(sorted(self.steps, key=lambda step: step.slug)))
        self._check()

    @classmethod
    def parse(cls, source: str | Recipe | Iterable[str] | dict[str, Any] | None) -> Recipe:
        """Make a recipe of its text, of a list of texts, of its JSON form, or of nothing.

        Raises
        ------
        RecipeError
            If the text cannot be read or the methods do not compose.
        UnknownNameError
            If a method does not exist.
        """
        if isinstance(source, Recipe):
            return source
        if source is None:
            return cls()
        if isinstance(source, dict):
            return cls.from_json(source)
        texts = [text for item in ([source] if isinstance(source, str) else source) for text in _split(item)]
        texts = [text for text in texts if text.strip() not in ("", "plain")]
        return cls(tuple(Step.parse(text) for text in texts))

    def _check(self) -> None:
        """Refuse methods that do not compose, with the reason."""
        taken: dict[str, Card] = {}
        for step in self.steps:
            new = step.card
            if new.slot in taken:
                other = taken[new.slot]
                raise RecipeError(f"{other.slug} and {new.slug} do not compose: both are the {new.slot!r} of a recipe")
            taken[new.slot] = new
        for one in taken.values():
            for target, reason in one.refuses:
                for other in taken.values():
                    if other is not one and target in (other.slug, other.slot):
                        raise RecipeError(f"{one.slug} and {other.slug} do not compose: {reason}")

    @property
    def lossless(self) -> bool:
        """Whether every method in it is."""
        return all(step.card.lossless for step in self.steps)

    def for_writing(self) -> Recipe:
        """Return the recipe, if every method in it takes part in writing a text.

        Raises
        ------
        RecipeError
            Naming the method that does not.
        """
        for step in self.steps:
            if step.card.slot not in WRITING:
                raise RecipeError(f"{step.slug} takes no part in writing a text; see tokenary show {step.slug}")
        return self

    def build(self) -> dict[str, Any]:
        """Construct the methods, keyed by slot."""
        return {step.card.slot: step.build() for step in self.steps}

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON types."""
        return {"methods": [{"slug": step.slug, "options": dict(step.options)} for step in self.steps]}

    @classmethod
    def from_json(cls, source: dict[str, Any] | str) -> Recipe:
        """Read what `to_json` gave."""
        try:
            data = json.loads(source) if isinstance(source, str) else source
            return cls(
                tuple(
                    Step(item["slug"], tuple(sorted((name, str(v)) for name, v in item.get("options", {}).items())))
                    for item in data["methods"]
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"not a recipe in JSON: {error}") from None

    def digest(self) -> str:
        """Return a short name of the recipe that is the same on every machine."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps)) or "plain"
