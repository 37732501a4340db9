"""``tokenary store``: what drafting methods count from text beforehand."""

from __future__ import annotations

from pathlib import Path

import typer

from tokenary.cli import output
from tokenary.cli.generate import MODEL

app = typer.Typer(
    no_args_is_help=True,
    help="Trigram stores of the method aded.\n\nExample: [bold]tokenary store build code.safetensors a.py b.py[/bold]",
)


@app.callback()
def _group() -> None:
    pass


@app.command("build")
def build(
    out: Path = typer.Argument(help="The file to write, .safetensors."),
    files: list[Path] = typer.Argument(None, help="More text files, UTF-8."),
    text: list[Path] = typer.Option([], "--text", help="A text file, UTF-8; may be repeated."),
    model: str = MODEL,
    keep: int = typer.Option(12, min=1, help="Successors kept for each pair of tokens."),
    as_json: bool = output.JSON,
) -> None:
    """Count the trigrams of text files with a model's tokenizer.

    Example: [bold]tokenary store build prose.safetensors --text book.txt[/bold], then
    [bold]tokenary generate "..." --with aded:store=prose.safetensors[/bold]
    """
    from tokenary.core.errors import InputError

    paths = [*text, *(files or [])]
    if not paths:
        raise InputError("no text files: give them with --text")
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: a store is a .safetensors file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"no such folder: {out.absolute().parent}")
    texts = [_read(path) for path in paths]

    from tokenary.decode.aded import count_text
    from tokenary.models import load

    lm = load(model, progress=not as_json)
    if lm.tokenizer is None:
        raise InputError(f"{lm.name} has no tokenizer")
    store = count_text(lm.tokenizer, "\n".join(texts), keep)
    store.save(out)
    facts = {"file": str(out), "pairs": len(store), "bytes": store.nbytes, "model": lm.name}
    if as_json:
        output.as_json(facts)
    else:
        typer.echo(f"{out}: {len(store):,} pairs of tokens, {output.size(store.nbytes)}")


def _read(path: Path) -> str:
    from tokenary.core.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
