"""An audit: counts against the obvious way, in any parts and by any engine, and two tokenizers side by side."""

from __future__ import annotations

import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from tokenary.core.encodings import CLASSES, alternatives, classify, encodings
from tokenary.core.errors import InputError
from tokenary.core.spelling import CHAR_OF
from tokenary.data import prose
from tokenary.tokenize import corpus
from tokenary.tokenize.artifacts import exposure, faults, lossy_strings, unreachable
from tokenary.tokenize.audit import _describe, align, audit, differences, local, total
from tokenary.tokenize.base import TextTokenizer
from tokenary.tokenize.corpus import Skipped
from tokenary.tokenize.laws import toy_tokenizer
from tokenary.tokenize.report import render
from tokenary.tokenize.token_premium import TokenPremium
from tokenary.tokenize.tokenizer_information import TokenizerInformation
from tokenary.tokenize.training import byte_level, train_bpe

TEXTS = {
    "eng": {"0": "the theatre, the end.", "1": "an owl and another one", "2": "the the"},
    "fra": {"0": "le théâtre, la fin.", "1": "un hibou et un autre", "2": "le la"},
    "jpn": {"0": "劇場、終わり。", "1": "フクロウ", "2": "その"},
}


def run(tokenizers, parts, **options):
    found = audit(tokenizers, parts, [TokenPremium(), TokenizerInformation(compress="lz78")], **options)
    found.pop("date")
    return found


def bytes_only(merges=()):
    return byte_level(list(merges), None, "bytes")


def test_figures_are_those_of_the_obvious_way():
    tokenizer = toy_tokenizer()
    found = run([tokenizer], corpus.plan_texts(TEXTS))["tokenizers"][0]["languages"]
    for language, texts in TEXTS.items():
        tokens = sum(len(tokenizer.encode(text)) for text in texts.values())
        words = sum(len(regex.findall(r"[\p{L}\p{M}\p{N}]+", text)) for text in texts.values())
        row = found[language]
        assert row["tokens"] == tokens and row["faults"] == 0 and row["unknown"] == 0
        assert row["bytes_per_token"] == sum(len(text.encode()) for text in texts.values()) / tokens
        assert row["chars_per_token"] == sum(map(len, texts.values())) / tokens
        assert row["fertility"] == (None if language == "jpn" else tokens / words)


@pytest.mark.parametrize("part_bytes", [3000, 9001, 1 << 20])
def test_the_figures_do_not_depend_on_the_order_of_parts(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(corpus, "PART_BYTES", part_bytes)
    for name, start in (("eng", 0), ("fra", 20_000)):
        (tmp_path / name).write_text(prose()[start : start + 20_000])
    parts = corpus.plan_files([tmp_path / "eng", tmp_path / "fra"])

    def backwards(works, done):
        return local(works[::-1], done)

    progress = []
    expected = run([toy_tokenizer(), bytes_only()], parts, done=progress.append)
    assert sum(progress) == sum((tmp_path / name).stat().st_size for name in ("eng", "fra"))
    assert json.dumps(run([toy_tokenizer(), bytes_only()], parts, engine=backwards)) == json.dumps(expected)
    assert expected["tokenizers"][1]["languages"]["eng"]["tokens"] == (tmp_path / "eng").stat().st_size


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1))
def test_pairwise_sums_are_sums(values):
    assert total(iter(values)) == sum(values)


PIECES = ["the", "The", "é", "éx", "e\u0301", "'", "’", "-", " ", "\n", "日", "1", "\ufffd", "<x>", "\u0301"]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), max_size=4))
def test_words_are_those_of_the_pattern(texts):
    pattern = r"[\p{L}\p{M}\p{N}]+(?:['’\-][\p{L}\p{M}\p{N}]+)*"
    assert _describe(texts, Skipped()).words == sum(len(regex.findall(pattern, text)) for text in texts)


def with_steps(normalizer=None, added=()):
    made = Tokenizer.from_str(toy_tokenizer().to_json())
    if normalizer:
        made.normalizer = normalizer
    made.add_tokens(list(added))
    return TextTokenizer(made.to_str())


PIECEWISE = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "é": 2}, unk_token="[UNK]"))
PIECEWISE.decoder = decoders.Fuse()


@pytest.mark.parametrize(
    "tokenizer",
    [
        toy_tokenizer(),
        with_steps(normalizers.Lowercase()),
        with_steps(added=["<x>", "éx"]),
        TextTokenizer(PIECEWISE.to_str()),
    ],
)
@settings(deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), max_size=4), lost=st.integers(0, 9))
def test_faults_are_those_of_decoding(tokenizer, texts, lost):
    rows = tokenizer.encode_batch(texts)
    rows = [row if lost > 2 else row[lost:] for row in rows]  # bytes of a character may be missing
    texts += [tokenizer.decode(row) for row in rows]  # with the sign for what is no character
    rows += rows
    backs = [tokenizer.decode(row) for row in rows]
    assert faults(tokenizer, texts, rows) == [pair for pair in zip(texts, backs, strict=True) if pair[0] != pair[1]]


def test_faults_are_counted_and_shown():
    made = Tokenizer.from_str(toy_tokenizer().to_json())
    made.normalizer = normalizers.Lowercase()
    tokenizer = TextTokenizer(made.to_str(), "lower")
    row = run([tokenizer], corpus.plan_texts({"eng": {"0": "the End", "1": "all is well"}}))["tokenizers"][0]
    english = row["languages"]["eng"]
    assert english["faults"] == 1 and english["fault_examples"] == [["the End", "the end"]]
    assert row["lossy_strings"] == ["\uff21\u3000\uff11"]


def test_unknown_tokens_are_counted():
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    row = run([TextTokenizer(made.to_str(), "words")], corpus.plan_texts({"eng": {"0": "a", "1": "b", "2": "c"}}))
    row = row["tokenizers"][0]["languages"]["eng"]
    assert (row["tokens"], row["unknown"], row["faults"]) == (3, 2, 2)


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\n\xfe\n")
    with pytest.raises(InputError, match="2 lines are not UTF-8"):
        run([toy_tokenizer()], corpus.plan_files([tmp_path / "a"]))
    with pytest.raises(InputError, match="empty"):
        run([toy_tokenizer()], [])


def test_a_language_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "eng").write_text("some text\n")
    (tmp_path / "bad").write_bytes(b"\xff\n")
    (tmp_path / "none").write_bytes(b"")
    found = run([toy_tokenizer()], corpus.plan_files([tmp_path / name for name in ("eng", "bad", "none")]))
    assert set(found["tokenizers"][0]["languages"]) == {"eng"}
    assert found["corpus"]["bad"]["skipped_lines"] == 1 and found["corpus"]["none"]["bytes"] == 0
    page = render(found | {"date": "2026-01-01"})
    assert "1 lines are not UTF-8" in page and "none: holds no text" in page


# ------------------------------------------------------------------------------------------------ side by side


@settings(deadline=None)
@given(st.text(alphabet="the an日é👩‍🇫 \n", max_size=40))
def test_side_by_side_nothing_is_lost(text):
    first, second = toy_tokenizer(), bytes_only([(ord("t"), ord("h")), (256, ord("e"))])
    rows = align(first, second, text)
    assert "".join(row["text"] for row in rows) == text
    for side, tokenizer in (("first", first), ("second", second)):
        assert all("".join(row[side]) == row["text"] for row in rows)
        assert sum(len(row[side]) for row in rows) == len(tokenizer.encode(text))
        for row in rows:  # no border inside a span is shared by both
            assert row["text"]
    for row in rows:
        inner = [{len("".join(row[side][:i])) for i in range(1, len(row[side]))} for side in ("first", "second")]
        assert not (inner[0] & inner[1]) - {0, len(row["text"])}
        assert row["same"] == (row["first"] == row["second"])


def test_tokens_inside_a_character():
    rows = align(toy_tokenizer(), bytes_only(), "aé")
    assert [row["first"] for row in rows] == [["a"], ["é", ""]] and all(row["same"] for row in rows)


def test_the_languages_that_differ_most_are_shown():
    coarse = train_bpe([text for text in TEXTS["fra"].values()] * 4, 300, name="fra")
    rows = differences(bytes_only(), coarse, corpus.plan_texts(TEXTS), texts=1)
    assert [row["language"] for row in rows] == ["fra"] and rows[0]["counts"][0] > rows[0]["counts"][1]
    assert rows[0]["first"] == "bytes" and "".join(span["text"] for span in rows[0]["spans"]) == TEXTS["fra"]["0"]


def test_the_page_shows_what_the_record_holds():
    tokenizers, parts = [toy_tokenizer(), bytes_only()], corpus.plan_texts(TEXTS)
    record = audit(tokenizers, parts, [TokenPremium(), TokenizerInformation()])
    record["tokenizers"][0]["name"] = "<script>alert(1)</script>"
    record["differences"] = differences(*tokenizers, parts)
    page = render(record)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "http-equiv" in page
    for title in ("Tokens for the same content", "Bytes a token", "How well the next token", "Words with a second"):
        assert title in page
    assert "toy and bytes on " in page
    json.dumps(record, allow_nan=False)


# -------------------------------------------------------------------------------------------------- artifacts


@pytest.mark.parametrize(
    ("own", "other", "name"),
    [
        ([b" February"], [b"February"], "whitespace boundary"),
        ([b" February"], [b" ", b"February"], "whitespace detached"),
        ([b" a"], [b"\n", b"a"], "newline and space"),
        ([b" a"], [b"\na"], "newline and space"),
        ([b" token"], [b" to", b"ken"], "segmentation in a word"),
        ([b" Vienna"], [b" Vi", b"enna"], "proper noun"),
        ([b" repaid"], [b" re", b"paid"], "morphological boundary"),
        ([b" walking"], [b" walk", b"ing"], "morphological boundary"),
        ([b" HIV"], [b" H", b"IV"], "acronym"),
        ([b" rights"], [b" right", b"s"], "plural or possessive"),
        ([b" dog's"], [b" dog", b"'s"], "plural or possessive"),
        ([b" a"], [b" a"], None),
        ([b" a"], [b" b"], None),
    ],
)
def test_every_pair_has_one_class(own, other, name):
    assert classify(own, other) == name


def test_a_capital_at_the_start_of_a_sentence_is_no_name():
    assert classify([b" Vienna"], [b" Vi", b"enna"], initial=True) == "segmentation in a word"


@settings(deadline=None)
@given(st.text(alphabet="the an", min_size=1, max_size=9))
def test_counted_encodings_are_all_there_are(text):
    tokenizer, data = toy_tokenizer(), text.encode()

    def ways(rest):
        return 1 if not rest else sum(ways(rest[i:]) for i in range(1, len(rest) + 1) if rest[:i] in tokenizer.id_of)

    assert encodings(tokenizer.id_of, data) == ways(data)


def test_alternatives_spell_the_word_and_are_of_the_vocabulary():
    tokenizer = toy_tokenizer()
    for word in (" the", "the", "an", " and"):
        own = [tokenizer.token_bytes(i) for i in tokenizer.encode(word).tolist()]
        found = alternatives(tokenizer.id_of, word, own)
        for pieces in found:
            assert pieces != own and all(piece in tokenizer.id_of for piece in pieces)
            assert b"".join(pieces).strip() == word.strip().encode()
    assert exposure(tokenizer, " the", [b" the"]) == {CLASSES[0], CLASSES[1], CLASSES[2]}
    assert exposure(bytes_only(), "th", [b"t", b"h"]) == set()


def test_unreachable_tokens_are_found():
    vocab = {CHAR_OF[byte]: byte for byte in range(256)}
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("a", "bcd")]
    for piece in ("ab", "cd", "abc", "bcd", "abcd", "xyz"):
        vocab[piece] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [*merges[:2], ("ab", "c"), ("b", "cd"), ("a", "bcd")]))
    made.decoder = decoders.ByteLevel()
    tokenizer = TextTokenizer(Tokenizer.from_str(made.to_str()).to_str())
    tokenizer.alphabet = "byte-level"
    found = unreachable(tokenizer)
    # "abcd" is a b c d -> ab cd, never the token; "xyz" has no merge; "bcd" is b cd -> bcd, reachable.
    assert {tokenizer.piece(i) for i in found["merges"]} >= {"abcd", "xyz"}
    assert not {tokenizer.piece(i) for i in found["merges"]} & {"ab", "cd", "abc", "bcd"}


def test_no_token_of_a_trained_vocabulary_is_unreachable():
    found = unreachable(train_bpe([prose()[:30_000]], 600))
    assert found["merges"] == [] and found["split"] == []


def test_odd_strings():
    assert lossy_strings(train_bpe([prose()[:3000]], 300)) == []
