"""Plain distillation between models of one tokenizer: KL within the teacher's K most likely tokens.

    sum_{t in K} q[t] (log q[t] - log p[t])         both normalised within K

K is one set for the whole batch: the tokens with the greatest logit at any position. What methods that cross
tokenizers are measured against.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import InputError
from tokenary.learn.distillation import Count, Distillation, Scaling, Temperature, Weight
from tokenary.learn.divergence import divergence, top_columns
from tokenary.learn.targets import Means, Target, Teacher

CARD = Card(
    slug="top-k-kd",
    cls="TopKKD",
    room="learn",
    slot="distill",
    title="Top-k distillation with one tokenizer",
    summary="teaches a model from another with the same tokenizer, over the likeliest tokens",
    training="hours",
    baseline=True,
)


class TopKKD(Distillation):
    """KL at every position.

    Parameters
    ----------
    top : int
        Size of K.
    reverse : bool
        KL from student to teacher.
    scaling, kd_weight, ce_weight, temperature
        See `Distillation`.
    """

    cross_tokenizer = False

    def __init__(
        self,
        top: Count = 8192,
        reverse: bool = False,
        scaling: Scaling = "dynamic",
        kd_weight: Weight = 1.0,
        ce_weight: Weight = 0.1,
        temperature: Temperature = 1.0,
    ) -> None:
        super().__init__(scaling, kd_weight, ce_weight, temperature)
        self.top, self.reverse = top, reverse

    def tables(self, teacher: Teacher, means: Means) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the teacher's log-probabilities within K.

        Raises
        ------
        InputError
            The teacher has another tokenizer.
        """
        if teacher.projection is not None:
            raise InputError("top-k-kd needs a teacher with the student's tokenizer; x-token takes any")
        logits = means.pick(teacher.logits) / self.temperature
        columns = top_columns(logits, self.top) if teacher.columns is None else teacher.columns
        return {"log_probs": means.mean(logits[:, columns].log_softmax(-1))}, {"columns": columns}

    def terms(self, logits: Tensor, target: Target, means: Means) -> Tensor:
        """Return the distance at each position, (C,)."""
        picked = means.pick(logits)[:, target.shared["columns"]] / self.temperature
        return divergence(means.mean(picked.log_softmax(-1)), target.tables["log_probs"].float(), self.reverse)
