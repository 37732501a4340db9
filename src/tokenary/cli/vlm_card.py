"""``tokenary vlm card``: what a reducer of image tokens does to a model, as a report card."""

from __future__ import annotations

from pathlib import Path

import typer

from tokenary.cli import output
from tokenary.cli.generate import THREADS, set_threads

MODEL = typer.Option("", "--model", "-m", help="A model that ships (xs-0), or a folder that was saved.")


def card(
    reducer: list[str] = typer.Option(
        ..., "--with", help="A method of the room reduce, e.g. hiprune:keep=25%; several."
    ),
    budget: list[float] = typer.Option([], "--budget", help="Percent of the image tokens kept, for all; several."),
    at: str = typer.Option("", "--at", help="Where: encoder, vision:2,4, decoder:2; by default where each belongs."),
    model: str = MODEL,
    questions: int = typer.Option(50, "--questions", min=4, help="Questions of each family."),
    crops: bool = typer.Option(False, "--crops", help="See a thumbnail and four crops, at twice the resolution."),
    text: str = typer.Option(
        "", "--text", help="A language model that reads and thinks too, with reducers between layers; minutes."
    ),
    stability: bool = typer.Option(False, "--stability", help="Train small models at a ladder of rates; minutes."),
    seed: int = typer.Option(0, help="Of questions, random tokens and intervals."),
    out: Path = typer.Option(Path("card"), "--out", help="Folder for results.json and report.html."),
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Make the report card of reducers: every figure also as the difference to random tokens, with an interval.

    Example: [bold]tokenary vlm card --with hiprune:keep=25% --with reduce-pool:keep=25%[/bold]
    """
    from tokenary.bench.reduction_card import reduction_card

    set_threads(threads)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written shows before minutes of work
    found = reduction_card(
        reducer, model, budgets=budget, at=at or None, per_family=questions, per_kind=questions, listed=2 * questions,
        anyres=crops, seed=seed, text=text, stability=stability, say=output.note,
    )  # fmt: skip
    output.record(found, out, as_json)
