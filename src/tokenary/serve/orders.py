"""From a checked body to jobs: which model, which recipe, how long, and the prompts as token ids."""

from __future__ import annotations

import importlib.util
import math
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tokenary.core.recipe import Recipe
from tokenary.serve import recipes
from tokenary.serve.base_pool import BasePool
from tokenary.serve.errors import ApiError
from tokenary.serve.protocol import Job
from tokenary.serve.schemas import ChatRequest, CompletionRequest, Writing
from tokenary.serve.settings import Settings
from tokenary.serve.text import Text
from tokenary.serve.worker import Ready

#: The header that does what ``tokenary.deadline`` does.
DEADLINE = "x-tokenary-deadline"


@dataclass(frozen=True)
class Order:
    """A request that can be done.

    Parameters
    ----------
    id, created, model : str, int, str
        As the answer says them.
    info : Ready
        Of the model.
    chat : bool
        A chat, or a completion.
    jobs : list of Job
        One a text, the texts of a prompt together.
    choices : int
        Texts a prompt.
    recipe : Recipe
        What it is written with.
    ends : float
        When it is to be over, as `time.monotonic` counts.
    usage : bool
        Tell at the end of a stream what it cost.
    """

    id: str
    created: int
    model: str
    info: Ready
    chat: bool
    jobs: list[Job]
    choices: int
    recipe: Recipe
    ends: float
    usage: bool


class Desk:
    """Takes orders.

    Parameters
    ----------
    settings : Settings
        Its limits and the model's name.
    text : Text
        The tokenizer.
    pool : BasePool
        Knows the model.
    """

    def __init__(self, settings: Settings, text: Text, pool: BasePool) -> None:
        self._settings, self._text, self._pool = settings, text, pool
        self.name = settings.served_name

    async def chat(self, body: ChatRequest, header: str | None) -> Order:
        """Take an order for a chat.

        Raises
        ------
        ApiError
            Whatever is wrong with it, before any work is done.
        """
        ends, recipe = await self._begin(body, header)
        ids = await self._text.encode_chat([message.plain() for message in body.messages])
        return self._order(body, recipe, [ids], ends)

    async def completion(self, body: CompletionRequest, header: str | None) -> Order:
        """Take an order for completions; raises as `chat` does."""
        ends, recipe = await self._begin(body, header)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if isinstance(prompts[0], str):
            ids = await self._text.encode([str(prompt) for prompt in prompts])
        else:
            ids = [list(row) for row in ([prompts] if isinstance(prompts[0], int) else prompts)]
        return self._order(body, recipe, ids, ends)

    @property
    def info(self) -> Ready:
        """Of the model, once it was loaded."""
        if self._pool.info is None:
            raise ApiError(503, "the model is still being loaded")
        return self._pool.info

    def recipe_of(self, model: str | None) -> str | None:
        """Return the recipe that stands in a model's name; None where none does.

        Raises
        ------
        ApiError
            404 for another model.
        """
        if model is None or model == self.name:
            return None
        if not model.startswith(f"{self.name}+"):
            raise ApiError(
                404, f"this server has the model {self.name}, also as {self.name}+RECIPE", "model", "model_not_found"
            )
        return model[len(self.name) + 1 :]

    async def _begin(self, body: Writing, header: str | None) -> tuple[float, Recipe]:
        """Set the clock, and read the recipe."""
        ends = time.monotonic() + self._seconds(body.ours.deadline, header)
        named, asked = self.recipe_of(body.model), body.ours.recipe
        kind = self.info.kind
        recipe = await self._text.run(recipes.parse, named or asked or "", kind)
        if named and asked and await self._text.run(recipes.parse, asked, kind) != recipe:
            raise ApiError(422, "model and tokenary.recipe name two recipes", "tokenary.recipe")
        return ends, recipe

    def _seconds(self, asked: float | None, header: str | None) -> float:
        """Return the shortest of all deadlines."""
        wishes = [self._settings.deadline] + ([] if asked is None else [asked])
        if header is not None:
            try:
                wishes.append(float(header))
            except ValueError:
                wishes.append(math.nan)
            if not wishes[-1] > 0:
                raise ApiError(422, f"{DEADLINE}: a number of seconds above 0", DEADLINE)
        return min(wishes)

    def _order(
        self, body: ChatRequest | CompletionRequest, recipe: Recipe, rows: Sequence[list[int]], ends: float
    ) -> Order:
        """Make the jobs."""
        info, chat = self.info, isinstance(body, ChatRequest)
        param = "messages" if chat else "prompt"
        schema = self._schema(body, recipe)
        id, seed = uuid.uuid4().hex, secrets.randbits(31) if body.seed is None else body.seed
        choices = body.n or 1
        jobs: list[Job] = []
        for at, ids in enumerate(rows):
            most = self._most(ids, body.limit, info, param)
            for choice in range(at * choices, (at + 1) * choices):
                job = Job(
                    id=f"{id}-{choice}",
                    prompt=ids,
                    recipe=str(recipe) if recipe.steps else "",
                    max_new_tokens=most,
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_k=body.top_k or 0,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=seed,
                    choice=choice,
                    stop=body.stops,
                    logprobs=body.told,
                    schema=schema,
                    watch=body.ours.watch,
                    seconds=max(0.001, ends - time.monotonic()),
                    wait=None if jobs else self._settings.max_wait,  # the first is begun first
                )
                jobs.append(job)
        return Order(
            id=f"chatcmpl-{id}" if chat else f"cmpl-{id}",
            created=int(time.time()),
            model=body.model or self.name,
            info=info,
            chat=chat,
            jobs=jobs,
            choices=choices,
            recipe=recipe,
            ends=ends,
            usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    def _most(self, ids: list[int], limit: int | None, info: Ready, param: str) -> int:
        """Return how many tokens may be written after a prompt."""
        if not ids:
            raise ApiError(422, "the prompt is empty", param)
        if max(ids) >= info.vocab_size:
            raise ApiError(422, f"token ids go up to {info.vocab_size - 1}", param)
        left = info.context_length - len(ids)
        if left < (limit or 1):
            more = f" and {limit} to write" if limit else ""
            message = f"the prompt has {len(ids)} tokens{more}; the model's context has {info.context_length}"
            raise ApiError(400, message, param, "context_length_exceeded")
        return limit or min(left, self._settings.max_new_tokens)

    def _schema(self, body: Writing, recipe: Recipe) -> str | None:
        """Return the JSON schema of the text, if there is one."""
        schema = None if body.response_format is None else body.response_format.text()
        if schema is None:
            return None
        if len(schema) > self._settings.max_schema_bytes:
            raise ApiError(422, f"a schema may have {self._settings.max_schema_bytes} bytes", "response_format")
        if any(step.card.slot in ("choose", "strategy") for step in recipe.steps):
            raise ApiError(422, "the recipe chooses the tokens already; response_format would too", "response_format")
        if importlib.util.find_spec("llguidance") is None:
            raise ApiError(422, "the server was installed without the extra tokenary[constrain]", "response_format")
        return schema
