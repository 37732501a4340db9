"""``tokenary infill``: the blanks of a text, filled in from both sides."""

from __future__ import annotations

import typer

from tokenary.cli import output
from tokenary.cli.generate import DTYPE, THREADS, read_prompt, set_threads

MODEL = typer.Option(
    "wiki-any-subset",
    "--model",
    "-m",
    help="A model that sees both sides of a blank: wiki-any-subset, wiki-diffusion, or a folder of one.",
)


def infill(
    template: str = typer.Argument(help="Text with ___ (three underscores or more) for each blank; - reads stdin."),
    model: str = MODEL,
    recipe: list[str] = typer.Option([], "--with", help="A method with options, e.g. any-subset-ar:k=8."),
    blank: list[int] = typer.Option([4], "--blank", "-b", min=1, help="Tokens a blank; repeat it, one for each blank."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy; 1 draws from the model's own distribution."),
    top_k: int = typer.Option(0, min=0, help="Sample among the k likeliest tokens; 0 for all."),
    top_p: float = typer.Option(1.0, help="Sample among the likeliest tokens of this joint probability."),
    seed: int = typer.Option(0, help="The same seed gives the same text."),
    dtype: str = DTYPE,
    threads: int = THREADS,
    as_json: bool = output.JSON,
) -> None:
    """Fill the blanks of a text; the text goes to stdout, what it cost to stderr.

    A blank takes a fixed number of tokens, about three quarters of a word each. An any-subset model (the default) sees
    the text on both sides of every blank, drafts several tokens a round and verifies them itself: what it writes is
    distributed as if drawn token by token, in fewer passes, and its log-density is exact. [bold]--with
    any-subset-ar:k=1[/bold] draws token by token, [bold]--with any-subset-ar:verify=false[/bold] shows what drafts
    without verification are like.

    Example: [bold]tokenary infill "The ___ sat on the ___ and slept." --blank 1 --blank 3 --temperature 0.7[/bold]
    """
    from tokenary.core.recipe import Recipe
    from tokenary.core.sampling import Sampler

    # what is wrong shows before the weights are read
    chosen = Recipe.parse(recipe).for_writing() if recipe else None
    text, sizes = read_prompt(template), blank[0] if len(blank) == 1 else blank
    Sampler(temperature, top_k, top_p, seed)
    if chosen is not None:
        chosen.build()
    import tokenary
    from tokenary.infilling import split_blanks

    split_blanks(text, sizes)
    set_threads(threads)
    lm = tokenary.load(model, dtype=dtype, progress=not as_json)
    filled = tokenary.infill(
        lm, text, chosen, blank=sizes, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )[0]  # fmt: skip
    if as_json:
        output.as_json({**filled.to_json(), "model": lm.name, "fingerprint": lm.fingerprint, "seed": seed})
        return
    typer.echo(filled.text)
    stats, passes = filled.stats, filled.trace.passes
    density = "" if filled.log_density is None else f", log-density {filled.log_density:.2f} nats"
    output.note(
        f"[{stats.recipe}: {stats.new_tokens} tokens in {len(filled.blanks)} blanks, {passes} passes"
        f" ({stats.new_tokens / passes:.2f} tokens a pass){density}]"
    )
