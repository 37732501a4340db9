"""What the claims on the CIFAR classifier share: merging by matching, FLOPs, budgets, and ways to attend to less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenary.claims.bipartite import BipartiteMerging, match
from tokenary.claims.cifar_reduction import (
    ONE,
    THREE,
    budget,
    flops,
    full_arm,
    likeness_flops,
    reduced_arm,
    schedule,
)
from tokenary.claims.super_token import layer_flops
from tokenary.claims.super_token_layers import (
    ARMS,
    LAYERS,
    attending,
    load_tuned,
    save_tuned,
    tune,
    tuned_names,
)
from tokenary.claims.superpixels import fit
from tokenary.claims.token_transforming import Pruned, rivals
from tokenary.core.errors import InputError
from tokenary.models.cifar_vit import CifarViT, ViTConfig, save
from tokenary.reduce.law_tools import toy_tokens
from tokenary.reduce.super_token import Cells, associate
from tokenary.reduce.super_token.association import own_cell
from tokenary.reduce.token_transforming import TokenTransforming

CONFIG = ViTConfig(width=32, heads=2)


def net_of(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CifarViT(CONFIG).eval().requires_grad_(False)


PIXELS = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 10


def slow_match(keys, merges):
    """Groups of one picture, as sets."""
    unit = torch.nn.functional.normalize(keys, dim=-1)
    best = {}
    for i in range(0, len(keys), 2):
        j = max(range(1, len(keys), 2), key=lambda j: float(unit[i] @ unit[j]))
        best[i] = (float(unit[i] @ unit[j]), j)
    groups = {i: {i} for i in range(len(keys))}
    for i in sorted(best, key=lambda i: -best[i][0])[:merges]:
        groups[best[i][1]].add(groups.pop(i).pop())
    return sorted(map(sorted, groups.values()))


@pytest.mark.parametrize("n", [9, 12])
def test_pairs_are_merged_most_alike_first(n):
    keys = torch.randn(3, n, 5, generator=torch.Generator().manual_seed(n))
    found = match(keys, 4)
    for row in range(3):
        groups = [torch.nonzero(found[row] == g).flatten().tolist() for g in range(int(found[row].max()) + 1)]
        assert sorted(groups) == slow_match(keys[row], 4)


def test_more_than_half_goes_in_rounds_and_nothing_is_lost():
    reducer = BipartiteMerging(keep=7)
    x, context = toy_tokens(reducer)
    chosen = reducer.reduce(x, context)
    assert chosen.shape[-2] == 7
    torch.testing.assert_close(chosen.sizes().sum(1), torch.full((3,), 48.0))
    torch.testing.assert_close((chosen.sizes()[..., None] * chosen.apply(x)).sum(1), x.sum(1), atol=1e-3, rtol=1e-3)
    almost = BipartiteMerging(keep=47).reduce(x, context)
    assert sorted(almost.sizes()[0].tolist()) == [1.0] * 46 + [2.0]


def test_flops_are_those_of_the_modules():
    from torch.utils.flop_counter import FlopCounterMode

    net = net_of()
    with FlopCounterMode(display=False) as counter:
        net(PIXELS[:1])
    assert flops(CONFIG, (65,) * 6) == counter.get_total_flops()
    with TokenTransforming(keep=12).attach(net, THREE), FlopCounterMode(display=False) as counter:
        net(PIXELS[:1])
    tokens = schedule(CONFIG, THREE, 12)
    counted = flops(CONFIG, tokens)
    assert counted < counter.get_total_flops() <= counted + 2 * likeness_flops(CONFIG, tokens)


@pytest.mark.parametrize("at", [ONE, THREE])
def test_a_budget_is_the_largest_that_saves_enough(at):
    full = flops(CONFIG, (65,) * 6)
    kept = budget(CONFIG, at, 0.4)
    assert flops(CONFIG, schedule(CONFIG, at, kept)) <= 0.6 * full < flops(CONFIG, schedule(CONFIG, at, kept + 1))


def test_arms_compute_what_the_schedule_says():
    net = net_of()
    full = full_arm(net, PIXELS, LABELS)
    for name, (reducers, at) in rivals(9, 20, (0, 1)).items():
        arm = reduced_arm(net, reducers, at, PIXELS, LABELS)
        assert arm.tokens == schedule(CONFIG, at, 9 if at == THREE else 20), name
        assert arm.right.shape == (len(reducers), 12) and arm.details(full)["flops_saved"] > 0.2
    assert full.each.mean() == 100 * np.mean(net(PIXELS).argmax(-1).numpy() == LABELS.numpy())


def test_pruning_keeps_the_same_anchors():
    reducer = TokenTransforming(keep=12)
    x, context = toy_tokens(reducer)
    pruned = Pruned(keep=12).reduce(x, context)
    torch.testing.assert_close(
        pruned.apply(x), x.gather(1, reducer.reduce(x, context).anchors[..., None].expand(-1, -1, 32))
    )


def test_every_way_of_attending_can_be_tuned_and_leaves_no_trace(tmp_path):
    net = net_of()
    save(net, tmp_path / "base")
    plain, found, tuned = net(PIXELS), {}, {}
    for arm in ARMS:
        model = net_of()
        with attending(model, arm):
            found[arm] = model(PIXELS)
        assert torch.equal(model(PIXELS), plain)
        assert len(tune(model, arm, PIXELS, LABELS, steps=2, batch=4)) == 2
        changed = {
            n
            for (n, p), q in zip(model.state_dict().items(), net.state_dict().values(), strict=True)
            if not torch.equal(p, q)
        }
        assert changed and changed <= set(tuned_names(model))
        tuned[arm] = {name: model.state_dict()[name] for name in tuned_names(model)}
    assert torch.equal(found["full"], plain)
    assert len({round(float(logits.sum()), 5) for logits in found.values()}) == len(ARMS)
    save_tuned(tuned, tmp_path / "tuned", tmp_path / "base" / "model.safetensors", steps=2)
    back = load_tuned(tmp_path / "tuned", tmp_path / "base" / "model.safetensors")
    for arm, parts in tuned.items():
        for name, part in parts.items():
            torch.testing.assert_close(back[arm][name], part, atol=1e-3, rtol=1e-3)
    save(net_of(1), tmp_path / "base")
    with pytest.raises(InputError, match="other weights"):
        load_tuned(tmp_path / "tuned", tmp_path / "base" / "model.safetensors")
    with pytest.raises(InputError, match="tune_super_token"):
        load_tuned(tmp_path / "nothing", tmp_path / "base" / "model.safetensors")


def test_windows_are_attention_within_them():
    net = net_of()
    block = net.blocks[0]
    x = block.norm1(net.embed(PIXELS[:1]))
    with attending(net, "windows"):
        found = block.attention(x)[0]
    inside = torch.tensor([r * 8 + c for r in range(4, 8) for c in range(4)]) + 1  # the window at the left, below
    few = torch.cat([x[0, :1], x[0, inside]])[None]
    torch.testing.assert_close(found[inside], block.attention(few)[0, 1:])
    torch.testing.assert_close(found[0], block.attention(x)[0, 0])


def test_layers_cost_less_the_fewer_they_attend_to():
    whole = flops(CONFIG, (65,) * 6)
    costs = {arm: layer_flops(CONFIG, arm, 2) for arm in ARMS}
    assert costs["full"] == whole
    assert costs["hard grid"] < costs["random"] < costs["super tokens"] < costs["windows"] < whole
    assert layer_flops(CONFIG, "super tokens", 4) < costs["super tokens"] and len(LAYERS) == 3


def test_superpixels_follow_an_edge_that_a_grid_cuts():
    picture = torch.full((24, 24, 3), -1.0)
    picture[:, 10:] = 1.0  # cells are 8 wide: the edge runs through the second column of cells
    x, cells = picture.flatten(0, 1)[None], Cells.of_grid((24, 24), (8, 8))
    left, recall, near = fit(x, own_cell(x, cells), cells, 24)
    assert 0.2 < left < 0.4 and 0.4 < near < 0.9 and recall == 1.0  # a border lies 2 pixels from the edge
    left, recall, _ = fit(x, associate(8 * x, cells), cells, 24)
    assert left < 1e-6 and recall == 1.0
