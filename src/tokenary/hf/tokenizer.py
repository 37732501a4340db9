"""A vocabulary as a transplant sees it: the bytes of every token, its special tokens, and how it cuts other tokens.

Two vocabularies share a token where both spell the same bytes, however they write them: ``Ġthe`` of a byte-level
vocabulary is ``▁the`` of a SentencePiece one. Strings compared as they stand would share next to nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tokenary.core.spelling import CHAR_OF, piece_bytes


class Vocabulary:
    """The tokens of a ``tokenizer.json``.

    Parameters
    ----------
    tokenizer : Tokenizer
        Any byte-level or SentencePiece-like one.
    roles : mapping
        Which special token plays which role, such as ``{"eos_token": "</s>"}``.
    rows : int, optional
        Embedding rows, where there are more than ids.

    Attributes
    ----------
    spellings : list of bytes
        What each id stands for, (size,): UTF-8, maybe a part of a character; empty for special tokens and holes.
    special : dict
        Text of each special token by id.
    size, rows : int
        The largest id plus one, and embedding rows.
    """

    def __init__(self, tokenizer: Tokenizer, roles: Mapping[str, str] | None = None, rows: int | None = None) -> None:
        self.tokenizer, self.roles = tokenizer, dict(roles or {})
        added = tokenizer.get_added_tokens_decoder()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        config = json.loads(tokenizer.to_str())
        self.byte_level = "ByteLevel" in json.dumps([config.get("pre_tokenizer"), config.get("decoder")])
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.size = max(vocab.values()) + 1
        self.rows = max(self.size, rows or 0)
        self.spellings = [b""] * self.size
        for piece, i in vocab.items():
            if i not in self.special:
                self.spellings[i] = (
                    piece.encode() if i in added and self.byte_level else piece_bytes(piece, self.byte_level)
                )
        self._model: Any = tokenizer.model

    @functools.cached_property
    def id_of(self) -> dict[bytes, int]:
        """The id of every ordinary token by its bytes; of several, the highest, which is no byte fallback."""
        return {data: i for i, data in enumerate(self.spellings) if data}

    @functools.cached_property
    def spare_rows(self) -> list[int]:
        """Rows that belong to no token: padding and holes."""
        return [i for i in range(self.size) if not self.spellings[i] and i not in self.special] + [
            *range(self.size, self.rows)
        ]

    def text(self, id: int) -> str | None:
        """Return the text of an ordinary token; None for a part of a character and for what is no such token."""
        data = self.spellings[id] if id < self.size else b""
        try:
            return data.decode() or None
        except UnicodeDecodeError:
            return None

    def pieces(self, data: bytes) -> list[int]:
        """Cut a string of bytes into tokens, by the model alone: no normalizer, no pre-tokenizer, no word start added.

        Returns
        -------
        list of int
            Ids whose bytes make up `data`; characters that the vocabulary cannot write are missing.
        """
        if self.byte_level:
            return self._cut("".join(CHAR_OF[byte] for byte in data))
        try:
            return self._cut(data.decode().replace(" ", "▁"))
        except UnicodeDecodeError:
            return [self.id_of[bytes([byte])] for byte in data if bytes([byte]) in self.id_of]

    def _cut(self, piece: str) -> list[int]:
        if not piece:
            return []
        found = [token.id for token in self._model.tokenize(piece)]
        return [i for i in found if self.spellings[i]]
