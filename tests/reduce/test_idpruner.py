from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.laws import check
from tokenary.reduce.idpruner import (
    IDPruner,
    Scorer,
    SoftTopK,
    load_scorer,
    marginal_relevance,
    save_scorer,
    scaled,
    trade_off,
    train_scorer,
)
from tokenary.reduce.idpruner.training import rate
from tokenary.reduce.law_tools import toy_tokens


def slow(raw, features, keep, weight, parallel=1):
    """Maximal marginal relevance for one picture, with the whole table of likenesses: the picks in their order."""
    low, high = min(raw), max(raw)
    importance = [(value - low) / (high - low + 1e-6) for value in raw]
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    like = (unit @ unit.T).tolist()
    picks = [max(range(len(raw)), key=lambda i: (importance[i], -i))]
    while len(picks) < keep:
        others = [i for i in range(len(raw)) if i not in picks]
        score = {i: weight * importance[i] - (1 - weight) * max(like[i][j] for j in picks) for i in others}
        picks += sorted(others, key=lambda i: (-score[i], i))[: min(parallel, keep - len(picks))]
    return picks


def random_tokens(seed, n=30, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, generator=generator), torch.randn(batch, n, 5, generator=generator)


@pytest.fixture
def scorer_file(tmp_path):
    scorer = Scorer(32)
    for i, parameter in enumerate(scorer.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 4
    save_scorer(scorer, tmp_path / "scorer.safetensors")
    return str(tmp_path / "scorer.safetensors")


def test_laws(scorer_file):
    others = ({"fallback": "norm", "parallel": 4, "positions": "compact"}, {"fallback": "text"})
    for options in ({}, {"scorer": scorer_file}, *others):
        report = check("idpruner", **options)
        assert report.ok and all(finding.verdict == "holds" for finding in report.findings), str(report)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.integers(1, 30), st.sampled_from([1, 3]))
def test_it_is_the_rule_written_out(seed, weight, keep, parallel):
    raw, features = random_tokens(seed)
    chosen = marginal_relevance(raw, features, keep, weight, parallel=parallel)
    expected = slow(raw[0].tolist(), features[0].double(), keep, weight, parallel)
    assert chosen.index.flatten().tolist() == sorted(expected)


def test_it_is_greedy_and_no_top_of_one_score():
    raw, features = random_tokens(3, n=60)
    unit = torch.nn.functional.normalize(features, dim=-1)
    crowd = (unit @ unit.mean(1)[..., None])[..., 0]
    at_once = (0.5 * scaled(raw, raw > -9) - 0.5 * crowd)[0].topk(12).indices.sort().values
    assert marginal_relevance(raw, features, 12, 0.5).index.flatten().tolist() != at_once.tolist()


def test_the_ends_are_the_top_of_importance_and_farthest_points():
    raw, features = random_tokens(5)
    important = marginal_relevance(raw, features, 9, 1.0).index.flatten().tolist()
    assert important == raw[0].topk(9).indices.sort().values.tolist()
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    picks = [int(raw[0].argmax())]
    while len(picks) < 9:  # the point whose nearest pick is farthest
        distance = torch.cdist(unit, unit[picks]).amin(1)
        picks.append(int(distance.argmax()))
    assert marginal_relevance(raw, features, 9, 0.0).index.flatten().tolist() == sorted(picks)


def test_of_copies_one_is_picked_while_others_as_important_are_left():
    features = torch.eye(6)[[0, 0, 1, 2, 2, 3, 4, 5]][None]
    raw = torch.ones(1, 8)
    picked = features[0, marginal_relevance(raw, features, 6, 0.5).index.flatten()].argmax(-1)
    assert sorted(picked.tolist()) == [0, 1, 2, 3, 4, 5]
    together = marginal_relevance(raw, features, 6, 0.5, parallel=5).index.flatten()  # unpunished within a round
    assert len(set(features[0, together].argmax(-1).tolist())) < 6


def test_importance_is_scaled_before_it_is_weighed():
    raw, features = random_tokens(7)
    expected = marginal_relevance(raw, features, 8, 0.5).index
    assert torch.equal(marginal_relevance(1000 * raw + 77, features, 8, 0.5).index, expected)
    allowed = torch.tensor([[True, True, False, True]])
    found = scaled(torch.tensor([[2.0, 4.0, 100.0, 3.0]]), allowed)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.0, 0.5]]), atol=1e-5, rtol=0)


def test_what_is_not_allowed_is_never_picked_and_rows_may_run_out():
    raw, features = random_tokens(8, batch=2)
    allowed = torch.ones(2, 30, dtype=torch.bool)
    allowed[0, 4:], allowed[1, ::3] = False, False
    chosen = marginal_relevance(raw, features, 6, 0.5, allowed)
    assert chosen.index[0][chosen.valid[0]].tolist() == [0, 1, 2, 3]
    alone = marginal_relevance(raw[1:, allowed[1]], features[1:, allowed[1]], 6, 0.5)
    assert chosen.index[1].tolist() == allowed[1].nonzero().flatten()[alone.index.flatten()].tolist()


def test_the_score_is_the_mean_over_all_pairs(scorer_file):
    scorer, x = load_scorer(scorer_file), torch.randn(2, 9, 32)
    q, k = scorer.query(x), scorer.key(x)
    torch.testing.assert_close(scorer(x), (q @ k.mT / math.sqrt(16)).mean(-1))
    there = torch.arange(9) < 5
    torch.testing.assert_close(scorer(x, there.expand(2, -1))[:, :5], scorer(x[:, :5]))
    fresh = Scorer(256)
    assert sum(p.numel() for p in fresh.parameters()) == 2 * (256 * 128 + 128)
    assert float(fresh.key.weight.detach().std()) == pytest.approx(1e-4, rel=0.05) and not fresh.key.bias.any()


def test_importance_comes_from_the_scorer_or_from_the_fallback_that_is_named(scorer_file):
    with_scorer = IDPruner(scorer=scorer_file)
    x, context = toy_tokens(with_scorer)
    assert not with_scorer.needs
    torch.testing.assert_close(with_scorer.raw(x, context), load_scorer(scorer_file)(x))
    torch.testing.assert_close(IDPruner(fallback="norm").raw(x, context), x.norm(dim=-1))
    plain = IDPruner()
    x, context = toy_tokens(plain)
    torch.testing.assert_close(plain.raw(x, context), context.attention(2)[:, :, 0, 1:].mean(1))
    asked = IDPruner(fallback="text")
    x, context = toy_tokens(asked)
    expected = torch.nn.functional.cosine_similarity(x[1, 3], context.text[1].mean(0), dim=0)
    assert float(asked.raw(x, context)[1, 3]) == pytest.approx(float(expected), abs=1e-5)


def test_the_soft_choice_sums_to_the_budget_and_has_its_derivative():
    scores = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = SoftTopK.apply(scores * 5, 4)
    torch.testing.assert_close(weights.sum(-1), torch.full((3,), 4.0, dtype=torch.float64))
    assert torch.equal(weights.argsort(-1), scores.argsort(-1))
    assert torch.autograd.gradcheck(lambda s: SoftTopK.apply(s, 4), (scores,))


def test_training_finds_what_the_answer_depends_on():
    generator = torch.Generator().manual_seed(0)
    features, needed = [], []
    for _ in range(120):
        x = torch.randn(8, 20, 16, generator=generator) * 0.3
        x[..., 0] = 1.0  # something that all tokens share, for the mean key to hold on to
        chosen = torch.rand(8, 20, generator=generator).argsort(-1)[:, :4]
        x[..., 1].scatter_(1, chosen, 2.0)
        features.append(x)
        needed.append(chosen)

    def answer_loss(step, weighed):  # the answer is right if the needed tokens are seen whole
        share = weighed[..., 0].gather(1, needed[step])
        return ((1 - share) ** 2).mean()

    scorer = Scorer(16)
    history = train_scorer(scorer, features, answer_loss, lr=2e-2)
    assert history[0][0] > 0.6 and sum(loss for loss, _ in history[-10:]) / 10 < 0.05
    assert history[-1][1] < 0.1 < history[0][1]  # soft and hard choice have become one
    picked = scorer(features[-1]).topk(4).indices.sort().values
    assert torch.equal(picked, needed[-1].sort().values) and not any(p.requires_grad for p in scorer.parameters())


def test_the_learning_rate_rises_and_falls():
    rates = [rate(step, 100, 0.03) for step in range(100)]
    assert rates[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert rates[3] == 1.0 and rates[50] == pytest.approx(0.5, abs=0.03) and 0 < rates[-1] < 0.001


def test_the_trade_off_is_importance_held_and_cover():
    raw, features = random_tokens(9, n=12)
    chosen = marginal_relevance(raw, features, 4, 0.5)
    held, cover = trade_off(chosen, raw, features)
    importance, index = scaled(raw, raw > -9)[0], chosen.index.flatten()
    assert float(held) == pytest.approx(float(importance[index].sum() / importance.sum()))
    unit = torch.nn.functional.normalize(features[0], dim=-1)
    nearest = [max(float(unit[i] @ unit[j]) for j in index) for i in range(12)]
    assert float(cover) == pytest.approx(sum(nearest) / 12, abs=1e-5)


def test_options_and_files_are_checked(tmp_path, scorer_file):
    with pytest.raises(OptionError):
        IDPruner(weight=1.2)
    with pytest.raises(InputError, match="no scorer"):
        IDPruner(scorer=str(tmp_path / "missing"))
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no scorer"):
        IDPruner(scorer=str(tmp_path / "broken"))
    with pytest.raises(UnsupportedModelError, match="32 numbers"):
        IDPruner(scorer=scorer_file).plan(torch.randn(1, 9, 16), 3, toy_tokens(IDPruner(fallback="norm"))[1])
