"""The figures of the report card, each against a slow and obvious formulation; and defects that each must show."""

from __future__ import annotations

import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.probe.laws import toy
from tokenary.probe.token_reduction_position import (
    TokenReductionPosition,
    alignment,
    coherence,
    effects,
    overthinking,
    stability,
)
from tokenary.probe.token_reduction_position import hallucination as false
from tokenary.probe.token_reduction_position import maps as of_maps
from tokenary.probe.token_reduction_position.effects import Parts, effect, estimate
from tokenary.probe.token_reduction_position.grounding import grounding, patch_attention
from tokenary.probe.token_reduction_position.passages import COLOURS, Writer, told_apart
from tokenary.probe.token_reduction_position.text import Way, at_random, log_likelihoods, nothing, strided, written
from tokenary.reduce.base import Context
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.reduce_random import ReduceRandom

RNG = np.random.default_rng(0)
ids = st.lists(st.integers(0, 4), max_size=24)


def random_mass(batch=2, m=5, n=12, seed=0):
    """Every patch belongs to one of m tokens or to none."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(-1, m, (batch, n), generator=generator)
    return (owner[:, None] == torch.arange(m)[:, None]).float()


# -- effects ----------------------------------------------------------------------------------------------------------


def test_a_paired_effect_is_what_resampling_one_by_one_gives():
    method, control = RNG.random((3, 40)), RNG.random((2, 40))
    below = (RNG.random(40) < 0.7).astype(float)
    found = effect(Parts.mean(method, below), Parts.mean(control, below), resamples=400, seed=5)
    draws = []
    for weight in effects.weights(40, 400, 5):
        rows = [i for i, times in enumerate(weight) for _ in range(int(times)) if below[i]]
        draws.append(method[:, rows].mean() - control[:, rows].mean())
    own = below > 0
    assert found.value == pytest.approx(method[:, own].mean() - control[:, own].mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_an_effect_counts_items_and_not_arms():
    hard = RNG.random(200)
    other = hard + 0.01
    assert effect(Parts.mean(other), Parts.mean(hard)).moved  # paired: the same on every item
    assert not effect(Parts.mean(hard), Parts.mean(hard)).moved
    assert estimate(Parts.mean(hard)).high - estimate(Parts.mean(hard)).low > 0.02


def test_what_is_not_defined_is_said():
    nowhere = Parts.mean(np.ones(4), np.zeros(4))
    assert math.isnan(nowhere.value) and estimate(nowhere).to_json() == {"value": None, "low": None, "high": None}


def test_jackknife():
    values = RNG.random(400)
    groups = [values[np.arange(400) % 20 != g].mean() for g in range(20)]
    found = effects.jackknife(groups, values.mean())
    assert (found.high - found.low) / (2 * 2.09) == pytest.approx(values.std() / 20, rel=0.5)
    assert effects.over_seeds([0.1, 0.2, 0.3]).low == pytest.approx(0.2 - 4.30 * 0.1 / 3**0.5)
    assert math.isnan(effects.over_seeds([0.1, math.nan]).low)


# -- grounding and maps -----------------------------------------------------------------------------------------------


def test_attention_is_handed_to_patches_by_size():
    mass, attention = random_mass(), torch.rand(2, 5)
    slow = torch.zeros(2, 12)
    for b in range(2):
        for m in range(5):
            own = mass[b, m].nonzero()[:, 0].tolist()
            for n in own:
                slow[b, n] += attention[b, m] / len(own)
    assert torch.allclose(patch_attention(attention, mass), slow)
    stands = mass.sum(2) > 0
    assert torch.allclose(slow.sum(1), (attention * stands).sum(1))


def test_grounding_against_loops():
    masses = [random_mass(seed=s) for s in (1, 2)]
    attention = [torch.rand(2, 5) for _ in masses]
    asked = torch.rand(2, 12) < 0.4
    found = grounding(attention, masses, asked)
    for b in range(2):
        patches = sum(patch_attention(a, m)[b] for a, m in zip(attention, masses, strict=True)) / 2
        assert found.mass[b] == pytest.approx(float(patches[asked[b]].sum()))
        tied = [n for n in range(12) if patches[n] >= patches.max() * (1 - 1e-5)]
        assert found.pointing[b] == pytest.approx(np.mean([bool(asked[b, n]) for n in tied]))
        there = [n for n in range(12) if asked[b, n] and masses[-1][b, :, n].sum() > 0]
        assert found.evidence[b] == pytest.approx(len(there) / max(1, int(asked[b].sum())))


def test_positions_shifted_by_one_show_in_grounding():
    """Attention lies on one patch of the object; a map that is off by one lays it elsewhere."""
    numbers = torch.arange(0, 64, 4)
    asked = torch.zeros(50, 64, dtype=torch.bool)
    wanted = torch.from_numpy(RNG.integers(0, 16, 50))
    asked[torch.arange(50), numbers[wanted]] = True
    attention = torch.full((50, 16), 0.2 / 16)
    attention[torch.arange(50), wanted] += 0.8
    sound, shifted = ((numbers + by == torch.arange(64)[:, None]).T.float().expand(50, -1, -1) for by in (0, 1))
    right, wrong = (grounding([attention], [mass], asked) for mass in (sound, shifted))
    for name in ("mass", "pointing", "evidence"):
        moved = effect(Parts.mean(getattr(wrong, name).numpy()), Parts.mean(getattr(right, name).numpy()))
        assert moved.high < 0, name


def test_traits_of_maps_against_loops():
    mass, anchors = random_mass(), torch.randint(0, 12, (2, 5))
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4)).float()
    for b in range(2):
        columns = mass[b].sum(0)
        share = columns / columns.sum()
        entropy = -sum(float(p) * math.log(p) for p in share.tolist() if p > 0)
        assert of_maps.coverage(mass)[b] == pytest.approx(entropy / math.log(12))
        far = sum(
            float(mass[b, m, n]) * math.dist(places[anchors[b, m]].tolist(), places[n].tolist())
            for m in range(5) for n in range(12)
        )  # fmt: skip
        assert of_maps.locality(mass, anchors, places)[b] == pytest.approx(far / float(mass[b].sum()))
    states, there = torch.randn(2, 5, 7), torch.tensor([[True] * 5, [True, True, False, True, False]])
    for b in range(2):
        own = [m for m in range(5) if there[b, m]]
        best = [
            max(float(torch.cosine_similarity(states[b, i], states[b, j], dim=0)) for j in own if j != i) for i in own
        ]
        assert of_maps.redundancy(states, there)[b] == pytest.approx(np.mean(best), abs=1e-6)
    assert of_maps.redundancy(states[:, :1]).tolist() == [0, 0]
    assert of_maps.conserved(torch.tensor([[4.0, 2.0]]), 12).tolist() == [0.5]


# -- alignment --------------------------------------------------------------------------------------------------------


def test_neighbours_retrieval_and_cka_against_loops():
    x, y = torch.randn(30, 6), torch.randn(30, 4)
    y[:, :3] += 2 * x[:, :3]

    def near(states):
        centred = states - states.mean(0)
        return np.array([[float(torch.cosine_similarity(a, b, dim=0)) for b in centred] for a in centred])

    best = [
        [set(np.argsort(-np.where(np.arange(30) == i, -9, row))[:5]) for i, row in enumerate(near(s))] for s in (x, y)
    ]
    slow = [len(a & b) / 5 for a, b in zip(*best, strict=True)]
    assert alignment.mutual_neighbours(x, y, 5).tolist() == pytest.approx(slow)
    k, l = ((s - s.mean(0)).double().numpy() for s in (x, y))
    gram = [k @ k.T, l @ l.T]
    hsic = [(a * b).sum() for a, b in ((gram[0], gram[1]), (gram[0], gram[0]), (gram[1], gram[1]))]
    assert alignment.linear_cka(x, y) == pytest.approx(hsic[0] / (hsic[1] * hsic[2]) ** 0.5)
    assert alignment.linear_cka(x, 3 * x + 1) == pytest.approx(1)
    assert alignment.retrieved(x, x).tolist() == [1] * 30
    moved = x.roll(1, 0)
    assert alignment.retrieved(x, moved).sum() == 0


def test_pooling_is_a_mean_over_patches():
    patches = torch.randn(1, 6, 3)
    tokens = torch.stack([patches[0, :4].mean(0), patches[0, 4], patches[0, 5]])[None]
    assert torch.allclose(alignment.pooled(tokens, torch.tensor([[4.0, 1.0, 1.0]])), patches.mean(1))
    assert not torch.allclose(alignment.pooled(tokens, torch.ones(1, 3)), patches.mean(1))  # sizes dropped


# -- hallucination ----------------------------------------------------------------------------------------------------


def test_existence_against_counting():
    yes, positive, among = RNG.random((2, 60)) < 0.5, RNG.random(60) < 0.5, RNG.random(60) < 0.8
    found = {name: parts.value for name, parts in false.existence(yes, positive, among).items()}
    table = Counter((bool(s), bool(p)) for row in yes for s, p, a in zip(row, positive, among, strict=True) if a)
    tp, fp, fn, tn = (table[key] for key in ((True, True), (True, False), (False, True), (False, False)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert found["precision"] == pytest.approx(precision) and found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["yes_rate"] == pytest.approx((tp + fp) / table.total())
    assert found["false_yes"] == pytest.approx(fp / (fp + tn))
    assert found["accuracy"] == pytest.approx((tp + tn) / table.total())


def test_answering_always_yes_shows():
    positive = np.arange(200) % 2 == 0
    honest = np.where(RNG.random(200) < 0.9, positive, ~positive)
    for name in ("accuracy", "precision", "yes_rate", "false_yes"):
        always, before = (false.existence(said, positive)[name] for said in (np.ones(200, bool), honest))
        assert effect(always, before).moved, name


def slow_false_yes(scores, positive, recall):
    best = 1.0
    for threshold in [*scores, math.inf]:
        said = scores >= threshold
        if said[positive].mean() >= recall - 1e-9:
            best = min(best, said[~positive].mean())
    return best


@pytest.mark.parametrize("digits", [8, 1])
def test_false_yes_at_equal_recall_against_all_thresholds(digits):
    scores, control = RNG.normal(size=(2, 80)).round(digits)
    positive = RNG.random(80) < 0.5
    control = control + positive
    recall = (control[positive] > 0).mean()
    found = false.false_yes_at_equal_recall(scores, control, positive, resamples=50)
    slow = slow_false_yes(scores, positive, recall) - slow_false_yes(control, positive, recall)
    assert found.value == pytest.approx(slow)
    fixed = false.false_yes_at_equal_recall(scores, control, positive, recall=0.9, resamples=50)
    assert fixed.value == pytest.approx(slow_false_yes(scores, positive, 0.9) - slow_false_yes(control, positive, 0.9))
    assert false.false_yes_at(scores, positive, recall) == pytest.approx(slow_false_yes(scores, positive, recall))


def test_at_equal_recall_caution_is_no_merit():
    positive = np.arange(400) % 2 == 0
    control = RNG.normal(size=400) + positive
    assert false.existence(control - 1 > 0, positive)["false_yes"].value < 0.5  # fewer false yes, by saying no
    cautious = false.false_yes_at_equal_recall(control - 1, control, positive, resamples=200)
    assert (cautious.value, cautious.low, cautious.high) == (0, 0, 0)
    better = false.false_yes_at_equal_recall(control + 2 * positive, control, positive, resamples=200)
    assert better.high < 0


def test_lists_against_sets():
    counts = false.listing([["a", "a", "b"], [], ["c"]], [["a", "d"], ["b"], ["c", "c"]])
    assert counts["named"].tolist() == [3, 0, 1] and counts["false"].tolist() == [1, 0, 0]
    assert counts["found"].tolist() == [1, 0, 1] and counts["there"].tolist() == [2, 1, 1]
    assert counts["twice"].tolist() == [1, 0, 0]
    rates = {name: parts.value for name, parts in false.chair([counts, counts]).items()}
    assert rates["false_names"] == pytest.approx(1 / 4) and rates["answers_with_false_names"] == pytest.approx(1 / 3)
    assert rates["listing_recall"] == pytest.approx(2 / 4)


def test_divergence_and_agreement():
    seen, blind = torch.randn(2, 5, 7).log_softmax(-1)
    slow = [
        sum(math.exp(p) * (p - q) for p, q in zip(a, b, strict=True))
        for a, b in zip(seen.tolist(), blind.tolist(), strict=True)
    ]
    assert false.divergence(seen, blind).tolist() == pytest.approx(slow)
    assert false.divergence(seen, seen).tolist() == [0] * 5
    assert false.agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])).tolist() == [1, 0, 1]


# -- coherence, stability ---------------------------------------------------------------------------------------------


@given(ids, st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_repetition_against_all_spans(text, n):
    spans = [tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    repeated = [len(span) for span, times in Counter(spans).items() if times > 1]
    assert coherence.longest_repeat(text) == max(repeated, default=0)
    grams = [span for span in spans if len(span) == n]
    assert coherence.distinct(text, n) == (len(set(grams)) / len(grams) if grams else 1)


def test_contradictions_and_positions():
    assert coherence.contradictions([1, -1, 2], [1, 1, 1]).tolist() == [0, 0, 1]
    anchors = np.array([3, 5, 9])
    assert coherence.position_errors(anchors, anchors, compact=False) == 0
    assert coherence.position_errors(anchors + 1, anchors, compact=False) == 3
    assert coherence.position_errors(np.arange(3), anchors, compact=True) == 0


def test_spikes_variation_and_the_ladder():
    calm = [2 - 0.01 * i + 0.02 * (-1) ** i for i in range(60)]
    spiky = [*calm[:40], 3.0, *calm[41:]]
    assert stability.spikes(calm) == 0 and stability.spikes(spiky) == 1
    assert stability.spikes([*calm, math.nan]) == 1
    assert stability.variation([1.0, 3.0]) == pytest.approx(2**0.5 / 2) and math.isnan(stability.variation([1.0]))
    falling, rising = calm, calm[::-1]
    runs = {0.1: [falling, falling], 0.01: [falling, falling], 1.0: [falling, rising]}
    assert stability.largest_stable(runs) == 0.1
    assert stability.largest_stable({0.1: [rising]}) is None
    assert stability.diverged([*falling, math.inf])


def test_rank_sinks_and_dead_keys():
    basis = torch.linalg.qr(torch.randn(50, 4))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]  # orthogonal columns of zero mean: four equal singular values
    assert stability.effective_rank(basis) == pytest.approx(4, rel=1e-3)
    assert stability.effective_rank(torch.ones(5, 3)) == 1
    assert math.isnan(stability.effective_rank(torch.full((3, 3), math.nan)))
    attention = torch.full((100,), 0.5 / 99)
    attention[0] = 0.5
    assert stability.sink_share(attention) == pytest.approx(0.5) and stability.dead_share(attention) == 0
    assert stability.dead_share(torch.tensor([1.0, 1.0, 1.0, 0.01])) == 0.25


# -- text -------------------------------------------------------------------------------------------------------------


def test_ways_of_reading():
    context, tail = list(range(100, 110)), [1, 2]
    assert Way().prompt(0, context, tail) == (context + tail, list(range(12)))
    some = Way(strided(0.5), compact=False)
    kept, places = some.prompt(0, context, tail)
    assert len(kept) == 1 + 4 + 2 and kept[:1] == [100] and kept[-2:] == tail
    assert places == [*(token - 100 for token in kept[:-2]), 10, 11]
    assert Way(nothing).prompt(0, context, tail)[0] == [100, 1, 2]
    assert at_random(0.5, 1)(3, 20) == at_random(0.5, 1)(3, 20) != at_random(0.5, 2)(3, 20)


def test_all_of_a_context_is_read_as_the_model_does():
    lm = toy()
    context, tail = list(range(5, 35)), [7, 9, 11]
    with torch.inference_mode():
        whole = lm.model(input_ids=torch.tensor([context + tail])).logits[0].log_softmax(-1)
    assert torch.allclose(log_likelihoods(lm.model, Way(), 0, context, tail), whole[-4:], atol=1e-5)
    text, ids = written(lm.model, Way(), 0, context, 6), list(context)
    for token in text:
        with torch.inference_mode():
            assert int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_facts_stand_where_they_should_and_are_told_apart():
    lm = toy()
    writer = Writer(lm, 3)
    for depth in (0.1, 0.9):
        fact = writer.fact(200, depth, 0)
        assert abs(len(fact.context) - 200) <= 1 and len(set(fact.values)) == 4
        text = lm.decode(fact.context)
        told = text.index(" Remember that")
        assert list(writer.told)[fact.stated] in text[told:] and 0 <= fact.stated < 4
        assert abs(told / len(text) - depth) < 0.3
    assert told_apart({"a": (1, 2), "b": (1, 3), "c": (1, 4), "d": (1, 5)}) == ((1,), {"a": 2, "b": 3, "c": 4, "d": 5})
    assert told_apart({"a": (1,), "b": (1,)}) is None and len(COLOURS) > 4


# -- thinking ---------------------------------------------------------------------------------------------------------


def test_cuts_and_what_is_lost_and_won():
    assert overthinking.cuts(40) == [0, 10, 20, 30, 40] and overthinking.cuts(0) == [0] * 5
    assert overthinking.cuts(3) == [0, 1, 2, 2, 3] and overthinking.cuts(1) == [0, 0, 1, 1, 1]
    right = np.array([[0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=bool)
    lost, won = overthinking.early_and_late(right)
    assert lost.tolist() == [True, False, False, False, False]  # what was right before thinking is another matter
    assert won.tolist() == [False, False, False, True, False]


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_figures_of_thinking_against_loops(seeds, n, seed):
    rng = np.random.default_rng(seed)
    right, tokens = rng.random((seeds, n, 5)) < 0.5, rng.integers(0, 9, (seeds, n)).astype(float)
    found = {name: each.value for name, each in overthinking.Thoughts(tokens, right).parts().items()}
    flat = [list(row) for run in right for row in run]
    assert found["answer_right"] == pytest.approx(sum(row[4] for row in flat) / len(flat))
    assert found["right_at_0%"] == pytest.approx(sum(row[0] for row in flat) / len(flat))
    assert found["tokens"] == pytest.approx(tokens.sum() / len(flat))
    lost = [any(row[1:4]) and not row[4] for row in flat]
    assert found["right_early_wrong_late"] == pytest.approx(sum(lost) / len(flat))
    won = [not all(row[1:4]) and row[4] for row in flat]
    assert found["wrong_early_right_late"] == pytest.approx(sum(won) / len(flat))
    per_token = 100 * sum(row[4] for row in flat) / tokens.sum() if tokens.sum() else math.nan
    assert found["right_per_100_tokens"] == pytest.approx(per_token, nan_ok=True)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_answers_from_a_cropped_cache_are_those_of_reading_anew(reduced, stops, monkeypatch):
    lm = toy()
    riddle = Writer(lm, 1).riddle(300, 0)

    def inside(model, number, start, count):
        context = Context(grid=(1, count), samples=(number,))
        return DecoderReduction(
            model, ReduceRandom(Budget(ratio=0.4)), "decoder:1", start=start, count=count, context=context
        )

    way = Way(inside=inside if reduced else None)

    def anew(tail):
        ids = torch.tensor([[*riddle.context, *tail]])
        with way.around(lm.model, 0, len(riddle.context)), torch.inference_mode():
            return lm.model(input_ids=ids, use_cache=False).logits[0, -1]

    expected = []
    for _ in range(9):
        expected.append(int(anew([*riddle.question, *expected]).argmax()))
    end = expected[6] if stops else None
    where = expected.index(end) if stops else 9
    read, kept = [], overthinking.forward
    monkeypatch.setattr(overthinking, "forward", lambda *given: read.append(kept(*given)) or read[-1])
    chain, told = overthinking.think(lm.model, way, 0, riddle, lambda token: token == end, 9)
    assert chain == expected[:where]
    slow = [anew([*riddle.question, *chain[:cut], *riddle.forced]) for cut in overthinking.cuts(len(chain))]
    torch.testing.assert_close(
        torch.stack([logits[0, -1] for logits, _ in read[::-1]]), torch.stack(slow), atol=1e-4, rtol=1e-4
    )
    assert told == [int(logits[list(riddle.values)].argmax()) for logits in slow]


DOT = 40


class Waverer(torch.nn.Module):
    """Writes `dots` many dots; tells the stated value while at most `faithful` of them stand before the question."""

    device = torch.device("cpu")

    def __init__(self, model, riddle, faithful, dots):
        super().__init__()
        self.riddle, self.faithful, self.dots = riddle, faithful, dots
        self.config, self.generation_config = model.config, model.generation_config

    def forward(self, input_ids, past_key_values=None, **_):
        cache = past_key_values or Read()
        cache.ids += input_ids[0].tolist()
        thought = cache.ids[len(self.riddle.context) + len(self.riddle.question) :]
        logits = torch.zeros(1, 1, self.config.vocab_size)
        forced = list(self.riddle.forced)
        if thought[-len(forced) :] == forced:
            right = len(thought) - len(forced) <= self.faithful
            logits[0, 0, self.riddle.values[self.riddle.stated if right else self.riddle.stated - 1]] = 1
        else:
            logits[0, 0, DOT if len(thought) < self.dots else self.config.eos_token_id] = 1
        return SimpleNamespace(logits=logits, past_key_values=cache)


class Read:
    """A cache that holds ids."""

    def __init__(self):
        self.ids = []

    def crop(self, count):
        assert count <= 0
        self.ids = self.ids[: len(self.ids) + count]


def test_a_chain_that_thinks_too_long_shows():
    lm, found = toy(), {}
    riddles = [Writer(lm, 1).riddle(300, 0)]
    for faithful in (-1, 0, 5, 40):
        lm.model = Waverer(lm.model, riddles[0], faithful, 20)
        found[faithful] = overthinking.thoughts(lm, [Way()], riddles, 40)
        assert found[faithful].tokens.tolist() == [[20]]
    assert found[5].right.tolist() == [[[True, True, False, False, False]]]
    lost = {faithful: each.parts()["right_early_wrong_late"].value for faithful, each in found.items()}
    assert lost == {-1: 0, 0: 0, 5: 1, 40: 0}
    shorter = overthinking.thoughts(lm, [Way()], riddles, 10)  # of 10 tokens; the last was not read
    assert shorter.tokens.tolist() == [[10]] and shorter.parts()["right_per_100_tokens"].value == 10
    assert overthinking.ends_chain(lm)(lm.tokenizer("\n")["input_ids"][0]) and not overthinking.ends_chain(lm)(DOT)


def test_riddles_state_what_they_ask():
    lm = toy()
    writer = Writer(lm, 3)
    for number in range(5):
        riddle = writer.riddle(400, number)
        text, question = lm.decode(riddle.context), lm.decode(riddle.question)
        asked = re.search("Which colour is (.*)\\?", question)[1]
        told = dict(re.findall("Remember that (.*?) is painted( .*?)\\.", text))
        first = told[asked].removeprefix(" in the same colour as ")
        assert (first in told) == bool(number % 2) and len(set(told.values())) == 3
        colour = told[first if number % 2 else asked]
        assert list(writer.told).index(colour) == riddle.stated and len(riddle.context) == 400
        assert text.count("Remember that") == 3 and f"{asked} is painted" in lm.decode(riddle.forced)
        assert writer.riddle(400, number) == riddle != writer.riddle(400, number + 1)


def test_the_probe_reports_and_refuses():
    report = TokenReductionPosition(**{**TokenReductionPosition.toy_options, "keep": 0.5}).run(toy(), seed=1)
    arms = report.figures["arms"]
    assert arms["random"]["over_random"] is None and set(arms) >= {"none", "strided", "blind"}
    assert arms["none"]["facts_by_length_and_depth"].keys() == {"60", "120", "240"}
    with pytest.raises(OptionError):
        TokenReductionPosition(length=4000).run(toy())
    lm = toy()
    lm.tokenizer = None
    with pytest.raises(UnsupportedModelError):
        TokenReductionPosition().run(lm)
