"""``tokenary generate``: one text, as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from tokenary.cli import output

if TYPE_CHECKING:
    from tokenary.run import Output, Piece

MODEL = typer.Option(
    "smollm2", "--model", "-m", help="A name of `tokenary models`, a folder, a .gguf file or a hub id."
)
DTYPE = typer.Option("auto", "--dtype", help="auto, bfloat16, float32, ...; auto is bfloat16 where the machine has it.")
THREADS = typer.Option(None, "--threads", min=1, help="CPU threads; all cores by default.")


def read_prompt(prompt: str) -> str:
    """Return the prompt, or what stands on stdin for ``-``.

    Raises
    ------
    InputError
        If it is no UTF-8.
    """
    from tokenary.core.errors import InputError

    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        prompt.encode("utf-8")  # bytes that were no UTF-8 stand in it as lone surrogates
    except UnicodeError:
        raise InputError("the prompt is not UTF-8") from None
    return prompt


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def generate(
    prompt: str = typer.Argument(help="The user's message; - reads stdin."),
    model: str = MODEL,
    recipe: list[str] = typer.Option([], "--with", help="A method with options; repeat to compose methods."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", "-n", min=1, help="Most tokens to write."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_k: int = typer.Option(0, min=0, help="Sample among the k likeliest tokens; 0 for all."),
    top_p: float = typer.Option(1.0, help="Sample among the likeliest tokens of this joint probability."),
    seed: int = typer.Option(0, help="The same seed gives the same text, whatever the drafts."),
    raw: bool = typer.Option(False, "--raw", help="Continue the text, without a chat template."),
    stop: list[str] = typer.Option([], "--stop", help="A text that ends the answer; may be repeated."),
    dtype: str = DTYPE,
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Generate a text; it streams to stdout, what it cost goes to stderr.

    Example: [bold]tokenary generate "Why is the sky blue?" --with token-recycling --with keyformer:keep=50%[/bold]
    """
    from tokenary.cli.branches import Branches, print_branches
    from tokenary.core.errors import InputError
    from tokenary.core.recipe import Recipe

    chosen = Recipe.parse(recipe).for_writing()
    text = read_prompt(prompt)
    if not text.strip():
        raise InputError("the prompt is empty")
    from tokenary.core.sampling import Sampler

    Sampler(temperature, top_k, top_p, seed)
    chosen.build()  # a wrong option shows before the weights are read
    import tokenary

    set_threads(threads)
    lm = tokenary.load(model, dtype=dtype, progress=not as_json)

    branches = Branches()

    def show(piece: Piece) -> None:
        if piece.branch is not None or branches.texts:
            branches.add(piece)
        else:
            sys.stdout.write(piece.text)
            sys.stdout.flush()

    try:
        written = tokenary.generate(
            lm, text, chosen, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, raw=raw, stop=stop, on_piece=None if as_json else show,
        )[0]  # fmt: skip
    finally:
        branches.close()
    if as_json:
        output.as_json({**written.to_json(), "model": lm.name, "fingerprint": lm.fingerprint, "seed": seed})
        return
    if written.branches:  # the answer waited, so as not to run into them on a terminal
        if written.token_ids != [token for branch in written.branches for token in branch.token_ids]:
            print_branches(written.branches)
        sys.stdout.write(written.text)
    print(flush=True)
    output.note(_cost(written))


def _cost(written: Output) -> str:
    """Say what a text cost, in one line."""
    stats, trace, tokens = written.stats, written.trace, written.written
    per_pass = trace.tokens_per_pass if trace.fills else (tokens - 1) / trace.passes if trace.passes else 1.0
    several = f" in {len(written.branches)} texts" if written.branches else ""
    return (
        f"[{stats.recipe}: {tokens} tokens{several}, {tokens / max(stats.seconds, 1e-9):.1f} tokens/s,"
        f" {per_pass:.2f} tokens a pass, first token after {stats.first_token_seconds:.2f} s,"
        f" {output.size(stats.kv_bytes)} of keys and values, {stats.finish}]"
    )
