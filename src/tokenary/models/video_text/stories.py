"""Stories of coloured shapes and words that move, and their captions.

Three kinds:

    turn     a red circle goes left, then up                        the same thing, one way and then another
    then     a red circle goes left, then a blue star goes up       one thing after the other
    while    a red circle goes left while a blue star goes up       both at once

The first two have a *twin*, which differs in the order alone. `candidates` draws different stories, twins together, so
that of a set every caption is true of one clip only, and who cannot tell the order takes half of them for their twins.
A story and its twin are of the same split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tokenary.core.seeding import substream
from tokenary.models.bench_vlm.assets import Split, split_of
from tokenary.models.bench_vlm.vocabulary import COLOURS, SHAPES

WORDS = ("SUN", "CAT", "BUS", "JAM", "KEY", "HAT", "ELF", "GYM")
THINGS = SHAPES + WORDS
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
NUM_CLASSES = 1 + len(COLOURS) * len(THINGS)

Kind = Literal["turn", "then", "while"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, order=True)
class Step:
    """One thing that goes one way: numbers into `COLOURS` and `THINGS`, and one of `WAYS`."""

    colour: int
    thing: int
    way: str

    @property
    def name(self) -> str:
        """The thing in words."""
        word = THINGS[self.thing]
        return f"{COLOURS[self.colour]} {word}" if word in SHAPES else f"{COLOURS[self.colour]} word {word}"

    @property
    def label(self) -> int:
        """Class of a patch that shows it, from 1."""
        return 1 + self.colour * len(THINGS) + self.thing


@dataclass(frozen=True)
class Story:
    """What happens in a clip: two steps, in a ``turn`` of the same thing; of ``while`` in ascending order."""

    kind: Kind
    first: Step
    second: Step

    @property
    def caption(self) -> str:
        """Return the story in words."""
        start = f"a {self.first.name} goes {self.first.way}"
        if self.kind == "turn":
            return f"{start}, then {self.second.way}"
        return f"{start}{',' * (self.kind == 'then')} {self.kind} a {self.second.name} goes {self.second.way}"

    @property
    def twin(self) -> Story | None:
        """Return the story in the other order, None where there is none."""
        return None if self.kind == "while" else Story(self.kind, self.second, self.first)

    def moving(self, half: int) -> tuple[Step, ...]:
        """Return what moves in the first half of the clip (0), or in the second (1)."""
        return (self.first, self.second) if self.kind == "while" else (self.second if half else self.first,)

    @property
    def split(self) -> Split:
        """Return the split it belongs to, the same as its twin's."""
        steps = sorted([self.first, self.second])
        return split_of(self.kind, *((step.colour, step.thing, step.way) for step in steps))


def draw(rng: np.random.Generator) -> Story:
    """Draw a story of any split."""
    kind = KINDS[rng.choice(3, p=(0.15, 0.4, 0.45))]
    things = rng.choice(len(COLOURS) * len(THINGS), 2, replace=False).tolist()
    things = [things[0]] * 2 if kind == "turn" else things
    ways = rng.choice(4, 2, replace=kind != "turn").tolist()
    steps = [
        Step(thing // len(THINGS), thing % len(THINGS), list(WAYS)[way])
        for thing, way in zip(things, ways, strict=True)
    ]
    return Story(kind, *(sorted(steps) if kind == "while" else steps))


def candidates(split: Split, seed: int, count: int) -> list[Story]:
    """Draw different stories of a split, each followed by its twin; the last twin may be cut off."""
    rng, found = substream(seed, "video-text", split, "stories"), dict[Story, None]()
    while len(found) < count:
        story = draw(rng)
        if story.split == split:
            found.update(dict.fromkeys(each for each in (story, story.twin) if each is not None))
    return list(found)[:count]
