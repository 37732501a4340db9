"""Token premium: a vocabulary size for each language evens out how many tokens the same messages need."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome
from tokenary.core.seeding import substream
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.parallel import django_catalogues
from tokenary.tokenize.statistics import coefficient_of_variation, dispersion, f_test, resample
from tokenary.tokenize.token_premium.even import even_vocabularies
from tokenary.tokenize.token_premium.explain import explain, features
from tokenary.tokenize.token_premium.law import Kind

# 33 languages beside English with more than 400 messages; the held-out run takes others.
LANGUAGES = (
    *("ar", "bg", "bn", "ca", "cs", "da", "de", "el", "es", "et", "fa", "fi", "fr", "ga", "he", "hi", "hr", "hu"),
    *("hy", "id", "it", "ja", "ka", "ko", "lt", "lv", "nl", "pl", "pt", "ro", "ru", "sv", "tr"),
)
OTHERS = ("sr", "sk", "be", "sl", "hsb", "ml", "mn", "ky", "is", "eu", "mk", "gl", "uk", "vi")
GRID = (280, 340, 430, 500, 600, 800, 1030, 1500)


def run(
    seed: int = 0,
    languages: Iterable[str] = LANGUAGES,
    grid: Iterable[int] = GRID,
    common: int = 500,
    law: Kind = "power",
    samples: int = 1000,
) -> Outcome:
    """Fit CTC(V) on one part of the shared messages, train every language at its own V, and count on another part.

    Parameters
    ----------
    seed : int
        Splits the messages.
    languages : iterable of str
        Locales of Django's catalogues; English comes on top.
    grid : iterable of int
        Vocabulary sizes that the law is fitted to.
    common : int
        The size whose median CTC is the target, and at which languages are compared before.
    law : {"power", "saturating", "local"}
        Form of the law.
    samples : int
        Resamples of the messages for the spread.
    """
    names, sizes = ["en", *languages], sorted({*grid, common})
    texts = django_catalogues(names[1:])
    shared = sorted(set.intersection(*(set(texts[name]) for name in names)))
    order = substream(seed, "token-premium claim", "split").permutation(len(shared))
    half, quarter = len(shared) // 2, len(shared) // 4
    fit = [shared[i] for i in order[:quarter]]
    check = [shared[i] for i in order[quarter:half]]
    evaluated = {*fit, *check}
    training = {name: [texts[name][key] for key in sorted(texts[name]) if key not in evaluated] for name in names}

    def said(keys: list[str]) -> dict[str, list[str]]:
        return {name: [texts[name][key] for key in keys] for name in names}

    def counts(tokenizers: Iterable[TextTokenizer]) -> np.ndarray:
        """Tokens of every unseen message: (languages, messages)."""
        rows = zip(tokenizers, said(check).values(), strict=True)
        return np.array([[len(ids) for ids in tokenizer.encode_batch(messages)] for tokenizer, messages in rows])

    even = even_vocabularies(training, said(fit), sizes, common, law)
    chosen = [even.choices[name].size for name in names]
    shuffled = substream(seed, "token-premium claim", "random").permutation(chosen)
    own = counts(even.tokenizer(name) for name in names)
    other = counts(even.tokenizer(name, int(size)) for name, size in zip(names, shuffled, strict=True))
    at_size = {size: counts(even.tokenizer(name, size) for name in names) for size in sizes}
    equal = at_size[common]
    nbytes = np.array([[len(text.encode()) for text in messages] for messages in said(check).values()])
    weights = np.stack([resample(len(check), seed, "token-premium claim", i) for i in range(samples)])

    def spread(tokens: np.ndarray) -> np.ndarray:
        return coefficient_of_variation(weights @ tokens.T)

    def figure(name: str, tokens: np.ndarray) -> Figure:
        return Figure(name, float(coefficient_of_variation(tokens.sum(1))), float(spread(tokens).std(ddof=1)))

    about = [features(training[name], said(check)[name]) for name in names]
    paired = spread(equal) - spread(own)
    ratio, p = f_test(equal.sum(1) / equal.sum(1).mean(), own.sum(1) / own.sum(1).mean())
    return Outcome(
        method=figure("a size for each language", own),
        baseline=figure(f"{common} tokens for every language", equal),
        controls=(figure("random", other), figure("bytes", nbytes)),
        n=len(names),
        runs=1,
        paired_spread=float(paired.std(ddof=1)),
        details={
            "messages": {"fit": len(fit), "verification": len(check), "shared": len(shared)},
            "training_bytes": [
                min(sum(len(text.encode()) for text in found) for found in training.values()),
                max(sum(len(text.encode()) for text in found) for found in training.values()),
            ],
            "target": even.target,
            "cv_difference_95%": [float(x) for x in np.quantile(paired, [0.025, 0.975])],
            "variance_ratio": ratio,
            "variance_ratio_p": p,
            "sizes": dict(zip(names, chosen, strict=True)),
            "not_reached": [name for name in names if not even.choices[name].reached],
            "exponents": even.exponents(),
            "dispersion": {"own": dispersion(own.sum(1).tolist()), "equal": dispersion(equal.sum(1).tolist())},
            "equal_sizes": {str(size): dispersion(found.sum(1).tolist()) for size, found in at_size.items()},
            # What goes with many tokens at the common size.
            "explained": explain(np.log(equal.sum(1)), {term: [row[term] for row in about] for term in about[0]}),
        },
    )


CLAIM = Claim(
    slug="token-premium",
    statement="A vocabulary size chosen for each language by its law CTC(V) lowers the coefficient of variation of "
    "tokens for the same messages by at least 40%, against one size for all languages",
    metric="coefficient of variation over languages of the tokens of unseen parallel messages",
    direction="lower",
    threshold=1 / 0.6,
    run=run,
    variation="14 other languages, with the law, the grid and the target's rule as they are",
    held_out={"languages": OTHERS},
    model="",
    minutes=0.5,
    fast={"languages": ("de", "fi", "ru", "hi", "ja", "ar"), "grid": (280, 430, 600, 1030), "samples": 200},
)
