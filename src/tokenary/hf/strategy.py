"""The protocol of methods that write an answer with a loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenary.core.decoding import Running
from tokenary.core.method import Method
from tokenary.core.sampling import Chooser, Sampler
from tokenary.hf.cache import LayerPolicy, LayerReader, LayerStore
from tokenary.hf.target import Target


@dataclass(frozen=True)
class Task:
    """What a strategy is asked to do.

    Parameters
    ----------
    model : PreTrainedModel
        The model; inside `attached` while the loop runs, where it is causal.
    tokenizer : PreTrainedTokenizerBase or None
        None for random nets.
    prompts : sequence of sequence of int
        Token ids.
    sampler : Sampler
        Temperature, seed and the like.
    max_new_tokens : int
        At least 1, for each sequence; an answer that joins several branches may be as long as they are together.
    end_tokens : sequence of int
        Tokens that end a sequence; they are part of it.
    stops : callable or None
        ``stops(row, ids)`` says whether a sequence, prompt and new tokens, ends.
    policies : callable or None
        Makes what each layer of a new cache keeps; None where everything is kept.
    readers : callable or None
        Makes what each layer of a new cache reads; None where everything is read.
    stores : callable or None
        Makes how each layer of a new cache stores its older tokens; None where they stay as they are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    prompts: Sequence[Sequence[int]]
    sampler: Sampler
    max_new_tokens: int
    end_tokens: Sequence[int] = ()
    stops: Callable[[int, Sequence[int]], bool] | None = None
    policies: Callable[[], Sequence[LayerPolicy | None]] | None = None
    readers: Callable[[], Sequence[LayerReader | None]] | None = None
    stores: Callable[[], Sequence[LayerStore | None]] | None = None

    def target(self) -> Target:
        """Return the model with a fresh cache."""
        return Target(
            self.model,
            None if self.policies is None else self.policies(),
            None if self.readers is None else self.readers(),
            None if self.stores is None else self.stores(),
        )


class Strategy(Method):
    """Writes the answers with a loop of its own, often with several sequences a prompt.

    With some options a strategy may leave the loop alone and only choose the tokens in it; drafts then work too.

    Attributes
    ----------
    owns_loop : bool
        Whether this instance offers `loop`; else it offers `chooser`.
    """

    owns_loop: bool = True

    def prepare(self, model: PreTrainedModel, tokenizer: Any | None) -> None:
        """Get ready for a model, once; refuse one that does not fit.

        Raises
        ------
        UnsupportedModelError
            If the method does not work with this model.
        """

    def loop(self, task: Task) -> Running:
        """Return the loop that will write the answers; nothing runs before it is iterated."""
        raise NotImplementedError

    def chooser(self, task: Task) -> Chooser:
        """Return what chooses the tokens in the ordinary loop; its rows are those of the prompts."""
        raise NotImplementedError
