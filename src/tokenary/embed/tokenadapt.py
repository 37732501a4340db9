"""TokenAdapt: a new token is made of its old pieces and of old tokens that mean the same.

    local   c_p = (softmax_p(cos(e(t), e(p))) + len(p) / len(t)) / 2,   L = sum_p softmax_p(c_p / T) E[p]
    global  q_j = cos(e(t), e(j)), the k largest over the old vocabulary,  G = sum_j softmax_j(q_j / T) E[j]
    E'[t] = (1 - w) L + w G

e is a text encoder, p runs over the pieces of t. Unlike the published code, tokens are shared by their bytes, not by
how a vocabulary writes them, and a token that is a part of a character (many look alike once decoded) is mixed from its
bytes by length alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.embed.base import Mixture, Transplant, pieces_of
from tokenary.embed.nearest import CHUNK, Anchors, anchors, new_texts, similar
from tokenary.embed.strings import Encoder, encode_strings
from tokenary.hf.tokenizer import Vocabulary

CARD = Card(
    slug="tokenadapt",
    cls="TokenAdapt",
    room="embed",
    slot="vocabulary",
    title="Achieving Tokenizer Flexibility in Language Models through Heuristic Adaptation and Supertoken Learning",
    summary="swaps a model's tokenizer without training: new tokens mix their old pieces and their nearest old tokens",
    paper="2505.09738",
    year=2025,
    code="Tinycompany-AI/tokenadapt",
)


class TokenAdapt(Transplant):
    """Mixes a local and a global estimate.

    Parameters
    ----------
    weight : float
        Of the global estimate; 0 is local only, 1 global only.
    temperature : float
        T of both softmaxes; the published code has 0.3, the paper reports 0.6.
    k : int
        Old tokens of the global estimate.
    threshold : float
        Old tokens less similar than this count for nothing.
    encoder : {"minilm", "characters"}
        The text encoder, or the spelling alone.
    rescale : bool
        Give each new row the mean length of its parts, which a mean of them lacks. Not in the paper.
    """

    toy_options: ClassVar[dict[str, str]] = {"encoder": "characters"}

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0, le=1)] = 0.3,
        temperature: Annotated[float, Field(gt=0)] = 0.3,
        k: Annotated[int, Field(ge=1, le=1000)] = 3,
        threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0,
        encoder: Encoder = "minilm",
        rescale: bool = False,
    ) -> None:
        self.weight, self.temperature, self.k = weight, temperature, k
        self.threshold, self.encoder, self.rescale = threshold, encoder, rescale
        self.reads_rows = rescale

    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Combine both estimates; where one is missing, the other stands alone."""
        places, texts = new_texts(target, new)
        keys = anchors(source, self.encoder)
        vectors = torch.zeros(len(new), keys.vectors.shape[1]).index_copy(
            0, places, encode_strings(self.encoder, texts)
        )
        local = self._local(source, target, new, vectors, keys)
        near = self._global(places, vectors[places], keys)
        has = [torch.zeros(len(new)).index_fill(0, one.owner, 1.0) for one in (local, near)]
        share = self.weight * has[1] / (self.weight * has[1] + (1 - self.weight) * has[0]).clamp_min(1e-9)
        share = torch.where(has[0] == 0, has[1], share)
        mixed = local.scaled(1 - share) + near.scaled(share)
        return _rescaled(mixed, len(new), rows) if self.rescale else mixed

    def _local(
        self, source: Vocabulary, target: Vocabulary, new: Sequence[int], vectors: Tensor, keys: Anchors
    ) -> Mixture:
        """Weigh the pieces of each token by likeness and length."""
        mixture = Mixture.of(pieces_of(source, target, new))
        owner, index = mixture.owner, mixture.index
        place = torch.full((source.size,), -1).index_copy(0, keys.ids, torch.arange(len(keys.ids)))[index]
        read = (place >= 0) & (vectors.norm(dim=-1) > 0)[owner]  # both are text
        pairs = zip(owner.split(CHUNK), place.clamp_min(0).split(CHUNK), strict=True)
        likeness = torch.cat([(vectors[o] * keys.vectors[p]).sum(-1) for o, p in pairs]) * read
        some = torch.zeros(len(new), dtype=torch.bool).index_put((owner[read],), torch.tensor(True))
        kept = read | ~some[owner]  # a piece that is no text counts only where none is
        mixture = Mixture(owner[kept], index[kept], mixture.weight[kept])
        lengths = torch.tensor([len(source.text(int(i)) or source.spellings[int(i)]) for i in mixture.index]).float()
        whole = torch.zeros(len(new)).index_add(0, mixture.owner, lengths)[mixture.owner]
        score = (mixture.softmax(likeness[kept], len(new)) + lengths / whole) / 2
        return Mixture(mixture.owner, mixture.index, mixture.softmax(score / self.temperature, len(new)))

    def _global(self, places: Tensor, vectors: Tensor, keys: Anchors) -> Mixture:
        """Weigh the nearest old tokens by likeness."""
        k = min(self.k, len(keys.ids))
        found = Mixture.of([])
        for part, likeness in similar(vectors, keys.vectors):
            value, place = likeness.topk(k)
            weight = (value / self.temperature).softmax(-1) * (value >= self.threshold)
            total = weight.sum(-1, keepdim=True)
            kept = ((weight > 0) & (total > 0)).flatten()
            weight = (weight / total.clamp_min(1e-30)).flatten()[kept]
            found += Mixture(places[part].repeat_interleave(k)[kept], keys.ids[place].flatten()[kept], weight)
        return found


def _rescaled(mixture: Mixture, count: int, rows: Tensor) -> Mixture:
    """Scale each sum (of `count`) to the weighted mean length of its parts."""
    lengths = torch.zeros(count).index_add(0, mixture.owner, mixture.weight * rows.norm(dim=-1)[mixture.index])
    sums = torch.zeros(count, rows.shape[1])
    sums.index_add_(0, mixture.owner, mixture.weight[:, None] * rows[mixture.index])
    return mixture.scaled(lengths / sums.norm(dim=-1).clamp_min(1e-12))
