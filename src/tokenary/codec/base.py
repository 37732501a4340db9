"""The protocol of the room: a codec gives, token by token, the weights that an entropy coder codes with.

Encoder and decoder run the same `Ensemble` on the same tokens; what it learns is never sent. Weights are whole numbers,
made from logits by operations that give the same result on every machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenary.core.method import Method


class Ensemble(ABC):
    """State of one block while it is coded; several lanes take turns in a fixed order."""

    @abstractmethod
    def plan(self, lanes: Sequence[int]) -> list[bool]:
        """Say for each of these lanes whether its next token needs the language model's logits."""

    @abstractmethod
    def weights(self, lane: int, logits: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Return whole numbers (V,), not all zero, in proportion to the probabilities of the lane's next token."""

    @abstractmethod
    def update(self, lane: int, token: int) -> None:
        """Learn the token that came; called right after `weights` of the same lane."""


class Lanes(Protocol):
    """Texts that a language model reads side by side."""

    #: Logits are the same whatever else is read in the same pass; else both sides must read alike.
    exact: bool
    #: Most tokens a lane may read at once.
    drop: int

    def read(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Read some tokens in each lane, maybe none; return the states of each, at least that after its last token."""

    def logits(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map states (R, K) to logits (R, V)."""


class Reader(Protocol):
    """A language model that opens lanes."""

    name: str
    vocab_size: int

    def open(self, lanes: int, window: int, drop: int, sinks: int = 0) -> Lanes:
        """Start so many empty texts."""


class TextCodec(Method):
    """Base of the methods of the slot ``codec``."""

    window: int
    drop: int
    sinks: int

    @abstractmethod
    def lanes_for(self, tokens: int) -> int:
        """Into how many lanes a block of so many tokens is cut."""

    def open(self, reader: Reader, lanes: int) -> Lanes:
        """Start so many empty texts, with what this method lets a token see."""
        return reader.open(lanes, self.window, self.drop, self.sinks)

    @abstractmethod
    def ensemble(self, vocab_size: int, lanes: int) -> Ensemble:
        """Return a fresh state for a block."""

    def spec(self) -> str:
        """Return the options that are not the default, as the text of a recipe's step."""
        default: Any = type(self)().options
        given = [f"{name}={value}" for name, value in self.options.items() if value != default[name]]
        return self.card.slug + (":" + ",".join(given) if given else "")
