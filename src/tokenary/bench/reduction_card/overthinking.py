"""Over-thinking: how long a language model thinks on a reduced context, what it answers on the way and at last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenary.bench.reduction_card.arms import Entry
from tokenary.bench.reduction_card.text import rows_of
from tokenary.models.lm import LM
from tokenary.probe.token_reduction_position.effects import Parts, effect, estimate
from tokenary.probe.token_reduction_position.overthinking import thoughts
from tokenary.probe.token_reduction_position.passages import Writer
from tokenary.probe.token_reduction_position.text import Way, nothing

LENGTH, QUESTIONS, LIMIT = 128, 32, 32
Record = Mapping[str, Any]


def thinking_figures(
    lm: LM, fit: Sequence[Entry], some: Record, length: int = LENGTH, questions: int = QUESTIONS, limit: int = LIMIT
) -> dict[str, Any]:
    """Return tokens, answers and answers per token of every arm, over random tokens at the same place.

    Parameters
    ----------
    lm : LM
        Who thinks; with a tokenizer.
    fit : sequence of Entry
        Reducers that can act on text.
    some : mapping
        ``resamples`` and ``seed``.
    length : int
        Tokens of the context that is reduced.
    questions : int
        How many, half of them of two steps.
    limit : int
        Most tokens of a chain.

    Returns
    -------
    dict
        ``gate`` says what is answered with and without the context, and whether that ``counts``; ``arms`` has the rows.
    """
    writer = Writer(lm, int(some["seed"]))
    riddles = [writer.riddle(length, number) for number in range(questions)]

    def run(ways: list[Way]) -> dict[str, Parts]:
        return thoughts(lm, ways, riddles, limit).parts()

    full, blind = run([Way()]), run([Way(nothing)])
    return {
        "questions": questions, "length": length, "limit": limit, "gate": gate(full, blind, some),
        "arms": rows_of(fit, run, full, blind, some),
    }  # fmt: skip


def gate(full: Mapping[str, Parts], blind: Mapping[str, Parts], some: Record) -> dict[str, Any]:
    """Say whether the context helps to answer at all, beyond the interval of the difference to no context."""
    over = effect(full["answer_right"], blind["answer_right"], **some)
    found = {
        name: estimate(each["answer_right"], **some).to_json() for name, each in (("full", full), ("blind", blind))
    }
    return {**found, "over_blind": over.to_json(), "counts": over.low > 0}


def finding(part: Record) -> str:
    """Return a sentence on the reducers, or on why nothing is to be said of them."""
    gated = part["gate"]
    if not gated["counts"]:
        return (
            f"Thinking on text: {gated['full']['value']:.0%} of the answers are right with the context,"
            f" {gated['blind']['value']:.0%} without; that is too near for what is kept of it to mean anything."
        )
    said = [_said(arm) for arm in part["arms"] if arm["name"] == arm["beside"]]
    return f"Right early and wrong at the end of a chain of thought, over random tokens: {', '.join(said)}."


def _said(arm: Record) -> str:
    own, over = (arm[key]["right_early_wrong_late"] for key in ("figures", "over_random"))
    than = "" if over["low"] is None else f", {over['low']:+.2f} to {over['high']:+.2f}"
    return f"{arm['name']} {own['value']:.0%} of the answers ({over['value']:+.2f}{than})"
