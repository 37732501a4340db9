"""Fewer image tokens.

A `Reducer` looks at the tokens of a picture and returns the `TokenMap` that makes fewer of them; adapters apply it
between the layers of an encoder, behind the encoder, or between the layers of a language model, and let sizes,
positions, masks and the cache follow. Methods are found by class name, for example ``tokenary.reduce.ReducePool``.
"""

from __future__ import annotations

from typing import Any

from tokenary.core.registry import room_attribute


def __getattr__(name: str) -> Any:
    return room_attribute("reduce", name)
