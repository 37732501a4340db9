"""The next tokens.

A `Proposer` drafts a `TokenTree`; the target scores all of it in one pass and keeps what it would have said itself.
One loop serves greedy and sampled decoding, chains and trees, single sequences and batches. Methods are found by
class name, for example ``tokenary.decode.TokenRecycling``.
"""

from __future__ import annotations

from typing import Any

from tokenary.core.registry import room_attribute


def __getattr__(name: str) -> Any:
    return room_attribute("decode", name)
