"""Facts stated once in real prose and asked for later, and prose that goes on: what long contexts are probed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.seeding import substream
from tokenary.data import prose
from tokenary.models.lm import LM

#: Values of facts; `VALUES` of these are used, such that one token tells them apart.
COLOURS = (" red", " blue", " green", " white", " black", " yellow", " pink", " grey", " brown", " orange", " silver")
VALUES = 4
THINGS = (
    "the door of the cabin", "the chest of the captain", "the lamp of the cook", "the flag of the harbour",
    "the coat of the sailor", "the boat of the island", "the gate of the chapel", "the roof of the tavern",
    "the bell of the ship", "the box of the merchant", "the wall of the garden", "the cup of the stranger",
)  # fmt: skip
DEPTHS = (0.1, 0.5, 0.9)
SCORED = 64  # tokens at the end of a passage


@dataclass(frozen=True)
class Fact:
    """A statement in a context, and how it is asked for.

    Parameters
    ----------
    context, question : tuple of int
        Token ids. The answer's first token that tells the values apart follows the question.
    values : tuple of int
        That token of every value.
    stated : int
        Which value was stated.
    length : int
        Tokens of the context.
    depth : float
        Where it stands in the context, 0 to 1.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    values: tuple[int, ...]
    stated: int
    length: int
    depth: float


@dataclass(frozen=True)
class Passage:
    """Prose, and how it goes on.

    Parameters
    ----------
    context, after : tuple of int
        Token ids.
    length : int
        Tokens of the context.
    """

    context: tuple[int, ...]
    after: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Riddle:
    """Statements in a context of which one or two answer a question, and how it is asked and answered.

    Parameters
    ----------
    context, question, forced : tuple of int
        Token ids. A chain of thought follows the question; the answer's first token that tells the values apart follows
        what is forced behind any part of it.
    values : tuple of int
        That token of every value.
    stated : int
        The right value.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    forced: tuple[int, ...]
    values: tuple[int, ...]
    stated: int


class Writer:
    """Makes items for one model.

    Parameters
    ----------
    lm : LM
        With a tokenizer.
    seed : int
        Where in the prose contexts begin, and which values are stated.

    Raises
    ------
    UnsupportedModelError
        If the model has no tokenizer, or its tokens do not tell the values apart.
    """

    def __init__(self, lm: LM, seed: int) -> None:
        if lm.kind != "causal" or lm.tokenizer is None:
            raise UnsupportedModelError(f"{lm.name}: needs a causal language model with a tokenizer")
        self.lm, self.seed, self.text = lm, seed, prose()
        found = told_apart({value: tuple(self.encode(value)) for value in COLOURS})
        if found is None:
            raise UnsupportedModelError(f"{lm.name}: its tokens do not tell the names of colours apart")
        self.lead, self.told = found
        self.values = tuple(self.told.values())
        start = getattr(lm.tokenizer, "bos_token_id", None)
        self.start = [] if start is None else [int(start)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        assert self.lm.tokenizer is not None
        return list(self.lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def passage(self, length: int, number: int) -> Passage:
        """Cut a passage, its context with as many tokens as `length`."""
        ids = self._prose(length + SCORED, "passage", number)
        return Passage(tuple(ids[:length]), tuple(ids[length:]), length)

    def fact(self, length: int, depth: float, number: int) -> Fact:
        """State a fact in a context of `length` tokens."""
        stream = substream(self.seed, "token-reduction-position", "fact", length, str(depth), number)
        thing, stated = THINGS[int(stream.integers(len(THINGS)))], int(stream.integers(len(self.values)))
        told = self.encode(f" Remember that {thing} is painted{list(self.told)[stated]}.")
        asked = self.encode(f"\n\nAs was said above, {thing} is painted") + list(self.lead)
        around = self._prose(max(1, length - len(told)), "fact", number)
        place = 1 + round(depth * (len(around) - 1))
        context = around[:place] + told + around[place:]
        return Fact(tuple(context), tuple(asked), self.values, stated, length, depth)

    def riddle(self, length: int, number: int) -> Riddle:
        """State the colours of three things in a context of `length` tokens, and ask for one of them.

        With an odd number, what is asked for is said to have the colour of another one: two steps.
        """
        stream = substream(self.seed, "token-reduction-position", "riddle", length, number)
        asked, second, third = (THINGS[i] for i in stream.permutation(len(THINGS))[:3])
        stated, *others = (int(i) for i in stream.permutation(len(self.values))[:3])
        right, *wrong = (list(self.told)[i] for i in (stated, *others))
        one = {asked: right, second: wrong[1], third: wrong[0]}
        two = {asked: f" in the same colour as {second}", second: right, third: wrong[0]}
        said = [f" Remember that {thing} is painted{how}." for thing, how in (two if number % 2 else one).items()]
        told = [self.encode(said[i]) for i in stream.permutation(len(said))]
        around = self._prose(max(4, length - sum(map(len, told))), "riddle", number)
        step, context = len(around) // 4, list[int]()
        for i, each in enumerate(told):
            context += around[i * step : (i + 1) * step] + each
        context += around[len(told) * step :]
        question = self.encode(f"\n\nQuestion: Which colour is {asked}?\nThoughts: As was said above,")
        forced = self.encode(f"\nAnswer: {asked} is painted") + list(self.lead)
        return Riddle(tuple(context), tuple(question), tuple(forced), self.values, stated)

    def facts(self, lengths: Sequence[int], each: int) -> list[Fact]:
        """State `each` facts at every length and depth."""
        return [self.fact(length, depth, i) for length in lengths for depth in DEPTHS for i in range(each)]

    def passages(self, lengths: Sequence[int], each: int) -> list[Passage]:
        """Cut `each` passages of every length."""
        return [self.passage(length, i) for length in lengths for i in range(each)]

    def _prose(self, tokens: int, *names: int | str) -> list[int]:
        """Prose of so many tokens, from the start of a sentence."""
        stream = substream(self.seed, "token-reduction-position", "prose", *names)
        room = 8 * tokens + 400  # letters; a token rarely has more
        begin = int(stream.integers(max(1, len(self.text) - room)))
        begin = self.text.find(". ", begin) + 2
        return (self.start + self.encode(self.text[begin : begin + room]))[:tokens]


def told_apart(spelled: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], dict[str, int]] | None:
    """Find values that one token tells apart, behind tokens that all of them begin with.

    Returns
    -------
    (tuple of int, dict of str to int) or None
        The tokens in common, and of `VALUES` values the one that follows; None where there are not so many.
    """
    for shared in range(max(map(len, spelled.values()))):
        groups: dict[tuple[int, ...], dict[int, str]] = {}
        for value, ids in spelled.items():
            if len(ids) > shared:
                groups.setdefault(ids[:shared], {}).setdefault(ids[shared], value)
        for lead, values in groups.items():
            if len(values) >= VALUES:
                return lead, {value: token for token, value in list(values.items())[:VALUES]}
    return None
