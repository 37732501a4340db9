"""Tokenary: everything that happens to a token, behind one interface.

    import tokenary

    lm = tokenary.load("smollm2")
    out = tokenary.generate(lm, "Why is the sky blue?", recipe="token-recycling + keyformer:keep=50%")
    print(out[0].text, out[0].trace.tokens_per_pass)

The names below are loaded when first used, so that ``import tokenary`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenary.bench import compare
    from tokenary.core.laws import check
    from tokenary.core.recipe import Recipe
    from tokenary.core.registry import cards as methods
    from tokenary.infilling import infill
    from tokenary.run import Output, generate, load, stream

__version__ = "0.1.0"
__all__ = ["Output", "Recipe", "check", "compare", "generate", "infill", "load", "methods", "stream"]

_HOME = {
    "Output": ("run", "Output"),
    "Recipe": ("core.recipe", "Recipe"),
    "check": ("core.laws", "check"),
    "compare": ("bench", "compare"),
    "generate": ("run", "generate"),
    "infill": ("infilling", "infill"),
    "load": ("run", "load"),
    "methods": ("core.registry", "cards"),
    "stream": ("run", "stream"),
}
_ROOMS = ("bench", "claims", "core", "data", "decode", "hf", "memory", "models")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"tokenary.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tokenary' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(f"tokenary.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
