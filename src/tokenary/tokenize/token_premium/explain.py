"""What goes with many tokens: a regression of CTC on what can be said of a language's text. Correlation, not cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import regex

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")


def features(training: Sequence[str], evaluation: Sequence[str]) -> dict[str, float]:
    """Describe a language by the texts that its tokenizer is trained and evaluated on.

    Returns
    -------
    dict
        ``chars`` of the evaluation, ``word_length`` (characters a word), ``whitespace`` (share of characters),
        ``bytes_per_char``, ``seen_types`` (share of the evaluation's different words that occur in training).
    """
    text = "\n".join(evaluation)
    words, known = _WORD.findall(text), {word for part in training for word in _WORD.findall(part)}
    types = set(words)
    return {
        "chars": float(len(text)),
        "word_length": sum(map(len, words)) / max(len(words), 1),
        "whitespace": sum(map(str.isspace, text)) / max(len(text), 1),
        "bytes_per_char": len(text.encode()) / max(len(text), 1),
        "seen_types": len(types & known) / max(len(types), 1),
    }


def explain(outcome: Sequence[float], terms: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float] | float]:
    """Regress an outcome on standardised terms (least squares).

    Returns
    -------
    dict
        ``r2`` of all terms together; for each term ``weight``, ``alone`` (its R^2 alone) and ``drop_r2``, what R^2
        loses without it.
    """
    y = np.asarray(outcome, float)
    y = (y - y.mean()) / y.std()

    def fit(names: list[str]) -> tuple[float, np.ndarray]:
        x = np.stack([np.asarray(terms[name], float) for name in names], 1) if names else np.zeros((len(y), 0))
        x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
        weights = np.linalg.lstsq(x, y, rcond=None)[0]
        return 1 - float(((y - x @ weights) ** 2).sum() / (y**2).sum()), weights

    names = list(terms)
    whole, weights = fit(names)
    found: dict[str, dict[str, float] | float] = {"r2": whole}
    for name, weight in zip(names, weights, strict=True):
        without = fit([other for other in names if other != name])[0]
        found[name] = {"weight": float(weight), "alone": fit([name])[0], "drop_r2": whole - without}
    return found
