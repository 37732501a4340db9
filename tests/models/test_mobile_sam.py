from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

from tokenary.core.errors import InputError
from tokenary.core.token_map import Segment, Select, TokenMap
from tokenary.models.mobile_sam import MobileSam, TinyViTConfig, available, iou, load, photographs
from tokenary.models.mobile_sam.encoder import WindowBlock

TINY = TinyViTConfig(128, widths=(8, 16, 16, 32), depths=(1, 1, 2, 1), heads=(0, 2, 2, 4), windows=(0, 7, 5, 7), out=32)


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    model = MobileSam(TINY, heads=4, intermediate=32).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    for block in (*model.encoder.early, *model.encoder.blocks):
        block.attention.biases.normal_()
    return model


def picture(seed=0, height=96, width=128):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slow(block, x):
    """A block, window by window and token by token; empty tokens at the edge are normed zeros."""
    rows, columns = block.grid
    w, heads = block.attention.window, block.attention.heads
    dim = x.shape[-1] // heads
    grid = torch.zeros(math.ceil(rows / w) * w, math.ceil(columns / w) * w, x.shape[-1])
    grid[:rows, :columns] = x.view(rows, columns, -1)
    out = torch.zeros_like(grid)
    for top in range(0, grid.shape[0], w):
        for left in range(0, grid.shape[1], w):
            window = grid[top : top + w, left : left + w].reshape(w * w, -1)
            q, k, v = block.attention.qkv(block.norm1(window)).view(w * w, heads, 3, dim).permute(2, 1, 0, 3)
            logits = q @ k.mT / dim**0.5
            for i in range(w * w):
                for j in range(w * w):
                    distance = abs(i // w - j // w) * w + abs(i % w - j % w)
                    logits[:, i, j] += block.attention.biases[:, distance]
            mixed = (logits.softmax(-1) @ v).transpose(0, 1).reshape(w * w, -1)
            out[top : top + w, left : left + w] = block.attention.out(mixed).view(w, w, -1)
    x = x + out[:rows, :columns].reshape(rows * columns, -1)
    x = block.convolution(x.T.view(1, -1, rows, columns)).view(-1, rows * columns).T
    return x + block.shrink(gelu(block.expand(block.norm2(x))))


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (4, 7)])
def test_a_block_is_what_it_is_slowly(grid):
    torch.manual_seed(1)
    block = WindowBlock(16, 2, 5, grid).eval()
    block.attention.biases.data.normal_()
    block.norm1.bias.data.normal_()
    x = torch.randn(2, grid[0] * grid[1], 16)
    with torch.no_grad():
        assert torch.allclose(block(x), torch.stack([slow(block, row) for row in x]), atol=1e-5)


def test_a_block_wants_the_whole_grid(sam):
    with pytest.raises(InputError, match="8 x 8"):
        sam.encoder.blocks[0](torch.zeros(1, 63, 16))


def test_shapes_and_padding(sam):
    pixels = sam.prepare(picture())
    assert pixels.shape == (1, 96, 128, 3) and sam.encoder.grid == (8, 8) and sam.encoder.prefix == 0
    assert sam.prepare(picture(0, 300, 200)).shape == (1, 128, 85, 3)
    embedding = sam.encoder(pixels)
    assert embedding.shape == (1, 32, 8, 8)
    far = []
    for colour in ((124, 116, 104), (0, 0, 0)):  # what is padded is the mean colour, not black
        whole = torch.tensor(colour, dtype=torch.uint8).expand(1, 128, 128, 3).clone()
        whole[:, :96] = pixels
        far.append((sam.encoder(whole) - embedding).abs().max().item())
    assert 5 * far[0] < far[1]
    both = sam.encoder(torch.cat([pixels, sam.prepare(picture(1))]))
    assert torch.allclose(both[:1], embedding, atol=1e-5)
    with pytest.raises(InputError, match="128 x 128"):
        sam.encoder(torch.zeros(1, 129, 20, 3, dtype=torch.uint8))


def test_the_identity_changes_nothing(sam):
    pixels = sam.prepare(picture())
    asked = []

    def plan(number, x):
        asked.append((number, tuple(x.shape)))
        return TokenMap.identity(64)

    embedding = sam.encoder(pixels)
    assert torch.allclose(sam.encoder(pixels, plan), embedding, atol=1e-5)
    assert asked == [(0, (1, 64, 16)), (1, (1, 64, 16)), (2, (1, 64, 32))]
    points = torch.tensor([[[[40.0, 50.0]], [[90.0, 20.0]]]])
    full = sam.segment(embedding, points)
    same = sam.segment(embedding, points, map=TokenMap.identity(64))
    assert full.logits.shape == (1, 2, 3, 32, 32) and full.scores.shape == (1, 2, 3)
    assert torch.allclose(full.logits, same.logits, atol=1e-5)


def test_a_merged_token_updates_all_that_it_stands_for(sam):
    block, x = sam.encoder.blocks[0], torch.randn(1, 64, 16)
    x[:, 1] = x[:, 0]
    groups = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(1, 63)])
    merged = block(x, map=Segment(groups[None], 63))
    plain = block(x)
    # equal tokens lose nothing but that the distance of the two to the others is averaged behind the attention
    far = torch.tensor([r * 8 + c for r in range(8) for c in range(8) if r > 6 or c > 6])
    assert torch.allclose(merged[:, far], plain[:, far], atol=1e-5)
    assert (merged - plain).abs().max() < 1.0


def test_a_pruned_token_is_not_seen_and_stays(sam):
    block = sam.encoder.blocks[0]
    torch.manual_seed(2)
    x = torch.randn(1, 64, 16)
    keep = torch.tensor([i for i in range(64) if i != 18])
    other = x.clone()
    other[:, 18] = torch.randn(16)
    kept = Select(keep[None], 64)
    a, b = block(x, map=kept), block(other, map=kept)
    far = [i for i in range(64) if abs(i // 8 - 2) > 1 or abs(i % 8 - 2) > 1]  # the convolution sees neighbours
    assert torch.allclose(a[:, far], b[:, far], atol=1e-6)
    assert not torch.allclose(block(x)[:, far], block(other)[:, far], atol=1e-4)
    assert torch.allclose(a[:, 18], block._convolved(x + _update(block, x, kept))[:, 18], atol=1e-5)


def _update(block, x, kept):
    """What attention adds: nothing at the dropped place."""
    empty = block.attention.project(block.norm1(torch.zeros(1, 1, 16)))
    states = [kept.pinv()[:, None].apply(s) for s in block.attention.project(block.norm1(kept.apply(x)))]
    seen = torch.ones(1, 64, dtype=torch.bool)
    seen[:, 18] = False
    out = block.attention.out(block.attention.mix(states, empty, block.grid, seen))
    out[:, 18] = 0
    return out


def test_the_decoder_works_on_fewer_tokens(sam):
    embedding = sam.encoder(torch.cat([sam.prepare(picture(seed)) for seed in range(2)]))
    points = torch.rand(2, 3, 1, 2) * 90
    cells = (torch.arange(8)[:, None] // 2 * 4 + torch.arange(8) // 2).flatten()
    pooled = Segment(cells.expand(2, -1), 16)
    seen = []
    handle = sam.mask_decoder.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["image_embeddings"].shape), with_kwargs=True
    )
    full, fewer = sam.segment(embedding, points), sam.segment(embedding, points, map=pooled)
    handle.remove()
    assert fewer.logits.shape == full.logits.shape and not torch.allclose(fewer.logits, full.logits, atol=1e-4)
    assert torch.allclose(sam.segment(embedding, points).logits, full.logits)  # no hook is left
    one = sam.segment(embedding[1:], points[1:], map=Segment(cells, 16))  # one map for all pictures is as good
    assert torch.allclose(one.logits[0], fewer.logits[1], atol=1e-4)


def test_predict_answers_in_the_pixels_of_the_picture(sam):
    masks, scores = sam.predict(picture(0, 60, 100), [(10, 20), (70, 30)])
    assert masks.shape == (2, 3, 60, 100) and masks.dtype == bool and scores.shape == (2, 3)
    large = sam.predict(np.kron(picture(0, 60, 100), np.ones((2, 2, 1), np.uint8)), [(20, 40), (140, 60)])
    assert iou(masks, large[0][:, :, ::2, ::2]) > 0.9


def test_iou():
    a, b = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    assert iou(a, b) == 1
    a[0], b[0, :2] = True, True
    assert iou(a, b) == 0.5 and iou(a, ~a) == 0


def test_photographs_are_real():
    pytest.importorskip("skimage")
    for photo in photographs():
        height, width, channels = photo.pixels.shape
        assert channels == 3 and photo.pixels.dtype == np.uint8 and photo.pixels.std() > 20
        assert all(0 <= x < width and 0 <= y < height for x, y in photo.points)


def test_a_broken_file_is_one_line(tmp_path):
    file = tmp_path / "mobile_sam.pt"
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="cannot be read"):
        load(file)


@pytest.mark.real
def test_the_real_network_cuts_out_a_face():
    pytest.importorskip("skimage")
    if not available():
        pytest.skip("the weights are not here: tokenary models get mobile-sam")
    photo = photographs(1)[0]
    masks, scores = load().predict(photo.pixels, photo.points[:1])
    best = masks[0, scores[0].argmax()]
    column, row = photo.points[0]
    assert best[row, column] and 0.005 < best.mean() < 0.6 and scores.max() > 0.8
