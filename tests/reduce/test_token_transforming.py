"""Token Transforming: its two matrices against loops, the special forms, composition, and the parts around it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.laws import check
from tokenary.core.token_map import Segment, Select
from tokenary.models.cifar_vit import CifarViT, ViTConfig
from tokenary.reduce.base import Context
from tokenary.reduce.encoder import VisionReduction
from tokenary.reduce.law_tools import toy_tokens
from tokenary.reduce.mix import Mix
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.token_transforming import TokenTransforming, perceiving, pooling, pruning, share_out


def slow_mass(likeness, anchors, takes, tau, spread, rho, gates):
    """The formulas, one number after the other, of one picture."""
    m, n = likeness.shape
    mass = torch.zeros(m, n)
    for j in range(n):
        open_to = [i for i in range(m) if takes[i, j]]
        if not open_to:
            continue
        if tau == 0:
            best = max(open_to, key=lambda i: (float(likeness[i, j]), -i))
            parts = {best: 1.0}
        else:
            top = max(float(likeness[i, j]) for i in open_to)
            parts = {i: math.exp((float(likeness[i, j]) - top) / tau) for i in open_to}
        ranked = sorted(parts, key=lambda i: -parts[i])[: spread or m]
        total = sum(parts[i] for i in ranked)
        parts = {i: parts[i] / total for i in ranked}
        if j in anchors:
            own = anchors.index(j)
            parts = {i: (1 - rho) * part for i, part in parts.items()}
            parts[own] = parts.get(own, 0.0) + rho
        else:
            parts = {i: gates[j] * part for i, part in parts.items()}
        for i, part in parts.items():
            mass[i, j] = part
    return mass


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9999),
    st.sampled_from([0.0, 0.05, 0.3, 5.0]),
    st.integers(0, 4),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_mass_is_what_the_formulas_say(seed, tau, spread, rho, gated, causal):
    generator = torch.Generator().manual_seed(seed)
    m, n = 5, 11
    unit = torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=-1)
    anchors = [*sorted(torch.randperm(n - 1, generator=generator)[: m - 1].tolist()), n - 1]
    gates = torch.rand(n, generator=generator) if gated else torch.ones(n)
    takes = torch.ones(m, n, dtype=torch.bool)
    takes[:, 3] = False
    if causal:
        takes &= torch.arange(n) <= torch.tensor(anchors)[:, None]
    likeness = unit[anchors] @ unit.T
    at = torch.tensor([anchors])
    found = share_out(
        likeness[None], at, torch.ones_like(at).bool(), takes[None],
        tau=tau, spread=spread, rho=rho, gates=gates[None] if gated else None,
    )[0]  # fmt: skip
    expected = slow_mass(likeness, anchors, takes, tau, spread, rho, gates.tolist())
    if 3 in anchors:  # an anchor stands for itself whoever may take it
        expected[:, 3], found[:, 3] = 0, 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def planned(x=None, **options):
    reducer = TokenTransforming(keep=12, **options)
    tokens, context = toy_tokens(reducer)
    return tokens, context, reducer.reduce(tokens if x is None else x, context)


def test_the_whole_plan_is_what_the_paper_does():
    reducer = TokenTransforming(keep=12, metric="keys", tau=0.1)
    x, context = toy_tokens(reducer)
    sizes = torch.rand(x.shape[:2]) * 3 + 1
    chosen = reducer.reduce(x, replace(context, sizes=sizes))
    queries, keys = context.queries[2], context.keys[2]
    for row in range(len(x)):
        weights = torch.stack(
            [(q[0] @ k.T * context.scale).softmax(-1) for q, k in zip(queries[row], keys[row], strict=True)]
        )
        importance = weights.mean(0)[1:]
        anchors = sorted(sorted(range(48), key=lambda j: -float(importance[j]))[:12])
        assert chosen.anchors[row].tolist() == anchors
        flat = keys[row].mean(0)[1:]
        cosine = torch.tensor(
            [[float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for j in range(48)] for i in anchors]
        )
        mass = slow_mass(cosine, anchors, torch.ones(12, 48).bool(), 0.1, 4, 1.0, [1.0] * 48)
        weighed = mass * sizes[row]
        y = torch.stack(
            [sum(w * t for w, t in zip(weights, x[row], strict=True)) / weights.sum() for weights in weighed]
        )
        torch.testing.assert_close(chosen.apply(x)[row], y, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(chosen.sizes(sizes)[row], mass @ sizes[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(chosen.pinv().apply(chosen.apply(x))[row], mass.T @ y, atol=1e-4, rtol=1e-4)


def test_special_forms():
    x = torch.randn(2, 12, 5)
    at = torch.tensor([[1, 4, 9], [0, 2, 11]])
    torch.testing.assert_close(Mix.averages(pruning(at, 12), at).apply(x), Select(at, 12).apply(x))
    assign = torch.arange(12).expand(2, -1) // 4
    pooled = Mix.averages(pooling(assign, 3), at)
    torch.testing.assert_close(pooled.apply(x), x.unflatten(1, (3, 4)).mean(2))
    torch.testing.assert_close(pooled.pinv().apply(pooled.apply(x)), Segment(assign, 3).pinv().apply(pooled.apply(x)))
    asked = perceiving(torch.randn(3, 5), x, tau=0.5)
    torch.testing.assert_close(asked.sum(1), torch.ones(2, 12))
    unit = torch.nn.functional.normalize(x, dim=-1)
    everyone = torch.arange(12).expand(2, -1)
    yes = torch.ones(2, 12, 12, dtype=torch.bool)
    for options in ({"tau": 0.0, "rho": 0.0}, {"tau": 1e-4, "rho": 0.0}, {"rho": 1.0}):
        mass = share_out(unit @ unit.mT, everyone, yes[:, 0], yes, **options)
        torch.testing.assert_close(Mix.averages(mass, everyone).apply(x), x, atol=1e-5, rtol=1e-5)


def test_cold_is_nearest_anchor_merging_and_hot_is_the_mean():
    x, context, cold = planned(tau=1e-5, metric="keys")
    keys = context.keys[2].mean(1)[:, 1:]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    for row in range(len(x)):
        nearest = (unit[row, cold.anchors[row]] @ unit[row].T).argmax(0)
        torch.testing.assert_close(cold.apply(x)[row], Segment(nearest, 12).apply(x[row]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(planned(tau=0.0, metric="keys")[2].dense(), cold.dense(), atol=1e-5, rtol=1e-5)
    hot = planned(tau=1e6, spread=0, rho=1e-6)[2].apply(x)
    torch.testing.assert_close(hot, x.mean(1, keepdim=True).expand_as(hot), atol=1e-3, rtol=1e-3)


def test_two_after_each_other_are_the_product_of_masses():
    x, context, first = planned()
    y, sizes = first.apply(x), first.sizes()
    later = TokenTransforming(keep=5, importance="distinct", metric="tokens")
    second = later.reduce(y, replace(context, sizes=sizes, span=None, place=None))
    both = Mix.averages(second.mass @ first.mass, second.anchors)
    torch.testing.assert_close(second.apply(y), both.apply(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.sizes(sizes).sum(1), torch.full((3,), 48.0))


def test_a_cell_has_one_anchor():
    x, context, chosen = planned(anchors="strided")
    cells = ReduceGrid(keep=12).reduce(x, context)
    rows = torch.arange(48) // 8 // 2 * 4 + torch.arange(48) % 8 // 2  # 3 x 4 cells of 2 x 2
    assert cells.shape[-2] == 12
    importance = context.attention(rows=slice(0, 1)).mean((1, 2))[:, 1:]
    for row in range(3):
        assert sorted(rows[chosen.anchors[row]].tolist()) == list(range(12))
        for at in chosen.anchors[row].tolist():
            assert importance[row, at] == importance[row, rows == rows[at]].max()


def test_a_causal_map_reads_nothing_from_behind_and_loses_nothing():
    _, context, chosen = planned(causal=True, importance="received", spread=0)
    late = torch.arange(48) > chosen.anchors[..., None]
    assert chosen.mass[late].abs().max() == 0 and (chosen.anchors[:, -1] == 47).all()
    torch.testing.assert_close(chosen.sizes().sum(1), torch.full((3,), 48.0))
    attention = context.attention_logits().masked_fill(torch.ones(49, 49).triu(1).bool(), -torch.inf).softmax(-1)
    received = attention.mean((1, 2))[:, 1:]
    expected = [set(received[row, :47].topk(11).indices.tolist()) | {47} for row in range(3)]
    assert [set(row) for row in chosen.anchors.tolist()] == expected


def test_centroids_gates_and_a_missing_class_token():
    x, context, chosen = planned()
    place = context.places(x)[..., 1:].float()
    expected = (chosen.mass @ place) / chosen.mass.sum(-1, keepdim=True)
    torch.testing.assert_close(chosen.apply(place), expected)
    gated = planned(gate=0.25)[2]
    left = gated.mass.sum(1)
    assert (gated.anchors == chosen.anchors).all()
    assert (left.gather(1, gated.anchors) == 1).all() and left.min() >= 0.25 and left.min() < 0.6
    bare = replace(
        context, span=(0, 48), queries={2: context.queries[2][:, :, 1:]}, keys={2: context.keys[2][:, :, 1:]}
    )
    received = bare.attention().mean((1, 2))
    found = TokenTransforming(keep=12).reduce(x, bare)
    assert [set(r) for r in found.anchors.tolist()] == [set(r) for r in received.topk(12).indices.tolist()]


def test_tokens_alike_go_into_their_anchor_whatever_metric():
    """Copies of three tokens end as those three, each with the size of its copies."""
    x = torch.eye(3, 32)[torch.arange(48) % 3][None] * 4
    context = Context(grid=(6, 8))
    reducer = TokenTransforming(keep=3, importance="distinct", metric="tokens", tau=0.01, anchors="strided")
    chosen = reducer.reduce(x, context)
    kinds = chosen.anchors[0] % 3
    assert chosen.sizes().sum() == 48
    if len(set(kinds.tolist())) == 3:
        torch.testing.assert_close(chosen.apply(x)[0], x[0, chosen.anchors[0]], atol=1e-4, rtol=1e-4)


def test_sizes_reach_the_blocks_and_every_place_comes_back():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CifarViT(ViTConfig(width=32, layers=4, heads=2)).eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    seen = []
    with TokenTransforming(keep=16).attach(net, dense=True) as reduced:
        assert isinstance(reduced, VisionReduction)
        note = net.blocks[-1].register_forward_pre_hook(lambda *given: seen.append(given[2]["sizes"]), with_kwargs=True)
        net(pixels)
        note.remove()
    counts = [each.shape[-2] for each in reduced.maps]
    assert counts == [40, 25, 16] and len(seen) == 1
    torch.testing.assert_close(seen[0][:, 1:].sum(1), torch.full((2,), 64.0))
    mass = [each.mass for each in reduced.maps]
    whole = mass[2] @ mass[1] @ mass[0]
    torch.testing.assert_close(whole.sum(1), torch.ones(2, 64), atol=1e-5, rtol=1e-5)
    back = reduced.maps[0].pinv() @ (reduced.maps[1].pinv() @ reduced.maps[2].pinv())
    y = torch.randn(2, 16, 4)
    torch.testing.assert_close(back.apply(y), whole.mT @ y, atol=1e-5, rtol=1e-5)


OPTIONS = [
    {"anchors": "strided", "rho": 0.3}, {"importance": "distinct", "metric": "tokens", "spread": 0},
    {"importance": "received", "tau": 0.0}, {"causal": True, "importance": "received"},
    {"proportional": False, "spread": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, itertools.chain(options.values()))))
def test_laws_hold_with_other_options(options):
    report = check("token-transforming", **options)
    assert report.ok, str(report)
