"""X-Token: a student that packs digits keeps its numbers under P-KL, where matching equal tokens alone unlearns them.

The teacher is SmolLM2, which writes numbers digit by digit. Every student is a small Llama with a BPE of its own,
trained a little on the text alone, and from there on for equal steps with each objective. What an objective keeps of
the teacher is made once and used for all arms and seeds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenary.claims.small_lm import small_lm, train
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.data import gsm8k, prose
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import rust_tokenizer
from tokenary.learn.aligner import Aligner, collate
from tokenary.learn.distillation import Distillation, next_token_ce
from tokenary.learn.divergence import top_columns
from tokenary.learn.targets import Batch, Target, Teacher, one_by_one
from tokenary.learn.top_k_kd import TopKKD
from tokenary.learn.uld import ULD
from tokenary.learn.x_token import Projection, XToken, build_projection
from tokenary.models import LM, load
from tokenary.tokenize.training import train_bpe

_WORDS = r" ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"packed": rf"\p{{N}}{{1,3}}|{_WORDS}", "split": rf"\p{{N}}|{_WORDS}"}
CONTEXT = 128
LETTERS = 360
BATCH = 8
ARMS = ("ce", "uld", "gold", "h-kl", "p-kl", "random")
SAME = "same tokenizer"


def sums(seed: int, count: int) -> list[str]:
    """Write pieces of text full of numbers: worked sums, and tables of years and amounts."""
    found = []
    for number in range(count):
        stream = substream(seed, "x-token sums", number)
        lines = []
        for _ in range(12):
            a, b = (int(n) for n in stream.integers(2, 100, 2))
            year, amount = 1900 + int(stream.integers(120)), int(stream.integers(10, 1000))
            lines += (
                [f"{a} + {b} = {a + b}", f"{a} * {b % 10} = {a * (b % 10)}"]
                if number % 2
                else [f"In {year} they sold {amount} of them for ${b} each."]
            )
        found.append("\n" + "\n".join(lines)[:LETTERS])
    return found


def pieces(seed: int) -> list[str]:
    """Return pieces of text, each from a line end on: worked problems, sums and tables, prose, in a random order."""
    problems = [f"\n{row['question']} {row['answer']}"[:LETTERS] for row in gsm8k()]
    novel = prose()
    story = ["\n" + novel[at : at + LETTERS].strip() for at in range(0, len(novel) - LETTERS, LETTERS)]
    mixed = [*problems[:600], *sums(seed, 300), *story]
    return [mixed[i] for i in substream(seed, "x-token pieces").permutation(len(mixed))]


@dataclass(frozen=True)
class Texts:
    """Tokens of a student, and which are numbers."""

    ids: Tensor  # (S, N), padded behind
    labels: Tensor  # -100 there
    lengths: Tensor  # bytes of every id
    digits: Tensor  # whether an id is made of digits

    @staticmethod
    def of(ids: Tensor, held: Tensor, spellings: Sequence[bytes]) -> Texts:
        """Take the tokens where `held` is true."""
        lengths = torch.tensor([len(data) for data in spellings])
        digits = torch.tensor([data.isdigit() for data in spellings])
        return Texts(ids, ids.masked_fill(~held, -100), lengths, digits)


@torch.inference_mode()
def measure(model: Any, texts: Texts) -> dict[str, float]:
    """Return bits a byte of all tokens and of numbers, and the mean probability of all tokens of several digits."""
    total = torch.zeros(2, 2, dtype=torch.float64)
    mass, many = [], texts.digits & (texts.lengths > 1)
    for ids, labels in zip(texts.ids.split(BATCH), texts.labels.split(BATCH), strict=True):
        scores = model(ids).logits[:, :-1].float().log_softmax(-1)
        wanted = labels[:, 1:]
        held = wanted >= 0
        scores, wanted = scores[held], wanted[held]
        bits = -scores.gather(-1, wanted[:, None])[:, 0].double() / math.log(2)
        for row, some in enumerate((torch.ones_like(wanted, dtype=torch.bool), texts.digits[wanted])):
            total[row] += torch.stack([bits[some].sum(), texts.lengths[wanted[some]].sum()])
        mass.append(scores[texts.digits[wanted]][:, many].exp().sum(-1))
    return {
        "all": float(total[0, 0] / total[0, 1]),
        "numbers": float(total[1, 0] / total[1, 1]),
        "mass": float(torch.cat(mass).mean()),
    }


class Lessons:
    """What the teacher says of some texts, kept for each objective, as half-precision averages over chunks.

    Parameters
    ----------
    lm : LM
        The teacher.
    objectives : mapping
        By arm.
    student, teacher : Vocabulary
        Of both sides.
    texts : sequence of str
        To learn from.
    columns : int
        Of the teacher's vocabulary that P-KL compares, one set for all texts.
    """

    def __init__(
        self,
        lm: LM,
        objectives: Mapping[str, Distillation],
        student: Vocabulary,
        teacher: Vocabulary,
        texts: Sequence[str],
        columns: int,
    ) -> None:
        aligned = Aligner(student, teacher).align_batch(texts)
        self.ids, self.teacher_ids, self.chunks = collate(aligned)
        self.labels = self.ids.masked_fill(self.chunks.student < 0, -100)
        self.projection = build_projection(student, teacher)
        self.lm, self.objectives = lm, objectives
        self.targets: dict[str, list[Target]] = {arm: [] for arm in objectives}
        self.hidden = self._hidden()
        seen = torch.cat([self._logits(i)[0].amax(0, keepdim=True) for i in range(0, len(texts), 4)])
        self.columns = top_columns(seen, columns)

    @torch.inference_mode()
    def _hidden(self) -> Tensor:
        found = [self.lm.model.base_model(ids).last_hidden_state for ids in self.teacher_ids.split(BATCH)]
        return torch.cat(found).clone()

    @torch.no_grad()
    def _logits(self, i: int) -> Tensor:
        head: Any = self.lm.model.get_output_embeddings()
        return head(self.hidden[i : i + 1]).float()

    def prepare(self, same: TopKKD | None, kept: Tensor, place: Tensor) -> None:
        """Make the targets of every text; those of `same`, on the tokens `kept` alone, too."""
        self.targets |= {SAME: []} if same else {}
        for i in range(len(self.ids)):
            logits, ids = self._logits(i), self.teacher_ids[i : i + 1]
            chunks = replace(
                self.chunks,
                student=self.chunks.student[i : i + 1],
                teacher=self.chunks.teacher[i : i + 1],
                correct=self.chunks.correct[i : i + 1],
            )
            teacher = Teacher(logits, ids, chunks, self.projection, columns=self.columns)
            for arm, objective in self.objectives.items():
                self.targets[arm].append(_half(objective.prepare(teacher)))
            if same:
                ours = ids.masked_fill(chunks.teacher < 0, -100)
                own = Teacher(logits[..., kept], place[ids], one_by_one(ours))
                self.targets[SAME].append(_half(same.prepare(own)))
        del self.hidden


def _half(target: Target) -> Target:
    return replace(target, tables={name: table.half() for name, table in target.tables.items()})


def _shuffled(projection: Projection, seed: int) -> Projection:
    """Give every student token the row of another."""
    order = torch.from_numpy(substream(seed, "x-token random").permutation(projection.student_size))
    return replace(projection, index=projection.index[order], weight=projection.weight[order])


def distil(
    model: Any,
    objective: Distillation | None,
    ids: Tensor,
    labels: Tensor,
    targets: list[Target],
    steps: int,
    seed: int,
) -> None:
    """Train with an objective, or with cross-entropy alone, on texts in an order that depends on the seed alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    stream, order = substream(seed, "x-token order"), np.zeros(0, np.int64)
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = np.concatenate([order, stream.permutation(len(ids))])
        some, order = torch.from_numpy(order[:BATCH]), order[BATCH:]
        logits = model(ids[some]).logits
        if objective is None:
            loss = next_token_ce(logits, labels[some])
        else:
            loss, _ = objective.loss(logits, Batch(labels[some], [Target.cat([targets[i] for i in some.tolist()])]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def packed(rows: Sequence[Sequence[int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of windows of the texts in a row, for training on the text alone."""
    ids = np.array([i for row in rows for i in row])
    for step in range(1 << 30):
        starts = substream(seed, "x-token text", step).integers(0, len(ids) - CONTEXT, BATCH)
        window = torch.from_numpy(np.stack([ids[at : at + CONTEXT] for at in starts]))
        yield window, window


def run(
    seed: int = 0,
    digits: Literal["packed", "split"] = "packed",
    arms: Sequence[str] = ARMS,
    repeats: int = 3,
    segments: int = 144,
    pretrain: int = 250,
    steps: int = 40,
    test: int = 64,
    vocab: int = 8192,
    hidden: int = 128,
    columns: int = 4096,
    same: int = 1,
) -> Outcome:
    """Train a student in several ways from the same start, and measure it on held-out text.

    Parameters
    ----------
    seed : int
        Of texts, weights and order.
    digits : {"packed", "split"}
        Whether the student's vocabulary has numbers of two and three digits.
    arms : sequence of str
        What is compared; ``random`` is P-KL with the rows of the projection in a random order.
    repeats : int
        Students, each of other weights and another order.
    segments, test : int
        Texts that the teacher reads, and held-out ones, of 360 characters.
    pretrain, steps : int
        On the text alone, and with each objective; 8 texts each.
    vocab, hidden : int
        Of the student, which has 3 layers.
    columns : int
        Of P-KL.
    same : int
        Students with the teacher's own tokenizer, cut down to the tokens that occur; trained with plain distillation.
    """
    lm, texts = load("smollm2"), pieces(seed)
    tested, taught, read = texts[:test], texts[test : test + segments], texts[test:]
    teacher = Vocabulary(rust_tokenizer(lm.tokenizer), rows=lm.vocab_size)  # type: ignore[arg-type]
    student = Vocabulary(train_bpe(read, vocab, pattern=PATTERNS[digits]).tokenizer)
    objectives: dict[str, Distillation] = {
        "uld": ULD(align="span", top=2048, scaling="dynamic"),
        "gold": XToken("gold", rest=2048),
        "h-kl": XToken("h-kl", rest=2048),
        "p-kl": XToken("p-kl"),
    }
    lessons = Lessons(lm, {a: o for a, o in objectives.items() if a in arms}, student, teacher, taught, columns)
    rows = {SAME: [e.ids for e in teacher.tokenizer.encode_batch(texts, add_special_tokens=False)]}
    rows["own"] = [e.ids for e in student.tokenizer.encode_batch(texts, add_special_tokens=False)]
    kept = torch.tensor(sorted({i for row in rows[SAME] for i in row}))
    place = torch.zeros(teacher.rows, dtype=torch.int64)
    place[kept] = torch.arange(len(kept))
    lessons.prepare(TopKKD() if same else None, kept, place)
    rows[SAME] = [place[row].tolist() for row in rows[SAME]]
    spelled = {"own": student.spellings, SAME: [teacher.spellings[i] for i in kept.tolist()]}
    tests = {name: _texts(rows[name][:test], spelled[name]) for name in rows}
    own = {
        "own": (lessons.ids, lessons.labels),
        SAME: (place[lessons.teacher_ids], place[lessons.teacher_ids].masked_fill(lessons.chunks.teacher < 0, -100)),
    }
    shuffled = _shuffled(lessons.projection, seed)
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        number = seed * 1000 + repeat
        for kind, names in (("own", tuple(arms)), *([(SAME, ("ce, same tokenizer", SAME))] * (repeat < same))):
            start = small_lm(number, len(spelled[kind]), hidden=hidden)
            train(start, packed(rows[kind][test:], number), pretrain)
            found.setdefault(f"start, {kind}", []).append(measure(start, tests[kind]))
            for arm in names:
                model = copy.deepcopy(start)
                objective = TopKKD() if arm == SAME else objectives.get("p-kl" if arm == "random" else arm)
                targets = lessons.targets.get("p-kl" if arm == "random" else arm, [])
                if arm == "random":
                    targets = [replace(target, projection=shuffled) for target in targets]
                distil(model, objective, *own[kind], targets, steps, number)
                found.setdefault(arm, []).append(measure(model, tests[kind]))
    return outcome(found, digits, len(tested), lessons, student)


def _texts(rows: Sequence[Sequence[int]], spellings: Sequence[bytes]) -> Texts:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    held = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return Texts.of(ids, held, spellings)


def outcome(
    found: Mapping[str, list[dict[str, float]]], digits: str, tested: int, lessons: Lessons, student: Vocabulary
) -> Outcome:
    """Compare P-KL with GOLD on numbers; for a student that splits digits, H-KL with P-KL on everything."""
    metric = "numbers" if digits == "packed" else "all"
    values = {arm: np.array([one[metric] for one in ones]) for arm, ones in found.items()}
    mean = {arm: float(some.mean()) for arm, some in values.items()}

    def figure(arm: str, name: str = "") -> Figure:
        return Figure.of(name or arm, values[arm])

    ours, theirs = ("p-kl", "gold") if digits == "packed" else ("h-kl", "p-kl")
    method = figure(ours)
    if digits == "packed" and not mean["p-kl"] <= mean["ce"] < mean["gold"]:
        method = Figure(ours, math.nan, method.spread)  # GOLD must cost numbers, and P-KL must not
    rivals = [arm for arm in values if arm in ARMS and arm not in ("ce", ours, theirs)]
    projection, (strict, relaxed) = lessons.projection, (len(lessons.projection.matches(r)[0]) for r in (False, True))
    averages = {
        arm: {key: float(np.mean([one[key] for one in ones])) for key in ones[0]} for arm, ones in found.items()
    }
    base = averages["ce"]["mass"]
    return Outcome(
        method=method,
        baseline=figure(theirs),
        controls=(figure("ce", "none"), *(figure(arm) for arm in rivals)),
        n=tested,
        runs=len(values[ours]),
        paired_spread=standard_error(values[ours] - values[theirs]),
        details={
            "averages": averages,
            "runs": {arm: [one[metric] for one in ones] for arm, ones in found.items()},
            "mass_over_ce": {arm: one["mass"] / base for arm, one in averages.items() if base and "own" not in arm},
            "student_tokens": projection.student_size,
            "matched": {"gold": strict, "h-kl": relaxed},
            "numbers_of_several_digits": sum(data.isdigit() and len(data) > 1 for data in student.spellings),
            "chunks": int((lessons.chunks.correct).sum()),
        },
    )


CLAIM = Claim(
    slug="x-token",
    statement="A student whose tokenizer packs digits, taught by SmolLM2, which splits them, needs at least 2% fewer "
    "bits on numbers with P-KL than with strict matching (GOLD), which makes them worse than no teacher; P-KL does not",
    metric="bits a byte of held-out numbers",
    direction="lower",
    threshold=1.02,
    run=run,
    variation="a student that splits digits too, so that vocabularies overlap: H-KL against P-KL, on all held-out text",
    held_out={"digits": "split", "arms": ("ce", "h-kl", "p-kl"), "same": 0},
    minutes=25,
    fast={"arms": ("ce", "gold", "p-kl"), "repeats": 1, "segments": 16, "pretrain": 8, "steps": 3, "test": 8}
    | {"vocab": 2048, "hidden": 64, "columns": 512, "same": 0},
)
