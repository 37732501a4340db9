"""Clips that show stories: a pure function of the story, split, seed and index, in numpy.

Splits differ in stories, in the fonts of words and in the photographs that some backgrounds are cut from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenary.core.seeding import substream
from tokenary.models.bench_vlm.assets import GLYPHS, Split, assets, resize, scaled_glyphs
from tokenary.models.bench_vlm.canvas import RGB, sprite
from tokenary.models.bench_vlm.vocabulary import COLOURS, SHAPES
from tokenary.models.video_text.stories import THINGS, WAYS, Step, Story

SIDE, PATCH, FRAMES = 48, 8, 12

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A rendered story.

    Attributes
    ----------
    story : Story
    pixels : (T, 48, 48, 3) uint8
    classes : (T, 6, 6) uint8
        What the centre of each patch shows, `Step.label`; 0 for nothing.
    """

    story: Story
    pixels: Pixels
    classes: Pixels


def render(story: Story, split: Split, seed: int, index: int, frames: int = FRAMES) -> Clip:
    """Show a story.

    Parameters
    ----------
    story : Story
        What happens.
    split : {"train", "val", "test"}
        Of fonts and photographs.
    seed, index : int
        Name of the clip: where things begin, how large they are, the background.
    frames : int
        T, over the same time: with twice as many everything goes half as far from one to the next.
    """
    rng = substream(seed, "video-text", split, "clip", index)
    steps = [story.first] if story.kind == "turn" else [story.first, story.second]
    masks = [_mask(step, split, rng) for step in steps]
    offsets = _ways(story, int(rng.integers(14, 19)))
    starts = _starts(masks, [path(np.linspace(0, 1, 13)) for path in offsets], rng)
    pixels = np.repeat(_background(split, rng)[None], frames, axis=0)
    classes = np.zeros((frames, SIDE // PATCH, SIDE // PATCH), np.uint8)
    moments = (np.arange(frames) + 0.5) / frames
    for step, mask, path, start in zip(steps, masks, offsets, starts, strict=True):
        colour = np.clip(np.array(RGB[COLOURS[step.colour]]) + rng.integers(-18, 19, 3), 0, 255).astype(np.uint16)
        _paint(pixels, classes, mask, np.rint(start + path(moments)).astype(int), colour, step.label)
    grain = _noise()[:frames, rng.integers(48) :, rng.integers(48) :][:, :SIDE, :SIDE]
    noisy = pixels + (grain * np.int16(rng.integers(12)) >> 5)
    return Clip(story, np.clip(noisy, 0, 255).astype(np.uint8), classes)


def stack(clips: Sequence[Clip]) -> tuple[Pixels, Pixels]:
    """Return pixels (B, T, 48, 48, 3) and classes (B, T, 6, 6) of some clips."""
    return np.stack([clip.pixels for clip in clips]), np.stack([clip.classes for clip in clips])


def _ways(story: Story, far: int) -> list[_Path]:
    """Say where each thing is, from where it begins, at moments between 0 and 1."""
    one, two = (far * np.array(WAYS[step.way], float) for step in (story.first, story.second))
    still = np.zeros(2)
    if story.kind == "turn":
        return [_Path(one, two)]
    return (
        [_Path(one, still), _Path(still, two)]
        if story.kind == "then"
        else [_Path(one / 2, one / 2), _Path(two / 2, two / 2)]
    )


@dataclass(frozen=True)
class _Path:
    """Ways in the first and the second half, each (2,) pixels."""

    first: NDArray[np.float64]
    second: NDArray[np.float64]

    def __call__(self, moments: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T,) to (T, 2)."""
        early, late = np.clip(2 * moments, 0, 1), np.clip(2 * moments - 1, 0, 1)
        return early[:, None] * self.first + late[:, None] * self.second


def _starts(
    masks: Sequence[Pixels], paths: Sequence[NDArray[np.float64]], rng: np.random.Generator, tries: int = 32
) -> NDArray[np.float64]:
    """Choose where things begin, (things, 2), so that none leaves the frame and, where that can be, none is hidden."""
    boxes = []
    for mask, path in zip(masks, paths, strict=True):
        low, high = -path.min(0), SIDE - np.array(mask.shape) - path.max(0)
        boxes.append(np.rint(low + rng.random((tries, 2)) * (high - low)))
    if len(masks) == 1:
        return boxes[0][:1]
    at = [box[:, None] + path for box, path in zip(boxes, paths, strict=True)]  # (tries, 13, 2)
    apart = (at[0] + masks[0].shape <= at[1]) | (at[1] + masks[1].shape <= at[0])
    hidden = (~apart.any(-1)).sum(1)
    best = int(hidden.argmin())
    return np.stack([box[best] for box in boxes])


def _paint(
    pixels: Pixels,
    classes: Pixels,
    mask: Pixels,
    corners: NDArray[np.int64],
    colour: NDArray[np.uint16],
    label: int,
) -> None:
    """Draw a coverage mask into every frame, and say which patches show it."""
    (height, width), half = mask.shape, PATCH // 2
    alpha = mask[..., None].astype(np.uint16)
    drawn, kept = colour * alpha, 255 - alpha
    for frame, (top, left) in enumerate(corners.tolist()):
        area = pixels[frame, top : top + height, left : left + width]
        area[:] = (area * kept + drawn) // 255
        rows = slice((top + half) // PATCH, (top + height + half - 1) // PATCH)
        columns = slice((left + half) // PATCH, (left + width + half - 1) // PATCH)
        classes[frame, rows, columns] = label


def _mask(step: Step, split: Split, rng: np.random.Generator) -> Pixels:
    """Return the coverage of a thing, (h, w)."""
    name = THINGS[step.thing]
    if name in SHAPES:
        return sprite(name, int(rng.integers(12, 16)))
    fonts = assets().fonts[split]
    return _word(name, int(fonts[rng.integers(len(fonts))]), int(rng.integers(8, 11)))


@cache
def _word(word: str, font: int, height: int) -> Pixels:
    glyphs = [scaled_glyphs(font, height)[GLYPHS.index(letter)] for letter in word]
    gap = np.zeros((len(glyphs[0]), 1), np.uint8)
    mask = np.concatenate([part for glyph in glyphs for part in (glyph, gap)][:-1], axis=1)
    mask = mask[: max(height, int(np.flatnonzero(mask.any(1)).max()) + 1)]  # no empty rows below
    if mask.shape[1] <= SIDE - 20:
        return mask
    return _word(word, font, height - 1)


def _background(split: Split, rng: np.random.Generator) -> Pixels:
    """Return a dark tint, a gradient, or a dimmed photograph: (48, 48, 3)."""
    kind, tint = rng.random(), rng.integers(10, 70, 3).astype(np.float32)
    if kind < 0.8:
        ramp = np.linspace(0.4, 1.4, SIDE, dtype=np.float32)[:, None, None] if kind > 0.6 else np.float32(1)
        ramp = ramp if kind < 0.7 else np.swapaxes(ramp, 0, 1)
        return np.broadcast_to(ramp * tint, (SIDE, SIDE, 3)).astype(np.uint8)
    photo = assets().photos[rng.integers(len(assets().photos))]
    region = {"train": photo[:, :112], "val": photo[:80, 112:], "test": photo[80:, 112:]}[split]
    y, x = (int(rng.integers(length - SIDE + 1)) for length in region.shape[:2])
    return (region[y : y + SIDE, x : x + SIDE] * np.float32(0.3)).astype(np.uint8)


def panned(number: int, seed: int, index: int, frames: int = FRAMES) -> tuple[Pixels, NDArray[np.float64]]:
    """Let a camera pan and zoom over a photograph.

    Parameters
    ----------
    number : int
        Photograph of `tokenary.models.bench_vlm.assets`.
    seed, index : int
        Name of the camera's way.
    frames : int
        T.

    Returns
    -------
    pixels : (T, 48, 48, 3) uint8
    windows : (T, 3)
        Top, left and side of the square of the photograph, in pixels, that each frame shows.
    """
    photo, rng = assets().photos[number], substream(seed, "video-text", "panned", number, index)
    ends = []
    for _ in range(2):
        side = rng.uniform(64, 112)
        ends.append([*rng.uniform(0, len(photo) - side, 2), side])
    windows = np.rint(np.linspace(np.array(ends[0]), np.array(ends[1]), frames)).clip(0)
    pixels = [
        resize(photo[int(top) : int(top + side), int(left) : int(left + side)], SIDE, SIDE)
        for top, left, side in windows
    ]
    return np.stack(pixels).clip(0, 255).astype(np.uint8), windows


@cache
def _noise() -> NDArray[np.int16]:
    normal = substream(0, "video-text noise").standard_normal((24, 2 * SIDE, 2 * SIDE, 3), dtype=np.float32)
    return (normal * 32).astype(np.int16)
