"""Scenes and their questions: coloured objects, text in boxes, tables and charts, real digits and photographs.

``render(geometry, split, seed, index)`` draws one scene with a few questions, the same for the same arguments on every
machine. Every question names the objects that carry its answer, so `Scene.patches` is exact. Training scenes and
held-out ones differ in fonts, words, digit images, photograph crops, pairs of related objects and rows of values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from tokenary.models.bench_vlm.assets import PHOTOS, Split, assets, resize, split_of
from tokenary.models.bench_vlm.canvas import DIGIT_CLASS, PHOTO_CLASS, Canvas, Item, photo_crop, shape_class, sprite
from tokenary.models.bench_vlm.vocabulary import COLOURS, SHAPES, join, plural

FAMILIES = ("ocr", "chart", "counting", "spatial", "attribute", "existence", "listing", "real")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Geometry:
    """What fits on a picture.

    Parameters
    ----------
    side, patch : int
        Pixels of the picture and of a patch.
    max_objects : int
        Most coloured objects.
    max_glyphs : int
        Longest word.
    cell : int
        Pixels of the grid on which things are placed; ``side`` is a multiple of it.
    """

    side: int
    patch: int
    max_objects: int
    max_glyphs: int
    cell: int

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.side // self.patch


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes
    ----------
    question, answer : str
    family : str
        One of `FAMILIES`.
    kind : str
        Finer: for existence ``positive, random, popular, adversarial``.
    targets : tuple of int
        Numbers of the objects that carry the answer; none where the answer is that there is nothing.
    cues : tuple of int
        Numbers of the objects that only say where to look: a frame, the headers of a table.
    """

    question: str
    answer: str
    family: str
    kind: str
    targets: tuple[int, ...] = ()
    cues: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A picture, what is on it, and questions about it.

    Attributes
    ----------
    image : (S, S, 3) uint8
    owner : (S, S) uint8
        Number of the object that each pixel shows; 0 is background.
    classes : (grid, grid) uint8
        What each patch shows, one of `canvas.NUM_CLASSES`.
    items : tuple of Item
        Name and box of each object; number n is ``items[n - 1]``.
    turns : tuple of Turn
    """

    image: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    items: tuple[Item, ...]
    turns: tuple[Turn, ...]

    def mask(self, numbers: tuple[int, ...]) -> NDArray[np.bool_]:
        """Pixels (S, S) of these objects."""
        chosen = np.zeros(256, np.bool_)
        chosen[np.array(numbers, np.intp)] = True
        return chosen[self.owner]

    def patches(self, numbers: tuple[int, ...]) -> NDArray[np.bool_]:
        """Patches (grid, grid) that hold at least one pixel of these objects."""
        grid = len(self.classes)
        patch = len(self.owner) // grid
        return np.logical_or.reduce(self.mask(numbers).reshape(grid, patch, grid, patch), axis=(1, 3))


def render(
    geometry: Geometry, split: Split, seed: int, index: int, families: tuple[str, ...] = FAMILIES, turns: int = 6
) -> Scene:
    """Draw one scene.

    Parameters
    ----------
    geometry : Geometry
        What the picture may hold.
    split : {"train", "val", "test"}
        Which fonts, words, digits, crops, pairs and values it is drawn from.
    seed, index : int
        Which scene of the stream.
    families : tuple of str
        Ask only these; at least one question comes out.
    turns : int
        Most questions.
    """
    makers = [(make, weight) for make, weight, asked in _KINDS if set(asked) & set(families)]
    for attempt in range(100):
        rng = Random(f"{split} {seed} {index} {attempt}")
        (make,) = rng.choices([m for m, _ in makers], [w for _, w in makers])
        canvas = Canvas(geometry.side, geometry.patch, rng, split)
        canvas.background()
        asked = [turn for turn in make(geometry, canvas, rng, split) if turn.family in families]
        if asked:
            canvas.noise()
            rng.shuffle(asked)
            return Scene(canvas.image, canvas.owner, canvas.classes, tuple(canvas.items), tuple(asked[:turns]))
    raise RuntimeError(f"no scene of {families} came out of 100 attempts")


# -- coloured objects -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    colour: str
    shape: str
    number: int
    y: float
    x: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def _themes() -> list[list[str]]:
    """Eight sets of ten coloured shapes that like to appear together: the skewed co-occurrence table."""
    rng = Random("bench-vlm themes")
    everything = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return [rng.sample(everything, 10) for _ in range(8)]


_THEMES = _themes()
_NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
_POPULARITY = [1 / (rank + 3) for rank in range(64)]  # the first names are the popular ones


def _objects(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """Objects of one theme on a jittered grid, so that none touches another."""
    theme = rng.choice(_THEMES)
    pool = rng.sample(theme, rng.choice((2, 3, 10)))  # few different ones: large counts
    count = rng.randrange(geometry.max_objects + 1)
    if count == 0 and rng.random() < 0.7:  # an empty picture teaches little
        count = rng.randrange(1, geometry.max_objects + 1)
    cells = geometry.side // geometry.cell
    objects = []
    for place in sorted(rng.sample(range(cells * cells), count)):
        roll = rng.random()
        name = rng.choice(pool) if roll < 0.75 else rng.choices(_NAMES, _POPULARITY if roll < 0.9 else None)[0]
        colour, shape = name.split()
        size = rng.randrange(geometry.cell * 9 // 16, geometry.cell - 2)
        row, column = divmod(place, cells)
        top = row * geometry.cell + rng.randrange(geometry.cell - size)
        left = column * geometry.cell + rng.randrange(geometry.cell - size)
        number = canvas.blit(sprite(shape, size), top, left, canvas.shade(colour), name, shape_class(colour, shape))
        objects.append(_Object(colour, shape, number, top + size / 2, left + size / 2))
    turns = []
    for maker in (_count, _count, _existence, _existence, _attribute, _relation, _relation, _place, _list):
        turns += maker(geometry, objects, theme, rng, split)
    return list({turn.question: turn for turn in turns}.values())


def _count(geometry: Geometry, objects: list[_Object], theme: list[str], rng: Random, split: Split) -> list[Turn]:
    kind = rng.choice(("color", "shape", "both", "all"))
    colour, shape = (rng.choice(objects).name if objects and rng.random() < 0.85 else rng.choice(theme)).split()
    if kind == "color":
        found, what = [o for o in objects if o.colour == colour], f"{colour} objects"
    elif kind == "shape":
        found, what = [o for o in objects if o.shape == shape], plural(shape)
    elif kind == "both":
        found, what = [o for o in objects if o.name == f"{colour} {shape}"], f"{colour} {plural(shape)}"
    else:
        found, what = objects, "objects"
    targets = tuple(o.number for o in found)
    return [Turn(f"how many {what} are there?", str(len(found)), "counting", kind, targets)]


def _existence(geometry: Geometry, objects: list[_Object], theme: list[str], rng: Random, split: Split) -> list[Turn]:
    present = {o.name for o in objects}
    if objects and rng.random() < 0.5:
        name, kind = rng.choice(sorted(present)), "positive"
    else:
        kind = rng.choice(("random", "popular", "adversarial"))
        absent = {"random": _NAMES, "popular": _NAMES[:12], "adversarial": theme}[kind]
        absent = [name for name in absent if name not in present]
        if not absent:
            return []
        name = rng.choice(absent)
    targets = tuple(o.number for o in objects if o.name == name)
    return [Turn(f"is there a {name}?", "yes" if targets else "no", "existence", kind, targets)]


def _attribute(geometry: Geometry, objects: list[_Object], theme: list[str], rng: Random, split: Split) -> list[Turn]:
    colours, shapes = Counter(o.colour for o in objects), Counter(o.shape for o in objects)
    turns = []
    for o in rng.sample(objects, len(objects)):
        if shapes[o.shape] == 1:
            turns.append(Turn(f"what color is the {o.shape}?", o.colour, "attribute", "color", (o.number,)))
        if colours[o.colour] == 1:
            turns.append(Turn(f"what shape is the {o.colour} object?", o.shape, "attribute", "shape", (o.number,)))
    return turns[:2]


def _relation(geometry: Geometry, objects: list[_Object], theme: list[str], rng: Random, split: Split) -> list[Turn]:
    names = Counter(o.name for o in objects)
    single = [o for o in objects if names[o.name] == 1]
    pairs = [(a, b) for a in single for b in single if a is not b and split_of("pair", a.name, b.name) == split]
    for a, b in rng.sample(pairs, min(len(pairs), 4)):
        down, right = b.y - a.y, b.x - a.x
        if rng.random() < 0.5:
            if abs(right) >= geometry.cell / 2:
                answer = "left" if right > 0 else "right"
                question = f"is the {a.name} left or right of the {b.name}?"
                return [Turn(question, answer, "spatial", "horizontal", (a.number, b.number))]
        elif abs(down) >= geometry.cell / 2:
            answer = "above" if down > 0 else "below"
            question = f"is the {a.name} above or below the {b.name}?"
            return [Turn(question, answer, "spatial", "vertical", (a.number, b.number))]
    return []


def _place(geometry: Geometry, objects: list[_Object], theme: list[str], rng: Random, split: Split) -> list[Turn]:
    names = Counter(o.name for o in objects)
    single = [o for o in objects if names[o.name] == 1]
    if not single:
        return []
    o = rng.choice(single)
    if rng.random() < 0.5:  # the quadrant, where it is clear
        half, margin = geometry.side / 2, geometry.side / 16
        if min(abs(o.y - half), abs(o.x - half)) < margin:
            return []
        where = f"{'top' if o.y < half else 'bottom'} {'left' if o.x < half else 'right'}"
        return [Turn(f"where is the {o.name}?", where, "spatial", "quadrant", (o.number,))]
    others = sorted((np.hypot(p.y - o.y, p.x - o.x), p.name, p.number) for p in objects if p is not o)
    if not others or (len(others) > 1 and others[1][0] < 1.3 * others[0][0]):
        return []
    _, name, number = others[0]
    question = f"which object is nearest to the {o.name}?"
    return [Turn(question, name, "spatial", "nearest", (number,), (o.number,))]


def _list(geometry: Geometry, objects: list[_Object], theme: list[str], rng: Random, split: Split) -> list[Turn]:
    if not 1 <= len(objects) <= 4 or rng.random() < 0.4:
        return []
    # in reading order: `objects` comes cell by cell
    names, numbers = [o.name for o in objects], tuple(o.number for o in objects)
    return [Turn("list all objects.", join(names), "listing", "all", numbers)]


# -- text, tables, charts ---------------------------------------------------------------------------------------------


def _word(length: int, rng: Random, split: Split) -> str:
    """Draw digits, letters, or a pronounceable word, of this split."""
    while True:
        kind = rng.random()
        if kind < 0.4:
            word = "".join(rng.choices(_DIGITS, k=length))
        elif kind < 0.7:
            word = "".join(rng.choices(LETTERS, k=length))
        else:
            word = "".join(rng.choice("AEUY" if i % 2 else "BCDFGHJKLMNPRSTVWXZ") for i in range(length))
        if length == 1 or split_of("word", word) == split:
            return word


def _text(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """Words in coloured frames, each in a font, size, slant and blur of its own."""
    rows = geometry.side // 32
    colours = rng.sample(COLOURS, rng.randrange(1 if rows == 2 else 2, rows + 1))
    turns = []
    for row, colour in zip(sorted(rng.sample(range(rows), len(colours))), colours, strict=True):
        length = min(rng.choices(range(1, 7), (3, 3, 3, 2, 2, 2))[0], geometry.max_glyphs)
        word = _word(length, rng, split)
        height = rng.randrange(10, 18)
        width = min(geometry.side, int(length * height * 0.95) + 10 + rng.randrange(8))
        left = rng.randrange(geometry.side - width + 1)
        box = (row * 32 + 1, left, row * 32 + 31, left + width)
        frame = canvas.frame(box, colour, 2)
        ink = canvas.shade(rng.choice(("white", "yellow", "cyan")))
        inner = (box[0] + 3, box[1] + 3, box[2] - 3, box[3] - 3)
        slant = max(0.0, rng.uniform(-0.3, 0.3))
        font = int(rng.choice(assets().fonts[split]))
        numbers = canvas.text(word, inner, height, font, ink, slant)
        if rng.random() < 0.2:
            _blur(canvas.image[inner[0] : inner[2], inner[1] : inner[3]])
        turns.append(Turn(f"read the {colour} box.", word, "ocr", f"length {length}", tuple(numbers), (frame,)))
    return turns


def _blur(area: NDArray[np.uint8]) -> None:
    """Smooth an area in place with the kernel (1, 2, 1) / 4 both ways."""
    wide = area.astype(np.uint16)
    wide[:, 1:-1] = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) // 4
    wide[1:-1] = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) // 4
    area[:] = wide


def _table(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """A table with letters for rows, digits for columns, and one or two glyphs in a cell."""
    cell = 32 if geometry.side > 64 else 20
    rows, columns = (rng.randrange(2, geometry.side // cell) for _ in range(2))
    letters, heads = sorted(rng.sample(LETTERS, rows)), sorted(rng.sample("123456789", columns))
    font, height = int(rng.choice(assets().fonts[split])), rng.randrange(9, 13)
    line, ink = np.array([rng.randrange(90, 140)] * 3, np.uint8), canvas.shade("white")
    top, left = (rng.randrange(geometry.side - n * cell + 1) for n in (rows + 1, columns + 1))

    def write(text: str, row: int, column: int, colour: tuple[int, ...]) -> tuple[int, ...]:
        y, x = top + row * cell, left + column * cell
        return tuple(canvas.text(text, (y + 2, x + 2, y + cell - 2, x + cell - 2), height, font, colour))

    for n in range(1, rows + 1):
        canvas.image[top + n * cell, left : left + (columns + 1) * cell] = line
    for n in range(1, columns + 1):
        canvas.image[top : top + (rows + 1) * cell, left + n * cell] = line
    head = canvas.shade("yellow")
    row_heads = [write(letter, r + 1, 0, head) for r, letter in enumerate(letters)]
    column_heads = [write(digit, 0, c + 1, head) for c, digit in enumerate(heads)]
    length = 1 if geometry.max_glyphs <= 3 else 2
    turns = []
    for r, letter in enumerate(letters):
        for c, digit in enumerate(heads):
            word = _word(rng.randrange(1, length + 1), rng, split)
            numbers = write(word, r + 1, c + 1, ink)
            question = f"value at row {letter} column {digit}?"
            turns.append(Turn(question, word, "chart", "cell", numbers, row_heads[r] + column_heads[c]))
    return rng.sample(turns, min(len(turns), 4))


def _bars(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """Bars of height 1 to 9 over lines at every unit (each third one bright), with a letter below each."""
    n = rng.randrange(2, 4 if geometry.side <= 64 else 6)
    while True:
        values = [rng.randrange(1, 10) for _ in range(n)]
        if split_of("bars", *values) == split:
            break
    letters = rng.sample(LETTERS, n)
    font, head = int(rng.choice(assets().fonts[split])), 14
    unit = (geometry.side - head - 2) // 10
    floor, pitch = geometry.side - head - 1, geometry.side // n
    for step in range(10):
        canvas.image[floor - step * unit] = 150 if step % 3 == 0 else 75
    bars, names = [], []
    for i, (value, letter) in enumerate(zip(values, letters, strict=True)):
        colour, width = rng.choice(COLOURS[:7]), max(6, int(pitch * rng.uniform(0.35, 0.7)))
        left = i * pitch + (pitch - width) // 2
        block = np.full((value * unit, width), 255, np.uint8)
        bars.append(canvas.blit(block, floor - value * unit, left, canvas.shade(colour), f"bar {letter}", 0))
        box = (floor + 2, i * pitch, geometry.side, (i + 1) * pitch)
        names.append(canvas.text(letter, box, 10, font, canvas.shade("white"))[0])
    turns = [
        Turn(f"value of bar {letters[i]}?", str(values[i]), "chart", "value", (bars[i],), (names[i],))
        for i in rng.sample(range(n), min(n, 3))
    ]
    a, b = rng.sample(range(n), 2)
    if values[a] != values[b]:
        answer = letters[a] if values[a] > values[b] else letters[b]
        question = f"which bar is higher, {letters[a]} or {letters[b]}?"
        turns.append(Turn(question, answer, "chart", "larger", (bars[a], bars[b]), (names[a], names[b])))
    if values.count(max(values)) == 1:
        answer = letters[values.index(max(values))]
        turns.append(Turn("which bar is highest?", answer, "chart", "highest", tuple(bars), tuple(names)))
    return turns


def _line(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """One or two lines with a trend each."""
    side, turns = geometry.side, []
    x = np.arange(side * 2) / (side * 2 - 1)
    for colour in rng.sample(COLOURS, rng.randrange(1, 3)):
        trend = rng.choice(("up", "down", "flat", "peak", "valley"))
        rise, turn = rng.uniform(0.35, 0.6), rng.uniform(0.35, 0.65)
        tent = np.minimum(x / turn, (1 - x) / (1 - turn))
        y = {"up": x, "down": 1 - x, "flat": np.full_like(x, rng.random()), "peak": tent, "valley": 1 - tent}[trend]
        wobble = 0.03 * np.sin(x * rng.uniform(10, 30) + rng.random() * 6)
        rows = side * (0.9 - rng.uniform(0, 0.8 - rise) - rise * y + wobble)
        coverage = np.zeros((side, side), np.uint8)
        thickness = 2 if side <= 64 else 3
        for t in range(thickness):
            coverage[np.clip(rows.astype(np.int64) + t, 0, side - 1), (x * (side - 1)).astype(np.int64)] = 255
        number = canvas.blit(coverage, 0, 0, canvas.shade(colour), f"{colour} line", 0)
        turns.append(Turn(f"what is the trend of the {colour} line?", trend, "chart", "trend", (number,)))
    return turns


# -- real pixels ------------------------------------------------------------------------------------------------------


def _boxes(geometry: Geometry, rng: Random) -> list[tuple[int, int, int]]:
    """Places for two to four square pictures: top, left, side."""
    half = geometry.side // 2
    size = half - 8 if geometry.side > 64 else half - 6
    places = rng.sample([(0, 0), (0, half), (half, 0), (half, half)], rng.randrange(2, 5))
    room = half - size - 4  # a frame of 2 pixels on both sides
    return [(y + 2 + rng.randrange(room + 1), x + 2 + rng.randrange(room + 1), size) for y, x in places]


def _handwriting(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """Handwritten digits in coloured frames."""
    data, places = assets(), _boxes(geometry, rng)
    colours = rng.sample(COLOURS, len(places))
    values, numbers, frames = [], [], []
    for colour, (top, left, size) in zip(colours, places, strict=True):
        frames.append(canvas.frame((top - 2, left - 2, top + size + 2, left + size + 2), colour, 2))
        which = int(rng.choice(data.digit_numbers(split)))
        values.append(int(data.digit_labels[which]))
        side = rng.randrange(size * 3 // 4, size + 1)
        ink = np.clip(resize(data.digits[which], side, side) * 16, 0, 255).astype(np.uint8)
        y, x = top + rng.randrange(size - side + 1), left + rng.randrange(size - side + 1)
        kind = DIGIT_CLASS + values[-1]
        numbers.append(canvas.blit(ink, y, x, canvas.shade("white"), f"digit {values[-1]}", kind))
    turns = [
        Turn(f"read the digit in the {c} box.", str(v), "real", "digit", (n,), (f,))
        for c, v, n, f in zip(colours, values, numbers, frames, strict=True)
    ]
    a, b = rng.sample(range(len(places)), 2)
    question, total = f"sum of the digits in the {colours[a]} box and the {colours[b]} box?", values[a] + values[b]
    turns.append(Turn(question, str(total), "real", "sum", (numbers[a], numbers[b]), (frames[a], frames[b])))
    return turns


def _photographs(geometry: Geometry, canvas: Canvas, rng: Random, split: Split) -> list[Turn]:
    """Crops of photographs in coloured frames."""
    places = _boxes(geometry, rng)
    colours, photos = rng.sample(COLOURS, len(places)), rng.sample(range(len(PHOTOS)), len(places))
    turns = []
    for colour, photo, (top, left, size) in zip(colours, photos, places, strict=True):
        frame = canvas.frame((top - 2, left - 2, top + size + 2, left + size + 2), colour, 2)
        pixels = photo_crop(photo, size, rng, split)
        number = canvas.paste(pixels, top, left, f"photo {PHOTOS[photo]}", PHOTO_CLASS + photo)
        question = f"which photo is in the {colour} box?"
        turns.append(Turn(question, PHOTOS[photo], "real", "photo", (number,), (frame,)))
    return turns


_Maker = Callable[[Geometry, Canvas, Random, Split], list[Turn]]
# scene, its share of the pictures, the families that it asks
_KINDS: tuple[tuple[_Maker, float, tuple[str, ...]], ...] = (
    (_objects, 0.45, ("counting", "spatial", "attribute", "existence", "listing")),
    (_text, 0.27, ("ocr",)),
    (_table, 0.08, ("chart",)),
    (_bars, 0.08, ("chart",)),
    (_line, 0.04, ("chart",)),
    (_handwriting, 0.05, ("real",)),
    (_photographs, 0.03, ("real",)),
)

__all__ = ["FAMILIES", "Geometry", "Scene", "Turn", "render"]
