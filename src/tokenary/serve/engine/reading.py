"""Newcomers of a lane: their prompts are read several short ones in one pass, or one long one in pieces."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from torch import Tensor

from tokenary.core.decoding import Decoding, Emission
from tokenary.hf.strategy import Task
from tokenary.hf.target import Target
from tokenary.serve.engine.work import Work


@dataclass(eq=False)
class Newcomer:
    """A job that has no token yet.

    Parameters
    ----------
    work : Work
        The job.
    sequence : Decoding
        Its prompt.
    task : Task
        Makes its cache.
    """

    work: Work
    sequence: Decoding
    task: Task


@dataclass(eq=False)
class Reading:
    """Prompts that are read together, in a target of their own.

    Parameters
    ----------
    newcomers : list of Newcomer
        Whose prompts; they may come and go until the first step.

    Attributes
    ----------
    target : Target
        Reads them.
    """

    newcomers: list[Newcomer]
    target: Target = field(init=False)
    _steps: Generator[list[Emission], None, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.target = self.newcomers[0].task.target()

    def takes(self, newcomer: Newcomer, piece: int) -> bool:
        """Whether one more can be read in the same pass of `piece` tokens, in which shorter prompts are padded."""
        together = [*self.newcomers, newcomer]
        return self._steps is None and len(together) * max(len(one.sequence.ids) for one in together) <= piece

    def step(self, piece: int) -> Tensor | None:
        """Read a piece; return the logits after each prompt, (B, V), once all is read."""
        if self._steps is None:
            self._steps = self.target.reading([one.sequence.ids for one in self.newcomers], piece)
        try:
            next(self._steps)
        except StopIteration as end:
            logits: Tensor = end.value
            return logits
        return None
