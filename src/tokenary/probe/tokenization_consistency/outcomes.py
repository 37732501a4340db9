"""What became of each target, and shares with intervals."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tokenary.core.encodings import CLASSES, Pieces, classify
from tokenary.probe.tokenization_consistency.alignment import Place, Text, align

#: The paper's three, then ours.
OUTCOMES = ("unchanged", "replaced", "phantom", "near", "missing", "malformed")


@dataclass(frozen=True)
class Edit:
    """What became of one target.

    Parameters
    ----------
    outcome : str
        One of `OUTCOMES`. ``phantom``: other ids, the same letters. ``near``: the same after NFKC and casefolding.
        ``missing``: nothing stands in its place. ``malformed``: the answer is not the passage.
    kind : str or None
        Of a phantom, one of the eight classes.
    strict : bool
        Of a phantom: the white space before the word is the same too.
    own : bool
        Of what is unchanged or a phantom: the tokens are those that the tokenizer itself makes of the answer. A phantom
        with them has other white space or punctuation around the word, and no odd encoding.
    """

    outcome: str
    kind: str | None = None
    strict: bool = False
    own: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of one passage.

    Parameters
    ----------
    edits : tuple of Edit
        One a target.
    collateral : bool
        Something else than targets was changed, added or left out.
    words, odd : int
        Words of the answer, and those in tokens that the tokenizer would not make of it.
    """

    edits: tuple[Edit, ...]
    collateral: bool
    words: int
    odd: int


def judge(plain: Text, marked: Text, targets: Sequence[int], answer: Text, again: Text) -> Answer:
    """Judge an answer.

    Parameters
    ----------
    plain, marked : Text
        The passage in the ids that a copy has, without brackets and with them. Their words are the same.
    targets : sequence of int
        Indices of the targets among the words.
    answer, again : Text
        The ids that the model chose, and its text encoded anew.
    """
    places = align(plain, answer)
    others = [i for i in range(len(plain.words)) if i not in targets] or range(len(plain.words))
    found = [places[i] for i in others]
    kept = sum(place is not None and place.kept for place in found)
    if 2 * kept < len(others):
        edits = tuple(Edit("malformed") for _ in targets)
    else:
        edits = tuple(edit(plain, marked, i, answer, again, places[i]) for i in targets)
    replaced = sum(found.outcome in ("replaced", "near") for found in edits)
    added = len(answer.words) > len(plain.words) + 2 * replaced  # an expression of a few words may replace one
    odd = odd_words(answer, again)
    return Answer(edits, kept < len(others) or added, len(answer.words), odd)


def edit(plain: Text, marked: Text, index: int, answer: Text, again: Text, place: Place | None) -> Edit:
    """Judge one target by the place it went to."""
    if place is None:
        return Edit("missing")
    if not place.kept:
        wanted, found = plain.surfaces[index], answer.data[place.start : place.stop].decode(errors="replace")
        return Edit("near" if _folded(found) == _folded(wanted) else "replaced")
    source = marked if answer.bracketed(place.start, place.stop) else plain
    own, other = source.span(*source.words[index]), answer.span(place.start, place.stop)
    usual = same_tokens(answer, again, place.start, place.stop)
    if own.ids == other.ids:
        return Edit("unchanged", own=usual)
    initial, strict = plain.initial(plain.words[index][0]), b"".join(own.pieces) == b"".join(other.pieces)
    return Edit("phantom", kind(own.pieces, other.pieces, initial), strict, usual)


def kind(own: Pieces, other: Pieces, initial: bool) -> str:
    """Name the class of two encodings with different ids; two tokens that spell alike count as a segmentation."""
    return classify(own, other, initial) or CLASSES[3]


def same_tokens(text: Text, again: Text, start: int, stop: int) -> bool:
    """Whether a word is in the same tokens in two encodings of one text."""
    return text.data == again.data and text.span(start, stop) == again.span(start, stop)


def odd_words(text: Text, again: Text) -> int:
    """Count the words of a text in tokens that its own encoding lacks; 0 where the text does not come back."""
    if text.ids == again.ids or text.data != again.data:
        return 0
    return sum(text.span(*word) != again.span(*word) for word in text.words)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def wilson(count: int, total: int, z: float = 1.96) -> list[float]:
    """Return the Wilson interval of a share, [0, 1] where nothing was seen."""
    if not total:
        return [0.0, 1.0]
    share, scale = count / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return [max(0.0, middle - half), min(1.0, middle + half)]


@dataclass
class Tally:
    """Counts over answers."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def edits(self) -> list[Edit]:
        """Of all answers."""
        return [found for answer in self.answers for found in answer.edits]

    def count(self, outcome: str) -> int:
        """Count the targets of one outcome."""
        return sum(found.outcome == outcome for found in self.edits)

    def figures(self) -> dict[str, object]:
        """Return counts and shares, plain JSON types."""
        edits, phantoms = self.edits, [found for found in self.edits if found.outcome == "phantom"]
        strict, odd = sum(found.strict for found in phantoms), sum(not found.own for found in phantoms)
        still = len(phantoms) + self.count("unchanged")
        words = sum(answer.words for answer in self.answers)
        odd_words = sum(answer.odd for answer in self.answers)
        return {
            "answers": len(self.answers),
            "targets": len(edits),
            "outcomes": {outcome: self.count(outcome) for outcome in OUTCOMES},
            "phantom": share(len(phantoms), len(edits)),
            "phantom_strict": share(strict, len(edits)),
            "phantom_odd": share(odd, len(edits)),
            "phantom_of_non_edits": share(len(phantoms), still),
            "own_of_non_edits": share(sum(found.own for found in edits), still),
            "replaced": share(self.count("replaced"), len(edits)),
            "classes": _classes(found.kind for found in phantoms),
            "collateral": share(sum(answer.collateral for answer in self.answers), len(self.answers)),
            "odd_words": share(odd_words, words),
        }


def share(count: int, total: int) -> dict[str, object]:
    """Return a share with its count and Wilson interval; None of nothing."""
    return {"count": count, "of": total, "share": count / total if total else None, "interval": wilson(count, total)}


def _classes(kinds: Iterable[str | None]) -> dict[str, int]:
    counts = Counter(kinds)
    return {name: counts[name] for name in CLASSES if counts[name]}
