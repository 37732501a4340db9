"""What reducers that act between layers do to a language model on text: coherence, and thinking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenary.bench.reduction_card.arms import Entry
from tokenary.bench.reduction_card.overthinking import thinking_figures
from tokenary.bench.reduction_card.text import able, text_figures


def text_part(
    name: str, chosen: Sequence[Entry], some: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure reducers that can act on text on a language model; say why where this is left out.

    Parameters
    ----------
    name : str
        Of the language model; empty to leave the part out.
    chosen : sequence of Entry
        Reducers of the card.
    some : mapping
        ``resamples`` and ``seed``.
    say : callable
        Told what is under way.
    """
    fit = [entry for entry in chosen if able(entry)]
    if not name or not fit:
        why = "no language model was named" if fit else "the reducers act on pictures, not between layers on text"
        left_out = f"coherence and thinking over text were not measured: {why}"
        return {"left_out": left_out, "model": None, "arms": [], "thinking": None}
    from tokenary.run import load

    say(f"text: {name}")
    lm = load(name)
    coherence = text_figures(lm, fit, some)
    say(f"thinking: {name}")
    return {"left_out": None, **coherence, "thinking": thinking_figures(lm, fit, some)}
