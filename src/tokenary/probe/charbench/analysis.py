"""From answers to figures: how good one task went, and what of the word and its tokens goes along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenary.probe.charbench.items import Item, gold
from tokenary.probe.charbench.statistics import (
    above_majority,
    binomial_error,
    bootstrap,
    by_value,
    interval,
    jaccard,
    length_only,
    logistic,
    majority,
    mean_defined,
    partial,
    pearson,
    slopes,
)

Described = Sequence[Mapping[str, float]]
_SHOWN_BY_VALUE = ("word_length", "number_of_tokens", "gold", "target_token_length")


def analyse(
    items: Sequence[Item],
    described: Described,
    predicted: Sequence[int | None],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Analyse the answers to one task.

    Parameters
    ----------
    items : sequence of Item
        Of one task.
    described : sequence of mapping
        Features of each, see `segmentation.features`.
    predicted : sequence of int or None
        The answers; None for what is no number.
    seed, resamples : int
        Of the bootstrap.

    Returns
    -------
    dict
        Plain JSON types. What correlates with correctness is there only where the accuracy is above that of the most
        frequent answer (``above_majority``); else ``r`` and ``given_word_length`` are None.
    """
    golds = np.array([item.gold for item in items])
    valid = np.array([answer is not None for answer in predicted])
    numbers = np.array([-1 if answer is None else answer for answer in predicted])
    correct = (valid & (numbers == golds)).astype(np.float64)
    table = {name: np.array([features[name] for features in described]) for name in described[0]}
    lengths = np.array([len(item.word) for item in items])
    wrong = valid & (numbers != golds)
    signal = above_majority(correct, golds)
    return {
        "n": len(items),
        "accuracy": float(correct.mean()),
        "error": binomial_error(correct),
        "invalid": float(1 - valid.mean()),
        "accuracy_of_valid": float(correct[valid].mean()) if valid.any() else None,
        "majority_answer": majority(golds),
        "majority_accuracy": float((golds == majority(golds)).mean()),
        "length_only_accuracy": float((golds == length_only(golds, lengths)).mean()),
        "above_majority": signal,
        "bias_of_wrong": float((numbers - golds)[wrong].mean()) if wrong.any() else None,
        "case": _case(items, numbers, correct),
        "by": {name: by_value(table[name], correct) for name in _SHOWN_BY_VALUE if name in table},
        "r": _correlations(table, correct, seed, resamples) if signal else None,
        "given_word_length": _given_length(table, correct, seed, resamples) if signal else None,
    }


def _correlations(table: Mapping[str, np.ndarray], correct: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    """Pearson's r of each feature with correctness, and its interval over resampled items."""
    found = {}
    for name, values in table.items():
        draws = bootstrap(pearson, (values, correct), resamples, seed)
        found[name] = {"r": pearson(values, correct), "interval": interval(draws)}
    return found


def _given_length(
    table: Mapping[str, np.ndarray], correct: np.ndarray, seed: int, resamples: int
) -> dict[str, dict[str, Any]]:
    """What the tokens say at equal word length: the two go together, so that r alone cannot tell them apart."""
    length = table["word_length"]
    found = {}
    for name in ("number_of_tokens", "target_token_length"):
        if name not in table:
            continue
        values = table[name]
        draws = bootstrap(partial, (values, correct, length), resamples, seed)
        fit, slope = logistic(correct, length, values), slopes(correct, length, values)
        found[name] = {
            "partial_r": partial(values, correct, length),
            "interval": interval(draws),
            "accuracy_a_unit": None if slope is None else float(slope[1]),
            "log_odds_a_unit": None if fit is None else float(fit.coefficients[1]),
            "log_odds_error": None if fit is None else float(fit.errors[1]),
        }
    return found


def _case(items: Sequence[Item], numbers: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Accuracy where the word has capitals and where not, and answers that would be right if case did not count."""
    capital = np.array([item.word != item.word.lower() for item in items])
    blind = np.array([gold(item.task, item.word.lower(), item.char.lower()) for item in items])
    matters = blind != np.array([item.gold for item in items])
    parts = {"with_capitals": capital, "without_capitals": ~capital, "case_decides": matters}
    found: dict[str, Any] = {
        name: {
            "n": int(kept.sum()),
            "accuracy": float(correct[kept].mean()) if kept.any() else None,
            "error": binomial_error(correct[kept]) if kept.any() else None,
        }
        for name, kept in parts.items()
    }
    found["case_decides"]["answered_without_case"] = (
        float((numbers == blind)[matters].mean()) if matters.any() else None
    )
    return found


def paired(usual: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Compare the correctness (N,) of the same questions asked in two ways; the error is that of the difference."""
    change = other.astype(np.float64) - usual
    error = float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else 0.0
    return {
        "n": len(change),
        "usual": float(usual.mean()),
        "other": float(other.mean()),
        "difference": float(change.mean()),
        "error": error,
    }


def between(correct: Mapping[str, np.ndarray], analysed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare models on the same items of one task.

    Parameters
    ----------
    correct : mapping of str to ndarray
        Correctness (N,) by model.
    analysed : mapping of str to mapping
        What `analyse` said of each.

    Returns
    -------
    dict
        ``jaccard``: overlap of the errors of every two models; ``mean_r``: of every feature, over the models that are
        above the most frequent answer.
    """
    names = list(correct)
    pairs = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    told = [one["r"] for one in analysed.values() if one["r"] is not None]
    features = {name: None for one in told for name in one}
    return {
        "jaccard": {f"{a} | {b}": jaccard(correct[a], correct[b]) for a, b in pairs},
        "mean_r": {name: mean_defined([one[name]["r"] for one in told if name in one]) for name in features},
    }
