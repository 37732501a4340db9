"""``tokenary probe``: many small questions to a model, and what the answers say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.cli import output
from tokenary.cli.generate import DTYPE, MODEL, THREADS, set_threads

if TYPE_CHECKING:
    from tokenary.models import LM
    from tokenary.probe.base import Probe, Report


def probe(
    method: str = typer.Argument(
        metavar="SLUG", help="A probe, with options if you like: tokenization-consistency:trials=20."
    ),
    model: str = MODEL,
    seed: int = typer.Option(0, help="Of every random draw."),
    out: Path = typer.Option(None, "--out", help="A file for the report, JSON."),
    dtype: str = DTYPE,
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Probe a model: what its tokens hold, and where it breaks; see [bold]tokenary methods --room probe[/bold].

    Example: [bold]tokenary probe tokenization-consistency:trials=20 --model smollm2[/bold]
    """
    from tokenary.core.errors import InputError, UnknownNameError
    from tokenary.core.recipe import Step
    from tokenary.core.registry import cards

    step = Step.parse(method)
    probes = [card.slug for card in cards(room="probe")]
    if step.slug not in probes:
        raise UnknownNameError("probe", step.slug, probes)
    chosen = step.build()
    if out is not None:  # what cannot be written shows before minutes of work
        if out.is_dir():
            raise InputError(f"{out} is a folder: name a file with --out")
        out.parent.mkdir(parents=True, exist_ok=True)

    import tokenary

    set_threads(threads)
    lm = tokenary.load(model, dtype=dtype, progress=not as_json)
    report = _run(chosen, lm, seed)
    found = {**report.to_json(), "options": dict(chosen.options), "seed": seed, "fingerprint": lm.fingerprint}
    if out is not None:
        output.write_text(out, json.dumps(found, indent=1, ensure_ascii=False, default=str) + "\n")
    if as_json:
        output.as_json(found)
        return
    for table in report.tables:
        typer.echo(table.title)
        output.table(table.columns, [[_cell(value) for value in row] for row in table.rows])
        typer.echo()
    for note in report.notes:
        typer.echo(note)
    if out is not None:
        typer.echo(f"\n{out}")


def _run(chosen: Probe, lm: LM, seed: int) -> Report:
    """Run with a progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(chosen.card.slug, total=None)
        return chosen.run(lm, seed, lambda done, total: bar.update(task, completed=done, total=total))


def _cell(value: Any) -> str:
    """Write a cell: numbers so that a reader can take them in, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
