"""What methods share that compare strings: the anchors, old tokens with a text, and their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenary.embed.strings import Encoder, encode_strings
from tokenary.hf.tokenizer import Vocabulary

CHUNK = 1024  # new tokens that are compared at a time


@dataclass(frozen=True)
class Anchors:
    """Old tokens that new ones are compared with.

    Attributes
    ----------
    ids : Tensor
        (A,) int64, old ids.
    vectors : Tensor
        (A, C) float32, unit length.
    """

    ids: Tensor
    vectors: Tensor


def anchors(source: Vocabulary, encoder: Encoder, among: Sequence[int] | None = None) -> Anchors:
    """Encode the ordinary old tokens that are text, or those `among` given ids."""
    ids = [i for i in (range(source.size) if among is None else among) if source.text(i)]
    return Anchors(torch.tensor(ids, dtype=torch.int64), encode_strings(encoder, [source.text(i) or "" for i in ids]))


def shared_ids(source: Vocabulary, target: Vocabulary) -> list[int]:
    """Return the old ids of tokens that both vocabularies have, ascending."""
    return sorted({source.id_of[data] for data in target.spellings if data in source.id_of})


def new_texts(target: Vocabulary, new: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Return places in `new` of the tokens that are text, (M,) int64, and their texts; parts of characters are not."""
    found = [(place, text) for place, i in enumerate(new) if (text := target.text(i) or target.special.get(i))]
    return torch.tensor([place for place, _ in found], dtype=torch.int64), [text for _, text in found]


def similar(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the inner products of queries (M, C) and keys (A, C), some rows at a time: which, and (rows, A)."""
    for start in range(0, len(queries), CHUNK):
        part = slice(start, min(start + CHUNK, len(queries)))
        yield part, queries[part] @ keys.T
