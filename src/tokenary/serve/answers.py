"""Bodies of answers: OpenAI's, with a key ``tokenary`` where there is more to say. A key that is not set is not sent.

A chunk of a watched stream (``"tokenary": {"watch": true}``) holds what one pass of the model brought::

    {"id": "...", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": " the"}, ...}],
     "tokenary": {"tokens": [{"id": 260, "text": " the", "origin": "draft" or "target"}, ...],
                  "held": [1.0, 0.5, ...] or null}}

``origin`` is ``draft`` for a token that was drafted and accepted. ``held`` has an entry for each position so far,
prompt and text: the share of all layers and key heads that still hold it. The usage (in a whole answer, or asked for by
``stream_options.include_usage``) holds `Costs` as ``usage.tokenary``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(protected_namespaces=())

    def json_text(self) -> str:
        """Return it as JSON; what was not set is not there."""
        return self.model_dump_json(exclude_unset=True)


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """An answer that refuses."""

    error: ErrorDetail


class Costs(Answer):
    """What a request cost; sums over its texts, and the longest of their times.

    Parameters
    ----------
    recipe : str
        Canonical text.
    lossless : bool
        Whether the text is what plain decoding would write, token for token or in distribution.
    seed : int
        Of sampling: sent again, it gives the same text.
    finish : list of str
        For each text ``stop``, ``length``, ``deadline`` or ``cancelled``.
    passes : int
        Passes after the prompt's.
    tokens_per_pass : float
        Tokens that each of them brought.
    drafted, accepted : int
        Tokens.
    kv_bytes : int
        Most bytes of keys and values that were held.
    queued_seconds, first_token_seconds, seconds : float
        Until the work began, until the first token, and in all.
    """

    recipe: str
    lossless: bool
    seed: int
    finish: list[str]
    passes: int
    tokens_per_pass: float
    drafted: int
    accepted: int
    kv_bytes: int
    queued_seconds: float
    first_token_seconds: float
    seconds: float


class Usage(Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    tokenary: Costs


class TopLogprob(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a chat, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Of a chat's choice."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Answer):
    """Of a completion's choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatMessage(Answer):
    """What was written."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Delta(Answer):
    """What came new."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


Finish = Literal["stop", "length"]


class ChatChoice(Answer):
    """A text."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChunkChoice(Answer):
    """A piece of a text."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class TextChoice(Answer):
    """A text, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class ShownToken(Answer):
    """A token of a watched stream."""

    id: int
    text: str
    origin: Literal["draft", "target"]


class Shown(Answer):
    """What a pass brought."""

    tokens: list[ShownToken]
    held: list[float] | None


class Head(Answer):
    """What stands in every answer that holds text."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    """A whole chat answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    """A piece of one."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None
    tokenary: Shown | None = None


class Completion(Head):
    """A whole completion, or a piece of one."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None
    tokenary: Shown | None = None


class Model(Answer):
    """A model, or a model with a recipe."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tokenary"] = "tokenary"


class ModelList(Answer):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class MethodList(Answer):
    """Cards of the methods; see `recipes`."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Tokens(Answer):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    """The text of token ids."""

    prompt: str


class Health(Answer):
    """Whether the server can write."""

    status: str = Field(description="ok, loading, dead (the worker is started again), or draining")
