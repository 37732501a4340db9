"""Triadic suffix: a small LM that reads magnitudes off its tokens compares numbers of unseen lengths better."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tokenary.claims.small_lm import small_lm, train
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.tokenize.triadic_suffix import Scheme

Write = Callable[[str], list[str]]
Example = tuple[list[str], list[str]]  # what is given, and what is to be written behind it


def _triads(number: str, left: bool) -> list[str]:
    """Groups of three digits of a decimal: from the left, or the integer part from the right; the point is a token."""
    whole, point, fraction = number.partition(".")
    first = 3 if left else len(whole) % 3 or 3
    cuts = [0, *range(first, len(whole), 3), len(whole)]
    made = [whole[a:b] for a, b in itertools.pairwise(cuts)]
    return made + [point] * bool(point) + [fraction[i : i + 3] for i in range(0, len(fraction), 3)]


def _grouped(scheme: Scheme) -> Write:
    def write(number: str) -> list[str]:
        made: list[str] = []
        for digits, level in scheme.split(number):
            made += [digits, f"<{level}>"] if scheme.variant == "marker" and level else [digits + f"<{level}>"]
        return made

    return write


ARMS: dict[str, Write] = {
    "compound suffix": _grouped(Scheme()),
    "triads from the right": lambda number: _triads(number, left=False),
    "marker suffix": _grouped(Scheme(variant="marker")),
    "triads from the left": lambda number: _triads(number, left=True),
    "digits": list,
}
REPEATED = ("compound suffix", "triads from the right", "digits")  # the others are trained once


def run(
    seed: int = 0,
    steps: int = 400,
    batch: int = 128,
    repeats: int = 3,
    integer: int = 6,
    fraction: int = 4,
    tests: int = 2000,
    addition: int = 4,
) -> Outcome:
    """Train small LMs to compare decimals, one a way of writing numbers, on the same examples; then to add.

    Parameters
    ----------
    seed : int
        Of weights, examples and the lengths that are left out.
    steps, batch : int
        Of training; every arm sees the same examples.
    repeats : int
        Trainings of the method, its baseline and single digits; the other two ways are trained once.
    integer, fraction : int
        Most digits before and behind the point. A quarter of the combinations of lengths is only tested.
    tests : int
        Comparisons of unseen combinations of lengths.
    addition : int
        Most digits of the numbers that are added; 0 leaves addition out.
    """
    lengths = list(itertools.product(range(1, integer + 1), range(fraction + 1)))
    combinations = list(itertools.product(lengths, lengths))
    order = substream(seed, "triadic suffix claim", "lengths").permutation(len(combinations))
    cut = len(combinations) // 4
    unseen, seen = ([combinations[i] for i in part] for part in (order[:cut], order[cut:]))

    def comparisons(name: str, among: Sequence[Any]) -> Iterator[tuple[list[str], str]]:
        stream = substream(seed, "triadic suffix claim", name)
        while True:
            yield _comparison(stream, among[int(stream.integers(len(among)))])

    def sums(name: str) -> Iterator[tuple[list[str], str]]:
        stream = substream(seed, "triadic suffix claim", name)
        while True:
            a, b = (int(stream.integers(10 ** int(stream.integers(1, addition + 1)))) for _ in range(2))
            yield [str(a), "+", str(b), "="], str(a + b)

    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    familiar: dict[str, list[float]] = {arm: [] for arm in ARMS}
    added: dict[str, float] = {}
    for repeat in range(repeats):
        for arm, write in ARMS.items():
            if repeat and arm not in REPEATED:
                continue
            model = _Trained(write, seed * 1000 + repeat, comparisons(f"train {repeat}", seen), steps, batch)
            scores[arm].append(model.right(comparisons("test", unseen), tests))
            familiar[arm].append(model.right(comparisons("test", seen), tests))
            if addition and repeat == 0:
                adder = _Trained(write, seed * 1000, sums("train sums"), steps, batch)
                added[arm] = adder.right(sums("test sums"), min(tests, 1000))

    def figure(arm: str) -> Figure:
        return Figure.of(arm, np.array(scores[arm]))

    method, baseline, none = REPEATED
    differences = np.array(scores[method]) - np.array(scores[baseline])
    return Outcome(
        method=figure(method),
        baseline=figure(baseline),
        controls=(figure(none), Figure("random", 0.5)),
        n=tests,
        runs=repeats,
        paired_spread=standard_error(differences),
        details={
            "unseen_lengths": {arm: float(np.mean(values)) for arm, values in scores.items()},
            "seen_lengths": {arm: float(np.mean(values)) for arm, values in familiar.items()},
            "addition_exact": added,
        },
    )


def _comparison(stream: np.random.Generator, lengths: Any) -> tuple[list[str], str]:
    """Two different decimals of given lengths; half of those of one integer length share their integer part."""
    while True:
        numbers = []
        for whole, part in lengths:
            digits = str(int(stream.integers(10 ** (whole - 1) if whole > 1 else 0, 10**whole)))
            tail = "".join(map(str, stream.integers(0, 10, part)))
            numbers.append((digits, tail))
        if lengths[0][0] == lengths[1][0] and stream.random() < 0.5:
            numbers[1] = (numbers[0][0], numbers[1][1])
        a, b = (int(whole) * 10**9 + int((part or "0").ljust(9, "0")) for whole, part in numbers)
        if a != b:
            left, right = (whole + ("." + part if part else "") for whole, part in numbers)
            return [left, "?", right, "="], ">" if a > b else "<"


class _Trained:
    """A small LM that writes numbers one way."""

    def __init__(self, write: Write, seed: int, examples: Iterator[Any], steps: int, batch: int) -> None:
        self.write, self.ids = write, {"<pad>": 0, "<end>": 1}
        taken = [self._tokens(next(examples)) for _ in range(steps * batch)]
        for given, answer in taken:
            for token in (*given, *answer):
                self.ids.setdefault(token, len(self.ids))
        # A token that no example holds is read as padding, and cannot be written.
        self.model = small_lm(seed, len(self.ids), layers=2, hidden=96)
        train(self.model, (self._batch(taken[i : i + batch]) for i in range(0, len(taken), batch)), steps, lr=2e-3)

    def _tokens(self, example: tuple[list[str], str]) -> Example:
        given, answer = example
        tokens = [token for part in given for token in (self.write(part) if part[0].isdigit() else [part])]
        return tokens, [*(self.write(answer) if answer[0].isdigit() else [answer]), "<end>"]

    def _batch(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-aligned; only the answer has a loss."""
        width = max(len(given) + len(answer) for given, answer in examples)
        ids, labels = torch.zeros(len(examples), width, dtype=torch.int64), torch.full((len(examples), width), -100)
        for row, (given, answer) in enumerate(examples):
            whole = torch.tensor([self.ids.get(token, 0) for token in (*given, *answer)])
            ids[row, : len(whole)] = whole
            labels[row, len(given) : len(whole)] = whole[len(given) :]
        return ids, labels

    @torch.inference_mode()
    def right(self, examples: Iterator[Any], count: int) -> float:
        """Return the share of answers that are right as a whole: every token of it the likeliest."""
        taken = [self._tokens(next(examples)) for _ in range(count)]
        good = 0
        for i in range(0, count, 250):
            part = taken[i : i + 250]
            ids, labels = self._batch(part)
            known = torch.tensor([all(token in self.ids for token in answer) for _, answer in part])
            best = self.model(input_ids=ids).logits[:, :-1].argmax(-1)
            hits = ((best == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1)
            good += int((hits & known).sum())
        return good / count


CLAIM = Claim(
    slug="triadic-suffix",
    statement="Trained on the same comparisons of decimals, a small LM that reads compound suffixes is right on unseen "
    "combinations of lengths at least 2 points more often than one that reads triads from the right without suffix",
    metric="share of right comparisons on unseen combinations of lengths",
    direction="higher",
    threshold=0.02,
    effect="difference",
    run=run,
    variation="numbers of up to 9 digits before and 6 behind the point, no addition",
    held_out={"integer": 9, "fraction": 6, "addition": 0},
    model="",
    minutes=12,
    fast={"steps": 60, "batch": 64, "repeats": 1, "tests": 200, "addition": 0},
)
