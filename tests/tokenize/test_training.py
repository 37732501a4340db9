"""Vocabularies trained here: against the obvious way, lossless, and read by tokenizers and transformers alike."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tokenary.core.errors import InputError, OptionError
from tokenary.data import prose
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.supertoken import LINES, chunked, train_supertokens
from tokenary.tokenize.token_premium.superword import train_superwords
from tokenary.tokenize.training import (
    PATTERN,
    SUPERWORD_PATTERN,
    PairTable,
    byte_level,
    merge,
    merges_of,
    pieces_of,
    to_array,
    train_bpe,
    truncated,
    usage,
    with_special,
    word_count,
)

TEXT = prose()[:20_000]
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def trained():
    return {
        "bpe": train_bpe([TEXT], 500),
        "unigram": train_bpe([TEXT], 500, "unigram"),
        "superword": train_superwords([TEXT], 600, transition=0.7),
        "supertoken": train_supertokens([TEXT], 600),
        "whole": train_supertokens([TEXT], 600, whole=True),
    }


@pytest.mark.parametrize("name", ["bpe", "unigram", "superword", "supertoken", "whole"])
@settings(max_examples=60, deadline=None)
@given(text=ANY)
def test_every_text_comes_back(trained, name, text):
    tokenizer = trained[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids.tolist())) == text.encode()


@pytest.mark.parametrize("name", ["bpe", "superword", "supertoken"])
def test_merges_are_applied_in_their_order(trained, name):
    tokenizer = trained[name]
    pattern = {"bpe": PATTERN, "superword": SUPERWORD_PATTERN, "supertoken": LINES}[name]
    merges, ids = merges_of(tokenizer), to_array([TEXT[3000:5000]], pattern)
    assert pieces_of(merges) == [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    for i, (left, right) in enumerate(merges):
        ids = merge(ids, left, right, 256 + i)
    assert tokenizer.encode(TEXT[3000:5000]).tolist() == ids[ids >= 0].tolist()


def test_a_smaller_vocabulary_is_the_first_merges_of_a_larger():
    merges = merges_of(train_bpe([TEXT], 700))
    for size in (257, 300, 555, 700, 9999):
        smaller = byte_level(truncated(merges, size))
        assert smaller.to_json() == train_bpe([TEXT], min(size, 700)).to_json()


def test_two_merges_that_make_the_same_bytes_are_one_token():
    merges = [(97, 98), (98, 99), (256, 99), (97, 257), (258, 100)]
    tokenizer = byte_level(merges, None)
    assert tokenizer.vocab_size == 260 and merges_of(tokenizer) == merges
    assert pieces_of(merges)[256:] == [b"ab", b"bc", b"abc", b"abcd"]
    assert truncated(merges, 259) == merges[:3] and truncated(merges, 260) == merges
    assert tokenizer.decode(tokenizer.encode("abcdbcabc")) == "abcdbcabc"


def test_combining_marks_stay_in_words():
    words = [match.group() for match in regex.finditer(PATTERN, "नमस्ते दुनिया don't 1234.")]
    assert words == ["नमस्ते", " दुनिया", " don't", " 123", "4", "."]
    pieces = regex.findall(SUPERWORD_PATTERN, "of the sea,\nand 12 men")
    assert pieces == ["of the sea", ",", "\n", "and", " 12", " men"]


@settings(deadline=None)
@given(st.text(alphabet="ab 1.\n\té", max_size=50))
def test_the_patterns_hold_every_character(text):
    for pattern in (PATTERN, SUPERWORD_PATTERN, LINES):
        assert "".join(match.group() for match in regex.finditer(pattern, text)) == text
    chunks = regex.findall(SUPERWORD_PATTERN, text)
    inner = [part for chunk in chunks for part in regex.findall(PATTERN, chunk)]
    assert inner == regex.findall(PATTERN, text)  # so phase 1 may encode the pieces of phase 2


# ------------------------------------------------------------------------------------------------- pair table


def counted(ids):
    pairs = Counter(zip(ids.tolist(), ids[1:].tolist(), strict=False))
    return {pair: count for pair, count in pairs.items() if min(pair) >= 0}


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), max_size=60), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5))
def test_the_table_counts_what_is_there(values, merges):
    table = PairTable(np.array(values, np.int32))
    for i, (left, right) in enumerate(merges):
        expected = merge(table.ids, left, right, 4 + i)
        before = len(table.ids)
        assert table.merge(left, right, 4 + i) == before - len(expected)
        assert table.ids.tolist() == expected.tolist()
        found = {(left, right): count for left, right, count in table.top(1000)}
        assert found == counted(table.ids)
        order = [(-count, left, right) for left, right, count in table.top(1000)]
        assert order == sorted(order) and table.top(1) == table.top(3)[:1]


def test_a_banned_pair_is_never_named():
    table = PairTable(np.array([1, 2, 1, 2, 3, 3], np.int32))
    table.ban(1, 2)
    assert [pair[:2] for pair in table.top(10)] == [(2, 1), (2, 3), (3, 3)] and table.top(1)[0][:2] == (2, 1)
    table.merge(3, 3, 4)
    assert (1, 2) not in [pair[:2] for pair in table.top(10)]


def test_the_table_grows():
    ids = np.random.default_rng(0).integers(0, 3000, 40_000).astype(np.int32)
    table = PairTable(ids)
    table.merge(*table.top(1)[0][:2], 3000)
    assert {(left, right): count for left, right, count in table.top(10**6)} == counted(table.ids)


# ------------------------------------------------------------------------------------- superwords, supertokens


def slow_superwords(text, vocab_size, transition, most_words):
    """Phase 2 with lists and a fresh count at every step."""
    inside = train_bpe([text], round(transition * vocab_size))
    merges = merges_of(inside)
    pieces = pieces_of(merges)
    chunks = [inside.encode(match.group()).tolist() for match in regex.finditer(SUPERWORD_PATTERN, text)]
    while len(pieces) < vocab_size:
        counts = Counter(pair for chunk in chunks for pair in itertools.pairwise(chunk))
        fit = [
            (-count, left, right)
            for (left, right), count in counts.items()
            if count > 1 and pieces[left] + pieces[right] not in pieces
            and word_count(pieces[left] + pieces[right]) <= most_words
        ]  # fmt: skip
        if not fit:
            break
        _, left, right = min(fit)
        for chunk in chunks:
            at = 0
            while at < len(chunk) - 1:
                if chunk[at] == left and chunk[at + 1] == right:
                    chunk[at : at + 2] = [len(pieces)]
                at += 1
        merges.append((left, right))
        pieces.append(pieces[left] + pieces[right])
    return merges


@pytest.mark.parametrize("most_words", [1, 2, 4])
def test_superwords_are_those_of_the_slow_way(most_words):
    text = TEXT[:6000]
    trained = train_superwords([text], 420, 0.8, most_words)
    assert merges_of(trained) == slow_superwords(text, 420, 0.8, most_words)
    longest = max(word_count(trained.token_bytes(i)) for i in range(trained.vocab_size))
    assert longest <= most_words and (most_words == 1 or longest > 1)


def test_superwords_need_fewer_tokens_where_words_recur(trained):
    of_the = "of the whale and of the sea\n" * 20
    words, super_ = train_bpe([of_the], 300), train_superwords([of_the], 300, 0.9)
    assert usage(super_, [of_the])["tokens"] < usage(words, [of_the])["tokens"]
    assert usage(words, [TEXT])["across_words"] == 0 < usage(trained["superword"], [TEXT])["across_words"]


@settings(deadline=None)
@given(ANY, st.integers(0, 3))
def test_chunks_are_the_text_and_as_long_as_the_mixture_says(text, seed):
    chunks = list(chunked(text * 5, seed=seed))
    assert "".join(chunks) == text * 5 and all(1 <= len(chunk) <= 60 for chunk in chunks)
    assert chunks == list(chunked(text * 5, seed=seed))


def test_the_mixture_of_lengths():
    lengths = np.array([len(chunk) for chunk in chunked("x" * 400_000, ((2, 3, 0.25), (10, 10, 0.75)))][:-1])
    assert set(lengths) == {2, 3, 10} and (lengths == 10).mean() == pytest.approx(0.75, abs=0.01)
    for mixture in (((0, 3, 1.0),), ((3, 2, 1.0),), ((1, 2, 0.5),)):
        with pytest.raises(OptionError, match="mixture"):
            train_supertokens(["x"], 300, mixture)


def test_supertokens_span_words_but_no_lines(trained):
    pieces = [trained["supertoken"].token_bytes(i) for i in range(600)]
    assert any(b" " in piece.strip() for piece in pieces)
    assert not any(b"\n" in piece.rstrip(b"\n") for piece in pieces)
    assert usage(trained["supertoken"], [TEXT])["across_words"] > 0


def test_a_million_equal_characters():
    """What is quadratic in the length of a piece would not end here."""
    text = "a" * 1_000_000
    for tokenizer in (
        *(train_bpe([text], 262, "bpe"), train_superwords([text], 262), train_supertokens([text], 262)),
        *(train_supertokens([text], 262, whole=True), train_bpe([text], 262, "unigram")),
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.byte_lengths[ids].sum() == len(text)
        assert len(ids) < 1_000_000 / 8 or tokenizer.algorithm == "Unigram"
        assert tokenizer.decode(ids) == text
    table = PairTable(to_array([text]))
    assert table.top(1) == [(97, 97, 999_999)] and table.merge(97, 97, 256) == 500_000


# ------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("name", ["bpe", "unigram", "superword", "supertoken"])
def test_transformers_and_tokenizers_read_it_alike(trained, name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = with_special(trained[name], ["<|end|>"])
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "Call me Ishmael.\n\n  Some years ago — never mind how long नमस्ते"
    by_tokenizers = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    by_transformers = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    expected = tokenizer.encode(text).tolist()
    assert by_tokenizers.encode(text).ids == expected == by_transformers(text)["input_ids"]
    assert by_tokenizers.decode(expected) == text
    assert tokenizer.special_ids == {tokenizer.vocab_size - 1}
    assert by_tokenizers.encode("a<|end|>").ids[-1] == tokenizer.vocab_size - 1


def test_what_cannot_be_trained():
    with pytest.raises(OptionError, match="257"):
        train_bpe(["x"], 256)
    for train in (train_bpe, train_superwords, train_supertokens):
        for texts in ([], ["", " \n"]):
            with pytest.raises(InputError, match="empty"):
                train(texts, 300)
    with pytest.raises(OptionError, match="transition"):
        train_superwords(["x"], 300, transition=1.5)
    with pytest.raises(InputError, match="no token"):
        usage(train_bpe(["x y"], 257), [])


def test_an_error_of_the_texts_comes_through():
    def texts():
        yield "some"
        raise InputError("the disk is gone")

    with pytest.raises(InputError, match="the disk is gone"):
        train_bpe(texts(), 300)


def test_training_is_repeatable(trained):
    assert train_supertokens([TEXT], 600).to_json() == trained["supertoken"].to_json()
    assert train_supertokens([TEXT], 600, seed=1).to_json() != trained["supertoken"].to_json()
    assert json.loads(trained["bpe"].to_json())["model"]["type"] == "BPE"
    assert isinstance(trained["bpe"], TextTokenizer)
