"""How raw text becomes tokens, and what that costs.

`load_tokenizer` brings a `TextTokenizer`: a ``tokenizer.json`` of any origin, encoded in parallel by the Rust library,
with the bytes of every token. A `Measure` counts something over texts, part by part, and turns merged counts into
figures; `tokenary.tokenize.audit` runs measures over a corpus in one pass. Methods are found by class name, for example
``tokenary.tokenize.TokenPremium``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokenary.core.registry import room_attribute

_HOME = {"TextTokenizer": "base", "load_tokenizer": "base", "Measure": "base"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tokenary.tokenize.{_HOME[name]}"), name)
    return room_attribute("tokenize", name)
