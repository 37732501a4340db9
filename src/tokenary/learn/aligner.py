"""Two tokenizers over the same texts, aligned chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tokenary.hf.tokenizer import Vocabulary
from tokenary.learn.alignment import AlignedText, Chunks, align_spans, canonical


class Aligner:
    """Tokenizes texts twice and aligns them.

    Parameters
    ----------
    student, teacher : Vocabulary
        Of both models; their roles pair special tokens.
    special : bool
        Put the special tokens of each tokenizer around a text.
    """

    def __init__(self, student: Vocabulary, teacher: Vocabulary, special: bool = True) -> None:
        self.vocabularies, self.special = (student, teacher), special
        self.tokenizers = (_untrimmed(student.tokenizer), _untrimmed(teacher.tokenizer))

    def align(self, text: str) -> AlignedText:
        """Tokenize and align one text."""
        return self.align_batch([text])[0]

    def align_batch(self, texts: Sequence[str]) -> list[AlignedText]:
        """Tokenize texts, in parallel, and align each."""
        left, right = (t.encode_batch(list(texts), add_special_tokens=self.special) for t in self.tokenizers)
        return [self._align(a, b) for a, b in zip(left, right, strict=True)]

    def _align(self, *encodings: Any) -> AlignedText:
        ordinary = [[i for i, special in enumerate(e.special_tokens_mask) if not special] for e in encodings]
        spans = [[e.offsets[i] for i in kept] for e, kept in zip(encodings, ordinary, strict=True)]
        student, teacher, count = align_spans(*spans)
        spelled = [self._spelled(side, encodings[side].ids) for side in (0, 1)]
        texts = [[b""] * count, [b""] * count]
        found = [[-1] * len(e.ids) for e in encodings]
        for side, chunks in enumerate((student, teacher)):
            for i, chunk in zip(ordinary[side], chunks, strict=True):
                found[side][i] = chunk
                texts[side][chunk] += spelled[side][i]
        correct = [canonical(a) == canonical(b) for a, b in zip(*texts, strict=True)]
        for i, j in self._partners(encodings):
            found[0][i] = found[1][j] = len(correct)
            correct.append(True)
        return AlignedText(encodings[0].ids, encodings[1].ids, found[0], found[1], correct)

    def _spelled(self, side: int, ids: Sequence[int]) -> list[bytes]:
        vocabulary = self.vocabularies[side]
        return [vocabulary.spellings[i] or vocabulary.special.get(i, "").encode() for i in ids]

    def _partners(self, encodings: Sequence[Any]) -> list[tuple[int, int]]:
        """Pair special tokens that a tokenizer put around the text: those of one role or text, in their order."""
        named: list[list[tuple[str, int]]] = []
        for vocabulary, e in zip(self.vocabularies, encodings, strict=True):
            role_of = {content: role for role, content in vocabulary.roles.items()}
            special = [i for i, flag in enumerate(e.special_tokens_mask) if flag]
            contents = [(vocabulary.special.get(e.ids[i], ""), i) for i in special]
            named.append([(role_of.get(content, content), i) for content, i in contents])
        pairs, at = [], 0
        for role, i in named[0]:
            place = next((n for n in range(at, len(named[1])) if named[1][n][0] == role), None)
            if place is not None:
                pairs.append((i, named[1][place][1]))
                at = place + 1
        return pairs


def collate(texts: Sequence[AlignedText], pad: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor, Chunks]:
    """Pad aligned texts behind.

    Parameters
    ----------
    texts : sequence of AlignedText
        B of them.
    pad : (int, int)
        Ids of the padding of student and teacher.

    Returns
    -------
    student_ids, teacher_ids : Tensor
        (B, N) and (B, M) int64.
    chunks : Chunks
        -1 at padding.
    """
    return (
        _padded([text.student_ids for text in texts], pad[0]),
        _padded([text.teacher_ids for text in texts], pad[1]),
        Chunks(
            _padded([text.student for text in texts], -1),
            _padded([text.teacher for text in texts], -1),
            _padded([text.correct for text in texts], False).bool(),
        ),
    )


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    width = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.int64)


def _untrimmed(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer so that a token's span has its spaces, which some post-processors take off."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(item) for item in part]
        if not isinstance(part, dict):
            return part
        return {key: False if key == "trim_offsets" else changed(value) for key, value in part.items()}

    config = json.loads(tokenizer.to_str())
    for key in ("pre_tokenizer", "post_processor"):
        config[key] = changed(config.get(key))
    made = Tokenizer.from_str(json.dumps(config))
    made.no_truncation()
    made.no_padding()
    return made
