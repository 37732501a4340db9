"""Lossless compression with a language model.

A codec (slot ``codec``, `TextCodec`) gives an ensemble that says, token by token, with which weights an entropy coder
codes the next one, and learns from every token that came. `files.compress` and `files.decompress` do the rest: which
bytes are text, lanes in lockstep, blocks, checksums, resuming. The probabilities are made of integers (`integer`), so
that an archive can be read on another machine than the one that wrote it.
"""

from __future__ import annotations

import importlib
from typing import Any

from tokenary.core.registry import room_attribute

_NAMES = {
    "backends": ("codec_from", "machine_of", "reader_for"),
    "base": ("Ensemble", "Lanes", "Reader", "TextCodec"),
    "blocks": ("Machine", "decode_block", "encode_block"),
    "container": ("DamagedError", "Header"),
    "estimate": ("Estimate", "estimate"),
    "files": ("Summary", "compress", "decompress", "machine_for"),
    "integer": ("IntegerLlama",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"tokenary.codec.{_MODULE_OF[name]}"), name)
    return room_attribute("codec", name)
