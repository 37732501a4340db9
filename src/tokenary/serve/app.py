"""The HTTP application: routes, and what they need, behind the limits.

Routes::

    GET  /health                 200 while the server can write, else 503; asks for no key
    GET  /metrics                figures for Prometheus
    GET  /v1/models              the model, and the model with each method
    GET  /v1/models/{model}      one of them, with any recipe
    GET  /v1/tokenary/methods    cards of the methods; see `recipes`
    POST /v1/chat/completions    write an answer; whole, or as a stream; see `schemas` and `answers`
    POST /v1/completions         continue a text
    POST /v1/tokenize            text or chat to token ids
    POST /v1/detokenize          token ids to text
    GET  /                       the playground: the files of `playground`, for anyone
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from tokenary import __version__, models
from tokenary.core.errors import TokenaryError
from tokenary.serve import answers as a
from tokenary.serve import recipes
from tokenary.serve.base_pool import BasePool
from tokenary.serve.errors import ApiError, http_error, invalid, refused
from tokenary.serve.events import ClientGone, Events, unless_gone
from tokenary.serve.limits import Gate
from tokenary.serve.metrics import Metrics
from tokenary.serve.orders import DEADLINE, Desk, Order
from tokenary.serve.pages import add_playground
from tokenary.serve.pool import Pool
from tokenary.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tokenary.serve.settings import Settings
from tokenary.serve.text import Text
from tokenary.serve.writing import Writer

Deadline = Annotated[str | None, Header(alias=DEADLINE, description="Seconds, if less than the server's own.")]

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": a.ErrorBody, "description": words}
    for status, words in {
        400: "Past the model's context",
        401: "No key, or a wrong one",
        403: "From another site",
        404: "No such model",
        408: "The body did not come",
        413: "Too large",
        415: "Not JSON",
        422: "Not what the route takes, or a recipe that the cards refuse",
        429: "Too much at a time",
        500: "A defect of the server",
        503: "Not ready, or shutting down",
        504: "The deadline passed",
    }.items()
}


class Service:
    """An application and what it needs.

    Parameters
    ----------
    settings : Settings
        Limits, names, and the engine.
    pool : BasePool, optional
        The worker.
    text : Text, optional
        The tokenizer.

    Attributes
    ----------
    app : FastAPI
        The routes alone.
    gate : Gate
        The whole: the routes behind the limits.
    failed : Future
        Why the server can never answer; made when it starts.
    """

    def __init__(self, settings: Settings, pool: BasePool | None = None, text: Text | None = None) -> None:
        self.settings = settings
        self.pool: BasePool = pool or Pool(settings)
        self.text = text or Text(lambda: models.load_tokenizer(settings.model), settings.max_prompt_bytes)
        self.metrics = Metrics(self.pool)
        self.desk = Desk(settings, self.text, self.pool)
        self.writer = Writer(settings, self.text, self.pool, self.metrics)
        self.began = int(time.time())
        self.app = FastAPI(
            title="Tokenary", version=__version__, docs_url=None, redoc_url=None, lifespan=lambda _: self._running()
        )
        for kind, handler in (
            (ApiError, refused), (RequestValidationError, invalid), (HTTPException, http_error), (ClientGone, _gone),
            (Exception, _defect),
        ):  # fmt: skip
            self.app.add_exception_handler(kind, handler)
        files = add_playground(self.app) if settings.playground else frozenset()
        _add_routes(self)
        self.gate = Gate(self.app, settings, self.metrics, files)

    @property
    def status(self) -> str:
        """What ``/health`` says."""
        if self.gate.draining:
            return "draining"
        if self.pool.state == "ready":
            return "ok" if self.text.ready else "loading"
        return self.pool.state

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """Run the worker and load the tokenizer while the application runs."""
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self.pool.start()
        loading = asyncio.create_task(self._load())
        self.pool.refused.add_done_callback(lambda refused: self._fail(refused.result()))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.wait([loading])
            await self.pool.stop()
            self.text.stop()

    async def _load(self) -> None:
        try:
            await self.text.run(recipes.methods, "causal")  # imports the methods, so that no request waits for it
            await self.text.start()
        except TokenaryError as error:
            self._fail(str(error))

    def _fail(self, message: str) -> None:
        if not self.failed.done():
            self.failed.set_result(message)


def create_app(settings: Settings, pool: BasePool | None = None, text: Text | None = None) -> Gate:
    """Return the ASGI application: the routes behind the limits.

    Parameters
    ----------
    settings : Settings
        Limits, names, and the engine.
    pool, text : BasePool, Text, optional
        The worker and the tokenizer; by default those that the settings name.
    """
    return Service(settings, pool, text).gate


def _add_routes(service: Service) -> None:
    """Add all routes but the playground's."""
    app, desk, writer, text = service.app, service.desk, service.writer, service.text

    @app.get("/health", responses={200: {"model": a.Health}, 503: {"model": a.Health}})
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        return _json(a.Health(status=service.status), 200 if service.status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: _REFUSALS[401]})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses={200: {"model": a.ModelList}, **_only(401, 403, 429, 503)})
    async def models() -> Response:
        methods = await text.run(recipes.methods, desk.info.kind)
        names = [desk.name, *(f"{desk.name}+{method['slug']}" for method in methods)]
        return _json(a.ModelList(object="list", data=[_model(name, service.began) for name in names]))

    @app.get("/v1/models/{model:path}", responses={200: {"model": a.Model}, **_only(401, 403, 404, 422, 429, 503)})
    async def model(model: str) -> Response:
        await text.run(recipes.parse, desk.recipe_of(model) or "", desk.info.kind)
        return _json(_model(model, service.began))

    @app.get("/v1/tokenary/methods", responses={200: {"model": a.MethodList}, **_only(401, 403, 429, 503)})
    async def methods() -> Response:
        return _json(a.MethodList(object="list", data=await text.run(recipes.methods, desk.info.kind)))

    async def write(request: Request, streams: bool | None, ordering: Awaitable[Order]) -> Response:
        async def work() -> Response:
            order = await ordering
            if not streams:
                return _json(await writer.whole(order))
            stream = await writer.begin(order)
            return Events(writer.chunks(order, stream), stream)

        return await unless_gone(request, work())

    streamed: dict[str, Any] = {"text/event-stream": {}}

    @app.post("/v1/chat/completions", responses={200: {"model": a.ChatCompletion, "content": streamed}, **_REFUSALS})
    async def chat(request: Request, body: ChatRequest, deadline: Deadline = None) -> Response:
        return await write(request, body.stream, desk.chat(body, deadline))

    @app.post("/v1/completions", responses={200: {"model": a.Completion, "content": streamed}, **_REFUSALS})
    async def completions(request: Request, body: CompletionRequest, deadline: Deadline = None) -> Response:
        return await write(request, body.stream, desk.completion(body, deadline))

    @app.post("/v1/tokenize", responses={200: {"model": a.Tokens}, **_REFUSALS})
    async def tokenize(body: TokenizeRequest) -> Response:
        desk.recipe_of(body.model)
        length = desk.info.context_length
        if body.messages is not None:
            ids = await text.encode_chat([message.plain() for message in body.messages])
        else:
            ids = (await text.encode([body.prompt or ""]))[0]
        strings = [text.spell(id) for id in ids] if body.return_token_strs else None
        return _json(a.Tokens(count=len(ids), max_model_len=length, tokens=ids, token_strs=strings))

    @app.post("/v1/detokenize", responses={200: {"model": a.Detokenized}, **_REFUSALS})
    async def detokenize(body: DetokenizeRequest) -> Response:
        desk.recipe_of(body.model)
        if max(body.tokens, default=0) >= desk.info.vocab_size:
            raise ApiError(422, f"token ids go up to {desk.info.vocab_size - 1}", "tokens")
        return _json(a.Detokenized(prompt=await text.decode(body.tokens)))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _defect(request: Request, error: Exception) -> Response:
    return ApiError(500, f"a defect of the server: {type(error).__name__}").response()


def _json(answer: a.Answer, status: int = 200) -> Response:
    return Response(answer.json_text(), status, media_type="application/json")


def _model(name: str, created: int) -> a.Model:
    return a.Model(id=name, object="model", created=created, owned_by="tokenary")


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _REFUSALS[status] for status in statuses}
