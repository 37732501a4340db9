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

#: What requests may say in options that take any text. From most of them a method reads the file of that name, and a
#: request must not choose what the server reads; so an option that is not listed keeps its default. None: anything.
_FREE_TEXT: dict[tuple[str, str], tuple[str, ...] | None] = {
    ("aded", "store"): ("auto", "builtin", "none"),
    ("awrs", "regex"): None,
}
#: Options that make the worker train before it writes: the operator's choice, not a request's.
_FIXED = ("train",)
#: Options that multiply the sequences of a text, and how far a request may.
_MOST = {"group": 8, "thinkers": 8, "particles": 8}
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
        for name, most in _MOST.items():
            if method.options.get(name, 0) > most:
                raise RecipeError(f"{method.card.slug}: a request may set {name} to {most} at most")
    return recipe


def _check_options(step: Step) -> None:
    """Refuse what might name a file, or have the worker train."""
    properties = method_class(step.slug).schema().get("properties", {})
    for name, value in step.options:
        if name in _FIXED:
            raise RecipeError(f"{step.slug}: a request may not set {name}")
        if name in properties and _is_free(properties[name]) and value != properties[name].get("default"):
            allowed = _FREE_TEXT.get((step.slug, name), ())
            if allowed is not None and value not in allowed:
                may = f": {', '.join(allowed)} may" if allowed else ""
                raise RecipeError(f"{step.slug}: a request may not set {name} to that{may}")


def _is_free(schema: dict[str, Any]) -> bool:
    """Whether an option takes any text; budgets carry examples."""
    return schema.get("type") == "string" and not {"enum", "const", "pattern", "examples"} & schema.keys()


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
    for name, schema in method.schema().get("properties", {}).items():
        if name in _FIXED or "const" in schema or (_is_free(schema) and (card.slug, name) not in _FREE_TEXT):
            continue
        properties[name] = dict(schema)
        if allowed := _FREE_TEXT.get((card.slug, name)):
            properties[name]["enum"] = list(allowed)
        if name in _MOST:
            properties[name]["maximum"] = _MOST[name]
        if not isinstance(schema.get("default"), bool | int | float | str | None):
            properties[name]["default"] = str(defaults[name].default)
    return {**card.to_dict(), "options": {"properties": properties}}
