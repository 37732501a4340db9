"""Recipes of requests: read, checked against the cards, and kept away from the server's files.

``GET /v1/tokenary/methods`` answers with `methods`: an object ``{"object": "list", "data": [...]}`` whose entries are
the cards of the methods that this server can run, `Card.to_dict` and one key more::

    {"slug": "keyformer", "title": "...", "summary": "...", "slot": "keep", "room": "memory", "lossless": false,
     "refuses": [["slot or slug", "reason"], ...], "requires": [...], "paper": "2403.09054", "year": 2024,
     "baseline": false, ...,
     "options": {"properties": {"keep": {"type": "string", "default": "60%", "description": "a share ..."},
                                "noise": {"enum": ["gumbel", "none"], "default": "gumbel", ...}, ...}}}

``options`` is JSON schema: ``type``, ``enum``, ``const``, ``anyOf``, ``minimum``, ``maximum``, ``exclusiveMinimum``,
``exclusiveMaximum``, ``default``. Options that a request may not set are left out.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from tokenary.core.card import Card
from tokenary.core.errors import RecipeError, TokenaryError
from tokenary.core.recipe import WRITING, Recipe, Step
from tokenary.core.registry import cards, method_class
from tokenary.serve.errors import ApiError

_LONGEST = 512


def parse(text: str, kind: str) -> Recipe:
    """Read the recipe of a request.

    Parameters
    ----------
    text : str
        The recipe; empty for plain decoding.
    kind : str
        Of the model; see `LM.kind`.

    Raises
    ------
    ApiError
        422 with the card's reason.
    """
    if len(text) > _LONGEST:
        raise ApiError(422, f"a recipe may have {_LONGEST} characters", "tokenary.recipe", "invalid_recipe")
    try:
        return _parse(text, kind)
    except TokenaryError as error:
        message = " ".join(str(error).encode("utf-8", "replace").decode().split())
        raise ApiError(422, message, "tokenary.recipe", "invalid_recipe") from None


@functools.lru_cache(256)
def _parse(text: str, kind: str) -> Recipe:
    recipe = Recipe.parse(text).for_writing()
    for step in recipe.steps:
        if kind not in step.card.model_kinds:
            kinds = " or ".join(step.card.model_kinds)
            raise RecipeError(f"{step.slug} works on {kinds} models; this is a model of the kind {kind}")
        _check_options(step)
    for method in recipe.build().values():
        for name, value in method.options.items():
            most = _remote(_properties(method.card.slug).get(name, {}))
            if isinstance(most, int) and not isinstance(most, bool) and value > most:
                raise RecipeError(f"{method.card.slug}: a request may set {name} to {most} at most")
    return recipe


def _check_options(step: Step) -> None:
    """Refuse what might name a file, or have the worker train."""
    properties = _properties(step.slug)
    for name, value in step.options:
        schema = properties.get(name, {})
        may = _remote(schema)
        if may is False and value != schema.get("default"):
            raise RecipeError(f"{step.slug}: a request may not set {name}")
        if isinstance(may, list) and value not in may:
            raise RecipeError(f"{step.slug}: a request may not set {name} to that: {', '.join(may)} may")


def _properties(slug: str) -> dict[str, Any]:
    return method_class(slug).schema().get("properties", {})


def _remote(schema: dict[str, Any]) -> Any:
    """What a request may say in an option: see `core.method.Method`; by default anything but free text."""
    # From most options that take any text a method reads the file of that name; budgets carry examples.
    free = schema.get("type") == "string" and not {"enum", "const", "pattern", "examples"} & schema.keys()
    return schema.get("remote", not free)


@functools.lru_cache(4)
def methods(kind: str) -> list[dict[str, Any]]:
    """Describe the methods that a request may use with a model of a kind; see the module."""
    found = [card for card in cards() if card.slot in WRITING and kind in card.model_kinds]
    return [_describe(card) for card in found if _usable(card, kind)]


def _usable(card: Card, kind: str) -> bool:
    try:
        _parse(card.slug, kind)
    except TokenaryError:
        return False
    return True


def _describe(card: Card) -> dict[str, Any]:
    method = method_class(card.slug)
    defaults = inspect.signature(method).parameters
    properties = {}
    for name, given in _properties(card.slug).items():
        may, schema = _remote(given), {key: value for key, value in given.items() if key != "remote"}
        if may is False or "const" in schema:
            continue
        if isinstance(may, list):
            schema["enum"] = may
        elif not isinstance(may, bool):
            schema["maximum"] = may
        if not isinstance(schema.get("default"), bool | int | float | str | None):
            schema["default"] = str(defaults[name].default)
        properties[name] = schema
    return {**card.to_dict(), "options": {"properties": properties}}
