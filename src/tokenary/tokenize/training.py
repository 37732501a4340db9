"""Training byte-level vocabularies: with the Rust trainers, and merge by merge over an array of ids.

All give a `TextTokenizer`; those of merges number the 256 bytes in order, then what the merges make, in order.
`PATTERN` keeps combining marks inside words: a pattern that cuts there takes whole scripts apart, which then looks like
inequity between languages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numba
import numpy as np
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenary.core.errors import InputError, OptionError
from tokenary.core.spelling import CHAR_OF
from tokenary.tokenize.base import TextTokenizer

_WORD = r"[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*"
_REST = r" ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERN = rf" ?{_WORD}|{_REST}"
#: Words with single spaces between them stay together; line ends, digits and punctuation part as in `PATTERN`.
SUPERWORD_PATTERN = rf" ?{_WORD}(?: {_WORD})*|{_REST}"

#: Training cuts longer pieces: the trainers of `tokenizers` take time quadratic in the length of a piece.
_LONGEST = r"[\s\S]{1,256}"

Pairs = list[tuple[int, int]]


def byte_level(merges: Pairs, pattern: str | None = PATTERN, name: str = "trained") -> TextTokenizer:
    """Make a tokenizer of merges.

    Parameters
    ----------
    merges : list of (int, int)
        Each makes a token of two earlier ones; 0 to 255 are the bytes, and a token is new, with the next number, unless
        an earlier merge makes the same bytes.
    pattern : str, optional
        Regular expression of the pieces that merges stay within; None for the whole text.
    name : str
        For people.
    """
    pieces = ["".join(CHAR_OF[byte] for byte in piece) for piece in pieces_of(merges)]
    named = [(pieces[left], pieces[right]) for left, right in merges]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=named))
    _prepare(made, pattern)
    return TextTokenizer(made.to_str(), name)


def pieces_of(merges: Pairs) -> list[bytes]:
    """Return the bytes of every token of `byte_level`, by its number."""
    pieces = [bytes([byte]) for byte in range(256)]
    made = set(pieces)
    for left, right in merges:
        piece = pieces[left] + pieces[right]
        if piece not in made:
            pieces.append(piece)
            made.add(piece)
    return pieces


def truncated(merges: Pairs, vocab_size: int) -> Pairs:
    """Return the merges of a smaller vocabulary: training to that size would have stopped after them."""
    made = {bytes([byte]) for byte in range(256)}
    pieces = pieces_of(merges)
    for i, (left, right) in enumerate(merges):
        if len(made) >= vocab_size:
            return merges[:i]
        made.add(pieces[left] + pieces[right])
    return merges


def with_special(tokenizer: TextTokenizer, tokens: Sequence[str]) -> TextTokenizer:
    """Return a tokenizer with special tokens behind its others; a text that spells one is text."""
    made = Tokenizer.from_str(tokenizer.to_json())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return TextTokenizer(made.to_str(), tokenizer.name)


def usage(tokenizer: TextTokenizer, texts: Sequence[str]) -> dict[str, float | int]:
    """Count tokens of texts, bytes and characters a token, and the share of tokens that hold a space inside."""
    rows = tokenizer.encode_batch(texts)
    used = np.bincount(np.concatenate([*rows, np.zeros(0, np.int32)]), minlength=tokenizer.id_limit)
    total = int(used.sum())
    if not total:
        raise InputError("the texts hold no token")
    inner = sum(int(used[i]) for i in np.flatnonzero(used) if b" " in tokenizer.token_bytes(int(i)).strip())
    return {
        "tokens": total,
        "bytes_per_token": sum(len(text.encode()) for text in texts) / total,
        "chars_per_token": sum(map(len, texts)) / total,
        "across_words": inner / total,
    }


def _prepare(tokenizer: Tokenizer, *patterns: str | None) -> None:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns if pattern is not None]
    steps = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    algorithm: Literal["bpe", "unigram"] = "bpe",
    pattern: str | None = PATTERN,
    name: str = "trained",
    progress: bool = False,
) -> TextTokenizer:
    """Train a vocabulary with the trainers of `tokenizers`.

    Parameters
    ----------
    texts : iterable of str
        Read once.
    vocab_size : int
        Tokens, the 256 bytes included; a small corpus may yield fewer.
    algorithm : {"bpe", "unigram"}
        Which.
    pattern : str, optional
        See `byte_level`.
    name : str
        For people.
    progress : bool
        Draw the progress bar of `tokenizers`.

    Raises
    ------
    OptionError
        Fewer than 257 tokens are asked for.
    InputError
        The texts are empty.
    """
    if vocab_size < 257:
        raise OptionError("vocab_size", vocab_size, "at least 257: the bytes are 256")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if algorithm == "bpe":
        made = Tokenizer(models.BPE())
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=progress, special_tokens=[]
        )
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=progress, special_tokens=[]
        )
    _prepare(made, pattern, _LONGEST)
    _train(made, _not_empty(texts), trainer)
    if algorithm == "unigram":
        _prepare(made, pattern)
        return TextTokenizer(made.to_str(), name)
    return byte_level(merges_of(TextTokenizer(made.to_str(), name)), pattern, name)


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    some = False
    for text in texts:
        some = some or bool(text.strip())
        yield text
    if not some:
        raise InputError("nothing to train on: the texts are empty")


def _train(tokenizer: Tokenizer, texts: Iterator[str], trainer: trainers.Trainer) -> None:
    """Train beside this thread, which waits and hears Ctrl-C; the Rust of `tokenizers` does not."""
    raised: list[BaseException] = []
    cancelled, merging = threading.Event(), threading.Event()

    def fed() -> Iterator[str]:
        for text in texts:
            if cancelled.is_set():
                raise KeyboardInterrupt
            yield text
        merging.set()

    def target() -> None:
        try:
            tokenizer.train_from_iterator(fed(), trainer)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)  # merging, it cannot be stopped, and is not waited for
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except KeyboardInterrupt:
        cancelled.set()
        while thread.is_alive() and not merging.is_set():  # it comes back to Python, which must not be gone by then
            thread.join(0.1)
        raise
    if raised:
        raise raised[0]


def merges_of(tokenizer: TextTokenizer) -> Pairs:
    """Return the merges of a byte-level BPE tokenizer in the numbering of `byte_level`."""
    ids = {char: byte for byte, char in CHAR_OF.items()}
    found: Pairs = []
    for merge in tokenizer.config["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return found


# ------------------------------------------------------------------------------------ merge by merge


def to_array(texts: Iterable[str], pattern: str | None = None) -> np.ndarray:
    """Return the bytes of texts as int32, -1 wherever no merge may cross."""
    split = None if pattern is None else regex.compile(pattern)
    found: list[np.ndarray] = []
    border = np.array([-1], np.int32)
    for text in texts:
        pieces = [text] if split is None else [match.group() for match in split.finditer(text)]
        for piece in pieces:
            found += [np.frombuffer(piece.encode(), np.uint8).astype(np.int32), border]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


class PairTable:
    """How often every two neighbours occur in an array of ids, kept while pairs are merged.

    Parameters
    ----------
    ids : ndarray
        int32, -1 at borders.
    """

    def __init__(self, ids: np.ndarray) -> None:
        size = 1 << 12
        while size < 4 * len(ids):
            size *= 2
        size = min(size, 1 << 22)
        self.ids = np.ascontiguousarray(ids, np.int32)
        self.keys, self.counts = np.full(size, -1, np.int64), np.zeros(size, np.int64)
        while not _count(self.ids, self.keys, self.counts):
            self._grow()
        self.banned: set[int] = set()

    def _grow(self) -> None:
        self.keys, self.counts = np.full(2 * len(self.keys), -1, np.int64), np.zeros(2 * len(self.counts), np.int64)

    def top(self, count: int) -> list[tuple[int, int, int]]:
        """Return the `count` most frequent pairs: left, right, how often; ties by lower ids."""
        if count == 1 and not self.banned:
            slot = _best(self.keys, self.counts)
            return [] if slot < 0 else [self._pair(slot)]
        wanted = count + len(self.banned)
        slots = np.flatnonzero(self.counts > 0)
        if len(slots) > wanted:
            least = np.partition(self.counts[slots], len(slots) - wanted)[len(slots) - wanted]
            slots = slots[self.counts[slots] >= least]
        order = np.lexsort((self.keys[slots], -self.counts[slots]))
        found = (self._pair(int(slot)) for slot in slots[order] if int(self.keys[slot]) not in self.banned)
        return [pair for pair, _ in zip(found, range(count), strict=False)]

    def _pair(self, slot: int) -> tuple[int, int, int]:
        key = int(self.keys[slot])
        return key >> 32, key & 0xFFFFFFFF, int(self.counts[slot])

    def ban(self, left: int, right: int) -> None:
        """Never name this pair again."""
        self.banned.add(left << 32 | right)

    def merge(self, left: int, right: int, new: int) -> int:
        """Replace a pair everywhere, from left to right; return how often."""
        ids, full = merge(self.ids, left, right, new), 2 * int((self.keys >= 0).sum()) > len(self.keys)
        if full:  # counted anew, so that pairs that are gone make room
            done = len(self.ids) - len(ids)
            banned = self.banned
            self.__init__(ids)  # type: ignore[misc]
            self.banned = banned
            return done
        done = _merge_counted(self.ids, left, right, new, self.keys, self.counts)
        self.ids = ids
        return done


@numba.njit(cache=True, nogil=True)
def _slot(key: int, keys: np.ndarray) -> int:
    mask = len(keys) - 1
    slot = (key * -7046029254386353131 >> 22) & mask
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@numba.njit(cache=True, nogil=True)
def _add(left: int, right: int, amount: int, keys: np.ndarray, counts: np.ndarray) -> int:
    if left < 0 or right < 0:
        return 0
    key = left * 4294967296 + right
    slot = _slot(key, keys)
    new = 1 if keys[slot] == -1 else 0
    keys[slot] = key
    counts[slot] += amount
    return new


@numba.njit(cache=True, nogil=True)
def _count(ids: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> bool:
    used = 0
    for i in range(len(ids) - 1):
        used += _add(ids[i], ids[i + 1], 1, keys, counts)
        if 2 * used > len(keys):
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _best(keys: np.ndarray, counts: np.ndarray) -> int:
    best = -1
    for slot in range(len(keys)):
        if counts[slot] > 0 and (
            best < 0 or counts[slot] > counts[best] or (counts[slot] == counts[best] and keys[slot] < keys[best])
        ):
            best = slot
    return best


@numba.njit(cache=True, nogil=True)
def merge(ids: np.ndarray, left: int, right: int, new: int) -> np.ndarray:
    """Replace a pair everywhere in an array of ids, from left to right."""
    out = np.empty(len(ids), np.int32)
    n, i = 0, 0
    while i < len(ids):
        if ids[i] == left and i + 1 < len(ids) and ids[i + 1] == right:
            out[n] = new
            i += 2
        else:
            out[n] = ids[i]
            i += 1
        n += 1
    return out[:n].copy()


@numba.njit(cache=True, nogil=True)
def _merge_counted(ids: np.ndarray, left: int, right: int, new: int, keys: np.ndarray, counts: np.ndarray) -> int:
    """Keep the counts in step with `merge`."""
    done, last, i = 0, -1, 0
    while i < len(ids):
        if ids[i] == left and i + 1 < len(ids) and ids[i + 1] == right:
            after = ids[i + 2] if i + 2 < len(ids) else -1
            _add(last, left, -1, keys, counts)
            _add(left, right, -1, keys, counts)
            _add(right, after, -1, keys, counts)
            _add(last, new, 1, keys, counts)
            _add(new, after, 1, keys, counts)
            last = new
            done += 1
            i += 2
        else:
            last = ids[i]
            i += 1
    return done


def word_count(data: bytes) -> int:
    """Count the words that a token holds, cut ones included."""
    return len(regex.findall(_WORD, data.decode(errors="ignore")))
