"""A vocabulary size for each language, at which all need as many tokens for the same content, and the vocabularies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokenary.core.errors import InputError, OptionError
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.statistics import dispersion, f_test
from tokenary.tokenize.token_premium.law import Choice, Kind, fit_law, optimal_sizes, search
from tokenary.tokenize.training import PATTERN, Pairs, byte_level, merges_of, pieces_of, train_bpe, truncated

LEAST = 260  # tokens of the smallest vocabulary that is chosen
NEAR = 0.02  # of the target: a search that ends farther off did not reach it


@dataclass(frozen=True)
class Even:
    """Vocabularies that even out languages.

    Attributes
    ----------
    target : float
        Tokens of the fitting sentences that every language should need: the median at the common size.
    curves : dict
        ``{language: {vocabulary size: tokens of the fitting sentences}}``.
    choices : dict of str to Choice
        The size chosen for each language.
    merges : dict of str to list
        Merges of each language's largest vocabulary, as `training.byte_level` takes them.
    pattern : str or None
        Pieces that merges stay within.
    """

    target: float
    curves: dict[str, dict[int, float]]
    choices: dict[str, Choice]
    merges: dict[str, Pairs]
    pattern: str | None

    def tokenizer(self, language: str, size: int | None = None) -> TextTokenizer:
        """Return the BPE of a language, of its chosen size or of another one."""
        wanted = self.choices[language].size if size is None else size
        return byte_level(truncated(self.merges[language], wanted), self.pattern, language)

    def exponents(self) -> dict[str, float]:
        """Return the exponent b of ``CTC(V) = a V^b`` of each language."""
        return {language: fit_law(points).b for language, points in self.curves.items()}


def even_vocabularies(
    training: Mapping[str, Sequence[str]],
    fitting: Mapping[str, Sequence[str]],
    sizes: Sequence[int],
    common: int,
    law: Kind | Literal["search"] = "power",
    pattern: str | None = PATTERN,
    done: Callable[[int, int], None] = lambda languages, total: None,
) -> Even:
    """Train a BPE for each language, of the size at which it needs as many tokens as the others.

    One training a language is enough: a smaller vocabulary is the first merges of the largest.

    Parameters
    ----------
    training : mapping
        ``{language: texts}``.
    fitting : mapping
        The same sentences in every language, of which none is in `training`.
    sizes : sequence of int
        Vocabulary sizes at which tokens are counted for the law; the largest is the most that is chosen.
    common : int
        The size whose median over the languages is the target.
    law : {"power", "saturating", "local", "search"}
        What the size is solved from: a law fitted to the counts, straight lines between them, or counts at further
        sizes, by halving.
    pattern : str, optional
        See `training.byte_level`.
    done : callable
        Told languages trained and their number.

    Raises
    ------
    OptionError
        A size below 257, or fewer than two sizes.
    InputError
        A language has too little text for two of the sizes.
    """
    wanted = sorted({*sizes, common})
    if wanted[0] < 257 or len(wanted) < 2:
        raise OptionError("sizes", list(sizes), "at least two sizes, 257 or more")
    merges = {}
    for i, (language, texts) in enumerate(sorted(training.items()), start=1):
        try:
            merges[language] = merges_of(train_bpe(texts, wanted[-1], pattern=pattern, name=language))
        except InputError as error:
            raise InputError(f"{language}: {error}") from None
        done(i, len(training))

    def count(language: str, size: int) -> float:
        tokenizer = byte_level(truncated(merges[language], size), pattern, language)
        return float(sum(map(len, tokenizer.encode_batch(fitting[language]))))

    reached = {language: len(pieces_of(found)) for language, found in merges.items()}
    for language, most in reached.items():
        if most < common or sum(size <= most for size in wanted) < 2:
            raise InputError(f"{language}: its text yields {most} tokens only; give more text, or smaller sizes")
    curves = {
        language: {size: count(language, size) for size in sorted({min(size, most) for size in wanted})}
        for language, most in reached.items()
    }
    target = float(np.median([curve[common] for curve in curves.values()]))
    choices = {}
    for language, curve in curves.items():
        if law == "search":
            size, tokens = search(functools.partial(count, language), target, LEAST, max(curve), common)
            choices[language] = Choice(size, abs(tokens - target) <= NEAR * target, tokens)
        else:
            choices |= optimal_sizes({language: curve}, target, LEAST, max(curve), law)
    return Even(target, curves, choices, merges, pattern)


def verify(even: Even, common: int, sentences: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Count the tokens of sentences that nothing was fitted to, at each language's own size and at the common one.

    Returns
    -------
    dict
        ``languages`` (``size``, ``reached``, ``tokens`` and ``tokens_equal`` of each), ``own`` and ``equal`` (their
        dispersion), ``variance_ratio`` (of the tokens over their mean, equal over own) and ``variance_ratio_p``, the
        probability of a ratio as far from 1.
    """
    languages = {}
    for language, choice in even.choices.items():
        sizes = {"tokens": choice.size, "tokens_equal": common}
        found = {
            name: sum(map(len, even.tokenizer(language, size).encode_batch(sentences[language])))
            for name, size in sizes.items()
        }
        languages[language] = {"size": choice.size, "reached": choice.reached, **found}
    own, equal = (np.array([row[name] for row in languages.values()]) for name in ("tokens", "tokens_equal"))
    ratio, p = f_test(equal / equal.mean(), own / own.mean())
    return {
        "languages": languages,
        "own": dispersion(own.tolist()),
        "equal": dispersion(equal.tolist()),
        "variance_ratio": ratio,
        "variance_ratio_p": p,
    }
