"""CenterCLIP: clusters against loops over tokens, copies of frames, padding, and the blocks behind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError
from tokenary.core.laws import check
from tokenary.reduce.base import Context, places
from tokenary.reduce.centerclip import (
    CenterCLIP,
    distances,
    k_medoids,
    segment_tokens,
    token_shift,
    video_vector,
)
from tokenary.reduce.centerclip.clustering import spectral_points
from tokenary.reduce.law_tools import pictures, toy_tokens, toy_vlm
from tokenary.reduce.reduce_frame_pool import ReduceFramePool
from tokenary.reduce.reduce_grid import ReduceGrid


def slow_clusters(apart, norms, count, allowed=None):
    """k-medoids of one set of tokens, number by number: ascending medoids, and the cluster of each token."""
    tokens = [j for j in range(len(norms)) if allowed is None or allowed[j]]
    medoids = [max(tokens, key=lambda j: (float(norms[j]), -j))]
    while len(medoids) < min(count, len(tokens)):
        left = [j for j in tokens if j not in medoids]
        medoids.append(max(left, key=lambda j: (min(float(apart[j][m]) for m in medoids), -j)))

    def assigned():
        found = {}
        for j in tokens:
            nearest = min(range(len(medoids)), key=lambda k: (float(apart[j][medoids[k]]), k))
            found[j] = medoids.index(j) if j in medoids else nearest
        return found

    for _ in range(100):
        clusters = assigned()
        new = []
        for k in range(len(medoids)):
            members = [j for j in tokens if clusters[j] == k]
            new.append(min(members, key=lambda j: (sum(float(apart[j][i]) for i in members), -float(norms[j]), j)))
        moved = sum(float(apart[a][b]) for a, b in zip(medoids, new, strict=True))
        medoids = new
        if moved < 1e-6:
            break
    medoids = sorted(medoids)
    clusters = assigned()
    return medoids, [clusters.get(j, -1) for j in range(len(norms))]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 14), st.sampled_from(["euclidean", "cosine"]), st.booleans(), st.booleans())
def test_clusters_are_those_of_the_loops(seed, count, metric, holes, copies):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 12, 4, generator=generator)
    if copies:
        x[:, 6:] = x[:, :6]
    allowed = torch.rand(3, 12, generator=generator) < 0.6 if holes else torch.ones(3, 12, dtype=torch.bool)
    allowed[:, 0] = True
    apart, norms = distances(x, metric), x.norm(dim=-1)
    medoids, there, assign = k_medoids(apart, norms, count, allowed)
    for row in range(3):
        expected, clusters = slow_clusters(apart[row].tolist(), norms[row], count, allowed[row].tolist())
        assert medoids[row][there[row]].tolist() == expected
        assert there[row].tolist() == [True] * len(expected) + [False] * (count - len(expected))
        assert assign[row].tolist() == clusters


def test_distances_are_what_they_are_called_and_nothing_between_copies():
    x = torch.randn(2, 9, 300, generator=torch.Generator().manual_seed(0)) * 50
    x[:, 5] = x[:, 2]
    far, angle = distances(x), distances(x, "cosine")
    assert (far[:, 2, 5] == 0).all() and (angle[:, 2, 5] == 0).all()
    torch.testing.assert_close(far[0, 1, 7], (x[0, 1] - x[0, 7]).norm())
    torch.testing.assert_close(angle[0, 1, 7], 1 - torch.cosine_similarity(x[0, 1], x[0, 7], dim=0))


def clip(frames=4, grid=(3, 4), batch=2, seed=0, width=16):
    x = torch.randn(batch, frames * grid[0] * grid[1], width, generator=torch.Generator().manual_seed(seed))
    return x, Context(grid=grid, layout="clip", views=frames, place=places(grid, frames), layer=1, n_layers=3)


def test_equal_frames_give_each_patch_once():
    x, context = clip(frames=1)
    for frames in (2, 4):
        x_many = x.repeat(1, frames, 1)
        many = replace(context, views=frames, place=places(context.grid, frames))
        chosen = CenterCLIP(keep=12).reduce(x_many, many)
        assert sorted((chosen.anchors[0] % 12).tolist()) == list(range(12))
        assert chosen.sizes().tolist() == [[float(frames)] * 12] * 2
        torch.testing.assert_close(chosen.apply(x_many).sort(1).values, x.sort(1).values)
        averaged = ReduceFramePool().reduce(x_many, many)
        torch.testing.assert_close(averaged.apply(x_many), x)


def test_everything_kept_is_the_identity():
    x, context = clip()
    assert CenterCLIP(keep=48).reduce(x, context).is_identity
    for options in ({}, {"cluster": "spectral"}, {"aggregate": "mean"}):  # also where it is planned
        torch.testing.assert_close(CenterCLIP(**options).plan(x, 48, context).apply(x), x)


def slow_spectrum(x, count, views, grid, graph, sigma, window):
    """Rows of the smoothest modes of one segment's graph, and their norms."""
    n = len(x)
    far = [[float((x[i] - x[j]).norm()) for j in range(n)] for i in range(n)]
    weights = torch.zeros(n, n, dtype=torch.float64)
    near = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: far[i][j])[: 5 * views] for i in range(n)]
    for i in range(n):
        for j in range(n):
            if graph == "gaussian":
                weights[i, j] = math.exp(-(far[i][j] ** 2) / (2 * sigma**2))
            elif j in near[i] or i in near[j]:
                weights[i, j] = 1.0
            if window:
                at = [(k // (grid[0] * grid[1]), k // grid[1] % grid[0], k % grid[1]) for k in (i, j)]
                off = [abs(a - b) for a, b in zip(*at, strict=True)]
                if off[0] > 3 or off[1] > 4 or off[2] > 4:
                    weights[i, j] = 0.0
    degree = torch.diag(weights.sum(1))
    root = torch.diag(weights.sum(1) ** -0.5)
    modes = torch.linalg.svd(root @ (degree - weights) @ root)[0][:, -count:]
    return modes / modes.norm(dim=1, keepdim=True), modes.norm(dim=1)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("graph", ["neighbours", "gaussian"])
def test_spectral_clusters(graph, window):
    frames, grid = 5, (3, 6)
    x, context = clip(frames, grid, batch=1)
    reducer = CenterCLIP(keep=6, cluster="spectral", graph=graph, sigma=2.0, window=window)
    chosen = reducer.reduce(x, context)
    points, norms = slow_spectrum(x[0], 6, frames, grid, graph, 2.0, window)
    apart = [[float((a - b).norm()) for b in points] for a in points]
    medoids, clusters = slow_clusters(apart, norms, 6)
    assert chosen.anchors[0].tolist() == medoids and chosen.mass[0].argmax(0).tolist() == clusters
    assert medoids != CenterCLIP(keep=6).reduce(x, context).anchors[0].tolist()
    torch.testing.assert_close(chosen.apply(x)[0], x[0, medoids])


def test_separate_groups_are_separate_in_the_spectrum():
    weights = torch.block_diag(torch.ones(5, 5), torch.ones(3, 3), torch.ones(4, 4)).double()[None]
    allowed = torch.ones(1, 12, dtype=torch.bool)
    allowed[0, 4] = False
    points, norms = spectral_points(weights, 3, allowed)
    _, _, assign = k_medoids(distances(points), norms, 3, allowed)
    found = assign[0].tolist()
    assert found[4] == -1 and len(set(found[:4])) == len(set(found[5:8])) == len(set(found[8:])) == 1
    assert len(set(found)) == 4


def test_fine_grids_have_more_neighbours_and_a_larger_window(monkeypatch):
    from tokenary.reduce import centerclip

    asked = []
    graph, near = centerclip.neighbour_graph, centerclip.window
    monkeypatch.setattr(centerclip, "neighbour_graph", lambda *given: asked.append(given[1]) or graph(*given))
    monkeypatch.setattr(centerclip, "window", lambda *given: asked.append(given[1:]) or near(*given))
    for grid in ((9, 11), (10, 10)):
        x, context = clip(2, grid, batch=1)
        CenterCLIP(keep=3, cluster="spectral", window=True).reduce(x, context)
    assert asked == [10, (9, 9, 7), 15, (19, 19, 7)]


def test_the_mean_of_a_cluster_and_other_distances():
    x, context = clip()
    chosen = CenterCLIP(keep=9, aggregate="mean").reduce(x, context)
    sizes = torch.rand(2, 48) + 0.5
    weighed = CenterCLIP(keep=9, aggregate="mean").reduce(x, replace(context, sizes=sizes))
    for row in range(2):
        medoids, clusters = slow_clusters(distances(x)[row].tolist(), x[row].norm(dim=-1), 9)
        assert chosen.anchors[row].tolist() == medoids
        for k in range(9):
            members = [j for j in range(48) if clusters[j] == k]
            torch.testing.assert_close(chosen.apply(x)[row, k], x[row, members].mean(0))
            mean = sum(sizes[row, j] * x[row, j] for j in members) / sizes[row, members].sum()
            torch.testing.assert_close(weighed.apply(x)[row, k], mean)
        medoids, _ = slow_clusters(distances(x, "cosine")[row].tolist(), x[row].norm(dim=-1), 9)
        assert CenterCLIP(keep=9, metric="cosine").reduce(x, context).anchors[row].tolist() == medoids
        unit = torch.nn.functional.normalize(x, dim=-1)
        medoids, _ = slow_clusters(distances(unit)[row].tolist(), x[row].norm(dim=-1), 9)
        assert CenterCLIP(keep=9, unit=True).reduce(x, context).anchors[row].tolist() == medoids


def test_padded_frames_are_of_no_cluster():
    frames = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
    x, context = clip(batch=3)
    valid = segment_tokens(frames, 4, 12)
    assert valid.shape == (3, 48) and valid.sum(1).tolist() == [48, 24, 36]
    chosen = CenterCLIP(keep=30).reduce(x, replace(context, valid=valid))
    assert (chosen.dense() != 0).sum((1, 2)).tolist() == [30, 24, 30]
    for row, count in enumerate((4, 2, 3)):
        part = replace(context, views=count, place=places(context.grid, count))
        alone = CenterCLIP(keep=30).reduce(x[row : row + 1, : 12 * count], part)
        kept = alone.positions(torch.arange(12 * count)).flatten().tolist()
        assert chosen.anchors[row, : len(kept)].tolist() == kept
    assert not chosen.mass[1, :, 24:].any() and not chosen.mass[1, 24:].any()
    assert segment_tokens(torch.zeros(1, 4), 2, 3).all()
    with pytest.raises(OptionError, match="divisor"):
        segment_tokens(frames, 3, 12)


@pytest.mark.parametrize("reducer", [CenterCLIP(keep=40, frames=3), ReduceFramePool(frames=3)], ids=repr)
def test_behind_the_point_a_segment_is_a_frame(reducer):
    """Two segments of three frames: blocks below see frames, blocks behind what was kept, with the mean class token."""
    vit, pixels = toy_vlm().vision, pictures(6)
    with reducer.attach(vit) as reduced:
        found = vit(pixels).last_hidden_state
    states = vit.embed(pixels)
    for block in vit.blocks[:2]:
        states = block(states)
    segments = []
    for segment in range(2):
        own = states[3 * segment : 3 * segment + 3]
        patches = own[:, 1:].flatten(0, 1)
        if isinstance(reducer, CenterCLIP):
            medoids, _ = slow_clusters(distances(patches[None])[0].tolist(), patches.norm(dim=-1), 40)
            assert reduced.anchors[segment].tolist() == medoids
            patches = patches[medoids]
        else:
            patches = own[:, 1:].mean(0)
        segments.append(torch.cat([own[:, 0].mean(0, keepdim=True), patches]))
    states = torch.stack(segments)
    assert reduced.point.layers == (1,)  # half of three blocks, rounded up
    torch.testing.assert_close(found, vit.norm(vit.blocks[2](states)), atol=1e-4, rtol=1e-4)


def test_sizes_weigh_later_blocks_where_asked():
    vit, seen = toy_vlm().vision, []
    for proportional in (False, True):
        with CenterCLIP(keep=40, frames=3, proportional=proportional).attach(vit):
            hook = vit.blocks[2].register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
            vit(pictures(3))
            hook.remove()
    assert "sizes" not in seen[0] and seen[1]["sizes"][:, 1:].sum() == 192 and (seen[1]["sizes"][:, 0] == 1).all()


def test_the_control_at_the_same_count_samples_every_frame_evenly():
    x, context = clip()
    chosen = ReduceGrid(keep=12).reduce(x, context)
    frame = chosen.index.expand(2, -1) // 12
    assert [(frame == t).sum(1).tolist() for t in range(4)] == [[3, 3]] * 4


def test_the_vector_of_a_video_leaves_padded_segments_out():
    segments = torch.randn(3, 2, 5)
    frames = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    found = video_vector(segments, frames)
    torch.testing.assert_close(found[0], segments[0].mean(0))
    torch.testing.assert_close(found[1], segments[1, 0])
    torch.testing.assert_close(found[2], segments[2].mean(0))  # no last frame is valid


def test_token_shift_moves_channels_between_frames_and_back_again():
    vit, pixels, seen = toy_vlm().vision, pictures(6), []
    plain = vit(pixels).last_hidden_state
    handle = vit.blocks[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vit(pixels)
    with token_shift(vit, 3, 0.25):
        moved = vit(pixels).last_hidden_state
    handle.remove()
    before, after = seen
    for clip_start in (0, 3):
        for t in range(3):
            at = clip_start + t
            forth = before[at - 1, :, :8] if t > 0 else torch.zeros(65, 8)
            back = before[at + 1, :, 8:16] if t < 2 else torch.zeros(65, 8)
            torch.testing.assert_close(after[at], torch.cat([forth, back, before[at, :, 16:]], dim=-1))
    assert moved.shape == plain.shape and not torch.allclose(moved, plain, atol=1e-2)
    torch.testing.assert_close(vit(pixels).last_hidden_state, plain)
    with pytest.raises(OptionError, match="share"), token_shift(vit, 3, 0.7):
        pass


def test_gradients_reach_the_tokens_that_stay():
    x, context = clip()
    x.requires_grad_(True)
    chosen = CenterCLIP(keep=9).reduce(x, context)
    chosen.apply(x).sum().backward()
    kept = torch.zeros(2, 48).scatter(1, chosen.anchors, 1.0)
    torch.testing.assert_close(x.grad, kept[..., None].expand_as(x))


def test_views_of_a_language_model_are_segments_of_one_frame():
    with CenterCLIP(keep=16).attach(toy_vlm()) as reduced:
        seen = reduced.image_tokens(pictures(2))
    assert seen.tokens.shape[1] == 16
    x, context = toy_tokens(CenterCLIP())
    assert CenterCLIP(keep=5).reduce(x, context).shape == (3, 5, 48)


OPTIONS = [
    {"cluster": "spectral"}, {"cluster": "spectral", "graph": "gaussian", "window": True, "sigma": 5.0},
    {"metric": "cosine", "aggregate": "mean", "proportional": True}, {"unit": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_laws_hold_with_other_options(options):
    report = check("centerclip", **options)
    assert report.ok, str(report)


def test_the_control_keeps_the_laws():
    assert check("reduce-frame-pool").ok
