"""Universal logit distillation (arXiv 2402.12030): compares probabilities by rank, whatever tokens they belong to.

    loss = CE + kd_weight sum_r |p_(r) - q_(r)|

p_(r) and q_(r) are the r-th greatest probabilities of student and teacher; the shorter list goes on with zeros. It is
the cheapest way across tokenizers and knows nothing of what tokens mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.core.card import Card
from tokenary.learn.alignment import Chunks
from tokenary.learn.distillation import Count, Distillation, Scaling, Temperature, Weight
from tokenary.learn.targets import Means, Target, Teacher

CARD = Card(
    slug="uld",
    cls="ULD",
    room="learn",
    slot="distill",
    title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    summary="teaches a model from another with a different tokenizer, comparing sorted probabilities",
    paper="2402.12030",
    year=2024,
    code="Nicolas-BZRD/llm-recipes",
    training="hours",
    baseline=True,
)


class ULD(Distillation):
    """Rank-sorted L1 between two distributions.

    Parameters
    ----------
    align : {"position", "span"}
        Compare the i-th tokens of both texts up to the end of the shorter, as published; or the tokens of each chunk,
        their probabilities averaged.
    top : int
        Most ranks that are compared; the paper takes all.
    scaling, kd_weight, ce_weight, temperature
        See `Distillation`.
    """

    def __init__(
        self,
        align: Literal["position", "span"] = "position",
        top: Count = 8192,
        scaling: Scaling = "fixed",
        kd_weight: Weight = 1.5,
        ce_weight: Weight = 1.0,
        temperature: Temperature = 1.0,
    ) -> None:
        super().__init__(scaling, kd_weight, ce_weight, temperature)
        self.align, self.top = align, top

    def chunks_of(self, teacher: Teacher) -> Chunks:
        """Return the teacher's chunks, or number the tokens of both sides."""
        chunks = teacher.chunks
        if self.align == "span":
            return chunks
        sides = [torch.where(side >= 0, (side >= 0).cumsum(1) - 1, -1) for side in (chunks.student, chunks.teacher)]
        width = max(side.shape[1] for side in sides)
        return replace(
            chunks, student=sides[0], teacher=sides[1], correct=chunks.correct.new_ones(len(sides[0]), width)
        )

    def tables(self, teacher: Teacher, means: Means) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the teacher's greatest probabilities, falling."""
        return {"ranks": self._ranks(teacher.logits, means)}, {}

    def terms(self, logits: Tensor, target: Target, means: Means) -> Tensor:
        """Return the distance of each chunk, (C,)."""
        if target.projection is not None:
            logits = logits[..., : target.projection.student_size]
        mine, theirs = self._ranks(logits, means), target.tables["ranks"].float()
        width = max(mine.shape[1], theirs.shape[1])
        mine, theirs = (pad(side, (0, width - side.shape[1])) for side in (mine, theirs))
        return (mine - theirs).abs().sum(-1)

    def _ranks(self, logits: Tensor, means: Means) -> Tensor:
        probs = means.mean((means.pick(logits) / self.temperature).softmax(-1))
        return probs.topk(min(self.top, probs.shape[-1]), dim=-1).values
