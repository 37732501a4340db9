"""The claim of CenterCLIP: its arms, its figures, on tiny networks that know nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenary.claims import centerclip as claim
from tokenary.models.video_text import Story, VideoText, VideoTextConfig, candidates, gallery, panned, render
from tokenary.models.video_text.clips import FRAMES, stack
from tokenary.models.video_text.retrieval import twins
from tokenary.models.video_text.stories import Step

CONFIG = VideoTextConfig(width=24, layers=2, heads=2, space=16, hidden=20)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VideoText(CONFIG).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _hashed_captions(monkeypatch):
    def encode(strings):
        rows = [np.random.default_rng(list(text.encode())).standard_normal(384) for text in strings]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    monkeypatch.setattr("tokenary.models.minilm.encode", encode)


@pytest.mark.parametrize("frames", [12, 24])
def test_every_arm_keeps_as_many_tokens(frames):
    model = network()
    clips = [render(story, "test", 0, i, frames) for i, story in enumerate(candidates("test", 0, 2))]
    pixels, found = torch.from_numpy(stack(clips)[0]), []
    for arm in claim.ARMS:
        with claim.attached(model, arm, frames) as reduced:
            found.append(model(pixels))
        assert reduced.anchors.shape == (6, 36), arm
        assert reduced.maps[0].shape[-1] == 12 * frames, arm
    found.append(model(pixels))
    assert len({tuple(vector[0].tolist()) for vector in found}) == len(found)
    assert torch.equal(model(pixels), found[-1])  # nothing stays attached


def test_uniform_takes_the_same_places_of_every_frame():
    model = network()
    pixels = torch.from_numpy(render(candidates("test", 0, 1)[0], "test", 0, 0).pixels)[None]
    with claim.attached(model, "uniform", 12) as reduced:
        model(pixels)
    for segment in reduced.place:
        places = [{tuple(p[1:]) for p in segment.tolist() if p[0] == frame} for frame in range(4)]
        assert len(places[0]) == 9 and all(each == places[0] for each in places)


def test_scores_say_what_was_found(monkeypatch):
    stories = [
        Story("then", Step(0, 0, "left"), Step(1, 1, "up")),
        Story("while", Step(0, 0, "left"), Step(1, 1, "up")),
    ]
    shown = gallery("test", 0, 3)
    shown.stories[:] = [stories[0], stories[0].twin, stories[1]]
    cosines = torch.tensor([[0.5, 0.4, 0.6], [0.3, 0.2, 0.1], [0.0, 0.1, 0.9]])
    monkeypatch.setattr(claim, "similarity", lambda *given: cosines)
    first, five, before = claim.measured(network(), shown, lambda: None)
    assert first.tolist() == [0, 0, 100] and five.tolist() == [100] * 3
    assert before[:2].tolist() == [100, 0] and math.isnan(before[2])
    assert twins(shown.stories) == [1, 0, -1]
    told = claim.summary(np.stack([first, five, before]), np.array([True, True, False]))
    assert told["order_recall_at_1"] == 0 and told["other_recall_at_1"] == 100 and told["before_its_twin"] == 50


def test_the_bootstrap_draws_twins_together():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400) * 10 + 3
    mean, spread, low, high = claim.bootstrap(values, np.arange(400), 0)
    assert mean == values.mean() and low < mean < high
    assert abs(spread / (values.std(ddof=1) / 20) - 1) < 0.1
    doubled = claim.bootstrap(values.repeat(2), np.arange(400).repeat(2), 0)
    assert abs(doubled[1] / spread - 1) < 0.1  # twice the captions, as much evidence
    assert claim.bootstrap(values, np.arange(400), 0) == (mean, spread, low, high)


def test_coverage_counts_the_pixels_of_patches():
    model = network()
    windows = np.array([[0.0, 0.0, 60.0], [50.0, 50.0, 60.0]])
    every = np.argwhere(np.ones((2, 6, 6)))
    assert claim.covered(windows, every, 0, model).sum() == 2 * 3600 - 100
    assert claim.covered(windows, np.array([[1, 2, 5]]), 0, model)[70:80, 100:110].all()
    assert claim.covered(windows, np.array([[1, 2, 5], [1, 2, 5]]), 0, model).sum() == 100
    pixels, _ = panned(0, 0, 0)
    found = claim.coverage(model, FRAMES, 1, 2, 0)
    assert found["clips"] == 2 and all(0 < share <= 100 for share in found["covered"].values())
    assert claim.coverage(model, FRAMES, 0, 2, 0) == {} and pixels.shape[0] == FRAMES


def test_cost_of_the_blocks_is_that_of_the_modules():
    from torch.utils.flop_counter import FlopCounterMode

    model = network()
    pixels = torch.zeros(1, 12, 48, 48, 3, dtype=torch.uint8)
    for arm in ("none", "frame pooling"):
        with claim.attached(model, arm, 12), FlopCounterMode(display=False, depth=4) as counter:
            model(pixels)
        blocks = sum(
            sum(ops.values())
            for name, ops in counter.get_flop_counts().items()
            if name.count(".") == 3 and "vision.blocks." in name
        )
        assert claim.flops(model, arm, 12) == blocks, arm
    assert claim.flops(model, "uniform", 12) < claim.flops(model, "k-medoids", 12) < claim.flops(model, "none", 12)


def test_the_whole_claim_on_networks_that_know_nothing(monkeypatch):
    monkeypatch.setattr(claim, "load", lambda arm="none": network(len(arm)))
    outcome = claim.run(seed=0, galleries=2, size=12, ways=1, photos=1)
    assert outcome.n == 24 and {each.name for each in outcome.controls} == {"none", "frame pooling", "random"}
    assert outcome.paired_spread is not None and claim.CLAIM.judge(outcome) in ("not shown", "direction only", "shown")
    assert set(outcome.details["untuned"]) == set(claim.ARMS) and outcome.details["order_captions"] > 5
    again = claim.run(seed=0, galleries=2, size=12, ways=1, photos=1)
    assert again.method == outcome.method and again.details["over"] == outcome.details["over"]
    longer = claim.run(seed=0, galleries=1, size=12, frames=24, ways=0)
    assert longer.n == 12 and longer.details["mflops"]["none"] > outcome.details["mflops"]["none"]


def test_falsified_where_the_medoids_find_no_more():
    from tokenary.core.claim import Figure, Outcome

    def verdict(method, uniform, random):
        figures = [Figure("", value, 1.0) for value in (method, uniform)]
        return claim.CLAIM.judge(Outcome(*figures, controls=(Figure("random", random),), paired_spread=0.4))

    assert verdict(50, 50, 10) == verdict(49, 50, 10) == verdict(60, 50, 70) == "not shown"
    assert verdict(50.9, 50, 10) == "direction only" and verdict(51.5, 50, 10) == "shown"
