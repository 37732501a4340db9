"""How models are taught token by token.

An `Objective` turns a batch and a model's logits into a loss and its named parts. Methods are found by class name, for
example ``tokenary.learn.XToken``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokenary.core.registry import room_attribute

_HOME = {"Objective": "base"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tokenary.learn.{_HOME[name]}"), name)
    return room_attribute("learn", name)
