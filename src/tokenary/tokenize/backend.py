"""The Rust tokenizer inside whatever holds one."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from tokenary.core.errors import InputError
from tokenary.tokenize.base import TextTokenizer


def backend(tokenizer: Any) -> Tokenizer:
    """Return the ``tokenizers.Tokenizer`` of a transformers tokenizer or of a wrapper with ``.tokenizer``, or itself.

    Raises
    ------
    InputError
        There is none inside.
    """
    for held in (tokenizer, *(getattr(tokenizer, name, None) for name in ("backend_tokenizer", "tokenizer"))):
        if isinstance(held, Tokenizer):
            return held
    raise InputError(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library")


def as_text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Return a `TextTokenizer`, or make one of anything that `backend` takes."""
    return tokenizer if isinstance(tokenizer, TextTokenizer) else TextTokenizer(backend(tokenizer).to_str())
