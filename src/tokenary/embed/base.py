"""The protocol of transplants: which rows are copied, and of what the others are made.

    E'[t] = E[s]                 where s spells the same bytes, is the same special token, or plays its role
    E'[t] = sum_j w_tj E[j]      else, the weights being the method's

Spare rows of the new table (padding, holes) take those of the old one in turn; where it has none, the mean of some
rows, whose probability is at most the mean of theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenary.core.errors import InputError
from tokenary.core.method import Method
from tokenary.core.token_map import Select, Sparse, TokenMap
from tokenary.hf.tokenizer import Vocabulary

_SAMPLE = 64  # rows that a row without any source is the mean of


@dataclass(frozen=True)
class Mixture:
    """Weighted sums of old rows, one a new token.

    Attributes
    ----------
    owner : Tensor
        (K,) int64, which of the new tokens a part belongs to.
    index : Tensor
        (K,) int64, the old row.
    weight : Tensor
        (K,) float.
    """

    owner: Tensor
    index: Tensor
    weight: Tensor

    @staticmethod
    def of(parts: Sequence[Sequence[int]]) -> Mixture:
        """Make the plain mean of some old rows for each new token; none for an empty list."""
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(parts)), sizes)
        index = torch.tensor([i for part in parts for i in part], dtype=torch.int64)
        return Mixture(owner, index, (1.0 / sizes.clamp_min(1))[owner])

    def softmax(self, scores: Tensor, count: int) -> Tensor:
        """Return the softmax of scores (K,) over the parts of each of `count` new tokens."""
        top = torch.full((count,), -torch.inf).scatter_reduce(0, self.owner, scores, "amax")
        raised = (scores - top[self.owner]).exp()
        return raised / torch.zeros(count).index_add(0, self.owner, raised)[self.owner]

    def scaled(self, factor: Tensor) -> Mixture:
        """Multiply the parts of each new token by its factor (N,)."""
        return Mixture(self.owner, self.index, self.weight * factor[self.owner])

    def __add__(self, other: Mixture) -> Mixture:
        pairs = zip((self.owner, self.index, self.weight), (other.owner, other.index, other.weight), strict=True)
        return Mixture(*(torch.cat(pair) for pair in pairs))


class Transplant(Method):
    """Base of all methods that give a model another vocabulary.

    Attributes
    ----------
    reads_rows : bool
        Whether the weights depend on the rows, so that an untied head gets a map of its own.
    toy_options : mapping
        Options for toy nets: nothing is downloaded, nothing trained for long.
    """

    reads_rows: bool = False
    toy_options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Say what the rows of new tokens are made of.

        Parameters
        ----------
        source, target : Vocabulary
            The old and the new one.
        new : sequence of int
            Ids of `target` that have no row to copy, ascending; special tokens among them are cut as their text.
        rows : Tensor
            (V, D) float, the old table.

        Returns
        -------
        Mixture
            Its owners count along `new`.
        """

    def vocab_map(self, source: Vocabulary, target: Vocabulary, rows: Tensor) -> TokenMap:
        """Return the map from the old table to the new one; pure.

        Parameters
        ----------
        source, target : Vocabulary
            The old and the new one; ``target.rows`` are made.
        rows : Tensor
            (V, D), the old table, with ``source.rows`` rows.

        Returns
        -------
        TokenMap
            (V', V): the identity or a `Select` where every row is a copy, else `Sparse`.

        Raises
        ------
        InputError
            The table has another size.
        """
        if len(rows) != source.rows:
            raise InputError(f"a table of {len(rows)} rows does not belong to a vocabulary of {source.rows}")
        copies = copied(source, target)
        new = new_ids(target, copies)
        mixture = self.mix(source, target, new, rows.detach().float()) if new else Mixture.of([])
        return assemble(copies, np.array(new, np.int64), mixture, len(rows))


def copied(source: Vocabulary, target: Vocabulary) -> np.ndarray:
    """Return which old row each new one copies, (V',) int64; -1 for none."""
    found = np.full(target.rows, -1, np.int64)
    ids = {content: i for i, content in source.special.items()}
    role_of = {content: role for role, content in target.roles.items()}
    for i, content in target.special.items():
        same_role = source.roles.get(role_of.get(content, ""), "")
        found[i] = ids.get(content, ids.get(same_role, -1))
    for i, data in enumerate(target.spellings):
        if data:
            same_place = i < source.size and source.spellings[i] == data  # several tokens may spell the same
            found[i] = i if same_place else source.id_of.get(data, -1)
    if spare := source.spare_rows:
        for number, i in enumerate(target.spare_rows):
            found[i] = spare[number % len(spare)]
    return found


def new_ids(target: Vocabulary, copies: np.ndarray) -> list[int]:
    """Return the tokens, ascending, that are copies of nothing; `copies` is what `copied` found."""
    return [i for i in range(target.size) if copies[i] < 0 and (target.spellings[i] or i in target.special)]


def assemble(copies: np.ndarray, new: np.ndarray, mixture: Mixture, rows: int) -> TokenMap:
    """Put copied and mixed rows together, structured where all are copies; a row without a source gets a mean.

    Parameters
    ----------
    copies : ndarray
        (V',) int64, see `copied`.
    new : ndarray
        (N,) int64, the new rows that `mixture` makes.
    mixture : Mixture
        Of N tokens.
    rows : int
        V.
    """
    filled = copies >= 0
    filled[new[mixture.owner.numpy()]] = True
    if (copies >= 0).all():
        index = torch.from_numpy(copies)
        same = len(copies) == rows and bool((index == torch.arange(rows)).all())
        return TokenMap.identity(rows) if same else Select(index, rows)
    bare = np.flatnonzero(~filled)
    sample = np.linspace(0, rows - 1, min(_SAMPLE, rows)).astype(np.int64)
    kept = np.flatnonzero(copies >= 0)
    row = np.concatenate([kept, new[mixture.owner.numpy()], np.repeat(bare, len(sample))])
    col = np.concatenate([copies[kept], mixture.index.numpy(), np.tile(sample, len(bare))])
    values = torch.cat(
        [torch.ones(len(kept)), mixture.weight.float(), torch.full((len(bare) * len(sample),), 1 / len(sample))]
    )
    place = torch.from_numpy(np.stack([row, col]))
    return Sparse(torch.sparse_coo_tensor(place, values, (len(copies), rows), check_invariants=False))


def pieces_of(source: Vocabulary, target: Vocabulary, new: Iterable[int]) -> list[list[int]]:
    """Cut each new token with the old vocabulary; a special token as its text."""
    texts = (target.spellings[i] or target.special[i].encode() for i in new)
    return [source.pieces(text) for text in texts]
