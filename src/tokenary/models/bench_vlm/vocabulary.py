"""Words and characters of the small models: a closed vocabulary, one id a word, one id a glyph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenary.core.errors import InputError
from tokenary.models.bench_vlm.assets import GLYPHS, PHOTOS

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SPECIAL = ("<pad>", "<bos>", "<question>", "<answer>", "<end>")
_WORDS = re.findall(
    r"\S+",
    "how many objects are there is a the in where what which color shape object of left right top bottom above below "
    "or nearest to list all read box yes no none value at row column bar bars higher highest trend line up down flat "
    "peak valley digit digits sum and photo shows frame first last moves ? , .",
)
PAD, BOS, QUESTION, ANSWER, END = range(len(SPECIAL))


class Vocabulary:
    """Text to ids and back.

    A text is lower-case words, capitals and digits; capitals and digits are read one by one, so ``"A7"`` is two tokens.
    """

    def __init__(self) -> None:
        words = [*COLOURS, *SHAPES, *(f"{s}s" if s != "cross" else "crosses" for s in SHAPES), *PHOTOS, *_WORDS]
        self.tokens: tuple[str, ...] = (*SPECIAL, *GLYPHS, *dict.fromkeys(words))
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises
        ------
        InputError
            A word or a character that the models do not know.
        """
        pieces = re.findall(r"[A-Z0-9]|[a-z]+|\S", text)
        unknown = [piece for piece in pieces if piece not in self._ids]
        if unknown:
            raise InputError(f"these small models do not know {', '.join(map(repr, dict.fromkeys(unknown)))}")
        return [self._ids[piece] for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens; glyphs that follow each other are joined."""
        text, joined = "", False
        for token in (self.tokens[i] for i in ids):
            if token in SPECIAL:
                continue
            glyph = token in GLYPHS
            text += token if not text or (glyph and joined) or token in ",.?" else f" {token}"
            joined = glyph
        return text

    def prompt(self, question: str) -> list[int]:
        """Return the ids of one question, up to where its answer begins."""
        return [QUESTION, *self.encode(question), ANSWER]

    def turn(self, question: str, answer: str) -> tuple[list[int], list[bool]]:
        """Return the ids of one question with its answer, and which of them are to be predicted."""
        prompt, reply = self.prompt(question), [*self.encode(answer), END]
        return prompt + reply, [False] * len(prompt) + [True] * len(reply)


VOCABULARY = Vocabulary()


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return "crosses" if shape == "cross" else f"{shape}s"


def join(parts: Sequence[str]) -> str:
    """Join an enumeration."""
    return ", ".join(parts)
