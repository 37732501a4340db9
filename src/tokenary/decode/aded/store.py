"""The trigram store: probabilities counted once from text."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from tokenary.core.errors import InputError

#: Bits a token id: three ids are counted as one 63-bit number.
BITS = 21
_BLOCK = 1 << 16


@dataclass(frozen=True)
class TrigramStore:
    """P(c | a, b) of the likeliest successors of every counted pair of tokens, as flat arrays.

    Parameters
    ----------
    keys : np.ndarray
        The pairs as ``a << BITS | b``, ascending, int64, (K,).
    starts : np.ndarray
        Successors of pair k lie at ``starts[k]:starts[k + 1]``, int64, (K + 1,).
    tokens : np.ndarray
        Successors, likeliest first, int32, (E,).
    scores : np.ndarray
        Their probabilities among all successors of the pair, pruned ones included, float32, (E,).

    Raises
    ------
    InputError
        If the arrays do not fit together.
    """

    keys: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        """Check the arrays: the compiled search reads them without bounds checks, and they may come from any file."""
        kinds = {"keys": np.int64, "starts": np.int64, "tokens": np.int32, "scores": np.float32}
        arrays = {name: getattr(self, name) for name in kinds}
        sound = (
            all(a.ndim == 1 and a.dtype == kinds[name] and a.flags.c_contiguous for name, a in arrays.items())
            and len(self.starts) == len(self.keys) + 1
            and len(self.tokens) == len(self.scores) == self.starts[-1]
            and self.starts[0] == 0
            and bool((np.diff(self.starts) > 0).all() and (np.diff(self.keys) > 0).all())
            and bool((self.tokens >= 0).all() and (self.keys >= 0).all())
            and bool(((self.scores > 0) & (self.scores <= 1)).all())
        )
        if not sound:
            raise InputError("the arrays of the trigram store do not fit together")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.starts.nbytes + self.tokens.nbytes + self.scores.nbytes

    @property
    def largest_token(self) -> int:
        """Largest token id that can be drafted, -1 if the store is empty."""
        return int(self.tokens.max(initial=-1))

    @property
    def fan_out(self) -> int:
        """Most successors of one pair."""
        return int(np.diff(self.starts).max(initial=0))

    def successors(self, a: int, b: int) -> dict[int, float]:
        """Return the successors of a pair and their probabilities, likeliest first."""
        at = int(np.searchsorted(self.keys, a << BITS | b))
        if at == len(self.keys) or self.keys[at] != a << BITS | b:
            return {}
        row = slice(self.starts[at], self.starts[at + 1])
        return dict(zip(self.tokens[row].tolist(), self.scores[row].tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a file of that name is replaced only once the new one is whole."""
        path = Path(path)
        arrays = {"keys": self.keys, "starts": self.starts, "tokens": self.tokens, "scores": self.scores}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            whole = Path(folder) / path.name
            save_file(arrays, whole, metadata={"format": "tokenary-trigrams", "version": "1"})
            os.replace(whole, path)

    @classmethod
    def load(cls, path: str | Path) -> TrigramStore:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If there is no such file or it is no trigram store.
        """
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError, InputError) as error:
            raise InputError(f"{path} is no trigram store: {error}") from None


def build_store(texts_token_ids: Iterable[Sequence[int] | np.ndarray], keep: int = 12) -> TrigramStore:
    """Count the trigrams of tokenised texts.

    Parameters
    ----------
    texts_token_ids : iterable of sequence of int
        Token ids of each text; texts shorter than three tokens have no trigram.
    keep : int
        Successors kept for each pair, the most frequent first, the smaller id first among equals. The probabilities
        are those before pruning.

    Raises
    ------
    InputError
        If an id is negative or does not fit into 21 bits, or `keep` is below 1.
    """
    if keep < 1:
        raise InputError(f"keep={keep}: a store keeps at least one successor a pair")
    packed = [np.empty(0, np.int64)]
    for text in texts_token_ids:
        ids = np.asarray(text, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >> BITS):
            raise InputError(f"a token id is negative or above {(1 << BITS) - 1}")
        if len(ids) >= 3:
            packed.append(ids[:-2] << 2 * BITS | ids[1:-1] << BITS | ids[2:])
    trigrams, counts = np.unique(np.concatenate(packed), return_counts=True)
    keys, first, pair, fan = np.unique(trigrams >> BITS, return_index=True, return_inverse=True, return_counts=True)
    scores = counts / np.bincount(pair, counts, len(keys))[pair]
    order = np.lexsort((-counts, pair))  # stable: equal counts stay in the order of the ids
    order = order[np.arange(len(order)) - first[pair] < keep]
    return TrigramStore(
        keys=keys,
        starts=np.concatenate([[0], np.cumsum(np.minimum(fan, keep))]).astype(np.int64),
        tokens=(trigrams[order] & ((1 << BITS) - 1)).astype(np.int32),
        scores=scores[order].astype(np.float32),
    )


def count_text(tokenizer: PreTrainedTokenizerBase, text: str, keep: int = 12) -> TrigramStore:
    """Tokenise one text and count its trigrams.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        That of the model to be drafted for.
    text : str
        It is tokenised in blocks of whole lines and counted as one sequence.
    keep : int
        See `build_store`.
    """
    blocks, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + _BLOCK) + 1 or len(text)
        blocks.append(text[start:stop])
        start = stop
    if not blocks:
        return build_store([], keep)
    ids = tokenizer(blocks, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return build_store([np.concatenate([np.asarray(block, np.int64) for block in ids])], keep)


def builtin_store(tokenizer: PreTrainedTokenizerBase) -> TrigramStore:
    """Count the text that is always there, or load it where this tokenizer was counted before.

    That is the prose that ships with Tokenary and 4 MB of the standard library of this Python: seconds, once.
    """
    from tokenary.core.files import cache_folder
    from tokenary.data import prose, stdlib_code

    text = prose() + stdlib_code(seed=0, n_bytes=4_000_000)
    names = json.dumps(sorted(tokenizer.get_vocab().items())).encode() + text.encode()
    path = cache_folder() / "trigrams" / f"{hashlib.sha256(names).hexdigest()[:16]}.safetensors"
    try:
        return TrigramStore.load(path)
    except InputError:  # not there yet, or damaged
        store = count_text(tokenizer, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.save(path)
        return store
