"""Triadic suffix: groups against a plain formulation, round trips, the rules of a tokenizer.json, a real model."""

from __future__ import annotations

import random
import sysconfig
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.token_map import check_token_map
from tokenary.data import prose, stdlib_code
from tokenary.models.tiny import tiny_lm
from tokenary.tokenize.base import load_tokenizer
from tokenary.tokenize.triadic_suffix import Scheme, TriadicSuffix, suffix_name, unmark
from tokenary.tokenize.triadic_suffix.rules import marking_rules, unmarking_rules
from tokenary.tokenize.triadic_suffix.scheme import level_of, mark_of

SCHEMES = [
    Scheme(),
    Scheme(variant="marker"),
    Scheme(form="paper"),
    Scheme(form="paper", variant="marker"),
    Scheme(group=1),
    Scheme(group=2, form="paper", separators=False),
    Scheme(integer_groups=8, fraction_groups=2, separators=False, identifiers=True),
]

TRICKY = (
    "1234567.89 0.10 007 1.50 .5 -3.14e-10 1,234,567.8 1,23 12,345 abc123 5km 1.2.3 10.0.0.1 2020-01-05 12:30 12:30:45 "
    "6.02e23 1e1000 $5. 3-4 (7) x=9 1,234,56 f(1,2) 100,200,300 ... 3.5.1 v2 é5 5é ٣ 1e5 1e+05 2.5E-3 12. 5 1/2/2020 "
    "12345678901234567890 1234567890123456789.0 123456789012345678.123456789012345 0.1234567890123456 1,234,567,890 "
    "1,234,567,890,123,456,789 0x1F 3rd 1_000 ½ 1.e5 000123 5..6 7,"
)
NOISE = st.text(st.sampled_from(list("0123456789012789.,,e-+ a:/E_é\n")), max_size=40)


def numeral(rng: random.Random) -> str:
    """A numeral of 1-18 digits and 0-15 of a fraction, with many odd zeros."""
    digits = "".join(rng.choices("0012345678900", k=rng.randint(1, 18)))
    fraction = "".join(rng.choices("0012345678900", k=rng.randint(0, 15)))
    return digits + ("." + fraction if fraction else "")


def toy_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of single bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return made


def test_the_example_of_the_paper():
    method = TriadicSuffix(form="paper")
    assert method.show("1234567.89") == "001m 234k 567 890p"
    assert TriadicSuffix().show("1234567.89") == "1m 234k 567 89p"
    assert TriadicSuffix(form="paper").show(".5") == "000 500p"
    assert [suffix_name(level) for level in range(-3, 8)] == ["ppp", "pp", "p", "", "k", "m", "b", "t", "q", "q2", "q3"]


def test_a_group_is_its_digits_times_its_power():
    rng = random.Random(1)
    for scheme in SCHEMES:
        for _ in range(300):
            number = numeral(rng)
            try:
                groups = scheme.split(number)
            except InputError:
                assert scheme.integer_groups != 6 or scheme.group != 3
                continue
            value = Fraction(0)
            for digits, level in groups:  # a short group of a fraction ends before its level does
                places = scheme.group * level + (scheme.group - len(digits) if level < 0 else 0)
                value += int(digits) * Fraction(10) ** places
            assert value == Fraction(number)


def test_a_hundred_thousand_numerals_round_trip():
    rng = random.Random(0)
    text = " ".join(numeral(rng) for _ in range(100_000))
    scheme = Scheme()
    assert unmark(scheme, scheme.mark(text)).text == text
    levels = Counter(piece.level for piece in scheme.segment(text))
    digits = [number.partition(".")[::2] for number in text.split(" ")]
    for level in range(6):
        assert levels[level] == sum(len(whole) > 3 * level for whole, _ in digits)
        assert levels[-level - 1] == sum(len(fraction) > 3 * level for _, fraction in digits)


def test_the_paper_form_keeps_the_value():
    scheme, rng = Scheme(form="paper"), random.Random(2)
    for _ in range(5_000):
        number = numeral(rng)
        assert Decimal(unmark(scheme, scheme.mark(number)).text) == Decimal(number)
    assert scheme.mark("0.1") == scheme.mark("0.10") == scheme.mark("000.100")


@pytest.mark.parametrize("variant", ["compound", "marker"])
def test_every_number_of_real_text_comes_back(variant):
    scheme = Scheme(variant=variant)
    manual = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py").read_text(encoding="utf-8")
    for text in (manual, prose(), stdlib_code(0, 500_000), TRICKY):
        assert unmark(scheme, scheme.mark(text)).text == text
        assert len(list(scheme.find(text))) > 10


@settings(deadline=None)
@given(NOISE, st.sampled_from(SCHEMES))
def test_any_text_comes_back(text, scheme):
    decoded = unmark(scheme, scheme.mark(text))
    assert not decoded.faults
    if scheme.form == "lossless":
        assert decoded.text == text
    pieces = list(scheme.segment(text))
    for piece in pieces:
        assert piece.text == text[piece.start : piece.end] or (piece.level is not None and scheme.form == "paper")
    assert all(a.end <= b.start for a, b in pairwise(pieces))
    outside = set(range(len(text))) - {i for p in pieces for i in range(p.start, p.end)}
    assert {text[i] for i in outside} <= {".", *("," if scheme.form == "paper" else "")}


def test_what_is_a_number_and_what_is_not():
    found = [TRICKY[start:end] for start, end in Scheme().find(TRICKY)]
    expected = ["1234567.89", "0.10", "007", "1.50", ".5", "3.14", "10", "1,234,567.8", "12,345", "12", "30", "6.02"]
    expected += ["23", "5", "3", "4", "7", "9", "100,200,300", "1", "5", "1", "05", "2.5", "3", "12", "5"]
    expected += ["123456789012345678.123456789012345", "1,234,567,890", "1", "000123", "5", "7"]
    assert found == expected
    loose = Scheme(separators=False, identifiers=True)
    assert [loose_text for loose_text in _found(loose, "abc123 1,234 5km 1.2.3")] == ["123", "1", "234", "5"]


def _found(scheme, text):
    return [text[start:end] for start, end in scheme.find(text)]


def test_a_number_with_too_many_digits_stays_whole():
    scheme = Scheme(integer_groups=2, fraction_groups=1)
    for text in ("1234567", "12.3456", "1,234,567", "1234567.5"):
        assert scheme.mark(text) == text
    with pytest.raises(InputError):
        scheme.split("1234567")
    assert len(Scheme(integer_groups=9).split("1" * 27)) == 9


@settings(deadline=None)
@given(NOISE, st.sampled_from(SCHEMES))
def test_the_rules_of_the_tokenizer_file_do_the_same(text, scheme):
    assert _rules(scheme).normalize_str(text) == scheme.mark(text)
    restore = decoders.Sequence([decoders.Replace(Regex(p), c) for p, c in unmarking_rules(scheme)])
    assert restore.decode([scheme.mark(text)]) == unmark(scheme, scheme.mark(text)).text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_rules_do_the_same_on_tricky_text(scheme):
    assert _rules(scheme).normalize_str(TRICKY) == scheme.mark(TRICKY)


_MADE: dict = {}


def _rules(scheme):
    if scheme not in _MADE:
        _MADE[scheme] = normalizers.Sequence([normalizers.Replace(Regex(p), c) for p, c in marking_rules(scheme)])
    return _MADE[scheme]


@pytest.mark.parametrize(
    ("groups", "prefix", "reason"),
    [
        ([("1", 2), ("567", 0)], "1", "suffix"),  # no thousands
        ([("1", 1), ("5", 0)], "1", "group of 1"),
        ([("1", 0), ("5", -1), ("234", -2)], "1.5", "short group"),
        ([("500", -2)], "", "begins with pp"),
        ([("5", -1), ("123", 0)], ".5", "after 'p'"),
        ([("123", 1), ("456", 1)], "123", "suffix 'k' after 'k'"),
        ([("1", 0), ("234", 1)], "1", "suffix"),
        ([("12", 1)], "12", "without its unit"),
    ],
)
def test_numbers_that_no_encoder_writes(groups, prefix, reason):
    for variant in ("compound", "marker"):
        scheme = Scheme(variant=variant)
        marked = "a" + "".join(scheme.token(digits, level) for digits, level in groups) + " b"
        with pytest.raises(InputError, match=reason):
            unmark(scheme, marked)
        decoded = unmark(scheme, marked, strict=False)
        assert decoded.text == f"a{prefix} b"
        assert [fault.at for fault in decoded.faults] == [1 + len(prefix)]
        assert reason in decoded.faults[0].reason


def test_marks_name_their_levels_and_texts_may_not_hold_them():
    for level in range(-32, 32):
        assert level_of(mark_of(level)) == level
    with pytest.raises(InputError):
        Scheme().mark("a" + mark_of(3))


def test_options():
    for wrong in (
        {"group": 0},
        {"form": "x"},
        {"variant": "x"},
        {"integer_groups": 0},
        {"group": 4, "integer_groups": 9},
    ):
        with pytest.raises(OptionError):
            TriadicSuffix(**wrong)


def test_the_vocabulary_has_the_size_that_the_paper_derives():
    assert len(Scheme(form="paper").vocabulary()) == 11_000  # ten tagged groups of a thousand, and the plain triads
    assert sum(level != 0 for _, level in Scheme(form="paper").vocabulary().values()) == 10_000
    assert len(Scheme().vocabulary()) == 11 * 1110
    assert len(Scheme(variant="marker").vocabulary()) == 1110 + 10
    assert len(Scheme(group=1).vocabulary()) == 11 * 10


@pytest.mark.parametrize("options", [{}, {"variant": "marker"}, {"form": "paper", "integer_groups": 3}])
def test_an_extended_tokenizer_needs_nothing_but_its_file(options, tmp_path):
    method = TriadicSuffix(**{"integer_groups": 3, "fraction_groups": 2, **options})
    base = toy_tokenizer()
    made, quick = method.extend(base), method.extend(base, rules=False)
    made.tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "pay 1,234.50 or -7 é to 10.0.0.1, 007 times 999999999999 <|x|>"
    ids = file.encode(text).ids
    assert ids == made.encode(text).ids == quick.encode(text).ids
    plain = method.unmark(method.mark(text)).text
    assert file.decode(ids) == quick.tokenizer.decode(ids) == made.decode(ids).text == plain
    if method.scheme.form == "lossless":
        assert plain == text
    assert base.encode("a12").ids == toy_tokenizer().encode("a12").ids  # the tokenizer that was given is unchanged
    groups = [p for p in method.segment(text) if p.level is not None]
    assert len([i for i in ids if i >= 256 and file.id_to_token(i)[0].isdigit()]) == len(groups)


def test_offsets_are_those_of_the_text():
    made = TriadicSuffix(fraction_groups=2, integer_groups=3).extend(toy_tokenizer())
    text = "é 1234567.89 x 5"
    encoding = made.encode(text)
    spans = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i >= 256]
    assert [span.strip(".") for span in spans] == ["1", "234", "567", "89", "5"]


@pytest.mark.parametrize("options", [{}, {"variant": "marker"}, {"form": "paper"}])
def test_a_tokenizer_that_puts_a_space_before_a_text(options):
    base, method = load_tokenizer("stories260k"), TriadicSuffix(integer_groups=3, fraction_groups=2, **options)
    made, quick = method.extend(base), method.extend(base, rules=False)
    for text in ("a 1234.5 b", "12 and 7x,9", "(3)4 5", "7", "", "12345", " 7", "once, in 1,987"):
        ids = made.encode(text).ids
        plain = method.unmark(method.mark(text)).text
        assert made.tokenizer.decode(ids) == made.decode(ids).text == quick.decode(quick.encode(text).ids).text == plain
        assert text == "7" or ids == quick.encode(text).ids


def test_tokenizers_whose_texts_would_not_come_back_are_refused():
    small = TriadicSuffix(integer_groups=2, fraction_groups=1)
    base = toy_tokenizer()
    base.normalizer = normalizers.Replace(Regex(r"\p{Co}"), "")
    for rules in (True, False):
        with pytest.raises(UnsupportedModelError, match="normalizer"):
            small.extend(base, rules)
    base = toy_tokenizer()
    base.pre_tokenizer = ByteLevel(add_prefix_space=True)  # before every stretch between added tokens
    for rules in (True, False):
        with pytest.raises(UnsupportedModelError, match="come back"):
            small.extend(base, rules)
    with pytest.raises(InputError, match="already"):
        small.extend(small.extend(toy_tokenizer()).tokenizer)


@pytest.mark.parametrize("unit", ["7", "a", ".", ",", "1,", "1-", "1.", "0:", "-", "1e"])
def test_a_million_characters_take_linear_time(unit):
    scheme, text = Scheme(), unit * (1_000_000 // len(unit))
    assert unmark(scheme, scheme.mark(text)).text == text
    marked = (unit + mark_of(1)) * 200_000  # a fault at every group
    assert len(unmark(scheme, marked, strict=False).text) <= len(marked)


@pytest.mark.parametrize(("vocab", "rows"), [(256, 256 + 3330), (300, 256 + 3330), (8000, 8000)])
def test_a_model_gets_rows_of_its_digits(vocab, rows):
    base = toy_tokenizer()
    made = TriadicSuffix(integer_groups=2, fraction_groups=1).extend(base)
    model = tiny_lm(vocab=vocab).model
    before = model.get_input_embeddings().weight.detach().clone()
    ids = torch.tensor([base.encode("no numbers here").ids])
    logits = model(ids).logits
    mapping = made.extend_model(model, seed=3, scale=0.1)
    after = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is after  # the head stays tied
    assert after.shape[0] == model.config.vocab_size == rows
    assert mapping.shape == (rows, vocab)
    assert not list(check_token_map(mapping)) if rows < 4000 else True
    torch.testing.assert_close(model(ids).logits[..., :256], logits[..., :256])
    one, two = (base.token_to_id(c) for c in "12")
    mean = (before[one] + 2 * before[two]) / 3
    shared = after[made.tokenizer.token_to_id("122" + mark_of(1))] - mean
    for digits in ("007", "12", "999"):
        row = after[made.tokenizer.token_to_id(digits + mark_of(1))]
        own = torch.stack([before[base.token_to_id(c)] for c in digits]).mean(0)
        torch.testing.assert_close(row - own, shared, atol=1e-6, rtol=1e-5)
    assert 0.05 < float(shared.detach().norm() / before.norm(dim=-1).mean()) < 0.2
    other = after[made.tokenizer.token_to_id("122" + mark_of(0))] - mean
    assert not torch.allclose(shared, other)


def test_a_model_with_too_few_rows_is_refused():
    made = TriadicSuffix(integer_groups=1, fraction_groups=1).extend(toy_tokenizer())
    with pytest.raises(UnsupportedModelError):
        made.extend_model(tiny_lm(vocab=97).model)


@pytest.mark.real
def test_smollm2_with_groups_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    import tokenary

    lm = tokenary.load("smollm2")
    made = TriadicSuffix().extend(lm.tokenizer)
    wrapped = made.for_transformers(lm.tokenizer)
    wrapped.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "In 2024 it cost $1,234,567.80, see 10.0.0.1; e = 2.718281828e0"
    ids = again(text)["input_ids"]
    assert ids == made.encode(text).ids
    assert again.decode(ids) == text
    assert again.eos_token == lm.tokenizer.eos_token
    messages = [{"role": "user", "content": text}]
    shown = again.apply_chat_template(messages, tokenize=False)
    assert shown == lm.tokenizer.apply_chat_template(messages, tokenize=False)
    chat = again(shown, add_special_tokens=False)["input_ids"]
    assert again.decode(chat) == shown
    assert len(ids) < len(lm.tokenizer(text)["input_ids"])
    with pytest.raises(UnsupportedModelError, match="optimize"):
        made.extend_model(lm.model)
    lm = tokenary.load("smollm2", optimize=False)
    made.extend_model(lm.model)
    assert lm.model(torch.tensor([ids])).logits.shape[-1] == 49152 + 12210
