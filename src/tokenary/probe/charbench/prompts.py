"""From a question to token ids: the word goes in as tokens of its own, so that the model reads the cut we describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import rust_tokenizer
from tokenary.models.lm import LM
from tokenary.probe.charbench.items import COUNTING, NUMBERS, POSITION, Item, gold

_ASK = {
    "count_unique_chars": ('How many different characters are in the string "', '"?'),
    "count_character_frequency": ('How many times does the character "{char}" occur in the string "', '"?'),
    "find_first_occurrence": ('At which position does the character "{char}" first occur in the string "', '"?'),
    "find_last_occurrence": ('At which position does the character "{char}" last occur in the string "', '"?'),
}
_RULE = "Answer with the final number only. Upper and lower case letters are different characters."
_FROM_ZERO = " Positions are counted from 0."
_SPACED = " The spaces between the letters do not count."
_MARK = "\ufdd0"  # no text holds it

#: Words of other lengths than those that are asked about, each with the character of its example.
SHOTS = (("Mississippi", "s"), ("Bob", "b"), ("Massachusetts", "h"), ("eye", "e"))


def question(task: str, char: str) -> tuple[str, str]:
    """Return what stands before and behind the word."""
    before, after = _ASK[task]
    return before.replace("{char}", char), after


def instruction(task: str, shots: int, spaced: bool = False) -> str:
    """Return what stands before the question: the rule, and worked examples."""
    lines = [_RULE + _FROM_ZERO * (task in POSITION) + _SPACED * spaced]
    for word, char in SHOTS[:shots]:
        char = "" if task == COUNTING[0] else char
        before, after = question(task, char)
        shown = " ".join(word) if spaced else word
        lines.append(f"Question: {before}{shown}{after}\nAnswer: {gold(task, word, char)}")
    return "\n\n".join([*lines, "Question: "])


@dataclass(frozen=True)
class Answers:
    """How an answer goes on behind a prompt.

    Attributes
    ----------
    lead : tuple of int
        Ids that all answers begin with, such as a space; they belong to the prompt.
    numbers : tuple of tuple of int
        Ids of each of `NUMBERS`, and of what ends an answer: without it, 1 could never lose against 10.
    """

    lead: tuple[int, ...]
    numbers: tuple[tuple[int, ...], ...]


class Prompter:
    """Writes the prompts for one model.

    Parameters
    ----------
    lm : LM
        The model.
    raw : bool
        Plain text that ends in ``Answer:`` instead of a chat. A tokenizer without a chat template always gets it.
    shots : int
        Worked examples, 0 to 4.

    Raises
    ------
    UnsupportedModelError
        No tokenizer, or one without a tokenizer.json.
    """

    def __init__(self, lm: LM, raw: bool = False, shots: int = 0) -> None:
        if lm.tokenizer is None:
            raise UnsupportedModelError(f"{lm.name} has no tokenizer, and character questions are text")
        self.lm, self.tokenizer, self.shots = lm, lm.tokenizer, shots
        self.raw = raw or lm.tokenizer.chat_template is None
        self.vocabulary = Vocabulary(rust_tokenizer(lm.tokenizer))

    def head(self, item: Item, spaced: bool = False) -> list[int]:
        """Return the ids of everything before the word."""
        text = instruction(item.task, self.shots, spaced) + question(item.task, item.char)[0]
        if not self.raw:
            return self._ids(self._chat()[0] + text)
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        while ids and ids[-1] in self.lm.eos_token_ids:
            ids.pop()
        return ids

    def answers(self, task: str) -> Answers:
        """Return what stands behind the word, and every number as an answer."""
        behind = question(task, "")[1] + ("\nAnswer:" if self.raw else self._chat()[1])
        if self.raw:
            rows = [self._behind(f"{behind} {number}\n") for number in NUMBERS]
        else:
            end = list(self.lm.eos_token_ids[:1])
            rows = [self._behind(f"{behind}{number}") + end for number in NUMBERS]
        lead = shared(rows)
        if any(len(row) == lead for row in rows):
            raise UnsupportedModelError(f"{self.lm.name} cannot write the numbers from 0 to 10 differently")
        return Answers(tuple(rows[0][:lead]), tuple(tuple(row[lead:]) for row in rows))

    def prompt(self, item: Item, word: Sequence[int], lead: Sequence[int], spaced: bool = False) -> list[int]:
        """Return the ids of a whole prompt, given those of the word and of what stands behind it.

        Raises
        ------
        InputError
            It does not fit the context.
        """
        ids = [*self.head(item, spaced), *word, *lead]
        if len(ids) + 8 > self.lm.context_length:
            raise InputError(
                f"a question of {len(ids)} tokens; {self.lm.name} has a context of {self.lm.context_length}"
                + " (fewer shots?)" * bool(self.shots)
            )
        return ids

    def spaced(self, word: str) -> list[int]:
        """Return the ids of a word with spaces between its letters."""
        return self._behind(" ".join(word))

    def _chat(self) -> tuple[str, str]:
        message = [{"role": "user", "content": _MARK}]
        text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        left, mark, right = text.partition(_MARK)
        if not mark:
            raise UnsupportedModelError(f"the chat template of {self.lm.name} leaves the message out")
        return left, right

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _behind(self, text: str) -> list[int]:
        """Return the ids of text that goes on: without a lone word-start mark."""
        ids = self._ids(text)
        spellings = self.vocabulary.spellings
        return ids[1:] if ids and not text.startswith(" ") and spellings[ids[0]] == b" " else ids


def shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all rows begin with."""
    same = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        same += 1
    return same
