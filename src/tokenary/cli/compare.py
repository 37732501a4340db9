"""``tokenary compare``: recipes side by side on the same prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.cli import output
from tokenary.cli.generate import DTYPE, MODEL, THREADS, set_threads

if TYPE_CHECKING:
    from rich.progress import Progress

    from tokenary.bench import Comparison
    from tokenary.core.recipe import Recipe
    from tokenary.models import LM


def compare(
    model: str = MODEL,
    recipe: list[str] = typer.Option(
        [], "--with", help="A recipe to measure; repeat for more. Plain greedy is always there."
    ),
    room: str = typer.Option(
        None, "--room", help="Every method of a room with its defaults, each on a model of the kind it is made for."
    ),
    prompts: str = typer.Option(
        None, "--prompts", help="A file: one prompt a line, or JSONL with a key prompt. Or how many of ours; see below."
    ),
    max_new_tokens: int = typer.Option(None, "--max-new-tokens", "-n", min=2, help="Tokens a prompt."),
    rounds: int = typer.Option(None, "--rounds", min=1, help="Times every recipe runs every prompt, in turns."),
    context: int = typer.Option(None, "--context", help="With --room memory: tokens of a text. 2048 by default."),
    budget: list[float] = typer.Option(
        [], "--budget", help="With --room memory: percent of the text that is kept, or read; repeat for a curve."
    ),
    peers: bool = typer.Option(
        False, "--peers", help="Also transformers' own generate, and llama.cpp or kvpress where installed."
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

    [bold]tokenary compare --room memory --context 8192[/bold] asks every memory what is hidden in long texts, at
    several budgets, beside random, recent and oracle choices: needles, a list of pairs, a passage that comes again, and
    the prose that follows. --prompts is how many texts (one). SmolLM2-135M, on a core shared with other work, took 8
    minutes a text of 2,048 tokens and 30 of 8,192; on a model that they do not know, FASA, HISA and STILL first get
    ready for minutes.

    Ctrl-C stops it; what was measured by then is still printed and written.
    """
    from tokenary.core.recipe import Recipe

    recipes = [Recipe.parse(text).for_writing() for text in recipe]
    for chosen in recipes:
        chosen.build()  # a wrong option shows before the weights are read
    number = int(prompts) if prompts and prompts.isdigit() else None
    if room == "memory":
        for name, value in (("--max-new-tokens", max_new_tokens), ("--rounds", rounds)):
            if value is not None:
                raise typer.BadParameter("texts are read, not written, with --room memory", param_hint=name)
        if prompts is not None and number is None:
            raise typer.BadParameter("with --room memory, how many texts", param_hint="--prompts")
        options = {"context": context, "prompts": number, "budgets": budget or None}
        _memory(model, recipes, options, out, seed, dtype, threads, peers, as_json)
    else:
        if context is not None or budget:
            raise typer.BadParameter("belong to --room memory", param_hint="--context and --budget")
        options = {"max_new_tokens": max_new_tokens, "rounds": rounds, "prompts": number or prompts}
        _speed(model, recipes, room, options, out, seed, dtype, threads, peers, as_json)


def _speed(
    model: str,
    recipes: list[Recipe],
    room: str | None,
    options: dict[str, Any],
    out: Path,
    seed: int,
    dtype: str,
    threads: int,
    peers: bool,
    as_json: bool,
) -> None:
    """Measure speed and quality of recipes, one model after the other."""
    from tokenary.bench import recipes_of
    from tokenary.data.shipped import read_prompts

    if isinstance(options["prompts"], str):
        options["prompts"] = read_prompts(Path(options["prompts"]))
    if room is not None:
        recipes_of(room, model)  # a wrong room shows now
    out.mkdir(parents=True, exist_ok=True)  # and so does a folder that cannot be written, before minutes of measuring

    import tokenary
    from tokenary.bench import one_table

    set_threads(threads)
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
            with _bar() as progress:
                options["peers"] = peers and name == model
                one = tokenary.compare(lm, wanted, seed=seed, progress=progress, **_given(options))
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
        _notes([warning for one in found for warning in one.warnings], files)
    if cancelled:
        raise typer.Exit(130)


def _memory(
    model: str,
    recipes: list[Recipe],
    options: dict[str, Any],
    out: Path,
    seed: int,
    dtype: str,
    threads: int,
    peers: bool,
    as_json: bool,
) -> None:
    """Measure what memories are worth on long texts."""
    out.mkdir(parents=True, exist_ok=True)
    from tokenary.bench import compare_memory
    from tokenary.run import load

    set_threads(threads)
    lm: LM = load(model, dtype=dtype, progress=not as_json)
    with _bar() as progress:
        found = compare_memory(lm, recipes, seed=seed, peers=peers, progress=progress, **_given(options))
    files = found.write(out)
    if as_json:
        output.as_json(found.to_json())
    else:
        output.draw(found.table())
        _notes(found.warnings, files)
    if not found.complete:
        raise typer.Exit(130)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What was said; for the rest, the defaults of the function that is called."""
    return {name: value for name, value in options.items() if value is not None}


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)


def _notes(warnings: list[str], files: Any) -> None:
    for warning in warnings:
        output.note(f"note: {warning}")
    typer.echo("\n" + "\n".join(map(str, files)))
