"""A whole room as one comparison: which recipes run on which model."""

from __future__ import annotations

from tokenary.core.errors import InputError
from tokenary.core.recipe import WRITING, Recipe
from tokenary.core.registry import cards
from tokenary.models.catalogue import CATALOGUE


def recipes_of(room: str, model: str, kind: str = "causal") -> dict[str, list[Recipe]]:
    """Return the methods of a room with their defaults, by the model that each is compared on.

    Parameters
    ----------
    room : str
        For example ``decode``.
    model : str
        What is compared on where a method fits it. A method made for another kind of model gets the one of that kind
        that ships, or SmolLM2.
    kind : str
        Kind of `model`; see `LM.kind`.

    Raises
    ------
    UnknownNameError
        If there is no such room.
    InputError
        If no method of the room takes part in writing a text.
    """
    writing = [card for card in cards(room=room) if card.slot in WRITING]
    if not writing:
        raise InputError(f"no method of the room {room} takes part in writing a text, which is what compare measures")
    found: dict[str, list[Recipe]] = {model: []}
    for card in writing:
        fits = card.model_kinds
        own = (entry.name for entry in CATALOGUE if entry.kind in fits and (entry.folder or entry.kind == "causal"))
        found.setdefault(model if kind in fits else next(own), []).append(Recipe.parse(card.slug))
    return {name: recipes for name, recipes in found.items() if recipes}
