"""OMP: a new token's vector, written with few shared tokens in another space, is written alike in the model's own.

    alpha = orthogonal matching pursuit of a(t) over {a(s): s shared},   k steps
    E'[t] = sum_s alpha_s E[s]

The space a is the embedding table of a donor, a model whose tokenizer the new one is; where there is none, vectors of
the tokens' strings stand in for it. All new tokens take a step together: one product finds the next shared token of
each, Gram-Schmidt keeps an orthonormal basis, and a triangular system gives the coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import InputError
from tokenary.embed.base import Mixture, Transplant, pieces_of
from tokenary.embed.nearest import CHUNK, new_texts, shared_ids
from tokenary.embed.strings import encode_strings
from tokenary.hf.tokenizer import Vocabulary

CARD = Card(
    slug="omp",
    cls="OMP",
    room="embed",
    slot="vocabulary",
    title="Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit",
    summary="a new token is written with few shared ones in a donor's space, and alike in the model's",
    paper="2506.06607",
    year=2025,
    code="arcee-ai/mergekit",
    baseline=True,
)


class OMP(Transplant):
    """Carries sparse coefficients from one space to another.

    Parameters
    ----------
    k : int
        Shared tokens of a new one; the paper takes up to 256, with a donor.
    donor : str
        ``minilm`` or ``characters`` (see `Focus`), or a model (catalogue name, folder, hub id) whose tokenizer is the
        target: its input embeddings are the space.
    """

    toy_options: ClassVar[dict[str, str]] = {"donor": "characters"}

    def __init__(self, k: Annotated[int, Field(ge=1, le=256)] = 8, donor: str = "minilm") -> None:
        self.k, self.donor = k, donor

    def mix(self, source: Vocabulary, target: Vocabulary, new: Sequence[int], rows: Tensor) -> Mixture:
        """Pursue every token over the shared ones; one that is like none of them gets the mean of its pieces."""
        shared = [i for i in shared_ids(source, target) if source.text(i)]
        if self.donor in ("minilm", "characters"):
            places, texts = new_texts(target, new)
            queries = encode_strings(self.donor, texts)  # type: ignore[arg-type]
            keys = encode_strings(self.donor, [source.text(i) or "" for i in shared])  # type: ignore[arg-type]
        else:
            table = _table(self.donor, target)
            places = torch.tensor([place for place, i in enumerate(new) if target.spellings[i]], dtype=torch.int64)
            queries = table[torch.tensor(new)[places]]
            keys = table[torch.tensor([target.id_of[source.spellings[i]] for i in shared])]
        parts = pieces_of(source, target, new)
        if not shared or not len(places):
            return Mixture.of(parts)
        index, weight = pursue(queries, keys, min(self.k, len(shared), keys.shape[1]))
        found = (weight != 0).flatten()
        owner, ids = places.repeat_interleave(index.shape[1])[found], torch.tensor(shared)[index].flatten()[found]
        mixed = set(owner.tolist())
        rest = Mixture.of([[] if place in mixed else part for place, part in enumerate(parts)])
        return rest + Mixture(owner, ids, weight.flatten()[found])


def pursue(queries: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of many vectors at once.

    Parameters
    ----------
    queries : Tensor
        (M, C) float32.
    atoms : Tensor
        (A, C) float32, of any length but 0; A >= k.
    k : int
        Steps, at most C.

    Returns
    -------
    Tensor, Tensor
        (M, k) int64, the atoms of each query in the order of choice, and (M, k), their coefficients, which solve the
        least-squares problem over the chosen atoms. Coefficients behind an exact solution are 0.
    """
    unit = torch.nn.functional.normalize(atoms, dim=-1)
    found = [_pursue(queries[at : at + CHUNK], atoms, unit, k) for at in range(0, len(queries), CHUNK)]
    index, weight = zip(*found, strict=True)
    return torch.cat(index), torch.cat(weight)


def _pursue(queries: Tensor, atoms: Tensor, unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    count, width = queries.shape
    basis = queries.new_zeros(count, k, width)  # orthonormal rows
    upper = queries.new_zeros(count, k, k)  # chosen atoms in the basis: atom j = sum_i upper[i, j] basis[i]
    onto = queries.new_zeros(count, k)  # the query in the basis
    index = torch.zeros(count, k, dtype=torch.int64)
    left, every = queries.clone(), torch.arange(count)
    for step in range(k):
        likeness = (left @ unit.T).abs()
        if step:
            likeness.scatter_(1, index[:, :step], -1.0)
        index[:, step] = likeness.argmax(-1)
        atom = atoms[index[:, step]]
        rest = atom
        for _ in range(2):  # once more, for what rounding left
            inside = torch.einsum("mkc,mc->mk", basis[:, :step], rest)
            upper[:, :step, step] += inside
            rest = rest - torch.einsum("mk,mkc->mc", inside, basis[:, :step])
        length = rest.norm(dim=-1)
        solved = (left.norm(dim=-1) < 1e-5 * queries.norm(dim=-1)) | (length < 1e-5 * atom.norm(dim=-1))
        basis[every, step] = torch.where(solved[:, None], 0, rest / length.clamp_min(1e-30)[:, None])
        upper[:, step, step] = torch.where(solved, 1, length)
        onto[:, step] = torch.einsum("mc,mc->m", basis[:, step], left)
        left = left - onto[:, step, None] * basis[:, step]
    return index, torch.linalg.solve_triangular(upper, onto[..., None], upper=True)[..., 0]


def _table(donor: str, target: Vocabulary) -> Tensor:
    """Load the input embeddings of a model whose tokenizer is `target`: (size, C), by the ids of `target`."""
    from tokenary.hf.vocabulary import rust_tokenizer, tables
    from tokenary.models import load

    lm = load(donor, dtype="float32")
    if lm.tokenizer is None:
        raise InputError(f"{lm.name} has no tokenizer")
    own = Vocabulary(rust_tokenizer(lm.tokenizer)).spellings
    rows = tables(lm.model)[0].detach()
    place = {data: i for i, data in enumerate(own) if data}
    lost = sum(data not in place for data in target.spellings if data)
    if lost:
        raise InputError(f"donor {lm.name} lacks {lost} tokens of the new vocabulary: its tokenizer is another one")
    return rows[torch.tensor([place.get(data, 0) for data in target.spellings])]
