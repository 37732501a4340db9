"""``tokenary check``: the laws of a room, on toy nets."""

from __future__ import annotations

import typer

from tokenary.cli import output


def check(
    method: str = typer.Argument(None, help="A method, with options if you like: keyformer:keep=30%."),
    every: bool = typer.Option(False, "--all", help="Every method."),
    as_json: bool = output.JSON,
) -> None:
    """Hold methods to the laws of their room, on toy nets; exit code 1 if one is broken.

    Example: [bold]tokenary check keyformer:keep=30%[/bold]
    """
    from tokenary.core.errors import InputError
    from tokenary.core.laws import check as check_method
    from tokenary.core.recipe import Step
    from tokenary.core.registry import cards

    if every == (method is not None):
        raise InputError("name a method, or give --all")
    steps = [Step(card.slug) for card in cards()] if every else [Step.parse(method)]
    reports = []
    for step in steps:
        reports.append(check_method(step.slug, **dict(step.options)))
        if not as_json:
            typer.echo(str(reports[-1]))
    if as_json:
        output.as_json([report.to_json() for report in reports])
    if not all(report.ok for report in reports):
        raise typer.Exit(1)
