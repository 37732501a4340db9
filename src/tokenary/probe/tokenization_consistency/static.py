"""What a tokenizer makes possible, with no model.

How many encodings a word has, which texts do not come back, and where a cut changes the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tokenary.core.encodings import ODD, log10_encodings
from tokenary.core.seeding import substream

Encode = Callable[[str], list[int]]

#: Words whose encodings are counted for every tokenizer; the last two are of scripts that few vocabularies know well.
WORDS = (" the", " February", " tokenization", " internationalization", " self_attention", " Straße", " नमस्ते", " สวัสดี")


def lengths(vocabulary: Collection[bytes], data: bytes) -> Counter[int]:
    """Count the encodings of some bytes by their number of tokens."""
    ways: list[Counter[int]] = [Counter({0: 1}), *(Counter() for _ in data)]
    for stop in range(1, len(data) + 1):
        for start in range(stop):
            if ways[start] and data[start:stop] in vocabulary:
                for tokens, count in ways[start].items():
                    ways[stop][tokens + 1] += count
    return ways[-1]


def enumerate_encodings(vocabulary: Collection[bytes], data: bytes, most: int) -> list[list[bytes]]:
    """Return the encodings of some bytes, those of few tokens first, at most so many."""
    reach: list[set[int]] = [set() for _ in data] + [{0}]  # numbers of tokens that can write the rest
    for start in reversed(range(len(data))):
        stops = [stop for stop in range(start + 1, len(data) + 1) if data[start:stop] in vocabulary]
        reach[start] = {1 + tokens for stop in stops for tokens in reach[stop]}
    found: list[list[bytes]] = []

    def extend(pieces: list[bytes], at: int, left: int) -> None:
        if not left and len(found) < most:
            found.append(pieces)
        for stop in range(len(data), at, -1) if left and len(found) < most else ():
            if left - 1 in reach[stop] and data[at:stop] in vocabulary:
                extend([*pieces, data[at:stop]], stop, left - 1)

    for tokens in sorted(reach[0]):
        extend([], 0, tokens)
    return found


def word_counts(vocabulary: Collection[bytes], word: str, own: Sequence[bytes]) -> dict[str, Any]:
    """Return how many encodings a word has, and where its own stands among them by length."""
    counts = lengths(vocabulary, word.encode())
    return {
        "word": word,
        "encodings": sum(counts.values()),
        "log10": log10_encodings(vocabulary, word.encode()) if counts else None,
        "tokens": len(own),
        "shortest": min(counts, default=None),
        "longest": max(counts, default=None),
        "rank": 1 + sum(count for tokens, count in counts.items() if tokens < len(own)),
    }


def lossy(tokenizer: Any, encode: Encode) -> dict[str, list[str]]:
    """Return the odd strings that do not come back, with and without transformers' clean-up of white space."""
    found: dict[str, list[str]] = {"plain": [], "clean_up": []}
    for text in ODD:
        ids = encode(text)
        for name, clean in (("plain", False), ("clean_up", True)):
            if tokenizer.decode(ids, clean_up_tokenization_spaces=clean) != text:
                found[name].append(text)
    return found


def missing_bytes(vocabulary: Collection[bytes]) -> list[int]:
    """Return the bytes that no token stands for alone."""
    return [byte for byte in range(256) if bytes([byte]) not in vocabulary]


def stability(encode: Encode, text: str, cuts: int, seed: int, spaces: bool, around: int = 100) -> tuple[int, int]:
    """Count the cuts of a text at which both sides encode as they do together.

    Parameters
    ----------
    encode : callable
        Text to ids, without special tokens.
    text : str
        Longer than twice `around`.
    cuts : int
        How many are drawn.
    seed : int
        Of the draw.
    spaces : bool
        Only before a space, instead of at any character.
    around : int
        Characters on both sides that are looked at.

    Returns
    -------
    tuple of int
        Stable cuts, and all.
    """
    inner = range(around, len(text) - around)
    places = [i for i in inner if not spaces or text[i] == " "]
    drawn = substream(seed, "cuts", int(spaces)).choice(places, min(cuts, len(places)), replace=False).tolist()
    stable = sum(
        encode(text[at - around : at]) + encode(text[at : at + around]) == encode(text[at - around : at + around])
        for at in drawn
    )
    return stable, len(drawn)
