"""Chunks of two tokenizations, on characters of several bytes, dropped text, specials; and against a slow search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel, TemplateProcessing

from tokenary.core.spelling import CHAR_OF
from tokenary.hf.tokenizer import Vocabulary
from tokenary.learn.aligner import Aligner, collate
from tokenary.learn.alignment import align_spans, canonical
from tokenary.learn.laws import PACKED, SPLIT, toy_vocabulary


def slow(student, teacher):
    """Cut wherever both sides can be cut: no token reaches across, tried place by place."""

    def cuts(spans):
        places = {}
        for n in range(1, len(spans) + 1):
            end = max(stop for _, stop in spans[:n])
            if all(start >= end for start, _ in spans[n:]):
                places[end] = n
        return places

    left, right = cuts(student), cuts(teacher)
    both = sorted(set(left) & set(right))
    found = ([], [])
    for chunk, place in enumerate(both):
        for side, at in zip(found, (left[place], right[place]), strict=True):
            side += [chunk] * (at - len(side))
    rest = any(len(side) < len(spans) for side, spans in zip(found, (student, teacher), strict=True))
    for side, spans in zip(found, (student, teacher), strict=True):
        side += [len(both)] * (len(spans) - len(side))
    return found[0], found[1], len(both) + rest


@st.composite
def tokenizations(draw):
    """Spans over a text of 12 characters: neighbours, with some that cover a character together or nothing."""
    ends = sorted(draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)))
    spans, start = [], 0
    for end in ends:
        overlaps = draw(st.booleans()) and spans and spans[-1][1] > spans[-1][0]
        first = max(spans[-1][0], start - 1) if overlaps else start
        spans.append((first, end))
        start = end
    return spans


@given(tokenizations(), tokenizations())
def test_chunks_are_those_of_a_slow_search(student, teacher):
    assert align_spans(student, teacher) == slow(student, teacher)


@given(tokenizations())
def test_a_tokenization_against_itself_has_the_most_chunks(spans):
    left, right, count = align_spans(spans, spans)
    assert left == right and sorted(set(left)) == list(range(count))


def texts_of(student, teacher, text, **options):
    """The bytes of both sides of every chunk, with borders between tokens, and which are correct."""
    aligner = Aligner(student, teacher, **options)
    found = aligner.align(text)
    sides = []
    for vocabulary, ids, chunks in (
        (student, found.student_ids, found.student),
        (teacher, found.teacher_ids, found.teacher),
    ):
        names = [vocabulary.spellings[i] or vocabulary.special[i].encode() for i in ids]
        sides.append(
            [b"|".join(n for n, c in zip(names, chunks, strict=True) if c == k) for k in range(len(found.correct))]
        )
    return list(zip(*sides, found.correct, strict=True))


def test_numbers_are_one_chunk_where_one_side_packs_them():
    assert texts_of(toy_vocabulary(PACKED), toy_vocabulary(SPLIT), "a 201") == [
        (b"a", b"a", True),
        (b" ", b" ", True),
        (b"201", b"2|0|1", True),
    ]


def test_the_bytes_of_a_character_stay_together():
    merges = ((CHAR_OF[0xF0], CHAR_OF[0x9F]), ("Ġ", CHAR_OF[0xF0] + CHAR_OF[0x9F]))
    found = texts_of(toy_vocabulary(()), toy_vocabulary(merges), "x 😀é")
    assert found == [
        (b"x", b"x", True),
        (b" |\xf0|\x9f|\x98|\x80", b" \xf0\x9f|\x98|\x80", True),  # one side glues the space to half of the character
        (b"\xc3|\xa9", b"\xc3|\xa9", True),
    ]


def sentencepiece(pieces, **options):
    """A Unigram with ▁, byte fallback, a word start put in front, and <s> around texts."""
    whole = [("<unk>", 0.0), *((f"<0x{b:02X}>", -20.0) for b in range(256)), *((p, -1.0) for p in pieces)]
    made = Tokenizer(models.Unigram(whole, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.normalizer = options.get("normalizer")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return Vocabulary(made, {"bos_token": "<s>", "eos_token": "</s>"})


def test_families_differ_in_spaces_bytes_and_specials():
    pieces = sentencepiece(["▁the", "▁a", "t", "▁"])
    made = Tokenizer.from_str(toy_vocabulary(PACKED).tokenizer.to_str())
    made.add_special_tokens([AddedToken("<|begin|>", special=True)])
    made.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 263)])
    found = texts_of(Vocabulary(made, {"bos_token": "<|begin|>"}), pieces, "the aé")
    assert found == [
        (b"the", b" the", True),  # the word start that one side puts in front
        (b" a", b" a", True),
        (b"\xc3|\xa9", b"\xc3|\xa9", True),
        (b"<|begin|>", b"<s>", True),  # by role; </s> has no partner
    ]


def test_a_normalizer_changes_what_is_spelled_not_where_it_stands():
    lower = sentencepiece(["▁the", "▁a", "b", "▁"], normalizer=normalizers.Lowercase())
    found = texts_of(toy_vocabulary(()), lower, "The ab", special=False)
    assert found[0] == (b"T|h|e", b" the", False)
    assert found[-1] == (b"b", b"b", True)
    strip = sentencepiece(["▁a", "b", "▁"], normalizer=normalizers.Strip())
    assert texts_of(toy_vocabulary(()), strip, "  a b  ", special=False)[-1] == (b" | ", b"", False)


def test_spaces_that_a_post_processor_trims_from_spans_still_count():
    made = Tokenizer.from_str(toy_vocabulary(PACKED).tokenizer.to_str())
    made.post_processor = ByteLevel(trim_offsets=True)
    assert texts_of(Vocabulary(made), toy_vocabulary(()), "a  a") == [
        (b"a", b"a", True),
        (b" ", b" ", True),
        (b" a", b" |a", True),
    ]


def test_collating_pads_behind_and_outside_every_chunk():
    aligner = Aligner(toy_vocabulary(PACKED), toy_vocabulary(SPLIT))
    ids, teacher_ids, chunks = collate(aligner.align_batch(["a 201", "the"]), pad=(5, 6))
    assert ids.shape == chunks.student.shape and teacher_ids.shape == chunks.teacher.shape
    assert ids[1].tolist()[1:] == [5, 5] and teacher_ids[1, -1] == 6
    assert chunks.student.tolist() == [[0, 1, 2], [0, -1, -1]] and chunks.teacher[0].tolist() == [0, 1, 2, 2, 2]
    assert chunks.correct.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(("data", "text"), [(b" the", "the"), (b"  ", "  "), (b"e\xcc\x81", "é"), (b"\r\n", "\n")])
def test_canonical_forms(data, text):
    assert canonical(data) == text
