"""What distillation is held against: teachers, what is kept of them, and the averages over chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenary.core.token_map import Segment
from tokenary.learn.alignment import Chunks

if TYPE_CHECKING:
    from tokenary.learn.x_token.projection import Projection


@dataclass(frozen=True)
class Teacher:
    """What one teacher says of a batch.

    Attributes
    ----------
    logits : Tensor
        (B, M, V_T) of its own tokens; columns past its vocabulary are dropped where a projection tells its size.
    input_ids : Tensor
        (B, M) int64, its tokens.
    chunks : Chunks
        Its tokens against the student's; see `one_by_one` for a teacher with the student's tokenizer.
    projection : Projection, optional
        Student's vocabulary to teacher's; None for the same tokenizer.
    weight : float
        Among several teachers.
    columns : Tensor, optional
        (K,) int64, the tokens of its vocabulary that are compared; by default a method chooses them in this batch. One
        choice for all batches lets `Target.cat` join them.
    """

    logits: Tensor
    input_ids: Tensor
    chunks: Chunks
    projection: Projection | None = None
    weight: float = 1.0
    columns: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """What a term needs of a teacher: the average over each chunk, nothing of the student.

    Attributes
    ----------
    rows : Tensor
        (B, N) int64, the row of the tables that each student logit belongs to; -1 for none.
    owner : Tensor
        (C,) int64, the sequence of each row.
    tables : dict of str to Tensor
        (C, ...) each.
    shared : dict of str to Tensor
        What all rows have in common, such as columns of the teacher's vocabulary.
    scores : Tensor
        (B,), how far the teacher is trusted with each sequence.
    projection, weight : Projection or None, float
        As in `Teacher`.
    vocab : int
        Size of the teacher's vocabulary.
    """

    rows: Tensor
    owner: Tensor
    tables: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    scores: Tensor
    projection: Projection | None
    weight: float
    vocab: int

    @staticmethod
    def cat(targets: Sequence[Target]) -> Target:
        """Join targets of equally long batches with the same shared columns."""
        first = targets[0]
        sizes = [len(target.owner) for target in targets]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        batch = [sum(len(target.rows) for target in targets[:i]) for i in range(len(targets))]
        rows = [torch.where(t.rows < 0, -1, t.rows + start) for t, start in zip(targets, starts, strict=True)]
        return replace(
            first,
            rows=torch.cat(rows),
            owner=torch.cat([t.owner + at for t, at in zip(targets, batch, strict=True)]),
            tables={name: torch.cat([t.tables[name] for t in targets]) for name in first.tables},
            scores=torch.cat([t.scores for t in targets]),
        )


@dataclass(frozen=True)
class Batch:
    """What distillation is held against.

    Attributes
    ----------
    labels : Tensor
        (B, N) int64, the student's tokens; -100 has no loss. Logits predict the label behind them.
    teachers : sequence of Teacher or Target
        At least one.
    tokens, chunks : int, optional
        What cross-entropy and distillation are divided by: of the whole step, where this is a part of it (gradient
        accumulation, several devices); by default those of this batch.
    """

    labels: Tensor
    teachers: Sequence[Teacher | Target] = field(default_factory=tuple)
    tokens: int | None = None
    chunks: int | None = None


@dataclass(frozen=True)
class Means:
    """Picks the positions that belong to a chunk, and averages over each chunk.

    Attributes
    ----------
    picked : Tensor
        (P,) int64, positions in a batch of flattened rows.
    segment : Segment
        (C, P).
    """

    picked: Tensor
    segment: Segment

    @staticmethod
    def of(rows: Tensor, count: int) -> Means:
        """Average positions by the row that each belongs to, (B, N) int64, -1 for none."""
        flat = rows.flatten()
        picked = torch.nonzero(flat >= 0)[:, 0]
        return Means(picked, Segment(flat[picked], count, validate=False))

    def pick(self, x: Tensor) -> Tensor:
        """Return the positions of x (B, N, V) that belong to a chunk, (P, V) float32."""
        return x.flatten(0, 1)[self.picked].float()

    def mean(self, x: Tensor) -> Tensor:
        """Average (P, ...) over chunks, (C, ...)."""
        alone = len(self.picked) == self.segment.num_groups
        return x[self.segment.assign.argsort()] if alone else self.segment.apply(x, dim=0)


def matched(chunks: Chunks) -> tuple[Tensor, Means, Tensor]:
    """Number the chunks that have a logit on both sides. A logit belongs to the chunk of the token behind it.

    Returns
    -------
    rows : Tensor
        (B, N) int64 of the student's logits.
    means : Means
        Of the teacher's logits.
    owner : Tensor
        (C,) int64, the sequence of each chunk.
    """
    width = chunks.correct.shape[1]
    sides = [_shifted(side) for side in (chunks.student, chunks.teacher)]
    batch = len(chunks.student)
    start = torch.arange(batch, device=sides[0].device)[:, None] * width
    flat = [torch.where(side < 0, batch * width, side + start) for side in sides]
    there = [torch.zeros(batch * width + 1, dtype=torch.bool, device=side.device) for side in sides]
    for found, side in zip(there, flat, strict=True):
        found[side.flatten()] = True
    both = there[0] & there[1]
    both[-1] = False
    number = torch.where(both, both.cumsum(0) - 1, -1)
    kept = torch.nonzero(both)[:, 0]
    return number[flat[0]], Means.of(number[flat[1]], len(kept)), kept // max(width, 1)


def _shifted(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)


def one_by_one(labels: Tensor) -> Chunks:
    """Return the chunks of a teacher with the student's own tokenizer: each label alone; -100 in none."""
    chunk = torch.where(labels == -100, -1, torch.arange(labels.shape[1], device=labels.device))
    return Chunks(chunk, chunk, chunk >= 0)
