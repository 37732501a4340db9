"""Constraints: what an answer must satisfy, asked one token at a time.

A `Matcher` follows one answer. It says of single tokens whether the answer may go on with them, and of the answer
whether it may end. Nothing here looks at the whole vocabulary.
"""

from __future__ import annotations

import codecs
import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from tokenary.core.errors import OptionError, TokenaryError, UnsupportedModelError

Verdict = Literal["dead", "alive", "complete"]
#: Says of a text so far: ``dead`` (no continuation can help), ``alive`` (it must go on), ``complete`` (it may end here;
#: it may also go on). True means complete, False dead. A character of which not all bytes are there yet is shown as
#: U+FFFD at the end.
Predicate = Callable[[str], bool | Verdict]


class ConstraintError(TokenaryError):
    """No answer satisfies a constraint, or it cannot be checked."""


class Vocabulary:
    """The bytes that each token adds to a text.

    Parameters
    ----------
    pieces : sequence of bytes
        One a token; empty for tokens that are no text (special ones, padding of the embedding).
    strips : bool
        Whether decoding drops a space that an answer begins with.
    """

    def __init__(self, pieces: Sequence[bytes], strips: bool = False) -> None:
        self.pieces = list(pieces)
        self.opening = [piece.removeprefix(b" ") for piece in self.pieces] if strips else self.pieces

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        """Read the bytes of the tokens of a byte-level or byte-fallback tokenizer.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            A fast one.
        size : int
            Width of the logits.

        Raises
        ------
        UnsupportedModelError
            If the tokenizer is of another kind.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = [] if backend is None else _steps(json.loads(backend.to_str())["decoder"])
        kinds = {step["type"] for step in steps}
        if not steps or kinds - {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace"}:
            raise UnsupportedModelError("a constraint needs a byte-level or byte-fallback tokenizer (fast)")
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        alphabet = {character: byte for byte, character in _byte_characters().items()}

        def piece(number: int, text: str | None) -> bytes:
            if text is None or number in special:
                return b""
            if number in added:
                return text.encode()
            if "ByteLevel" in kinds:
                return bytes(alphabet[character] for character in text)
            if "ByteFallback" in kinds and len(text) == 6 and text.startswith("<0x"):
                return bytes([int(text[3:5], 16)])
            for step in steps:
                if step["type"] == "Replace":
                    text = text.replace(step["pattern"].get("String", ""), step["content"])
                elif step["type"] == "Metaspace":
                    text = text.replace(step["replacement"], " ")
            return text.encode()

        count = min(size, len(tokenizer))
        texts: list[str | None] = [*tokenizer.convert_ids_to_tokens(list(range(count))), *[None] * (size - count)]
        return cls([piece(i, text) for i, text in enumerate(texts)], not kinds.isdisjoint({"Strip", "Metaspace"}))

    def piece(self, token: int, first: bool) -> bytes:
        """Return what a token adds to an answer."""
        return (self.opening if first else self.pieces)[token]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer; a character that is not complete is left out."""
        data = b"".join([self.piece(token, i == 0) for i, token in enumerate(tokens)])
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Flatten a decoder of the tokenizers library."""
    if decoder is None:
        return []
    return [step for part in decoder["decoders"] for step in _steps(part)] if "decoders" in decoder else [decoder]


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies: itself if it is printable."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class Matcher(ABC):
    """An answer under way. `follow` brings it to any answer, back or forth; `copy` leaves this one as it is."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def follow(self, tokens: Sequence[int]) -> None:
        """Be at the answer that consists of these tokens, all of them accepted."""
        tokens, known = list(tokens), len(self.tokens)
        if self.tokens != tokens[:known]:
            pairs = enumerate(zip(self.tokens, tokens, strict=False))
            known = next((i for i, (old, new) in pairs if old != new), min(known, len(tokens)))
            self._drop(len(self.tokens) - known)
            del self.tokens[known:]
        for token in tokens[known:]:
            self._add(token)
            self.tokens.append(token)

    def copy(self) -> Self:
        """Return another one at the same answer."""
        other = copy.copy(self)
        other.tokens = self.tokens.copy()
        return other

    @abstractmethod
    def accepts(self, token: int) -> bool:
        """Whether the answer may go on with a token."""

    @abstractmethod
    def complete(self) -> bool:
        """Whether the answer may end here."""

    @abstractmethod
    def _add(self, token: int) -> None: ...

    @abstractmethod
    def _drop(self, count: int) -> None: ...


class AnyText(Matcher):
    """No constraint."""

    def accepts(self, token: int) -> bool:
        """Yes."""
        return True

    def complete(self) -> bool:
        """Yes."""
        return True

    def _add(self, token: int) -> None: ...

    def _drop(self, count: int) -> None: ...


class PredicateMatcher(Matcher):
    """A Python predicate on the text so far."""

    def __init__(self, predicate: Predicate, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.predicate, self.vocabulary = predicate, vocabulary
        self._datas = [b""]  # the answer after each of its tokens
        self._known: dict[bytes, Verdict] = {}

    def copy(self) -> Self:
        """Return another one at the same answer."""
        other = super().copy()
        other._datas, other._known = self._datas.copy(), {}
        return other

    def accepts(self, token: int) -> bool:
        """Whether the text is not dead with this token."""
        piece = self.vocabulary.piece(token, first=not self.tokens)
        return bool(piece) and self._verdict(self._datas[-1] + piece) != "dead"

    def complete(self) -> bool:
        """Whether the text is complete."""
        return self._verdict(self._datas[-1]) == "complete"

    def _add(self, token: int) -> None:
        self._datas.append(self._datas[-1] + self.vocabulary.piece(token, first=not self.tokens))
        data = self._datas[-1]
        self._known = {data: self._known[data]} if data in self._known else {}

    def _drop(self, count: int) -> None:
        del self._datas[len(self._datas) - count :]
        self._known = {}

    def _verdict(self, data: bytes) -> Verdict:
        """Judge a text, once as long as the answer stays where it is."""
        if data not in self._known:
            self._known[data] = judge(self.predicate, data)
        return self._known[data]


def judge(predicate: Predicate, data: bytes) -> Verdict:
    """Ask a predicate for the verdict on a text in UTF-8 that may end within a character.

    Raises
    ------
    OptionError
        If the predicate returns something else than a verdict.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return "dead"
    unfinished = bool(decoder.getstate()[0])
    said = predicate(text + "\ufffd" * unfinished)
    verdict: Any = ("complete" if said else "dead") if isinstance(said, bool) else said
    if verdict not in ("dead", "alive", "complete"):
        raise OptionError("predicate", said, "a predicate that returns True, False, 'dead', 'alive' or 'complete'")
    return "alive" if verdict == "complete" and unfinished else verdict


class GrammarMatcher(Matcher):
    """A regular expression, JSON schema or context-free grammar, followed by llguidance."""

    def __init__(self, matcher: Any, openings: dict[int, int]) -> None:
        super().__init__()
        self._matcher, self._openings = matcher, openings

    def copy(self) -> Self:
        """Return another one at the same answer."""
        other = super().copy()
        other._matcher = self._matcher.deep_copy()
        return other

    def accepts(self, token: int) -> bool:
        """Whether the grammar has a text that goes on with this token."""
        return self._matcher.validate_tokens([token if self.tokens else self._openings.get(token, token)]) == 1

    def complete(self) -> bool:
        """Whether the text is in the language."""
        return self._matcher.is_accepting()

    def _add(self, token: int) -> None:
        if not self._matcher.consume_token(token if self.tokens else self._openings.get(token, token)):
            raise ConstraintError(f"the checker of the constraint gave up: {self._matcher.get_error()}")

    def _drop(self, count: int) -> None:
        if count and not self._matcher.rollback(count):
            raise ConstraintError(f"the checker of the constraint gave up: {self._matcher.get_error()}")


def compile_grammar(kind: Literal["regex", "json", "grammar"], source: str) -> str:
    """Bring a constraint into the form of llguidance.

    Parameters
    ----------
    kind : {"regex", "json", "grammar"}
        What it is.
    source : str
        The regular expression (of the whole answer), the JSON schema, or the grammar in the Lark language.

    Raises
    ------
    OptionError
        If it cannot be read.
    """
    matcher = _llguidance().LLMatcher
    make = {
        "regex": matcher.grammar_from_regex,
        "json": matcher.grammar_from_json_schema,
        "grammar": matcher.grammar_from_lark,
    }[kind]
    try:
        grammar = make(source)
    except ValueError as error:
        raise OptionError(kind, source, f"a valid one: {error}") from None
    if wrong := matcher.validate_grammar(grammar):
        raise OptionError(kind, source, f"a valid one: {' '.join(wrong.split())}")
    return grammar


def grammar_matcher(grammar: str, vocabulary: Vocabulary) -> GrammarMatcher:
    """Make the matcher of a compiled grammar at the empty answer.

    Raises
    ------
    ConstraintError
        If no text satisfies it.
    """
    llguidance = _llguidance()
    pieces, openings = list(vocabulary.pieces), {}
    for token, (piece, opening) in enumerate(zip(vocabulary.pieces, vocabulary.opening, strict=True)):
        if piece != opening:  # a token that reads otherwise at the beginning stands twice in the list
            openings[token] = len(pieces)
            pieces.append(opening)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Pieces([*pieces, b""])), slices=[])
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise ConstraintError(f"the constraint cannot be checked: {' '.join(matcher.get_error().split())}")
    made = GrammarMatcher(matcher, openings)
    if not made.complete() and not any(made.accepts(token) for token in range(len(vocabulary.pieces))):
        raise ConstraintError("no text satisfies the constraint, or none that these tokens can write")
    return made


class _Pieces:
    """The vocabulary as llguidance wants it; its last entry stands for the end, about which it is never asked."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return []


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConstraintError("regex, json and grammar need llguidance: pip install 'tokenary[constrain]'") from None
    return llguidance
