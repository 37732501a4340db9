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
    room: str = typer.Option(
        None, "--room", help="Every method of a room with its defaults, each on a model of the kind it is made for."
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

    [bold]tokenary compare --room decode[/bold] measures a whole room, each method against plain decoding on its model.

    Ctrl-C stops it; what was measured by then is still printed and written.
    """
    from tokenary.bench import recipes_of
    from tokenary.core.recipe import Recipe
    from tokenary.data.shipped import read_prompts

    recipes = [Recipe.parse(text).for_writing() for text in recipe]
    given = None if prompts is None else read_prompts(prompts)
    for chosen in recipes:
        chosen.build()  # a wrong option shows before the weights are read
    if room is not None:
        recipes_of(room, model)  # and so does a wrong room
    out.mkdir(parents=True, exist_ok=True)  # and a folder that cannot be written, before minutes of measuring

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    import tokenary
    from tokenary.bench import Comparison, one_table

    set_threads(threads)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "rounds": rounds}
    options = {name: value for name, value in options.items() if value is not None}  # else those of `tokenary.compare`
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    lm = tokenary.load(model, dtype=dtype, progress=not as_json)
    by_model = {} if room is None else recipes_of(room, model, lm.kind)
    if recipes or not by_model:
        by_model = {model: []} | by_model
        by_model[model] = [*recipes, *by_model[model]]
    found: list[Comparison] = []
    files: list[Path] = []
    cancelled = False
    for name, wanted in by_model.items():
        try:
            if name != model:
                lm = tokenary.load(name, dtype=dtype, progress=not as_json)
            with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
                options["peers"] = peers and name == model
                one = tokenary.compare(lm, wanted, prompts=given, seed=seed, progress=progress, **options)
        except KeyboardInterrupt:
            if not found:
                raise
            cancelled = True
            break
        found.append(one)
        files += one.write(out if name == model else out / name)
        if cancelled := not one.complete:
            break
    if as_json:
        output.as_json([one.to_json() for one in found] if room else found[0].to_json())
    else:
        output.draw(one_table(found))
        for one in found:
            for warning in one.warnings:
                output.note(f"note: {warning}")
        typer.echo("\n" + "\n".join(map(str, files)))
    if cancelled:
        raise typer.Exit(130)
