"""Tokens of two vocabularies as strings: cut by each other, equal, or alike by name."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

import numpy as np

from tokenary.hf.tokenizer import Vocabulary


def piece_weights(count: int) -> np.ndarray:
    """Return the weights of the pieces of one token, 0.9 * 0.1^i, normalised."""
    raw = 0.9 * 0.1 ** np.arange(count)
    return raw / raw.sum()


def equal_tokens(student: Vocabulary, teacher: Vocabulary) -> np.ndarray:
    """Return the teacher token that spells each student token, (V_S,) int64; -1 for none.

    Of several that spell the same bytes it is the one that is also written alike, so that equal vocabularies are
    matched one to one.
    """
    written = {content: i for i, content in teacher.special.items()}
    both = {(teacher.spellings[i], piece): i for piece, i in teacher.tokenizer.get_vocab().items()}
    found = np.full(student.size, -1, np.int64)
    for piece, i in student.tokenizer.get_vocab().items():
        data = student.spellings[i]
        found[i] = both.get((data, piece), teacher.id_of.get(data, -1)) if data else written.get(piece, -1)
    return found


def cuts(source: Vocabulary, target: Vocabulary, most: int) -> tuple[np.ndarray, ...]:
    """Cut every ordinary token with the other vocabulary: its id, the piece, the weight."""
    tables = [piece_weights(count) for count in range(most + 1)]
    owners: list[int] = []
    found: list[int] = []
    weights: list[np.ndarray] = [np.zeros(0)]
    for i, data in enumerate(source.spellings):
        if data and not _marked(data):
            ids = target.pieces(data)[:most]
            owners += [i] * len(ids)
            found += ids
            weights.append(tables[len(ids)])
    return np.array(owners, np.int64), np.array(found, np.int64), np.concatenate(weights)


def _marked(data: bytes) -> bool:
    return data.startswith(b"<|") and data.endswith(b"|>")


def _named(vocabulary: Vocabulary) -> list[tuple[int, str]]:
    """Special tokens, and ordinary ones written like ``<|name|>``."""
    marked = [(i, data.decode(errors="replace")) for i, data in enumerate(vocabulary.spellings) if _marked(data)]
    return sorted([*vocabulary.special.items(), *marked])


def alike(student: Vocabulary, teacher: Vocabulary, least: float, most: int) -> tuple[np.ndarray, ...]:
    """Pair special tokens by likeness."""
    found: list[tuple[int, int, float]] = []
    others = [(j, name, _words(name)) for j, name in _named(teacher)]
    for i, name in _named(student):
        words, matcher = _words(name), SequenceMatcher(None, "", name, autojunk=False)
        scored: list[tuple[float, int]] = []
        for j, other, their in others:
            jaccard = 0.4 * len(words & their) / max(len(words | their), 1)
            matcher.set_seq1(other)
            if 0.6 * matcher.quick_ratio() + jaccard >= least:  # a bound that is quick
                score = 0.6 * matcher.ratio() + jaccard
                scored += [(score, j)] if score >= least else []
        scored.sort(key=lambda pair: (-pair[0], pair[1]))
        found += [(i, j, 0.8 * score) for score, j in scored[:most]]
    table = np.array(found, np.float64).reshape(-1, 3)
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]


def _words(name: str) -> set[str]:
    return {word for word in re.sub(r"[<>|_]", " ", name.lower()).split() if len(word) > 2}
