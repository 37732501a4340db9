"""X-Token (arXiv 2605.21699): learn from a teacher that cuts text into other tokens.

W[s, t] says which teacher tokens t stand for a student token s (`build_projection`); chunks are the pieces of text that
both tokenizations have in common (`Aligner`). With q the teacher's and p the student's average over a chunk:

    P-KL    sum_{t in K} q[t] (log q[t] - log (p W)[t])         all of p is carried over; both normalised within K
    H-KL    sum_{matched} q[t] (log q[t] - log p[s])  +  sum_r |p_(r) - q_(r)|          the rest, sorted by size

P-KL is for students with important tokens that the teacher lacks, such as numbers of several digits; H-KL, which
matches where W puts most of a token's weight, for vocabularies with much in common. ``gold`` matches equal tokens only:
what it leaves in the rest is pushed down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tokenary.core.card import Card
from tokenary.learn.alignment import Chunks
from tokenary.learn.distillation import Count, Distillation, Scaling, Teachers, Temperature, Weight
from tokenary.learn.divergence import divergence, top_columns
from tokenary.learn.targets import Means, Target, Teacher
from tokenary.learn.x_token.losses import projected, ranked, rest_columns
from tokenary.learn.x_token.projection import Projection, build_projection

__all__ = ["CARD", "Projection", "XToken", "build_projection"]

CARD = Card(
    slug="x-token",
    cls="XToken",
    room="learn",
    slot="distill",
    title="X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation",
    summary="teaches a model from another with a different tokenizer, over its whole next-token distribution",
    paper="2605.21699",
    year=2026,
    code="NVIDIA-NeMo/RL",
    training="hours",
)


class XToken(Distillation):
    """Distils full distributions through a projection between vocabularies.

    Parameters
    ----------
    loss : {"p-kl", "h-kl", "gold"}
        See the module.
    top : int
        Size of K: teacher tokens with the greatest logit anywhere in the batch.
    rest : int
        Most unmatched tokens that are compared by rank.
    reverse : bool
        KL from student to teacher.
    only_correct : bool
        Leave out chunks that the two sides spell differently.
    scaling, kd_weight, ce_weight, temperature, teachers, alpha, by_vocab
        See `Distillation`.

    Notes
    -----
    A teacher without a projection has the student's tokenizer: then the term is the KL within K at every position. With
    several teachers their scores are compared for each sequence; the authors' code takes one a micro-batch.

    An average of log-probabilities has little mass where a sure teacher writes several tokens, each sure of another:
    of such a chunk P-KL asks little. That is why a packed number is left alone, not why it would be learned.

    Examples
    --------
    >>> student_vocab, teacher_vocab = Vocabulary(rust_tokenizer(a)), Vocabulary(rust_tokenizer(b))
    >>> projection = build_projection(student_vocab, teacher_vocab)
    >>> aligner, objective = Aligner(student_vocab, teacher_vocab), XToken()
    >>> ids, teacher_ids, chunks = collate(aligner.align_batch(texts))
    >>> with torch.no_grad():
    ...     said = teacher(teacher_ids).logits          # padding is behind, and in no chunk
    >>> batch = Batch(ids.masked_fill(chunks.student < 0, -100), [Teacher(said, teacher_ids, chunks, projection)])
    >>> loss, parts = objective.loss(student(ids).logits, batch)
    >>> loss.backward()

    In a transformers ``Trainer`` (``remove_unused_columns=False``), the collator returning what `collate` does:

    >>> class Distiller(Trainer):
    ...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
    ...         with torch.no_grad():
    ...             said = teacher(inputs["teacher_ids"]).logits
    ...         chunks = Chunks(inputs["student_chunks"], inputs["teacher_chunks"], inputs["correct"])
    ...         batch = Batch(inputs["labels"], [Teacher(said, inputs["teacher_ids"], chunks, projection)])
    ...         outputs = model(inputs["input_ids"])
    ...         loss, parts = objective.loss(outputs.logits, batch)
    ...         return (loss, outputs) if return_outputs else loss
    """

    def __init__(
        self,
        loss: Literal["p-kl", "h-kl", "gold"] = "p-kl",
        top: Count = 8192,
        rest: Count = 8192,
        reverse: bool = False,
        only_correct: bool = False,
        scaling: Scaling = "dynamic",
        kd_weight: Weight = 1.0,
        ce_weight: Weight = 0.1,
        temperature: Temperature = 1.0,
        teachers: Teachers = "sum",
        alpha: float = 1.0,
        by_vocab: bool = False,
    ) -> None:
        super().__init__(scaling, kd_weight, ce_weight, temperature, teachers, alpha, by_vocab)
        self.form, self.top, self.rest = loss, top, rest
        self.reverse, self.only_correct = reverse, only_correct

    def chunks_of(self, teacher: Teacher) -> Chunks:
        """Return the teacher's chunks, or those that are spelled alike."""
        chunks = teacher.chunks
        if not self.only_correct:
            return chunks
        kept = [torch.where(_taken(chunks.correct, side), side, -1) for side in (chunks.student, chunks.teacher)]
        return replace(chunks, student=kept[0], teacher=kept[1])

    def tables(self, teacher: Teacher, means: Means) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Average the teacher's log-probabilities over chunks: of K, or of matched tokens and the ranks of the rest."""
        logits = means.pick(teacher.logits) / self.temperature
        projection = teacher.projection
        if self.form == "p-kl" or projection is None:
            columns = top_columns(logits, self.top) if teacher.columns is None else teacher.columns
            return {"log_probs": means.mean(logits[:, columns].log_softmax(-1))}, {"columns": columns}
        log_probs = means.mean(logits.log_softmax(-1))
        mine, theirs = projection.matches(relaxed=self.form == "h-kl")
        my_rest = rest_columns(mine, projection.student_size)
        their_rest = rest_columns(theirs, projection.teacher_size)
        ranks = ranked(log_probs[:, their_rest], min(self.rest, len(my_rest), len(their_rest)))
        return {"log_probs": log_probs[:, theirs], "ranks": ranks}, {"matched": mine, "rest": my_rest}

    def terms(self, logits: Tensor, target: Target, means: Means) -> Tensor:
        """Return the distance of each chunk, (C,)."""
        logits, theirs = means.pick(logits) / self.temperature, target.tables["log_probs"].float()
        if target.projection is None:
            mine = means.mean(logits[:, target.shared["columns"]].log_softmax(-1))
            return divergence(mine, theirs, self.reverse)
        logits = logits[:, : target.projection.student_size]
        if self.form == "p-kl":
            map = target.projection.columns(target.shared["columns"])
            return divergence(projected(means.mean(logits.softmax(-1)), map), theirs, self.reverse)
        mine = means.mean(logits.log_softmax(-1))
        ranks = target.tables["ranks"].float()
        apart = ranked(mine[:, target.shared["rest"]], ranks.shape[1]) - ranks
        return divergence(mine[:, target.shared["matched"]], theirs, self.reverse) + apart.abs().sum(-1)


def _taken(correct: Tensor, side: Tensor) -> Tensor:
    """Whether the chunk of each token is correct, (B, N)."""
    return correct.gather(1, side.clamp_min(0)) & (side >= 0)
