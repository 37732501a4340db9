"""``tokenary batch``: a file of requests to a file of answers, without a server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from tokenary.cli import output
from tokenary.cli.generate import DTYPE, MODEL, THREADS
from tokenary.cli.serve import ADDRESS, ENGINE, GPUS, REPLICAS

_MONTH = 30 * 86_400.0  # nobody waits for an answer; a line may set tokenary.deadline
_MOST_TEXTS = 32  # of a line: prompts times choices


def batch(
    file: Path = typer.Argument(
        help='JSON lines: OpenAI\'s batch lines, or plain {"prompt": ...} or {"messages": ...}.'
    ),
    out: Path = typer.Option(None, "--out", "-o", help="File of answers; by default FILE's name with .out.jsonl."),
    model: str = MODEL,
    name: str = typer.Option("", "--name", help="What the lines call the model; by default its own name."),
    recipe: list[str] = typer.Option([], "--with", help="A method for all lines that name none; repeat to compose."),
    max_new_tokens: int = typer.Option(
        512, "--max-new-tokens", "-n", min=1, help="Most tokens where a line is silent."
    ),
    width: int = typer.Option(8, "--batch", min=1, help="Texts of a recipe that a model writes together."),
    engine: str = ENGINE,
    replicas: int = REPLICAS,
    address: str = ADDRESS,
    gpus: float = GPUS,
    dtype: str = DTYPE,
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Answer a file of requests, a line each, as the server would.

    Each line gives one line, with its custom_id and a response or an error, in the order in which they end. Ctrl-C
    loses nothing: run it again, and it goes on with what does not stand in OUT.

    Example: [bold]tokenary batch questions.jsonl --with token-recycling[/bold]
    """
    from tokenary.core.errors import InputError
    from tokenary.core.recipe import Recipe
    from tokenary.serve.settings import Settings

    chosen = str(Recipe.parse(recipe).for_writing()) if recipe else ""
    out = file.with_suffix(".out.jsonl") if out is None else out
    at_once = 2 * width * replicas
    jobs = _MOST_TEXTS * at_once
    options = {"model": model, "dtype": dtype, "threads": threads, "max_batch": width, "max_waiting": jobs}
    settings = Settings(
        model=model, name=name, deadline=_MONTH, max_jobs=jobs, max_new_tokens=max_new_tokens,
        engine_options=options,
        backend=engine, replicas=replicas, address=address, gpus=gpus,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        from tokenary.serve.batch import run_batch
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "prometheus_client", "starlette"):
            raise
        raise InputError(f"a batch needs {error.name}: pip install 'tokenary[serve]'") from None
    try:
        with contextlib.redirect_stdout(sys.stderr), _bar() as progress:  # Ray tells of deaths on stdout
            done = run_batch(settings, file, out, recipe=chosen, at_once=at_once, progress=progress)
    except KeyboardInterrupt:
        output.note(f"what was answered stands in {out}; run it again to go on")
        raise
    rate = done.new_tokens / done.seconds if done.seconds else 0.0
    if as_json:
        output.as_json({**vars(done), "tokens_per_second": rate, "out": str(out)})
        return
    stood = f", {done.stood} stood already" if done.stood else ""
    refused = f", {done.refused} errors" if done.refused else ""
    output.note(f"{done.answered} answers{refused}{stood} in {out}: {done.new_tokens} tokens, {rate:.1f} a second")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int], None]]:
    """Draw lines done and the time left on stderr, where that is a terminal; first comes how many there are to do."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = ("[bold]lines[/bold]", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(lines: int) -> None:
            if bar.tasks[0].total is None:
                bar.update(task, total=lines)
            else:
                bar.advance(task, lines)

        yield progress
