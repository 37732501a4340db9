"""Premiums, the law of vocabulary sizes, and vocabularies that even languages out: against the obvious way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.claims.token_premium import CLAIM, LANGUAGES, OTHERS
from tokenary.core.errors import InputError, OptionError, UnknownNameError
from tokenary.core.seeding import substream
from tokenary.tokenize.base import EncodedText
from tokenary.tokenize.laws import toy_tokenizer
from tokenary.tokenize.parallel import read_po
from tokenary.tokenize.statistics import dispersion, f_test, interval, resample
from tokenary.tokenize.token_premium import TokenPremium
from tokenary.tokenize.token_premium.even import even_vocabularies, verify
from tokenary.tokenize.token_premium.explain import explain, features
from tokenary.tokenize.token_premium.law import fit_law, optimal_sizes, search
from tokenary.tokenize.training import train_bpe


def encoded(texts):
    tokenizer = toy_tokenizer()
    return tokenizer, [
        EncodedText(language, key, text, tokenizer.encode(text))
        for language, rows in texts.items()
        for key, text in rows.items()
    ]


TEXTS = {
    "eng": {"0": "the end", "1": "an owl in the theatre", "2": "the the the", "3": "only here"},
    "deu": {"0": "das Ende", "1": "eine Eule im Theater", "2": "die die die"},
    "rus": {"0": "конец", "1": "сова в театре", "2": "этот этот этот"},
}


def test_premiums_are_ratios_over_the_shared_sentences():
    tokenizer, texts = encoded(TEXTS)
    measure = TokenPremium(samples=400)
    found = measure.figures(tokenizer, measure.count(tokenizer, texts))
    keys = ["0", "1", "2"]
    sizes = {name: [len(tokenizer.encode(rows[key])) for key in keys] for name, rows in TEXTS.items()}
    assert found["shared"] == 3 and found["skipped"] == {}
    for name, row in found["languages"].items():
        assert row["tokens"] == sum(sizes[name]) and row["premium"] == sum(sizes[name]) / sum(sizes["eng"])
        assert row["ratio"] == pytest.approx(np.mean([a / b for a, b in zip(sizes[name], sizes["eng"], strict=True)]))
        nbytes = [sum(len(TEXTS[other][key].encode()) for key in keys) for other in (name, "eng")]
        assert row["byte_premium"] == nbytes[0] / nbytes[1]
        assert row["context_share"] == pytest.approx(1 / row["premium"])
        assert row["low"] <= row["premium"] <= row["high"]
    assert found["languages"]["eng"]["low"] == found["languages"]["eng"]["high"] == 1
    totals = [sum(sizes[name]) for name in ("deu", "eng", "rus")]
    assert found["dispersion"]["cv"] == pytest.approx(np.std(totals, ddof=1) / np.mean(totals))


def test_the_interval_is_that_of_resampled_sentences():
    rng = np.random.default_rng(0)
    rows = {str(i): "x" * int(rng.integers(1, 40)) for i in range(50)}
    tokenizer, texts = encoded({"eng": rows, "b": {key: text * 2 + "yz" for key, text in rows.items()}})
    measure = TokenPremium(samples=500, seed=3)
    found = measure.figures(tokenizer, measure.count(tokenizer, texts))["languages"]["b"]
    keys = sorted(rows)
    draws = [np.repeat(np.arange(50), resample(50, 3, "token-premium", i)) for i in range(500)]
    ratios = [sum(2 * len(rows[keys[j]]) + 2 for j in draw) / sum(len(rows[keys[j]]) for j in draw) for draw in draws]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))


def test_languages_that_share_too_little_are_left_out_and_named():
    texts = {**TEXTS, "fra": {"0": "la fin"}, "empty": {"9": "rien"}}
    tokenizer, rows = encoded(texts)
    measure = TokenPremium()
    found = measure.figures(tokenizer, measure.count(tokenizer, rows))
    assert set(found["languages"]) == set(TEXTS) and set(found["skipped"]) == {"fra", "empty"}
    assert "shares 1 of 4" in found["skipped"]["fra"]
    one = {name: {"0": texts[name]["0"]} for name in ("eng", "deu")}
    tokenizer, rows = encoded(one)
    found = measure.figures(tokenizer, measure.count(tokenizer, rows))
    assert found["languages"] == {} and "at least 2" in found["why"]


def test_what_is_not_parallel_has_no_premium():
    tokenizer, rows = encoded({"eng": {"": "the end"}})
    measure = TokenPremium()
    assert measure.figures(tokenizer, measure.count(tokenizer, rows)) == {"why": "no parallel text", "languages": {}}
    tokenizer, rows = encoded(TEXTS)
    with pytest.raises(UnknownNameError, match="eng"):
        TokenPremium("engl").figures(tokenizer, measure.count(tokenizer, rows))


# -------------------------------------------------------------------------------------------------- statistics


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1000), min_size=2, max_size=12))
def test_dispersion(values):
    found, x = dispersion(values), np.array(values)
    gini = np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean())
    assert found["gini"] == pytest.approx(gini, abs=1e-9)
    assert found["cv"] == pytest.approx(np.std(x, ddof=1) / x.mean(), abs=1e-9)
    assert found["max_min"] == max(values) / min(values)


def test_dispersion_of_too_little():
    assert dispersion([3.0])["cv"] is None and dispersion([])["mean"] is None and dispersion([0.0, 1.0])["cv"] is None


def test_the_f_test_is_that_of_the_tables():
    # Quantiles of F: P(F(9, 9) > 4.025994) = 0.025, P(F(4, 7) > 5.522594) = 0.025.
    for d1, d2, quantile in ((9, 9, 4.025994), (4, 7, 5.522594)):
        first, second = (np.resize([1.0, -1.0], n + 1) for n in (d1, d2))
        first, second = first / first.std(ddof=1) * math.sqrt(quantile), second / second.std(ddof=1)
        ratio, p = f_test(first, second)
        assert ratio == pytest.approx(quantile) and p == pytest.approx(0.05, abs=1e-6)
        assert f_test(second, first)[1] == pytest.approx(0.05, abs=1e-6)
    assert f_test([1, 2, 3], [3, 2, 1]) == (1.0, pytest.approx(1.0))
    assert math.isnan(f_test([1], [1, 2])[1])


def test_the_f_test_is_uniform_where_nothing_differs():
    stream = substream(0, "f test")
    found = np.sort([f_test(stream.normal(size=8), stream.normal(size=12))[1] for _ in range(2000)])
    assert np.abs(found - np.linspace(0, 1, 2000)).max() < 1.63 / 2000**0.5  # Kolmogorov, 1%


def test_resampled_and_interval():
    assert resample(10, 0, "x").sum() == 10 and resample(10, 0, "x").tolist() == resample(10, 0, "x").tolist()
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))


def test_a_regression_names_what_counts():
    rng = np.random.default_rng(0)
    a, b, noise = rng.normal(size=(3, 400))
    found = explain(2 * a + 0.1 * noise, {"a": a, "b": b, "flat": np.ones(400)})
    assert found["r2"] > 0.99 and found["a"]["drop_r2"] > 0.9 > 0.05 > abs(found["b"]["drop_r2"])
    assert found["a"]["alone"] == pytest.approx(np.corrcoef(2 * a + 0.1 * noise, a)[0, 1] ** 2)
    assert found["a"]["weight"] == pytest.approx(1, abs=0.05) and found["flat"]["weight"] == pytest.approx(0)


def test_features():
    found = features(["the cat"], ["the dog", "the é"])
    assert found["seen_types"] == 1 / 3 and found["word_length"] == 10 / 4 and found["chars"] == 13
    assert found["whitespace"] == 3 / 13 and found["bytes_per_char"] == 14 / 13


# --------------------------------------------------------------------------------------------- law and vocabularies


@settings(deadline=None)
@given(st.floats(10, 1e6), st.floats(-0.9, -0.05), st.floats(50, 5000))
def test_the_power_law_is_found_and_solved(a, b, size):
    law = fit_law({v: a * v**b for v in (300, 500, 900, 2000)})
    assert law.a == pytest.approx(a, rel=1e-6) and law.b == pytest.approx(b, rel=1e-6) and law.rms < 1e-9
    assert law.solve(law(size)) == pytest.approx(size, rel=1e-6)


def test_where_it_levels_off():
    points = {v: 400 + 9e5 / v for v in (300, 500, 900, 2000, 4000)}
    saturating, power = fit_law(points, "saturating"), fit_law(points)
    assert saturating.rms < power.rms / 10 and saturating(1300) == pytest.approx(400 + 9e5 / 1300, rel=0.01)
    assert saturating.solve(saturating.c) is None and power.solve(100) is not None


def test_straight_lines_between_sizes():
    law = fit_law({300: 900, 600: 700, 1200: 710}, "local")
    assert law(600) == pytest.approx(700) and law.solve(700) == pytest.approx(600)
    assert law.solve(800) == pytest.approx(300 * 2 ** (math.log(900 / 800) / math.log(900 / 700)))
    assert law.solve(699) is None and law.solve(901) is None


def test_sizes_are_clamped_and_say_so():
    curves = {"near": {300: 1000, 600: 800}, "far": {300: 2000, 600: 1900}, "below": {300: 500, 600: 300}}
    found = optimal_sizes(curves, 900, 260, 2000)
    assert found["near"].reached and 300 < found["near"].size < 600
    assert found["near"].expected == pytest.approx(900, rel=0.01)
    assert (found["far"].size, found["far"].reached) == (2000, False)
    assert (found["below"].size, found["below"].reached) == (260, False)
    for points in ({300: 5}, {300: 5, 400: 0}):
        with pytest.raises(OptionError, match="points"):
            fit_law(points)


@settings(deadline=None)
@given(st.integers(260, 3000), st.integers(260, 3000))
def test_the_search_finds_the_size(wanted, start):
    asked = []

    def count(size):
        asked.append(size)
        return 1e6 / size

    size, found = search(count, 1e6 / wanted, 260, 3000, start, tolerance=0)
    assert size == wanted and found == 1e6 / wanted and len(asked) == len(set(asked)) <= 14


def two_languages():
    """One language writes every letter with two: it needs twice the bytes, and longer tokens."""
    words = [f"{a}{b}{c}" for a in "bdgk" for b in "aeo" for c in "lmnrst"]
    stream = substream(0, "two languages")
    sentences = [" ".join(words[i] for i in stream.integers(0, len(words), 8)) for _ in range(300)]
    return {"one": sentences, "two": [" ".join("".join(c + c for c in w) for w in s.split()) for s in sentences]}


@pytest.mark.parametrize("law", ["power", "local", "search"])
def test_languages_are_evened_out_on_unseen_sentences(law):
    texts = two_languages()
    parts = ((0, 200), (200, 250), (250, 300))
    training, fitting, unseen = ({name: rows[a:b] for name, rows in texts.items()} for a, b in parts)
    even = even_vocabularies(training, fitting, (265, 280, 300, 320, 340), 290, law)
    assert even.curves["one"][290] == sum(map(len, train_bpe(training["one"], 290).encode_batch(fitting["one"])))
    assert even.target == np.median([even.curves[name][290] for name in texts])
    assert even.choices["one"].size < even.choices["two"].size
    assert even.tokenizer("two").vocab_size == even.choices["two"].size
    found = verify(even, 290, unseen)
    row = found["languages"]["two"]
    assert row["tokens_equal"] == sum(map(len, even.tokenizer("two", 290).encode_batch(unseen["two"])))
    assert found["own"]["cv"] < found["equal"]["cv"] / 2
    assert set(even.exponents()) == set(texts) and all(b < 0 for b in even.exponents().values())


def test_too_little_text_for_a_vocabulary():
    texts = two_languages()
    with pytest.raises(InputError, match=r"two: its text yields 2.. tokens"):
        even_vocabularies({"one": texts["one"], "two": ["x y"]}, texts, (300, 400), 350)
    with pytest.raises(InputError, match="two: nothing to train on"):
        even_vocabularies({"one": texts["one"], "two": [" "]}, texts, (300, 400), 350)
    for sizes in ((200, 400), ()):
        with pytest.raises(OptionError, match="sizes"):
            even_vocabularies(texts, texts, sizes, 350)


def test_a_small_vocabulary_of_a_poor_language_is_used_as_far_as_it_goes():
    texts = two_languages()
    poor = {"one": texts["one"], "two": texts["two"][:1]}
    even = even_vocabularies(poor, texts, (265, 270, 400), 268)
    assert max(even.curves["one"]) == 400 > max(even.curves["two"])


# -------------------------------------------------------------------------------------------------- data, claim


def test_gettext_catalogues():
    text = """msgid ""
msgstr "header"

#, fuzzy
msgid "not this"
msgstr "nicht das"

msgctxt "menu"
msgid "an "
"owl"
msgstr "eine \\"Eule\\""

msgid "one"
msgid_plural "many"
msgstr[0] "eins"
msgstr[1] "viele"

msgid "untranslated"
msgstr ""
"""
    assert read_po(text) == [("menu", "an owl", 'eine "Eule"'), ("", "one", "eins")]


def test_the_claim_holds_out_other_languages():
    assert not set(LANGUAGES) & set(OTHERS) and CLAIM.held_out == {"languages": OTHERS}
