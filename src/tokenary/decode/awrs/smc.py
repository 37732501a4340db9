"""A particle filter over answers: several sequences a prompt in one batch, weighted, resampled, pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenary.core.decoding import Decoding, Emission
from tokenary.core.errors import OptionError
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.decode.awrs.constraint import ConstraintError, Matcher, Vocabulary
from tokenary.decode.awrs.sampler import Draw
from tokenary.hf.strategy import Task


def log_mean(log_weights: np.ndarray) -> float:
    """Return the logarithm of the mean of weights (N,) that are given as logarithms."""
    top = log_weights.max()
    return float(top + np.log(np.exp(log_weights - top).mean())) if top > -math.inf else -math.inf


def effective(log_weights: np.ndarray) -> float:
    """Return the effective number of particles, (sum w)^2 / sum w^2; at least one weight is above 0."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def stratified(log_weights: np.ndarray, numbers: np.ndarray) -> list[int]:
    """Resample: return the ancestor of each of N particles.

    One point is drawn in each of N equal strata of the cumulative weights, so that a particle of normalised weight v
    has N v offspring on average. A particle with offspring stays its own ancestor.

    Parameters
    ----------
    log_weights : ndarray
        (N,), at least one of them finite.
    numbers : ndarray
        (N,), uniform in [0, 1).
    """
    count = len(log_weights)
    sums = np.exp(log_weights - log_weights.max()).cumsum()
    points = (np.arange(count) + numbers) / count * sums[-1]
    drawn = np.minimum(np.searchsorted(sums, points, side="right"), np.searchsorted(sums, sums[-1]))
    offspring = np.bincount(drawn, minlength=count)
    spare = iter(np.repeat(np.arange(count), np.maximum(offspring - 1, 0)).tolist())
    return [i if offspring[i] else next(spare) for i in range(count)]


@dataclass
class Particle:
    """A branch, where its constraint stands, and the critic's part of its weight (a logarithm)."""

    branch: Decoding
    matcher: Matcher
    twist: float = 0.0
    unended: float = -math.inf  # what it weighed before the limit, if it could not end there

    def become(self, other: Particle) -> None:
        """Start anew as a copy of another particle."""
        made, self.matcher = other.branch, other.matcher.copy()
        self.twist = other.twist
        self.branch.ids, self.branch.finish = made.ids.copy(), made.finish
        self.branch.trace = deepcopy(made.trace)


class SMC:
    """The loop of the particle filter. Iterating runs it a pass at a time; to cancel, stop iterating.

    All particles of all prompts are rows of one batch; a prompt is read once. Particles of weight 0 and finished ones
    leave the batch, and return where resampling copies a live one over them. A copy is reported with the tokens of the
    next pass.

    Parameters
    ----------
    task : Task
        The model, prompts and limits.
    start : callable
        Returns a matcher for each prompt.
    draw : callable
        ``draw(probabilities, matcher, stream)`` returns a token and its log weight.
    particles : int
        For each prompt.
    ess : float
        Resample below this share of effective particles.
    vocabulary : Vocabulary or None
        Without one, answers are pooled by tokens instead of text.
    critic : callable or None
        Score of a text, at least 0.

    Attributes
    ----------
    sequences : list of Decoding
        The answers; `log_weight` is the logarithm of its share of the weight.
    branches : list of list of Decoding
        The particles; `log_weight` is the importance weight since the last resampling, times the mean weight then.
    log_mass : list of float
        For each prompt the estimate, unbiased before the logarithm, of the probability that an unconstrained answer of
        at most ``max_new_tokens`` satisfies the constraint (weighted by the critic); NaN before the end.
    """

    def __init__(
        self,
        task: Task,
        start: Callable[[], Sequence[Matcher]],
        draw: Callable[[np.ndarray, Matcher, np.random.Generator], Draw],
        particles: int,
        ess: float,
        vocabulary: Vocabulary | None = None,
        critic: Callable[[str], float] | None = None,
    ) -> None:
        self._task, self._start, self._draw = task, start, draw
        self._count, self._ess, self._vocabulary, self._critic = particles, ess, vocabulary, critic
        self._ends = list(task.end_tokens)
        pieces = [] if vocabulary is None else vocabulary.pieces
        # Neither text nor an end: ruled out without a test.
        self._silent = [i for i, piece in enumerate(pieces) if not piece and i not in self._ends]
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(task.prompts)]
        self.branches = [
            [Decoding(s.index, s.ids.copy(), s.n_prompt) for _ in range(particles)] for s in self.sequences
        ]
        self.log_mass = [math.nan] * len(self.sequences)
        self.peak_bytes = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        matchers = self._start()
        clouds = [
            [Particle(branch, matcher.copy()) for branch in branches]
            for branches, matcher in zip(self.branches, matchers, strict=True)
        ]
        target = self._task.target()
        logits = yield from target.reading(self._task.prompts)
        live = [(row, i) for row in range(len(clouds)) for i in range(self._count)]
        target.select_rows([row for row, _ in live])
        logits = logits[[row for row, _ in live]]
        copies: dict[tuple[int, int], int] = {}  # the branches that the next pass reports as copies
        while True:
            emissions = self._advance(clouds, live, logits, copies)
            copies = {}
            for row, cloud in enumerate(clouds):
                if self.sequences[row].finish is None:
                    copied = self._resample(row, cloud)
                    copies |= copied
                    if not copied and all(particle.branch.finish for particle in cloud):
                        emissions.append(self._answer(row, cloud))
            yield emissions
            rows = {place: i for i, place in enumerate(live)}
            live = [
                (row, i) for row, cloud in enumerate(clouds) for i in range(self._count) if not cloud[i].branch.finish
            ]
            if not live and not copies:
                return
            if live:
                kept = [rows[row, copies.get((row, i), i)] for row, i in live]
                if kept != list(range(len(rows))):
                    target.select_rows(kept)
                newest = [clouds[row][i].branch.ids[-1] for row, i in live]
                logits = target.score(TokenTree.roots(newest))[:, 0]
                target.commit([[0]] * len(live))
                self.peak_bytes = max(self.peak_bytes, target.nbytes)

    def _advance(
        self,
        clouds: list[list[Particle]],
        live: list[tuple[int, int]],
        logits: Tensor,
        copies: dict[tuple[int, int], int],
    ) -> list[Emission]:
        """Draw a token for every live particle; report them, copies first, since they begin where others stand."""
        probabilities = self._task.sampler.probabilities(logits).double().cpu().numpy() if live else ()
        drawn: dict[tuple[int, int], list[int]] = {}
        for (row, i), values in zip(live, probabilities, strict=True):
            drawn[row, i] = self._extend(row, i, clouds[row][i], values)
        emissions = []
        for row, i in [*copies, *(place for place in live if place not in copies)]:
            tokens, finish = drawn.get((row, i), []), clouds[row][i].branch.finish
            emissions.append(Emission(row, tokens, [False] * len(tokens), finish, i, copies.get((row, i))))
        return emissions

    def _extend(self, row: int, index: int, particle: Particle, probabilities: np.ndarray) -> list[int]:
        """Draw the next token of a particle, weigh it, and return it; none where the particle dies."""
        branch, task = particle.branch, self._task
        probabilities[self._silent] = 0
        free, forced = probabilities, bool(self._ends) and len(branch.new_ids) == task.max_new_tokens - 1
        if forced:
            probabilities = np.zeros_like(free)
            probabilities[self._ends] = free[self._ends]
        stream = substream(task.sampler.seed, "awrs", task.sampler.first_row + row, len(branch.ids), index)
        particle.matcher.follow(branch.new_ids)
        token, log_weight = self._draw(probabilities, particle.matcher, stream)
        if branch.new_ids:
            branch.trace.per_pass.append((0, 0))
        before = branch.log_weight - particle.twist
        branch.log_weight = before + log_weight
        if token < 0 and forced:  # it cannot end: its last token is an ordinary one
            token = self._draw(free, particle.matcher, stream).token
            particle.unended = before if token >= 0 else -math.inf
        if token < 0:
            branch.finish = "pruned"
            return []
        branch.ids.append(token)
        branch.trace.from_draft.append(False)
        if token in self._ends or (task.stops is not None and task.stops(row, branch.ids)):
            branch.finish = "stop"
        elif len(branch.new_ids) >= task.max_new_tokens:
            branch.finish = "length"
        if branch.log_weight > -math.inf:
            self._weigh(particle)
        return [token]

    def _weigh(self, particle: Particle) -> None:
        """Multiply the critic's score in; it is divided out before the next one, but stays at the end of a text."""
        if self._critic is None:
            return
        score = float(self._critic(self._text(particle.branch)))
        if not score >= 0:
            raise OptionError("critic", score, "a critic that returns numbers at least 0")
        particle.twist = math.log(score) if score else -math.inf
        particle.branch.log_weight += particle.twist
        if particle.twist == -math.inf:
            particle.branch.finish = "pruned"

    def _resample(self, row: int, cloud: list[Particle]) -> dict[tuple[int, int], int]:
        """Resample the particles of a prompt where too few of them carry the weight; return who copies whom."""
        weights = np.array([particle.branch.log_weight for particle in cloud])
        if all(particle.branch.finish for particle in cloud) or effective(weights) >= self._ess * self._count:
            return {}
        step = max(len(particle.branch.new_ids) for particle in cloud)
        sampler = self._task.sampler
        numbers = substream(sampler.seed, "awrs resample", sampler.first_row + row, step).random(self._count)
        ancestors, mean = stratified(weights, numbers), log_mean(weights)
        for particle, ancestor in zip(cloud, ancestors, strict=True):
            if cloud[ancestor] is not particle:
                particle.become(cloud[ancestor])
            particle.branch.log_weight = mean
        return {(row, i): ancestor for i, ancestor in enumerate(ancestors) if ancestor != i}

    def _answer(self, row: int, cloud: list[Particle]) -> Emission:
        """Pool identical answers and take the heaviest.

        Where no particle could end within the limit the answer is the heaviest unfinished one, of weight 0.

        Raises
        ------
        ConstraintError
            If every particle ran into a dead end.
        """
        answer = self.sequences[row]
        weights = np.array([particle.branch.log_weight for particle in cloud])
        self.log_mass[row] = log_mean(weights)
        if self.log_mass[row] == -math.inf:
            heaviest = max(cloud, key=lambda particle: particle.unended)
            if heaviest.unended == -math.inf:
                raise ConstraintError(
                    f"prompt {row + 1}: all {self._count} particles ran into a dead end;"
                    " use more particles, or a larger max_rejects"
                )
            best, answer.log_weight = heaviest.branch, -math.inf
        else:
            shares = np.exp(weights - self.log_mass[row]) / self._count
            pools: dict[str | tuple[int, ...], float] = {}
            keys = [self._key(particle.branch) for particle in cloud]
            for key, share in zip(keys, shares.tolist(), strict=True):
                pools[key] = pools.get(key, 0.0) + share
            top = max(pools, key=lambda key: pools[key])
            best = cloud[max(range(self._count), key=lambda i: (keys[i] == top, weights[i]))].branch
            answer.log_weight = math.log(pools[top])
        answer.ids, answer.trace = best.ids.copy(), deepcopy(best.trace)
        answer.finish = best.finish
        return Emission(row, answer.new_ids, [False] * len(answer.new_ids), answer.finish)

    def _key(self, branch: Decoding) -> str | tuple[int, ...]:
        """What makes two answers the same."""
        return tuple(branch.new_ids) if self._vocabulary is None else self._text(branch)

    def _text(self, branch: Decoding) -> str:
        assert self._vocabulary is not None
        return self._vocabulary.text([token for token in branch.new_ids if token not in self._ends])
