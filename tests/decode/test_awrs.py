"""AWRS: exact draws, unbiased weights, constraints, valid answers."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.decode.awrs import AWRS, sampler
from tokenary.decode.awrs.constraint import (
    ConstraintError,
    PredicateMatcher,
    Vocabulary,
    compile_grammar,
    grammar_matcher,
    judge,
)
from tokenary.decode.awrs.sampler import awrs, by_probability, first_accepted, geometric, recursive, without_replacement
from tokenary.decode.base import Loop
from tokenary.hf.strategy import Task
from tokenary.hf.target import attached
from tokenary.run import generate

DRAWS = 6000
NO_E = r"[^eE]{12,40}\."
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
)


# ------------------------------------------------------------------------------------------------- the draws


def z_scores(values, expected):
    """Of the means of columns of draws (n, k) against what is expected of them."""
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    return (values.mean(0) - expected) / np.maximum(error, 1e-12)


CASES = {
    "flat": ([0.3, 0.25, 0.2, 0.1, 0.1, 0.05], {1, 3, 5}),
    "one accepted": ([0.3, 0.25, 0.2, 0.1, 0.1, 0.05], {4}),
    "all accepted": ([0.5, 0.3, 0.2], {0, 1, 2}),
    "peaked on an accepted": ([0.9, 0.05, 0.03, 0.02], {0, 3}),
    "peaked on a rejected": ([0.8, 0.1, 0.06, 0.04], {1, 3}),
    "some of zero": ([0.0, 0.5, 0.0, 0.3, 0.2], {3, 0}),
    "not of sum one": ([0.2, 0.1, 0.1], {0, 2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("estimator", ["recursive", "geometric", "auto"])
def test_weights_are_proper(case, estimator):
    """E[w 1{x}] = p(x) for every accepted x; the token has the masked distribution; the mean weight is Z."""
    p, good = np.array(CASES[case][0]), CASES[case][1]
    stream = np.random.default_rng(1)
    drawn = [awrs(p, good.__contains__, stream, estimator) for _ in range(DRAWS)]
    tokens = np.array([draw.token for draw in drawn])
    weights = np.exp([draw.log_weight for draw in drawn])
    accepted = np.array([x in good for x in range(len(p))])
    one_hot = np.eye(len(p))[tokens]
    assert set(tokens) <= good
    assert abs(z_scores(one_hot * weights[:, None], p * accepted)).max() < 4
    assert abs(z_scores(one_hot, p * accepted / p[accepted].sum())).max() < 4
    assert abs(z_scores(weights[:, None], p[accepted].sum())).max() < 4


def test_the_test_of_weights_sees_a_wrong_weight():
    p, good = np.array(CASES["flat"][0]), CASES["flat"][1]
    stream = np.random.default_rng(1)
    drawn = [recursive(p, good.__contains__, stream) for _ in range(DRAWS)]
    tokens = np.array([draw.token for draw in drawn])
    wrong = np.exp([draw.log_weight for draw in drawn]) * 1.1
    accepted = np.array([x in good for x in range(len(p))])
    assert abs(z_scores(np.eye(len(p))[tokens] * wrong[:, None], p * accepted)).max() > 4


@pytest.mark.parametrize("head", [0, 1, 24])
def test_order_is_sampling_without_replacement(head, monkeypatch):
    """The first two tokens have probability p_i p_j / (1 - p_i), drawn by inversion, by Gumbel keys, or by both."""
    monkeypatch.setattr(sampler, "_HEAD", head)
    p = np.array([0.5, 0.25, 0.0, 0.15, 0.1])
    stream, counts = np.random.default_rng(0), np.zeros((5, 5))
    for _ in range(DRAWS):
        first, second = itertools.islice(without_replacement(p, stream), 2)
        counts[first, second] += 1
    expected = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(5)] for i in range(5)])
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (abs(counts / DRAWS - expected) <= 4 * error).all()


@given(st.integers(1, 900), st.integers(0, 99), st.sampled_from([0, 3, 24]))
@settings(deadline=None, max_examples=40)
def test_every_token_comes_once(size, seed, peak):
    p = np.random.default_rng(seed).standard_exponential(size) ** (peak + 1)
    p[::3] = 0 if size > 1 else 1
    order = list(without_replacement(p, np.random.default_rng(seed)))
    assert sorted(order) == np.flatnonzero(p).tolist()
    ranked = list(by_probability(p))
    assert sorted(ranked) == list(range(size)) and (np.diff(p[ranked]) <= 0).all()


def test_the_first_number_draws_what_the_plain_sampler_draws():
    plain = Sampler(temperature=1.3, top_p=0.9, seed=4)
    logits, history = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)), [7] * 9
    number = substream(4, "sample", 0, 9).random()
    order = without_replacement(plain.probabilities(logits)[0].double().numpy(), np.random.default_rng(0), first=number)
    assert next(order) == plain(logits, [0], [history])[0]


@pytest.mark.parametrize("draw", [recursive, geometric])
def test_nothing_accepted_ends_and_a_bound_is_kept(draw):
    p = np.full(500, 1 / 500)
    asked = []
    found = draw(p, lambda token: asked.append(token), np.random.default_rng(0))
    assert (found.token, found.log_weight) == (-1, -math.inf) and sorted(asked) == list(range(500))
    asked.clear()
    assert draw(p, lambda token: asked.append(token), np.random.default_rng(0), 7).token == -1 and len(asked) == 7
    assert first_accepted(iter(range(9)), lambda token: token == 4, 4) == -1
    assert first_accepted(iter(range(9)), lambda token: token == 4, 5) == 4


def test_a_compliant_distribution_costs_two_tests():
    for top, draw in ((0.6, recursive), (0.999, geometric)):
        p, asked = np.r_[top, np.full(1000, (1 - top) / 1000)], []
        for seed in range(20):
            draw(p, lambda token, asked=asked: not asked.append(token), np.random.default_rng(seed))
        assert len(asked) <= 40


# ------------------------------------------------------------------------------------------------- constraints

BYTES = Vocabulary([b"a", b"b", b" a", "é".encode(), b"\xc3", b"\xa9", b"", b"c"], strips=True)


def test_characters_are_shown_whole():
    seen = []

    def predicate(text):
        seen.append(text)
        return "complete" if text.endswith("é") else "alive"

    matcher = PredicateMatcher(predicate, BYTES)
    assert matcher.accepts(4) and not matcher.accepts(5) and not matcher.accepts(6)
    matcher.follow([0, 4])
    assert not matcher.complete() and not matcher.accepts(0) and matcher.accepts(5)
    matcher.follow([0, 4, 5])
    assert matcher.complete() and set(seen) == {"\ufffd", "a\ufffd", "aé"}
    assert BYTES.text([2, 2, 4]) == "a a" and BYTES.text([0, 2]) == "a a"


def test_verdicts():
    assert judge(lambda text: True, b"") == "complete" and judge(lambda text: False, b"") == "dead"
    assert judge(lambda text: True, b"\xc3") == "alive" and judge(lambda text: True, b"\xff") == "dead"
    with pytest.raises(OptionError, match="predicate"):
        judge(lambda text: 3, b"")


def as_predicate(text):
    """The regular expression (a|é)( ?a|é)*c|c as a predicate."""
    if re.fullmatch("((a|é)( ?a|é)*)?c", text):
        return "complete"
    return "alive" if re.fullmatch("((a|é)( ?a|é)*)?", text.replace("\ufffd", "é")) else "dead"


@given(st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_following_back_and_forth_is_starting_afresh_and_both_engines_agree(walks):
    pytest.importorskip("llguidance")
    grammar = grammar_matcher(compile_grammar("regex", "(a|é)( ?a|é)*c|c"), BYTES)
    makes = (grammar.copy, lambda: PredicateMatcher(as_predicate, BYTES))
    kept = [make() for make in makes]
    for walk in walks:
        fresh, answer = [make() for make in makes], []
        for token in walk:
            states = [[m.accepts(t) for t in range(8)] + [m.complete()] for m in fresh]
            assert states[0] == states[1]
            for matcher in kept:
                matcher.follow(answer)
            assert [
                [m.accepts(t) for t in range(8)] + [m.complete()] for m in (kept[0].copy(), kept[1].copy())
            ] == states
            if not states[0][token]:
                break
            answer = [*answer, token]
            for matcher in fresh:
                matcher.follow(answer)


def test_bytes_of_real_tokenizers(stories):
    lm = stories
    vocabulary = Vocabulary.of(lm.tokenizer, lm.vocab_size + 3)
    for text in ('Once upon a time, Tim said: "no!"', " two  spaces\n", "naïve 日本語 🎉"):
        ids = [i for i in lm.tokenizer(text)["input_ids"] if vocabulary.pieces[i]]
        assert vocabulary.text(ids) == lm.decode(ids)
    assert len(vocabulary.pieces) == lm.vocab_size + 3 and not vocabulary.pieces[-1]
    assert not any(vocabulary.pieces[i] for i in lm.tokenizer.all_special_ids)
    with pytest.raises(UnsupportedModelError, match="byte"):
        Vocabulary.of(object(), 5)


def test_wrong_constraints_are_refused(stories, monkeypatch, tmp_path):
    pytest.importorskip("llguidance")
    for options, expected in (
        ({"regex": "a("}, "regex"),
        ({"json": '{"type": "nonsense"}'}, "json"),
        ({"json": '{"type": "string", "minLength": 5, "maxLength": 2}'}, "minLength"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": str(tmp_path / "none.lark")}, "readable file"),
        ({"regex": "a", "predicate": bool}, "one constraint"),
        ({"critic": len}, "particles"),
        ({"particles": 0}, "particles"),
        ({"ess": 1.5}, "ess"),
    ):
        with pytest.raises(OptionError, match=expected):
            AWRS(**options)
    for method in (AWRS(regex=r"[^\s\S]"), AWRS(predicate=lambda text: False)):
        with pytest.raises(ConstraintError, match="no text satisfies"):
            method.prepare(stories.model, stories.tokenizer)
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        AWRS(regex="a").prepare(stories.model, None)
    with pytest.raises(OptionError, match="temperature 0"):
        generate(stories, "x", "awrs:particles=2,regex=a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConstraintError, match="pip install"):
        AWRS(regex="a")


# ------------------------------------------------------------------------------------------ one particle: a chooser


def answers(lm, method, prompts, seeds=(0,), new=40, temperature=1.0):
    """Answers of a method that was built in Python, with its draws counted."""
    method.prepare(lm.model, lm.tokenizer)
    done, checks = [], []
    for seed in seeds:
        task = Task(
            lm.model, lm.tokenizer, lm.encode(prompts, raw=True), Sampler(temperature, seed=seed), new, lm.eos_token_ids
        )
        with attached(lm.model):
            if method.owns_loop:
                loop = method.loop(task)
            else:
                loop = Loop(task.target(), task.prompts, method.chooser(task), new, task.end_tokens)
            for _ in loop:
                pass
        done += loop.sequences
        checks += method.counts.per_token
    return done, checks


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_answers_are_valid(stories, tmp_path, temperature):
    pytest.importorskip("llguidance")
    grammar = tmp_path / "sums.lark"
    grammar.write_text('start: sum\nsum: num | num "+" sum\nnum: /[0-9]{1,2}/ | "(" sum ")"\n')
    schema = tmp_path / "person.json"
    schema.write_text(PERSON)

    def person(text):
        found = json.loads(text)
        return set(found) == {"name", "old"} and len(found["name"]) <= 6 and isinstance(found["old"], bool)

    def is_sum(text):
        while "(" in text:
            reduced = re.sub(r"\((?:\d\d?\+)*\d\d?\)", "1", text)
            if reduced == text:
                return False
            text = reduced
        return re.fullmatch(r"(?:\d\d?\+)*\d\d?", text)

    finished = 0
    for recipe, valid in (
        (rf"awrs:regex={NO_E}", lambda text: re.fullmatch(NO_E, text)),
        (f"awrs:json={schema}", person),
        (f"awrs:grammar={grammar}", is_sum),
    ):
        for seed in range(6):
            for output in generate(
                stories, ["Once", "Tim was"], recipe, temperature=temperature, seed=seed, max_new_tokens=60, raw=True
            ):
                if output.stats.finish == "stop":
                    finished += 1
                    assert valid(output.text), (recipe, output.text)
    assert finished > 18


def test_answers_of_particles_are_valid(stories):
    pytest.importorskip("llguidance")
    outputs = generate(
        stories,
        ["Once upon a time", "Tim"],
        rf"awrs:regex={NO_E},particles=6",
        temperature=1.0,
        max_new_tokens=40,
        raw=True,
    )
    for output in outputs:
        assert len(output.branches) == 6
        texts = [output, *(branch for branch in output.branches if branch.finish == "stop")]
        assert all(re.fullmatch(NO_E, text.text) for text in texts)


def test_no_constraint_changes_nothing(stories):
    prompts = ["Once upon a time", "Lily"]
    for temperature in (0.0, 1.0):
        plain = generate(stories, prompts, temperature=temperature, max_new_tokens=30, seed=5, raw=True)
        for recipe in ("awrs", "awrs + token-recycling:nodes=8"):
            same = generate(stories, prompts, recipe, temperature=temperature, max_new_tokens=30, seed=5, raw=True)
            assert [output.token_ids for output in same] == [output.token_ids for output in plain]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "others",
    [
        "token-recycling:nodes=12",
        "prompt-lookup",
        "keyformer:keep=50%",
        "token-recycling:nodes=12 + keyformer:keep=50%",
    ],
)
def test_drafts_change_nothing(stories, others, temperature):
    """Also over a cache that evicts, where accepted drafts are cut and chosen anew."""
    pytest.importorskip("llguidance")
    prompts = ["Once upon a time there was a", "Lily and Tim like to play. Lily and Tim"]
    constraint = "awrs:regex=([^eE]{5,12}[.!] ?){2,5}"
    kept = " + ".join(part for part in others.split(" + ") if "keyformer" in part)
    options = {"temperature": temperature, "max_new_tokens": 60, "seed": 2, "raw": True}
    alone = generate(stories, prompts, f"{constraint} + {kept}", **options)
    drafted = generate(stories, prompts, f"{constraint} + {others}", **options)
    assert [output.token_ids for output in drafted] == [output.token_ids for output in alone]
    assert "keyformer" in others or sum(output.trace.drafted for output in drafted) > 0


def test_predicates_and_counts(stories):
    asked = []

    def vowels_apart(text):
        asked.append(text)
        if re.search("[aeiou]{2}|e", text):
            return False
        return "complete" if text.endswith(".") else "alive"

    done, checks = answers(stories, AWRS(predicate=vowels_apart), ["Once upon a time"] * 3, seeds=range(4))
    for sequence in done:
        text = stories.decode(sequence.new_ids)
        assert not re.search("[aeiou]{2}|e", text) and (sequence.finish != "stop" or text.endswith("."))
    assert len(checks) == sum(len(sequence.new_ids) for sequence in done) and min(checks) >= 1
    assert len(asked) <= sum(checks) + 1 + len(done) * 2  # answers are remembered, never asked twice


def test_the_likeliest_accepted_token_at_temperature_zero(stories):
    done, _ = answers(
        stories, AWRS(predicate=lambda text: "e" not in text), ["Once upon a time"], temperature=0.0, new=12
    )
    ids, n = done[0].ids, done[0].n_prompt
    vocabulary = Vocabulary.of(stories.tokenizer, stories.vocab_size)
    with torch.inference_mode():
        logits = stories.model(torch.tensor([ids])).logits[0]
    for at in range(n, len(ids)):
        good = {t for t, piece in enumerate(vocabulary.pieces) if piece and b"e" not in piece}
        allowed = torch.tensor([t in good.union(stories.eos_token_ids) for t in range(stories.vocab_size)])
        prefix = ids[n:at]
        for token in allowed.nonzero()[:, 0].tolist():  # bytes that are no text
            data = b"".join(vocabulary.piece(t, i == 0) for i, t in enumerate([*prefix, token]))
            if judge(lambda text: True, data) == "dead":
                allowed[token] = False
        assert logits[at - 1].masked_fill(~allowed, -math.inf).argmax() == ids[at]


def test_a_dead_end_is_an_error(stories):
    def only_two(text):
        return "alive" if len(text) < 3 else "dead"

    with pytest.raises(ConstraintError, match="none of 512 tokens continues"):
        answers(stories, AWRS(predicate=only_two), ["Once"])
    with pytest.raises(ConstraintError, match="none of 2 tokens"):
        answers(stories, AWRS(predicate=lambda text: "alive" if text == "" else "dead", max_rejects=2), ["Once"])
    with pytest.raises(ConstraintError, match="prompt 1: all 4 particles"):
        answers(stories, AWRS(predicate=only_two, particles=4), ["Once", "Tim"])
