"""Super tokens: the sparse association against a dense one, the released borders, gradients, the layer and the net."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError, UnknownNameError, UnsupportedModelError
from tokenary.core.laws import check
from tokenary.models.cifar_vit import CifarViT, ViTConfig
from tokenary.reduce.base import Context
from tokenary.reduce.grid import cells
from tokenary.reduce.law_tools import toy_tokens
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.super_token import (
    SIZES,
    Cells,
    SuperToken,
    SuperTokenAttention,
    SViT,
    SViTConfig,
    among_super_tokens,
    associate,
    touching,
)
from tokenary.reduce.super_token.association import mass_of, own_cell, super_tokens, upsample
from tokenary.reduce.super_token.net import ConvFFN, DropPath, SuperTokenBlock


def dense_q(x, grid, cell, rounds, tau=1.0):
    """Q (N, M) of one picture by an N x M softmax with a mask, from coordinates alone."""
    (rows, columns), (high, wide) = grid, cell
    across = math.ceil(columns / wide)
    count = math.ceil(rows / high) * across
    at = [(r // high, c // wide) for r in range(rows) for c in range(columns)]
    near = torch.tensor([[abs(r - m // across) <= 1 and abs(c - m % across) <= 1 for m in range(count)] for r, c in at])
    home = torch.tensor([[(m // across, m % across) == place for m in range(count)] for place in at]).float()
    s = (home.T @ x) / home.sum(0)[:, None]
    for _ in range(rounds):
        logits = (x @ s.T / x.shape[-1] ** 0.5 / tau).masked_fill(~near, float("-inf"))
        q = logits.softmax(-1)
        s = (q.T @ x) / q.sum(0)[:, None]
    return q, s


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99)
)
def test_nine_neighbours_are_the_masked_softmax(rows, columns, high, wide, rounds, seed):
    x = torch.randn(2, rows * columns, 6, generator=torch.Generator().manual_seed(seed)) * 2
    cut = Cells.of_grid((rows, columns), (high, wide))
    q = associate(x, cut, rounds)
    s = super_tokens(cut.take(x), q, cut)
    for row in range(2):
        expected, means = dense_q(x[row], (rows, columns), (high, wide), rounds)
        torch.testing.assert_close(mass_of(q, cut)[row].T, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(s[row], means, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(upsample(s, q, cut)[row], expected @ means, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass_of(q, cut).sum(1), torch.ones(2, rows * columns))


def test_each_row_may_be_cut_in_its_own_way():
    x = torch.randn(2, 10, 4)
    assign = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1], [-1, 0, 1, 1, 1, 1, -1, -1, -1, -1]])
    cut = Cells.cut(assign, touching(torch.arange(3)[None, None], 3))
    mass = mass_of(associate(x, cut), cut)
    assert (mass.sum(1) > 0).tolist() == (assign >= 0).tolist()
    assert mass[0, 2, :3].abs().max() == 0  # the cell after the next
    assert mass[1, 2].abs().max() == 0  # an empty cell takes nothing
    torch.testing.assert_close(mass.sum(1), (assign >= 0).float())
    torch.testing.assert_close(cut.put(cut.take(x)), x * (assign >= 0)[..., None])


def released(x, cell, rounds):
    """The published steps on (B, C, H, W), with unfold and fold: neighbours outside are zeros that take weight."""
    batch, width, rows, columns = x.shape
    high, wide = cell
    x = F.pad(x, (0, -columns % wide, 0, -rows % high))
    down, across = x.shape[2] // high, x.shape[3] // wide
    pixels = F.unfold(x, cell, stride=cell).view(batch, width, high * wide, down * across).permute(0, 3, 2, 1)
    s = F.adaptive_avg_pool2d(x, (down, across))
    for _ in range(rounds):
        near = F.unfold(s, 3, padding=1).view(batch, width, 9, -1).permute(0, 3, 1, 2)
        q = (pixels @ near / width**0.5).softmax(-1)
        total = F.fold(q.sum(2).mT, (down, across), 3, padding=1)
        parts = (pixels.mT @ q).permute(0, 2, 3, 1).flatten(1, 2)
        s = F.fold(parts, (down, across), 3, padding=1) / (total + 1e-12)
    near = F.unfold(s, 3, padding=1).view(batch, width, 9, -1).permute(0, 3, 1, 2)
    y = (near @ q.mT).permute(0, 2, 3, 1).flatten(1, 2)
    return F.fold(y, x.shape[2:], cell, stride=cell)[:, :, :rows, :columns]


@pytest.mark.parametrize(("grid", "cell", "rounds"), [((8, 8), (4, 4), 1), ((7, 9), (3, 2), 1), ((6, 5), (2, 4), 3)])
def test_zero_borders_are_the_released_ones(grid, cell, rounds):
    x = torch.randn(2, 5, *grid)
    tokens, cut = x.flatten(2).mT, Cells.of_grid(grid, cell)
    q = associate(tokens, cut, rounds, borders="zero")
    s = super_tokens(cut.take(tokens), q, cut)
    found = upsample(s, q, cut).mT.unflatten(2, grid)
    torch.testing.assert_close(found, released(x, cell, rounds), atol=1e-5, rtol=1e-4)
    masked = associate(tokens, cut, rounds)
    assert q.sum(-1).min() > 0.999 and not torch.allclose(masked, q)


def test_no_gradient_flows_through_the_association():
    x = torch.randn(1, 16, 4, requires_grad=True)
    cut = Cells.of_grid((4, 4), (2, 2))
    q = associate(x, cut)
    assert not q.requires_grad
    super_tokens(cut.take(x), q, cut).sum().backward()
    mass = mass_of(q, cut)
    expected = (mass / mass.sum(-1, keepdim=True)).sum(1)  # what each token weighs, with q as a constant
    torch.testing.assert_close(x.grad, expected[..., None].expand_as(x), atol=1e-5, rtol=1e-4)


def test_cells_of_one_token_are_plain_attention():
    attend = SuperTokenAttention(8, 2, (1, 1))
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(attend(x, (3, 4)), attend.attention(x))
    few = SuperTokenAttention(8, 2, (2, 2))
    q, s = dense_q(x[0], (3, 4), (2, 2), 1)
    torch.testing.assert_close(few(x, (3, 4))[0], q @ few.attention(s[None])[0], atol=1e-5, rtol=1e-4)


def test_cold_association_takes_the_likeliest():
    x = torch.randn(3, 64, 6)
    cut = Cells.of_grid((8, 8), (2, 2))
    hard = mass_of(associate(x, cut, tau=0.0), cut)
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(1) == 1).all()
    soft = mass_of(associate(x, cut), cut)
    assert (soft.argmax(1) == hard.argmax(1)).all()
    grid = mass_of(own_cell(x, cut), cut)
    assert (grid.argmax(1) == cells((8, 8), 16)).all() and (grid.sum(1) == 1).all()

    fine = associate(x, cut, 3)
    assert not torch.allclose(fine, associate(x, cut))


# ----------------------------------------------------------------------------------------------------- the reducer


def test_the_plan_is_the_association_of_normalised_tokens():
    reducer = SuperToken(keep=12, rounds=2)
    x, context = toy_tokens(reducer)
    sizes = torch.rand(x.shape[:2]) + 0.5
    chosen = reducer.reduce(x, replace(context, sizes=sizes))
    for row in range(3):
        unit = (x[row] - x[row].mean(-1, keepdim=True)) / (x[row].var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        q, _ = dense_q(unit, (6, 8), (2, 2), 2)
        torch.testing.assert_close(chosen.mass[row], q.T, atol=1e-5, rtol=1e-4)
        weights = q.T * sizes[row]
        torch.testing.assert_close(chosen.apply(x)[row], weights @ x[row] / weights.sum(-1, keepdim=True))
        torch.testing.assert_close(chosen.sizes(sizes)[row], q.T @ sizes[row])
        torch.testing.assert_close(chosen.pinv().apply(chosen.apply(x))[row], q @ chosen.apply(x)[row])
    place = context.places(x)[..., 1:].float()
    centre = replace(context, sizes=None)
    found = reducer.reduce(x, centre)
    torch.testing.assert_close(found.apply(place), (found.mass @ place) / found.mass.sum(-1, keepdim=True))


def test_views_do_not_mix_and_uneven_cells_touch_those_beside_them():
    x, context = toy_tokens(SuperToken(keep=60), views=5)
    chosen = SuperToken(keep=61).reduce(x, context)
    view = torch.arange(240) // 48
    for output in range(61):
        assert len(set(view[chosen.mass[0, output] > 0].tolist())) == 1
    labels = torch.tensor([[[0, 0, 0, 1], [2, 3, 4, 4], [5, 5, 5, 5]]])
    table = [sorted(set(row) - {-1}) for row in touching(labels, 6).tolist()]
    assert table == [[0, 1, 2, 3, 4], [0, 1, 4], [0, 2, 3, 5], [0, 2, 3, 4, 5], [0, 1, 3, 4, 5], [2, 3, 4, 5]]


def test_tokens_that_do_not_differ_are_pooled():
    x = torch.ones(1, 64, 8) * torch.randn(8)
    soft = SuperToken(keep=16).reduce(x, Context(grid=(8, 8)))
    pooled = ReducePool(keep=16).reduce(x, Context(grid=(8, 8)))
    torch.testing.assert_close(soft.apply(x), pooled.apply(x))
    inner = soft.mass[0, 5]  # of a cell with eight others around it, each of its tokens gives a ninth
    assert inner.count_nonzero() == 36 and torch.isclose(inner[18], torch.tensor(1 / 9))
    torch.testing.assert_close(soft.sizes().sum(), torch.tensor(64.0))


# ------------------------------------------------------------------------------------------------------- the layer


def net_of(layers=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CifarViT(ViTConfig(width=32, layers=layers, heads=2)).eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)
    return net


PIXELS = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("proportional", [True, False])
def test_a_plain_vit_attends_among_super_tokens(proportional):
    net = net_of()
    plain = net(PIXELS)
    with among_super_tokens(net, {0: (2, 2), 1: (4, 4)}, proportional=proportional):
        found = net(PIXELS)
        with among_super_tokens(net, {2: (1, 1)}, tau=0.0):
            pass
    assert torch.equal(net(PIXELS), plain) and not torch.allclose(found, plain, atol=1e-3)
    x = net.embed(PIXELS)
    for layer, cell in ((0, (2, 2)), (1, (4, 4))):
        block = net.blocks[layer]
        normed = block.norm1(x)
        rows = []
        for picture in normed:
            q, s = dense_q(picture[1:], (8, 8), cell, 1)
            few = torch.cat([picture[:1], s])[None]
            sizes = torch.cat([torch.ones(1), q.sum(0)])[None] if proportional else None
            y = block.attention(few, sizes)[0]
            rows.append(torch.cat([y[:1], q @ y[1:]]))
        x = x + torch.stack(rows)
        x = x + block.shrink(F.gelu(block.expand(block.norm2(x))))
    torch.testing.assert_close(found, net.classify(net.blocks[2](x)), atol=1e-4, rtol=1e-3)


def test_pooling_attention_is_the_hard_grid():
    net = net_of(1)
    with among_super_tokens(net, {0: (2, 2)}, association="hard"):
        found = net(PIXELS)
    x, block = net.embed(PIXELS), net.blocks[0]
    normed = block.norm1(x)
    home = F.one_hot(cells((8, 8), 16), 16).float()
    few = torch.cat([normed[:, :1], (home.T / 4) @ normed[:, 1:]], dim=1)
    y = block.attention(few, torch.tensor([[1.0] + [4.0] * 16]).expand(2, -1))
    x = x + torch.cat([y[:, :1], home @ y[:, 1:]], dim=1)
    x = x + block.shrink(F.gelu(block.expand(block.norm2(x))))
    torch.testing.assert_close(found, net.classify(x), atol=1e-5, rtol=1e-4)


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(OptionError), among_super_tokens(net_of(), {3: (2, 2)}):
        pass
    net = net_of()
    fewer, around = SuperToken(keep=16).attach(net, "vision:0"), among_super_tokens(net, {1: (2, 2)})
    with fewer, around, pytest.raises(UnsupportedModelError):
        net(PIXELS)


# --------------------------------------------------------------------------------------------------------- the net

TINY = SViTConfig(
    (8, 16, 16, 24),
    (1, 1, 1, 2),
    (1, 2, 2, 2),
    cells=(4, 2, 1, 1),
    scaled=(False, False, True, True),
    classes=5,
    head=32,
)


def test_the_net_learns_at_any_size():
    torch.manual_seed(0)
    net = SViT(TINY)
    logits = net(torch.randn(2, 3, 70, 50))
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not missing
    rates = [module.rate for module in net.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * i / 4 for i in range(5)])
    scales = [len(m.scales) for m in net.modules() if isinstance(m, SuperTokenBlock)]
    assert scales == [0, 0, 2, 2, 2]


def test_a_block_is_position_code_then_attention_then_ffn():
    torch.manual_seed(0)
    block = SuperTokenBlock(TINY, 1, 0.0).eval()
    x = torch.randn(2, 16, 6, 5)
    y = x + F.conv2d(x, block.position.weight, block.position.bias, padding=1, groups=16)
    normed = F.layer_norm(y.permute(0, 2, 3, 1), (16,), eps=1e-6).flatten(1, 2)
    y = y + block.attention(normed, (6, 5)).mT.unflatten(2, (6, 5))
    z = F.gelu(F.conv2d(block.norm2(y), block.ffn.expand.weight, block.ffn.expand.bias))
    z = z + F.conv2d(z, block.ffn.depthwise.weight, block.ffn.depthwise.bias, padding=1, groups=64)
    torch.testing.assert_close(block(x), y + F.conv2d(z, block.ffn.shrink.weight, block.ffn.shrink.bias))
    assert isinstance(block.ffn, ConvFFN) and isinstance(block.norm2, torch.nn.BatchNorm2d)


@pytest.mark.parametrize(("name", "millions"), [("small", 25), ("base", 52), ("large", 95)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        net = SViT(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)
    assert SIZES[name].cells == (8, 4, 1, 1)
    with pytest.raises(UnknownNameError):
        SViT("huge")


@pytest.mark.parametrize(
    "options",
    [{"rounds": 3}, {"tau": 0.25}, {"proportional": False, "tau": 0.3}],
    ids=lambda o: "-".join(map(str, itertools.chain(o))),
)
def test_laws_hold_with_other_options(options):
    report = check("super-token", **options)
    assert report.ok, str(report)
