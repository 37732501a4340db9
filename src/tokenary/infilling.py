"""Blanks filled in: a template, and a model that sees both sides of a blank."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch

from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.decode.any_subset_ar import log_density
from tokenary.models import LM
from tokenary.models.text_diffusion import TextDiffusionModel
from tokenary.run import Generation, Output, Piece

_BLANK = re.compile("_{3,}")
#: What fills blanks where no recipe is named, by the kind of the model.
DEFAULT = {"any-subset": "any-subset-ar", "diffusion": None}


@dataclass(frozen=True)
class Infilled(Output):
    """A template with its blanks filled: ``text`` and ``token_ids`` are the whole.

    Parameters
    ----------
    blanks : tuple of str
        The text of each blank, in order.
    log_density : float or None
        ``log p(blanks | the rest)`` in nats, exact, of models of the kind ``any-subset``; that of temperature 1,
        whatever was sampled with.
    """

    blanks: tuple[str, ...] = ()
    log_density: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {**super().to_json(), "blanks": list(self.blanks), "log_density": self.log_density}


@dataclass(frozen=True)
class _Template:
    """Token ids with masks, and the range of positions of each blank."""

    ids: list[int]
    blanks: list[range]


def infill(
    lm: LM,
    templates: str | Sequence[str] | Sequence[Sequence[int]],
    recipe: str | Recipe | None = None,
    *,
    blank: int | Sequence[int] = 4,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    on_piece: Callable[[Piece], None] | None = None,
) -> list[Infilled]:
    """Fill the blanks of templates.

    Parameters
    ----------
    lm : LM
        Of the kind ``any-subset`` or ``diffusion``, from `load`.
    templates : str, sequence of str, or sequence of token ids
        Text with blanks ``___`` (three underscores or more), or token ids with the model's mask token where something
        is missing. A space before a blank belongs to the blank: the tokens that fill it bring their own.
    recipe : str, Recipe or None
        By default ``any-subset-ar`` for an any-subset model, the diffusion loop one token a pass for the other kind.
    blank : int or sequence of int
        Tokens a blank: one number, or one for each blank of a text.
    temperature, top_k, top_p, seed
        As in `generate`.
    batch_size : int
        Templates that run together.
    on_piece : callable, optional
        Called with every `Piece` as it comes, `row` counted over all templates. Its tokens stand at places counted
        from the first blank; its text is what is settled from there on.

    Returns
    -------
    list of Infilled
        In the order of the templates.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError, InputError, UnsupportedModelError
        Before any work is done.
    """
    if batch_size < 1:
        raise OptionError("batch_size", batch_size, "an integer at least 1")
    if lm.kind not in DEFAULT:
        raise UnsupportedModelError(
            f"{lm.name} reads left to right and cannot see behind a blank; take a model of the kind"
            f" {' or '.join(DEFAULT)}, such as wiki-any-subset"
        )
    chosen = Recipe.parse(DEFAULT[lm.kind] if recipe is None else recipe)
    rows: list[Any] = [templates] if isinstance(templates, str) else list(templates)
    parsed = [_template(lm, row, blank, number) for number, row in enumerate(rows, start=1)]
    starts = range(0, len(parsed), batch_size)
    batches = [
        Generation(
            lm,
            [template.ids for template in parsed[at : at + batch_size]],
            chosen,
            0,
            Sampler(temperature, top_k, top_p, seed, at),
        )
        for at in starts
    ]
    filled: list[Infilled] = []
    for at, batch in zip(starts, batches, strict=True):
        for piece in batch:
            if on_piece is not None:
                on_piece(replace(piece, row=piece.row + at))
        filled += [_infilled(lm, *pair) for pair in zip(parsed[at : at + batch_size], batch.outputs, strict=True)]
    return filled


def split_blanks(text: str, blank: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """Split a text at its blanks.

    Returns
    -------
    list of str, list of int
        The text around the n blanks, n + 1 parts; and how many tokens each blank takes.

    Raises
    ------
    InputError
        If there is no blank.
    OptionError
        If the sizes are not one for each blank, or one is below 1.
    """
    parts = _BLANK.split(text)
    count = len(parts) - 1
    if not count:
        raise InputError("the text has no blank: write ___ where something is missing")
    sizes = [blank] * count if isinstance(blank, int) else list(blank)
    if len(sizes) != count:
        raise OptionError("blank", blank, f"one number, or {count} of them for a text with {count} blanks")
    if any(size < 1 for size in sizes):
        raise OptionError("blank", blank, "at least 1 token a blank")
    return [*(part.removesuffix(" ") for part in parts[:-1]), parts[-1]], sizes


def _template(lm: LM, template: str | Sequence[int], blank: int | Sequence[int], number: int) -> _Template:
    """Put masks where the blanks are."""
    mask_id = lm.model.config.mask_token_id
    if isinstance(template, str):
        parts, sizes = split_blanks(template, blank)
        if lm.tokenizer is None:
            raise InputError(f"{lm.name} has no tokenizer: pass token ids instead of text")
        ids: list[int] = []
        blanks = []
        for part, size in zip(parts, [*sizes, 0], strict=True):
            ids += lm.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            blanks.append(range(len(ids), len(ids) + size))
            ids += [mask_id] * size
        blanks.pop()
    else:
        ids = list(map(int, template))
        runs = [list(run) for hidden, run in groupby(range(len(ids)), lambda i: ids[i] == mask_id) if hidden]
        blanks = [range(run[0], run[-1] + 1) for run in runs]
        if not blanks:
            raise InputError(f"template {number} has no mask token {mask_id}")
    if len(ids) > lm.context_length:
        raise InputError(f"template {number} has {len(ids)} tokens; {lm.name} has a context of {lm.context_length}")
    return _Template(ids, blanks)


def _infilled(lm: LM, template: _Template, output: Output) -> Infilled:
    """Put what was written from the first blank on behind what stands before it."""
    ids = template.ids[: template.blanks[0].start] + output.token_ids
    count = sum(map(len, template.blanks))
    density = None
    if lm.kind == "any-subset":
        masked = torch.tensor([template.ids]) == lm.model.config.mask_token_id
        density = log_density(cast(TextDiffusionModel, lm.model), torch.tensor([ids]), masked).item()
    return Infilled(
        text="" if lm.tokenizer is None else lm.decode(ids),
        token_ids=ids,
        trace=output.trace,
        stats=replace(output.stats, prompt_tokens=len(ids) - count, new_tokens=count),
        blanks=tuple("" if lm.tokenizer is None else lm.decode(ids[at.start : at.stop]) for at in template.blanks),
        log_density=density,
    )
