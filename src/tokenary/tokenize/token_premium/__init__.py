"""Explaining and Mitigating Crosslingual Tokenizer Inequities (arXiv 2510.21909, 2025): tokens for the same content.

Over the sentences that all languages share, with CTC the tokens of all of them (no special tokens):

    premium(l) = CTC(l) / CTC(reference)              with an interval by resampling the sentences
    ratio(l)   = mean over sentences of tokens(l) / tokens(reference)
    spread     = coefficient of variation, Gini, max / min of CTC over the languages

Beside them the byte premium (the same with UTF-8 bytes), which a tokenizer inherits from the script. A premium of 2
says that the same content costs twice as much and that half as much of it fits into a context.

`law` fits CTC(V), `even` trains a vocabulary of its own size for each language, `explain` regresses CTC on the text,
and `superword` trains merges across spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import UnknownNameError
from tokenary.tokenize.base import EncodedText, Measure, TextTokenizer
from tokenary.tokenize.statistics import coefficient_of_variation, dispersion, interval, resample

CARD = Card(
    slug="token-premium",
    cls="TokenPremium",
    room="tokenize",
    slot="measure",
    title="Explaining and Mitigating Crosslingual Tokenizer Inequities",
    summary="how many more tokens a language needs for the same content, and how unevenly languages are treated",
    paper="2510.21909",
    year=2025,
    code="catherinearnett/explaining_tokenizer_inequities",
    requires=("tokenizer", "parallel-text"),
)

FEWEST = 2  # shared sentences without which nothing is said of a language

Size = tuple[int, int, int]  # tokens, bytes, characters


@dataclass(frozen=True)
class Sentences:
    """Tokens, bytes and characters of every sentence: ``{language: {key: (tokens, bytes, characters)}}``."""

    of: dict[str, dict[str, Size]]

    def __add__(self, other: Sentences) -> Sentences:
        merged = {language: dict(sizes) for language, sizes in self.of.items()}
        for language, sizes in other.of.items():
            mine = merged.setdefault(language, {})
            for key, (tokens, nbytes, chars) in sizes.items():
                old = mine.get(key, (0, 0, 0))
                mine[key] = (old[0] + tokens, old[1] + nbytes, old[2] + chars)
        return Sentences(merged)


class TokenPremium(Measure):
    """Measure token premiums over parallel text.

    Parameters
    ----------
    reference : str
        The language that others are compared with.
    samples : int
        Resamples of the sentences.
    confidence : float
        Of the intervals.
    seed : int
        Of the resamples.
    """

    def __init__(
        self,
        reference: str = "eng",
        samples: Annotated[int, Field(ge=100, le=100_000)] = 1000,
        confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95,
        seed: int = 0,
    ) -> None:
        self.reference, self.samples, self.confidence, self.seed = reference, samples, confidence, seed

    def count(self, tokenizer: TextTokenizer, texts: Sequence[EncodedText]) -> Sentences:
        """Count the sentences of one part; text that is not parallel is left out."""
        found = Sentences({})
        for text in texts:
            if text.key:
                size = (len(text.ids), len(text.text.encode()), len(text.text))
                mine = found.of.setdefault(text.language, {})
                old = mine.get(text.key, (0, 0, 0))
                mine[text.key] = (old[0] + size[0], old[1] + size[1], old[2] + size[2])
        return found

    def figures(self, tokenizer: TextTokenizer, counts: Sentences) -> dict[str, Any]:
        """Return premiums over the sentences that the reference and all kept languages share.

        Raises
        ------
        UnknownNameError
            The reference is none of the languages.
        """
        if not counts.of:
            return {"why": "no parallel text", "languages": {}}
        if self.reference not in counts.of:
            raise UnknownNameError("reference language", self.reference, counts.of)
        kept, shared, skipped = _shared(counts, self.reference)
        if len(shared) < FEWEST:
            why = f"{len(shared)} sentences are shared with {self.reference}, at least {FEWEST} are needed"
            return {"reference": self.reference, "shared": len(shared), "skipped": skipped, "languages": {}, "why": why}
        sizes = np.array([[counts.of[name][key] for key in shared] for name in kept], np.int64)  # (L, S, 3)
        tokens = sizes[..., 0]
        totals, base = sizes.sum(1), kept.index(self.reference)
        samples = _resampled(tokens, self.samples, self.seed)
        premiums = samples / samples[:, base, None]
        ratios = tokens / tokens[base]
        languages = {}
        for i, name in enumerate(kept):
            low, high = interval(premiums[:, i], self.confidence)
            ctc, nbytes, chars = (int(value) for value in totals[i])
            languages[name] = {
                "tokens": ctc,
                "premium": ctc / int(totals[base, 0]),
                "low": low,
                "high": high,
                "ratio": float(ratios[i].mean()),
                "ratio_stderr": float(ratios[i].std(ddof=1) / len(shared) ** 0.5),
                "byte_premium": nbytes / int(totals[base, 1]),
                "bytes_per_token": nbytes / ctc,
                "chars_per_token": chars / ctc,
                "context_share": int(totals[base, 0]) / ctc,
            }
        spread = dispersion(totals[:, 0].tolist())
        if spread["cv"] is not None:
            low, high = interval(coefficient_of_variation(samples), self.confidence)
            spread |= {"cv_low": low, "cv_high": high}
        return {
            "reference": self.reference,
            "shared": len(shared),
            "skipped": skipped,
            "languages": languages,
            "dispersion": spread,
            "byte_dispersion": dispersion(totals[:, 1].tolist()),
        }


def _shared(counts: Sentences, reference: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Return languages that are kept, the sentences that all of them have, and why others are left out.

    A language that shares less than half of the reference's sentences would take too many from the others.
    """
    own = {key for key, size in counts.of[reference].items() if size[0]}
    need = max(FEWEST, -(-len(own) // 2))
    kept, skipped, shared = [], {}, own
    for name in sorted(counts.of):
        common = {key for key in own if counts.of[name].get(key, (0,))[0]}
        if name != reference and len(common) < need:
            skipped[name] = f"shares {len(common)} of {len(own)} sentences with {reference}, {need} are needed"
            continue
        kept.append(name)
        shared = shared & common
    return kept, sorted(shared), skipped


def _resampled(tokens: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Tokens of each language in samples of the sentences with replacement: (times, L) of tokens (L, S)."""
    n = tokens.shape[1]
    return np.stack([tokens @ resample(n, seed, "token-premium", i) for i in range(times)])
