"""How a vocabulary cuts a word, by bytes: what each token covers, and other ways to cut the same word."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from tokenary.hf.tokenizer import Vocabulary
from tokenary.probe.charbench.items import POSITION, Item


@dataclass(frozen=True)
class Cut:
    """A word in tokens.

    Attributes
    ----------
    word : str
        The word.
    ids : tuple of int
        Its tokens.
    ends : tuple of int
        Bytes of the word's UTF-8 up to the end of each token.
    """

    word: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def token_at(self, index: int) -> int:
        """Return which token holds the first byte of a character."""
        byte = len(self.word[:index].encode())
        return next(number for number, end in enumerate(self.ends) if byte < end)

    def characters(self, number: int) -> int:
        """Count the characters that a token holds at least a byte of."""
        start, end = ([0, *self.ends][number], self.ends[number])
        borders = [0, *accumulate(len(char.encode()) for char in self.word)]
        return sum(a < end and start < b for a, b in pairwise(borders))


def cut(vocabulary: Vocabulary, word: str) -> Cut | None:
    """Cut a bare word as its tokenizer does, without special tokens and without a lone word-start mark.

    Returns
    -------
    Cut or None
        None where the tokens do not spell the word: an unknown character, or a tokenizer that changes letters.
    """
    ids = list(vocabulary.tokenizer.encode(word, add_special_tokens=False).ids)
    pieces = [vocabulary.spellings[i] for i in ids]
    if pieces and pieces[0].startswith(b" "):
        pieces[0] = pieces[0][1:]
        if not pieces[0]:
            ids, pieces = ids[1:], pieces[1:]
    return _of(word, ids, pieces)


def characters(vocabulary: Vocabulary, word: str) -> Cut | None:
    """Cut a word into its characters, and those that are no token into bytes; None if a byte is no token."""
    pieces: list[bytes] = []
    for char in word:
        data = char.encode()
        pieces += [data] if data in vocabulary.id_of else [bytes([byte]) for byte in data]
    if any(piece not in vocabulary.id_of for piece in pieces):
        return None
    return _of(word, [vocabulary.id_of[piece] for piece in pieces], pieces)


def split_token(vocabulary: Vocabulary, usual: Cut, number: int) -> Cut | None:
    """Cut one token of a word in two, as evenly as the vocabulary allows; None where it has no such two tokens."""
    start, end = ([0, *usual.ends][number], usual.ends[number])
    data = usual.word.encode()
    for border in sorted(range(start + 1, end), key=lambda place: abs(2 * place - start - end)):
        parts = [vocabulary.id_of.get(data[start:border]), vocabulary.id_of.get(data[border:end])]
        if None not in parts:
            ids = (*usual.ids[:number], *parts, *usual.ids[number + 1 :])
            ends = (*usual.ends[:number], border, *usual.ends[number:])
            return Cut(usual.word, ids, ends)  # type: ignore[arg-type]
    return None


def resplit(vocabulary: Vocabulary, usual: Cut, item: Item) -> tuple[Cut, Cut] | None:
    """Split the token that holds the answer, and in a second copy another one; None where either cannot be split.

    Both copies have one token more than usual, so that what they differ in is which token became shorter.
    """
    if item.task not in POSITION:
        return None
    target = usual.token_at(item.gold)
    others = sorted((n for n in range(len(usual.ids)) if n != target), key=lambda n: -usual.characters(n))
    first = split_token(vocabulary, usual, target) if usual.characters(target) > 1 else None
    second = (split_token(vocabulary, usual, n) for n in others if usual.characters(n) > 1)
    other = next((made for made in second if made is not None), None)
    return None if first is None or other is None else (first, other)


def features(item: Item, usual: Cut) -> dict[str, float]:
    """Describe an item: its word, its answer and its tokens. ``target_token_length`` is for positions only.

    The target token is the one that holds the character at the answer; its length is in characters.
    """
    length, tokens = len(item.word), len(usual.ids)
    found = {
        "word_length": float(length),
        "number_of_tokens": float(tokens),
        "compression": length / tokens,
        "gold": float(item.gold),
        "gold_share": item.gold / length,
        "unique_characters": float(len(set(item.word))),
    }
    if item.task in POSITION:
        found["target_token_length"] = float(usual.characters(usual.token_at(item.gold)))
    return found


def _of(word: str, ids: list[int], pieces: list[bytes]) -> Cut | None:
    if b"".join(pieces) != word.encode():
        return None
    return Cut(word, tuple(ids), tuple(accumulate(map(len, pieces))))
