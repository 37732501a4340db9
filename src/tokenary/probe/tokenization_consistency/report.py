"""The figures as tables, and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenary.core.encodings import CLASSES
from tokenary.probe.base import Table
from tokenary.probe.tokenization_consistency.outcomes import OUTCOMES
from tokenary.probe.tokenization_consistency.trials import MASKED, RANDOM, SAMPLED

Figures = Mapping[str, Any]


def tables(figures: Figures) -> list[Table]:
    """Return the figures as tables."""
    arms, static = figures["arms"], figures["static"]
    made = [
        Table("Targets", ["arm", "targets", *OUTCOMES],
              [[arm, row["targets"], *(row["outcomes"][name] for name in OUTCOMES)] for arm, row in arms.items()]),
        Table(
            "Phantoms among the targets, non-edits in the tokenizer's own tokens, answers with other changes",
            ["arm", "phantoms", "same white space", "odd tokens", "own tokens", "collateral"],
            [
                [arm, *(_interval(row[name]) for name in ("phantom", "phantom_strict", "phantom_odd")),
                 _percent(row["own_of_non_edits"]), _percent(row["collateral"])]
                for arm, row in arms.items()
            ],
        ),
        Table(
            "Phantoms by class",
            ["class", *arms],
            [[name, *(row["classes"].get(name, 0) for row in arms.values())] for name in CLASSES
             if any(name in row["classes"] for row in arms.values())],
        ),
        Table(
            "Encodings of a word",
            ["word", "encodings", "tokens", "shortest", "longest", "rank of its own"],
            [[repr(row["word"]), *(row[key] for key in ("encodings", "tokens", "shortest", "longest", "rank"))]
             for row in static["words"]],
        ),
        Table("Cuts that leave the tokens alone", ["cut", "share"],
              [[name, _interval(row)] for name, row in static["stable_cuts"].items()]),
    ]  # fmt: skip
    if figures["likelihood"]:
        rows = [[name, value] for name, value in figures["likelihood"].items() if name != "targets"]
        title = f"Probability at {figures['likelihood']['targets']} targets, the passage copied up to there"
        made.append(Table(title, ["encoding", "mean"], rows))
    if figures["free"]:
        rows = [[row["temperature"], row["of"], _interval(row)] for row in figures["free"]]
        made.append(Table("Words in odd tokens in free text", ["temperature", "words", "share"], rows))
    return [table for table in made if table.rows]


def notes(figures: Figures) -> list[str]:
    """Return what the figures mean, and what they cannot say."""
    sampled, static, found = figures["arms"][SAMPLED], figures["static"], figures["sensitivity"]
    edits, of = sampled["outcomes"], max(1, sampled["targets"])
    said = [
        f"Put into clean copies, {found['found']} of {found['injected']} phantoms were found, {found['same_class']} in"
        f" their class; {found['false']} words counted falsely.",
        f"Phantoms: {_interval(sampled['phantom'])} of the targets; with equal white space"
        f" {_interval(sampled['phantom_strict'])}; in tokens that the tokenizer would not make"
        f" {_interval(sampled['phantom_odd'])}.",
    ]
    if edits["replaced"] < of / 2:
        said.append(
            f"The model replaced {edits['replaced'] / of:.0%} of the targets: what it did not edit is mostly that it"
            " did not follow the instruction, and not the tokenizer's doing."
        )
    if MASKED in figures["arms"]:
        masked, drawn = figures["arms"][MASKED], figures["arms"][RANDOM]
        gain = [_share(row["replaced"]) - _share(sampled["replaced"]) for row in (masked, drawn)]
        over = figures["over_banned"]
        said.append(
            f"Masking: phantoms {_percent(sampled['phantom'])} to {_percent(masked['phantom'])}, replaced"
            f" {100 * gain[0]:+.1f} points (random mask {100 * gain[1]:+.1f}). A target's mask also keeps"
            f" {over['completing']:.1f} of {over['words']:,} other words from being written; a ban on every first token"
            f" would keep {over['starting']:.0f}."
        )
    if static["missing_bytes"]:
        said.append(
            f"{len(static['missing_bytes'])} bytes have no token of their own; text with them may not come back."
        )
    for name, what in (("plain", "decoding"), ("clean_up", "decoding with clean_up_tokenization_spaces")):
        if static["lossy"][name]:
            said.append(f"Changed by {what}: {', '.join(map(ascii, static['lossy'][name]))}.")
    return said


def _share(row: Figures) -> float:
    return row["share"] or 0.0


def _percent(row: Figures) -> str | None:
    return None if row["share"] is None else f"{row['share']:.1%}"


def _interval(row: Figures) -> str:
    low, high = row["interval"]
    return f"{_percent(row) or 'none seen'} ({low:.1%} to {high:.1%})"
