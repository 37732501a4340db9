"""Long texts that are read once and asked many things: what a memory is worth, at the price of one prompt.

A `Haystack` is real prose with three sentences and a list of pairs hidden in it. Its `Question`s follow it one at a
time, each forgotten before the next: one needle, all needles, the number of a word (key-value), a passage that comes
again (copy), and the prose that really follows (perplexity). Whatever reduces a memory does so before it knows what
will be asked.

Every question brings the answer that is expected. One pass gives its loss, and whether greedy decoding would write it:
it does where each of its tokens is the most likely one after those before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokenary.bench.long_context import CITIES, encode, lead
from tokenary.core.errors import InputError
from tokenary.core.seeding import substream

DEPTHS = (0.1, 0.5, 0.9)  # of the needles
LIST_DEPTH, ASKED = 0.3, (0.25, 0.75)  # of the list of pairs in the text, of the pairs asked for in the list
LIST_SHARE = 16  # the list takes this part of the text
CUE, COPIED, CONTINUED = 8, 48, 65  # tokens that begin a repeated passage, that are scored of it, and of prose
#: Most tokens that a question and its answer take.
LONGEST = 96
SHORTEST = 512
TASKS = ("needle", "multi-needle", "key-value", "copy", "perplexity")


@dataclass(frozen=True)
class Question:
    """What is asked behind a haystack.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    ids : tuple of int
        Tokens of the question, at least one.
    answer : tuple of int
        Tokens of the answer that is expected.
    parts : tuple of (int, int)
        Which slices of the answer were hidden and are scored; empty where all of it is, and only its loss counts.
    depth : float
        Where what is asked for stands, as a share of the text; 0 where nothing is.
    """

    task: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()
    depth: float = 0.0

    def score(self, losses: Sequence[float], likely: Sequence[int]) -> tuple[float, float | None]:
        """Return nats a token of what is scored, and the share of the parts that greedy decoding would write.

        Parameters
        ----------
        losses : sequence of float
            Negative log-likelihood of each token of the answer, given those before.
        likely : sequence of int
            The most likely token in its place.
        """
        if not self.parts:
            return sum(losses) / len(losses), None
        scored = [loss for start, end in self.parts for loss in losses[start:end]]
        right = [tuple(likely[start:end]) == self.answer[start:end] for start, end in self.parts]
        return sum(scored) / len(scored), sum(right) / len(right)


@dataclass(frozen=True)
class Haystack:
    """A long text and what is asked about it.

    Parameters
    ----------
    ids : tuple of int
        Token ids.
    questions : tuple of Question
        Each follows `ids` directly.
    """

    ids: tuple[int, ...]
    questions: tuple[Question, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        asked = [
            {"task": one.task, "ids": list(one.ids), "answer": list(one.answer), "parts": list(map(list, one.parts))}
            for one in self.questions
        ]
        return {"ids": list(self.ids), "questions": asked}


def haystacks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int, seed: int = 0) -> list[Haystack]:
    """Make haystacks from evenly spaced pieces of a text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    text : str
        Real text. Pieces overlap where it is too short for all of them.
    length : int
        Tokens of a haystack, without the questions.
    count : int
        How many.
    seed : int
        Of names and numbers, and of where the pieces lie.

    Raises
    ------
    InputError
        The length is below `SHORTEST`, or the text too short for one haystack.
    """
    if length < SHORTEST:
        raise InputError(f"a haystack of {length} tokens is too short to hide anything: at least {SHORTEST}")
    ids = encode(tokenizer, text)
    slack = len(ids) - length - CONTINUED
    if slack < 0:
        raise InputError(f"the text has {len(ids)} tokens, too few for a haystack of {length} and what follows it")
    words = sorted({word for word in text.split() if word.isalpha() and word.islower() and len(word) > 4})
    shift = seed * 0.618 % 1.0
    starts = [int(slack * ((number + shift) / count)) for number in range(count)]
    return [_haystack(tokenizer, ids[start:], words, length, count * seed + at) for at, start in enumerate(starts)]


def _haystack(
    tokenizer: PreTrainedTokenizerBase, source: list[int], words: Sequence[str], length: int, seed: int
) -> Haystack:
    """Hide needles and a list in the tokens of `source`, and ask."""
    drawn = substream(seed, "haystack")
    cities = [CITIES[at] for at in drawn.permutation(len(CITIES))[: len(DEPTHS)]]
    numbers = [str(number) for number in drawn.integers(10_000, 100_000, len(DEPTHS))]
    facts = [
        encode(tokenizer, f" The secret number of {city} is {number}.")
        for city, number in zip(cities, numbers, strict=True)
    ]
    order = [words[at] for at in drawn.permutation(len(words))]
    pairs = [(word, str(number)) for word, number in zip(order, drawn.integers(1000, 10_000, len(order)), strict=True)]
    listed, block = _list(tokenizer, pairs, length // LIST_SHARE)
    begin = lead(tokenizer)
    size = length - len(begin) - len(block) - sum(map(len, facts))
    body, after = source[:size], source[size:]
    hidden = list(zip(_places(tokenizer, body, (*DEPTHS, LIST_DEPTH)), [*facts, block], strict=True))
    at = _untouched(len(body), [place for place, _ in hidden])
    copied = body[at : at + CUE + COPIED]
    made = list(body)
    for place, inserted in sorted(hidden, reverse=True):
        made[place:place] = inserted
    questions = [
        *(
            _asked("needle", tokenizer, [city], [number], depth)
            for city, number, depth in zip(cities, numbers, DEPTHS, strict=True)
        ),
        _asked("multi-needle", tokenizer, cities, numbers, sum(DEPTHS) / len(DEPTHS)),
        *(_value(tokenizer, *listed[int(share * len(listed))]) for share in ASKED),
        Question("copy", tuple(copied[:CUE]), tuple(copied[CUE:]), depth=at / len(body)),
        Question("perplexity", tuple(after[:1]), tuple(after[1:CONTINUED])),
    ]
    return Haystack((*begin, *made), tuple(questions))


def _list(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], room: int
) -> tuple[list[tuple[str, str]], list[int]]:
    """As many pairs as fit into `room` tokens, at least one, and their tokens."""
    ids, count = encode(tokenizer, "\n"), 0
    while count < len(pairs):
        line = encode(tokenizer, "{}: {}\n".format(*pairs[count]))
        if count and len(ids) + len(line) > room:
            break
        ids, count = ids + line, count + 1
    return list(pairs[:count]), ids


def _places(tokenizer: PreTrainedTokenizerBase, body: Sequence[int], depths: Sequence[float]) -> list[int]:
    """Where a sentence ends, next to each depth."""
    stops = [at + 1 for at, token in enumerate(body) if str(tokenizer.decode([token])).rstrip().endswith(".")]
    return [min([0, *stops], key=lambda at: abs(at - depth * len(body))) for depth in depths]


def _untouched(size: int, places: Sequence[int]) -> int:
    """Where a passage begins into which nothing is put: in the middle of the widest gap."""
    borders = sorted([0, *places, size])
    width, start = max((end - start, start) for start, end in itertools.pairwise(borders))
    if width < CUE + COPIED:
        raise InputError("the text has too few sentences to hide anything between them")
    return start + (width - CUE - COPIED) // 2


def _asked(
    task: str, tokenizer: PreTrainedTokenizerBase, cities: Sequence[str], numbers: Sequence[str], depth: float
) -> Question:
    """Ask for the secret numbers of cities, in this order."""
    names = " and ".join(cities)
    question = f"\n\nQuestion: What is the secret number of {names}?\nAnswer: The secret number of {names} is"
    answer, parts, between = list[int](), [], encode(tokenizer, " and")
    for number in numbers:
        answer += between if answer else []
        start = len(answer)
        answer += encode(tokenizer, f" {number}")
        parts.append((start, len(answer)))
    return Question(task, tuple(encode(tokenizer, question)), tuple(answer), tuple(parts), depth)


def _value(tokenizer: PreTrainedTokenizerBase, word: str, number: str) -> Question:
    """Ask for the number of a word of the list."""
    answer = tuple(encode(tokenizer, f" {number}"))
    ids = tuple(encode(tokenizer, f"\nThe number of {word} is"))
    return Question("key-value", ids, answer, ((0, len(answer)),), LIST_DEPTH)
