"""Retrofitting (Large) Language Models with Dynamic Tokenization (2024, arXiv 2411.18553).

A fixed vocabulary cuts rare domains and languages into too many tokens. Start from the usual tokens of a batch, merge
the neighbours that are most frequent *in this batch*, so that its own words become single tokens, and make an embedding
for each on the fly; no vocabulary is kept::

    repeat   (a, b) = the most frequent pair that may merge;  every (a, b) -> one token
    row      of a merged token = f(rows of its parts);        rows of all others are the model's own

A merge is at most as wide as its boundary allows (`PairRules`). How many merges to make is read off the curve of a
batch that is merged to its limit: the fewest that reach a share of the reachable reduction.

The paper trains a hypernetwork for f; any callable from parts to rows fits here (``predict=``). Without one, the rows
of a merged token are the mean of its parts (FVT, a map `Segment` and nothing else), the last part, or the mean plus a
ridge regression fitted on the vocabulary's own merges. Every batch returns its `Segment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.method import Method
from tokenary.tokenize.backend import as_text_tokenizer
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.dynamic_tokenization.large import LargeVocabulary, OutputIndex, generate
from tokenary.tokenize.dynamic_tokenization.merging import Merged, merge_batch, merges_for
from tokenary.tokenize.dynamic_tokenization.rows import Predictor, RowCache, last_part, ridge_of_parts
from tokenary.tokenize.dynamic_tokenization.rules import Boundary, PairRules

__all__ = [
    "DynamicTokenization",
    "LargeVocabulary",
    "Merged",
    "OutputIndex",
    "PairRules",
    "Predictor",
    "RowCache",
    "generate",
    "merge_batch",
    "merges_for",
]

CARD = Card(
    slug="dynamic-tokenization",
    cls="DynamicTokenization",
    room="tokenize",
    slot="retokenize",
    title="Retrofitting (Large) Language Models with Dynamic Tokenization",
    summary="shortens the input of an existing model by merging the tokens that are frequent neighbours in this batch",
    paper="2411.18553",
    year=2024,
    code="DariusFeher/dynamic-tokenization",
)


class DynamicTokenization(Method):
    """Merges frequent neighbours of a batch, and embeds what comes out.

    Parameters
    ----------
    share : float
        How much of the reachable reduction to take: 0 changes nothing, 1 merges up to the boundary.
    merges : int
        So many merges instead; -1 leaves it to `share`.
    boundary : {"pretokens", "word", "word-hyphen", "sentence"}
        What no merged token reaches beyond; see `PairRules`.
    rows : {"mean", "last", "ridge"}
        What the row of a merged token is made of, where no hypernetwork is given.
    cache : int
        Predicted rows that are kept from batch to batch.
    """

    def __init__(
        self,
        share: Annotated[float, Field(ge=0, le=1)] = 0.5,
        merges: Annotated[int, Field(ge=-1)] = -1,
        boundary: Boundary = "pretokens",
        rows: Literal["mean", "last", "ridge"] = "mean",
        cache: Annotated[int, Field(ge=1)] = 65_536,
    ) -> None:
        self.share, self.merges, self.boundary = share, merges, boundary
        self.rows, self.cache = rows, cache

    def rules(self, tokenizer: Any) -> PairRules:
        """Return the rules of merging for a tokenizer; keep them, they remember what they were asked."""
        return PairRules(as_text_tokenizer(tokenizer), self.boundary)

    def retokenize(self, rows: Sequence[Sequence[int]], rules: PairRules) -> Merged:
        """Merge a batch of token ids."""
        if self.merges >= 0:
            return merge_batch(rows, rules, self.merges)
        if not self.share:
            return merge_batch(rows, rules, 0)
        limit = merge_batch(rows, rules)
        return limit.after(merges_for(limit.lengths, self.share))

    def attach(self, model: Any, tokenizer: Any, predict: Predictor | None = None) -> DynamicInputs:
        """Return what turns token ids into inputs of a model.

        Parameters
        ----------
        model : PreTrainedModel
            Left as it is.
        tokenizer : TextTokenizer, Tokenizer or transformers tokenizer
            Its tokenizer.
        predict : callable, optional
            Rows (K, D) of K merged tokens from their parts, such as a hypernetwork's; in the scale of the model's
            ``get_input_embeddings()(ids)``. Takes the place of `rows`.

        Raises
        ------
        UnsupportedModelError
            A model without input embeddings, or with fewer of them than the tokenizer has tokens.
        """
        return DynamicInputs(self, model, as_text_tokenizer(tokenizer), predict)


class DynamicInputs:
    """Merged batches as inputs of one model: ``model(**inputs)`` or ``model.generate(**inputs)``."""

    def __init__(
        self, method: DynamicTokenization, model: Any, tokenizer: TextTokenizer, predict: Predictor | None = None
    ) -> None:
        embedding = model.get_input_embeddings()
        if embedding is None or not hasattr(embedding, "weight"):
            raise UnsupportedModelError(f"{type(model).__name__} has no input embeddings")
        if embedding.weight.shape[0] < tokenizer.id_limit:
            raise UnsupportedModelError(
                f"the model has {embedding.weight.shape[0]} embeddings, its tokenizer {tokenizer.id_limit} tokens"
            )
        self.method, self.tokenizer, self.embedding = method, tokenizer, embedding
        self.rules = method.rules(tokenizer)
        if predict is None and method.rows != "mean":  # the mean is what the token map gives
            with torch.no_grad():  # through the module: some scale their rows
                rows = embedding(torch.arange(tokenizer.id_limit, device=embedding.weight.device))
            predict = ridge_of_parts(rows, tokenizer) if method.rows == "ridge" else last_part(rows)
        self.cache = None if predict is None else RowCache(predict, method.cache)

    def __call__(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left"
    ) -> tuple[dict[str, Tensor], Merged]:
        """Merge and embed a batch.

        Parameters
        ----------
        rows : sequence of sequences of int
            Token ids with their special tokens, without padding.
        side : {"left", "right"}
            Where shorter sequences are padded: left for a model that goes on writing.

        Returns
        -------
        dict, Merged
            ``inputs_embeds`` (B, M, D), ``attention_mask`` and ``position_ids`` (B, M), positions counting merged
            tokens; and the batch as merged.
        """
        merged = self.method.retokenize(rows, self.rules)
        return self.embed(merged, side), merged

    def embed(self, merged: Merged, side: Literal["left", "right"] = "left") -> dict[str, Tensor]:
        """Return the inputs of a merged batch."""
        device = self.embedding.weight.device
        mapping = merged.token_map(side).to(device)
        ids = torch.zeros(mapping.assign.shape, dtype=torch.int64, device=device)
        ids[mapping.assign >= 0] = torch.tensor([id for row in merged.original() for id in row], device=device)
        with torch.no_grad():
            embeds = mapping.apply(self.embedding(ids))
            if self.cache is not None:
                self._predict(self.cache, embeds, merged, side)
        mask = mapping.sizes() > 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        return {"inputs_embeds": embeds, "attention_mask": mask.long(), "position_ids": positions}

    @staticmethod
    def _predict(cache: RowCache, embeds: Tensor, merged: Merged, side: str) -> None:
        """Write predicted rows over the means of merged tokens."""
        width = embeds.shape[1]
        where = [
            (b, n + (width - len(row) if side == "left" else 0), merged.parts(id))
            for b, row in enumerate(merged.rows)
            for n, id in enumerate(row)
            if id >= merged.base
        ]
        if where:
            batch, place, parts = zip(*where, strict=True)
            embeds[list(batch), list(place)] = cache.look_up(parts).to(embeds)
