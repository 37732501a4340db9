"""What of the past is kept.

A `KeepPolicy` looks at the keys of one layer (and, if it asks, at the attention they receive) and returns a
`TokenMap` of those that stay; the cache applies it and frees the rest. It never sees who drafts or samples. Methods
are found by class name, for example ``tokenary.memory.Keyformer``.
"""

from __future__ import annotations

from typing import Any

from tokenary.core.registry import room_attribute


def __getattr__(name: str) -> Any:
    return room_attribute("memory", name)
