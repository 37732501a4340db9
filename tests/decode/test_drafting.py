"""Choosing tokens, ranking them, the size of drafts; prompt lookup against a slow reference."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError, UnknownNameError
from tokenary.core.sampling import Sampler, invert
from tokenary.decode import PromptLookup, TokenRecycling
from tokenary.decode.base import Loop
from tokenary.decode.prompt_lookup import find
from tokenary.decode.scores import top_k
from tokenary.decode.width import DraftWidth
from tokenary.hf.target import Target, attached
from tokenary.models import tiny_lm

PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3], [10, 11] * 5, [4, 3, 2, 1]]


def decode(model, prompts, proposer=None, sampler=None, n=40, **options):
    with attached(model):
        loop = Loop(Target(model), prompts, sampler or Sampler(), n, proposer=proposer, **options)
        list(loop)
    return loop.sequences


@given(st.integers(1, 3), st.integers(1, 9), st.integers(130, 2000), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_top_k_equals_a_full_sort(rows, k, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)]).float()
    assert torch.equal(top_k(logits, k), logits.argsort(-1, descending=True)[:, :k])


def test_inverting_never_chooses_what_has_no_probability():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    assert invert(probabilities.expand(4, -1), [0.0, 0.4999, 0.5, 1 - 1e-16]) == [1, 1, 3, 3]


def test_sampling_follows_the_processed_distribution():
    sampler = Sampler(temperature=0.7, top_k=5, top_p=0.9, seed=1)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    expected = sampler.probabilities(logits)[0]
    assert 1 <= int((expected > 0).sum()) <= 5
    n = 4000
    counts = Counter(sampler(logits, [row], [[0]])[0] for row in range(n))
    distance = sum(abs(counts[i] / n - float(expected[i])) for i in range(12)) / 2
    assert distance < 0.03  # about three times what chance gives


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (Sampler(temperature=1, top_p=0.79).probabilities(logits) > 0).tolist() == [[True, True, False, False]]
    assert (Sampler(temperature=1, top_p=0.81).probabilities(logits) > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_a_wrong_sampler_is_refused(options):
    with pytest.raises(OptionError):
        Sampler(**options)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_prompt_lookup_equals_an_obvious_search(context, ngram, nodes):
    expected = []
    for n in range(min(ngram, len(context) - 1), 0, -1):
        starts = [i for i in range(len(context) - n) if context[i : i + n] == context[-n:]]
        if starts:
            expected = context[starts[-1] + n : starts[-1] + n + nodes]
            break
    assert find(context, ngram, nodes) == expected


def test_methods_are_found_by_class_and_options_are_checked():
    assert TokenRecycling(nodes="12").options["nodes"] == 12
    assert PromptLookup().options == {"nodes": "auto", "ngram": 3}
    with pytest.raises(OptionError, match="nodes=81"):
        TokenRecycling(nodes=81)
    with pytest.raises(UnknownNameError, match="did you mean nodes"):
        TokenRecycling(node=3)


def measure(width, seconds):
    while not width.ready:
        width.measure(seconds)


def test_width_drafts_nothing_where_nothing_is_accepted_and_much_where_all_is():
    """A pass that costs 1 + 0.05 a row: worth its price only if drafts are accepted."""
    hopeless, splendid = DraftWidth(40), DraftWidth(40)
    for width in (hopeless, splendid):
        measure(width, lambda rows: 1 + 0.05 * rows)
    for _ in range(200):
        n = hopeless.choose(1)
        hopeless.record(hopeless.cost(n + 1), n + 1, [n + 1], [[0]])
        n = splendid.choose(1)
        splendid.record(splendid.cost(n + 1), n + 1, [n + 1], [list(range(n + 1))])
    assert hopeless.choose(1) <= 2
    assert splendid.choose(1) >= 30


def test_width_notices_that_a_pass_became_dear():
    width = DraftWidth(40)
    measure(width, lambda rows: 1.0)
    free = width.choose(1)
    for _ in range(300):
        n = width.choose(1)
        width.record(1 + 0.3 * n, n + 1, [n + 1], [[0, 1]])
    assert width.choose(1) < free == 39


def test_width_cuts_a_draft_of_known_chances_where_it_pays_most():
    width = DraftWidth(40, judged=True)
    assert width.choose(1) == 40 and width.cut([[0.9] * 5]) == 5  # nothing measured yet
    measure(width, lambda rows: 1 + 0.1 * rows)
    for chances in ([], [0.05], [0.9, 0.8, 0.1, 0.05], [0.9] * 30, [0.5, 0.4, 0.3, 0.3, 0.01]):
        best = max(range(len(chances) + 1), key=lambda n: (1 + sum(chances[:n])) / (1 + 0.1 * (n + 1)))
        assert width.cut([chances]) == best
    both = [[0.9, 0.8, 0.7], [0.9]]
    best = max(range(4), key=lambda n: (2 + sum(both[0][:n]) + sum(both[1][:n])) / (1 + 0.1 * 2 * (n + 1)))
    assert width.cut(both) == best
    assert DraftWidth(40, fixed=4, judged=True).cut([[0.001] * 4]) == 4


def test_ends_in_the_middle_of_a_draft():
    model = tiny_lm(seed=5).model
    plain = decode(model, PROMPTS)
    end = plain[0].new_ids[17]
    recycling = TokenRecycling(nodes=30)
    for _ in range(2):
        drafted = decode(model, PROMPTS, recycling, end_tokens=[end])
        expected = [s.new_ids[: s.new_ids.index(end) + 1] if end in s.new_ids else s.new_ids for s in plain]
        assert [s.new_ids for s in drafted] == expected
        assert drafted[0].finish == "stop"
    for n in (1, 2, 3):
        assert [s.new_ids for s in decode(model, PROMPTS, recycling, n=n)] == [s.new_ids[:n] for s in plain]


def test_a_stop_rule_is_asked_after_every_token():
    model, asked = tiny_lm(seed=5).model, []

    def stops(row, ids):
        asked.append((row, len(ids)))
        return row == 1 and len(ids) == len(PROMPTS[1]) + 6

    drafted = decode(model, PROMPTS, TokenRecycling(nodes=30), stops=stops)
    assert len(drafted[1].new_ids) == 6 and len(drafted[0].new_ids) == 40
    assert asked.count((1, len(PROMPTS[1]) + 3)) == 1 and len(asked) == 40 * 3 + 6


def test_sampled_text_does_not_depend_on_drafts_or_neighbours():
    model, sampler = tiny_lm(seed=5).model, Sampler(temperature=1.0, top_p=0.95, seed=11)
    plain = decode(model, PROMPTS, sampler=sampler)
    drafted = decode(model, PROMPTS, TokenRecycling(nodes=20), sampler)
    alone = decode(model, PROMPTS[:1], TokenRecycling(nodes=5), sampler)
    assert [s.new_ids for s in drafted] == [s.new_ids for s in plain]
    assert alone[0].new_ids == plain[0].new_ids
    assert decode(model, PROMPTS, sampler=Sampler(temperature=1.0, seed=12))[0].new_ids != plain[0].new_ids
