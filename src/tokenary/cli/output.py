"""What all commands print with: tables, JSON, and a number a reader can take in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenary.core.files import written_whole

if TYPE_CHECKING:
    from tokenary.bench.record import ComparisonRecord

JSON = typer.Option(False, "--json", help="Print JSON for a program to read.")


def as_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def note(text: str) -> None:
    """Print one line on stderr: what is not the result itself."""
    print(text, file=sys.stderr)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    draw(made)


def draw(renderable: Any) -> None:
    """Print something of rich on stdout, as wide as the terminal; where there is none, 160 columns."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width, highlight=False).print(renderable)


def record(found: ComparisonRecord, out: Path, json: bool) -> None:
    """Write a record and its report to a folder, and print it; one that was interrupted ends with 130.

    Raises
    ------
    InputError
        The folder cannot be written.
    """
    files = found.write(out)
    if json:
        as_json(found.to_json())
    else:
        draw(found.table())
        notes(found.warnings, files)
    if not found.complete:
        raise typer.Exit(130)


def notes(warnings: Iterable[str], files: Iterable[Path]) -> None:
    """Print what to know before trusting a table, and where the files lie."""
    for warning in warnings:
        note(f"note: {warning}")
    typer.echo("\n" + "\n".join(map(str, files)))


def size(n_bytes: float) -> str:
    """Say a number of bytes, decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as stream:
        stream.write(text.encode())
