"""``tokenary compare``: recipes side by side on the same prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from tokenary.cli import output
from tokenary.cli.generate import DTYPE, MODEL, THREADS, set_threads


def compare(
    model: str = MODEL,
    recipe: list[str] = typer.Option(
        [], "--with", help="A recipe to measure; repeat for more. Plain greedy is always there."
    ),
    prompts: Path = typer.Option(
        None, "--prompts", help="One prompt a line, or JSONL with a key prompt; else those that ship."
    ),
    max_new_tokens: int = typer.Option(None, "--max-new-tokens", "-n", min=2, help="Tokens a prompt."),
    rounds: int = typer.Option(None, "--rounds", min=1, help="Times every recipe runs every prompt, in turns."),
    peers: bool = typer.Option(
        False, "--peers", help="Also transformers' own generate, and llama.cpp where installed."
    ),
    out: Path = typer.Option(Path("out"), "--out", help="Folder for results.json and report.html."),
    seed: int = typer.Option(0, help="Of the order and of every random draw."),
    dtype: str = DTYPE,
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Compare recipes: tokens/s as a ratio to greedy, tokens a pass, memory, and whether the output is the same.

    Example: [bold]tokenary compare --with token-recycling --with keyformer:keep=50% --with random:keep=50%[/bold]

    Ctrl-C stops it; what was measured by then is still printed and written.
    """
    from tokenary.core.recipe import Recipe
    from tokenary.data.shipped import read_prompts

    recipes = [Recipe.parse(text) for text in recipe]
    given = None if prompts is None else read_prompts(prompts)
    for chosen in recipes:
        chosen.build()  # a wrong option shows before the weights are read
    out.mkdir(parents=True, exist_ok=True)  # and a folder that cannot be written before minutes of measuring

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    import tokenary

    set_threads(threads)
    lm = tokenary.load(model, dtype=dtype, progress=not as_json)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "rounds": rounds}
    options = {name: value for name, value in options.items() if value is not None}  # else those of `tokenary.compare`
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        found = tokenary.compare(lm, recipes, prompts=given, seed=seed, peers=peers, progress=progress, **options)
    results, report = found.write(out)
    if as_json:
        output.as_json(found.to_json())
    else:
        output.draw(found.table())
        for warning in found.warnings:
            output.note(f"note: {warning}")
        typer.echo(f"\n{results}\n{report}")
    if not found.complete:
        raise typer.Exit(130)
