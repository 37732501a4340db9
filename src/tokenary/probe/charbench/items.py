"""The four tasks: questions with one right number each, on words that are balanced by length and used once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenary.core.errors import InputError
from tokenary.core.seeding import substream
from tokenary.probe.charbench.words import LENGTHS

COUNTING = ("count_unique_chars", "count_character_frequency")
POSITION = ("find_first_occurrence", "find_last_occurrence")
TASKS = (*COUNTING, *POSITION)

#: Every number that can be right.
NUMBERS = range(LENGTHS[-1] + 1)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    word : str
        What is asked about; upper and lower case are different characters.
    char : str
        The character that is asked for; empty in ``count_unique_chars``.
    gold : int
        The right answer; positions count from 0.
    """

    task: str
    word: str
    char: str
    gold: int


def gold(task: str, word: str, char: str) -> int:
    """Return the right answer."""
    if task == "count_unique_chars":
        return len(set(word))
    if task == "count_character_frequency":
        return word.count(char)
    return word.index(char) if task == "find_first_occurrence" else word.rindex(char)


def generate(words: Iterable[str], per_task: int, seed: int, deal: int = 0) -> list[Item]:
    """Make the questions of all four tasks.

    Each length of 4 to 10 has the same number of words, and each task words of its own. The character is that at a
    uniformly drawn position, so that repeated ones are likelier.

    Parameters
    ----------
    words : iterable of str
        The pool; other lengths are left out.
    per_task : int
        At most so many questions of each task. Where a length has too few words, all lengths give as many as it.
    seed : int
        Shuffles the words and draws the characters.
    deal : int
        Which of the four ways to deal the same parts out to the tasks. In the four together every word is in every
        task once.

    Raises
    ------
    InputError
        A length has less than four words, or fewer than seven questions are asked for.
    """
    buckets: dict[int, list[str]] = {length: [] for length in LENGTHS}
    for word in sorted(set(words)):
        if len(word) in buckets:
            buckets[len(word)].append(word)
    fewest = min(LENGTHS, key=lambda length: len(buckets[length]))
    share = min(per_task // len(LENGTHS), len(buckets[fewest]) // len(TASKS))
    if not share:
        raise InputError(
            f"{per_task} questions a task from a pool with {len(buckets[fewest])} words of {fewest} letters: at least"
            f" {len(LENGTHS)} questions, and {len(TASKS)} words of each length, are needed"
        )
    items = []
    for number, task in enumerate(TASKS):
        for length, bucket in buckets.items():
            order = substream(seed, "charbench", "words", length).permutation(len(bucket))
            part = (number + deal) % len(TASKS)
            chosen = order[part * share : (part + 1) * share]
            places = substream(seed, "charbench", "character", task, length, deal).integers(0, length, share)
            for i, place in zip(chosen, places, strict=True):
                word = bucket[i]
                char = "" if task == "count_unique_chars" else word[place]
                items.append(Item(task, word, char, gold(task, word, char)))
    return items
