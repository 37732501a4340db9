"""Finds the methods: reads every card from the source text, imports a method only when it is used.

A method is registered by standing in a room's folder. There is no list to edit.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tokenary.core.card import ROOMS, Card
from tokenary.core.errors import UnknownNameError

if TYPE_CHECKING:
    from tokenary.core.method import Method

_PACKAGE = Path(__file__).resolve().parent.parent
_CARD = re.compile(r"^CARD = (Card\(.*?^\))$", re.MULTILINE | re.DOTALL)


def read_card(path: Path) -> Card | None:
    """Read the card of a method file without importing it.

    Parameters
    ----------
    path : Path
        A Python file.

    Returns
    -------
    Card or None
        None where the file holds no ``CARD = Card(...)``.

    Raises
    ------
    ValueError
        If the card is not made of literals.
    """
    found = _CARD.search(path.read_text(encoding="utf-8"))
    if found is None:
        return None
    call = ast.parse(found.group(1), mode="eval").body
    assert isinstance(call, ast.Call)
    return Card(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg})


@functools.cache
def _index() -> dict[str, tuple[Card, str]]:
    """Map each slug to its card and module name, in the order of the rooms."""
    found: dict[str, tuple[Card, str]] = {}
    for room in ROOMS:
        for path in sorted((_PACKAGE / room).glob("*.py")) + sorted((_PACKAGE / room).glob("*/__init__.py")):
            card = read_card(path)
            if card is None:
                continue
            stem = path.parent.name if path.name == "__init__.py" else path.stem
            if card.slug != stem.replace("_", "-") or card.room != room:
                raise ValueError(f"{path}: the card says {card.room}/{card.slug}")
            found[card.slug] = (card, f"tokenary.{room}.{stem}")
    return found


def cards(*, room: str | None = None, lossless: bool | None = None, baselines: bool = True) -> list[Card]:
    """List the cards, by room and slug.

    Parameters
    ----------
    room : str, optional
        Only this room.
    lossless : bool, optional
        Only methods that are (True) or are not (False) lossless.
    baselines : bool
        Whether controls such as ``random`` are listed.

    Raises
    ------
    UnknownNameError
        If there is no such room.
    """
    if room is not None and room not in ROOMS:
        raise UnknownNameError("room", room, ROOMS)
    return [
        card
        for card, _ in _index().values()
        if (room is None or card.room == room)
        and (lossless is None or card.lossless == lossless)
        and (baselines or not card.baseline)
    ]


def card(slug: str) -> Card:
    """Return the card of `slug`.

    Raises
    ------
    UnknownNameError
        If there is no such method; names the nearest.
    """
    index = _index()
    if slug not in index:
        raise UnknownNameError("method", slug, index)
    return index[slug][0]


def method_class(slug: str) -> type[Method]:
    """Import the file of `slug` and return its class."""
    found = card(slug)
    return getattr(importlib.import_module(_index()[slug][1]), found.cls)


def room_attribute(room: str, name: str) -> type[Method]:
    """Find a method of a room by the name of its class, for the room's ``__getattr__``.

    Raises
    ------
    AttributeError
        If no card of the room names such a class.
    """
    for found in cards(room=room):
        if found.cls == name:
            return method_class(found.slug)
    raise AttributeError(f"module 'tokenary.{room}' has no attribute {name!r}")
