"""Long-context workloads made of real text, and how their answers are scored.

A `LongSample` is a prompt of an exact number of tokens. Most ask for something that was hidden in the text (needles,
pairs of keys and values) and are scored by what an answer holds; the others (a passage that comes again, plain prose)
have no answer: the loss on their last `scored` tokens counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tokenary.core.errors import InputError, OptionError
from tokenary.core.seeding import substream

_NAMES = (
    "Lisbon Oslo Cairo Lima Kyoto Dublin Quito Riga Havana Nairobi Vienna Hanoi Tunis Bergen Perth Malaga Turin Lagos"
)
CITIES = tuple(_NAMES.split())


@dataclass(frozen=True)
class LongSample:
    """One prompt, and what is expected of it.

    Parameters
    ----------
    task : str
        Which workload.
    ids : tuple of int
        Token ids of the prompt.
    answers : tuple of str
        What an answer must hold; empty where the loss counts.
    scored : int
        How many of the last tokens of `ids` are predicted; 0 where an answer counts.
    depth : float
        Where what is asked for stands, as a share of the text before the question.
    """

    task: str
    ids: tuple[int, ...]
    answers: tuple[str, ...] = ()
    scored: int = 0
    depth: float = 0.0

    def score(self, answer: str) -> float:
        """Return the share of the expected answers that the first line of an answer holds.

        Raises
        ------
        InputError
            If no answer is expected of this sample.
        """
        if not self.answers:
            raise InputError(f"{self.task} is scored by the loss on its last {self.scored} tokens, not by an answer")
        line = answer.strip().partition("\n")[0]
        return sum(expected in line for expected in self.answers) / len(self.answers)


def needle(tokenizer: PreTrainedTokenizerBase, text: str, length: int, depth: float = 0.5, seed: int = 0) -> LongSample:
    """Hide one sentence with a number in a text, and ask for the number.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    text : str
        Real text, long enough.
    length : int
        Tokens of the prompt.
    depth : float
        Where the sentence stands, in [0, 1].
    seed : int
        Of the number, and of where the text begins.

    Raises
    ------
    InputError
        If the text is too short.
    """
    made = multi_needle(tokenizer, text, length, (depth,), seed)
    return LongSample("needle", made.ids, made.answers, depth=depth)


def multi_needle(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    depths: Sequence[float] = (0.2, 0.5, 0.8),
    seed: int = 0,
) -> LongSample:
    """Hide several sentences with numbers, and ask for all of them in order; see `needle`."""
    _check_depths(depths)
    drawn = substream(seed, "needles", len(depths))
    cities = [CITIES[at] for at in drawn.permutation(len(CITIES))[: len(depths)]]
    numbers = [str(number) for number in drawn.integers(10_000, 100_000, len(depths))]
    facts = [f" The secret number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    asked = " and ".join(cities)
    question = f"\n\nQuestion: What is the secret number of {asked}?\nAnswer: The secret number of {asked} is"
    ids = _hidden(tokenizer, text, length, facts, depths, question, seed)
    return LongSample("multi-needle", ids, tuple(numbers), depth=sum(depths) / len(depths))


def key_value(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, depth: float = 0.5, seed: int = 0
) -> LongSample:
    """List words of a text, each with a number, and ask for the number of one (after Liu et al. 2023, 2307.03172).

    Parameters are those of `needle`; `depth` says which word is asked for. The prompt may be a few tokens shorter than
    `length`, as pairs are whole.
    """
    _check_depths([depth])
    drawn = substream(seed, "key-value")
    words = sorted({word for word in text.split() if word.isalpha() and word.islower() and len(word) > 4})
    order = drawn.permutation(len(words)).tolist()
    head, pairs, size = lead(tokenizer), [], 0
    question = "\nThe number of {} is"
    spare = length - len(head) - len(encode(tokenizer, question.format("x" * 24)))
    lines: list[list[int]] = []
    for at in order:
        number = str(int(drawn.integers(1000, 10_000)))
        line = encode(tokenizer, f"{words[at]}: {number}\n")
        if size + len(line) > spare:
            break
        lines.append(line)
        pairs.append((words[at], number))
        size += len(line)
    if not pairs or len(pairs) == len(words):
        raise InputError(f"a prompt of {length} tokens holds no pair, or the text has too few words for it")
    word, number = pairs[min(int(depth * len(pairs)), len(pairs) - 1)]
    ids = head + [token for line in lines for token in line] + encode(tokenizer, question.format(word))
    return LongSample("key-value", tuple(ids), (number,), depth=depth)


def copy(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, depth: float = 0.2, seed: int = 0, repeat: int = 200
) -> LongSample:
    """Repeat a passage of a text at its end; the loss on the repeat counts.

    Parameters are those of `needle`; `depth` is where the passage stands, as a share of `length`, and `repeat` is how
    many tokens it has.
    """
    _check_depths([depth])
    head = lead(tokenizer)
    body = head + _piece(tokenizer, text, length - repeat - len(head), seed)
    start = int(depth * length)
    if start + repeat > len(body):
        raise OptionError("depth", depth, "a passage that ends before its repeat begins")
    return LongSample("copy", (*body, *body[start : start + repeat]), scored=repeat, depth=depth)


def prose_loss(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, seed: int = 0, scored: int = 256
) -> LongSample:
    """Take a long piece of text; the loss on its last `scored` tokens counts."""
    head = lead(tokenizer)
    return LongSample("perplexity", (*head, *_piece(tokenizer, text, length - len(head), seed)), scored=scored)


#: Workloads by name; each is called with a tokenizer, a text and a number of tokens.
TASKS: dict[str, Callable[..., LongSample]] = {
    "needle": needle,
    "multi-needle": multi_needle,
    "key-value": key_value,
    "copy": copy,
    "perplexity": prose_loss,
}


def _hidden(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    facts: Sequence[str],
    depths: Sequence[float],
    question: str,
    seed: int,
) -> tuple[int, ...]:
    """Put sentences behind the full stop next to their depth, and a question at the end."""
    head, tail = lead(tokenizer), encode(tokenizer, question)
    hidden = [encode(tokenizer, fact) for fact in facts]
    body = _piece(tokenizer, text, length - len(head) - len(tail) - sum(map(len, hidden)), seed)
    stops = [at + 1 for at, token in enumerate(body) if str(tokenizer.decode([token])).rstrip().endswith(".")]
    places = [min([0, *stops], key=lambda at: abs(at - depth * len(body))) for depth in depths]
    for place, ids in sorted(zip(places, hidden, strict=True), reverse=True):
        body[place:place] = ids
    return (*head, *body, *tail)


def _check_depths(depths: Sequence[float]) -> None:
    if not depths or len(depths) > len(CITIES) or not all(0 <= depth <= 1 for depth in depths):
        raise OptionError("depth", depths, f"numbers from 0 to 1, at most {len(CITIES)}")


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, length: int, seed: int) -> list[int]:
    """Cut so many tokens out of a text, from a place drawn from the seed."""
    ids = encode(tokenizer, text)
    if not 0 < length <= len(ids):
        raise InputError(f"the text has {len(ids)} tokens where {length} are to be taken from it")
    start = int(substream(seed, "long text").integers(0, len(ids) - length + 1))
    return ids[start : start + length]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, and no others."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before any text."""
    whole, body = list(tokenizer("a", verbose=False)["input_ids"]), encode(tokenizer, "a")
    return whole[: len(whole) - len(body)] if whole[-len(body) :] == body else []
