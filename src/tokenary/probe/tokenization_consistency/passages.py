"""Trials: a passage with some words in brackets, which the model is to replace and leave the rest alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from tokenary.core.errors import InputError
from tokenary.core.seeding import substream
from tokenary.probe.tokenization_consistency.alignment import WORD

INSTRUCTION = (
    "Replace every word in [brackets] by another word. Leave all other words as they are, and drop the brackets."
    " Write only the new {unit}.\n\n{passage}"
)
SHARE = 0.05  # of the words that are no stop words, in long passages
_STOP = set(
    """
    about above after again against all also although among and any are because been before being below between both
    but can could did does doing down during each even ever every few for from further had has have having her here
    hers him his how however into its itself just like made many may might mine more most much must myself nor not
    now off once one only other our ours out over own same shall she should since some still such than that the
    their them then there these they this those though through thus too two under until upon very was well were what
    when where which while who whom whose why will with within without would yet you your yours
    """.split()  # noqa: SIM905
)
_SENTENCE = regex.compile(r"(?<=[.!?]['’”\"]?)\s+(?=[\p{Lu}“\"'‘])")


@dataclass(frozen=True)
class Passage:
    """A text and the words in it that are to be replaced.

    Parameters
    ----------
    text : str
        One line.
    targets : tuple of int
        Indices of the targets among its words.
    """

    text: str
    targets: tuple[int, ...]

    @property
    def marked(self) -> str:
        """The text with the targets in brackets."""
        parts, at = [], 0
        for i, found in enumerate(WORD.finditer(self.text)):
            if i in self.targets:
                parts += [self.text[at : found.start()], "[", found[0], "]"]
                at = found.end()
        return "".join([*parts, self.text[at:]])


def packed(text: str, least: int, most: int) -> list[str]:
    """Return pieces of prose, as many whole sentences as fit into `most` words, at least `least` of them.

    White space in them is made single spaces.
    """
    pieces, current, size = [], "", 0
    for sentence in _SENTENCE.split(" ".join(text.split())):
        count = len(WORD.findall(sentence))
        if current and size + count > most:
            pieces.append((current, size))
            current, size = "", 0
        current, size = f"{current} {sentence}".strip(), size + count
    return [piece for piece, size in [*pieces, (current, size)] if least <= size <= most and "[" not in piece]


def code_lines(text: str, least: int, most: int) -> list[str]:
    """Return lines of code with so many words, without what stands before and behind them."""
    found = [line.strip() for line in text.split("\n")]
    return [line for line in found if least <= len(WORD.findall(line)) <= most and "[" not in line]


def candidates(text: str) -> list[int]:
    """Return the words that can be targets: no stop word, not the first, and nowhere else in the text."""
    words = [word.casefold() for word in WORD.findall(text)]
    found = list(WORD.finditer(text))
    return [
        i
        for i, word in enumerate(words)
        if i and len(word) > 2 and word not in _STOP and not word.isdecimal() and words.count(word) == 1
        and text[found[i].start() - 1].isspace()
    ]  # fmt: skip


def draw(texts: Sequence[str], count: int, targets: int, seed: int) -> list[Passage]:
    """Draw passages and in each of them one to `targets` words, more where they are long.

    Raises
    ------
    InputError
        There are too few.
    """
    fitting = [text for text in texts if candidates(text)]
    if len(fitting) < count:
        raise InputError(f"the text has {len(fitting)} passages that fit, and {count} are needed")
    made = []
    for n, i in enumerate(substream(seed, "phantom passages").permutation(len(fitting))[:count].tolist()):
        stream, known = substream(seed, "phantom targets", n), candidates(fitting[i])
        number = max(int(stream.integers(1, min(targets, len(known)) + 1)), round(SHARE * len(known)))
        made.append(Passage(fitting[i], tuple(sorted(stream.choice(known, number, replace=False).tolist()))))
    return made
