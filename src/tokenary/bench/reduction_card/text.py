"""Coherence of texts where a reducer acts between the layers of a language model: facts, and how prose goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tokenary.bench.reduction_card.arms import Entry
from tokenary.models.lm import LM
from tokenary.probe.token_reduction_position.effects import Parts, effect, estimate, figures
from tokenary.probe.token_reduction_position.passages import SCORED, Writer
from tokenary.probe.token_reduction_position.text import Inside, TextArm, Way, nothing, run_ways
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_random import ReduceRandom

LENGTHS, FACTS, PASSAGES, SEEDS = (128, 256), 4, 3, 2


def able(entry: Entry) -> bool:
    """Whether a reducer can act on text: between the layers of a language model, without looking at pictures."""
    return Point.stage_of(entry.at) == "decoder" and not entry.reducer.needs & {"pixels", "text"}


def between(reducer: Reducer, at: str) -> Inside:
    """Return what reduces a context between the layers of a language model, as a grid of one row."""

    def inside(model: Any, number: int, start: int, count: int) -> AbstractContextManager[Any]:
        context = Context(grid=(1, count), samples=(number * 100_003 + count,))
        return DecoderReduction(model, reducer, at, start=start, count=count, context=context)

    return inside


def as_many(control: Reducer, reducer: Reducer) -> Reducer:
    """Let a control keep as many tokens as a reducer, whose own budget may be that of all layers together."""
    control.count = reducer.count  # type: ignore[method-assign]
    return control


def ways_of(entry: Entry) -> dict[str, list[Way]]:
    """Return how a reducer reads, and controls at its place and budget, one way a seed."""
    place, own = entry.at, entry.reducer
    arms = {
        entry.name: [own],
        "random": [as_many(ReduceRandom(own.keep, seed), own) for seed in range(SEEDS)],
        "grid": [as_many(ReduceGrid(own.keep), own)],
    }
    return {name: [Way(inside=between(each, place)) for each in reducers] for name, reducers in arms.items()}


def rows_of(
    fit: Sequence[Entry], run: Callable[[list[Way]], Mapping[str, Parts]], full: Mapping[str, Parts],
    blind: Mapping[str, Parts], some: Mapping[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of all arms beside each reducer: figures, and their differences to random tokens."""
    rows = []
    for entry in fit:
        arms = {"none": full, **{name: run(ways) for name, ways in ways_of(entry).items()}, "blind": blind}
        other = arms["random"]
        for name, parts in arms.items():
            over = {key: effect(each, other[key], **some) for key, each in parts.items()}
            rows.append(
                {
                    "name": name, "beside": entry.name, "at": entry.at,
                    "figures": figures({key: estimate(each, **some) for key, each in parts.items()}),
                    "over_random": None if parts is other else figures(over),
                }
            )  # fmt: skip
    return rows


def text_figures(
    lm: LM, fit: Sequence[Entry], some: Mapping[str, Any], lengths: Sequence[int] = LENGTHS, facts: int = FACTS,
    passages: int = PASSAGES,
) -> dict[str, Any]:  # fmt: skip
    """Return facts, contradictions, likelihood and repetition of every arm, over random tokens at the same place."""
    writer = Writer(lm, int(some["seed"]))
    items = writer.facts(lengths, facts), writer.passages(lengths, passages)

    def run(ways: list[Way]) -> dict[str, Parts]:
        *_, arm = run_ways(lm.model, ways, *items, SCORED // 2)
        assert isinstance(arm, TextArm)
        return arm.parts(items[0])

    rows = rows_of(fit, run, run([Way()]), run([Way(nothing)]), some)
    return {"model": lm.name, "facts": len(items[0]), "passages": len(items[1]), "lengths": list(lengths), "arms": rows}
