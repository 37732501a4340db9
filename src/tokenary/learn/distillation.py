"""What distillation objectives share: the balance of their terms, one or several teachers.

    loss = stopgrad(CE / KD) KD + CE        scaling = dynamic: both terms weigh the same in every step
    loss = kd_weight KD + ce_weight CE      scaling = fixed
    KD   = T^2 sum_i sum_c weight_i term_c / chunks

A method says what it keeps of a teacher (`tables`) and how far the student is from it (`terms`). What it keeps does not
depend on the student: made once by `prepare`, it can be stored and used for every epoch and every student.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from tokenary.core.errors import InputError
from tokenary.learn.alignment import Chunks
from tokenary.learn.base import Objective, Parts
from tokenary.learn.targets import Batch, Means, Target, Teacher, matched

Scaling = Literal["dynamic", "fixed"]
Teachers = Literal["sum", "ce", "entropy", "max-prob", "best"]
Weight = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Distillation(Objective):
    """Base of the objectives that learn from other models' logits.

    Parameters
    ----------
    scaling : {"dynamic", "fixed"}
        How distillation and cross-entropy are balanced; see the module.
    kd_weight, ce_weight : float
        Of ``fixed``.
    temperature : float
        T of both softmaxes; the term is multiplied by T^2.
    teachers : {"sum", "ce", "entropy", "max-prob", "best"}
        With several: their own weights; a softmax, for each sequence, of their negative cross-entropy, negative
        entropy or greatest probability; only that of the lowest cross-entropy.
    alpha : float
        What those scores are multiplied by.
    by_vocab : bool
        Multiply terms and scores by the logarithm of a teacher's vocabulary over that of the smallest.

    Attributes
    ----------
    cross_tokenizer : bool
        Whether a teacher may have another tokenizer.
    """

    cross_tokenizer: ClassVar[bool] = True

    def __init__(
        self,
        scaling: Scaling = "dynamic",
        kd_weight: Weight = 1.0,
        ce_weight: Weight = 0.1,
        temperature: Temperature = 1.0,
        teachers: Teachers = "sum",
        alpha: float = 1.0,
        by_vocab: bool = False,
    ) -> None:
        self.scaling, self.kd_weight, self.ce_weight = scaling, kd_weight, ce_weight
        self.temperature, self.teachers = temperature, teachers
        self.alpha, self.by_vocab = alpha, by_vocab

    @abstractmethod
    def tables(self, teacher: Teacher, means: Means) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what to keep of a teacher: tables (C, ...), and what all rows share."""

    @abstractmethod
    def terms(self, logits: Tensor, target: Target, means: Means) -> Tensor:
        """Return the distance of each chunk, (C,), without the factor T^2; `means` averages the student's logits."""

    def chunks_of(self, teacher: Teacher) -> Chunks:
        """Return the chunks to compare; a method may take others than the teacher brings."""
        return teacher.chunks

    @torch.no_grad()
    def prepare(self, teacher: Teacher) -> Target:
        """Make the student-independent side of the term; see `Target`.

        Raises
        ------
        InputError
            Shapes that do not belong together.
        """
        shapes = [tuple(x.shape) for x in (teacher.logits[..., 0], teacher.input_ids, teacher.chunks.teacher)]
        if len(set(shapes)) > 1:
            raise InputError("logits, ids and chunks of a teacher do not belong together: {}, {}, {}".format(*shapes))
        if teacher.projection is not None:
            teacher = replace(teacher, logits=teacher.logits[..., : teacher.projection.teacher_size])
        rows, means, owner = matched(self.chunks_of(teacher))
        tables, shared = self.tables(teacher, means)
        scores = trust(self.teachers, teacher)
        vocab = teacher.logits.shape[-1]
        return Target(rows, owner, tables, shared, scores, teacher.projection, teacher.weight, vocab)

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Parts]:
        """Balance the distance to the teachers and the cross-entropy of the student's own next token.

        Parameters
        ----------
        logits : Tensor
            (B, N, V_S) of the student.
        batch : Batch
            Labels and teachers.

        Returns
        -------
        loss : Tensor
            A scalar.
        parts : dict of str to Tensor
            ``ce``, ``kd``, ``scale`` (what kd is multiplied by), and ``chunks``, how many were compared.

        Raises
        ------
        InputError
            No teacher, or shapes that do not belong together.
        """
        ce = next_token_ce(logits, batch.labels, batch.tokens)
        targets = [self.prepare(t) if isinstance(t, Teacher) else t for t in batch.teachers]
        kd = self.kd(logits, targets, batch.chunks)
        scale, ce_weight = torch.as_tensor(self.kd_weight), self.ce_weight
        if self.scaling == "dynamic":
            size = kd.detach().abs()
            scale = torch.where(size > 0, ce.detach() / size.clamp_min(1e-30), 1.0)
            ce_weight = 1.0
        count = torch.tensor(sum(len(target.owner) for target in targets))
        parts = {"ce": ce.detach(), "kd": kd.detach(), "scale": scale, "chunks": count}
        return scale * kd + ce_weight * ce, parts

    def kd(self, logits: Tensor, targets: Sequence[Target], chunks: int | None = None) -> Tensor:
        """Return the distillation term alone: the mean over chunks, summed over teachers."""
        if not targets:
            raise InputError("distillation needs a teacher")
        trusted, smallest = self._weights(targets), min(target.vocab for target in targets)
        total = logits.new_zeros((), dtype=torch.float32)
        for target, weight in zip(targets, trusted, strict=True):
            if target.rows.shape != logits.shape[:2]:
                raise InputError(f"targets of {tuple(target.rows.shape)} tokens, logits of {tuple(logits.shape[:2])}")
            if not len(target.owner):
                continue
            size = math.log(target.vocab) / math.log(smallest) if self.by_vocab else 1.0
            terms = self.terms(logits, target, Means.of(target.rows, len(target.owner)))
            total = total + size * (terms * weight[target.owner]).sum() / max(chunks or len(target.owner), 1)
        return total * self.temperature**2

    def _weights(self, targets: Sequence[Target]) -> list[Tensor]:
        """The weight of each teacher in each sequence, (B,) each."""
        if self.teachers == "sum" or len(targets) == 1:
            return [torch.full_like(target.scores, target.weight) for target in targets]
        scores = torch.stack([target.scores for target in targets])
        if self.teachers == "best":
            return list((scores.argmax(0) == torch.arange(len(targets), device=scores.device)[:, None]).to(scores))
        if self.by_vocab:
            sizes = torch.tensor([math.log(target.vocab) for target in targets], device=scores.device)
            scores = scores * (sizes / sizes.min())[:, None]
        return list((self.alpha * scores).softmax(0))


def next_token_ce(logits: Tensor, labels: Tensor, tokens: int | None = None) -> Tensor:
    """Return the mean negative log-likelihood of each label, in nats, given the logits before it."""
    if logits.shape[:2] != labels.shape:
        raise InputError(f"labels {tuple(labels.shape)} do not belong to logits {tuple(logits.shape)}")
    wanted = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, reduction="sum")
    return total / max(int((wanted != -100).sum()) if tokens is None else tokens, 1)


def trust(by: Teachers, teacher: Teacher) -> Tensor:
    """Return how far a teacher is trusted with each sequence, (B,): higher is better, 0 where nobody asks."""
    if by == "sum":
        return teacher.logits.new_zeros(len(teacher.logits), dtype=torch.float32)
    held = teacher.chunks.teacher[:, 1:] >= 0
    scores = teacher.logits[:, :-1].float().log_softmax(-1)
    if by in ("ce", "best"):
        found = scores.gather(-1, teacher.input_ids[:, 1:, None])[..., 0]
    elif by == "entropy":
        found = (scores.exp() * scores).sum(-1)
    else:
        found = scores.amax(-1).exp()
    return (found * held).sum(-1) / held.sum(-1).clamp_min(1)
