"""Group Think: several thinkers write at once and read each other token by token (arXiv 2505.11107).

N threads answer one prompt I with the same weights and one key-value cache. A token is conditioned on the prompt and on
what all threads have written so far; only position ids and the attention mask differ from ordinary decoding.

    x[n, k+1] ~ p(. | I, x[1, ..k], ..., x[N, ..k])       K tokens a thinker, its header among them
    position of x[n, k] = |I| + (n - 1) K + k             slots fixed in advance, like sections of one text
    x[n, k] sees x[m, j]  iff  j <= k                     causal in time, not in position; interleaved: (j, m) <= (k, n)

The cache holds |I| + N K tokens at most, the prompt once. A pass feeds the newest token of every thinker
(``mode=step``) or of one thinker after the other (``mode=interleaved``). The time axis is the number of passes,
``trace.passes``; the compute axis the number of tokens.

Not of the paper, whose code is not public: the wording, the rules for ending (``until``), the merged answer, ``delay``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import Field
from transformers import PreTrainedModel

from tokenary.core.card import Card
from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.decode.group_think.loop import GroupLoop, Layout, sees
from tokenary.hf.strategy import Strategy, Task
from tokenary.hf.target import check_causal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = Card(
    slug="group-think",
    cls="GroupThink",
    room="decode",
    slot="strategy",
    title="Group Think: Multiple Concurrent Reasoning Agents Collaborating at Token Level Granularity",
    summary="several thinkers write at once over one cache and read each other token by token",
    paper="2505.11107",
    year=2025,
    requires=("kv-cache",),
    refuses=(
        ("keep", "threads read each other by slot, and a cache that drops tokens has no fixed slots"),
        ("read", "it takes a token's place in the cache for its position, which is another one here"),
        ("draft", "a thread's next token waits for what the others write now, so none can be drafted ahead"),
    ),
)

__all__ = ["CARD", "GroupThink", "sees"]

SYSTEM = (
    "{n} thinkers work on the user's task at the same time. Each thinker writes a thread of its own and sees the"
    " threads of all others while they are being written. Split the work between you. Do not repeat what another"
    " thinker has written. If another thinker is ahead of you on a part, switch to a different part."
)
MERGE = "\n\nThe work of all thinkers merged into one answer, without repeats:"


class GroupThink(Strategy):
    """Several thinkers answer a prompt together; the answer is their texts in order, or a merged one.

    One thinker is ordinary decoding: it gets neither header nor system text. ``max_new_tokens`` is the budget K of
    each thinker, header included. A thinker that emits an end token or a stop text is done; its words stay visible.

    Parameters
    ----------
    thinkers : int
        N.
    mode : {"step", "interleaved"}
        Feed the newest token of all thinkers in one pass, or one token of one thinker a pass, in turn.
    peers : {"all", "none"}
        Whether thinkers see each other; "none" is independent sampling in the same slots.
    delay : int
        Steps after which a thinker's token becomes visible to the others.
    headers : bool
        Start each thread with "Thinker n:" (where there is a tokenizer).
    system : bool
        Put the rules of working together before the prompt as system text (where the prompt went through a chat
        template).
    until : {"all", "first"}
        End when all thinkers are done, or when the first is.
    aggregate : {"none", "merge"}
        Join the thinkers' texts, or let the model write a merged answer that sees all threads, greedily, of at most
        `max_new_tokens`.
    """

    def __init__(
        self,
        thinkers: Annotated[int, Field(ge=1, le=64, json_schema_extra={"remote": 8})] = 4,
        mode: Literal["step", "interleaved"] = "step",
        peers: Literal["all", "none"] = "all",
        delay: Annotated[int, Field(ge=0)] = 0,
        headers: bool = True,
        system: bool = True,
        until: Literal["all", "first"] = "all",
        aggregate: Literal["none", "merge"] = "none",
    ) -> None:
        self.thinkers, self.mode, self.peers, self.delay = thinkers, mode, peers, delay
        self.headers, self.system = headers and thinkers > 1, system and thinkers > 1
        self.until, self.aggregate = until, aggregate

    def prepare(self, model: PreTrainedModel, tokenizer: Any | None) -> None:
        """Refuse sliding windows, which count positions back, and merging without a tokenizer."""
        check_causal(model)
        if "sliding_attention" in (getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()):
            raise UnsupportedModelError(
                "group-think needs full attention: a sliding window would cut threads off by their position slots"
            )
        if self.aggregate == "merge" and tokenizer is None:
            raise UnsupportedModelError("group-think:aggregate=merge asks in words: it needs a tokenizer")

    def loop(self, task: Task) -> GroupLoop:
        """Return the loop that writes all threads.

        Raises
        ------
        InputError
            If the slots of all thinkers do not fit in the context.
        OptionError
            If `max_new_tokens` leaves no token behind a header.
        """
        self.prepare(task.model, task.tokenizer)
        headers: list[list[int]] = [[] for _ in range(self.thinkers)]
        merge: list[int] | None = None
        prompts = [list(prompt) for prompt in task.prompts]
        if task.tokenizer is not None:
            if self.headers:
                headers = [encode(task.tokenizer, header(n)) for n in range(self.thinkers)]
            if self.aggregate == "merge":
                merge = encode(task.tokenizer, MERGE)
            if self.system and task.tokenizer.chat_template is not None:
                prompts = with_system(task.tokenizer, prompts, SYSTEM.format(n=self.thinkers))
        budget, longest = task.max_new_tokens, max(map(len, headers))
        if budget <= longest:
            raise OptionError("max_new_tokens", budget, f"more than the {longest} tokens of a thinker's header")
        slots = self.thinkers * budget + (0 if merge is None else len(merge) + budget)
        context = task.model.config.get_text_config().max_position_embeddings
        for number, prompt in enumerate(prompts, start=1):
            if len(prompt) + slots > context:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens and {self.thinkers} thinkers need {slots} slots:"
                    f" that is past the context of {context}"
                )
        stride = self.thinkers if self.mode == "interleaved" else 1
        lag = 1 << 40 if self.peers == "none" else self.delay * stride
        return GroupLoop(task, prompts, headers, merge, Layout(budget, stride, lag), self.until == "first")


def header(thinker: int) -> str:
    """Return the text that a thread starts with, `thinker` counted from 0."""
    return ("\n\n" if thinker else "") + f"Thinker {thinker + 1}:"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, without those that start or end a sequence."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def with_system(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], system: str) -> list[list[int]]:
    """Put system text before prompts that went through the chat template; leave others as they are.

    What the template writes before a user's first word is found by rendering two messages that differ in it.

    Raises
    ------
    UnsupportedModelError
        If the chat template takes no system message.
    """

    def opening(*before: dict[str, str]) -> list[int]:
        chats = [[*before, {"role": "user", "content": word}] for word in ("A", "B")]
        one, other = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
        )
        return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]

    plain = opening()
    try:
        ours = opening({"role": "system", "content": system})
    except TemplateError as error:
        raise UnsupportedModelError(f"the chat template takes no system text ({error}); use system=false") from None
    return [ours + ids[len(plain) :] if ids[: len(plain)] == plain else ids for ids in prompts]
