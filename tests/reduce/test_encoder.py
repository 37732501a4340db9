"""Fewer tokens between the layers of an encoder: against loops written out, on ours and on transformers' ViT."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTModel

from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.token_map import Segment, Select, TokenMap
from tokenary.models.tiny import tiny_lm
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.encoder import VisionReduction, picture_numbers
from tokenary.reduce.law_tools import pictures, toy_vlm
from tokenary.reduce.mix import segments
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom


class Pairs(Reducer):
    """Merge neighbours, or keep the first half; remember what was shown."""

    needs = frozenset({"queries", "keys", "values"})

    def __init__(self, keep: Budget = Budget(ratio=0.5), merge: bool = True) -> None:  # noqa: B008
        super().__init__(keep)
        self.merge = merge
        self.kind = "merge" if merge else "prune"
        self.proportional = merge
        self.seen: list[tuple[torch.Tensor, Context]] = []

    def layers(self, n_layers: int, layer: int) -> tuple[int, ...]:
        return (0, layer)

    def plan(self, x: torch.Tensor, keep: int, context: Context) -> TokenMap:
        self.seen.append((x, context))
        n = x.shape[1]
        if not self.merge:
            return Select(torch.arange(keep).expand(len(x), -1), n)
        return segments((torch.arange(n) * keep // n).expand(len(x), -1), keep, context.sizes)


def vit():
    return toy_vlm().vision


def hf_vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def test_merging_with_sizes_is_the_loop_written_out():
    net, pixels = vit(), pictures(2)
    with Pairs().attach(net, "vision:0,1") as reduced:
        found = net(pixels).last_hidden_state
    first, last, x = net.blocks[0], net.blocks[1], net.embed(pixels)
    counts = [45, 32]  # 64 falls by the same factor twice
    assert [each.shape[-2] for each in reduced.maps] == counts
    sizes = torch.ones(2, 64)
    x = first(x)
    for block, count in ((last, counts[0]), (net.blocks[2], counts[1])):
        n = x.shape[1] - 1
        merge = Segment((torch.arange(n) * count // n).expand(2, -1), count, weights=sizes)
        image, sizes = merge.apply(x[:, 1:]), merge.sizes(sizes)
        x = block(torch.cat([x[:, :1], image], 1), torch.cat([torch.ones(2, 1), sizes], 1))
    torch.testing.assert_close(found, net.norm(x))
    torch.testing.assert_close(reduced.sizes, sizes)
    assert float(reduced.sizes.sum()) == pytest.approx(2 * 64, rel=1e-5)


def test_sizes_are_left_out_where_they_are_not_asked_for():
    net, pixels = vit(), pictures(2)
    with ReducePool(keep=16).attach(net, "vision:1"):
        plain = net(pixels).last_hidden_state
    with ReducePool(keep=16, proportional=True).attach(net, "vision:1"):
        weighed = net(pixels).last_hidden_state
    assert (plain - weighed).abs().max() > 1e-3


def test_transformers_vit_is_the_loop_written_out():
    net, pixels = hf_vit(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    reducer = Pairs(keep=6)
    with reducer.attach(net, "vision:1"):
        found = net(pixels).last_hidden_state
    with torch.no_grad():
        x = net.embeddings(pixels)
        for layer in net.layers[:2]:
            x = layer(x)
        merge = segments((torch.arange(16) * 6 // 16).expand(2, -1), 6)
        sizes = torch.cat([torch.ones(2, 1), merge.sizes()], 1)
        x = net.layers[2](torch.cat([x[:, :1], merge.apply(x[:, 1:])], 1), sizes.log()[:, None, None])
    torch.testing.assert_close(found, net.layernorm(x))
    assert reducer.seen[0][1].grid == (4, 4)


@pytest.mark.parametrize("make", [vit, hf_vit])
def test_what_is_recorded_is_what_the_layers_computed(make):
    net, reducer = make(), Pairs(keep=8)
    pixels = pictures(2) if make is vit else torch.rand(2, 3, 32, 32)
    inputs = {}
    blocks = net.blocks if make is vit else net.layers
    for layer in (0, 2):
        norm = blocks[layer].norm1 if make is vit else blocks[layer].layernorm_before
        norm.register_forward_hook(lambda module, args, out, layer=layer: inputs.__setitem__(layer, out))
    with reducer.attach(net, "vision:2"):
        net(pixels)
    _, context = reducer.seen[0]
    assert set(context.queries) == set(context.keys) == set(context.values) == {0, 2}
    for layer in (0, 2):
        attention = blocks[layer].attention
        if make is vit:
            states = attention.project(inputs[layer])
        else:
            states = [
                getattr(attention, f"{name}_proj")(inputs[layer]).unflatten(-1, (2, -1)).transpose(1, 2)
                for name in "qkv"
            ]
        for found, expected in zip((context.queries, context.keys, context.values), states, strict=True):
            torch.testing.assert_close(found[layer], expected)
        map = (states[0] @ states[1].mT / 4).softmax(-1)
        torch.testing.assert_close(context.attention(layer), map)
        torch.testing.assert_close(context.image(map, 3), map[..., 1:])


def test_nothing_is_recorded_that_is_not_asked_for():
    shown = []

    class Blunt(ReduceGrid):
        def plan(self, x, keep, context):
            shown.append(context)
            return super().plan(x, keep, context)

    with Blunt(keep=9).attach(vit(), "vision:1"):
        vit()(pictures(1))
    assert not (shown[0].queries or shown[0].keys or shown[0].values) and shown[0].samples is None


def test_attention_is_weighed_as_the_layer_weighs_it():
    net, reducer = vit(), Pairs(keep=16)
    with reducer.attach(net, "vision:0,1"):
        net(pictures(1))
    _, context = reducer.seen[1]
    weighed = context.attention(1)
    plain = context.attention_logits(1).softmax(-1)
    sizes = context.recorded_sizes[1]
    expected = plain * sizes[:, None, None]
    torch.testing.assert_close(weighed, expected / expected.sum(-1, keepdim=True))


def test_dense_outputs_get_their_places_back():
    net, pixels = vit(), pictures(2)
    full = net(pixels, output_hidden_states=True)
    with Pairs(keep=10, merge=False).attach(net, "vision:1", dense=True) as reduced:
        found = net(pixels).last_hidden_state
    assert found.shape == full.last_hidden_state.shape
    # what was dropped is as it was behind block 1; what was kept went on among the kept
    torch.testing.assert_close(found[:, 11:], net.norm(full.hidden_states[2])[:, 11:])
    x = net.blocks[2](full.hidden_states[2][:, :11])
    torch.testing.assert_close(found[:, :11], net.norm(x))
    with Pairs(keep=10, merge=False).attach(net, "vision:1", dense=True, fill="zero"):
        zero = net(pixels).last_hidden_state
    torch.testing.assert_close(zero[:, 11:], net.norm(torch.zeros(2, 54, 32)))
    with Pairs(keep=32).attach(net, "vision:1", dense=True) as reduced:
        merged = net(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(merged[:, 0::2], merged[:, 1::2])
    assert reduced.maps[0].shape == (2, 32, 64)


def test_frames_become_one_sequence():
    net, pixels = vit(), pictures(6)
    reducer = Pairs(keep=32)
    with reducer.attach(net, "vision:1", join=3, dense=True) as reduced:
        found = net(pixels)
    x, context = reducer.seen[0]
    hidden = net(pixels, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(x, hidden[:, 1:].reshape(2, 3 * 64, 32))
    assert (context.views, context.layout) == (3, "clip")
    assert context.places(x)[0, 64 * 2 + 8 * 3 + 5].tolist() == [2, 3, 5]
    torch.testing.assert_close(context.by_picture(context.image(context.keys[1].mean(1), 1)).shape, (2, 192, 16))
    assert reduced.sizes.sum(1).tolist() == [192.0, 192.0]
    assert found.last_hidden_state.shape == (6, 65, 32)
    # by hand: class tokens averaged, patches merged, one sequence a segment
    merge = segments((torch.arange(192) * 32 // 192).expand(2, -1), 32)
    front = hidden[:, :1].reshape(2, 3, 1, 32).mean(1)
    sizes = torch.cat([torch.ones(2, 1), merge.sizes()], 1)
    y = net.blocks[2](torch.cat([front, merge.apply(x)], 1), sizes)
    back = torch.cat([y[:, :1].repeat_interleave(3, 0), merge.pinv().apply(y[:, 1:]).reshape(6, 64, 32)], 1)
    torch.testing.assert_close(found.last_hidden_state, net.norm(back))
    with pytest.raises(OptionError, match="join"), Pairs().attach(net, "vision:1", join=4):
        net(pixels)


def test_a_pass_forgets_the_last_one_and_the_block_leaves_nothing():
    net, pixels, before = vit(), pictures(2), {}
    before = {name: len(module._forward_hooks) for name, module in net.named_modules()}
    expected = net(pixels).last_hidden_state
    with Pairs(keep=8).attach(net, "vision:0") as reduced:
        one = net(pixels).last_hidden_state
        net(pictures(3, seed=4))
        assert torch.equal(net(pixels).last_hidden_state, one) and len(reduced.maps) == 1
    assert torch.equal(net(pixels).last_hidden_state, expected)
    assert before == {name: len(module._forward_hooks) for name, module in net.named_modules()}
    assert all("project" not in block.attention.__dict__ for block in net.blocks)


def test_counts_may_be_said_and_places_are_checked():
    net = vit()
    with ReduceRandom().attach(net, "vision:0,2", counts={0: 30, 2: 7}) as reduced:
        net(pictures(1))
    assert [each.shape[-2] for each in reduced.maps] == [30, 7]
    assert reduced.anchors.shape == (1, 7) and bool((reduced.anchors.diff() > 0).all())
    place = reduced.place[0]
    assert torch.equal(place[:, 1] * 8 + place[:, 2], reduced.anchors[0])
    for wrong in ("vision:3", "vision:2,1", "encoder", "decoder:1", "vision", "somewhere"):
        with pytest.raises(OptionError):
            VisionReduction(net, ReduceRandom(), wrong)
    with pytest.raises(OptionError, match="counts"):
        VisionReduction(net, ReduceRandom(), "vision:0", counts={1: 3})
    with pytest.raises(UnsupportedModelError):
        VisionReduction(tiny_lm().model, ReduceRandom(), "vision:0")


def test_shares_of_the_depth():
    assert Point.parse("vision:25%,50%,75%", 12).layers == (2, 5, 8)
    assert Point.parse("vision:25%,50%,75%", 3).layers == (0, 1, 2)
    assert Point.parse("vision:50%,60%", 2).layers == (0, 1)
    assert Point.parse("decoder:25%", 32).layers == (8,) and Point.parse("decoder:1%", 4).layers == (1,)
    assert str(Point.parse("vision:2,4", 6)) == "vision:2,4"
    for wrong in ("decoder:0", "decoder:1,2", "decoder:6"):
        with pytest.raises(OptionError):
            Point.parse(wrong, 6)


def test_random_tokens_belong_to_the_picture():
    net, pixels = vit(), pictures(3)
    with ReduceRandom(keep=16).attach(net, "vision:1") as reduced:
        net(pixels)
        together = reduced.anchors.clone()
        net(pixels[1:2])
        assert torch.equal(reduced.anchors[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert len(set(picture_numbers(pixels))) == 3
