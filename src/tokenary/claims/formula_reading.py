"""What the claims about reducing share that are measured on a reader of formulas: pictures, arms, what is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.claims.retention import Answers, Array, Key
from tokenary.models.latex_ocr import LatexOcr, canvas, edit_distance, exact_match, formulas, render, symbols
from tokenary.reduce.base import Context, Reducer, places
from tokenary.reduce.encoder import Record, picture_numbers, recorded

_MOST = 96  # letters of a formula; some are never finished


@dataclass(frozen=True)
class Pages:
    """Formulas as pictures, the short ones first.

    Parameters
    ----------
    texts : list of str
    pixels : (n, 128, 512) uint8 Tensor
    ink : (n, N) bool Tensor
        Patches that some of the formula is drawn on.
    """

    texts: list[str]
    pixels: Tensor
    ink: Tensor


def pages(count: int, seed: int, dpi: float = 200.0, length: tuple[int, int] = (8, 20)) -> Pages:
    """Draw formulas of a seed: the first `count` of so many symbols, without sums and integrals.

    Shorter ones are read from very few tokens, whichever they are; longer ones and those two, often wrong from all.
    """
    drawn = (text for text in formulas(8 * count, seed) if length[0] <= len(symbols(text)) <= length[1])
    texts = sorted([text for text in drawn if r"\sum" not in text and r"\int" not in text][:count], key=_length)
    black = [render(text, dpi) for text in texts]
    drawn_on = torch.stack([canvas(255 - picture) for picture in black])
    ink = torch.nn.functional.max_pool2d(drawn_on.float(), 8).flatten(1) > 64
    return Pages(texts, torch.stack([canvas(picture) for picture in black]), ink)


def _length(text: str) -> int:
    return len(symbols(text))


@dataclass(frozen=True)
class Averaged(Context):
    """Context whose attention is averaged over heads and queries once: all that these methods look at.

    Attributes
    ----------
    known : dict of int to Tensor
        What was averaged so far, by layer.
    """

    known: dict[int, Tensor] = field(default_factory=dict)

    def attention(self, layer: int | None = None, rows: slice = slice(None)) -> Tensor:
        """Return the attention that tokens got, (B, 1, 1, S); from some queries only, (B, H, Q, S)."""
        layer = self.layer if layer is None else layer
        if rows != slice(None):
            return super().attention(layer, rows)
        if layer not in self.known:
            self.known[layer] = super().attention(layer).mean((1, 2), keepdim=True)
        return self.known[layer]


def see(model: LatexOcr, pixels: Tensor) -> tuple[Tensor, Context]:
    """Encode pictures (B, 128, 512): what the decoder reads (B, N, D), and what a reducer may look at."""
    encoder, record = model.encoder, Record()
    layers = range(len(encoder.blocks))
    with recorded(list(encoder.blocks), layers, frozenset(("queries", "keys")), record):
        memory = encoder(pixels)
    rows, columns = encoder.grid
    context = Averaged(
        grid=encoder.grid,
        span=(0, rows * columns),
        place=places(encoder.grid),
        queries=record.queries,
        keys=record.keys,
        scale=record.scale,
        layer=len(layers) - 1,
        n_layers=len(layers),
        samples=picture_numbers(pixels),
    )
    return memory, context


@dataclass
class Readings(Answers):
    """How well formulas were read, by arm and share kept: each (seeds, n).

    Attributes
    ----------
    right : mapping of (str, float) to array
        One minus the edit distance of symbols, a share.
    exact : mapping of (str, float) to array
        Whether all symbols are right.
    letters : list of list of int
        What is spelled with all tokens.
    """

    exact: dict[Key, Array] = field(default_factory=dict)
    letters: list[list[int]] = field(default_factory=list)

    @property
    def alike(self) -> dict[Key, Array]:
        """One minus the edit distance."""
        return self.right

    def row(self, key: Key) -> dict[str, Any]:
        """Return the figures of an arm at one share kept."""
        name, keeps = key[0], (key[1],)
        return {
            "alike": round(float(self.alike[key].mean()), 4),
            "exact": round(float(self.exact[key].mean()), 4),
            "alike_retained": self.retained(name, keeps).to_json(),
            "exact_retained": Answers(self.exact).retained(name, keeps).to_json(),
        }


@torch.no_grad()
def read(
    model: LatexOcr,
    shown: Pages,
    arms: Mapping[Key, Sequence[Reducer]],
    look: Callable[[Tensor, Context, slice], None] | None = None,
    batch: int = 8,
) -> Readings:
    """Read formulas with all tokens, with an empty page, and with fewer tokens between encoder and decoder.

    Parameters
    ----------
    model : LatexOcr
        In its mode for inference.
    shown : Pages
        What is read.
    arms : mapping of (name, share kept) to reducers
        One, or one a seed.
    look : callable, optional
        Called with the tokens, the context and the numbers of every batch of pictures.
    batch : int
        Pictures a pass.

    Notes
    -----
    With fewer tokens a reading stops at half again the letters that the longest of its batch has with all tokens.
    """
    found = Readings()
    parts: dict[Key, list[list[list[int]]]] = {key: [[] for _ in each] for key, each in arms.items()}
    for start in range(0, len(shown.texts), batch):
        numbers = slice(start, start + batch)
        memory, context = see(model, shown.pixels[numbers])
        if look is not None:
            look(memory, context, numbers)
        full = model.generate(memory, max_new_tokens=_MOST)
        found.letters += full
        limit = min(_MOST, round(1.5 * max(map(len, full))) + 4)
        for key, reducers in arms.items():
            for reducer, spelled in zip(reducers, parts[key], strict=True):
                fewer = reducer.reduce(memory, context).apply(memory)
                spelled += model.generate(fewer, max_new_tokens=limit)
    empty = model.generate(model.encoder(torch.zeros_like(shown.pixels[:1])), max_new_tokens=_MOST)
    everything = {("none", 1.0): [found.letters], ("blind", 1.0): [empty * len(shown.texts)], **parts}
    for key, runs in everything.items():
        texts = [[model.text(letters) for letters in run] for run in runs]
        pairs = [list(zip(run, shown.texts, strict=True)) for run in texts]
        found.exact[key] = np.array([[float(exact_match(*pair)) for pair in run] for run in pairs])
        found.alike[key] = np.array([[1 - edit_distance(*pair) for pair in run] for run in pairs])
    return found
