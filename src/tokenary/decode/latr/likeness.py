"""How alike two continuations are, as lists of token ids; and what counts as a word."""

from __future__ import annotations

from collections.abc import Sequence

_WORDS = (
    "a about above after again all also am an and any are as at be because been before being below between both but by "
    "can could did do does doing down during each few for from further had has have having he her here hers him his "
    "how i if in into is it its itself just me more most my no nor not now of off on once only or other our out over "
    "own same she should so some such than that the their them then there these they this those through to too under "
    "until up very was we were what when where which while who whom why will with would you your"
)
_FUNCTION_WORDS = frozenset(_WORDS.split())


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b`."""
    above = list(range(len(b) + 1))
    for i, token in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b):
            row.append(min(above[j] + (token != other), above[j + 1] + 1, row[j] + 1))
        above = row
    return above[-1]


def suffix_match(a: Sequence[int], b: Sequence[int]) -> float:
    """Length of the longest suffix of either list that stands anywhere in the other, over the length of `a`."""
    return max(_longest_suffix(a, b), _longest_suffix(b, a)) / len(a)


def rouge_l(a: Sequence[int], b: Sequence[int]) -> float:
    """ROUGE-L F: twice the longest common subsequence over the sum of the lengths."""
    above = [0] * (len(b) + 1)
    for token in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if token == other else max(above[j + 1], row[j]))
        above = row
    return 2 * above[-1] / (len(a) + len(b))


def _longest_suffix(a: Sequence[int], text: Sequence[int]) -> int:
    best = 0
    for end in range(len(text), 0, -1):
        length = 0
        while length < min(end, len(a)) and text[end - 1 - length] == a[-1 - length]:
            length += 1
        best = max(best, length)
    return best


def is_word(text: str) -> bool:
    """Return whether a token's text is more than white space, punctuation or an English function word."""
    bare = text.strip().lower()
    return bool(bare.strip(".,;:!?\"'")) and bare not in _FUNCTION_WORDS
