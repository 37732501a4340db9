"""Runs measures over a corpus in one pass, part by part.

Counts of parts are added up; every figure is computed at the end from the sums. Sums are of integers and their order
does not matter, so that any engine that spreads the parts gives the same figures to the last digit.
"""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex

from tokenary.core.encodings import CLASSES
from tokenary.core.errors import InputError
from tokenary.tokenize.artifacts import LONGEST, WORD, exposure, faults, lossy_strings, unreachable
from tokenary.tokenize.base import EncodedText, Measure, TextTokenizer
from tokenary.tokenize.corpus import Part, Skipped, read

_IN_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]")
_JOINERS = "'’-"  # inside a word
_LETTER = regex.compile(r"\p{L}")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]")
EXAMPLES = 5  # faults that are shown
ARTIFACT_WORDS = 20_000  # different words of a part whose alternatives are looked at

Engine = Callable[[Sequence["Work"], Callable[[int], None]], Iterable["Counted"]]


@dataclass(frozen=True)
class Text:
    """What is counted of a language whatever the tokenizer.

    Attributes
    ----------
    texts, nbytes, chars, words, letters, unspaced : int
        Texts that are encoded as one; bytes, characters and words; letters, and those of scripts without spaces.
    skipped : Skipped
        What could not be used.
    """

    texts: int = 0
    nbytes: int = 0
    chars: int = 0
    words: int = 0
    letters: int = 0
    unspaced: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    def __add__(self, other: Text) -> Text:
        numbers = ("texts", "nbytes", "chars", "words", "letters", "unspaced")
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return Text(**sums, skipped=self.skipped + other.skipped)


@dataclass(frozen=True)
class Basics:
    """What is counted of a language for a tokenizer.

    Attributes
    ----------
    tokens, unknown : int
        Tokens, and those that stand for text the vocabulary lacks.
    faults : int
        Texts that do not come back from decoding.
    examples : tuple of (str, str)
        The first faults in the order of the text: a piece of the text, and what came back.
    words : int
        Words that were looked at for alternative encodings: every different word of a part once.
    exposed : tuple of int
        How many of them are exposed to each class of `core.encodings.CLASSES`.
    """

    tokens: int = 0
    unknown: int = 0
    faults: int = 0
    examples: tuple[tuple[str, str], ...] = ()
    words: int = 0
    exposed: tuple[int, ...] = (0,) * len(CLASSES)

    def __add__(self, other: Basics) -> Basics:
        return Basics(
            self.tokens + other.tokens,
            self.unknown + other.unknown,
            self.faults + other.faults,
            tuple(sorted(set(self.examples + other.examples))[:EXAMPLES]),
            self.words + other.words,
            tuple(a + b for a, b in zip(self.exposed, other.exposed, strict=True)),
        )


@dataclass(frozen=True)
class Work:
    """One part, the tokenizers and the measures: what an engine sends somewhere."""

    part: Part
    tokenizers: tuple[TextTokenizer, ...]
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Counted:
    """What came of some parts: counts of the texts, and for each tokenizer the basics and each measure's counts."""

    texts: dict[str, Text]
    basics: tuple[dict[str, Basics], ...]
    measures: tuple[tuple[Any, ...], ...]

    def __add__(self, other: Counted) -> Counted:
        return Counted(
            _added(self.texts, other.texts),
            tuple(_added(a, b) for a, b in zip(self.basics, other.basics, strict=True)),
            tuple(
                tuple(a + b for a, b in zip(ours, theirs, strict=True))
                for ours, theirs in zip(self.measures, other.measures, strict=True)
            ),
        )


def _added(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for name, value in theirs.items():
        both[name] = both[name] + value if name in both else value
    return both


def count_part(work: Work) -> Counted:
    """Read and count one part."""
    part = work.part
    rows, skipped = read(part)
    texts = [text for _, text in rows]
    basics, measures = [], []
    for tokenizer in work.tokenizers:
        ids = tokenizer.encode_batch(texts)
        encoded = [
            EncodedText(part.language, key, text, found, part.start)
            for (key, text), found in zip(rows, ids, strict=True)
        ]
        basics.append({part.language: _basics(tokenizer, encoded)} if encoded else {})
        measures.append(tuple(measure.count(tokenizer, encoded) for measure in work.measures))
    return Counted({part.language: _describe(texts, skipped)}, tuple(basics), tuple(measures))


def _describe(texts: Sequence[str], skipped: Skipped) -> Text:
    points = np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)
    counts = np.bincount(points)
    found = [(chr(point), int(counts[point])) for point in np.flatnonzero(counts)]
    return Text(
        texts=len(texts),
        nbytes=sum(len(text.encode()) for text in texts),
        chars=sum(map(len, texts)),
        words=_words(points, [char for char, _ in found]),
        letters=sum(count for char, count in found if _LETTER.match(char)),
        unspaced=sum(count for char, count in found if _UNSPACED.match(char)),
        skipped=skipped,
    )


def _words(points: np.ndarray, chars: Sequence[str]) -> int:
    """Count the words among code points, given the different ones: runs of letters and digits, less those joined."""
    if not len(points):
        return 0
    kinds = np.zeros(ord(chars[-1]) + 1, np.uint8)
    for char in chars:
        kinds[ord(char)] = 1 if _IN_WORD.match(char) else 2 * (char in _JOINERS)
    kind = kinds[points]
    inside = kind == 1
    begun = np.count_nonzero(inside[1:] & ~inside[:-1])
    joined = np.count_nonzero((kind[1:-1] == 2) & inside[:-2] & inside[2:])
    return int(inside[0]) + int(begun) - int(joined)


def _basics(tokenizer: TextTokenizer, encoded: Sequence[EncodedText]) -> Basics:
    found = faults(tokenizer, [text.text for text in encoded], [text.ids for text in encoded])
    unknown = 0 if tokenizer.unk_id is None else sum(int((text.ids == tokenizer.unk_id).sum()) for text in encoded)
    looked = sorted(word for word in _some_words(encoded) if len(word.encode()) <= LONGEST)
    exposed = [0] * len(CLASSES)
    # Where a tokenizer puts a space before every text, a word brings none of its own.
    asked = [word.removeprefix(" ") for word in looked] if tokenizer.adds_space else looked
    for row in tokenizer.encode_batch(asked):
        own = [tokenizer.token_bytes(i) for i in row.tolist()]
        for name in exposure(tokenizer, b"".join(own).decode(errors="replace"), own):
            exposed[CLASSES.index(name)] += 1
    return Basics(
        tokens=sum(len(text.ids) for text in encoded),
        unknown=unknown,
        faults=len(found),
        examples=tuple(sorted({_difference(text, back) for text, back in found})[:EXAMPLES]),
        words=len(looked),
        exposed=tuple(exposed),
    )


def _some_words(encoded: Sequence[EncodedText]) -> set[str]:
    """The first different words, `ARTIFACT_WORDS` at most."""
    words: set[str] = set()
    for text in encoded:
        for word in WORD.findall(text.text):
            if len(words) == ARTIFACT_WORDS:
                return words
            words.add(word)
    return words


def _difference(text: str, back: str) -> tuple[str, str]:
    """The place where two texts part, with a little before and after."""
    n = min(len(text), len(back))
    at = next((i for i in range(n) if text[i] != back[i]), n)
    start = max(0, at - 12)
    return text[start : at + 20], back[start : at + 20]


def local(works: Sequence[Work], done: Callable[[int], None]) -> Iterator[Counted]:
    """Count the parts in this process, one after the other; the Rust of `tokenizers` uses the cores."""
    for work in works:
        yield count_part(work)
        done(work.part.nbytes)


def total(found: Iterable[Counted]) -> Counted:
    """Add counts up, two of about the same size at a time."""
    pile: list[tuple[int, Counted]] = []
    for one in found:
        level = 0
        while pile and pile[-1][0] == level:
            one = pile.pop()[1] + one
            level += 1
        pile.append((level, one))
    return functools.reduce(lambda a, b: b + a, (one for _, one in reversed(pile)))


def audit(
    tokenizers: Sequence[TextTokenizer],
    parts: Sequence[Part],
    measures: Sequence[Measure],
    *,
    engine: Engine = local,
    vocabulary: bool = True,
    done: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Any]:
    """Measure tokenizers over a corpus.

    Parameters
    ----------
    tokenizers : sequence of TextTokenizer
        Which.
    parts : sequence of Part
        From `corpus.plan_files` or `corpus.plan_texts`.
    measures : sequence of Measure
        What is measured beside fertility, faults and artifacts.
    engine : callable
        Counts the parts; `local`, or `engine_ray.ray_engine`.
    vocabulary : bool
        Also look for tokens that no text becomes: seconds for a large vocabulary.
    done : callable
        Told the bytes of every part that is counted.

    Returns
    -------
    dict
        The record, plain JSON types.

    Raises
    ------
    InputError
        The corpus holds no text that can be used.
    """
    if not parts:
        raise InputError("the corpus is empty: no text was found")
    works = [Work(part, tuple(tokenizers), tuple(measures)) for part in parts]
    counted = total(engine(works, done))
    texts = {name: counted.texts[name] for name in sorted(counted.texts)}
    if not any(text.nbytes for text in texts.values()):
        lost = sum((text.skipped for text in texts.values()), Skipped())
        raise InputError(f"the corpus holds no text: {lost.lines} lines are not UTF-8, {lost.empty} are empty")
    rows = []
    for tokenizer, basics, found in zip(tokenizers, counted.basics, counted.measures, strict=True):
        rows.append(
            {
                "name": tokenizer.name,
                "digest": tokenizer.digest,
                "vocabulary": tokenizer.vocab_size,
                "algorithm": tokenizer.algorithm,
                "alphabet": tokenizer.alphabet,
                "languages": {name: _figures(texts[name], basics[name]) for name in sorted(basics)},
                "lossy_strings": lossy_strings(tokenizer),
                "unreachable": _unreachable(tokenizer) if vocabulary else None,
                "measures": {
                    measure.card.slug: measure.figures(tokenizer, part)
                    for measure, part in zip(measures, found, strict=True)
                },
            }
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "corpus": {
            name: {
                "texts": text.texts,
                "bytes": text.nbytes,
                "chars": text.chars,
                "words": text.words,
                "skipped_lines": text.skipped.lines,
                "skipped_bytes": text.skipped.nbytes,
                "empty": text.skipped.empty,
            }
            for name, text in texts.items()
        },
        "measures": {measure.card.slug: dict(measure.options) for measure in measures},
        "tokenizers": rows,
    }


def _figures(text: Text, basics: Basics) -> dict[str, Any]:
    """Return the figures of one language and tokenizer."""
    spaced = text.words > 0 and 2 * text.unspaced <= text.letters
    return {
        "tokens": basics.tokens,
        "fertility": basics.tokens / text.words if spaced else None,
        "bytes_per_token": text.nbytes / basics.tokens if basics.tokens else None,
        "chars_per_token": text.chars / basics.tokens if basics.tokens else None,
        "unknown": basics.unknown,
        "faults": basics.faults,
        "fault_examples": [list(pair) for pair in basics.examples],
        "artifacts": {
            "words": basics.words,
            "exposed": {
                name: count / basics.words if basics.words else None
                for name, count in zip(CLASSES, basics.exposed, strict=True)
            },
        },
    }


def _unreachable(tokenizer: TextTokenizer) -> dict[str, Any]:
    found = unreachable(tokenizer)
    return {name: len(ids) for name, ids in found.items()} | {
        "examples": [tokenizer.piece(i) for i in (found["merges"] + found["split"])[:10]]
    }


def align(first: TextTokenizer, second: TextTokenizer, text: str) -> list[dict[str, Any]]:
    """Put two tokenizers' tokens of a text side by side.

    Returns
    -------
    list of dict
        Spans between two places where both have a border: ``same``, and the pieces of text of each, ``first`` and
        ``second``; ``text`` is the span. A piece is empty where a token ends inside a character, or inside one that a
        token before it holds already.
    """
    sides = [_ends(tokenizer, text) for tokenizer in (first, second)]
    borders = sorted({*sides[0]}.intersection(sides[1]) - {0})
    rows = []
    left, taken = 0, [0, 0]
    for right in borders:
        pieces: list[list[str]] = []
        for side, ends in enumerate(sides):
            at, found = left, list[str]()
            while taken[side] < len(ends) and ends[taken[side]] <= right:
                found.append(text[at : ends[taken[side]]])
                at = ends[taken[side]]
                taken[side] += 1
            pieces.append(found)
        rows.append({"text": text[left:right], "first": pieces[0], "second": pieces[1], "same": pieces[0] == pieces[1]})
        left = right
    return rows


def _ends(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Where each token ends, in characters, ascending; the end of the text, where no token reaches it."""
    encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    ends = np.maximum.accumulate(np.array([0, *(stop for _, stop in encoding.offsets)]))[1:].tolist()
    return ends if ends and ends[-1] == len(text) else [*ends, len(text)]


def differences(
    first: TextTokenizer, second: TextTokenizer, parts: Sequence[Part], texts: int = 4, chars: int = 600
) -> list[dict[str, Any]]:
    """Show where two tokenizers differ most: a piece of text from each of a few languages, token by token.

    Parameters
    ----------
    first, second : TextTokenizer
        Which.
    parts : sequence of Part
        The corpus; the first part of each language is looked at.
    texts : int
        How many languages: those of which one tokenizer makes the most tokens, measured by the other.
    chars : int
        Most characters of a piece.

    Returns
    -------
    list of dict
        ``language, first, second`` (names), ``counts`` (tokens of each) and ``spans`` as `align` gives them.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for part in parts:
        if part.language in found:
            continue
        text = next((text for _, text in read(part)[0]), "").strip()[:chars]
        if text:
            found[part.language] = (text, [len(tokenizer.encode(text)) for tokenizer in (first, second)])

    def ratio(language: str) -> float:
        ours, theirs = found[language][1]
        return abs(math.log((ours + 1) / (theirs + 1)))

    return [
        {
            "language": language,
            "first": first.name,
            "second": second.name,
            "counts": found[language][1],
            "spans": align(first, second, found[language][0]),
        }
        for language in sorted(found, key=lambda language: (-ratio(language), language))[:texts]
    ]
