"""Entropies, codes and compression of streams of ids: against coders that go token by token."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import InputError, OptionError
from tokenary.core.seeding import substream
from tokenary.data import prose
from tokenary.tokenize.base import EncodedText
from tokenary.tokenize.laws import toy_tokenizer
from tokenary.tokenize.tokenizer_information import (
    TokenizerInformation,
    renyi_entropy,
    unigram_entropy,
    vocabulary_bits,
)
from tokenary.tokenize.tokenizer_information import grams as module
from tokenary.tokenize.tokenizer_information.columns import group
from tokenary.tokenize.tokenizer_information.compression import (
    deflate,
    lz78_phrases,
    pack_fixed,
    pack_numbers,
    pack_ranked,
    ranks,
    xz,
)
from tokenary.tokenize.tokenizer_information.grams import Grams, held_out, plug_in, sequential, sequential_orders
from tokenary.tokenize.tokenizer_information.lz_bpe import serialise, train_lz_bpe
from tokenary.tokenize.training import PATTERN, byte_level, to_array, train_bpe

ROWS = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=4)


def texts_of(rows):
    return [EncodedText("a", "", f"text {i} {row}", np.array(row, np.int32)) for i, row in enumerate(rows)]


def runs_of(rows, order):
    for row in rows:
        padded = [-1] * (order - 1) + row
        yield from (tuple(padded[i : i + order]) for i in range(len(row)))


# ------------------------------------------------------------------------------------------------------- entropy


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1))
def test_entropies(ids):
    counts = Counter(ids)
    p = np.array(list(counts.values())) / len(ids)
    values, times = np.unique(list(counts.values()), return_counts=True)
    assert unigram_entropy(values, times) == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-9)
    assert renyi_entropy(values, times, 2.0) == pytest.approx(-np.log2((p**2).sum()), abs=1e-9)
    assert renyi_entropy(values, times, 1.0) == unigram_entropy(values, times)


def test_uniform_noise_is_eight_bits_and_the_correction_helps():
    ids = substream(0, "uniform").integers(0, 256, 20_000).astype(np.int32)
    tokenizer = byte_level([], None)
    measure = TokenizerInformation(order=2, compress="lz78")
    texts = [EncodedText("a", "", f"{i:<100}", part) for i, part in enumerate(np.split(ids, 200))]
    row = measure.figures(tokenizer, measure.count(tokenizer, texts))["languages"]["a"]
    assert abs(row["h1"] - 8) < 0.003 < abs(row["h1_plug_in"] - 8)
    assert row["u1"] == pytest.approx(1, abs=0.001) and row["renyi_efficiency"] <= row["u1"]
    assert row["effective_vocabulary"] == pytest.approx(1, abs=0.01) and row["dead"] == 0
    assert 8 <= row["orders"]["1"]["sequential"] < 8.15 and 8 <= row["orders"]["2"]["sequential"] < 8.3
    assert row["orders"]["2"]["plug_in"] < 7  # what a plug-in estimate makes of noise
    assert row["orders"]["2"]["held_out"] > 7.9
    assert row["compressed"]["lz78"]["bits_per_byte"] > 8


def test_too_few_tokens_for_a_claim():
    tokenizer = toy_tokenizer()
    measure = TokenizerInformation(compress="none")
    row = measure.figures(tokenizer, measure.count(tokenizer, [EncodedText("a", "", "abc", tokenizer.encode("abc"))]))
    row = row["languages"]["a"]
    assert row["h1"] is None and row["u1"] is None and "less than 10 each" in row["why"]
    assert row["h1_plug_in"] == pytest.approx(math.log2(3)) and row["compressed"] is None
    assert row["dead"] == 261 - 3 and row["dead_share"] == 258 / 261 and len(row["dead_examples"]) == 5


# ---------------------------------------------------------------------------------------------------------- runs


@settings(deadline=None)
@given(ROWS, st.integers(1, 4))
def test_runs_are_counted(rows, order):
    grams = Grams.of(texts_of(rows), order)
    found = {tuple(run - 1): int(count) for run, count in zip(grams.runs.T, grams.counts.sum(0), strict=True)}
    assert found == dict(Counter(runs_of(rows, order))) and grams.total == sum(map(len, rows))
    for length, level in enumerate(grams.levels, start=1):
        runs = [tuple(run - 1) for run in grams.runs[-length:, level.first].T]
        assert dict(zip(runs, level.counts.tolist(), strict=True)) == dict(Counter(runs_of(rows, length)))
        assert [runs[n] for n in level.of] == [tuple(run[-length:] - 1) for run in grams.runs.T]
        contexts = dict(zip(level.context.tolist(), (run[:-1] for run in runs), strict=True))
        assert [contexts[n] for n in level.context.tolist()] == [run[:-1] for run in runs]
        assert len(set(contexts.values())) == len(contexts)


@settings(deadline=None)
@given(ROWS, ROWS)
def test_counts_of_parts_add_up(first, second):
    texts = texts_of(first + second)
    whole, sum_ = Grams.of(texts, 3), Grams.of(texts[: len(first)], 3) + Grams.of(texts[len(first) :], 3)
    assert whole.runs.tolist() == sum_.runs.tolist() and whole.counts.tolist() == sum_.counts.tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**20), st.integers(0, 2**30)), max_size=30))
def test_equal_columns_are_grouped(columns):
    array = np.array(columns, np.int64).reshape(-1, 3).T.astype(np.int32)
    first, where = group(array)
    assert [tuple(array[:, i]) for i in first] == sorted(set(map(tuple, array.T.tolist())))
    assert all(tuple(array[:, first[w]]) == tuple(array[:, i]) for i, w in enumerate(where))


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_plug_in_entropy(rows, order):
    grams = Grams.of(texts_of(rows), order)
    if not grams.total:
        return
    joint, given_ = Counter(runs_of(rows, order)), Counter(run[:-1] for run in runs_of(rows, order))
    expected = -sum(n * math.log2(n / given_[run[:-1]]) for run, n in joint.items()) / grams.total
    assert plug_in(grams) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(ROWS.filter(any), st.integers(1, 4))
def test_one_table_says_of_shorter_runs_what_theirs_says(rows, order):
    tables = [Grams.of(texts_of(rows), length) for length in range(1, order + 1)]
    assert sequential_orders(tables[-1], 50) == [sequential(table, 50) for table in tables]
    assert [plug_in(tables[-1], length) for length in range(1, order + 1)] == [plug_in(table) for table in tables]
    upper = held_out(tables[-1], 50)
    assert upper is None or upper == pytest.approx([held_out(table, 50)[-1] for table in tables], abs=1e-12)


def coder(rows, order, vocabulary, d, theta):
    """The adaptive code, token by token, as a sender would write it."""
    tables = [{} for _ in range(order)]
    novel = 0

    def code(token, context, level):
        nonlocal novel
        if level < 0:
            novel += 1
            return math.log2(vocabulary - novel + 1)
        table = tables[level].setdefault(context, {})
        n, t = sum(table.values()), len(table)
        if token in table:
            p = (table[token] - d) / (theta + n)
            table[token] += 1
            return -math.log2(p)
        p = (theta + d * t) / (theta + n) if n else 1.0
        table[token] = 1
        return -math.log2(p) + code(token, context[1:], level - 1)

    return sum(code(run[-1], run[:-1], order - 1) for run in runs_of(rows, order))


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(1, 3), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.0, 0.5, 8.0]), st.randoms())
def test_the_sequential_length_is_that_of_a_real_code(rows, order, d, theta, random):
    saved = module.DISCOUNTS, module.CONCENTRATIONS
    module.DISCOUNTS, module.CONCENTRATIONS = (d,), (theta,)
    try:
        found = sequential(Grams.of(texts_of(rows), order), 50)
    finally:
        module.DISCOUNTS, module.CONCENTRATIONS = saved
    assert found == pytest.approx(coder(rows, order, 50, d, theta), abs=1e-6)
    random.shuffle(rows)
    assert found == pytest.approx(coder(rows, order, 50, d, theta), abs=1e-6)  # in any order of the texts


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_the_held_out_length(rows, order):
    texts = texts_of(rows)
    halves = [[], []]
    for text in texts:
        halves[zlib.crc32(text.text.encode()) & 1].append(text.ids.tolist())
    found = held_out(Grams.of(texts, order), 50)
    if not all(map(any, halves)):
        assert found is None
        return
    bits = [0.0] * order
    for learned, scored in (halves, halves[::-1]):
        for run in runs_of(scored, order):
            chance = 1 / 50
            for k in range(1, order + 1):
                seen = Counter(part[-k:] for part in runs_of(learned, order))
                context = sum(count for part, count in seen.items() if part[:-1] == run[order - k : -1])
                chance = (seen[run[-k:]] + 5 * chance) / (context + 5)
                bits[k - 1] -= math.log2(chance)
    assert found == pytest.approx([sum_ / sum(map(len, rows)) for sum_ in bits], abs=1e-9)


def test_context_helps_on_text_and_not_on_noise():
    tokenizer = toy_tokenizer()
    text = prose()[:60_000]
    ids = tokenizer.encode(text)
    shuffled = substream(0, "shuffled").permutation(ids)
    rates = {}
    for name, stream in (("text", ids), ("shuffled", shuffled)):
        grams = Grams.of([EncodedText("a", "", text, stream)], 3)
        rates[name] = [bits / len(ids) for bits in sequential_orders(grams, 261)]
    assert rates["text"][0] - rates["text"][1] > 0.7 and rates["text"][1] - rates["text"][2] > 0.2
    assert rates["shuffled"][0] <= rates["shuffled"][1] <= rates["shuffled"][2]
    assert rates["text"][0] == pytest.approx(rates["shuffled"][0])


# --------------------------------------------------------------------------------------------------- compression


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80))
def test_lz78(ids):
    phrases, known, phrase = 0, set(), ()
    for symbol in ids:
        phrase += (symbol,)
        if phrase not in known:
            known.add(phrase)
            phrases, phrase = phrases + 1, ()
    assert lz78_phrases(np.array(ids, np.int32)) == phrases + bool(phrase)


def test_lz78_of_a_period_grows_like_a_root():
    counts = [lz78_phrases(np.resize(np.array([1, 2, 3], np.int32), n)) for n in (10_000, 1_000_000)]
    assert counts[1] < 12 * counts[0]  # 10 times for the root of 100, 100 times if it did not compress


def unpacked(data, count):
    """Read numbers back that `pack_numbers` wrote."""
    escapes = next((e for e in range(225) if (256 - e) + e * 256 >= count), None)
    found, at = [], 0
    while at < len(data):
        first, at = data[at], at + 1
        short = 192 if escapes is None else 256 - escapes
        if first < short:
            found.append(first)
        elif escapes is not None or first < short + 32:
            found.append(short + (first - short) * 256 + data[at])
            at += 1
        else:
            found.append(short + 32 * 256 + (first - short - 32) * 65536 + data[at] * 256 + data[at + 1])
            at += 2
    return found


@settings(deadline=None)
@given(st.data(), st.sampled_from([1, 200, 256, 257, 511, 1024, 49_152, 57_376, 57_377, 151_936, 262_144]))
def test_packed_numbers_can_be_read_back(data, count):
    numbers = [*data.draw(st.lists(st.integers(0, count - 1), max_size=30)), count - 1]
    packed = pack_numbers(np.array(numbers, np.int64), count)
    assert unpacked(packed, count) == numbers


@settings(deadline=None)
@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=60))
def test_frequent_ids_come_first(ids):
    array = np.array(ids, np.int32)
    numbers, count = ranks(array)
    counts = Counter(ids)
    order = sorted(counts, key=lambda i: (-counts[i], i))
    assert numbers.tolist() == [order.index(i) for i in ids] and count == len(counts)
    assert pack_ranked(array) == bytes(numbers.tolist())  # fewer than 256 types
    wide = pack_fixed(array, 70_001)
    assert [int.from_bytes(wide[i : i + 3], "little") for i in range(0, len(wide), 3)] == ids
    assert len(pack_fixed(array, 65_536)) == 2 * len(ids) and len(pack_fixed(array, 256)) == len(ids)


def test_compressors():
    data = prose()[:50_000].encode()
    assert deflate(data) == len(zlib.compress(data, 9)) - 6  # header and checksum of zlib
    assert xz(data) < deflate(data) and xz(b"") <= 1 and deflate(b"") == 2


def test_the_vocabulary_is_charged():
    assert vocabulary_bits(byte_level([(97, 98)], None)) == 2 * 9
    trained = train_bpe([prose()[:5000]], 300, "unigram")
    assert vocabulary_bits(trained) == 8 * sum(len(trained.token_bytes(i)) + 1 for i in trained.ids)
    tokenizer, text = toy_tokenizer(), prose()[:20_000]
    measure = TokenizerInformation(compress="xz")
    found = measure.figures(tokenizer, measure.count(tokenizer, [EncodedText("a", "", text, tokenizer.encode(text))]))
    rows = found["languages"]["a"]["compressed"]
    assert set(rows) == {f"{c}_{k}" for c in ("gzip", "xz") for k in ("fixed", "ranked", "raw")} | {"lz78"}
    for name, row in rows.items():
        extra = 0 if name.endswith("_raw") else found["vocabulary_bits"] / len(text.encode())
        assert row["with_vocabulary"] == pytest.approx(row["bits_per_byte"] + extra)
    assert rows["gzip_raw"]["bits_per_byte"] == 8 * deflate(text.encode()) / len(text.encode())


def test_only_the_start_of_a_file_is_looked_at_for_runs():
    tokenizer = toy_tokenizer()
    texts = [EncodedText("a", "", "the", tokenizer.encode("the"), offset) for offset in (0, 1 << 20)]
    measure = TokenizerInformation(first_mb=1)
    stream = measure.count(tokenizer, texts).of["a"]
    assert (stream.nbytes, stream.first_nbytes, stream.grams.total, stream.used[1].sum()) == (6, 3, 1, 2)


# -------------------------------------------------------------------------------------------------------- LZ BPE


def slow_lz_bpe(text, check, vocab_size, candidates, serial, pattern):
    """The rule with lists, counted afresh at every step."""

    def joined(ids, left, right, new):
        out, i = [], 0
        while i < len(ids):
            hit = ids[i] == left and ids[i + 1 : i + 2] == [right]
            out.append(new if hit else ids[i])
            i += 2 if hit else 1
        return out

    def size(ids):
        return deflate(serialise(np.array([i for i in ids if i >= 0], np.int32), serial))

    train, stream = (to_array([part], pattern).tolist() for part in (text, check))
    merges, pieces = [], [bytes([byte]) for byte in range(256)]
    while len(pieces) < vocab_size:
        counts = Counter(pair for pair in itertools.pairwise(train) if min(pair) >= 0)
        new_ones = [(pair, n) for pair, n in counts.items() if pieces[pair[0]] + pieces[pair[1]] not in pieces]
        best = sorted(new_ones, key=lambda row: (-row[1], row[0]))[:candidates]
        best = [pair for pair, n in best if n > 1]
        if not best:
            break
        tried = [(size(joined(stream, *pair, len(pieces))), i) for i, pair in enumerate(best)]
        pair = best[min(tried)[1]]
        train, stream = (joined(ids, *pair, len(pieces)) for ids in (train, stream))
        merges.append(pair)
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
    return merges


@pytest.mark.parametrize(("serial", "pattern"), [("fixed", None), ("ranked", None), ("fixed", PATTERN)])
def test_the_rule_is_that_of_the_slow_way(serial, pattern):
    text, check = prose()[:4000], prose()[4000:6000]
    found = train_lz_bpe([text], check, 300, candidates=6, serial=serial, pattern=pattern)
    assert found.merges == slow_lz_bpe(text, check, 300, 6, serial, pattern)
    assert found.sizes[-1] == deflate(serialise(found.encode(check), serial))
    assert found.encode(check).tolist() == found.tokenizer().encode(check).tolist()
    assert found.tokenizer().decode(found.encode(check)) == check


def test_other_scores():
    text, check = prose()[:20_000], prose()[20_000:26_000]
    options = {"vocab_size": 320, "candidates": 8}
    bpe = train_lz_bpe([text], "", score="count", **options)
    assert bpe.merges == train_lz_bpe([text], "", 320, 1, score="gain").merges  # of one candidate, the most frequent
    made = {score: train_lz_bpe([text], check, score=score, **options) for score in ("gzip", "lz78", "gain", "random")}
    assert len({tuple(found.merges) for found in (bpe, *made.values())}) == 5
    assert made["gzip"].sizes[-1] < deflate(serialise(bpe.encode(check), "fixed"))
    ids = made["lz78"].encode(check)
    phrases = lz78_phrases(ids)
    assert made["lz78"].sizes[-1] == pytest.approx(phrases * (math.log2(phrases) + math.log2(320)))
    again = train_lz_bpe([text], check, score="gzip", workers=3, **options)
    assert again.merges == made["gzip"].merges
    assert len(bpe.encode(check, 10)) > len(bpe.encode(check, 20)) > len(bpe.encode(check))


def test_noise_offers_no_merge_and_training_stops():
    noise = "".join(map(chr, substream(0, "noise").integers(32, 127, 12_000)))
    found = train_lz_bpe([noise[:8000]], noise[8000:], 400, candidates=8, serial="ranked", stop=True)
    assert found.natural_stop == len(found.merges) < 144
    assert found.sizes == sorted(found.sizes, reverse=True)
    on = train_lz_bpe([noise[:8000]], noise[8000:], 300, candidates=8, serial="ranked")
    assert on.natural_stop == found.natural_stop and len(on.merges) == 44


def test_what_is_refused():
    for options in ({"vocab_size": 256}, {"vocab_size": 65_537}, {"vocab_size": 300, "candidates": 0}):
        with pytest.raises(OptionError):
            train_lz_bpe(["abab"], "abab", **options)
    for texts, check in (([], "ab"), (["abab"], "")):
        with pytest.raises(InputError):
            train_lz_bpe(texts, check, 300)
    for options in ({"order": 5}, {"alpha": 0}, {"compress": "bzip2"}, {"first_mb": 0}):
        with pytest.raises(OptionError):
            TokenizerInformation(**options)
