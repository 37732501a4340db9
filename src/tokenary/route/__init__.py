"""Which model, or which expert, takes a token.

A method that routes between two models writes the answer with a loop of its own, a `Strategy`. Methods are found by
class name.
"""

from __future__ import annotations

from typing import Any

from tokenary.core.registry import room_attribute


def __getattr__(name: str) -> Any:
    return room_attribute("route", name)
