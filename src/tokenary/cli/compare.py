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

#: What is compared on where no model is named, but with --room reduce.
PLAIN_MODEL: str = MODEL.default


def compare(
    model: str = typer.Option(
        None,
        "--model",
        "-m",
        help="As for `tokenary generate`, smollm2 by default. With --room reduce a name (xs-0), a size (every xs) or a"
        " folder, several with commas; every one of the largest size by default.",
    ),
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
        [],
        "--budget",
        help="With --room memory: percent of the text that is kept, or read; with --room reduce, of the image tokens."
        " Repeat for a curve.",
    ),
    crops: bool = typer.Option(
        False, "--crops", help="With --room reduce: also large pictures, seen as a thumbnail and four crops."
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
    the prose that follows. --prompts is how many texts (one). SmolLM2-135M takes some 3
    minutes a text of 2,048 tokens on one core, and 10 of 8,192; on a model that they do not know, FASA and HISA first
    get ready for minutes, and STILL is left out.

    [bold]tokenary compare --room reduce[/bold] asks small vision-language models about pictures, with every reducer of
    image tokens at several budgets, beside random, strided, pooled, smaller and no pictures. --prompts is how many
    questions of each family (64).

    Ctrl-C stops it; what was measured by then is still printed and written.
    """
    from tokenary.core.recipe import Recipe

    number = int(prompts) if prompts and prompts.isdigit() else None
    _refuse(room, context=context, budget=budget, crops=crops, max_new_tokens=max_new_tokens, rounds=rounds)
    if room in ("memory", "reduce") and prompts is not None and number is None:
        wanted = "how many texts" if room == "memory" else "how many questions of each family"
        raise typer.BadParameter(f"with --room {room}, {wanted}", param_hint="--prompts")
    options: dict[str, Any]
    if room == "reduce":
        if peers or dtype != DTYPE.default:
            raise typer.BadParameter("do not belong to --room reduce", param_hint="--peers and --dtype")
        options = {"budgets": budget or None, "prompts": number, "crops": crops}
        _reduce(model, recipe, options, out, seed, threads, as_json)
        return
    recipes = [Recipe.parse(text).for_writing() for text in recipe]
    for chosen in recipes:
        chosen.build()  # a wrong option shows before the weights are read
    model = model or PLAIN_MODEL
    if room == "memory":
        options = {"context": context, "prompts": number, "budgets": budget or None}
        _memory(model, recipes, options, out, seed, dtype, threads, peers, as_json)
    else:
        options = {"max_new_tokens": max_new_tokens, "rounds": rounds, "prompts": number or prompts}
        _speed(model, recipes, room, options, out, seed, dtype, threads, peers, as_json)


#: The rooms that an option belongs to; None where recipes write texts.
_ROOMS: dict[str, tuple[str | None, ...]] = {
    "context": ("memory",),
    "budget": ("memory", "reduce"),
    "crops": ("reduce",),
    "max_new_tokens": (None,),
    "rounds": (None,),
}


def _refuse(room: str | None, **options: Any) -> None:
    """Refuse options that do not belong to what is compared."""
    kind = room if room in ("memory", "reduce") else None
    for name, value in options.items():
        rooms = _ROOMS[name]
        if kind in rooms or value in (None, False, []):
            continue
        if None in rooms:
            read = "texts are read, not written," if kind == "memory" else "nothing is written"
            raise typer.BadParameter(f"{read} with --room {room}", param_hint=f"--{name.replace('_', '-')}")
        belongs = " or ".join(f"--room {each}" for each in rooms)
        raise typer.BadParameter(f"belongs to {belongs}", param_hint=f"--{name}")


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
        output.notes([warning for one in found for warning in one.warnings], files)
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
    output.record(found, out, as_json)


def _reduce(
    model: str | None,
    recipes: list[str],
    options: dict[str, Any],
    out: Path,
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure what reducers of image tokens are worth."""
    out.mkdir(parents=True, exist_ok=True)
    from tokenary.bench.reduce_room import compare_reduce

    set_threads(threads)
    names = [model] if model and Path(model).exists() else [name for name in (model or "").split(",") if name]
    with _bar() as progress:
        found = compare_reduce(names, recipes, seed=seed, progress=progress, **_given(options))
    output.record(found, out, as_json)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What was said; for the rest, the defaults of the function that is called."""
    return {name: value for name, value in options.items() if value is not None}


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)
