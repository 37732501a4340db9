"""FOCUS-like: a new token is a sparse mixture of the shared tokens that it resembles.

    E'[t] = sum over shared tokens s of sparsemax(cos(a(t), a(s)))_s E[s]

FOCUS takes its vectors a from fastText, trained on text of the new language; here they come from the spelling alone
(the character n-grams that fastText sums, untrained) or from a text encoder. Sparsemax looks at the nearest 256.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenary.core.card import Card
from tokenary.embed.base import Mixture, Transplant, pieces_of
from tokenary.embed.nearest import anchors, new_texts, shared_ids, similar
from tokenary.embed.strings import Encoder, encode_strings
from tokenary.hf.tokenizer import Vocabulary

CARD = Card(
    slug="focus",
    cls="Focus",
    room="embed",
    slot="vocabulary",
    title="FOCUS: Effective Embedding Initialization for Monolingual Specialization of Multilingual Models",
    summary="a new token is a sparse mixture of the shared tokens it resembles",
    paper="2305.14481",
    year=2023,
    code="konstantinjdobler/focus",
    baseline=True,
)
NEAREST = 256


class Focus(Transplant):
    """Mixes shared tokens by sparsemax.

    Parameters
    ----------
    encoder : {"characters", "minilm"}
        What tells how alike two tokens are.
    """

    def __init__(self, encoder: Encoder = "characters") -> None:
        self.encoder = encoder

    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Weigh shared tokens; a token that is no text, or is like none of them, gets the mean of its pieces."""
        places, texts = new_texts(target, new)
        keys = anchors(source, self.encoder, shared_ids(source, target))
        parts = pieces_of(source, target, new)
        if not texts or not len(keys.ids):
            return Mixture.of(parts)
        found = []
        for part, likeness in similar(encode_strings(self.encoder, texts), keys.vectors):
            value, place = likeness.topk(min(NEAREST, len(keys.ids)))
            weight = sparsemax(value) * (value[:, :1] > 0)
            owner = places[part].repeat_interleave(weight.shape[1])
            kept = weight.flatten() > 0
            found.append(Mixture(owner[kept], keys.ids[place].flatten()[kept], weight.flatten()[kept]))
        mixed = {owner for one in found for owner in one.owner.tolist()}
        rest = Mixture.of([[] if place in mixed else part for place, part in enumerate(parts)])
        return sum(found, start=rest)


def sparsemax(scores: Tensor) -> Tensor:
    """Project scores (..., N), sorted descending, on the simplex (Martins and Astudillo 2016, arXiv 1602.02068)."""
    ranks = torch.arange(1, scores.shape[-1] + 1)
    total = scores.cumsum(-1)
    size = (1 + ranks * scores > total).sum(-1, keepdim=True)  # of the support
    return (scores - (total.gather(-1, size - 1) - 1) / size).clamp_min(0)
