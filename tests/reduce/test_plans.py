"""Controls, mixtures and helpers of the room; and that its laws catch methods that are wrong on purpose."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.laws import check, check_class, the_recipe_survives_json
from tokenary.core.token_map import Segment, Select, TokenMap, check_token_map
from tokenary.models.bench_vlm.model import BenchVLM, sized
from tokenary.models.bench_vlm.vocabulary import ANSWER, END, PAD, QUESTION
from tokenary.reduce import laws, vlm
from tokenary.reduce.base import Context, Reducer, places
from tokenary.reduce.choose import mask_to_select, top
from tokenary.reduce.grid import bands, cells, medians, partition, shares
from tokenary.reduce.law_tools import pictures, toy_tokens
from tokenary.reduce.mix import Mix, anchors_of, segments
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_low_res import ReduceLowRes, coarse
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom

CARD = Card(slug="here", cls="Here", room="reduce", title="", summary="", slot="reduce")


# ------------------------------------------------------------------------------------------------------ mixtures


def masses(seed: int = 0, batch: int = 2, m: int = 5, n: int = 12) -> torch.Tensor:
    """Column-stochastic masses."""
    return torch.randn(batch, m, n, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-2)


def test_a_mixture_keeps_its_books():
    mass, sizes = masses(), torch.rand(2, 12) + 0.5
    mix = Mix.averages(mass, torch.arange(5).expand(2, -1) * 2, sizes)
    assert not check_token_map(mix) and not check_token_map(mix[:, None])
    x = torch.randn(2, 12, 7)
    after = mix.sizes(sizes)
    torch.testing.assert_close(after, (mass @ sizes[..., None])[..., 0])
    torch.testing.assert_close(after.sum(-1), sizes.sum(-1))
    torch.testing.assert_close((after[..., None] * mix.apply(x)).sum(1), (sizes[..., None] * x).sum(1))
    torch.testing.assert_close(mix.pinv().apply(mix.apply(x)), mass.mT @ mix.apply(x))
    assert mix.positions(torch.arange(12) * 10).tolist() == [[0, 20, 40, 60, 80]] * 2
    assert mix.to(dtype=torch.float64).mass.dtype == torch.float64
    assert torch.equal(anchors_of(mix[1]), torch.arange(5) * 2)


def test_one_mixture_after_another_is_that_of_the_product_of_masses():
    first, second = masses(1, m=8), masses(2, m=3, n=8)
    anchors = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    one = Mix.averages(first, anchors[0])
    two = Mix.averages(second, anchors[1], one.sizes())
    both = Mix.averages(second @ first, anchors[1])
    x = torch.randn(2, 12, 4)
    torch.testing.assert_close(two.apply(one.apply(x)), both.apply(x))
    torch.testing.assert_close(two.sizes(one.sizes()), both.sizes())


def test_hard_masses_are_merging_and_medoids_stand_for_their_groups():
    assign = torch.tensor([[0, 0, 1, 2, 1, 2]])
    hard = torch.nn.functional.one_hot(assign, 3).mT.float()
    x = torch.randn(1, 6, 4)
    mix, merge = Mix.averages(hard, torch.tensor([[0, 2, 3]])), Segment(assign, 3)
    torch.testing.assert_close(mix.apply(x), merge.apply(x))
    torch.testing.assert_close(mix.sizes(), merge.sizes())
    group = Mix.groups(assign, torch.tensor([[1, 2, 5]]))
    torch.testing.assert_close(group.apply(x), x[:, [1, 2, 5]])
    assert group.sizes().tolist() == [[2.0, 2.0, 2.0]]
    torch.testing.assert_close(group.pinv().apply(group.apply(x)), x[:, [1, 1, 2, 5, 2, 5]])
    assert not check_token_map(group)


def test_segments_stand_in_the_order_of_their_first_tokens():
    assign = torch.tensor([[2, 2, 0, -1, 0, 3], [1, 1, 1, 1, 1, 1]])
    made = segments(assign, 4)
    assert made.assign.tolist() == [[0, 0, 1, -1, 1, 2], [0] * 6]
    assert made.sizes().tolist() == [[2, 2, 1, 0], [6, 0, 0, 0]]
    assert anchors_of(made)[0, :3].tolist() == [0, 2, 5]


# ------------------------------------------------------------------------------------------------------- helpers


@given(st.integers(0, 60), st.lists(st.tuples(st.floats(0, 9), st.integers(0, 20)), min_size=1, max_size=6))
def test_shares_are_whole_and_fair(total, parts):
    weights, most = [w for w, _ in parts], [n for _, n in parts]
    found = shares(total, weights, most)
    assert sum(found) == min(total, sum(most)) and all(0 <= one <= n for one, n in zip(found, most, strict=True))
    mass = sum(weights)
    if all(n >= total for n in most) and mass > 1e-6:
        assert all(abs(one - total * w / mass) <= 1 + 1e-6 for one, w in zip(found, weights, strict=True))


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_number_of_cells_covers_a_grid(rows, columns, data):
    count = data.draw(st.integers(1, rows * columns))
    found = cells((rows, columns), count)
    assert found.unique().tolist() == list(range(count))
    assert sum(bands((rows, columns), count)) == count
    # a cell is a rectangle
    grid = found.view(rows, columns)
    for cell in range(count):
        at = (grid == cell).nonzero()
        low, high = at.amin(0), at.amax(0)
        assert len(at) == int((high - low + 1).prod())


def test_a_quarter_of_a_square_is_a_grid_of_squares():
    assert cells((4, 4), 4).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert bands((16, 16), 32) == [8] * 4 or bands((16, 16), 32) == [4] * 8
    x = torch.randn(1, 16, 3)
    chosen = ReduceGrid(keep=4).reduce(x, Context(grid=(4, 4)))
    assert isinstance(chosen, Select) and chosen.index.tolist() == [[4, 6, 12, 14]]
    pooled = ReducePool(keep=4).reduce(x, Context(grid=(4, 4)))
    torch.testing.assert_close(pooled.apply(x)[0, 1], x[0, [2, 3, 6, 7]].mean(0))


def test_views_share_the_budget_and_runs_take_over_where_tokens_are_missing():
    x = torch.randn(2, 5 * 12, 3)
    context = Context(grid=(3, 4), views=5)
    view = places((3, 4), 5)[:, 0]
    kept = ReduceGrid(keep=17).reduce(x, context)
    assert isinstance(kept, Select)
    assert view[kept.index[0]].bincount().tolist() in ([4, 4, 3, 3, 3], [3, 3, 3, 4, 4])
    parts = partition(x[:, :10], 4, context)
    assert parts[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert medians(torch.tensor([[1, 1, 1, -1, 0, 0]]), 3).tolist() == [[5, 1, -1]]


def test_choosing_by_score():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert top(scores, 2).index.tolist() == [[1, 2]]
    few = top(scores, 3, torch.tensor([[True, False, False, True, False]]))
    assert few.valid is not None and few.valid.tolist() == [[True, True, False]]
    assert few.index.tolist() == [[0, 3, 0]]
    ragged = mask_to_select(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool())
    assert ragged.dense().sum((1, 2)).tolist() == [2, 1] and not check_token_map(ragged)


def test_random_draws_are_named_by_seed_and_picture():
    x, context = toy_tokens(ReduceRandom())
    one = ReduceRandom(keep=12, seed=1).reduce(x, context).dense()
    other = ReduceRandom(keep=12, seed=2).reduce(x, context).dense()
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])
    assert torch.equal(one, ReduceRandom(keep=12, seed=1).reduce(torch.zeros_like(x), context).dense())
    far = replace(context, samples=(100, 101, 999))
    assert torch.equal(one[:2], ReduceRandom(keep=12, seed=1).reduce(x, far).dense()[:2])


def test_low_resolution_is_a_smaller_picture():
    assert coarse((16, 16), 64) == (8, 8) and coarse((16, 16), 32) == (5, 6) and coarse((4, 8), 8) == (2, 4)
    assert coarse((16, 16), 1) == (1, 1) and coarse((2, 8), 3) == (1, 3)
    torch.manual_seed(0)
    model = BenchVLM(sized("tiny")).eval()
    net, pixels = model.vision, pictures(2)
    whole, chosen = ReduceLowRes(keep=15).look(net, pixels, Context(grid=(4, 4)))
    assert whole.shape == (2, 12, 32) and chosen.shape == (2, 12, 16)
    same, _ = ReduceLowRes(keep="100%").look(net, pixels, Context(grid=(4, 4)))
    torch.testing.assert_close(same, net(pixels).last_hidden_state[:, 1:])
    # what is finer than its patches is lost
    plain = torch.full_like(pixels, 90)
    fine = plain.clone()
    fine[:, ::2, ::2], fine[:, 1::2, 1::2] = 180, 180
    grey = torch.full_like(pixels, 135)
    small = [ReduceLowRes(keep=4).look(net, each, Context(grid=(4, 4)))[0] for each in (fine, grey, plain)]
    assert (small[0] - small[1]).norm() < 0.1 * (small[0] - small[2]).norm()
    large = [net(each).last_hidden_state for each in (fine, grey, plain)]
    assert (large[0] - large[1]).norm() > 0.2 * (large[0] - large[2]).norm()


def test_budgets_of_bytes_are_refused():
    with pytest.raises(OptionError, match="share"):
        ReduceGrid(keep="64MB")


# ---------------------------------------------------------------------------------------------------------- laws


class Wrong(Reducer):
    """Correct: keeps the first tokens. The classes below are wrong in one way each."""

    def __init__(self, keep: Budget = Budget(ratio=0.25)) -> None:  # noqa: B008
        super().__init__(keep)

    def plan(self, x: torch.Tensor, keep: int, context: Context) -> TokenMap:
        return top(-torch.arange(x.shape[1]).expand(len(x), -1).float(), keep, context.allowed(x))


class OneTooFew(Wrong):
    def plan(self, x, keep, context):
        return super().plan(x, max(1, keep - 1), context)


class Backwards(Wrong):
    def plan(self, x, keep, context):
        return Select(torch.arange(keep).flip(0).expand(len(x), -1), x.shape[1])


class Forgetful(Wrong):
    """Says that it merges, and prunes."""

    kind = "merge"


class Remembering(Wrong):
    def __init__(self, keep: Budget = Budget(ratio=0.25)) -> None:  # noqa: B008
        super().__init__(keep)
        self.calls = 0

    def plan(self, x, keep, context):
        self.calls += 1
        scores = torch.zeros(x.shape[:2])
        scores[:, -1 - self.calls % 30] = 1
        return top(scores, keep, context.allowed(x))


class OfTheBatch(Wrong):
    """What a picture keeps depends on its neighbours."""

    def plan(self, x, keep, context):
        return top((x - x.mean(0)).norm(dim=-1), keep, context.allowed(x))


class Padded(Wrong):
    def plan(self, x, keep, context):
        return top(x.norm(dim=-1), keep)


class Ordered(Wrong):
    permutes = True


class Scaled(Wrong):
    def plan(self, x, keep, context):
        kept = super().plan(x, keep, context)
        return Select(kept.index, kept.num_tokens, kept.valid, torch.full(kept.index.shape, 1.5))


class Meddling(Wrong):
    def plan(self, x, keep, context):
        kept = super().plan(x, keep, context)
        x.mul_(1.01)
        return kept


class AllChanged(Wrong):
    def reduce(self, x, context):
        return self.plan(x, min(self.count(x.shape[1], context), x.shape[1] - 1), context)


WRONG = {
    OneTooFew: "the budget is kept",
    Backwards: "outputs stand in order",
    Forgetful: "the books balance",
    Remembering: "a plan is pure",
    OfTheBatch: "a batch is its pictures",
    Padded: "what is not valid stays out",
    Ordered: "order carries no meaning",
    Scaled: "the books balance",
    Meddling: "a plan is pure",
    AllChanged: "keeping all is the identity",
}


def test_a_right_method_keeps_the_laws():
    report = check_class(Wrong, PLANS)
    assert report.ok, str(report)


PLANS = laws.LAWS["reduce"][:10]


@pytest.mark.parametrize("method", WRONG, ids=lambda method: method.__name__)
def test_the_laws_catch_methods_that_are_wrong(method):
    report = check_class(method, PLANS)
    assert WRONG[method] in {finding.law for finding in report.broken}, str(report)


class ByText(Wrong):
    """Correct: keeps what is most like the question."""

    needs = frozenset({"text"})

    def plan(self, x, keep, context):
        there = torch.ones(context.text.shape[:2]) if context.text_mask is None else context.text_mask.float()
        mean = (context.text * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return top((x @ mean[..., None])[..., 0], keep, context.allowed(x))


class ByAllText(ByText):
    """Lets answer and padding guide it too."""

    def plan(self, x, keep, context):
        return super().plan(x, keep, replace(context, text_mask=None))


READING = (laws.decoding_is_reading_on, laws.only_the_question_guides)


@pytest.mark.parametrize("at", ["encoder", "decoder:1"])
def test_the_question_alone_guides_a_method(at, monkeypatch):
    monkeypatch.setattr(Wrong, "at", at)
    assert check_class(ByText, READING).ok
    for method in (ByAllText, ByText):
        broken = {finding.law for finding in check_class(method, READING).broken}
        assert broken == {"decoding is reading on", "only the question guides"}
        monkeypatch.setattr(vlm, "question_of", torch.ones_like)  # of the second: a model that shows it all text


def test_a_question_ends_where_its_answer_begins():
    ids = torch.tensor([[PAD, QUESTION, 9, ANSWER, 8, END], [QUESTION, 9, 9, ANSWER, QUESTION, ANSWER], [9] * 6])
    mask = vlm.question_of(ids)
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6]


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("reduce-pool", {"keep": "40%", "proportional": True}),
        ("reduce-grid", {"keep": 7}),
        ("reduce-random", {"keep": "3%", "seed": 4}),
        ("reduce-low-res", {"keep": "60%"}),
    ],
)
def test_controls_keep_the_laws_with_other_options(slug, options):
    report = check(slug, **options)
    assert report.ok, str(report)
    assert not [finding for finding in report.findings if finding.verdict == "skipped"]


def test_the_example_of_a_reducer_keeps_the_laws(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "add-a-reducer.md"
    source = re.search(r"```python\n# src/tokenary/reduce/(\w+)\.py\n(.*?)```", page.read_text(), re.DOTALL)
    assert source is not None
    file = tmp_path / f"{source[1]}.py"
    file.write_text(source[2])
    spec = importlib.util.spec_from_file_location(source[1], file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[source[1]] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        own = tuple(law for law in laws.LAWS["reduce"] if law is not the_recipe_survives_json)  # it is in no room here
        report = check_class(module.FeatureNorm, own)
    finally:
        del sys.modules[source[1]]
    assert report.ok, str(report)
