"""A text under way, and what a decoding loop reports of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Trace:
    """What happened while one sequence was generated.

    Parameters
    ----------
    per_pass : list of (int, int)
        Drafted and accepted tokens of each pass after the prompt's.
    from_draft : list of bool
        For each new token, whether it was accepted from a draft.
    given : int
        New tokens that the model did not choose, such as a header.
    fills : bool
        Whether passes fill masks: `per_pass` then counts positions computed and masks filled, and no pass reads the
        prompt.
    """

    per_pass: list[tuple[int, int]] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    given: int = 0
    fills: bool = False

    @property
    def passes(self) -> int:
        """Passes after the prompt's."""
        return len(self.per_pass)

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(drafted for drafted, _ in self.per_pass)

    @property
    def accepted(self) -> int:
        """Tokens accepted from drafts."""
        return sum(accepted for _, accepted in self.per_pass)

    @property
    def tokens_per_pass(self) -> float:
        """Chosen tokens a pass, the prompt's own token apart; 1 without drafts."""
        chosen = self.accepted if self.fills else len(self.from_draft) - self.given - 1
        return chosen / self.passes if self.passes else 1.0


@dataclass
class Decoding:
    """One sequence under way: its tokens, where they came from, and why it ended.

    Parameters
    ----------
    index : int
        Which prompt it answers.
    ids : list of int
        Prompt and new tokens.
    n_prompt : int
        Tokens of the prompt.
    trace : Trace
        Passes and drafts.
    finish : str or None
        ``stop``, ``length``, ``pruned``, or None while it goes on.
    log_weight : float
        What a loop with several branches says of this one: an importance weight or a log-probability, in nats.
    """

    index: int
    ids: list[int]
    n_prompt: int
    trace: Trace = field(default_factory=Trace)
    finish: str | None = None
    log_weight: float = 0.0

    @property
    def new_ids(self) -> list[int]:
        """The generated tokens."""
        return self.ids[self.n_prompt :]


@dataclass(frozen=True)
class Emission:
    """Tokens that one pass added to one sequence.

    Parameters
    ----------
    row : int
        Which prompt.
    token_ids : list of int
        New tokens.
    from_draft : list of bool
        Which of them were accepted from a draft.
    finish : str or None
        Why the sequence ended, if it did.
    branch : int or None
        Which branch of the prompt; None for the answer itself.
    copy_of : int or None
        The branch starts anew as a copy of this one, as that was before this pass; then the tokens are added.
    at : list of int or None
        Where the tokens were placed, counted from the end of the prompt; None where they were appended.
    """

    row: int
    token_ids: list[int]
    from_draft: list[bool]
    finish: str | None = None
    branch: int | None = None
    copy_of: int | None = None
    at: list[int] | None = None


class Running(Protocol):
    """A decoding loop. Iterating runs it a pass at a time; to cancel, stop iterating; read the rest at any time."""

    #: The answer to each prompt.
    sequences: list[Decoding]
    #: For each prompt, the branches that its answer was made from; empty where there are none.
    branches: list[list[Decoding]]
    #: Most bytes of keys, values and bookkeeping held between two passes.
    peak_bytes: int

    def __iter__(self) -> Iterator[list[Emission]]:
        """Run, and yield what each pass added: nothing, where it read a piece of a long prompt."""
