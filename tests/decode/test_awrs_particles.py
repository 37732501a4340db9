"""AWRS with particles: a filter that undoes the bias of masking, on a net whose texts are all enumerated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenary.core.sampling import Sampler
from tokenary.decode.awrs import AWRS
from tokenary.decode.awrs.constraint import Vocabulary
from tokenary.decode.awrs.smc import effective, log_mean, stratified
from tokenary.hf.strategy import Task
from tokenary.hf.target import attached
from tokenary.models.tiny import tiny_lm

LETTERS = Vocabulary([b"a", b"b", b"c", b""])
END, LONGEST = 3, 4


class Net:
    """A random net over a, b, c and an end, the probability of all its texts, and a constraint with a dead end."""

    def __init__(self):
        self.lm = tiny_lm(3, vocab=4, hidden=32)
        self.prompt = [0, 1, 2]
        self.p = {}
        with torch.inference_mode():
            self.grow([], 1.0)
        ranked = sorted(self.p, key=self.p.get, reverse=True)
        first = {x: sum(p for text, p in self.p.items() if text and text[0] == x) for x in range(3)}
        self.likely, self.rare = max(first, key=first.get), min(first, key=first.get)
        # Behind the likeliest first letter only unlikely texts are allowed, behind the others all.
        behind = [text for text in ranked if text and text[0] == self.likely]
        self.language = {text for text in ranked if text and text[0] != self.likely} | set(behind[-12:])
        self.mass = sum(self.p[text] for text in self.language)
        self.truth = {text: self.p[text] / self.mass for text in self.language}

    def next(self, text):
        logits = self.lm.model(torch.tensor([[*self.prompt, *text]])).logits[0, -1]
        return logits.double().softmax(-1).tolist()

    def grow(self, text, p):
        following = self.next(text)
        self.p[tuple(text)] = p * following[END]
        if len(text) < LONGEST - 1:
            for x in range(3):
                self.grow([*text, x], p * following[x])

    def predicate(self, text):
        ids = tuple("abc".index(x) for x in text)
        if ids in self.language:
            return "complete"
        return "alive" if any(word[: len(ids)] == ids for word in self.language) else "dead"

    def masked(self):
        """The exact distribution of constraining token by token."""
        found = {}
        with torch.inference_mode():
            stack = [((), 1.0)]
            while stack:
                text, p = stack.pop()
                following = self.next(text)
                options = {
                    x: following[x]
                    for x in range(3)
                    if self.predicate("".join("abc"[i] for i in (*text, x))) != "dead" and len(text) < LONGEST - 1
                }
                ending = following[END] if text in self.language else 0.0
                total = sum(options.values()) + ending
                if ending:
                    found[text] = p * ending / total
                stack += [((*text, x), p * share / total) for x, share in options.items()]
        return found

    def run(self, prompts=1, sampler=Sampler(1.0), new=LONGEST, **options):  # noqa: B008 (frozen)
        method = AWRS(predicate=self.predicate, **options)
        method.bind(LETTERS)
        task = Task(self.lm.model, None, [self.prompt] * prompts, sampler, new, [END])
        return method, method.loop(task)


@pytest.fixture(scope="module")
def net():
    return Net()


def finish(net, loop):
    with attached(net.lm.model):
        for _ in loop:
            pass
    return loop


def word(branch):
    return tuple(branch.new_ids[:-1])


def divergence(truth, found):
    """KL(truth || found), in nats; found is smoothed by a thousandth of the truth, so that it is finite."""
    return sum(p * math.log(p / (0.999 * found.get(text, 0.0) + 0.001 * p)) for text, p in truth.items())


def posterior(loop):
    """Mean over prompts of the particles' normalised weights."""
    found = {}
    for row, branches in enumerate(loop.branches):
        for branch in branches:
            if branch.finish == "stop":
                share = math.exp(branch.log_weight - loop.log_mass[row]) / len(branches) / len(loop.branches)
                found[word(branch)] = found.get(word(branch), 0.0) + share
    return found


def test_particles_undo_the_bias_of_masking(net):
    """Exact conditional, by enumeration, against masking, by enumeration, and particles."""
    masking = divergence(net.truth, net.masked())
    assert masking > 0.1, "the grammar has no dead end worth the name"
    few, many = (divergence(net.truth, posterior(finish(net, net.run(60, particles=count)[1]))) for count in (4, 40))
    assert many < few < masking and many < 0.1 * masking


@pytest.mark.parametrize(
    "options", [{}, {"ess": 0.0}, {"ess": 1.0}, {"estimator": "geometric"}, {"estimator": "recursive"}]
)
def test_the_mean_weight_is_the_mass_of_the_language(net, options):
    """Whether or not particles are resampled, and with either estimate of a token's mass."""
    loop = finish(net, net.run(300, particles=4, **options)[1])
    masses = np.exp(loop.log_mass)
    assert abs(masses.mean() - net.mass) < 4 * masses.std(ddof=1) / math.sqrt(len(masses))
    assert masses.std() > 0


def test_a_critic_weighs_whole_texts(net):
    def critic(text):
        return 0.2 + text.count("b")

    loop = finish(net, net.run(300, particles=8, critic=critic)[1])
    exact = sum(p * critic("".join("abc"[x] for x in text)) for text, p in net.p.items() if text in net.language)
    masses = np.exp(loop.log_mass)
    assert abs(masses.mean() - exact) < 4 * masses.std(ddof=1) / math.sqrt(len(masses))
    none = finish(net, net.run(10, particles=30, critic=lambda text: "abc"[net.rare] not in text)[1])
    assert all(net.rare not in answer.new_ids for answer in none.sequences)


def test_emissions_make_every_branch(net):
    loop, made, copies = net.run(20, particles=6, ess=0.9)[1], {}, 0
    with attached(net.lm.model):
        for emissions in loop:
            before = {key: list(ids) for key, ids in made.items()}
            for emission in emissions:
                key = emission.row, emission.branch
                if emission.copy_of is not None:
                    copies += 1
                    made[key] = list(before[emission.row, emission.copy_of])
                made.setdefault(key, []).extend(emission.token_ids)
    assert copies > 10
    for row, branches in enumerate(loop.branches):
        assert made[row, None] == loop.sequences[row].new_ids
        for number, branch in enumerate(branches):
            assert made.get((row, number), []) == branch.new_ids


def test_answers_pool_equal_texts(net):
    loop = finish(net, net.run(20, particles=12, ess=0.0)[1])
    for row, answer in enumerate(loop.sequences):
        weights = np.array([branch.log_weight for branch in loop.branches[row]])
        shares = {}
        for branch, share in zip(loop.branches[row], np.exp(weights - log_mean(weights)) / 12, strict=True):
            shares[word(branch)] = shares.get(word(branch), 0.0) + share
        assert word(answer) in net.language and answer.finish == "stop"
        assert shares[word(answer)] == pytest.approx(max(shares.values()))
        assert math.exp(answer.log_weight) == pytest.approx(max(shares.values()))


def test_a_prompt_is_independent_of_its_neighbours(net):
    batch = finish(net, net.run(5, particles=6)[1])
    alone = finish(net, net.run(1, Sampler(1.0, first_row=3), particles=6)[1])
    assert [b.new_ids for b in alone.branches[0]] == [b.new_ids for b in batch.branches[3]]
    assert alone.log_mass[0] == pytest.approx(batch.log_mass[3], abs=1e-4)


def test_limits_and_cancelling(net):
    method, loop = net.run(4, particles=3)
    with attached(net.lm.model):
        for passes, _ in enumerate(loop, start=1):
            if passes == 2:
                break
    assert all(len(branch.new_ids) <= 2 for row in loop.branches for branch in row)
    assert all(answer.finish is None and not answer.new_ids for answer in loop.sequences)
    assert method.counts.tokens == 24 and method.counts.mean >= 1
    # The empty text is not in the language: nothing can end within one token.
    short = finish(net, net.run(2, new=1, particles=3)[1])
    assert all(answer.finish == "length" and answer.log_weight == -math.inf for answer in short.sequences)


def test_resampling():
    log_weights = np.log([0.5, 1e-300, 0.3, 0.2])
    counts = np.zeros(4)
    stream = np.random.default_rng(0)
    for _ in range(4000):
        ancestors = stratified(log_weights, stream.random(4))
        counts += np.bincount(ancestors, minlength=4)
        survivors = set(ancestors)
        assert all(ancestors[i] == i for i in survivors)
        assert ancestors.count(0) == 2  # the strata hold it there
    assert counts / 4000 == pytest.approx([2, 0, 1.2, 0.8], abs=0.04)
    assert effective(np.log([1.0, 1.0, 1.0])) == pytest.approx(3) and effective(np.array([0.0, -np.inf])) == 1
