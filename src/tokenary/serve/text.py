"""The HTTP process's tokenizer: texts to ids and back, in a thread of its own, under a cap of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tokenary.serve.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Text:
    """A tokenizer off the event loop.

    One thread, since a tokenizer is not to be used by two at a time; who waits for it holds a place among the requests
    in flight, which bounds its queue.

    Parameters
    ----------
    load : callable
        Returns the tokenizer.
    max_bytes : int
        Most bytes of text of one request.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase | None], max_bytes: int) -> None:
        self._load, self._max_bytes = load, max_bytes
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._tokenizer: Any = None
        self._spellings: list[bytes] = []
        self._special: dict[int, str] = {}
        self.ready = False

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run something in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def start(self) -> None:
        """Load the tokenizer."""
        await self.run(self._start)

    def stop(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        from tokenary.hf.tokenizer import Vocabulary

        self._tokenizer = self._load()
        if self._tokenizer is not None:
            vocabulary = Vocabulary(self._tokenizer.backend_tokenizer)
            self._spellings, self._special = vocabulary.spellings, vocabulary.special
        self.ready = True

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, once it is there.

        Raises
        ------
        ApiError
            503 before, 422 where the model has none.
        """
        if not self.ready:
            raise ApiError(503, "the tokenizer is still being loaded")
        if self._tokenizer is None:
            raise ApiError(422, "the model has no tokenizer: give token ids", "prompt")
        return self._tokenizer

    def check(self, texts: Sequence[str], param: str) -> None:
        """Refuse more text than a request may have, before it costs anything."""
        total = sum(len(text.encode("utf-8", "replace")) for text in texts)
        if total > self._max_bytes:
            raise ApiError(413, f"{total} bytes of text; a request may have {self._max_bytes}", param)

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into token ids, without a chat template."""
        tokenizer: Any = self.tokenizer
        self.check(texts, "prompt")
        return await self.run(lambda: [list(tokenizer(text, verbose=False)["input_ids"]) for text in texts])

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Turn a chat into token ids, the head of the answer included.

        Raises
        ------
        ApiError
            422 for a chat that the template does not take, or more than a message where there is no template.
        """
        tokenizer: Any = self.tokenizer
        self.check([message["content"] for message in messages], "messages")
        if tokenizer.chat_template is None:
            if len(messages) > 1:
                raise ApiError(422, "the model has no chat template: give one message, or use completions", "messages")
            return (await self.encode([messages[0]["content"]]))[0]

        def encode() -> list[int]:
            from jinja2 import TemplateError

            try:
                return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
            except TemplateError as error:  # a template refuses orders of roles by raising
                raise ApiError(422, f"the chat template refuses: {error}"[:300], "messages") from None

        return await self.run(encode)

    async def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, special tokens included."""
        tokenizer: Any = self.tokenizer
        return await self.run(lambda: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))

    def spelling(self, id: int) -> bytes:
        """Return the bytes of a token; a special one is spelled out."""
        if id in self._special:
            return self._special[id].encode()
        return self._spellings[id] if id < len(self._spellings) else b""

    def spell(self, id: int) -> str:
        """Return a token as text; half a character shows as U+FFFD."""
        return self.spelling(id).decode("utf-8", "replace")
