"""Phantom-token masking: what would write a target again is banned, token by token.

The paper sets to minus infinity every token that starts an encoding of the target. Such tokens start many other words
too. Here a token is banned only where it completes the target: the text so far ends with a beginning of the word, and
the token writes the rest of it and no letter more. Whatever the tokens before were, no encoding of the word gets past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import regex
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor

from tokenary.core.seeding import substream
from tokenary.hf.tokenizer import Vocabulary
from tokenary.probe.tokenization_consistency.alignment import SPACE, Text
from tokenary.probe.tokenization_consistency.writing import Ban

What = Literal["surface", "phantoms"]
LIKELIEST = 50  # the random control draws among so many
_LETTER = regex.compile(r"[\p{L}\p{M}\p{N}_]")


@dataclass(frozen=True)
class Target:
    """A word that is to be replaced.

    Parameters
    ----------
    word : bytes
        Its letters.
    before : bytes
        The word before it in the passage, which it may be written onto without a space.
    own, marked : tuple of int
        Its ids in the passage with the white space before it; and where it stands in brackets.
    """

    word: bytes
    before: bytes
    own: tuple[int, ...]
    marked: tuple[int, ...]


class Completions:
    """The tokens that complete a word, for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.spellings = vocabulary.spellings
        self._whole: dict[bytes, list[int]] = {}
        self._beyond: dict[bytes, list[int]] = {}
        for i, data in enumerate(self.spellings):
            if data:
                self._whole.setdefault(data, []).append(i)
            for stop in range(1, len(data)):
                if _ends_in_word(data[:stop]) and not _begins_in_word(data[stop:]):
                    self._beyond.setdefault(data[:stop], []).append(i)
        self._leads = {data[: len(data) - len(data.lstrip(SPACE))] for data in self._whole} - {b""}
        self._led: dict[bytes, set[int]] = {}

    def of(self, rest: bytes) -> list[int]:
        """Return the tokens that write these bytes and then end, or go on with what is no part of a word."""
        return self._whole.get(rest, []) + self._beyond.get(rest, [])

    def led(self, word: bytes) -> set[int]:
        """Return the tokens of white space and the whole word."""
        if word not in self._led:
            self._led[word] = {i for lead in self._leads for i in self.of(lead + word)}
        return self._led[word]

    def banned(self, ids: Sequence[int], target: Target, what: What = "surface") -> set[int]:
        """Return the tokens that would complete a target behind these.

        Parameters
        ----------
        ids : sequence of int
            Written so far.
        target : Target
            The word.
        what : {"surface", "phantoms"}
            Every encoding of it; or only those that are not its own, so that the passage can still be copied.
        """
        tail = list(ids[-len(target.word + target.before) - 4 :])
        data, word = b"".join(self.spellings[i] for i in tail), target.word
        found = set(self.led(word))
        for n in range(len(word)):
            before = data[: len(data) - n]
            if data.endswith(word[:n]) and (
                not _ends_in_word(before) or (target.before and before.endswith(target.before))
            ):
                found.update(self.of(word[n:]))
        if what == "phantoms":
            found = {i for i in found if self._path([*tail, i], word) not in (target.own, target.marked)}
        return found

    def _path(self, ids: Sequence[int], word: bytes) -> tuple[int, ...]:
        """Return the ids of the last occurrence of a word."""
        text = Text(ids, self.spellings)
        start = text.data.rindex(word)
        return text.span(start, start + len(word)).ids


def ban(completions: Completions, targets: Sequence[Target], what: What) -> Ban:
    """Return the mask of one answer."""

    def banned(ids: Sequence[int], logits: Tensor) -> list[int]:
        return sorted(set().union(*(completions.banned(ids, target, what) for target in targets)))

    return banned


def ban_at_random(mask: Ban, seed: int, row: int) -> Ban:
    """Return a control: of the likeliest tokens as many as the mask takes, others in their stead."""

    def banned(ids: Sequence[int], logits: Tensor) -> list[int]:
        likely = logits.topk(min(LIKELIEST, len(logits))).indices.tolist()
        hit = set(mask(ids, logits)) & set(likely)
        rest = [token for token in likely if token not in hit]
        count = min(len(hit), len(rest) - 1)
        return list(substream(seed, "random mask", row, len(ids)).choice(rest, count, replace=False)) if count else []

    return banned


class PhantomMask(LogitsProcessor):
    """The masks of a batch, for ``model.generate``.

    Parameters
    ----------
    bans : sequence of Ban
        One a row.
    prompt_length : int
        Columns of the (padded) prompts, which are not looked at.
    """

    def __init__(self, bans: Sequence[Ban], prompt_length: int) -> None:
        self.bans, self.prompt_length = bans, prompt_length

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Return the scores (B, V) with minus infinity at banned tokens."""
        scores = scores.clone()  # type: ignore[assignment]
        for row, mask in enumerate(self.bans):
            banned = mask(input_ids[row, self.prompt_length :].tolist(), scores[row])
            scores[row, banned] = -torch.inf
        return scores


def _begins_in_word(data: bytes) -> bool:
    """Whether the first character belongs to a word; one that is not whole counts."""
    if data[0] < 0x80:
        return bool(_LETTER.match(chr(data[0])))
    return bool(_LETTER.match(data[:4].decode(errors="ignore")[:1] or "x"))


def _ends_in_word(data: bytes) -> bool:
    """Whether the last character belongs to a word; one that is not whole counts."""
    if not data:
        return False
    if data[-1] < 0x80:
        return bool(_LETTER.match(chr(data[-1])))
    try:
        return bool(_LETTER.match(data[-4:].lstrip(bytes(range(0x80, 0xC0))).decode()[-1:]))
    except UnicodeDecodeError:
        return True
