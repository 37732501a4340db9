"""A job under way, what lanes share, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tokenary.core.decoding import Trace
from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.models import LM
from tokenary.serve.engine.text_stream import TextStream
from tokenary.serve.protocol import Done, Event, Job, Progress, TokenLogprob

Clock = Callable[[], float]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine shares the machine.

    Parameters
    ----------
    max_batch : int
        Jobs of one lane that are read or written together.
    max_waiting : int
        Jobs that wait for a place; one more is refused.
    max_lanes : int
        Recipes that run at a time; jobs of others wait.
    max_recipes : int
        Recipes whose methods are kept, with what they learned.
    piece : int
        Tokens of a prompt that are read between two passes of those who write.

    Raises
    ------
    OptionError
        If one is below 1.
    """

    max_batch: int = 8
    max_waiting: int = 64
    max_lanes: int = 4
    max_recipes: int = 16
    piece: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise OptionError(name, value, "an integer at least 1")


@dataclass(eq=False)
class Work:
    """A job and what became of it so far; times are those of the engine's clock.

    Parameters
    ----------
    job : Job
        What is asked.
    recipe : Recipe
        Its recipe, parsed.
    sampler : Sampler
        Its sampler; row 0 is the job.
    text : TextStream
        Its text.
    taken, begun, first : float or None
        When it was submitted, begun, and had its first token.
    trace : Trace
        Passes and drafts.
    new_tokens, kv_bytes : int
        So far; the most so far.
    logprobs : list of TokenLogprob
        Those of tokens that were not reported yet.
    """

    job: Job
    recipe: Recipe
    sampler: Sampler
    text: TextStream
    taken: float
    begun: float | None = None
    first: float | None = None
    trace: Trace = field(default_factory=Trace)
    new_tokens: int = 0
    kv_bytes: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @classmethod
    def of(cls, lm: LM, job: Job, now: float) -> Work:
        """Check a job as far as that is quick.

        Raises
        ------
        TokenaryError
            If its recipe or its sampler is none, or its prompt is none of this model's.
        """
        if not job.prompt or not all(0 <= token < lm.vocab_size for token in job.prompt):
            raise InputError(f"a prompt has at least one token, and tokens from 0 to {lm.vocab_size - 1}")
        if job.max_new_tokens < 1:
            raise OptionError("max_new_tokens", job.max_new_tokens, "an integer at least 1")
        decode = lm.decode if lm.tokenizer is not None else lambda ids: ""
        sampler = Sampler(job.temperature, job.top_k, job.top_p, job.seed, job.choice)
        return cls(job, Recipe.parse(job.recipe).for_writing(), sampler, TextStream(decode, job.stop), now)

    def progress(
        self, token_ids: list[int], from_draft: list[bool], last: bool, now: float, held: list[float] | None = None
    ) -> Progress:
        """Tell of new tokens, whose text is in the stream already."""
        self.first = now if self.first is None else self.first
        self.new_tokens += len(token_ids)
        logprobs = None if self.job.logprobs is None else self.logprobs[: len(token_ids)]
        self.logprobs = []
        return Progress(self.job.id, token_ids, from_draft, self.text.take(last), logprobs, held)

    def done(self, finish: str, now: float) -> Done:
        """Tell of the end."""
        begun, first = (now if at is None else at for at in (self.begun, self.first))
        return Done(
            id=self.job.id,
            finish=finish,
            prompt_tokens=len(self.job.prompt),
            new_tokens=self.new_tokens,
            passes=self.trace.passes,
            drafted=self.trace.drafted,
            accepted=self.trace.accepted,
            kv_bytes=self.kv_bytes,
            queued_seconds=begun - self.taken,
            first_token_seconds=first - self.taken,
            seconds=now - self.taken,
        )

    def broken_off(self, finish: str, now: float) -> list[Event]:
        """Tell of an end from outside: what was held back of the text comes with it."""
        rest = self.text.take(last=True)
        told: list[Event] = [Progress(self.job.id, [], [], rest)] if rest else []
        return [*told, self.done(finish, now)]


class Lane(Protocol):
    """Jobs of one recipe."""

    #: Jobs that were begun and have not ended.
    works: list[Work]
    #: Seconds of work that it was given, counted from those of the lanes that ran when it began.
    spent: float

    @property
    def has_room(self) -> bool:
        """Whether one more job may begin."""

    def begin(self, work: Work) -> None:
        """Begin a job.

        Raises
        ------
        TokenaryError
            If the job asks the impossible.
        """

    def step(self) -> list[Event]:
        """Run a pass of those who write, and read a piece of a prompt."""

    def drop(self, work: Work) -> None:
        """Forget a job that ended from outside."""
