"""Real language models under one name each, and tiny random ones for laws.

``load(name)`` turns a catalogue name, a folder, a ``.gguf`` file or a hub id into an :class:`LM`: a transformers model
in eval mode, its tokenizer and the hash of its weights. ``list_models()`` is the catalogue, ``get(name)`` fetches an
entry (checked, resumed, converted once to safetensors in the cache folder), ``tiny_lm(family=...)`` makes a random net.
Nothing here imports torch or transformers before a model is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenary.models.catalogue import CATALOGUE, Entry, find, list_models

if TYPE_CHECKING:
    from tokenary.models.fetch import get
    from tokenary.models.lm import LM
    from tokenary.models.loading import load, load_tokenizer
    from tokenary.models.tiny import tiny_lm

__all__ = ["CATALOGUE", "LM", "Entry", "find", "get", "list_models", "load", "load_tokenizer", "tiny_lm"]

_LAZY = {"LM": "lm", "load": "loading", "load_tokenizer": "loading", "get": "fetch", "tiny_lm": "tiny"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
