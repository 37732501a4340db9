"""Rendered clips and the network that finds them by captions."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from tokenary.core.errors import InputError, UnknownNameError
from tokenary.models.video_text import (
    Step,
    Story,
    VideoText,
    VideoTextConfig,
    gallery,
    load,
    ranks,
    render,
    save,
    similarity,
)
from tokenary.models.video_text.clips import FRAMES, PATCH, SIDE, panned, stack
from tokenary.models.video_text.loading import tail_names
from tokenary.models.video_text.model import contrastive_loss, moments
from tokenary.models.video_text.stories import THINGS, WAYS, candidates
from tokenary.models.video_text.training import Pool, Trainer, Training, thinned
from tokenary.reduce.centerclip import CenterCLIP

TINY = VideoTextConfig(width=24, layers=2, heads=2, space=16, hidden=20)
SPLITS = ("train", "val", "test")


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VideoText(TINY).eval()


def vectors_of(stories):
    return torch.stack(
        [torch.from_numpy(np.random.default_rng(abs(hash(s.caption))).random(384)) for s in stories]
    ).float()


def true_of(caption, story):
    """Whether a caption, read word by word, says what happens in a story."""
    head, kind, rest = next(
        (caption.split(sep, 1)[0], kind, caption.split(sep, 1)[1])
        for sep, kind in ((" while ", "while"), (", then a ", "then"), (", then ", "turn"))
        if sep in caption
    )

    def step(text):
        name, way = text.removeprefix("a ").split(" goes ")
        return name, way

    first = step(head)
    second = step(rest) if kind != "turn" else (first[0], rest)
    own = [(each.name, each.way) for each in (story.first, story.second)]
    return story.kind == kind and ([first, second] == own or (kind == "while" and [second, first] == own))


def test_a_caption_is_true_of_one_clip_of_a_set():
    for split in SPLITS:
        stories = candidates(split, 0, 120)
        assert len({story.caption for story in stories}) == 120
        for story in stories[:30]:
            assert [other for other in stories if true_of(story.caption, other)] == [story]


def test_twins_are_together_and_differ_in_order_alone():
    stories = candidates("test", 3, 101)
    for story, after in itertools.pairwise(stories):
        if story.twin is not None and story not in [s.twin for s in stories[: stories.index(story)]]:
            assert after == story.twin and after.twin == story and after.split == story.split == "test"
            assert sorted(story.caption.replace(",", "").split()) == sorted(after.caption.replace(",", "").split())
    kinds = [story.kind for story in stories]
    assert min(kinds.count(kind) for kind in ("turn", "then", "while")) > 5


def test_splits_share_no_story():
    found = [set(candidates(split, 0, 600)) for split in SPLITS]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


def test_a_clip_depends_on_its_name_alone():
    story = candidates("train", 0, 1)[0]
    one = render(story, "train", 5, 7)
    candidates("train", 1, 10)
    again = render(story, "train", 5, 7)
    assert one.pixels.dtype == np.uint8 and one.pixels.shape == (FRAMES, SIDE, SIDE, 3)
    assert (one.pixels == again.pixels).all() and (one.classes == again.classes).all()
    assert (one.pixels != render(story, "train", 5, 8).pixels).any()
    assert (one.pixels != render(story, "train", 6, 7).pixels).any()


@pytest.mark.parametrize("kind", ["turn", "then", "while"])
@pytest.mark.parametrize("ways", [("left", "up"), ("down", "right"), ("up", "down")])
def test_things_go_where_the_caption_says(kind, ways):
    steps = [Step(0, 0, ways[0]), Step(0, 0, ways[1]) if kind == "turn" else Step(2, 9, ways[1])]
    for index in range(5):
        clip = render(Story(kind, *steps), "val", 0, index, 24)

        def middle(step, frame, clip=clip):
            where = np.argwhere(clip.classes[frame] == step.label)
            return where.mean(0) if len(where) else None

        for half, (first, last) in enumerate(((0, 11), (12, 23))):
            for number, step in enumerate(steps):
                if kind == "turn" and number != half:
                    continue
                before, after = middle(step, first), middle(step, last)
                if before is None or after is None:  # behind the other thing
                    continue
                way, moved = np.array(WAYS[step.way]), (after - before) * PATCH
                if kind == "then" and number != half:
                    assert abs(moved).max() <= 4
                else:
                    assert moved @ way > 0 or (kind == "while" and moved @ way == 0)
                    assert abs(moved @ way[::-1]) <= 8


def test_things_are_painted_where_the_classes_say():
    story = Story("turn", Step(0, 1, "left"), Step(0, 1, "down"))  # a red square
    clip = render(story, "test", 0, 3)
    for frame, classes in zip(clip.pixels.astype(int), clip.classes, strict=True):
        centres = frame[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        red = centres[..., 0] - centres[..., 1] > 90
        assert red[classes == story.first.label].any()  # the box is a little larger than the square
        assert not red[classes == 0].any()


def test_more_frames_show_the_same_clip():
    story = candidates("test", 0, 1)[0]
    few, many = render(story, "test", 0, 0, 1), render(story, "test", 0, 0, 3)
    assert (few.classes[0] == many.classes[1]).all()


def test_every_thing_fits():
    for thing in range(len(THINGS)):
        story = Story("turn", Step(1, thing, "left"), Step(1, thing, "right"))
        for index in range(6):
            clip = render(story, "test", 1, index)
            assert (clip.classes == story.first.label).any((1, 2)).all()


def test_a_camera_sees_what_its_windows_say():
    pixels, windows = panned(1, 0, 0, 4)
    assert pixels.shape == (4, SIDE, SIDE, 3) and (windows >= 0).all()
    assert (windows[:, :2] + windows[:, 2:] <= 161).all() and len({tuple(w) for w in windows.tolist()}) == 4


def test_shapes_and_what_joining_frames_changes():
    model = network()
    pixels = torch.from_numpy(stack([render(s, "val", 0, i) for i, s in enumerate(candidates("val", 0, 3))])[0])
    tokens = model.vision(pixels.flatten(0, 1), moments(3, FRAMES).flatten())
    assert tokens.shape == (36, 37, 24)
    plain = model(pixels)
    assert plain.shape == (3, 16)
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(3))
    for row in range(3):
        total = 0
        for t in range(FRAMES):
            when, token = math.pi * (t + 0.5) / FRAMES, tokens[FRAMES * row + t, 0]
            total = total + model.project(torch.cat([token, math.cos(when) * token, math.cos(2 * when) * token]))
        torch.testing.assert_close(plain[row], total / total.norm(), atol=1e-5, rtol=1e-4)
    alone = model(pixels[1:2])
    torch.testing.assert_close(alone[0], plain[1], atol=1e-5, rtol=1e-4)
    with CenterCLIP(keep=36, frames=4).attach(model.vision, "vision:50%") as reduced:
        joined = model(pixels)
        tokens = model.vision(pixels.flatten(0, 1), moments(3, FRAMES).flatten())
    assert reduced.anchors.shape == (9, 36) and tokens.shape == (9, 37, 24) and not torch.allclose(joined, plain)
    segments = model.clip_vectors(tokens, torch.tensor([[1 / 6, 1 / 2, 5 / 6]] * 3))
    torch.testing.assert_close(joined, segments)  # a segment is at the middle of its frames
    with pytest.raises(InputError, match="48 x 48"):
        model(pixels[:, :, :24])


def test_the_order_of_frames_reaches_the_vector():
    model = network()
    pixels = torch.from_numpy(render(candidates("val", 0, 1)[0], "val", 0, 0).pixels)[None]
    with torch.no_grad():
        for parameter in model.vision.blocks.parameters():
            parameter.mul_(10)

        def change():
            return float((model(pixels) - model(pixels.flip(1))).abs().max())

        both = change()
        model.vision.time.weight.zero_()
        assert both > 1e-3 and change() > 1e-3  # by the projection alone
        model.project.weight[:, TINY.width :].zero_()
        assert change() < 1e-5  # the mean of frames that know no moment


def test_the_loss_goes_both_ways():
    unit = partial(torch.nn.functional.normalize, dim=-1)
    videos, texts, scale = torch.randn(4, 6), torch.randn(4, 6), torch.tensor(1.3)
    cosine = torch.stack([torch.stack([torch.cosine_similarity(v, t, dim=0) for t in texts]) for v in videos])
    logits = (cosine * math.exp(1.3)).tolist()
    expected = 0.0
    for i in range(4):
        forth = logits[i][i] - math.log(sum(math.exp(v) for v in logits[i]))
        back = logits[i][i] - math.log(sum(math.exp(row[i]) for row in logits))
        expected -= (forth + back) / 8
    assert abs(float(contrastive_loss(unit(videos), unit(texts), scale)) - expected) < 1e-5


def test_ranks_count_what_is_nearer():
    cosines = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.3, 0.4, 0.3]])
    assert ranks(cosines).tolist() == [0, 2, 2]  # a tie counts as missed


def test_one_frame_of_each_part_with_its_moment():
    clips = [render(s, "train", 0, i) for i, s in enumerate(candidates("train", 0, 5))]
    pixels, classes, moment = thinned(clips, 4, 0, 9)
    assert pixels.shape == (5, 4, 48, 48, 3) and classes.shape == (5, 4, 6, 6)
    numbers = (moment * FRAMES - 0.5).round().int()
    assert ((numbers // 3) == torch.arange(4)).all() and len(numbers.unique()) > 4
    for clip, row, when in zip(clips, pixels, numbers, strict=True):
        assert (row.numpy() == clip.pixels[when.numpy()]).all()
    assert torch.equal(thinned(clips, 12, 0, 9)[2], moments(5, 12))


def test_batches_hold_different_stories_and_twins_together():
    stories = candidates("train", 0, 60)
    pool = Pool(stories, vectors_of(stories))
    assert sorted(itertools.chain(*pool.groups)) == list(range(60)) and max(map(len, pool.groups)) == 2
    rows = pool.batch(0, 3, 20)
    assert len(set(rows)) == 20 and rows == pool.batch(0, 3, 20) and rows != pool.batch(0, 4, 20)
    chosen = [stories[row] for row in rows]
    for story in chosen[:-1]:
        assert story.twin is None or story.twin in chosen or story.twin not in stories


SETTINGS = Training(steps=4, batch=6, frames=3, captions=3, seed=2)


def state_after(path, cuts, tail=(), **options):
    stories = candidates("train", 0, 30)
    pool, start = Pool(stories, vectors_of(stories)), network().state_dict()
    for steps in cuts:
        model = network()
        trainer = Trainer(model, SETTINGS, pool, path, tail=tail, **options)
        loss = trainer.run(steps)
        trainer.checkpoint.save()
        assert math.isfinite(loss)
    assert trainer.state.step == sum(cuts)
    return start, model.state_dict()


def test_a_broken_run_goes_on_as_if_it_had_not_been(tmp_path):
    _, whole = state_after(tmp_path / "a.pt", [4])
    start, parts = state_after(tmp_path / "b.pt", [1, 2, 1])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["vision.mix.weight"], start["vision.mix.weight"])
    stories = candidates("train", 0, 30)
    with pytest.raises(InputError, match="another run"):
        Trainer(network(), Training(steps=5), Pool(stories, vectors_of(stories)), tmp_path / "a.pt")


def test_tuning_moves_what_is_behind_and_nothing_else(tmp_path):
    model, tail = network(), tail_names(TINY, 0)
    start, tuned = state_after(tmp_path / "a.pt", [2], tail)
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert changed and all(name.startswith(tail) for name in changed)
    assert "vision.blocks.1.expand.weight" in changed and tail[0] == "vision.blocks.1."
    assert set(dict(model.named_parameters())) >= changed


def test_save_and_load_by_arm(tmp_path):
    model, other = network(), network(1)
    tail = tail_names(TINY, 0)
    arms = {
        name: {key: value for key, value in net.state_dict().items() if key.startswith(tail)}
        for name, net in (("none", model), ("other", other))
    }
    save(model, tmp_path, arms, seed=3)
    one, two = load(folder=tmp_path), load("other", tmp_path)
    torch.testing.assert_close(one.project.weight, model.project.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(two.project.weight, other.project.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(two.vision.mix.weight, model.vision.mix.weight, atol=1e-3, rtol=1e-3)
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    with pytest.raises(UnknownNameError, match="arm"):
        load("k-means", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="no video-text network"):
        load(folder=tmp_path)


def test_a_gallery(monkeypatch):
    monkeypatch.setattr("tokenary.models.minilm.encode", lambda strings: torch.ones(len(strings), 384))
    shown = gallery("test", 1, 9, 6)
    assert len(shown.stories) == 9 and shown.pixels.shape == (9, 6, 48, 48, 3) and shown.vectors.shape == (9, 384)
    assert torch.equal(shown.pixels, gallery("test", 1, 9, 6).pixels)


@pytest.mark.real
def test_the_shipped_network_finds_clips():
    from tokenary.models.minilm import archive
    from tokenary.models.video_text.loading import SHIPPED

    if not (SHIPPED / "report.json").is_file():
        pytest.skip("the network is not here")
    archive()
    shown, report = gallery("val", 0, 200), json.loads((SHIPPED / "report.json").read_text())
    found = float((ranks(similarity(load(), shown)) == 0).float().mean())
    assert abs(found - report["none"]["curve"][-1]["recall_at_1"]) < 0.03
    for arm in json.loads((SHIPPED / "config.json").read_text())["arms"]:
        assert load(arm).config.grid == (6, 6)
    assert (SHIPPED / "model.safetensors").stat().st_size < 4_000_000
