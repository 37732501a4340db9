"""A canvas that knows what was drawn on it: every pixel remembers its object."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from random import Random

import numpy as np
from numpy.typing import NDArray

from tokenary.core.seeding import substream
from tokenary.models.bench_vlm.assets import GLYPHS, Split, assets, resize, scaled_glyphs
from tokenary.models.bench_vlm.vocabulary import COLOURS, SHAPES

RGB = dict(
    zip(
        COLOURS,
        [(220, 40, 40), (40, 180, 60), (60, 90, 235), (235, 220, 50), (245, 140, 25), (160, 60, 200), (60, 210, 220),
         (240, 240, 240)],
        strict=True,
    )
)  # fmt: skip
# What a patch shows, for the auxiliary loss: 0 nothing, then coloured shapes, glyphs, handwritten digits, photographs.
GLYPH_CLASS = 1 + len(COLOURS) * len(SHAPES)
DIGIT_CLASS = GLYPH_CLASS + len(GLYPHS)
PHOTO_CLASS = DIGIT_CLASS + 10
NUM_CLASSES = PHOTO_CLASS + 11


@dataclass(frozen=True)
class Item:
    """One drawn object: its name and its box (top, left, bottom, right), in pixels, ends exclusive."""

    label: str
    box: tuple[int, int, int, int]


@dataclass
class Canvas:
    """An image under construction.

    Attributes
    ----------
    image : (S, S, 3) uint8
    owner : (S, S) uint8
        Number of the object that each pixel shows, counted from 1; 0 is background.
    classes : (S / patch, S / patch) uint8
        Class of the last object whose box covers the centre of each patch.
    items : list of Item
        The objects; number n is ``items[n - 1]``.
    """

    side: int
    patch: int
    rng: Random
    split: Split
    items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start empty."""
        self.image = np.empty((self.side, self.side, 3), np.uint8)
        self.owner = np.zeros((self.side, self.side), np.uint8)
        self.classes = np.zeros((self.side // self.patch,) * 2, np.uint8)

    def background(self) -> None:
        """Fill with a dark tint, a gradient, or a dimmed photograph."""
        kind, rng = self.rng.random(), self.rng
        tint = np.array([rng.randrange(10, 70) for _ in range(3)], np.uint8)
        if kind < 0.6:
            self.image[:] = tint
        elif kind < 0.8:
            ramp = np.linspace(0.4, 1.4, self.side, dtype=np.float32)[:, None, None]
            ramp = ramp if rng.random() < 0.5 else ramp.swapaxes(0, 1)
            self.image[:] = ramp * tint
        else:
            self.image[:] = photo_crop(rng.randrange(len(assets().photos)), self.side, rng, self.split) * 0.3

    def blit(
        self, coverage: NDArray[np.uint8], top: int, left: int, colour: tuple[int, ...], label: str, kind: int
    ) -> int:
        """Draw a coverage mask (h, w), 0 to 255, in one colour; return the object's number.

        A pixel belongs to the object where at least a third of it is covered.
        """
        height, width = coverage.shape
        where = slice(top, top + height), slice(left, left + width)
        area = self.image[where]
        alpha = coverage[..., None].astype(np.uint16)
        # at most 255 * 255, which uint16 holds
        area[:] = (area * (255 - alpha) + np.array(colour, np.uint16) * alpha) // 255
        return self._own(where, coverage >= 85, (top, left, top + height, left + width), label, kind)

    def paste(self, pixels: NDArray[np.generic], top: int, left: int, label: str, kind: int) -> int:
        """Put a picture (h, w, 3) on the canvas; return its number."""
        height, width = pixels.shape[:2]
        where = slice(top, top + height), slice(left, left + width)
        self.image[where] = pixels
        return self._own(where, np.ones((height, width), bool), (top, left, top + height, left + width), label, kind)

    def frame(self, box: tuple[int, int, int, int], colour: str, thickness: int) -> int:
        """Draw the outline of a box inwards; return its number."""
        top, left, bottom, right = box
        outline = np.full((bottom - top, right - left), 255, np.uint8)
        outline[thickness:-thickness, thickness:-thickness] = 0
        return self.blit(outline, top, left, self.shade(colour), f"{colour} box", 0)

    def text(
        self, text: str, box: tuple[int, ...], height: int, font: int, colour: tuple[int, ...], slant: float = 0
    ) -> list[int]:
        """Write a line centred in a box, smaller if it does not fit; return the numbers of its glyphs."""
        top, left, bottom, right = box
        while True:
            glyphs = [scaled_glyphs(font, height)[GLYPHS.index(character)] for character in text]
            lean = [shear(glyph, slant) for glyph in glyphs]
            overhang = lean[-1].shape[1] - glyphs[-1].shape[1]
            width = sum(glyph.shape[1] + 1 for glyph in glyphs) - 1 + overhang
            if (width <= right - left and height <= bottom - top) or height <= 6:
                break
            height -= 1
        x, y = left + max(0, right - left - width) // 2, top + max(0, bottom - top - height) // 2
        numbers = []
        for character, glyph, leaning in zip(text, glyphs, lean, strict=True):
            part = leaning[: self.side - y, : self.side - x]
            numbers.append(self.blit(part, y, x, colour, character, GLYPH_CLASS + GLYPHS.index(character)))
            x += glyph.shape[1] + 1
        return numbers

    def shade(self, colour: str) -> tuple[int, ...]:
        """Return a colour with a little jitter."""
        return tuple(min(255, max(0, channel + self.rng.randrange(-18, 19))) for channel in RGB[colour])

    def noise(self) -> None:
        """Add sensor noise of a random strength, after everything was drawn."""
        bank, rng = _noise_bank(), self.rng
        y, x = rng.randrange(bank.shape[1] - self.side), rng.randrange(bank.shape[2] - self.side)
        grain = bank[rng.randrange(len(bank)), y : y + self.side, x : x + self.side]
        strength = rng.randrange(0, 12)
        noisy = self.image + (grain * np.int16(strength) >> 5)
        self.image = np.clip(noisy, 0, 255).astype(np.uint8)

    def _own(
        self, where: tuple[slice, slice], covered: NDArray[np.bool_], box: tuple[int, ...], label: str, kind: int
    ) -> int:
        self.items.append(Item(label, (box[0], box[1], box[2], box[3])))
        number = len(self.items)
        np.copyto(self.owner[where], number, where=covered)
        if kind:
            half, patch = self.patch // 2, self.patch  # patches whose centre lies in the box
            rows = slice((box[0] + half) // patch, (box[2] + half - 1) // patch)
            columns = slice((box[1] + half) // patch, (box[3] + half - 1) // patch)
            self.classes[rows, columns] = kind
        return number


def shape_class(colour: str, shape: str) -> int:
    """Return the class of a coloured shape."""
    return 1 + COLOURS.index(colour) * len(SHAPES) + SHAPES.index(shape)


def shear(glyph: NDArray[np.uint8], slope: float) -> NDArray[np.uint8]:
    """Lean a mask (h, w) to the right by `slope` pixels a row; the foot stays."""
    if slope <= 0:
        return glyph
    height, width = glyph.shape
    shifts = ((height - 1 - np.arange(height)) * slope).astype(np.int64)
    leaning = np.zeros((height, width + int(shifts[0])), np.uint8)
    leaning[np.arange(height)[:, None], shifts[:, None] + np.arange(width)] = glyph
    return leaning


def photo_crop(number: int, side: int, rng: Random, split: Split) -> NDArray[np.float32]:
    """Cut a square from a photograph and resize it to `side`.

    Training sees the left 112 of 160 columns; validation the upper, test the lower half of the others.
    """
    photo = assets().photos[number]
    region = {"train": photo[:, :112], "val": photo[:80, 112:], "test": photo[80:, 112:]}[split]
    size = rng.randrange(40, 49)
    y, x = rng.randrange(region.shape[0] - size + 1), rng.randrange(region.shape[1] - size + 1)
    return resize(region[y : y + size, x : x + size], side, side)


@cache
def sprite(shape: str, size: int) -> NDArray[np.uint8]:
    """Coverage of a shape in a (size, size) box, from 4 x 4 samples a pixel."""
    steps = (np.arange(4 * size) + 0.5) / (2 * size) - 1
    y, x = steps[:, None], steps[None, :]
    radius, angle = np.hypot(y, x), np.arctan2(x, -y)
    if shape == "circle":
        inside = radius <= 1
    elif shape == "square":
        inside = np.maximum(abs(y), abs(x)) <= 0.85
    elif shape == "triangle":
        inside = (y <= 0.9) & (abs(x) <= (y + 0.95) * 0.53)
    elif shape == "star":
        phase = (angle % (2 * np.pi / 5)) - np.pi / 5
        # a five-pointed star in polar form: straight edges between radius 1 and radius 0.42
        tip, notch, turn = 1.0, 0.42, np.pi / 5 - abs(phase)
        inside = radius <= tip * notch * np.sin(np.pi / 5) / (notch * np.sin(np.pi / 5 - turn) + tip * np.sin(turn))
    elif shape == "ring":
        inside = (radius <= 1) & (radius >= 0.55)
    elif shape == "cross":
        inside = (np.minimum(abs(y), abs(x)) <= 0.3) & (np.maximum(abs(y), abs(x)) <= 0.95)
    elif shape == "diamond":
        inside = abs(y) + 1.3 * abs(x) <= 1
    else:  # heart
        u, v = 1.25 * x, 0.15 - 1.15 * y
        inside = (u**2 + v**2 - 0.9) ** 3 <= u**2 * v**3 * 1.2
    return (inside.reshape(size, 4, size, 4).mean((1, 3)) * 255).astype(np.uint8)


@cache
def _noise_bank() -> NDArray[np.int16]:
    return (substream(0, "bench-vlm noise").normal(size=(4, 320, 320, 3)) * 32).astype(np.int16)
