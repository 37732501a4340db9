"""Which tokens of two tokenizations stand for the same piece of a text.

Tokens are compared by the characters that they cover. A place is a cut of one tokenization if a token ends there and
none reaches across; the pieces between cuts that both have are the chunks, found in one walk over both lists. So the
bytes of one character, split over tokens that all cover it whole, stay in one chunk, and so does a space that one side
glues to the word behind it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Span = tuple[int, int]


@dataclass(frozen=True)
class Chunks:
    """Chunks of a batch of texts.

    Attributes
    ----------
    student, teacher : Tensor
        (B, N) and (B, M) int64, the chunk of each token; -1 for none: padding, a special token without a partner.
    correct : Tensor
        (B, C) bool, whether both sides spell a chunk alike; False where a text has fewer chunks.
    """

    student: Tensor
    teacher: Tensor
    correct: Tensor


@dataclass(frozen=True)
class AlignedText:
    """One text in both tokenizations.

    Attributes
    ----------
    student_ids, teacher_ids : list of int
        Tokens, special ones included.
    student, teacher : list of int
        The chunk of each; -1 for none.
    correct : list of bool
        Of each chunk, see `Chunks`.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    student: list[int]
    teacher: list[int]
    correct: list[bool]


def align_spans(student: Sequence[Span], teacher: Sequence[Span]) -> tuple[list[int], list[int], int]:
    """Number the chunks of two lists of character spans over one text.

    Parameters
    ----------
    student, teacher : sequence of (int, int)
        Start and end of each token in the text, in its order. Spans may overlap, where tokens are parts of one
        character; be empty, where a token stands for no text; and leave out text that a normalizer drops.

    Returns
    -------
    student, teacher : list of int
        The chunk of each token; -1 for the tokens of a side that is otherwise empty.
    count : int
        Chunks. Linear in the number of tokens.
    """
    if not student or not teacher:
        return [-1] * len(student), [-1] * len(teacher), 0
    left, right = _cuts(student), _cuts(teacher)
    chunks: tuple[list[int], list[int]] = ([], [])
    i = j = count = 0
    while i < len(left) and j < len(right):
        if left[i][0] == right[j][0]:
            for found, (_, stop) in zip(chunks, (left[i], right[j]), strict=True):
                found += [count] * (stop - len(found))
            count += 1
        low, high = left[i][0], right[j][0]
        i, j = i + (low <= high), j + (high <= low)
    if min(len(chunks[0]) - len(student), len(chunks[1]) - len(teacher)) < 0:  # the last ends are not the same
        for found, tokens in zip(chunks, (student, teacher), strict=True):
            found += [count] * (len(tokens) - len(found))
        count += 1
    return chunks[0], chunks[1], count


def _cuts(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Return the places that no token reaches across: (place, tokens before it), ascending."""
    found: list[tuple[int, int]] = []
    end = 0
    for number, (start, stop) in enumerate(spans):
        if number and start >= end:
            found.append((end, number))
        end = max(end, stop)
    found.append((end, len(spans)))
    last_of_place = dict(found)  # a token without text stays with the one before it
    return list(last_of_place.items())


def canonical(data: bytes) -> str:
    """Return bytes as text in one form: composed, one kind of line end, no space in front of other characters."""
    text = unicodedata.normalize("NFC", data.decode(errors="replace")).replace("\r\n", "\n")
    return text.lstrip(" ") or text
