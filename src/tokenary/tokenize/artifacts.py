"""Where a tokenizer gives one text several names: encodings beside its own, by class, and what does not come back.

The eight classes are those of phantom edits (arXiv 2601.14658), here as what a vocabulary makes possible, with no
model: a word is *exposed* to a class where an alternative encoding of that class exists whose text differs from the
word at most in the white space around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import regex

from tokenary.core.encodings import ODD, Pieces, alternatives, classify
from tokenary.core.spelling import is_byte
from tokenary.tokenize.base import TextTokenizer

WORD = regex.compile(r"\s?[\p{L}\p{M}\p{N}]+(?:['’\-][\p{L}\p{M}\p{N}]+)*")
LONGEST = 64  # bytes of a word, beyond which it is not looked at


def exposure(tokenizer: TextTokenizer, word: str, own: Pieces) -> set[str]:
    """Return the classes that a word is exposed to."""
    classes = (classify(own, other) for other in alternatives(tokenizer.id_of, word, own))
    return {found for found in classes if found is not None}


def lossy_strings(tokenizer: TextTokenizer) -> list[str]:
    """Return those of a few odd strings that do not come back from encoding and decoding."""
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(ODD))
    return [text for text, back in zip(ODD, decoded, strict=True) if text != back]


def faults(tokenizer: TextTokenizer, texts: Sequence[str], rows: Sequence[np.ndarray]) -> list[tuple[str, str]]:
    """Return the texts that their ids do not come back as, and what comes back.

    Where a tokenizer decodes by joining bytes and they are those of the text, nothing need be decoded.
    """
    left = list(range(len(texts)))
    if tokenizer.spelling is not None:
        data, ends = tokenizer.spelling
        left = [i for i in left if not _spells(rows[i], data, ends, np.frombuffer(texts[i].encode(), np.uint8))]
    decoded = tokenizer.decode_batch([rows[i] for i in left])
    return [(texts[i], back) for i, back in zip(left, decoded, strict=True) if texts[i] != back]


@numba.njit(cache=True, nogil=True)
def _spells(ids: np.ndarray, data: np.ndarray, ends: np.ndarray, text: np.ndarray) -> bool:
    """Whether the bytes of tokens, none of them empty, are those of a text."""
    at = 0
    for id in ids:
        start = ends[id - 1] if id else 0
        if start == ends[id] or at + ends[id] - start > len(text):
            return False
        for place in range(start, ends[id]):
            if data[place] != text[at]:
                return False
            at += 1
    return at == len(text)


def unreachable(tokenizer: TextTokenizer) -> dict[str, list[int]]:
    """Find tokens that no text becomes.

    A token that turns up when its own text is encoded, alone or after a few contexts, is reachable. One that the model
    itself does not make of its own piece is unreachable: merges work the same inside a longer text. The rest is held up
    by the normalizer or the pre-tokenizer. Tokens that are part of a character have no text: the model alone decides.

    Returns
    -------
    dict
        Ids under ``merges`` (the model never makes them), ``split`` (the steps before the model take them apart, in all
        contexts tried), and two that are no fault: ``fragments`` (parts of characters, reachable) and ``spare_bytes``
        (byte tokens of characters that have a token of their own).
    """
    added = set(tokenizer.tokenizer.get_added_tokens_decoder())
    texts: dict[int, str] = {}
    found: dict[str, list[int]] = {"merges": [], "split": [], "fragments": [], "spare_bytes": []}
    for i in tokenizer.ids:
        if i in added or i in tokenizer.special_ids or i == tokenizer.unk_id:
            continue
        try:
            texts[i] = tokenizer.token_bytes(i).decode()
        except UnicodeDecodeError:
            found["fragments" if _made(tokenizer, i) else "merges"].append(i)
    for context in ("", "a", " ", "\n", "1", ".", "a "):
        left = list(texts)
        for start in range(0, len(left), 4096):
            some = left[start : start + 4096]
            rows = tokenizer.encode_batch([context + texts[i] for i in some])
            for i, row in zip(some, rows, strict=True):
                if (row == i).any():
                    del texts[i]
    for i in texts:
        spare = is_byte(tokenizer.piece(i))
        found["spare_bytes" if spare else "split" if _made(tokenizer, i) else "merges"].append(i)
    return found


def _made(tokenizer: TextTokenizer, id: int) -> bool:
    """Whether the model makes this one token of its own piece."""
    piece = tokenizer.piece(id)
    if is_byte(piece):
        return True  # byte fallback: made of any character that is in no token
    try:
        return [token.id for token in tokenizer.tokenizer.model.tokenize(piece)] == [id]
    except Exception:  # tokenizers raises a bare Exception, for a piece outside the alphabet
        return False
