"""How tokens become vectors, and how a model gets other tokens.

A `Transplant` writes the embedding rows of a new vocabulary as weighted sums of the old rows:
``vocab_map(source, target, rows)`` is a pure function that returns a `TokenMap` of shape (V', V). Rows of tokens that
both vocabularies have are copied; a method only says what the new ones are made of. `transfer` applies the map to a
model, to its head where that is not tied, and gives the new tokenizer the special tokens, roles and chat template of
the old one. Methods are found by class name, for example ``tokenary.embed.TokenAdapt``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokenary.core.registry import room_attribute

_HOME = {
    "Transplant": "base",
    "Vocabulary": "vocabulary",
    "transfer": "apply",
    "load_target": "apply",
    "save": "apply",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tokenary.embed.{_HOME[name]}"), name)
    return room_attribute("embed", name)
