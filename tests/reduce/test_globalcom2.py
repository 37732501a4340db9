"""GlobalCom2: ratios, resizing and choice against loops over crops; padding; the sequence that the model reads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.laws import check
from tokenary.models.bench_vlm import VOCABULARY
from tokenary.models.bench_vlm.model import anyres_views
from tokenary.reduce.base import Context, places
from tokenary.reduce.globalcom2 import GlobalCom2, crop_ratios, crop_scores, unpadded, valid_patches
from tokenary.reduce.law_tools import HEADS, WIDTH, pictures, toy_tokens, toy_vlm


def slow_ratios(map, crops, ratio, tau):
    """Rectangle after rectangle of one map (rows of numbers)."""
    (down, across), rows, columns = crops, len(map), len(map[0])
    mass = []
    for i in range(down):
        for j in range(across):
            bottom = rows if i == down - 1 else (i + 1) * (rows // down)
            right = columns if j == across - 1 else (j + 1) * (columns // across)
            mass.append(
                sum(map[r][c] for r in range(i * (rows // down), bottom) for c in range(j * (columns // across), right))
            )
    parts = [math.exp((t - max(mass)) / tau) for t in mass]
    parts = [part / sum(parts) for part in parts]
    return [min(1.0, ratio * (1 + part - 1 / len(mass))) for part in parts]


def slow_resize(map, high, wide):
    """Bilinear, corners not aligned, one number after the other."""
    rows, columns = len(map), len(map[0])

    def at(position, count):
        position = max(0.0, position)
        low = min(int(position), count - 1)
        return low, min(low + 1, count - 1), position - low

    found = []
    for r in range(high):
        top, bottom, down = at((r + 0.5) * rows / high - 0.5, rows)
        line = []
        for c in range(wide):
            left, right, along = at((c + 0.5) * columns / wide - 0.5, columns)
            upper = (1 - along) * map[top][left] + along * map[top][right]
            lower = (1 - along) * map[bottom][left] + along * map[bottom][right]
            line.append((1 - down) * upper + down * lower)
        found.append(line)
    return found


def slow_plan(scores, grid, crops, ratio, tau, area, guided=True, mixed=True):
    """Kept tokens of one picture: `scores` (V, n), `area` (top, bottom, left, right) on the large grid."""
    (rows, columns), (_, across) = grid, crops
    n, (top, bottom, left, right) = rows * columns, area
    map = scores[0].view(rows, columns).tolist()
    kept = sorted(sorted(range(n), key=lambda j: -float(scores[0, j]))[: math.floor(n * ratio + 1e-9)])
    resized = slow_resize(map, bottom - top, right - left)
    shares = slow_ratios(map, crops, ratio, tau) if guided else [ratio] * (len(scores) - 1)
    for crop, share in enumerate(shares):
        cells = []  # (token, local, global)
        for r in range(rows):
            for c in range(columns):
                big_row, big_column = crop // across * rows + r, crop % across * columns + c
                if top <= big_row < bottom and left <= big_column < right:
                    local = float(scores[1 + crop, r * columns + c])
                    cells.append((r * columns + c, local, resized[big_row - top][big_column - left]))
        own = math.sqrt(sum(cell[1] ** 2 for cell in cells)) or 1.0
        other = math.sqrt(sum(cell[2] ** 2 for cell in cells)) or 1.0
        ranked = sorted(cells, key=lambda cell: -(cell[1] / own + (cell[2] / other if mixed else 0.0)))
        number = math.floor(len(cells) * share + 1e-9)
        kept += sorted((1 + crop) * n + cell[0] for cell in ranked[:number])
    return kept


def shown(grid, crops, batch=2, seed=0, spread=1.5):
    """Tokens and context of a picture with any number of crops."""
    generator = torch.Generator().manual_seed(seed)
    views, n = 1 + crops[0] * crops[1], grid[0] * grid[1]

    def noise():
        return {2: torch.randn(batch * views, HEADS, 1 + n, WIDTH // HEADS, generator=generator) * spread}

    x = torch.randn(batch, views * n, WIDTH, generator=generator)
    return x, Context(
        grid=grid, layout="anyres", views=views, crops=crops, span=(1, n), place=places(grid, views),
        scale=(WIDTH // HEADS) ** -0.5, layer=2, n_layers=3, queries=noise(), keys=noise(),
    )  # fmt: skip


def logits(context, probabilities=False):
    """What the class token thinks of patches, (B, V, n), one head after the other."""
    queries, keys = context.queries[2], context.keys[2]
    rows = torch.stack([queries[:, h, 0, None] @ keys[:, h].mT for h in range(HEADS)])[:, :, 0] * context.scale
    rows = rows.softmax(-1) if probabilities else rows
    return rows.mean(0)[:, 1:].double().unflatten(0, (-1, context.views))


def indices(chosen, row):
    there = chosen.valid[row] if chosen.valid is not None else torch.ones_like(chosen.index[row]).bool()
    return chosen.index[row][there].tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9999), st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([0.1, 0.25, 0.9]), st.sampled_from([0.5, 10.0]),
)  # fmt: skip
def test_ratios_of_crops(seed, rows, columns, down, across, ratio, tau):
    down, across = min(down, rows), min(across, columns)
    map = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed)).double() * 3
    found = crop_ratios(map, (down, across), ratio, tau)
    for row in range(2):
        expected = slow_ratios(map[row].tolist(), (down, across), ratio, tau)
        torch.testing.assert_close(found[row], torch.tensor(expected).double())
    n = down * across
    if ratio * (2 - 1 / n) <= 1:  # none is cut
        torch.testing.assert_close(found.sum(1), torch.full((2,), n * ratio).double())
    assert (found >= ratio * (1 - 1 / n) - 1e-12).all() and (found <= 1).all()


def test_a_dull_thumbnail_shares_evenly_and_a_bright_corner_takes_more():
    flat = crop_ratios(torch.full((1, 8, 8), 0.7).double(), (2, 2), 0.25)
    torch.testing.assert_close(flat, torch.full((1, 4), 0.25).double(), atol=1e-12, rtol=0)
    map = torch.zeros(1, 8, 8).double()
    map[0, 4:, :4] = 20.0
    torch.testing.assert_close(crop_ratios(map, (2, 2), 0.25)[0, 2], torch.tensor(0.25 * 1.75).double())
    assert float(crop_ratios(map, (2, 2), 0.9)[0, 2]) == 1.0


@pytest.mark.parametrize(("crops", "area"), [
    ((2, 2), (0, 10, 0, 8)), ((2, 2), (2, 8, 0, 8)), ((2, 2), (0, 10, 3, 5)),
    ((1, 2), (1, 4, 0, 8)), ((3, 1), (0, 15, 1, 3)),
])  # fmt: skip
def test_the_thumbnail_on_the_grids_of_crops(crops, area):
    grid, (top, bottom, left, right) = (5, 4), area
    map = torch.randn(1, *grid, generator=torch.Generator().manual_seed(1)).double()
    large = torch.zeros(5 * crops[0], 4 * crops[1], dtype=torch.bool)
    large[top:bottom, left:right] = True
    there = torch.stack([
        large[i * 5 : i * 5 + 5, j * 4 : j * 4 + 4].flatten() for i in range(crops[0]) for j in range(crops[1])
    ])  # fmt: skip
    found = crop_scores(map, crops, there[None])[0]
    resized = slow_resize(map[0].tolist(), bottom - top, right - left)
    for crop in range(len(there)):
        for cell in range(20):
            row, column = crop // crops[1] * 5 + cell // 4, crop % crops[1] * 4 + cell % 4
            inside = top <= row < bottom and left <= column < right
            assert abs(float(found[crop, cell]) - (resized[row - top][column - left] if inside else 0.0)) < 1e-9


@pytest.mark.parametrize(("size", "expected"), [
    ((100, 100), (0, 16, 0, 16)), ((50, 100), (4, 12, 0, 16)), ((100, 50), (0, 16, 4, 12)), ((100, 99), (0, 16, 0, 16)),
    ((10, 100), (7, 9, 0, 16)), ((1, 1000), (7, 9, 0, 16)), ((1000, 1), (0, 16, 7, 9)),
])  # fmt: skip
def test_what_padding_leaves(size, expected):
    rows, columns = unpadded(size, (8, 8), (2, 2))
    assert (rows.start, rows.stop, columns.start, columns.stop) == expected
    found = valid_patches(size, (8, 8), (2, 2)).unflatten(0, (5, 8, 8))
    assert found[0].all()
    for view in range(4):
        for row in range(8):
            for column in range(8):
                r, c = view // 2 * 8 + row, view % 2 * 8 + column
                inside = expected[0] <= r < expected[1] and expected[2] <= c < expected[3]
                assert bool(found[1 + view, row, column]) == inside


def test_padding_of_grids_that_are_not_square():
    assert unpadded((100, 100), (8, 8), (1, 2)) == (slice(0, 8), slice(4, 12))
    assert unpadded((100, 100), (8, 8), (2, 1)) == (slice(4, 12), slice(0, 8))
    assert unpadded((100, 200), (8, 8), (1, 2)) == (slice(0, 8), slice(0, 16))
    assert valid_patches((100, 100), (8, 8), (1, 2)).sum() == 64 + 64


SIZES = [None, (60, 120), (120, 60), (70, 100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crops", [(2, 2), (1, 2), (2, 1), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("keep", [0.25, 0.1])
def test_a_plan_is_what_the_paper_does(size, crops, keep):
    grid = (6, 6)
    x, context = shown(grid, crops)
    area = (0, 6 * crops[0], 0, 6 * crops[1])
    if size is not None:
        context = replace(context, valid=valid_patches(size, grid, crops))
        rows, columns = unpadded(size, grid, crops)
        area = (rows.start, rows.stop, columns.start, columns.stop)
    for options in ({}, {"score": "prob", "tau": 0.1}, {"ratios": "uniform"}, {"choice": "local"}):
        reducer = GlobalCom2(keep=keep, **options)
        chosen = reducer.reduce(x, context)
        scores = logits(context, options.get("score") == "prob")
        ratio = reducer.count(x.shape[1], context) / x.shape[1]
        for row in range(2):
            expected = slow_plan(
                scores[row], grid, crops, ratio, options.get("tau", 10.0), area,
                guided="ratios" not in options, mixed="choice" not in options,
            )  # fmt: skip
            assert indices(chosen, row) == expected, options


def test_one_crop_like_its_thumbnail_keeps_what_the_thumbnail_keeps():
    x, context = shown((8, 8), (1, 1), batch=1)
    same = {2: context.queries[2][:1].repeat(2, 1, 1, 1)}, {2: context.keys[2][:1].repeat(2, 1, 1, 1)}
    context = replace(context, queries=same[0], keys=same[1])
    found = indices(GlobalCom2(keep=0.25).reduce(x, context), 0)
    expected = sorted(logits(context)[0, 0].topk(16).indices.tolist())
    assert found == expected + [64 + at for at in expected]


def test_scores_of_any_size_count_the_same():
    """A crop with scores a thousand times as large is not chosen by them alone: both are scaled to length 1."""
    x, context = shown((8, 8), (2, 2), batch=1)
    loud = context.keys[2].clone()
    loud[1:] *= 1000
    found = GlobalCom2(keep=0.25).reduce(x, context)
    assert indices(GlobalCom2(keep=0.25).reduce(x, replace(context, keys={2: loud})), 0) == indices(found, 0)
    assert indices(GlobalCom2(keep=0.25, choice="local").reduce(x, context), 0) != indices(found, 0)


def test_probabilities_with_a_high_temperature_share_evenly():
    x, context = shown((8, 8), (2, 2), spread=3.0)

    def counts(**options):
        return [
            [sum(at // 64 == view for at in indices(chosen, row)) for view in range(5)]
            for chosen in [GlobalCom2(keep=0.25, **options).reduce(x, context)] for row in range(2)
        ]  # fmt: skip

    assert all(count in (15, 16) for row in counts(score="prob") for count in row)
    assert max(max(row[1:]) for row in counts()) > 20
    for row in counts():
        assert row[0] == 16 and sum(row) <= 80 and sum(row) > 80 - 4 and min(row[1:]) >= 12


def test_the_model_reads_thumbnail_then_rows_of_all_crops_with_newlines():
    model, pixels = toy_vlm(), pictures(3, 128, seed=2)
    ids = torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 3)
    with GlobalCom2(keep=0.25, tau=0.5).attach(model) as reduced:
        prompt = reduced.prompt(reduced.image_tokens(pixels), ids)
    vision = model.vision(anyres_views(pixels).flatten(0, 1))
    tokens = model.projector(vision.last_hidden_state[:, 1:]).unflatten(0, (3, 5))
    last = model.vision.blocks[-1]
    seen = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.vision(anyres_views(pixels).flatten(0, 1))
    handle.remove()
    scores = last.attention.logits(last.norm1(seen[0])).mean(1)[:, 0, 1:].double().unflatten(0, (3, 5))
    for row in range(3):
        kept = slow_plan(scores[row], (8, 8), (2, 2), 0.25, 0.5, (0, 16, 0, 16))
        expected = [tokens[row, 0, at] for at in kept if at < 64]
        for line in range(16):
            for column in range(16):
                crop, cell = line // 8 * 2 + column // 8, line % 8 * 8 + column % 8
                if (1 + crop) * 64 + cell in kept:
                    expected.append(tokens[row, 1 + crop, cell])
            expected.append(model.newline)
        assert reduced.kept[row] == len(expected) == len(kept) + 16
        begin = prompt.embeds[row, 1 : 1 + prompt.image]
        there = torch.ones(prompt.image).bool() if prompt.mask is None else prompt.mask[row, 1 : 1 + prompt.image]
        torch.testing.assert_close(begin[there], torch.stack(expected), atol=1e-5, rtol=1e-5)
    positions = prompt.positions[0] if prompt.mask is None else prompt.positions[0][prompt.mask[0]]
    assert positions.tolist() == list(range(len(positions)))  # without gaps


def test_large_pictures_in_a_batch_answer_as_alone():
    model, pixels = toy_vlm(), pictures(3, 128, seed=2)
    ids = torch.tensor([VOCABULARY.prompt("how many objects are there ?")] * 3)
    with GlobalCom2(keep=0.25, tau=0.5).attach(model) as reduced:
        logits = reduced(reduced.image_tokens(pixels), ids)
        together, kept = reduced.generate(reduced.image_tokens(pixels), ids, 6), list(reduced.kept)
        for row in range(3):
            one = reduced.image_tokens(pixels[row : row + 1])
            torch.testing.assert_close(reduced(one, ids[:1])[0], logits[row], atol=1e-3, rtol=1e-3)
            assert reduced.generate(one, ids[:1], 6) == together[row : row + 1] and reduced.kept == kept[row : row + 1]


def test_what_it_refuses_and_what_it_leaves():
    model = toy_vlm()
    for at in ("decoder:2", "vision:1"):
        with pytest.raises(OptionError, match="thumbnail"):
            GlobalCom2().attach(model, at)
    x, context = toy_tokens(GlobalCom2(), views=5)
    with pytest.raises(OptionError, match="each of the 5 views"):
        GlobalCom2(keep=4).reduce(x, context)
    with pytest.raises(UnsupportedModelError, match="class token"):
        GlobalCom2().reduce(x, replace(context, span=(0, 48)))
    x, context = toy_tokens(GlobalCom2())
    assert GlobalCom2(keep=4).reduce(x, context).is_identity
    with GlobalCom2().attach(model) as reduced:
        reduced(reduced.image_tokens(pictures(2)), torch.tensor([VOCABULARY.prompt("is there a red star ?")] * 2))
    assert reduced.kept == [64, 64]


OPTIONS = [{"score": "prob", "tau": 0.05}, {"ratios": "uniform"}, {"choice": "local", "tau": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_laws_hold_with_other_options(options):
    report = check("globalcom2", **options)
    assert report.ok, str(report)
