from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.claims.formula_reading import Pages, read, see
from tokenary.core.errors import OptionError
from tokenary.core.laws import check
from tokenary.models.latex_ocr import LatexOcr, OcrConfig
from tokenary.reduce.base import Context, places
from tokenary.reduce.hiprune import HiPrune, dispersion, hierarchical, neighbours, plateau_end, received
from tokenary.reduce.law_tools import pictures, toy_tokens, toy_vlm
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_random import ReduceRandom

GRID = (6, 8)


def slow(middle, deep, keep, alpha, grid, wrap=False):
    """The choice for one view, written out: middle, deep are lists of scores."""
    rows, columns = grid
    total = rows * columns
    count = round(keep * alpha / 5)
    anchors = sorted(range(total), key=lambda i: (-middle[i], i))[:count]
    beside = []
    for i in anchors:
        if wrap:
            beside += [min(max(i + step, 0), total - 1) for step in (-1, 1, -columns, columns)]
            continue
        row, column = divmod(i, columns)
        for r, c in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
            if 0 <= r < rows and 0 <= c < columns:
                beside.append(r * columns + c)
    buffers = sorted(set(beside) - set(anchors), key=lambda i: (-middle[i], i))[: keep - len(anchors)]
    taken = anchors + buffers
    registers = sorted(set(range(total)) - set(taken), key=lambda i: (-deep[i], i))[: keep - len(taken)]
    return sorted(taken + registers)


def slow_scores(queries, keys, scale):
    """Attention that each image token got from all queries, the class token's too: (B, N)."""
    found = []
    for picture_queries, picture_keys in zip(queries, keys, strict=True):
        got = torch.zeros(picture_keys.shape[1])
        for q, k in zip(picture_queries, picture_keys, strict=True):
            for query in q:
                got += torch.softmax(k @ query * scale, -1)
        found.append(got[1:] / (len(picture_queries) * picture_queries.shape[1]))
    return torch.stack(found)


def kept(chosen, row=0):
    index = chosen.index.expand(chosen.index.shape if chosen.index.ndim > 1 else (1, -1))
    return index[row].tolist()


def test_laws():
    for options in ({}, {"alpha": 1.0}, {"wrap": True, "positions": "original"}, {"min_anchors": 1, "object_layer": 0}):
        report = check("hiprune", **options)
        assert report.ok and all(finding.verdict == "holds" for finding in report.findings), str(report)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("wrap", [False, True])
def test_it_is_the_paper_written_out(alpha, wrap):
    for keep in (1, 3, 12, 25, 26, 40):
        reducer = HiPrune(keep=keep, alpha=alpha, wrap=wrap)
        x, context = toy_tokens(reducer)
        middle, deep = (slow_scores(context.queries[i], context.keys[i], context.scale) for i in (1, 2))
        chosen = reducer.plan(x, keep, context)
        for row in range(len(x)):
            expected = slow(middle[row].tolist(), deep[row].tolist(), keep, alpha, GRID, wrap)
            assert kept(chosen, row) == expected, (keep, row)


def test_scores_are_those_of_two_layers_from_all_queries():
    reducer = HiPrune(object_layer=0)
    x, context = toy_tokens(reducer)
    assert reducer.layers(3, 2) == (0, 2) and HiPrune().layers(24, 23) == (8, 23)
    assert sorted(context.queries) == [0, 2]
    for layer in (0, 2):
        expected = slow_scores(context.queries[layer], context.keys[layer], context.scale)
        torch.testing.assert_close(received(x, layer, context), expected)
    class_row = context.attention(2, slice(0, 1))[..., 1:].mean((1, 2))
    assert (received(x, 2, context) - class_row).abs().max() > 1e-3


def test_exactly_the_budget_stays_whatever_it_is():
    scores = torch.rand(2, 48, generator=torch.Generator().manual_seed(0))
    beside = neighbours(places(GRID)[None].expand(2, -1, -1), GRID)
    allowed = torch.ones(2, 48, dtype=torch.bool)
    for keep, alpha in itertools.product(range(1, 49), (0.0, 0.1, 0.5, 1.0)):
        count = HiPrune(keep=keep, alpha=alpha)._anchors(keep)
        assert count == round(keep * alpha / 5)
        chosen = hierarchical(scores, scores.flip(1), beside, keep, count, allowed)
        assert chosen.sum(1).tolist() == [keep, keep]


def test_small_budgets_have_no_anchor_unless_asked_for():
    assert [HiPrune()._anchors(keep) for keep in (4, 24, 25, 26, 75, 76)] == [0, 0, 0, 1, 2, 2]
    assert [HiPrune(min_anchors=1)._anchors(keep) for keep in (4, 5, 24, 76)] == [0, 1, 1, 2]


def test_neighbours_stop_at_the_edge_unless_they_wrap():
    place = places((2, 3))[None]
    assert neighbours(place, (2, 3))[0].tolist() == [
        [-1, 1, -1, 3], [0, 2, -1, 4], [1, -1, -1, 5], [-1, 4, 0, -1], [3, 5, 1, -1], [4, -1, 2, -1],
    ]  # fmt: skip
    assert neighbours(place, (2, 3), wrap=True)[0].tolist() == [
        [0, 1, 0, 3], [0, 2, 0, 4], [1, 3, 0, 5], [2, 4, 0, 5], [3, 5, 1, 5], [4, 5, 2, 5],
    ]  # fmt: skip
    twice = neighbours(places((2, 3), 2)[None], (2, 3))[0]
    assert twice[5].tolist() == [4, -1, 2, -1] and twice[6].tolist() == [-1, 7, -1, 9]


def test_an_anchor_at_the_end_of_a_row_does_not_choose_the_next_row():
    middle, deep = torch.zeros(1, 48), torch.zeros(1, 48)
    middle[0, 7] = 1.0  # the last patch of the first row
    deep[0, 40] = 0.5
    allowed = torch.ones(1, 48, dtype=torch.bool)
    place = places(GRID)[None]
    straight = hierarchical(middle, deep, neighbours(place, GRID), 4, 1, allowed)
    assert straight[0].nonzero().flatten().tolist() == [6, 7, 15, 40]
    wrapped = hierarchical(middle, deep, neighbours(place, GRID, wrap=True), 5, 1, allowed)
    assert wrapped[0].nonzero().flatten().tolist() == [0, 6, 7, 8, 15]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 48), st.integers(0, 1000))
def test_without_anchors_it_is_the_top_of_the_deep_layer(keep, seed):
    generator = torch.Generator().manual_seed(seed)
    middle, deep = torch.rand(1, 48, generator=generator), torch.rand(1, 48, generator=generator)
    beside, allowed = neighbours(places(GRID)[None], GRID), torch.ones(1, 48, dtype=torch.bool)
    chosen = hierarchical(middle, deep, beside, keep, 0, allowed)
    assert chosen[0].nonzero().flatten().tolist() == deep[0].topk(keep).indices.sort().values.tolist()


def test_every_view_has_its_own_budget():
    reducer = HiPrune(keep=13, alpha=0.9)
    x, context = toy_tokens(reducer, views=3)
    assert reducer.count(144, context) == 12
    chosen = reducer.reduce(x, context)
    for row in range(len(x)):
        parts = torch.tensor(kept(chosen, row)).view(3, 4)
        for view in range(3):
            middle, deep = (
                slow_scores(context.queries[i][3 * row + view][None], context.keys[i][3 * row + view][None], 0.25)[0]
                for i in (1, 2)
            )
            expected = slow(middle.tolist(), deep.tolist(), 4, 0.9, GRID)
            assert (parts[view] - 48 * view).tolist() == expected
    with pytest.raises(OptionError, match="3 views"):
        HiPrune(keep=2).count(144, context)


def test_newlines_of_crops_are_kept_and_cost_nothing():
    with HiPrune(keep=50).attach(toy_vlm()) as reduced:
        seen = reduced.image_tokens(pictures(2, 128))
        reduced.prompt(seen, torch.ones(2, 4, dtype=torch.long))
        newlines = reduced.kept[0] - 50
        assert newlines > 0 and reduced.kept == [50 + newlines] * 2
        views = reduced.numbers[reduced.numbers >= 0].view(2, 50) // 64
        assert [views[0].tolist().count(view) for view in range(5)] == [10] * 5


def test_inside_the_encoder_the_middle_layer_is_asked_by_place():
    model = toy_vlm()
    with HiPrune(keep=20, object_layer=0, alpha=1.0).attach(model, "vision:0,2") as reduced:
        seen = reduced.image_tokens(pictures(2))
        assert seen.tokens.shape[1] == 20
    late = HiPrune(object_layer=1).attach(model, "vision:0")
    with pytest.raises(OptionError, match="layer up to 0"), late as reduced:
        reduced.image_tokens(pictures(2))
    assert not model.vision.blocks[0]._forward_pre_hooks  # a place that is refused leaves nothing attached
    with pytest.raises(OptionError, match="attention of an encoder"):
        HiPrune().attach(model, "decoder:2")


def test_dispersion_is_the_mean_distance_of_pairs():
    scores, features = torch.rand(2, 40), torch.randn(2, 40, 6)
    found = dispersion(scores, features, 0.25)
    for row in range(2):
        chosen = features[row, scores[row].topk(10).indices]
        pairs = [float((a - b).norm()) for a, b in itertools.combinations(chosen, 2)]
        assert float(found[row]) == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def test_the_object_layer_is_the_end_of_the_low_plateau():
    assert plateau_end(torch.tensor([9.0, 8.8, 3.1, 3.0, 3.3, 8.0, 8.5])) == 4
    assert plateau_end(torch.tensor([9.0, 8.8, 3.1, 3.0, 3.3, 8.0, 8.5]), tolerance=0.01) == 3
    assert plateau_end(torch.tensor([2.0])) == 0


@pytest.fixture(scope="module")
def reader():
    """A random reader of small pictures, and three of them; what it makes of them is right."""
    torch.manual_seed(0)
    config = OcrConfig(32, 64, hidden=32, heads=4, encoder_layers=3, decoder_layers=2, intermediate=64, vocab=12)
    model = LatexOcr(config, ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape) * 2 / parameter.shape[1] ** 0.5
    pixels = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)
    return model, Pages(model.read(pixels, 96), pixels, torch.zeros(3, 32, dtype=torch.bool))


def test_attention_that_is_averaged_once_is_the_same(reader):
    model, shown = reader
    memory, context = see(model, shown.pixels)
    assert torch.equal(memory, model.encoder(shown.pixels))
    for _ in range(2):
        found = received(memory, 1, context)
        torch.testing.assert_close(found, Context.attention(context, 1).mean((1, 2)))
    rows = slice(0, 2)
    torch.testing.assert_close(context.attention(2, rows), Context.attention(context, 2, rows))


def test_arms_are_read_beside_all_tokens_and_an_empty_page(reader):
    model, shown = reader
    arms = {("all", 1.0): [ReduceGrid("100%")], ("random", 0.25): [ReduceRandom("25%", seed) for seed in (0, 1)]}
    numbers = []
    readings = read(model, shown, arms, lambda memory, context, each: numbers.append(each), batch=2)
    assert numbers == [slice(0, 2), slice(2, 4)]
    assert [model.text(letters) for letters in readings.letters] == shown.texts
    assert readings.exact["none", 1.0].tolist() == [[1.0] * 3] and readings.alike["blind", 1.0].shape == (1, 3)
    assert readings.alike["all", 1.0].tolist() == [[1.0] * 3]  # as with all tokens, whatever the limit
    assert readings.mean("random", (0.25,)).shape == (2, 3) and readings.alike["random", 0.25].max() < 1
    assert readings.retained("all", (0.25,)).value == 1 and readings.retained("blind", (0.25,)).value == 0
    less = readings.retained("random", (0.25,))
    assert less.value < 1 and readings.retained("all", (0.25,), minus="random").value == pytest.approx(1 - less.value)
