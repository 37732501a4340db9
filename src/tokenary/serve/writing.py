"""From orders to answers: hands the jobs to the worker and words what comes back, whole or as a stream."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from tokenary.serve import answers as a
from tokenary.serve.base_pool import BasePool
from tokenary.serve.errors import ApiError
from tokenary.serve.metrics import Metrics
from tokenary.serve.orders import Order
from tokenary.serve.protocol import Done, Event, Failed, Progress, TokenLogprob
from tokenary.serve.settings import Settings
from tokenary.serve.stream import Stream, joined
from tokenary.serve.text import Text

_LEAST = -9999.0  # JSON has no infinity
_LATE = 1.0  # seconds that the worker may be late with a refusal
_PIECE = "piece"
_quoted = json.JSONEncoder(ensure_ascii=False).encode


class Writer:
    """Writes what is ordered.

    Parameters
    ----------
    settings : Settings
        For how long it may be silent.
    text : Text
        Spells tokens.
    pool : BasePool
        The worker.
    metrics : Metrics
        Where texts are counted.
    """

    def __init__(self, settings: Settings, text: Text, pool: BasePool, metrics: Metrics) -> None:
        self._settings, self._text, self._pool, self._metrics = settings, text, pool, metrics

    async def whole(self, order: Order) -> a.Answer:
        """Write all texts and return the answer.

        Raises
        ------
        ApiError
            429, 503, or what the engine refuses; 504 where not one token came before the deadline.
        """
        with contextlib.closing(self._pool.submit(order.jobs)) as stream:
            texts: list[Progress] = [Progress(job.id, [], [], "", []) for job in order.jobs]
            done: dict[int, Done] = {}
            async for found in self._events(order, stream):
                if found is None:
                    continue
                number, event = found
                if isinstance(event, Progress):
                    texts[number] = joined(texts[number], event)
                elif isinstance(event, Done):
                    done[number] = event
        ended = [done[number] for number in range(len(order.jobs))]
        _check_deadline(ended)
        usage, head = _usage(order, ended), _head(order)
        if order.chat:
            chats = [
                a.ChatChoice(
                    index=number,
                    message=a.ChatMessage(role="assistant", content=text.text, refusal=None),
                    logprobs=self._chat_logprobs(text) if order.jobs[number].logprobs is not None else None,
                    finish_reason=_finish(ended[number]),
                )
                for number, text in enumerate(texts)
            ]
            return a.ChatCompletion(**head, object="chat.completion", choices=chats, usage=usage)
        choices = [
            a.TextChoice(
                index=number,
                text=text.text,
                logprobs=self._text_logprobs(text, 0) if order.jobs[number].logprobs is not None else None,
                finish_reason=_finish(ended[number]),
            )
            for number, text in enumerate(texts)
        ]
        return a.Completion(**head, object="text_completion", choices=choices, usage=usage)

    async def begin(self, order: Order) -> Stream:
        """Hand over the jobs; wait for the first word, as long as they may be refused, so that this has its own status.

        Raises
        ------
        ApiError
            429, 503, or what the engine refuses.
        """
        stream = self._pool.submit(order.jobs)
        try:
            first = await stream.peek(min(self._settings.max_wait + _LATE, self._left(order)))
            if isinstance(first, Failed):
                raise ApiError(first.status, first.message)
        except BaseException:
            stream.close()
            raise
        return stream

    async def chunks(self, order: Order, stream: Stream) -> AsyncGenerator[str, None]:
        """Word the events of a stream as server-sent events."""
        done: dict[int, Done] = {}
        offsets = [0] * len(order.jobs)
        around: dict[int, tuple[str, str]] = {}  # of the texts that have begun
        try:
            async for found in self._events(order, stream):
                if found is None:
                    yield ": still here\n\n"
                    continue
                number, event = found
                if number not in around:
                    around[number] = self._around(order, number)
                    if order.chat:
                        yield self._chunk(order, number, None, None, a.Delta(role="assistant", content=""))
                if isinstance(event, Progress):
                    if order.jobs[number].watch or event.logprobs is not None:
                        yield self._chunk(order, number, event, None, a.Delta(content=event.text), offsets[number])
                        offsets[number] += sum(len(self._text.spell(id)) for id in event.token_ids)
                    else:
                        before, after = around[number]
                        yield f"{before}{_quoted(event.text)}{after}"
                elif isinstance(event, Done):
                    done[number] = event
                    if len(done) == len(order.jobs):
                        _check_deadline(list(done.values()))
                    yield self._chunk(order, number, None, _finish(event), a.Delta())
            if order.usage:
                yield self._last(order, _usage(order, [done[number] for number in sorted(done)]))
        except ApiError as error:
            detail = a.ErrorBody.model_validate(error.body())
            yield f"data: {detail.json_text()}\n\n"
        yield "data: [DONE]\n\n"

    async def _events(self, order: Order, stream: Stream) -> AsyncIterator[tuple[int, Event] | None]:
        """Give the events until all jobs have ended; None where nothing came for a while."""
        while not stream.ended:
            left = self._left(order)
            if left <= 0:
                raise ApiError(504, "the deadline has passed")
            found = await stream.next(min(self._settings.silence, left))
            if found is not None and isinstance(found[1], Failed):
                raise ApiError(found[1].status, found[1].message)
            if found is not None and isinstance(found[1], Done):
                self._metrics.done(found[1])
            yield found

    def _left(self, order: Order) -> float:
        """Seconds until an order is given up without the worker's word."""
        return order.ends + self._settings.grace - time.monotonic()

    def _chunk(
        self,
        order: Order,
        number: int,
        event: Progress | None,
        finish: a.Finish | None,
        delta: a.Delta,
        offset: int = 0,
    ) -> str:
        """Word a piece of a text."""
        more: dict[str, Any] = {"usage": None} if order.usage else {}
        if event is not None and order.jobs[number].watch:
            more["tokenary"] = self._shown(event)
        told = event if event is not None and event.logprobs is not None else None
        if order.chat:
            logprobs = None if told is None else self._chat_logprobs(told)
            choice = a.ChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=finish)
            chunk: a.Answer = a.ChatChunk(**_head(order), object="chat.completion.chunk", choices=[choice], **more)
        else:
            text = "" if event is None else event.text
            logs = None if told is None else self._text_logprobs(told, offset)
            one = a.TextChoice(index=number, text=text, logprobs=logs, finish_reason=finish)
            chunk = a.Completion(**_head(order), object="text_completion", choices=[one], **more)
        return f"data: {chunk.json_text()}\n\n"

    def _around(self, order: Order, number: int) -> tuple[str, str]:
        """Return what stands before and after a piece of a text, in all chunks that tell nothing else."""
        chunk = self._chunk(order, number, Progress("", [], [], _PIECE), None, a.Delta(content=_PIECE))
        before, _, after = chunk.rpartition(_quoted(_PIECE))  # a recipe in the head may hold anything
        return before, after

    def _last(self, order: Order, usage: a.Usage) -> str:
        """Word what a stream cost."""
        if order.chat:
            last: a.Answer = a.ChatChunk(**_head(order), object="chat.completion.chunk", choices=[], usage=usage)
        else:
            last = a.Completion(**_head(order), object="text_completion", choices=[], usage=usage)
        return f"data: {last.json_text()}\n\n"

    def _shown(self, event: Progress) -> a.Shown:
        tokens = [
            a.ShownToken(id=id, text=self._text.spell(id), origin="draft" if drafted else "target")
            for id, drafted in zip(event.token_ids, event.from_draft, strict=True)
        ]
        return a.Shown(tokens=tokens, held=event.held)

    def _chat_logprobs(self, event: Progress) -> a.ChatLogprobs:
        content = []
        for id, one in zip(event.token_ids, event.logprobs or [], strict=True):
            top = [self._top_logprob(other, value) for other, value in one.top]
            content.append(self._logprob(id, one.logprob, top))
        return a.ChatLogprobs(content=content, refusal=None)

    def _logprob(self, id: int, value: float, top: list[a.TopLogprob]) -> a.TokenLogprob:
        return a.TokenLogprob(**self._top_logprob(id, value).model_dump(), top_logprobs=top)

    def _top_logprob(self, id: int, value: float) -> a.TopLogprob:
        data = list(self._text.spelling(id))
        return a.TopLogprob(token=self._text.spell(id), logprob=max(value, _LEAST), bytes=data)

    def _text_logprobs(self, event: Progress, offset: int) -> a.TextLogprobs:
        told: list[TokenLogprob] = event.logprobs or []
        tokens = [self._text.spell(id) for id in event.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        top = [{self._text.spell(id): max(value, _LEAST) for id, value in reversed(one.top)} for one in told]
        return a.TextLogprobs(
            tokens=tokens,
            token_logprobs=[max(one.logprob, _LEAST) for one in told],
            top_logprobs=top if any(top) else None,
            text_offset=offsets,
        )


def _head(order: Order) -> dict[str, Any]:
    """Return what stands in every answer."""
    fingerprint = order.info.fingerprint[:12]
    return {"id": order.id, "created": order.created, "model": order.model, "system_fingerprint": fingerprint}


def _finish(event: Done) -> a.Finish:
    """Return why a text ended, in OpenAI's words: a text that was cut short is of length."""
    return "stop" if event.finish == "stop" else "length"


def _check_deadline(ended: list[Done]) -> None:
    """Raise where the deadline left nothing to give."""
    if all(event.finish == "deadline" and not event.new_tokens for event in ended):
        raise ApiError(504, "the deadline passed before the first token")


def _usage(order: Order, ended: list[Done]) -> a.Usage:
    """Add up what an order cost; a prompt counts once, however many texts were written for it."""
    prompt = sum(len(job.prompt) for job in order.jobs[:: order.choices])
    new, passes = sum(event.new_tokens for event in ended), sum(event.passes for event in ended)
    after = sum(max(0, event.new_tokens - 1) for event in ended)
    costs = a.Costs(
        recipe=str(order.recipe),
        lossless=order.recipe.lossless,
        seed=order.jobs[0].seed,
        finish=[event.finish for event in ended],
        passes=passes,
        tokens_per_pass=after / passes if passes else 1.0,
        drafted=sum(event.drafted for event in ended),
        accepted=sum(event.accepted for event in ended),
        kv_bytes=sum(event.kv_bytes for event in ended),
        queued_seconds=max(event.queued_seconds for event in ended),
        first_token_seconds=max(event.first_token_seconds for event in ended),
        seconds=max(event.seconds for event in ended),
    )
    return a.Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, tokenary=costs)
