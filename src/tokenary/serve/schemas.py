"""Bodies of requests: OpenAI's, as far as this server does what they say. What it does not do is refused, not ignored.

One key is Tokenary's own, ``tokenary``: see `Ours`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

PROMPTS, CHOICES, STOPS, TOP_LOGPROBS, MESSAGES = 4, 8, 4, 5, 256
_DEEPEST = 64


def _is_text(value: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no text") from None
    return value


String = Annotated[str, AfterValidator(_is_text)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[String, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """A body in which nothing is unknown, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Ours(Strict):
    """Tokenary's own wishes.

    Parameters
    ----------
    recipe : str
        Methods to write with, for example ``token-recycling:nodes=24 + keyformer:keep=50%``.
    watch : bool
        Tell in every chunk of a stream the tokens and where they came from, and what the cache holds.
    deadline : float
        Seconds for the request, if less than the server's own.
    """

    recipe: str | None = Field(default=None, max_length=512)
    watch: bool = False
    deadline: float | None = Field(default=None, gt=0, le=86_400)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A schema, and what OpenAI wants to know beside it."""

    name: str = Field(default="answer", max_length=64)
    description: str | None = Field(default=None, max_length=4096)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _shallow(cls, value: Any) -> Any:
        level = [value]
        for _ in range(_DEEPEST):
            within = [part for part in level if isinstance(part, dict | list)]
            level = [one for part in within for one in (part.values() if isinstance(part, dict) else part)]
            if not level:
                break
        else:
            raise ValueError(f"a schema may be {_DEEPEST} levels deep")
        _is_text(json.dumps(value, ensure_ascii=False))
        return value


class ResponseFormat(Strict):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to it alone")
        return self

    def text(self) -> str | None:
        """Return the schema as text; None where any text will do."""
        if self.type == "text":
            return None
        return json.dumps((self.json_schema and self.json_schema.schema_) or {"type": "object"})


class Writing(Strict):
    """What requests for chats and for completions have in common."""

    model: str | None = Field(default=None, max_length=1024, description="The model's name, and +RECIPE if you like.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31)
    n: int | None = Field(default=None, ge=1, le=CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, max_length=1024, description="Taken and forgotten.")
    frequency_penalty: float | None = Field(default=None, ge=0, le=0, description="Not supported: 0 alone.")
    presence_penalty: float | None = Field(default=None, ge=0, le=0, description="Not supported: 0 alone.")
    tokenary: Ours | None = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to a stream")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens a text."""
        return self.max_tokens

    @property
    def ours(self) -> Ours:
        """Tokenary's own wishes."""
        return self.tokenary or Ours()

    @property
    def stops(self) -> list[str]:
        """Texts that end a text."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: String


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: String | list[TextPart]
    name: str | None = Field(default=None, max_length=64)

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else []:
            if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
                raise ValueError("only text parts are taken; the server fetches and opens nothing")
        return value

    def plain(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]


class ChatRequest(Writing):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say two things")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens a text."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        """Likeliest tokens to tell beside each; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(Writing):
    """``POST /v1/completions``."""

    prompt: String | Annotated[list[String] | list[Ids], Field(min_length=1, max_length=PROMPTS)] | Ids
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS)
    echo: Literal[False] | None = Field(default=None, description="Not supported: false alone.")
    best_of: Literal[1] | None = Field(default=None, description="Not supported: 1 alone.")

    @property
    def told(self) -> int | None:
        """Likeliest tokens to tell beside each; None for no log-probabilities."""
        return self.logprobs


class TokenizeRequest(Strict):
    """``POST /v1/tokenize``: a text or a chat."""

    model: str | None = Field(default=None, max_length=1024)
    prompt: String | None = None
    messages: Messages | None = None
    return_token_strs: bool = Field(default=False, description="Tell also the text of each token.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and only one of them")
        return self


class DetokenizeRequest(Strict):
    """``POST /v1/detokenize``: token ids."""

    model: str | None = Field(default=None, max_length=1024)
    tokens: Annotated[list[Token], Field(max_length=131_072)]
