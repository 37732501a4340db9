"""What the HTTP process and the worker process tell each other: plain values, in lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One text to write.

    Parameters
    ----------
    id : str
        Of this job alone; a request for several texts is several jobs.
    prompt : list of int
        Token ids, at least one.
    recipe : str
        Canonical text of the recipe; empty for plain decoding. Jobs of one recipe share a lane.
    max_new_tokens : int
        At least 1.
    temperature, top_k, top_p, seed : float, int, float, int
        As `core.sampling.Sampler` takes them.
    choice : int
        Which of several texts for one request; it names the random numbers.
    stop : list of str
        Texts that end it; they are no part of it.
    logprobs : int or None
        How many of the likeliest tokens to tell beside each token, 0 for its own probability alone; None for nothing.
    schema : str or None
        JSON schema that the text must keep.
    watch : bool
        Tell also which positions are still held.
    seconds : float
        The job is given up so long after it was taken.
    wait : float or None
        It is refused where it was not begun so long after it was taken; None where it may wait all its time.
    """

    id: str
    prompt: list[int]
    recipe: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    schema: str | None = None
    watch: bool = False
    seconds: float = 60.0
    wait: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, in nats, and of the likeliest ones in its place.

    Parameters
    ----------
    logprob : float
        Under the model's own distribution, before temperature and truncation.
    top : list of (int, float)
        Token ids and their log-probabilities, the likeliest first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Progress:
    """Tokens that one pass added to a job.

    Parameters
    ----------
    id : str
        The job.
    token_ids : list of int
        New tokens.
    from_draft : list of bool
        Which of them were accepted from a draft.
    text : str
        New text as far as it is settled: whole characters, and nothing that may begin a stop text. The texts of a job
        joined are its text.
    logprobs : list of TokenLogprob or None
        For each new token, where the job asks for them.
    held : list of float or None
        For each position so far, the share of all layers and key heads that still hold it, where the job watches.
    """

    id: str
    token_ids: list[int]
    from_draft: list[bool]
    text: str
    logprobs: list[TokenLogprob] | None = None
    held: list[float] | None = None


@dataclass(frozen=True)
class Done:
    """A job ended; nothing follows.

    Parameters
    ----------
    id : str
        The job.
    finish : str
        ``stop``, ``length``, ``cancelled`` or ``deadline``.
    prompt_tokens, new_tokens : int
        Of the job.
    passes, drafted, accepted : int
        Passes after the prompt's, tokens drafted and accepted in them.
    kv_bytes : int
        Most bytes of keys, values and bookkeeping that were held for it: of a batch, its share by tokens held.
    queued_seconds, first_token_seconds, seconds : float
        Until it was begun, until its first token, and in all; since it was taken.
    """

    id: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    passes: int
    drafted: int
    accepted: int
    kv_bytes: int
    queued_seconds: float
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A job could not be done; nothing follows.

    Parameters
    ----------
    id : str
        The job.
    status : int
        HTTP status: 422 for a job that asks the impossible, 429 for a full queue, 500 for a defect, 503 for a worker
        that died.
    message : str
        For the client; holds nothing of the prompt.
    """

    id: str
    status: int
    message: str


Event = Progress | Done | Failed

_EVENTS: dict[str, type[Progress] | type[Done] | type[Failed]] = {
    "progress": Progress,
    "done": Done,
    "failed": Failed,
}
_NAMES = {kind: name for name, kind in _EVENTS.items()}


def pack(events: Iterable[Event]) -> bytes:
    """Return the events of a step as a line of JSON."""
    return json.dumps([[_NAMES[type(event)], vars(event)] for event in events], default=vars).encode() + b"\n"


def unpack(given: Iterable[tuple[str, dict[str, Any]]]) -> list[Event]:
    """Return the events of a line that was read."""
    return [_EVENTS[name](**_restored(values)) for name, values in given]


def _restored(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("logprobs") is not None:
        values["logprobs"] = [
            TokenLogprob(one["logprob"], [(token, value) for token, value in one["top"]]) for one in values["logprobs"]
        ]
    return values
