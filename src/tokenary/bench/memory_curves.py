"""Which memories are compared on a model, at which budgets: found from cards and options, not from a list."""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenary.bench.memory_reading import Methods, states_of
from tokenary.bench.progress import Reporter
from tokenary.bench.quality import MEMORY, PLAIN, memory_only
from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import InputError, OptionError, RecipeError, TokenaryError
from tokenary.core.recipe import Recipe, Step
from tokenary.core.registry import cards, method_class
from tokenary.memory.read_base import PartialRead
from tokenary.models import LM
from tokenary.run import build


@dataclass(frozen=True)
class Point:
    """One memory at one budget.

    Parameters
    ----------
    curve : str
        The method, or the recipe, that it is a point of.
    recipe : str
        Canonical text.
    control : bool
        Whether it is a baseline that others are measured against.
    methods : dict
        By slot, ready for the model; empty for a full cache.
    """

    curve: str
    recipe: str
    control: bool
    methods: Methods


def budget_option(card: Card) -> str | None:
    """Return the option that says how much of the past a method keeps or reads: the first that is a `Budget`."""
    init = inspect.unwrap(method_class(card.slug).__init__)
    hints = typing.get_type_hints(init)
    return next((name for name in inspect.signature(init).parameters if hints.get(name) is Budget), None)


def points_of(
    lm: LM,
    recipes: Sequence[Recipe],
    budgets: Mapping[str, Sequence[float]],
    context: int,
    room: str | None,
    progress: Any = None,
) -> tuple[list[Point], list[str]]:
    """Return the memories to compare, and one line for each that does not fit.

    Parameters
    ----------
    lm : LM
        The model.
    recipes : sequence of Recipe
        Measured as they are, one point each.
    budgets : mapping
        Percent of the past that methods with a budget keep or read, by slot.
    context : int
        Tokens of the past.
    room : str, optional
        Whose methods are compared; none with None.
    progress : callable or rich.progress.Progress, optional
        Told of every method that is got ready: some are calibrated, or trained, for a model that they do not know.

    Returns
    -------
    list of Point
        First the full cache.
    list of str
        What was left out, with the reason.
    """
    points, left_out = [Point(PLAIN, PLAIN, True, {})], list[str]()
    for recipe in recipes:
        part = memory_only(recipe)
        if part is None:
            raise RecipeError(f"{recipe} neither keeps, stores nor reads less, which is what this compares")
        try:
            control = all(step.card.baseline for step in part.steps)
            points.append(Point(str(part), str(part), control, _ready(lm, part)))
        except TokenaryError as error:
            left_out.append(f"{part}: {error}")
    compared = sorted(cards(room=room), key=lambda card: card.baseline) if room else []
    reporter = Reporter(progress if compared else None, len(compared))
    for card in compared:
        reporter.start("getting ready", card.slug)
        try:
            found, notes = _curve(lm, card, budgets.get(card.slot, ()), context)
        except TokenaryError as error:
            left_out.append(f"{card.slug}: {error}")
        else:
            points += found
            left_out += notes
        reporter.finish()
    return list({point.recipe: point for point in reversed(points)}.values())[::-1], left_out


def _ready(lm: LM, recipe: Recipe) -> Methods:
    """Build the methods of a recipe for a model."""
    methods = build(lm, recipe)
    states_of(lm, methods)  # a method may find only now that the model is none for it
    return methods


def _curve(lm: LM, card: Card, budgets: Sequence[float], context: int) -> tuple[list[Point], list[str]]:
    """One point a budget; one only, with its defaults, for a method without a budget."""
    if card.slot not in MEMORY:
        raise RecipeError(
            f"takes the slot {card.slot!r} of a recipe: it neither keeps, stores nor reads less of a cache"
        )
    option = budget_option(card)
    if option is None or not budgets:
        recipe = Recipe.parse(card.slug)
        return [Point(card.slug, str(recipe), card.baseline, _ready(lm, recipe))], []
    found, notes = list[Point](), list[str]()
    beyond = list[tuple[Point, str]]()
    methods: Methods = {}
    for budget in budgets:
        try:
            recipe, methods = _at(lm, card, option, f"{budget:g}%", methods)
            wanted = max(1, int(budget * context / 100))
            always = _always(methods, context)
            if 0 < always < wanted:
                recipe, methods = _at(lm, card, option, str(wanted - always), methods)
        except (OptionError, InputError) as error:
            notes.append(f"{card.slug}:{option}={budget:g}%: {error}")
            continue
        point = Point(card.slug, str(recipe), card.baseline, methods)
        if always < wanted:
            found.append(point)
        else:
            beyond.append(
                (point, f"{recipe}: reads {always:,} tokens besides, more than the {wanted:,} of this budget")
            )
    if beyond and not found:  # one point all the same, where it lies
        found.append(beyond.pop()[0])
    return found, [*notes, *(why for _, why in beyond)]


def _at(lm: LM, card: Card, option: str, value: str, prepared: Methods) -> tuple[Recipe, Methods]:
    """A method at a budget; a reader that was prepared for the model already is not prepared again."""
    recipe = Recipe((Step(card.slug, ((option, value),)),))
    known = prepared.get(card.slot)
    if not isinstance(known, PartialRead):
        return recipe, _ready(lm, recipe)
    fresh = recipe.build()[card.slot]  # checks the options
    method = copy.copy(known)
    method.read, method.options = fresh.read, fresh.options
    return recipe, {card.slot: method}


def _always(methods: Methods, context: int) -> int:
    """Tokens that a reader reads beside those that its budget is about."""
    reader, seen = methods.get("read"), torch.tensor([context])
    return int(reader.most(seen) - reader.count(seen)) if isinstance(reader, PartialRead) else 0
