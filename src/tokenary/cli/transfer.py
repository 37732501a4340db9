"""``tokenary tokenizer transfer``: a model with another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tokenary.cli import output
from tokenary.cli.generate import DTYPE, THREADS, set_threads

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

METHOD = typer.Option(
    "tokenadapt", "--method", "-w", help="What new rows are made of, with options: tokenadapt:weight=0, zett, focus."
)


def transfer(
    model: str = typer.Argument(help="A model of `tokenary models`, a folder, a .gguf file, or a hub id org/name."),
    to: str = typer.Option(..., "--to", help="A tokenizer.json, a folder with one, or a name: gpt2, qwen2.5, a model."),
    method: str = METHOD,
    out: Path = typer.Option(Path("out/transfer"), "--out", help="An empty or new folder for model and tokenizer."),
    multiple: int = typer.Option(1, min=1, help="Pad the embedding table to a multiple of so many rows."),
    text: Path = typer.Option(None, "--text", help="UTF-8 text: bits a byte before and after are measured on it."),
    dtype: str = DTYPE,
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Give a model another tokenizer, without training; the result is an ordinary transformers folder.

    Tokens that both vocabularies have keep their rows. [bold]tokenadapt[/bold] mixes the others from their old pieces
    and from old tokens of like meaning, [bold]zett[/bold] predicts them with a network that was trained for SmolLM2
    ([bold]zett:steps=2000[/bold] trains a simple one for any model); [bold]mean-of-pieces[/bold], [bold]focus[/bold],
    [bold]omp[/bold] and [bold]random-rows[/bold] are there to compare with. Special tokens, their roles and the chat
    template stay those of the model. Expect the model to be worse at first where many tokens are new: give --text, and
    train on.

    Example: [bold]tokenary tokenizer transfer smollm2 --to gpt2 --text book.txt --out out/smollm2-gpt2[/bold]
    """
    from tokenary.core.errors import InputError, UnknownNameError
    from tokenary.core.recipe import Step
    from tokenary.core.registry import cards

    step = Step.parse(method)
    if step.card.slot != "vocabulary":
        raise UnknownNameError("method of transfer", step.slug, [card.slug for card in cards(room="embed")])
    chosen = step.build()
    read = _read(text) if text else ""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder: name another with --out")
    tokenizer = _tokenizer(to)

    from tokenary.embed.apply import save, vocabularies
    from tokenary.embed.apply import transfer as run
    from tokenary.embed.base import copied, new_ids, pieces_of
    from tokenary.models import load

    set_threads(threads)
    lm = load(model, dtype=dtype, progress=not as_json)
    moved = run(lm, tokenizer, chosen, multiple)
    source, target, _ = vocabularies(lm, tokenizer, multiple)
    new = new_ids(target, copied(source, target))
    lost = sum(not part for part in pieces_of(source, target, new))
    facts: dict[str, object] = {
        "folder": str(out), "model": lm.name, "to": to, "method": method, "rows_before": source.rows,
        "rows": target.rows, "new": len(new), "unspelled": lost, "fingerprint": moved.fingerprint,
    }  # fmt: skip
    if read:
        from tokenary.bench.bits import bits_of, windows

        count = max(1, min(16, len(read) // 1300))
        texts = windows(read, count)
        before, after = bits_of(lm, texts), bits_of(moved, texts, set(new))
        facts |= {
            "bits_a_byte_before": float(before.per_byte.mean()),
            "bits_a_byte": float(after.per_byte.mean()),
            "tokens_before": before.tokens,
            "tokens": after.tokens,
            "running_new": after.parts["new"]["tokens"] / after.tokens,
            "windows": count,
        }
    save(moved, out)
    if as_json:
        output.as_json(facts)
        return
    typer.echo(f"{out}: {lm.name} with {target.rows:,} tokens, {len(new):,} of them new ({method})")
    if lost:
        output.note(f"note: {lost:,} of the new tokens cannot be written with the old ones")
    if read:
        typer.echo(
            f"bits a byte {facts['bits_a_byte']:.3f} instead of {facts['bits_a_byte_before']:.3f}, {after.tokens:,}"
            f" tokens instead of {before.tokens:,} ({facts['running_new']:.0%} of them new); {count} pieces of {text}"
        )


def _tokenizer(name: str) -> PreTrainedTokenizerBase | Tokenizer:
    """Load a tokenizer by path with its roles, or by name."""
    from tokenary.embed.apply import load_target
    from tokenary.tokenize.base import load_tokenizer

    return load_target(name) if Path(name).exists() else load_tokenizer(name).tokenizer


def _read(path: Path) -> str:
    from tokenary.core.errors import InputError

    try:
        read = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
    if len(read) < 1300:
        raise InputError(f"{path}: {len(read)} characters are too few to measure on, 1,300 at least")
    return read
