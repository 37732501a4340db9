"""W and the losses against the slow and obvious formulation of the paper."""

from __future__ import annotations

from dataclasses import replace
from difflib import SequenceMatcher

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models

import tokenary.learn
from tokenary.core.card import Card
from tokenary.core.errors import InputError, OptionError
from tokenary.core.laws import check, check_class
from tokenary.core.token_map import check_token_map
from tokenary.hf.tokenizer import Vocabulary
from tokenary.learn import laws as room
from tokenary.learn.aligner import Aligner, collate
from tokenary.learn.alignment import Chunks
from tokenary.learn.laws import PACKED, SPLIT, toy, toy_vocabulary
from tokenary.learn.targets import Batch, Teacher, matched, one_by_one
from tokenary.learn.top_k_kd import TopKKD
from tokenary.learn.uld import ULD
from tokenary.learn.x_token import Projection, XToken, build_projection
from tokenary.learn.x_token.strings import equal_tokens
from tokenary.models.tiny import tiny_lm

STUDENT, TEACHER = toy_vocabulary(PACKED), toy_vocabulary(SPLIT)


def with_special(vocabulary, *names):
    made = Tokenizer.from_str(vocabulary.tokenizer.to_str())
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Vocabulary(made)


def dense(projection):
    """W as a matrix (V_S, V_T)."""
    made = torch.zeros(projection.student_size, projection.teacher_size)
    for s, (index, weight) in enumerate(zip(projection.index.tolist(), projection.weight.tolist(), strict=True)):
        for t, w in zip(index, weight, strict=True):
            if t >= 0:
                made[s, t] += w
    return made


# --------------------------------------------------------------------------------------------- the projection


def slow_projection(student, teacher, reverse, slack, exact, top, keep):
    """Rule by rule, in dicts, one token after the other."""
    counts: dict[tuple[int, int], float] = {}

    def add(s, t, weight):
        counts[s, t] = counts.get((s, t), 0.0) + weight

    passes = [(student, teacher, False)] + [(teacher, student, True)] * reverse
    for source, target, backwards in passes:
        for i, data in enumerate(source.spellings):
            if data:
                ids = target.pieces(data)[:4]
                raw = [0.9 * 0.1**n for n in range(len(ids))]
                for j, weight in zip(ids, raw, strict=True):
                    add(*((j, i) if backwards else (i, j)), weight / sum(raw))
    for i, name in student.special.items():
        for j, other in teacher.special.items():
            words = [
                {
                    w
                    for w in n.replace("<", " ").replace(">", " ").replace("|", " ").replace("_", " ").split()
                    if len(w) > 2
                }
                for n in (name, other)
            ]
            union = words[0] | words[1]
            score = 0.6 * SequenceMatcher(None, other, name, autojunk=False).ratio()
            score += 0.4 * len(words[0] & words[1]) / len(union) if union else 0
            if score >= 0.3:
                add(i, j, 0.8 * score)
    made = torch.zeros(student.size, teacher.size)
    for i in range(student.size):
        row = sorted(((w, -t) for (s, t), w in counts.items() if s == i), reverse=True)
        total = sum(w for w, _ in row)
        slots = [[w / total, -t] for w, t in row[:top]]
        slots += [[0.0, -1] for _ in range(top - len(slots))]
        if slack:
            slots[-1][0] = 0.2
            total = sum(w for w, _ in slots)
            slots = [[w / total, t] for w, t in slots]
        if exact:
            name = student.special.get(i)
            same = [j for j, data in enumerate(teacher.spellings) if data and data == student.spellings[i]]
            same += [j for j, other in teacher.special.items() if other == name]
            if same:
                slots = [[1.0, same[-1]]]
        slots = sorted((slot for slot in slots if slot[1] >= 0), reverse=True)[:keep]
        for w, t in slots:
            made[i, t] = w
    return made


@pytest.mark.parametrize("top", [32, 3])
@pytest.mark.parametrize(("reverse", "slack", "exact"), [(True, True, True), (False, True, False), (True, False, True)])
def test_the_projection_is_that_of_the_rules(reverse, slack, exact, top):
    student = with_special(STUDENT, "<|endoftext|>", "<|im_start|>", "<pad>")
    teacher = with_special(TEACHER, "<|end_of_text|>", "<|im_start|>", "</s>")
    found = build_projection(student, teacher, reverse=reverse, slack=slack, exact=exact, top=top, keep=min(top, 4))
    expected = slow_projection(student, teacher, reverse, slack, exact, top, min(top, 4))
    torch.testing.assert_close(dense(found), expected, rtol=1e-5, atol=1e-7)


def test_a_number_weighs_on_its_first_digit():
    found = build_projection(STUDENT, TEACHER, reverse=False, slack=False)
    row = found.index[STUDENT.id_of[b"201"]], found.weight[STUDENT.id_of[b"201"]]
    assert row[0].tolist() == [*b"201", -1]
    np.testing.assert_allclose(row[1], [0.9 / 0.999, 0.09 / 0.999, 0.009 / 0.999, 0], rtol=1e-6)
    slack = build_projection(STUDENT, TEACHER, reverse=False)
    np.testing.assert_allclose(slack.weight[STUDENT.id_of[b"201"]], row[1] / 1.2, rtol=1e-6)


def test_rows_sum_to_at_most_one_and_to_one_where_matched():
    found = build_projection(STUDENT, TEACHER)
    sums, same = found.weight.sum(1), torch.from_numpy(equal_tokens(STUDENT, TEACHER)) >= 0
    assert bool((sums <= 1 + 1e-6).all()) and bool((found.weight >= 0).all())
    assert bool((sums[same] == 1).all()) and bool((sums[~same] < 1).all())
    assert not check_token_map(found.columns(torch.tensor([50, 3, 260])))


def sentencepiece():
    """Every byte, and characters that are spelled by a byte too."""
    pieces = [
        ("<unk>", 0.0),
        *((f"<0x{byte:02X}>", -9.0) for byte in range(256)),
        ("▁", -1.0),
        ("a", -1.0),
        ("▁a", -1.0),
    ]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Vocabulary(made)


@pytest.mark.parametrize("vocabulary", [with_special(STUDENT, "<|a|>", "<|b|>"), sentencepiece()])
def test_equal_vocabularies_give_the_identity(vocabulary):
    found = build_projection(vocabulary, vocabulary)
    assert torch.equal(dense(found), torch.eye(vocabulary.size))
    probs = torch.rand(3, vocabulary.size)
    torch.testing.assert_close(found.map.apply(probs, dim=-1), probs)
    for relaxed in (False, True):
        assert torch.equal(found.matches(relaxed)[0], torch.arange(vocabulary.size))


def test_families_share_tokens_however_they_are_written():
    other, pieces = toy_vocabulary((("Ġ", "a"),)), sentencepiece()
    same = equal_tokens(other, pieces)
    assert same[other.id_of[b" a"]] == pieces.id_of[b" a"] and same[other.id_of[b"a"]] == pieces.id_of[b"a"]
    assert (same[:256] >= 0).all()


def test_columns_are_rows_of_the_whole_map():
    found, chosen = build_projection(STUDENT, TEACHER), torch.tensor([50, 260, 3, 48])
    part = found.columns(chosen)
    assert tuple(part.shape) == (4, STUDENT.size)
    torch.testing.assert_close(part.dense(), dense(found).T[chosen])
    torch.testing.assert_close(found.map.dense(), dense(found).T)


def slow_matches(projection, relaxed):
    won: dict[int, tuple[float, int]] = {}
    for s, (index, weight) in enumerate(zip(projection.index.tolist(), projection.weight.tolist(), strict=True)):
        if index[0] < 0 or (weight[0] < 0.6 if relaxed else weight[0] != 1 or max(index[1:]) >= 0):
            continue
        rank = (-weight[0], s) if relaxed else (0.0, s)
        won[index[0]] = min(won.get(index[0], rank), rank)
    return sorted((s, t) for t, (_, s) in won.items())


@pytest.mark.parametrize("relaxed", [False, True])
def test_collisions_are_decided_by_weight_or_by_id(relaxed):
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 12, (60, 3), generator=generator)
    weight = torch.tensor([0.5, 0.6, 0.7, 0.7, 1.0, 1.0])[torch.randint(0, 6, (60,), generator=generator)]
    index[torch.rand(60, generator=generator) < 0.5, 1:] = -1
    index[:5] = -1
    made = Projection(index, torch.stack([weight, torch.zeros(60), torch.zeros(60)], 1), 12)
    student, teacher = made.matches(relaxed)
    assert list(zip(student.tolist(), teacher.tolist(), strict=True)) == slow_matches(made, relaxed)
    assert len(student) > 3


# ------------------------------------------------------------------------------------------------- the losses


def slow_terms(logits, teacher, form, top, rest, temperature=1.0, reverse=False):
    """One chunk after the other: the KL of every chunk that has logits on both sides, and their mean."""
    chunks, projection = teacher.chunks, teacher.projection
    w = dense(projection)
    mine, theirs = logits.double() / temperature, teacher.logits.double() / temperature
    groups = []
    for row in range(len(logits)):
        for chunk in range(chunks.correct.shape[1]):
            sides = [
                [p for p in range(side.shape[1] - 1) if side[row, p + 1] == chunk]
                for side in (chunks.student, chunks.teacher)
            ]
            if all(sides):
                groups.append((row, *sides))
    said = torch.stack([theirs[row, p] for row, _, places in groups for p in places])
    columns = said.amax(0).topk(min(top, said.shape[1])).indices
    student_match, teacher_match = projection.matches(relaxed=form == "h-kl")
    left = [i for i in range(projection.student_size) if i not in student_match.tolist()]
    right = [i for i in range(projection.teacher_size) if i not in teacher_match.tolist()]
    found = []
    for row, mine_at, their_at in groups:
        if form == "p-kl":
            p = torch.stack([mine[row, at].softmax(-1) @ w.double()[:, columns] for at in mine_at]).mean(0)
            log_p = (p / p.sum() + 1e-10).log()  # a teacher token that no student token stands for
            log_q = torch.stack([theirs[row, at][columns].log_softmax(-1) for at in their_at]).mean(0)
            extra = 0.0
        else:
            log_p = torch.stack([mine[row, at].log_softmax(-1) for at in mine_at]).mean(0)
            log_q = torch.stack([theirs[row, at].log_softmax(-1) for at in their_at]).mean(0)
            ranks = [sorted(log[ids].exp().tolist(), reverse=True) for log, ids in ((log_p, left), (log_q, right))]
            extra = sum(abs(a - b) for a, b in list(zip(*ranks, strict=False))[:rest])
            log_p, log_q = log_p[student_match], log_q[teacher_match]
        if reverse:
            log_p, log_q = log_q, log_p
        found.append(float((log_q.exp() * (log_q - log_p)).sum()) + extra)
    return sum(found) / len(found) * temperature**2


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("p-kl", {}),
        ("p-kl", {"top": 20, "temperature": 2.0}),
        ("p-kl", {"top": 50, "reverse": True}),
        ("h-kl", {}),
        ("h-kl", {"rest": 3, "temperature": 1.5}),
        ("gold", {"rest": 2, "reverse": True}),
    ],
)
def test_losses_are_those_of_the_slow_formulation(form, options):
    logits, batch = toy(True)
    found = XToken(loss=form, **options).loss(logits, batch)[1]["kd"]
    expected = slow_terms(
        logits,
        batch.teachers[0],
        form,
        options.get("top", 8192),
        options.get("rest", 8192),
        options.get("temperature", 1.0),
        options.get("reverse", False),
    )
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_with_one_tokenizer_it_is_plain_distillation():
    """By its projection, the identity, and without one."""
    logits, batch = toy(False)
    teacher = batch.teachers[0]
    projected = replace(teacher, projection=build_projection(STUDENT, STUDENT))
    for top in (8192, 30):
        plain = TopKKD(top=top).loss(logits, batch)[1]["kd"]
        assert abs(float(XToken(top=top).loss(logits, batch)[1]["kd"] - plain)) < 1e-5
        through = XToken(top=top).loss(logits, replace(batch, teachers=[projected]))[1]["kd"]
        assert float(through) == pytest.approx(float(plain), abs=1e-5)
    q, p = teacher.logits[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    held = batch.labels[:, 1:] != -100
    expected = (q.exp() * (q - p)).sum(-1)[held].mean()
    assert float(TopKKD().loss(logits, batch)[1]["kd"]) == pytest.approx(float(expected), rel=1e-5)


def pushed(form):
    """How the term moves the logit of a number of three digits, where the teacher begins it digit by digit."""
    number, digit = STUDENT.id_of[b"201"], STUDENT.id_of[b"2"]
    logits = torch.full((1, 2, STUDENT.size), -4.0)
    logits[0, 0, [number, digit]] = torch.tensor([4.0, 1.0])
    said = torch.full((1, 4, TEACHER.size), -4.0)
    for place, byte in enumerate(b"201"):
        said[0, place, byte] = 6.0
    chunks = Chunks(torch.tensor([[-1, 0]]), torch.tensor([[-1, 0, 0, 0]]), torch.ones(1, 1, dtype=torch.bool))
    teacher = Teacher(said, torch.tensor([[0, *b"201"]]), chunks, build_projection(STUDENT, TEACHER))
    logits.requires_grad_()
    method = XToken(loss=form)
    method.kd(logits, [method.prepare(teacher)]).backward()
    return float(logits.grad[0, 0, number])


def test_strict_matching_unlearns_what_the_teacher_cannot_write():
    """The number stands in the rest, of which the teacher has next to nothing; P-KL has no rest."""
    assert pushed("gold") > 0.05  # downhill is down
    assert abs(pushed("p-kl")) < 0.1 * pushed("gold")


# -------------------------------------------------------------------------------------------------- the balance


def test_both_terms_weigh_the_same_or_as_told():
    logits, batch = toy(True)
    loss, parts = XToken().loss(logits, batch)
    assert float(loss) == pytest.approx(2 * float(parts["ce"]), rel=1e-5)
    assert float(parts["scale"] * parts["kd"]) == pytest.approx(float(parts["ce"]), rel=1e-5)
    loss, parts = XToken(scaling="fixed", kd_weight=0.7).loss(logits, batch)
    assert float(loss) == pytest.approx(0.7 * float(parts["kd"]) + 0.1 * float(parts["ce"]), rel=1e-5)
    held = batch.labels[:, 1:] != -100
    scores = logits[:, :-1].log_softmax(-1).gather(-1, batch.labels[:, 1:, None].clamp_min(0))[..., 0]
    assert float(parts["ce"]) == pytest.approx(-float(scores[held].mean()), rel=1e-5)


def test_the_scale_has_no_gradient():
    logits, batch = toy(True)
    logits = logits.clone().requires_grad_()
    loss, parts = XToken().loss(logits, batch)
    fixed, _ = XToken(scaling="fixed", kd_weight=float(parts["scale"]), ce_weight=1).loss(logits, batch)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, fixed)))


def two_teachers():
    logits, batch = toy(True)
    first = batch.teachers[0]
    own = one_by_one(batch.labels)
    second = Teacher(torch.roll(logits, 1, -1), batch.labels.clamp_min(0), own)
    return logits, batch, first, second


def test_several_teachers_are_summed_by_weight():
    logits, batch, first, second = two_teachers()
    alone = [float(XToken().loss(logits, replace(batch, teachers=[t]))[1]["kd"]) for t in (first, second)]
    both = replace(batch, teachers=[replace(first, weight=0.3), replace(second, weight=2.0)])
    assert float(XToken().loss(logits, both)[1]["kd"]) == pytest.approx(0.3 * alone[0] + 2 * alone[1], rel=1e-5)
    sized = float(XToken(by_vocab=True).loss(logits, replace(batch, teachers=[first, second]))[1]["kd"])
    sizes = [np.log(first.projection.teacher_size), np.log(second.logits.shape[-1])]
    expected = sum(a * s / min(sizes) for a, s in zip(alone, sizes, strict=True))
    assert sized == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("by", ["ce", "entropy", "max-prob", "best"])
def test_teachers_are_trusted_sequence_by_sequence(by):
    logits, batch, first, second = two_teachers()
    method = XToken(teachers=by, alpha=2.0)
    found = float(method.loss(logits, replace(batch, teachers=[first, second]))[1]["kd"])
    scores = torch.zeros(2, len(logits), dtype=torch.float64)
    for i, teacher in enumerate((first, second)):
        probs = teacher.logits.double().softmax(-1)
        for row in range(len(logits)):
            at = [p for p in range(teacher.input_ids.shape[1] - 1) if teacher.chunks.teacher[row, p + 1] >= 0]
            if by in ("ce", "best"):
                some = [probs[row, p, teacher.input_ids[row, p + 1]].log() for p in at]
            elif by == "entropy":
                some = [(probs[row, p] * probs[row, p].log()).sum() for p in at]
            else:
                some = [probs[row, p].max() for p in at]
            scores[i, row] = torch.stack(some).mean()
    weights = (2 * scores).softmax(0)
    if by == "best":
        weights = (scores == scores.amax(0)).double()
    expected = 0.0
    for teacher, weight in zip((first, second), weights, strict=True):
        target = method.prepare(teacher)
        for row in range(len(logits)):
            only = replace(
                target, weight=1.0, rows=torch.where(torch.arange(len(logits))[:, None] == row, target.rows, -1)
            )
            keep = target.owner == row
            number = torch.where(keep, keep.cumsum(0) - 1, -1)
            rows = torch.where(only.rows >= 0, number[only.rows.clamp_min(0)], -1)
            only = replace(
                only, rows=rows, owner=target.owner[keep], tables={k: v[keep] for k, v in target.tables.items()}
            )
            expected += float(weight[row]) * float(method.kd(logits, [only], chunks=len(target.owner)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_chunks_that_are_spelled_alike():
    logits, batch = toy(True)
    teacher = batch.teachers[0]
    correct = teacher.chunks.correct.clone()
    correct[0, :4] = False
    marked = replace(teacher, chunks=replace(teacher.chunks, correct=correct))
    gone = [
        torch.where((side[0] >= 0) & (side[0] < 4), -1, side[0])
        for side in (teacher.chunks.student, teacher.chunks.teacher)
    ]
    student, theirs = teacher.chunks.student.clone(), teacher.chunks.teacher.clone()
    student[0], theirs[0] = gone
    without = replace(teacher, chunks=Chunks(student, theirs, teacher.chunks.correct))
    found = XToken(only_correct=True).loss(logits, replace(batch, teachers=[marked]))[1]["kd"]
    expected = XToken().loss(logits, replace(batch, teachers=[without]))[1]["kd"]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(found) != pytest.approx(float(XToken().loss(logits, batch)[1]["kd"]), rel=1e-4)


def test_a_chunk_that_one_side_cannot_predict_is_dropped():
    """The first token has no logit in front of it."""
    chunks = Chunks(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    rows, means, owner = matched(chunks)
    assert rows.tolist() == [[0, 0, -1]] and owner.tolist() == [0]
    assert means.picked.tolist() == [1]


# ------------------------------------------------------------------------------------------------ the baselines


@pytest.mark.parametrize("align", ["position", "span"])
def test_uld_is_the_sum_over_ranks(align):
    logits, batch = toy(True)
    teacher = batch.teachers[0]
    found = float(ULD(align=align).loss(logits, batch)[1]["kd"])
    terms = []
    for row in range(len(logits)):
        sides = (teacher.chunks.student[row], teacher.chunks.teacher[row])
        if align == "position":
            sides = tuple(torch.where(side >= 0, torch.arange(len(side)), -1) for side in sides)
        for chunk in range(99):
            pair = []
            for side, said in zip(sides, (logits[row], teacher.logits[row]), strict=True):
                at = [p for p in range(len(side) - 1) if side[p + 1] == chunk]
                if at:
                    mean = said[at].softmax(-1).mean(0).sort(descending=True).values.tolist()
                    pair.append(mean + [0.0] * (300 - len(mean)))
            if len(pair) == 2:
                terms.append(sum(abs(a - b) for a, b in zip(*pair, strict=True)))
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_plain_distillation_refuses_another_tokenizer():
    logits, batch = toy(True)
    with pytest.raises(InputError, match="x-token takes any"):
        TopKKD().loss(logits, batch)


def test_what_does_not_belong_together_is_refused():
    logits, batch = toy(True)
    teacher = batch.teachers[0]
    with pytest.raises(InputError, match="needs a teacher"):
        XToken().loss(logits, Batch(batch.labels))
    with pytest.raises(InputError, match="do not belong together"):
        XToken().loss(logits, replace(batch, teachers=[replace(teacher, input_ids=teacher.input_ids[:, 1:])]))
    with pytest.raises(InputError, match="labels"):
        XToken().loss(logits[:, 1:], batch)
    with pytest.raises(OptionError):
        XToken(temperature=0)


def test_nothing_in_common_leaves_cross_entropy():
    logits, batch = toy(True)
    teacher = batch.teachers[0]
    none = replace(teacher.chunks, student=torch.full_like(teacher.chunks.student, -1))
    loss, parts = XToken().loss(logits, replace(batch, teachers=[replace(teacher, chunks=none)]))
    assert float(parts["kd"]) == 0 and float(loss) == float(parts["ce"])


# ----------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("x-token", {}),
        ("x-token", {"loss": "h-kl"}),
        ("x-token", {"loss": "gold", "temperature": 2}),
        ("x-token", {"reverse": True, "teachers": "best", "only_correct": True}),
        ("uld", {}),
        ("uld", {"align": "span", "scaling": "dynamic"}),
        ("top-k-kd", {"reverse": True}),
    ],
)
def test_every_method_keeps_the_laws(slug, options):
    report = check(slug, **options)
    assert report.ok, str(report)


def test_methods_are_found_by_name():
    assert tokenary.learn.XToken is XToken and tokenary.learn.ULD is ULD


CARD = Card(slug="here", cls="Here", room="learn", slot="distill", title="", summary="")
HERE = tuple(law for law in room.LAWS["distill"] if law is not room.the_recipe_survives_json)


class Right(XToken):
    """Like its base."""


class Unshifted(XToken):
    """Reads the logits of the token itself, padding included."""

    def chunks_of(self, teacher):
        chunks = super().chunks_of(teacher)
        return replace(chunks, student=torch.roll(chunks.student, 1, 1), teacher=torch.roll(chunks.teacher, 1, 1))


class Moody(XToken):
    def terms(self, logits, target, means):
        return super().terms(logits + 0.1 * torch.randn_like(logits), target, means)


class Local(XToken):
    """Divides by its own number of chunks."""

    def kd(self, logits, targets, chunks=None):
        return super().kd(logits, targets)


class Wide(XToken):
    """Takes the padded columns of the teacher for tokens."""

    def prepare(self, teacher):
        ranks = super().prepare(teacher)
        return replace(ranks, tables={n: t + 0.01 * teacher.logits.shape[-1] for n, t in ranks.tables.items()})


class Away(XToken):
    def terms(self, logits, target, means):
        kl = super().terms(logits, target, means)
        return kl.detach() * 2 - kl


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Unshifted, "the loss is a number with a gradient"),
        (Moody, "it is pure"),
        (Local, "parts of a step add up"),
        (Wide, "columns without a token change nothing"),
        (Away, "steps bring it nearer"),
    ],
)
def test_a_wrong_method_is_caught(method, law):
    assert check_class(Right, HERE).ok, str(check_class(Right, HERE))
    named = next(found for found in HERE if found.__name__ == law.replace(" ", "_"))
    assert check_class(method, (named,)).broken


# ------------------------------------------------------------------------------------------------------- in use


def test_the_examples_of_the_docstring_train(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    student, teacher = (tiny_lm(seed, vocab=272).model for seed in (0, 1))  # heads wider than both vocabularies
    projection, objective = build_projection(STUDENT, TEACHER), XToken()
    aligner = Aligner(STUDENT, TEACHER)

    def collator(texts):
        ids, teacher_ids, chunks = collate(aligner.align_batch(texts))
        labels = ids.masked_fill(chunks.student < 0, -100)
        names = ("input_ids", "labels", "teacher_ids", "student_chunks", "teacher_chunks", "correct")
        return dict(zip(names, (ids, labels, teacher_ids, chunks.student, chunks.teacher, chunks.correct), strict=True))

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with torch.no_grad():
                said = teacher(inputs["teacher_ids"]).logits
            chunks = Chunks(inputs["student_chunks"], inputs["teacher_chunks"], inputs["correct"])
            batch = Batch(inputs["labels"], [Teacher(said, inputs["teacher_ids"], chunks, projection)])
            outputs = model(inputs["input_ids"])
            loss, parts = objective.loss(outputs.logits, batch)
            heard.append(float(parts["kd"]))
            return (loss, outputs) if return_outputs else loss

    heard: list[float] = []
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Distiller(student, arguments, data_collator=collator, train_dataset=list(room.TEXTS)).train()
    assert len(heard) == 8 and heard[-1] < heard[0]
