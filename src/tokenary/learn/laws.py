"""The laws of distillation: a pure function of the logits, that asks nothing of a student who agrees with the teacher.

Toys are two byte-level vocabularies, one of which packs digits, a few texts in both, and random logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tokenary.core.laws import LawFunction, Make, options_are_checked_and_fixed, require, the_recipe_survives_json
from tokenary.core.spelling import CHAR_OF
from tokenary.hf.tokenizer import Vocabulary
from tokenary.learn.aligner import Aligner, collate
from tokenary.learn.alignment import Chunks
from tokenary.learn.distillation import Distillation
from tokenary.learn.targets import Batch, Target, Teacher, one_by_one
from tokenary.learn.x_token.projection import build_projection

TEXTS = ("the theatre has 201 seats", "an ant ate 1024 ants, ça va", "the end 7")
PACKED = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("2", "0"), ("20", "1"), ("1", "0"), ("Ġ", "a"))
SPLIT = (("t", "h"), ("th", "e"), ("a", "n"), ("an", "t"), ("Ġ", "the"), ("Ġ", "a"))


def toy_vocabulary(merges: Sequence[tuple[str, str]]) -> Vocabulary:
    """Make a byte-level vocabulary of the 256 bytes and some merges."""
    pieces = [CHAR_OF[byte] for byte in range(256)]
    pieces += [left + right for left, right in merges]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return Vocabulary(made)


class Toy(NamedTuple):
    """A student's logits, and what it learns from."""

    logits: Tensor
    batch: Batch

    @property
    def teacher(self) -> Teacher:
        """The one teacher."""
        found = self.batch.teachers[0]
        assert isinstance(found, Teacher)
        return found


@functools.cache
def toy(cross: bool, texts: tuple[str, ...] = TEXTS) -> Toy:
    """Make a batch for a teacher with another tokenizer, or with the student's own; the same every time."""
    student, teacher = toy_vocabulary(PACKED), toy_vocabulary(SPLIT if cross else PACKED)
    ids, teacher_ids, chunks = collate(Aligner(student, teacher).align_batch(texts))
    labels = ids.masked_fill(chunks.student < 0, -100)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*ids.shape, student.size, generator=generator)
    said = 2 * torch.randn(*teacher_ids.shape, teacher.size, generator=generator)
    projection = build_projection(student, teacher) if cross else None
    made = Teacher(said, teacher_ids, chunks if cross else one_by_one(labels), projection)
    return Toy(logits, Batch(labels, [made]))


def toy_of(method: Distillation) -> Toy:
    """Return the hardest batch that a method takes."""
    return toy(method.cross_tokenizer)


def built(make: Make) -> Distillation:
    """Construct the method."""
    method: Distillation = make()
    return method


def kd(method: Distillation, logits: Tensor, batch: Batch) -> Tensor:
    """Return the distillation term alone."""
    return method.loss(logits, batch)[1]["kd"]


def same_loss(method: Distillation, found: Toy, expected: Toy, what: str) -> None:
    """Require that loss and distance are equal but for rounding; balanced, the loss alone may not tell."""
    (loss, parts), (right, others) = (method.loss(*given) for given in (found, expected))
    close(loss, right, f"the loss {what}")
    close(parts["kd"], others["kd"], f"the distance {what}")


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Require that two numbers are equal but for rounding."""
    near = torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    require(near, f"{what}: {float(found):.7g} instead of {float(expected):.7g}")


# ---------------------------------------------------------------------------------------------------- the laws


def the_loss_is_a_number_with_a_gradient(make: Make) -> None:
    """The loss is one finite number made of its parts, and its gradient reaches every logit that predicts something."""
    method = built(make)
    logits, batch = toy_of(method)
    logits = logits.clone().requires_grad_()
    loss, parts = method.loss(logits, batch)
    require(loss.shape == () and bool(torch.isfinite(loss)), f"the loss is {loss}")
    require({"ce", "kd", "scale", "chunks"} <= set(parts), f"parts {sorted(parts)}")
    require(not any(part.requires_grad for part in parts.values()), "a part holds on to the graph")
    require(float(parts["kd"]) > 0, "random logits are at no distance")
    (gradient,) = torch.autograd.grad(loss, logits)
    require(bool(torch.isfinite(gradient).all()), "the gradient is not finite")
    reached = gradient.abs().sum(-1) > 0
    wanted = torch.cat([batch.labels[:, 1:] != -100, torch.zeros_like(reached[:, :1])], dim=1)
    require(torch.equal(reached, wanted), "the gradient misses a prediction, or touches padding")


def it_is_pure(make: Make) -> None:
    """The same logits give the same loss, from the same or another instance, and nothing that went in is changed."""
    method = built(make)
    logits, batch = toy_of(method)
    teacher = toy_of(method).teacher
    before = logits.clone(), teacher.logits.clone()
    first, again, other = (by.loss(logits, batch) for by in (method, method, built(make)))
    for found in (again, other):
        require(torch.equal(first[0], found[0]), "another loss the second time")
        require(torch.equal(first[1]["kd"], found[1]["kd"]), "another distance the second time")
    require(torch.equal(before[0], logits) and torch.equal(before[1], teacher.logits), "logits were changed")


def who_agrees_has_nothing_to_learn(make: Make) -> None:
    """With the teacher's tokenizer and its logits the distance is 0, and so is its gradient."""
    method = built(make)
    teacher = toy(False).teacher
    mine = teacher.logits.clone().requires_grad_()
    term = method.kd(mine, [method.prepare(teacher)])
    require(abs(float(term.detach())) < 1e-5, f"the distance is {float(term.detach()):.2g}")
    (gradient,) = torch.autograd.grad(term, mine)
    require(float(gradient.abs().max()) < 1e-5, "it is pushed away from there")


def padding_changes_nothing(make: Make) -> None:
    """Tokens in no chunk and without a label, whatever is said there, change nothing."""
    method = built(make)
    logits, batch = toy_of(method)
    teacher = toy_of(method).teacher

    def longer(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :3], value)], dim=1)

    chunks = Chunks(longer(teacher.chunks.student, -1), longer(teacher.chunks.teacher, -1), teacher.chunks.correct)
    padded = replace(teacher, logits=longer(teacher.logits, 9.0), input_ids=longer(teacher.input_ids, 0), chunks=chunks)
    more = Batch(longer(batch.labels, -100), [padded])
    same_loss(method, Toy(longer(logits, 5.0), more), Toy(logits, batch), "with padding")


def columns_without_a_token_change_nothing(make: Make) -> None:
    """Logits past the vocabulary, as padded heads have them, change no distance across tokenizers."""
    method = built(make)
    if not method.cross_tokenizer:
        return
    logits, batch = toy(True)
    teacher = toy(True).teacher

    def wider(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[..., :5], 7.0)], dim=-1)

    more = replace(batch, teachers=[replace(teacher, logits=wider(teacher.logits))])
    close(kd(method, wider(logits), more), kd(method, logits, batch), "with padded heads")


def parts_of_a_step_add_up(make: Make) -> None:
    """Sequences one by one, divided by the counts of the whole step, add up to the step."""
    method = built(make)
    logits = toy_of(method).logits
    target = method.prepare(toy_of(method).teacher)
    whole = method.kd(logits, [target])
    total = torch.zeros(())
    for row in range(len(logits)):
        some = target.owner == row
        first = int(torch.nonzero(some)[0, 0])
        rows = target.rows[row : row + 1]
        alone = replace(
            target,
            rows=torch.where(rows < 0, -1, rows - first),
            owner=torch.zeros_like(target.owner[some]),
            tables={name: table[some] for name, table in target.tables.items()},
            scores=target.scores[row : row + 1],
        )
        total = total + method.kd(logits[row : row + 1], [alone], chunks=len(target.owner))
    close(total, whole, "the sum of the sequences")


def targets_can_be_stored(make: Make) -> None:
    """Targets prepared once, and joined with others, give the loss of the teacher itself."""
    method = built(make)
    logits, batch = toy_of(method)
    target = method.prepare(toy_of(method).teacher)
    stored = replace(batch, teachers=[target])
    same_loss(method, Toy(logits, stored), Toy(logits, batch), "with a stored target")
    twice = Batch(torch.cat([batch.labels] * 2), [Target.cat([target, target])])
    close(kd(method, torch.cat([logits] * 2), twice), kd(method, logits, batch), "with a target joined to itself")


def steps_bring_it_nearer(make: Make) -> None:
    """A few steps along the gradient of the term lower it."""
    method = built(make)
    logits = toy_of(method).logits
    target = method.prepare(toy_of(method).teacher)
    moving = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=0.05)
    first = float(method.kd(moving, [target]).detach())
    for _ in range(20):
        optimizer.zero_grad()
        method.kd(moving, [target]).backward()
        optimizer.step()
    last = float(method.kd(moving, [target]).detach())
    require(last < 0.95 * first, f"from {first:.4g} to {last:.4g} in 20 steps")


def teachers_are_weighed(make: Make) -> None:
    """A teacher of weight 0 is not heard, two halves of one teacher are that teacher."""
    method = built(make)
    logits, batch = toy_of(method)
    teacher = toy_of(method).teacher
    silent = replace(teacher, logits=-teacher.logits, weight=0.0)
    half = replace(teacher, weight=0.5)
    if getattr(method, "teachers", "sum") != "sum":
        half = teacher  # their trust is the same, and shared out
        silent = teacher
    for name, others in (("a silent one", [teacher, silent]), ("two halves", [half, half])):
        close(kd(method, logits, replace(batch, teachers=others)), kd(method, logits, batch), name)


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "distill": (
        options_are_checked_and_fixed,
        the_recipe_survives_json,
        the_loss_is_a_number_with_a_gradient,
        it_is_pure,
        who_agrees_has_nothing_to_learn,
        padding_changes_nothing,
        columns_without_a_token_change_nothing,
        parts_of_a_step_add_up,
        targets_can_be_stored,
        steps_bring_it_nearer,
        teachers_are_weighed,
    )
}
