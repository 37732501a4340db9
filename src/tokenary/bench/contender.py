"""What can be timed: a recipe of ours, or anything else that generates greedily from token ids."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.models import LM
from tokenary.run import Generation, build

Clock = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """What one contender did with one batch of prompts.

    Parameters
    ----------
    token_ids : list of list of int
        New tokens of each sequence, the end token included.
    per_pass : list of list of (int, int)
        Drafted and accepted tokens of each pass after the prompt's.
    from_draft : list of list of bool
        Which new tokens came from a draft.
    seconds, first_token_seconds : float
        From token ids in to the last and to the first token out.
    peak_bytes : int
        Peak memory of the whole process, or of the GPU, during the run.
    kv_bytes : int or None
        Most bytes of keys, values and bookkeeping held between two passes; None where it is not known.
    written : list of int, optional
        Tokens chosen for each prompt, where that is not the length of `token_ids`; see `tokenary.run.Output`.
    branches : int
        Texts written for a prompt beside its answer, or to make it; 0 for none.
    fills : bool
        Whether passes fill masks; see `tokenary.core.decoding.Trace`.
    """

    token_ids: list[list[int]]
    per_pass: list[list[tuple[int, int]]]
    from_draft: list[list[bool]]
    seconds: float
    first_token_seconds: float
    peak_bytes: int
    kv_bytes: int | None = None
    written: list[int] | None = None
    branches: int = 0
    fills: bool = False

    @property
    def counts(self) -> list[int]:
        """Tokens chosen for each prompt."""
        return list(map(len, self.token_ids)) if self.written is None else self.written

    @property
    def tokens(self) -> int:
        """Tokens chosen for all prompts."""
        return sum(self.counts)

    @property
    def passes(self) -> int:
        """Passes of the model after the prompt's; a batch takes one together."""
        return max(map(len, self.per_pass), default=0)


class Contender(Protocol):
    """Something that generates greedily and can be timed."""

    name: str
    kind: Literal["recipe", "peer"]
    lossless: bool
    #: Whether one run changes what the next does.
    learns: bool

    def run(self, prompts: Sequence[Sequence[int]]) -> Sample:
        """Generate for a batch of prompts, given as token ids."""

    def forget(self) -> None:
        """Be as new."""

    def freeze(self) -> None:
        """Remember what is known now."""

    def thaw(self) -> None:
        """Go back to what was remembered."""


class RecipeContender:
    """A recipe of ours.

    Parameters
    ----------
    lm : LM
        The model.
    recipe : Recipe
        Its options are checked here.
    max_new_tokens : int
        Most tokens a prompt.
    clock : callable
        Returns seconds.
    """

    kind: Literal["recipe", "peer"] = "recipe"

    def __init__(self, lm: LM, recipe: Recipe, max_new_tokens: int, clock: Clock = time.perf_counter) -> None:
        self.lm, self.recipe, self.max_new_tokens, self.clock = lm, recipe, max_new_tokens, clock
        self.name, self.lossless = str(recipe), recipe.lossless
        self.methods = build(lm, recipe)
        self.learns = "draft" in self.methods
        self._frozen = self.methods

    def run(self, prompts: Sequence[Sequence[int]]) -> Sample:
        """Generate for a batch of prompts, given as token ids."""
        self.lm.warm[self.recipe] = self.methods
        memory = PeakMemory(self.lm.device)
        began = self.clock()
        generation = Generation(self.lm, prompts, self.recipe, self.max_new_tokens, Sampler())
        pieces = iter(generation)
        next(pieces)
        first = self.clock()
        for _ in pieces:
            pass
        ended = self.clock()
        outputs = generation.outputs
        return Sample(
            token_ids=[output.token_ids for output in outputs],
            per_pass=[output.trace.per_pass for output in outputs],
            from_draft=[output.trace.from_draft for output in outputs],
            seconds=ended - began,
            first_token_seconds=first - began,
            peak_bytes=memory.read(),
            kv_bytes=outputs[0].stats.kv_bytes or None,
            written=[output.written for output in outputs],
            branches=max(len(output.branches) for output in outputs),
            fills=outputs[0].trace.fills,
        )

    def forget(self) -> None:
        """Be as new."""
        self.methods = build(self.lm, self.recipe)

    def freeze(self) -> None:
        """Remember what is known now."""
        if self.learns:  # a strategy that does not may hold a model of its own, which is not to be copied
            self._frozen = _copied(self.methods)

    def thaw(self) -> None:
        """Go back to what was remembered."""
        if self.learns:
            self.methods = _copied(self._frozen)


def _copied(methods: dict[str, Any]) -> dict[str, Any]:
    """Copy methods with all they learned; their read-only options, which cannot be copied, are shared."""
    return copy.deepcopy(methods, {id(method.options): method.options for method in methods.values()})


class PeakMemory:
    """Peak memory since its creation: of the GPU the model is on, else resident memory of this process.

    Where the kernel does not let the mark be reset (it does on Linux), the peak is that of the process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            with open("/proc/self/clear_refs", "w") as marks:
                marks.write("5")
        except OSError:
            pass

    def read(self) -> int:
        """Return the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            import resource  # not on Windows

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
