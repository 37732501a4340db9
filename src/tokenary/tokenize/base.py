"""A text tokenizer, and the protocol of measuring one.

`TextTokenizer` wraps ``tokenizers.Tokenizer``: encoding and decoding run in its Rust, in parallel over a batch. What it
adds is what measures need: the bytes of every token, whatever alphabet the vocabulary is written in, and ids without
special tokens, truncation or padding. A text that spells a special token is text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tokenary.core.errors import FetchError, InputError, UnknownNameError
from tokenary.core.files import one_line
from tokenary.core.method import Method
from tokenary.core.spelling import piece_bytes

MOST_IDS = 1 << 24  # tables are as long as the largest id


def _types(part: Any) -> set[str]:
    """Every ``type`` named inside a part of a tokenizer.json."""
    if isinstance(part, Mapping):
        own = {part["type"]} if isinstance(part.get("type"), str) else set()
        return own.union(*(_types(value) for value in part.values()))
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


class TextTokenizer:
    """A ``tokenizer.json`` ready to be measured.

    Parameters
    ----------
    text : str
        The file's content.
    name : str
        For people.

    Attributes
    ----------
    vocab_size : int
        Tokens, special and added ones included.
    special_ids : frozenset of int
        Tokens that stand for no text.
    alphabet : {"byte-level", "pieces"}
        How the vocabulary writes bytes: one character a byte, or text with ``▁`` and ``<0x0A>``.
    digest : str
        Short hash of the file.
    """

    def __init__(self, text: str, name: str = "tokenizer") -> None:
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_str(text)
            self.config: dict[str, Any] = json.loads(text)
        except Exception as error:  # tokenizers raises a bare Exception
            raise InputError(f"{name}: not a tokenizer.json that can be read ({one_line(error)})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.name, self._text = name, text
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self._vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = len(self._vocab)
        if not self.vocab_size:
            raise InputError(f"{name}: the vocabulary is empty")
        self.id_limit = max(self._vocab.values()) + 1
        if self.id_limit > MOST_IDS:
            raise InputError(f"{name}: a token has the id {self.id_limit - 1}; the largest supported is {MOST_IDS - 1}")
        model = self.config["model"]
        kinds = _types([self.config.get("pre_tokenizer"), self.config.get("decoder")])
        self.alphabet = "byte-level" if "ByteLevel" in kinds else "pieces"
        self.algorithm = str(model.get("type") or "BPE")
        self._prefix = model.get("continuing_subword_prefix") or ""
        self.unk_id = self._vocab.get(model["unk_token"]) if isinstance(model.get("unk_token"), str) else None
        if self.algorithm == "Unigram":
            self.unk_id = model.get("unk_id")

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer, (self._text, self.name)

    def __repr__(self) -> str:
        return f"TextTokenizer({self.name!r}, {self.vocab_size} tokens)"

    @property
    def merges(self) -> int:
        """How many merges a BPE vocabulary states; 0 for other models."""
        return len(self.config["model"].get("merges") or ())

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids (int32) of each text, encoded in parallel, without special tokens.

        Raises
        ------
        InputError
            The vocabulary can neither spell a text nor say that it is unknown.
        """
        try:
            found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # tokenizers raises a bare Exception
            raise InputError(f"{self.name} cannot encode this text: {one_line(error)}") from None
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def decode_batch(self, rows: Sequence[np.ndarray]) -> list[str]:
        """Return the text of each row of ids, decoded in parallel."""
        return self.tokenizer.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)

    @functools.cached_property
    def id_of(self) -> dict[bytes, int]:
        """The id of every ordinary token by its bytes; of two with the same bytes, the lower."""
        pairs = ((self.token_bytes(i), i) for i in sorted(self._vocab.values(), reverse=True) if i not in self._added)
        return {data: i for data, i in pairs if data}

    @functools.cached_property
    def adds_space(self) -> bool:
        """Whether it puts a space before every text, as SentencePiece does."""
        return b"".join(map(self.token_bytes, self.encode("a").tolist())) == b" a"

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        return {i: piece for piece, i in self._vocab.items()}

    def piece(self, id: int) -> str:
        """Return a token as the vocabulary writes it; empty for an id without a token."""
        return self._pieces.get(id, "")

    @functools.cached_property
    def ids(self) -> list[int]:
        """Every id of the vocabulary, ascending."""
        return sorted(self._vocab.values())

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of every token by id, (id_limit,) int64; 0 for special tokens and holes."""
        lengths = np.zeros(self.id_limit, np.int64)
        for i in self.ids:
            lengths[i] = 0 if i in self.special_ids else len(self.token_bytes(i))
        return lengths

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that a token stands for: a space for ``▁``, one byte for ``<0x0A>``, UTF-8 else."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._spell(id)
        return found

    def _spell(self, id: int) -> bytes:
        piece = self.piece(id)
        if id in self._added and (id in self.special_ids or self.alphabet == "byte-level"):
            return self._added[id].encode()
        if self._prefix:  # WordPiece
            return piece.removeprefix(self._prefix).encode()
        return piece_bytes(piece, self.alphabet == "byte-level")

    @functools.cached_property
    def spelling(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The bytes (uint8) of all tokens, one after the other, and where each ends, by id; holes and added tokens are
        empty. None where decoding is more than joining the bytes of tokens.
        """
        if (self.config.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        tokens = {i: self.token_bytes(i) for i in self.ids if i not in self._added}
        lengths = np.zeros(self.id_limit, np.int64)
        lengths[list(tokens)] = [len(token) for token in tokens.values()]
        return np.frombuffer(b"".join(tokens.values()), np.uint8), np.cumsum(lengths)

    def to_json(self) -> str:
        """Return the ``tokenizer.json`` as it was loaded."""
        return self._text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ``tokenizer.json`` as it was loaded."""
        Path(path).write_text(self._text, encoding="utf-8")


def load_tokenizer(source: str | os.PathLike[str] | TextTokenizer) -> TextTokenizer:
    """Load a tokenizer by whatever names it.

    Parameters
    ----------
    source : str or path
        A ``tokenizer.json``, a folder that holds one, a name of the tokenizer catalogue (``gpt4o``), a name of the
        model catalogue (``smollm2``), or a hub id ``org/name``. What exists on disk comes first.

    Raises
    ------
    InputError
        The file cannot be read as a tokenizer.
    UnknownNameError
        It names nothing; says the nearest names.
    FetchError
        It could not be brought here.
    """
    if isinstance(source, TextTokenizer):
        return source
    name, path = os.fspath(source), Path(source)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise InputError(f"{path}: the folder holds no tokenizer.json")
        return _read(path / "tokenizer.json", path.name)
    if path.is_file():
        return _read(path, path.parent.name if path.name == "tokenizer.json" else path.stem)
    if path.suffix == ".json":
        raise InputError(f"cannot read {path}: no such file")
    from tokenary.models import catalogue as models
    from tokenary.tokenize import catalogue

    for entry in catalogue.CATALOGUE:
        if name.lower() in (entry.name, *entry.aliases):
            return _read(catalogue.get(entry), entry.name)
    for model in models.CATALOGUE:
        if name.lower() in (model.name, *model.aliases):
            from tokenary.models.fetch import get

            return _read(get(model) / "tokenizer.json", model.name)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _read(_from_hub(name), name)
    known = [n for tokenizer in catalogue.CATALOGUE for n in (tokenizer.name, *tokenizer.aliases)]
    known += [n for model in models.CATALOGUE for n in (model.name, *model.aliases)]
    raise UnknownNameError("tokenizer", name, sorted(set(known)))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of many classes: offline, no such repository, gated
        raise FetchError(f"cannot fetch tokenizer.json of {name} from the hub: {one_line(error)}") from error


def _read(path: Path, name: str) -> TextTokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from None
    return TextTokenizer(text, name)


@dataclass(frozen=True)
class EncodedText:
    """One text with its ids.

    Attributes
    ----------
    language : str
        Name of its language, or of the corpus it belongs to.
    key : str
        What the same content has in every language: names the sentence; empty where nothing is parallel.
    text : str
        The text.
    ids : ndarray
        (N,) int32.
    offset : int
        Where in its file, in bytes, the part stands that it was read with.
    """

    language: str
    key: str
    text: str
    ids: np.ndarray
    offset: int = 0


class Measure(Method):
    """Something that is counted over the texts of one language after the other and then said in figures.

    Counts are a commutative monoid of integers (``+`` merges two, `count` of nothing is the neutral one), and every
    figure is computed from the merged counts in a fixed order. So it is all one, to the last digit, who counted what.
    """

    @abstractmethod
    def count(self, tokenizer: TextTokenizer, texts: Sequence[EncodedText]) -> Any:
        """Count over one part of a corpus."""

    @abstractmethod
    def figures(self, tokenizer: TextTokenizer, counts: Any) -> dict[str, Any]:
        """Turn merged counts into figures, plain JSON types; None, with a reason, where the data cannot say."""
