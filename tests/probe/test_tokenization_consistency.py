"""Phantom edits: counts against brute force, outcomes by hand, masks against their definition."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from tokenary.core.encodings import CLASSES, encodings
from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.models import LM, tiny_lm
from tokenary.models import load as load_model
from tokenary.probe import TokenizationConsistency
from tokenary.probe.laws import toy
from tokenary.probe.tokenization_consistency.alignment import Text
from tokenary.probe.tokenization_consistency.codec import Codec, splice
from tokenary.probe.tokenization_consistency.injection import sensitivity
from tokenary.probe.tokenization_consistency.likelihood import Place, mass
from tokenary.probe.tokenization_consistency.masking import PhantomMask, Target, ban, ban_at_random
from tokenary.probe.tokenization_consistency.outcomes import judge, wilson
from tokenary.probe.tokenization_consistency.passages import Passage, candidates, code_lines, draw, packed
from tokenary.probe.tokenization_consistency.static import enumerate_encodings, lengths, lossy, stability, word_counts
from tokenary.probe.tokenization_consistency.trials import (
    GREEDY,
    MASKED,
    ODD,
    RANDOM,
    SAMPLED,
    answer_all,
    make,
    over_banned,
    place_of,
)
from tokenary.probe.tokenization_consistency.writing import Request, write

TEXT = "Then the whale and the man of the ship saw a seaman sing, and one sea was whaling. "


@pytest.fixture(scope="module")
def lm():
    return toy()


@pytest.fixture(scope="module")
def codec(lm):
    return Codec(lm)


# --------------------------------------------------------------------------------------------------- encodings


def brute_force(vocabulary, data):
    """Every way to cut some bytes into tokens."""
    found = []
    for cuts in product((False, True), repeat=max(0, len(data) - 1)):
        pieces, start = [], 0
        for i, cut in enumerate([*cuts, True], start=1):
            if cut:
                pieces.append(data[start:i])
                start = i
        if all(piece in vocabulary for piece in pieces):
            found.append(pieces)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.text("ab", min_size=1, max_size=4).map(str.encode), max_size=12),
    st.text("ab", min_size=1, max_size=10).map(str.encode),
)
def test_counts_are_those_of_brute_force(vocabulary, data):
    every = brute_force(vocabulary, data)
    assert encodings(vocabulary, data) == len(every)
    assert lengths(vocabulary, data) == Counter(map(len, every))
    found = enumerate_encodings(vocabulary, data, 10**6)
    assert sorted(found) == sorted(every)
    assert list(map(len, found)) == sorted(map(len, every))
    assert enumerate_encodings(vocabulary, data, 3) == found[:3]


def test_the_rank_counts_shorter_encodings():
    vocabulary = {b"a", b"b", b"ab", b"ba", b"aba"}
    found = word_counts(vocabulary, "abab", [b"aba", b"b"])
    assert (found["encodings"], found["shortest"], found["longest"], found["rank"]) == (6, 2, 4, 1)
    assert word_counts(vocabulary, "abab", [b"a", b"ba", b"b"])["rank"] == 1 + sum(
        len(pieces) < 3 for pieces in brute_force(vocabulary, b"abab")
    )
    assert word_counts(vocabulary, "abc", [])["shortest"] is None


def test_stable_cuts(codec):
    assert stability(codec.encode, TEXT * 5, 30, 0, spaces=True) == (30, 30)
    stable, of = stability(codec.encode, TEXT * 5, 200, 0, spaces=False)
    assert 0 < stable < of == 200


def test_what_a_tokenizer_loses(lm, codec):
    assert lossy(lm.tokenizer, codec.encode)["plain"] == []
    lossless = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like())
    encode = lambda text: lossless(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert " leading" in lossy(lossless, encode)["plain"]


def sentencepiece_like():
    """A vocabulary that writes ▁ for a space and puts one before every text."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁whale", "▁man", "whale"]
    scores = [(piece, -1.0 if len(piece) > 1 and piece[0] != "<" else -9.0) for piece in pieces]
    made = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def test_a_word_start_that_a_tokenizer_adds_is_not_counted():
    lm = LM("x", tiny_lm(vocab=300).model, PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like()), "", "")
    codec = Codec(lm)
    assert codec.text(codec.encode("whale man")).data == b" whale man"
    assert codec.own("whale man").data == b"whale man"
    assert codec.own(" man").pieces == [b" man"]


# ---------------------------------------------------------------------------------------------------- outcomes

PIECES = [
    *(b"We", b" saw", b" February", b" go", b" by", b".", b"February", b" ", b"\n", b" Feb", b"ruary", b" May", b" ["),
    *(b"]", b" FEBRUARY", b" in", b" re", b"paid", b" repaid", b" HIV", b" H", b"IV", b" rights", b" right", b"s"),
    *(b" re", b"saw", b" x", b"\xe2\x80", b"\x99", b"repaid", b"HIV", b"rights"),
]
PLAIN = ["We", " saw", " February", " go", " by", "."]


def ids(pieces):
    return [PIECES.index(piece.encode()) for piece in pieces]


def text(pieces):
    return Text(ids(pieces), PIECES)


def judged(pieces, plain=PLAIN, target=2, again=None):
    marked = [*plain[:target], " [", plain[target].strip(), "]", *plain[target + 1 :]]
    answer = text(pieces)
    return judge(text(plain), text(marked), [target], answer, text(again) if again else answer)


@pytest.mark.parametrize(
    ("pieces", "outcome", "kind"),
    [
        (PLAIN, "unchanged", None),
        (["We", " saw", " [", "February", "]", " go", " by", "."], "unchanged", None),
        (["We", " saw", " May", " go", " by", "."], "replaced", None),
        (["We", " saw", " FEBRUARY", " go", " by", "."], "near", None),
        (["We", " saw", " go", " by", "."], "missing", None),
        (["We", " May", " x", " in", " May", " x"], "malformed", None),
        (["We", " saw", "February", " go", " by", "."], "phantom", CLASSES[0]),
        (["We", " saw", " ", "February", " go", " by", "."], "phantom", CLASSES[1]),
        (["We", " saw", "\n", "February", " go", " by", "."], "phantom", CLASSES[2]),
        (["We", " saw", " Feb", "ruary", " go", " by", "."], "phantom", CLASSES[4]),
        (["We", " saw", " [", " February", "]", " go", " by", "."], "phantom", CLASSES[0]),
    ],
)
def test_outcomes(pieces, outcome, kind):
    (edit,) = judged(pieces).edits
    assert (edit.outcome, edit.kind) == (outcome, kind)


@pytest.mark.parametrize(
    ("word", "pieces", "kind"),
    [
        (" repaid", [" re", "paid"], CLASSES[5]),
        (" HIV", [" H", "IV"], CLASSES[6]),
        (" rights", [" right", "s"], CLASSES[7]),
    ],
)
def test_classes_of_segmentations(word, pieces, kind):
    plain = [*PLAIN[:2], word, *PLAIN[3:]]
    (edit,) = judged([*PLAIN[:2], *pieces, *PLAIN[3:]], plain).edits
    assert (edit.outcome, edit.kind, edit.strict) == ("phantom", kind, True)


def test_strict_and_own_tokens():
    glued = judged(["We", " saw", "February", " go", " by", "."]).edits[0]
    assert not glued.strict and glued.own
    split = judged(["We", " saw", " Feb", "ruary", " go", " by", "."], again=PLAIN)
    assert split.edits[0].strict and not split.edits[0].own
    assert (split.odd, split.words) == (1, 5)


def test_two_ids_of_one_spelling_are_a_segmentation():
    plain = [PIECES.index(b" re"), *ids(["paid"])]
    other = [25, *ids(["paid"])]
    whole, changed = (Text([*ids(["We", " saw"]), *part, *ids([" go"])], PIECES) for part in (plain, other))
    (edit,) = judge(whole, whole, [2], changed, changed).edits
    assert (edit.outcome, edit.kind) == ("phantom", CLASSES[3])


def test_collateral():
    assert not judged(PLAIN).collateral
    assert not judged(["We", " saw", " May", " go", " by", "."]).collateral
    assert judged(["We", " saw", " February", " go", " in", "."]).collateral
    assert judged([*PLAIN, " in", " x"]).collateral


def test_a_character_over_two_tokens_counts_in_bytes():
    whole = Text([0, 28, 29, 24, 3], PIECES)  # We’s go
    assert whole.surfaces == ["We’s", "go"]
    assert whole.span(*whole.words[0]).pieces == (b"We", b"\xe2\x80", b"\x99", b"s")
    assert whole.span(*whole.words[1]).pieces == (b" go",)
    assert whole.cut(2) == 1 and whole.cut(3) is None and whole.cut(6) == 4


def test_wilson():
    assert wilson(0, 100)[0] == 0 and wilson(0, 100)[1] == pytest.approx(0.0370, abs=1e-4)
    assert wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert wilson(0, 0) == [0.0, 1.0]


def test_phantoms_put_into_copies_are_found(codec):
    plains = [codec.own(part) for part in packed(TEXT * 60, 8, 20)]
    found = sensitivity(codec, plains, 0, share=0.3)
    assert found["injected"] == found["found"] == found["same_class"] > 50
    assert found["false"] == 0


# ---------------------------------------------------------------------------------------------------- passages


def test_passages():
    source = "One man saw a whale. He did not see the ship at all! Then nothing. " * 3
    assert packed(source, 4, 12)[:2] == ["One man saw a whale.", "He did not see the ship at all! Then nothing."]
    assert packed(source, 1, 5)[1] == "Then nothing."
    assert code_lines("  x = tokens[0]\n    return left + right + done\n", 3, 8) == ["return left + right + done"]
    passage = Passage("The man saw the man’s ship.", (2, 5))
    assert passage.marked == "The man [saw] the man’s [ship]."
    assert candidates("Ship the whale, the WHALE, did sing 1851 (sea) songs") == [6, 9]


def test_drawing():
    pieces = packed(TEXT * 20, 8, 20)
    drawn = draw(pieces, 10, 3, 0)
    assert drawn == draw(pieces, 10, 3, 0) != draw(pieces, 10, 3, 1)
    assert all(1 <= len(passage.targets) <= 3 for passage in drawn)
    with pytest.raises(InputError, match="passages"):
        draw(pieces[:5], 10, 3, 0)


def test_odd_input_reads_alike(lm, codec):
    passage = Passage("Then the whale and the man saw the ship go by.", (2, 5, 8))
    trial = make(lm, codec, passage, "sentence", (0, 0))
    assert codec.text(trial.odd_prompt).data == codec.text(trial.prompt).data
    assert trial.odd_prompt != trial.prompt == lm.encode([codec.text(trial.prompt).data.decode()])[0]
    assert trial.odd.data == trial.marked.data and trial.odd.ids != trial.marked.ids
    assert [target.word for target in trial.targets] == [b"whale", b"man", b"ship"]
    assert trial.targets[0].before == b"the" and trial.targets[0].own == tuple(codec.ids([b" whale"]))


def test_splice(codec):
    whole = codec.own("the whale sing")
    assert codec.text(splice(whole, 3, 9, codec.ids([b" w", b"h", b"a", b"l", b"e"]))).data == whole.data
    assert splice(whole, 4, 9, []) is None


# ----------------------------------------------------------------------------------------------------- masking


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([" whale", " wh", "ale", "w", "h", "whale", " ", "\n", " the", "s", " sea"]), max_size=5)
)
def test_banned_is_what_completes_the_word(written):
    codec = Codec(toy())
    before = [i for part in written for i in codec.encode(part)]
    start = len(codec.text(before).data)

    def completed(token):
        whole = codec.text([*before, token])
        for surface, word in zip(whole.surfaces, whole.words, strict=True):
            if surface == "whale" and word[1] > start:
                return whole.span(*word).ids
        return None

    expected = {token: path for token in range(codec.vocabulary.size) if (path := completed(token))}
    target = Target(b"whale", b"", tuple(codec.ids([b" whale"])), tuple(codec.ids([b"whale"])))
    assert codec.completions.banned(before, target) == set(expected)
    spared = codec.completions.banned(before, target, "phantoms")
    assert spared == {token for token, path in expected.items() if path not in (target.own, target.marked)}


def test_a_word_written_onto_the_one_before_it(codec):
    written = codec.encode("Then the")
    whale = set(codec.completions.of(b"whale")) | set(codec.completions.led(b"whale"))
    assert codec.completions.banned(written, Target(b"whale", b"the", (), ())) == whale
    assert codec.completions.banned(written, Target(b"whale", b"man", (), ())) == codec.completions.led(b"whale")


def test_a_character_that_is_not_whole_is_part_of_a_word(codec):
    word = "é".encode()
    half = codec.ids([bytes([word[0]])])
    assert set(codec.ids([bytes([word[1]])])) <= codec.completions.banned(half, Target(word, b"", (), ()))
    assert not codec.completions.banned(codec.ids([b"\xe2", b"\x80"]), Target(b"s", b"", (), ())) & set(
        codec.ids([b"s"])
    )


def test_no_target_gets_past_the_mask(lm, codec):
    passages = draw(packed(TEXT * 30, 8, 20), 6, 3, 0)
    asked = [make(lm, codec, passage, "sentence", (0, n)) for n, passage in enumerate(passages)]
    arms = {GREEDY: None, SAMPLED: None, MASKED: "surface", RANDOM: "surface", ODD: None}
    told = []
    judged = answer_all(lm, codec, asked, arms, Sampler(1.0, 50, 0.9, 0), told.append)
    assert sum(told) == 6 and all(len(found) == 6 for found in judged.values())
    requests = [
        Request(n, Sampler(1.5, seed=n), 60, ban(codec.completions, trial.targets, "surface"))
        for n, trial in enumerate(asked)
    ]
    for trial, written in zip(asked, write(lm, [trial.prompt for trial in asked], requests), strict=True):
        words = codec.text(written).surfaces
        assert not {target.word.decode() for target in trial.targets} & set(words[:-1])


def test_the_processor_masks_as_the_loop_does(lm, codec):
    prompts = [codec.encode("the whale"), codec.encode("a ship and")]
    free = write(lm, prompts, [Request(n, Sampler(), 12) for n in range(2)])
    targets = [[Target(codec.vocabulary.spellings[row[0]].strip() or b"x", b"", (), ())] for row in free]
    bans = [ban(codec.completions, target, "surface") for target in targets]
    masked = write(lm, prompts, [Request(n, Sampler(), 12, bans[n]) for n in range(2)])
    for prompt, mask, expected in zip(prompts, bans, masked, strict=True):
        processor = LogitsProcessorList([PhantomMask([mask], len(prompt))])
        made = lm.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, logits_processor=processor, pad_token_id=0
        )
        assert made[0, len(prompt) :].tolist()[: len(expected)] == expected
    assert masked != free


def test_the_random_mask_takes_as_many_others():
    logits = torch.arange(100.0)
    mask = ban_at_random(lambda ids, logits: [99, 97, 3], 0, 0)
    drawn = mask([1, 2], logits)
    assert len(set(drawn)) == 2 and all(token >= 50 and token not in (99, 97) for token in drawn)
    assert mask([1, 2], logits) == drawn != mask([1, 2, 3], logits)
    assert ban_at_random(lambda ids, logits: [3], 0, 0)([], logits) == []


def test_over_banning(lm, codec):
    passage = Passage("Then one man and one whale saw the ship go by.", (5,))
    trial = make(lm, codec, passage, "sentence", (0, 0))
    found = over_banned(codec, [trial], "whale whales wonder where ship")
    # " whales" begins with the token " whale", and " where" with " wh", a piece of it; " wo" and " ship" are none
    assert found == {"words": 5, "completing": 1.0, "starting": 2.0}


# -------------------------------------------------------------------------------------------- model, whole run


def test_a_batch_is_its_answers(lm, codec):
    prompts = [codec.encode("the whale and"), codec.encode("ship")]
    requests = [
        Request(0, Sampler(), 9),
        Request(1, Sampler(0.9, 20, 0.9, 3, 7), 14),
        Request(0, Sampler(1.0, seed=1), 5),
    ]
    together = write(lm, prompts, requests)
    alone = [
        write(lm, [prompts[request.prompt]], [Request(0, request.sampler, request.limit)])[0] for request in requests
    ]
    assert together == alone
    made = lm.model.generate(torch.tensor([prompts[0]]), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert made[0, len(prompts[0]) :].tolist()[: len(together[0])] == together[0]


def test_the_mass_of_encodings(lm, codec):
    trial = make(lm, codec, Passage("Then the whale and the man saw the ship go by.", (2,)), "sentence", (0, 0))
    place = place_of(codec, trial)
    assert codec.text(place.context).data.endswith(b"Then the")
    (found,) = mass(lm, [place])

    def chance(sequence):
        whole = torch.tensor([[*place.context, *sequence]])
        with torch.inference_mode():
            scores = lm.model(whole).logits[0].log_softmax(-1)
        at = len(place.context) - 1
        return float(sum(scores[at + n, token] for n, token in enumerate(sequence)).exp())

    assert found["own"] == pytest.approx(chance(place.own), rel=1e-3)
    for name, sequences in (("respelled", place.respelled), ("respaced", place.respaced)):
        assert sequences and found[name] == pytest.approx(sum(map(chance, sequences)), rel=1e-3)
    assert sum(found.values()) == pytest.approx(1)
    both = mass(lm, [Place(place.context[:9], place.own, [], []), place])
    assert both[1] == pytest.approx(found, rel=1e-3) and both[0]["respelled"] == 0


def test_a_run_without_masks_and_odd_input(lm):
    options = {**TokenizationConsistency.toy_options, "mask": "none", "odd_input": "false", "likelihood": 0, "free": 0}
    report = TokenizationConsistency(**options).run(lm).to_json()
    assert set(report["figures"]["arms"]) == {GREEDY, SAMPLED}
    assert report["figures"]["likelihood"] is report["figures"]["free"] is report["figures"]["over_banned"] is None
    code = TokenizationConsistency(**{**options, "text": "code"}).run(lm).to_json()
    assert code["figures"]["arms"][GREEDY]["answers"] == 3


def test_more_passages_than_there_are(lm):
    with pytest.raises(InputError, match="passages"):
        TokenizationConsistency(trials=2000, words=10).run(lm)


def test_a_passage_that_is_too_long_for_the_model():
    lm = toy()
    lm.model.config.max_position_embeddings = 256
    with pytest.raises(InputError, match="fit"):
        TokenizationConsistency(**TokenizationConsistency.toy_options).run(lm)


def test_another_kind_of_model_is_refused(lm):
    lm = toy()
    lm.model.config.objective = "diffusion"
    with pytest.raises(UnsupportedModelError, match="causal"):
        TokenizationConsistency().run(lm)


@pytest.mark.real
def test_the_counts_of_smollm2():
    lm = load_model("smollm2", dtype="float32")
    codec = Codec(lm)
    known = {" the": 8, " February": 126, " tokenization": 2044, " internationalization": 254_760, " Straße": 32}
    for word, count in {**known, " नमस्ते": 972}.items():
        assert encodings(codec.vocabulary.id_of, word.encode()) == count
    found = TokenizationConsistency(trials=100)._static(lm, codec, TokenizationConsistency().source(0), 0)
    assert len(found["missing_bytes"]) == 21 and {0x04, 0x06, 0xF1, 0xF2} <= set(found["missing_bytes"])
    assert found["lossy"]["plain"] == ["\u0004\u0006", "\U00040000"]
    assert found["stable_cuts"]["at any character"]["share"] == pytest.approx(0.23, abs=0.03)
    plains = [codec.own(part) for part in packed(TokenizationConsistency().source(0), 8, 28)]
    injected = sensitivity(codec, plains, 0)
    assert injected["injected"] > 300 and injected["false"] == 0
    assert injected["found"] >= 0.99 * injected["injected"] and injected["same_class"] == injected["found"]
