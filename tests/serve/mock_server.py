"""A double of the server for the playground's tests: fixed texts, real shapes, no model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tokenary.serve.schemas import ChatRequest, CompletionRequest, TokenizeRequest

PLAYGROUND = Path(__file__).parents[2] / "src/tokenary/serve/playground"
TEXT = "The river bends twice before it meets the sea , and each bend keeps a little of the light .\n"
WORDS = TEXT.split(" ")


def _card(
    slug: str, slot: str, lossless: bool, options: dict[str, Any], refuses: Any = (), **more: Any
) -> dict[str, Any]:
    summary = {"draft": "drafts from what earlier passes threw away", "keep": "keeps half of the cache"}.get(
        slot, "reads"
    )
    card = {"slug": slug, "slot": slot, "room": "decode", "title": slug, "summary": summary, "lossless": lossless}
    properties = {"options": {"properties": options}}
    return {
        **card,
        "paper": "",
        "year": 0,
        "refuses": list(refuses),
        "requires": [],
        "baseline": False,
        **properties,
        **more,
    }


WHY = "its index holds every token, and takes a token's place in the cache for its position"
NODES = {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": 80}, {"const": "auto", "type": "string"}],
    "default": "auto",
}
KEEP = {
    "type": "string",
    "default": "60%",
    "description": "a share (50% or 0.5), a number of tokens (256) or a size (64MB)",
}
CARDS = [
    _card(
        "token-recycling",
        "draft",
        True,
        {
            "nodes": NODES,
            "tree": {"enum": ["grown", "published"], "default": "grown"},
            "prompt": {"type": "boolean", "default": True},
        },
        paper="2408.08696",
        year=2025,
    ),
    _card("prompt-lookup", "draft", True, {"ngram": {"type": "integer", "minimum": 1, "maximum": 16, "default": 3}}),
    _card(
        "keyformer",
        "keep",
        False,
        {"keep": KEEP, "recent": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.3}},
    ),
    _card("hisa", "read", False, {}, [("keep", WHY)]),
]


class Double:
    """What the double was asked, and what it did."""

    def __init__(self, key: str = "", pause: float = 0.004) -> None:
        self.key, self.pause = key, pause
        self.asked: list[dict[str, Any]] = []
        self.broken_off = 0
        self.paths: list[str] = []

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/tokenary/methods", self.methods),
            Route("/v1/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/completions", self.write, methods=["POST"]),
            Route("/v1/chat/completions", self.write, methods=["POST"]),
            Mount("/", StaticFiles(directory=PLAYGROUND, html=True)),
        ]
        return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=self.guard)])

    async def guard(self, request: Request, call_next: Any) -> Response:
        self.paths.append(request.url.path)
        wanted = self.key and request.url.path.startswith("/v1/")
        if wanted and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "This server asks for an API key.")
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = (
            "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return answer

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "smollm2", "object": "model"}]})

    async def methods(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": CARDS})

    async def tokenize(self, request: Request) -> Response:
        TokenizeRequest.model_validate_json(await request.body())
        words = _prompt(await request.json())
        ids = [_id(word) for word in words]
        return JSONResponse({"count": len(ids), "max_model_len": 8192, "tokens": ids, "token_strs": words})

    async def write(self, request: Request) -> Response:
        chat = "chat" in request.url.path
        (ChatRequest if chat else CompletionRequest).model_validate_json(await request.body())
        body = await request.json()
        self.asked.append(body)
        recipe = body["tokenary"].get("recipe", "")
        if "hisa" in recipe and "keyformer" in recipe:
            return _error(422, f"hisa and keyformer do not compose: {WHY}")
        return StreamingResponse(self.chunks(body, chat), media_type="text/event-stream")

    async def chunks(self, body: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        ours, size, begun = body["tokenary"], body["max_tokens"], time.perf_counter()
        recipe = ours.get("recipe", "")
        wide, keep = "token-recycling" in recipe or "prompt-lookup" in recipe, "keyformer" in recipe
        words = [WORDS[at % len(WORDS)] if at == 0 else f" {WORDS[at % len(WORDS)]}" for at in range(size)]
        if keep and size > 12:
            words[12] = " dunes"
        prompt, done, passes = len(_prompt(body)), 0, 0
        try:
            while done < size:
                width = 1 + (passes * 7 % 4 if wide and passes else 0)
                new = words[done : done + width]
                done, passes = done + len(new), passes + 1
                tokens = [
                    {"id": _id(word), "text": word, "origin": "draft" if at < len(new) - 1 else "target"}
                    for at, word in enumerate(new)
                ]
                held = [_share(at, prompt + done) if keep else 1.0 for at in range(prompt + done - 1)]
                text = "".join(new)
                choice = {**_choice(chat, text), "finish_reason": None, **_logprobs(chat, body, new)}
                watched = {"tokenary": {"tokens": tokens, "held": held}} if ours["watch"] else {}
                yield _data({**_head(chat), "choices": [choice], "usage": None, **watched})
                await asyncio.sleep(self.pause)
        except (asyncio.CancelledError, GeneratorExit):
            self.broken_off += 1
            raise
        yield _data({**_head(chat), "choices": [{**_choice(chat, ""), "finish_reason": "length"}], "usage": None})
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": done,
            "total_tokens": prompt + done,
            "tokenary": {
                "recipe": recipe or "plain",
                "lossless": not keep,
                "seed": body["seed"],
                "finish": ["length"],
                "passes": passes - 1,
                "tokens_per_pass": (done - 1) / max(passes - 1, 1),
                "drafted": 4 * passes if wide else 0,
                "accepted": done - passes,
                "kv_bytes": 46080 * (prompt + done) // (2 if keep else 1),
                "queued_seconds": 0.0,
                "first_token_seconds": 0.01,
                "seconds": time.perf_counter() - begun,
            },
        }
        yield _data({**_head(chat), "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _prompt(body: dict[str, Any]) -> list[str]:
    text = body.get("prompt") or "\n".join(f"<|{one['role']}|> {one['content']}" for one in body["messages"])
    words = text.split(" ")
    return [word if at == 0 else f" {word}" for at, word in enumerate(words)]


def _head(chat: bool) -> dict[str, Any]:
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "double", "created": 0, "model": "smollm2", "system_fingerprint": "double", "object": kind}


def _choice(chat: bool, text: str) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, **({"delta": {"content": text}} if chat else {"text": text})}


def _logprobs(chat: bool, body: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Each word has half of the mass, and others less and less."""
    if body.get("logprobs") is None or body["logprobs"] is False:
        return {}
    many = body.get("top_logprobs", 0) if chat else body["logprobs"]
    top = [[word, *(f"other{n}" for n in range(1, many))][:many] for word in words]
    halves = [-0.6931471805599453 * (n + 1) for n in range(many)]
    if not chat:
        listed = [dict(zip(reversed(one), reversed(halves), strict=True)) for one in top]
        told = {"tokens": words, "token_logprobs": [-0.6931471805599453] * len(words), "text_offset": [0] * len(words)}
        return {"logprobs": {**told, "top_logprobs": listed if many else None}}
    content = [
        {
            "token": word,
            "logprob": -0.6931471805599453,
            "bytes": [],
            "top_logprobs": [
                {"token": other, "logprob": half, "bytes": []} for other, half in zip(one, halves, strict=True)
            ],
        }
        for word, one in zip(words, top, strict=True)
    ]
    return {"logprobs": {"content": content, "refusal": None}}


def _id(word: str) -> int:
    return sum(ord(sign) * 31**at for at, sign in enumerate(word)) % 49152


def _share(at: int, length: int) -> float:
    """Old positions fade: some heads hold them, others do not."""
    return 1.0 if at > length - 10 or at < 2 else [0.0, 0.25, 0.6, 1.0][at * 5 % 4]


def _data(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(status: int, message: str) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_value"}
    return JSONResponse({"error": body}, status)


@contextlib.contextmanager
def running(double: Double) -> Iterator[str]:
    """Serve a double on a free port; gives the address of the playground."""
    server = uvicorn.Server(uvicorn.Config(double.app(), port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(5)
