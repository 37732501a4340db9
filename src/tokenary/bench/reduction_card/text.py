"""Coherence of texts where a reducer acts between the layers of a language model: facts, and how prose goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from tokenary.bench.reduction_card.arms import Entry
from tokenary.models.lm import LM
from tokenary.probe.token_reduction_position.effects import effect, estimate, figures
from tokenary.probe.token_reduction_position.passages import SCORED, Writer
from tokenary.probe.token_reduction_position.text import TextArm, Way, nothing, run_ways
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_random import ReduceRandom

LENGTHS, FACTS, PASSAGES, SEEDS = (128, 256), 4, 3, 2


def able(entry: Entry) -> bool:
    """Whether a reducer can act on text: between the layers of a language model, without looking at pictures."""
    return Point.stage_of(entry.at) == "decoder" and not entry.reducer.needs & {"pixels", "text"}


def between(reducer: Reducer, at: str, number: int = 0) -> Callable[[Any, int, int], AbstractContextManager[Any]]:
    """Return what reduces a context between the layers of a language model, as a grid of one row."""

    def inside(model: Any, start: int, count: int) -> AbstractContextManager[Any]:
        context = Context(grid=(1, count), samples=(number * 100_003 + count,))
        return DecoderReduction(model, reducer, at, start=start, count=count, context=context)

    return inside


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
        return {"left_out": f"coherence over text was not measured: {why}", "model": None, "arms": []}
    from tokenary.run import load

    say(f"text: {name}")
    return {"left_out": None, **text_figures(load(name), fit, some)}


def text_figures(
    lm: LM, fit: Sequence[Entry], some: Mapping[str, Any], lengths: Sequence[int] = LENGTHS, facts: int = FACTS,
    passages: int = PASSAGES,
) -> dict[str, Any]:  # fmt: skip
    """Return facts, contradictions, likelihood and repetition of every arm, over random tokens at the same place."""
    writer = Writer(lm, int(some["seed"]))
    items = writer.facts(lengths, facts), writer.passages(lengths, passages)
    run = partial(_arm, lm.model, *items)
    full, blind, rows = run([Way()]), run([Way(nothing)]), []
    for entry in fit:
        place, keep = entry.at, entry.reducer.keep
        random = run([Way(inside=between(ReduceRandom(keep, seed), place)) for seed in range(SEEDS)])
        other = random.parts(items[0])
        arms = {
            "none": full,
            entry.name: run([Way(inside=between(entry.reducer, place))]),
            "random": random,
            "grid": run([Way(inside=between(ReduceGrid(keep), place))]),
            "blind": blind,
        }
        for name, arm in arms.items():
            parts = arm.parts(items[0])
            over = {key: effect(each, other[key], **some) for key, each in parts.items()}
            rows.append(
                {
                    "name": name, "beside": entry.name, "at": place,
                    "figures": figures({key: estimate(each, **some) for key, each in parts.items()}),
                    "over_random": None if arm is random else figures(over),
                }
            )  # fmt: skip
    return {"model": lm.name, "facts": len(items[0]), "passages": len(items[1]), "lengths": list(lengths), "arms": rows}


def _arm(model: Any, facts: Any, passages: Any, ways: list[Way]) -> TextArm:
    *_, arm = run_ways(model, ways, facts, passages, SCORED // 2)
    assert isinstance(arm, TextArm)
    return arm
