"""Several encodings of one text: how many there are, simple ones beside the own, and of which class a pair is.

The eight classes are those of phantom edits (arXiv 2601.14658): two sequences of tokens that read alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

CLASSES = (
    "whitespace boundary",
    "whitespace detached",
    "newline and space",
    "segmentation in a word",
    "proper noun",
    "morphological boundary",
    "acronym",
    "plural or possessive",
)
PREFIXES = ("anti", "dis", "inter", "mis", "non", "over", "pre", "re", "sub", "super", "trans", "un", "under")
SUFFIXES = ("able", "ed", "er", "est", "ful", "ing", "ion", "ity", "less", "ly", "ment", "ness", "ous")
TAILS = ("s", "'s", "’s", "es")
#: Texts that tokenizers are known to lose something of.
ODD = (
    *("  two  spaces ", " leading", "\ttab\t\t", "\n\n\n", "\r\n mixed \r", "\u00a0no break", "e\u0301 and \u00e9"),
    *("नमस्ते", "สวัสดี", "\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7", "\ufb01 \ufb03 \u2460"),
    *("don 't , do .", "\u0004\u0006", "\U00040000", "\u200b\ufeff", "\uff21\u3000\uff11"),
)

Pieces = Sequence[bytes]


def classify(own: Pieces, other: Pieces, initial: bool = False) -> str | None:
    """Name the class of two encodings of one text.

    Parameters
    ----------
    own, other : sequence of bytes
        The tokens' bytes of the two encodings.
    initial : bool
        Whether the word begins a sentence, where a capital says nothing.

    Returns
    -------
    str or None
        One of `CLASSES`; None where the texts differ in more than white space around them, or the encodings are equal.
    """
    left, right = b"".join(own), b"".join(other)
    if list(own) == list(other) or left.strip() != right.strip():
        return None
    if left != right:
        edges = left.removesuffix(left.lstrip()) + right.removesuffix(right.lstrip())
        if b"\n" in edges or b"\r" in edges:
            return CLASSES[2]
        # One token becomes one token: the boundary moved; else white space left or joined a token.
        return CLASSES[0] if len(own) == len(other) else CLASSES[1]
    if [piece.strip() for piece in own if piece.strip()] == [piece.strip() for piece in other if piece.strip()]:
        return CLASSES[1]
    word = left.strip().decode(errors="replace")
    cuts = _cuts(other) - _cuts(own) or _cuts(own) - _cuts(other)
    parts = [(word[: len(head)], word[len(head) :]) for head in _heads(left.strip(), cuts)]
    letters = [char for char in word if char.isalpha()]
    if len(letters) > 1 and all(char.isupper() for char in letters):
        return CLASSES[6]
    if any(tail in TAILS for _, tail in parts):
        return CLASSES[7]
    if any(head.lower() in PREFIXES or tail.lower() in SUFFIXES for head, tail in parts):
        return CLASSES[5]
    if word[:1].isupper() and not initial:
        return CLASSES[4]
    return CLASSES[3]


def _cuts(pieces: Pieces) -> set[int]:
    """Inner borders of the tokens, in bytes from the first that is no white space."""
    lead, at, found = len(b"".join(pieces)) - len(b"".join(pieces).lstrip()), 0, set()
    for piece in pieces[:-1]:
        at += len(piece)
        if at > lead:
            found.add(at - lead)
    return found


def _heads(data: bytes, cuts: set[int]) -> list[str]:
    return [data[:cut].decode(errors="replace") for cut in sorted(cuts)]


def alternatives(vocabulary: Collection[bytes], word: str, own: Pieces) -> list[list[bytes]]:
    """Return simple alternative encodings of a word: other white space, and every cut in two of the vocabulary."""
    bare = word.strip().encode()
    lead = word.encode().removesuffix(word.lstrip().encode())
    found: list[list[bytes]] = []
    for space in (b"", b" ", b"\n"):
        if space != lead and space + bare in vocabulary:
            found.append([space + bare])
        if space and space in vocabulary and bare in vocabulary:
            found.append([space, bare])
    whole = lead + bare
    if whole in vocabulary and len(own) > 1:
        found.append([whole])
    for cut in range(len(lead) + 1, len(whole)):
        if whole[cut] & 0xC0 != 0x80 and whole[:cut] in vocabulary and whole[cut:] in vocabulary:
            found.append([whole[:cut], whole[cut:]])
    return [pieces for pieces in found if pieces != list(own)]


def encodings(vocabulary: Collection[bytes], data: bytes) -> int:
    """Count all sequences of ordinary tokens that spell some bytes."""
    ways = [1] + [0] * len(data)
    for stop in range(1, len(data) + 1):
        ways[stop] = sum(ways[start] for start in range(stop) if ways[start] and data[start:stop] in vocabulary)
    return ways[-1]


def log10_encodings(vocabulary: Collection[bytes], data: bytes) -> float:
    """Return the decimal logarithm of `encodings`; -inf where the vocabulary cannot spell the bytes."""
    count = encodings(vocabulary, data)
    return math.log10(count) if count else -math.inf
