"""Galleries: sets of clips and captions, and how near captions and clips are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenary.models import minilm
from tokenary.models.bench_vlm.assets import Split
from tokenary.models.video_text.clips import FRAMES, render, stack
from tokenary.models.video_text.model import VideoText
from tokenary.models.video_text.stories import Story, candidates


@dataclass(frozen=True)
class Gallery:
    """Clips of different stories, and their captions.

    Attributes
    ----------
    stories : list of Story
    pixels : (K, T, 48, 48, 3) uint8 Tensor
    vectors : (K, 384) Tensor
        MiniLM's, of the captions.
    """

    stories: list[Story]
    pixels: Tensor
    vectors: Tensor


def caption_vectors(stories: Sequence[Story]) -> Tensor:
    """Return MiniLM's vectors (K, 384) of the captions of stories."""
    return minilm.encode([story.caption for story in stories]).clone()


def gallery(split: Split, seed: int, count: int, frames: int = FRAMES) -> Gallery:
    """Draw a gallery; the same seed gives the same clips, at any number of frames."""
    stories = candidates(split, seed, count)
    pixels, _ = stack([render(story, split, seed, index, frames) for index, story in enumerate(stories)])
    return Gallery(stories, torch.from_numpy(pixels), caption_vectors(stories))


@torch.inference_mode()
def similarity(
    model: VideoText,
    shown: Gallery,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch: int = 25,
) -> Tensor:
    """Return the cosines of captions and clips, (K, K), a caption a row.

    ``within`` returns a context in which the frame encoder is run, as a reducer's ``attach``.
    """
    with within():
        clips = [model(shown.pixels[start : start + batch]) for start in range(0, len(shown.pixels), batch)]
    return model.encode_captions(shown.vectors) @ torch.cat(clips).mT


def ranks(cosines: Tensor) -> Tensor:
    """Return how many other clips are at least as near to each caption as its own, (K,): with 0 it is found."""
    return (cosines >= cosines.diagonal()[:, None]).sum(1) - 1


def twins(stories: Sequence[Story]) -> list[int]:
    """Return the number of each story's twin, -1 where it has none or is not there."""
    number = {story: i for i, story in enumerate(stories)}
    return [-1 if story.twin is None else number.get(story.twin, -1) for story in stories]
