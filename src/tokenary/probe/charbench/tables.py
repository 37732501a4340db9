"""The figures of a run as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenary.probe.base import Table


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return what to read of the figures of `CharBench`."""
    made = []
    for mode, tasks in figures["scoring"].items():
        made += [_accuracy(mode, tasks), _lengths(mode, tasks)]
        made += [table for table in (_correlations(mode, tasks), _given(mode, tasks)) if table.rows]
    if figures["override"] is not None:
        made.append(_override(figures["override"]))
    return made


def _accuracy(mode: str, tasks: Mapping[str, Any]) -> Table:
    columns = ("task", "n", "accuracy", "±", "no number", "majority", "length only", "above", "bias of wrong")
    keys = (
        "n",
        "accuracy",
        "error",
        "invalid",
        "majority_accuracy",
        "length_only_accuracy",
        "above_majority",
        "bias_of_wrong",
    )
    rows = [[task, *(found[key] for key in keys)] for task, found in tasks.items()]
    return Table(f"Accuracy, {mode} scoring", columns, rows)


def _lengths(mode: str, tasks: Mapping[str, Any]) -> Table:
    lengths = sorted({row["value"] for found in tasks.values() for row in found["by"]["word_length"]})
    rows = []
    for task, found in tasks.items():
        accuracy = {row["value"]: row["accuracy"] for row in found["by"]["word_length"]}
        rows.append([task, *(accuracy.get(length) for length in lengths)])
    return Table(f"Accuracy by word length, {mode} scoring", ["task", *(f"{length:.0f}" for length in lengths)], rows)


def _correlations(mode: str, tasks: Mapping[str, Any]) -> Table:
    rows = [
        [task, name, one["r"], *_edges(one["interval"])]
        for task, found in tasks.items()
        for name, one in (found["r"] or {}).items()
    ]
    title = f"Correlation with correctness, {mode} scoring"
    return Table(title, ("task", "feature", "r", "from", "to (95%)"), rows)


def _given(mode: str, tasks: Mapping[str, Any]) -> Table:
    rows = [
        [task, name, one["partial_r"], *_edges(one["interval"]), one["log_odds_a_unit"], one["log_odds_error"]]
        for task, found in tasks.items()
        for name, one in (found["given_word_length"] or {}).items()
    ]
    columns = ("task", "feature", "partial r", "from", "to (95%)", "log-odds a unit", "±")
    return Table(f"At equal word length, {mode} scoring", columns, rows)


def _override(tasks: Mapping[str, Any]) -> Table:
    keys = ("n", "usual", "other", "difference", "error")
    rows = [[task, arm, *(one[key] for key in keys)] for task, arms in tasks.items() for arm, one in arms.items()]
    columns = ("task", "cut anew", "n", "usual", "cut anew: accuracy", "difference", "±")
    return Table("The same questions, words cut otherwise", columns, rows)


def _edges(interval: list[float] | None) -> Iterator[float | None]:
    yield from interval or (None, None)
