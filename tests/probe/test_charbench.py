"""CharBench: right answers, fair pools, tokens by bytes, two ways to score, and statistics that can be silent."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenary.claims.charbench import CLAIM
from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.data import prose
from tokenary.hf.tokenizer import Vocabulary
from tokenary.models import LM, tiny_lm
from tokenary.probe import CharBench
from tokenary.probe.charbench import statistics
from tokenary.probe.charbench.analysis import analyse, between, paired
from tokenary.probe.charbench.items import NUMBERS, POSITION, TASKS, Item, generate, gold
from tokenary.probe.charbench.prompts import Prompter, instruction, shared
from tokenary.probe.charbench.scoring import closed, opened, parse
from tokenary.probe.charbench.segmentation import Cut, characters, cut, features, resplit, split_token
from tokenary.probe.charbench.words import LENGTHS, shuffled_letters, word_pool, words_of

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}<|bot|>"
SPECIAL = ("<s>", "</s>", "<|user|>", "<|bot|>")


def byte_level(*merged: str) -> Tokenizer:
    """The bytes, and every prefix of some pieces."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *sorted(alphabet)])}
    merges = []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in merged:
        piece = level.pre_tokenize_str(text)[0][0]
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def toy(chat: bool = True, family: str = "llama", context: int = 768, merged: tuple[str, ...] = ("the", "wa")) -> LM:
    made = byte_level(*merged)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE if chat else None
    )
    lm = tiny_lm(vocab=made.get_vocab_size(), family=family, context=context)
    lm.model.config.eos_token_id = tokenizer.eos_token_id
    return LM(lm.name, lm.model, tokenizer, lm.fingerprint, lm.source)


# -------------------------------------------------------------------------------------------- words and questions


def test_words_keep_their_case_and_are_cut_at_letters():
    text = "The naïve Whale's co-op; whale WHALE h2o4me x²word_under ca\u0308sar toolongaword1 extraordinarily — Möwe"
    assert word_pool([text]) == ["Möwe", "WHALE", "Whale", "cäsar", "naïve", "whale"]


def recount(item: Item) -> int:
    """The answers once more, written otherwise."""
    counts = Counter(item.word)
    if item.task == "count_unique_chars":
        return len(counts)
    if item.task == "count_character_frequency":
        return counts[item.char]
    places = [i for i, char in enumerate(item.word) if char == item.char]
    return places[0] if item.task == "find_first_occurrence" else places[-1]


@pytest.mark.parametrize("source", ["prose", "strings"])
def test_questions_about_real_words(source):
    pool = words_of(source, seed=3)
    items = generate(pool, 350, seed=42)
    assert all(item.gold == recount(item) and item.gold in NUMBERS for item in items)
    assert {item.char in item.word for item in items} == {True}
    per = Counter((item.task, len(item.word)) for item in items)
    assert per == {(task, length): 50 for task in TASKS for length in LENGTHS}
    words = [item.word for item in items]
    assert len(set(words)) == len(words) == 1400 and set(words) <= set(pool)
    assert any(word != word.lower() for word in words)
    assert items == generate(reversed(pool), 350, seed=42) != generate(pool, 350, seed=43)


def test_strings_are_letters_of_words_but_no_words():
    words = word_pool([prose()])
    strings = shuffled_letters(words, 1)
    assert not set(strings) & set(words)
    assert {"".join(sorted(string)) for string in strings} <= {"".join(sorted(word)) for word in words}


def test_repeated_letters_are_asked_for_more_often():
    words = [f"{'aab' + chr(99 + i) + 'cdefgh'[: length - 4]}" for length in LENGTHS for i in range(20)]
    first = [item for item in generate(words, 140, 0) if item.task == "find_first_occurrence" and len(item.word) == 4]
    share = np.mean(
        [
            item.char == "a"
            for seed in range(40)
            for item in generate(words, 140, seed)
            if len(item.word) == 4 and item.char
        ]
    )
    assert len(first) == 5 and abs(share - 0.5) < 0.06


def test_small_pools_give_every_length_the_same_share():
    words = [word for word in words_of("prose") if len(word) != 10 or word < "c"]
    few = sum(len(word) == 10 for word in words) // 4
    per = Counter((item.task, len(item.word)) for item in generate(words, 4000, 0))
    assert set(per.values()) == {few} and len(per) == 28
    with pytest.raises(InputError, match="words of 10 letters"):
        generate([word for word in words if len(word) < 10], 350, 0)
    with pytest.raises(InputError, match="at least 7 questions"):
        generate(words, 6, 0)


def test_the_four_deals_ask_every_word_in_every_task():
    tasks = defaultdict(list)
    for deal in range(4):
        for item in generate(words_of("prose"), 70, 5, deal):
            tasks[item.word].append(item.task)
    assert {tuple(sorted(asked)) for asked in tasks.values()} == {tuple(sorted(TASKS))}


@given(st.text("aAbBß", min_size=1, max_size=10), st.data())
def test_case_counts(word, data):
    char = data.draw(st.sampled_from(word))
    assert gold("count_unique_chars", word, "") == len(dict.fromkeys(word))
    assert gold("count_character_frequency", word, char) == sum(c == char for c in word)
    assert word[gold("find_first_occurrence", word, char)] == char == word[gold("find_last_occurrence", word, char)]


# ---------------------------------------------------------------------------------------------------------- tokens


def test_the_target_token_is_found_by_bytes():
    vocabulary = Vocabulary(byte_level("Zür", "ich", "Stra"))
    made = cut(vocabulary, "Zürich")
    assert made.ends == (4, 7)  # Zür has four bytes
    assert [made.token_at(i) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [made.characters(n) for n in range(2)] == [3, 3]
    split = cut(vocabulary, "süß")  # ü and ß fall into two tokens each
    assert len(split.ids) == 5 and [split.characters(n) for n in range(5)] == [1] * 5
    assert [split.token_at(i) for i in range(3)] == [0, 1, 3]
    item = Item("find_last_occurrence", "Zürich", "h", 5)
    assert features(item, made) == {
        "word_length": 6, "number_of_tokens": 2, "compression": 3, "gold": 5, "gold_share": 5 / 6,
        "unique_characters": 6, "target_token_length": 3,
    }  # fmt: skip
    assert "target_token_length" not in features(Item("count_unique_chars", "Zürich", "", 6), made)


def test_half_a_character_in_a_token():
    """A token may end inside a character: it holds a byte of it, and the character begins in it."""
    made = Cut("aüb", (0, 1), (2, 4))
    assert [made.characters(n) for n in range(2)] == [2, 2] and made.token_at(1) == 0 and made.token_at(2) == 1


@settings(deadline=None, max_examples=50)
@given(st.text("abcäßé", min_size=2, max_size=10), st.data())
def test_tokens_and_characters_agree_with_a_walk_over_bytes(word, data):
    """With the owner of every byte written down; some tokens of this vocabulary end inside a character."""
    vocabulary = Vocabulary(byte_level("ab", "cä", "ßß", "aé", "abc"))
    made = cut(vocabulary, word)
    owner = [index for index, char in enumerate(word) for _ in char.encode()]
    index = data.draw(st.integers(0, len(word) - 1))
    at, spelled = 0, b""
    for number, token in enumerate(made.ids):
        own = owner[at : at + len(vocabulary.spellings[token])]
        assert made.characters(number) == len(set(own))
        if owner.index(index) in range(at, at + len(own)):
            assert made.token_at(index) == number
        at += len(own)
        spelled += vocabulary.spellings[token]
    assert spelled.decode() == word


def test_a_word_start_mark_is_dropped():
    vocab = {"<unk>": 0, "▁": 1, "▁wh": 2, "al": 3, "e": 4, "w": 5, "h": 6, "a": 7, "l": 8}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "l")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    vocabulary = Vocabulary(made)
    found = cut(vocabulary, "whale")
    assert [vocabulary.spellings[i] for i in found.ids] == [b"w", b"h", b"al", b"e"] and found.ends == (1, 2, 4, 5)
    assert cut(vocabulary, "Whale") is None and cut(vocabulary, "whaxe") is None
    vocabulary.tokenizer.model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
    whole = Tokenizer(models.Unigram([("<unk>", -9.0), ("▁wh", -1.0), ("al", -1.0), ("e", -1.0)], unk_id=0))
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    assert cut(Vocabulary(whole), "whale").ends == (2, 4, 5)


def test_other_cuts_spell_the_same_word():
    vocabulary = Vocabulary(byte_level("Whale", "boat", "ü"))
    usual = cut(vocabulary, "Whaleboat")
    assert usual.ends == (5, 9)
    both = split_token(vocabulary, usual, 0)
    assert both.ends == (2, 3, 5, 9) or len(both.ids) == 3
    assert b"".join(vocabulary.spellings[i] for i in both.ids) == b"Whaleboat"
    single = characters(vocabulary, "Süß")
    assert single.ends == (1, 3, 4, 5) and b"".join(vocabulary.spellings[i] for i in single.ids) == "Süß".encode()
    assert split_token(vocabulary, cut(vocabulary, "xy"), 0) is None


def test_resplit_shortens_the_answers_token_or_another():
    vocabulary = Vocabulary(byte_level("Wh", "al", "bo", "at"))
    usual = cut(vocabulary, "Whalboat")
    item = Item("find_first_occurrence", "Whalboat", "l", 3)
    mine, other = resplit(vocabulary, usual, item)
    assert mine.characters(mine.token_at(3)) == 1 and other.characters(other.token_at(3)) == 2
    assert len(mine.ids) == len(other.ids) == len(usual.ids) + 1
    assert resplit(vocabulary, usual, Item("count_unique_chars", "Whalboat", "", 7)) is None
    assert resplit(vocabulary, cut(vocabulary, "xWhx"), Item("find_first_occurrence", "xWhx", "h", 2)) is None


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("shots", [0, 2])
def test_a_prompt_reads_as_it_should(chat, shots):
    lm = toy(chat)
    prompter = Prompter(lm, shots=shots)
    item = Item("find_last_occurrence", "Whale", "e", 4)
    answers = prompter.answers(item.task)
    word = cut(prompter.vocabulary, item.word)
    ids = prompter.prompt(item, word.ids, answers.lead)
    text = lm.tokenizer.decode(ids)
    assert text.endswith('last occur in the string "Whale"?' + ("</s><|bot|>" if chat else "\nAnswer: "))
    assert text.count("Upper and lower case") == 1 and "counted from 0" in text
    assert text.count("Answer: ") == shots + (not chat)
    assert text.startswith("<|user|>") == chat
    spelled = [lm.tokenizer.decode(number) for number in answers.numbers]
    assert spelled == [f"{number}{'</s>' if chat else chr(10)}" for number in NUMBERS]
    at = len(prompter.head(item))
    assert tuple(ids[at : at + len(word.ids)]) == word.ids


def test_examples_are_right_and_about_other_words():
    text = instruction("find_first_occurrence", 4)
    assert '"b" first occur in the string "Bob"?\nAnswer: 2' in text and '"Massachusetts"?\nAnswer: 6' in text
    assert 'string "Bob"?\nAnswer: 3' in instruction("count_unique_chars", 2)
    assert "counted from" not in instruction("count_unique_chars", 0)
    assert 'string "B o b"?\nAnswer: 2' in instruction("find_first_occurrence", 2, spaced=True)


def test_what_does_not_fit_is_said():
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        CharBench().run(tiny_lm())
    with pytest.raises(InputError, match="fewer shots"):
        CharBench(words=7, shots=4).run(toy(context=512))
    with pytest.raises(OptionError, match="words"):
        CharBench(words=6)
    lm = toy()
    lm.model.config.objective = "diffusion"
    with pytest.raises(UnsupportedModelError, match="left to right"):
        CharBench().run(lm)


# --------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_closed_scores_are_those_of_plain_passes(family):
    lm = toy(family=family)
    prefix = [5, 9, 11]
    prompts = [[*prefix, 20, 21], [*prefix, 22, 23, 24, 25], [*prefix, 26]]
    answers = [[40, 1], [41, 1], [40, 42, 1], [43]]
    found = closed(lm, prompts, answers, batch=2)
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            for column, answer in enumerate(answers):
                scores = lm.model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
                wanted = sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
                assert found[row, column] == pytest.approx(wanted, abs=1e-4)
    assert (found[:, 0] > found[:, 2] - 50).all() and shared(prompts) == 3


def test_open_answers_are_those_of_generate(monkeypatch):
    lm = toy()
    prompts = [[5, 9, 11, 20, 21], [5, 9, 11, 22, 23, 24, 25], [5, 9, 11, 26]]
    seen = []
    monkeypatch.setattr(LM, "decode", lambda self, ids: seen.append(list(ids)) or "7")
    assert opened(lm, prompts, batch=2) == [7, 7, 7]
    for prompt, ids in zip(prompts, seen, strict=True):
        wanted = lm.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = wanted[0, len(prompt) :].tolist()
        assert ids == (new[: new.index(1)] if 1 in new else new)


def test_only_a_number_is_a_number():
    assert [parse(text) for text in (" 7\n", "+3", "-1", "10")] == [7, 3, -1, 10]
    assert [parse(text) for text in ("7.", "seven", "", "1 2", "1_0", "٣", "7\nQuestion")] == [None] * 7
    assert parse("7\nQuestion: 3", line=True) == 7 and parse("\n\n", line=True) is None


# ------------------------------------------------------------------------------------------------------ statistics


def obvious_logistic(y, design):
    """Plain Newton's method on all columns."""
    beta = np.zeros(design.shape[1])
    for _ in range(200):
        chance = 1 / (1 + np.exp(-design @ beta))
        hessian = design.T @ np.diag(chance * (1 - chance)) @ design
        beta = beta + 0.5 * np.linalg.inv(hessian) @ design.T @ (y - chance)
    return beta, np.sqrt(np.diag(np.linalg.inv(hessian)))


def test_logistic_regression_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    x, z = rng.integers(4, 11, 800).astype(float), rng.integers(1, 6, 800).astype(float)
    y = (rng.random(800) < 1 / (1 + np.exp(-(2 - 0.3 * x + 0.2 * z)))).astype(float)
    fit = statistics.logistic(y, x, z)
    beta, errors = obvious_logistic(y, np.stack([np.ones(800), x, z], 1))
    assert np.allclose([fit.intercept, *fit.coefficients], beta, atol=1e-6)
    assert np.allclose(fit.errors, errors[1:], rtol=1e-4)


def test_regressions_without_an_answer_give_none():
    x = np.arange(20.0)
    assert statistics.logistic((x > 9).astype(float), x) is None  # separable
    assert statistics.logistic(np.ones(20), x) is None
    assert statistics.logistic((x % 3 == 0).astype(float), x, 2 * x) is None
    assert statistics.pearson(np.ones(5), np.arange(5)) is None and statistics.pearson(x, np.ones(20)) is None
    assert statistics.partial(x, x % 2, x) is None
    assert statistics.slopes(x, np.ones(20)) is None and statistics.slopes(np.ones(20), x)[0] == pytest.approx(0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_partial_correlation_is_that_of_the_three_correlations(seed):
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=60), rng.normal(size=60)
    y = x + 2 * z + rng.normal(size=60)
    xy, xz, yz = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (x, z), (y, z)))
    assert statistics.partial(x, y, z) == pytest.approx((xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5)
    assert statistics.slopes(y, x, z) == pytest.approx(np.linalg.lstsq(np.c_[x, z, np.ones(60)], y, rcond=None)[0][:2])


def test_partial_correlation_removes_what_the_length_explains():
    rng = np.random.default_rng(1)
    length = rng.integers(4, 11, 5000).astype(float)
    token = length / 2 + rng.normal(size=5000)
    correct = (rng.random(5000) < 1.2 - 0.1 * length).astype(float)
    assert statistics.pearson(token, correct) < -0.2
    assert abs(statistics.partial(token, correct, length)) < 0.04


def test_the_bootstrap_covers():
    """Of a hundred intervals for a known correlation, about 95 hold it."""
    rng, inside = np.random.default_rng(2), 0
    for _ in range(100):
        x = rng.normal(size=80)
        y = 0.5 * x + rng.normal(size=80) * 0.75**0.5
        low, high = statistics.interval(statistics.bootstrap(statistics.pearson, (x, y), 200, 0))
        inside += low <= 0.5 <= high
    assert 86 <= inside <= 100
    assert statistics.interval(np.zeros(3)) is None


def test_the_gate():
    golds = np.array([1] * 60 + [2] * 40)
    assert not statistics.above_majority((golds == 1).astype(float), golds)
    assert not statistics.above_majority(np.array([1.0] * 68 + [0.0] * 32), golds)  # 8 points: less than 2 errors
    assert statistics.above_majority(np.array([1.0] * 72 + [0.0] * 28), golds)


def test_jaccard_and_pairs():
    assert statistics.jaccard(np.array([1, 0, 0, 1]), np.array([1, 0, 1, 0])) == pytest.approx(1 / 3)
    assert statistics.jaccard(np.ones(3), np.ones(3)) is None
    found = paired(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
    assert found["difference"] == -0.25 and found["error"] == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------------------- analysis


def fake(probability, n=2000, seed=0):
    """Questions about words, and answers that are right with a chance that depends on the features."""
    vocabulary = Vocabulary(byte_level(*words_of("prose")[::9]))
    items = [item for item in generate(words_of("prose"), n, seed) if item.task in POSITION]
    described = [features(item, cut(vocabulary, item.word)) for item in items]
    rng = np.random.default_rng(seed)
    answers = [
        item.gold if rng.random() < probability(f) else (item.gold + 1)
        for item, f in zip(items, described, strict=True)
    ]
    return items, described, answers


def test_a_dependence_on_tokens_is_told_from_one_on_length():
    by_token = analyse(*fake(lambda f: 1 - 0.12 * f["target_token_length"]), resamples=100)
    assert by_token["above_majority"]
    told = by_token["given_word_length"]["target_token_length"]
    assert told["interval"][1] < 0 and told["accuracy_a_unit"] == pytest.approx(-0.12, abs=0.03)
    by_length = analyse(*fake(lambda f: 1.2 - 0.1 * f["word_length"]), resamples=100)
    told = by_length["given_word_length"]["target_token_length"]
    assert told["interval"][0] < 0 < told["interval"][1]
    assert by_length["r"]["word_length"]["interval"][1] < 0


def test_no_correlation_without_signal():
    items, described, _ = fake(lambda f: 1.0)
    found = analyse(items, described, [0] * len(items), resamples=50)
    assert found["r"] is None and found["given_word_length"] is None and not found["above_majority"]
    assert found["accuracy"] == np.mean([item.gold == 0 for item in items])
    assert found["bias_of_wrong"] == pytest.approx(-np.mean([item.gold for item in items if item.gold]))


def test_what_is_no_number_is_wrong_and_counted():
    items, described, answers = fake(lambda f: 1.0)
    answers[::4] = [None] * len(answers[::4])
    found = analyse(items, described, answers, resamples=0)
    assert found["accuracy_of_valid"] == 1 and found["invalid"] == pytest.approx(0.25, abs=0.01)
    assert found["accuracy"] == pytest.approx(1 - found["invalid"]) and found["bias_of_wrong"] is None


def test_answers_that_ignore_case_are_found():
    items = [Item("find_first_occurrence", "Anna", "a", 3), Item("find_first_occurrence", "Otto", "t", 1)] * 20
    vocabulary = Vocabulary(byte_level("An"))
    described = [features(item, cut(vocabulary, item.word)) for item in items]
    found = analyse(items, described, [0, 1] * 20, resamples=0)["case"]
    assert found["case_decides"] == {"n": 20, "accuracy": 0, "error": 0, "answered_without_case": 1}
    assert found["with_capitals"]["n"] == 40 and found["without_capitals"]["accuracy"] is None


def test_models_are_compared_on_the_same_questions():
    items, described, good = fake(lambda f: 0.9)
    told = {"good": analyse(items, described, good, resamples=0), "bad": analyse(items, described, [0] * len(items))}
    right = np.array([answer == item.gold for answer, item in zip(good, items, strict=True)])
    found = between({"good": right, "bad": np.zeros(len(items))}, told)
    assert found["jaccard"] == {"good | bad": pytest.approx(1 - right.mean())}
    assert found["mean_r"]["gold"] == told["good"]["r"]["gold"]["r"]  # the bad one has none


# ------------------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "both"},
        {"raw": True, "override": "spaces"},
        {"override": "characters", "text": "strings"},
        {"override": "token", "words": 28},
    ],
)
def test_a_run(options):
    lm = toy(context=1024, merged=("the", "an", "in", "re", "er", "st", "on", "li"))
    counts = []
    probe = CharBench(**{**CharBench.toy_options, **options})
    report = probe.run(lm, 0, lambda done, total: counts.append((done, total)))
    again = CharBench(**{**CharBench.toy_options, **options}).run(lm, 0)
    plain = report.to_json()
    assert plain == again.to_json() and plain == json.loads(json.dumps(plain))
    assert plain != probe.run(lm, 1).to_json()
    assert report.figures["questions"] == 4 * probe.words
    assert counts[-1][0] == counts[-1][1] and len({total for _, total in counts}) == 1
    assert [done for done, _ in counts] == sorted(done for done, _ in counts)
    for tasks in report.figures["scoring"].values():
        assert set(tasks) == set(TASKS) and all(
            len(one["answers"]) == one["n"] == probe.words for one in tasks.values()
        )
    for table in report.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows), table.title
    if probe.override == "token":
        assert set(report.figures["override"]["find_first_occurrence"]) == {"answer's token", "other token"}
        assert report.figures["override"]["count_unique_chars"] == {}


def test_a_random_net_gets_no_correlations_and_a_note():
    report = CharBench(words=70, resamples=20).run(toy())
    assert all(found["r"] is None for found in report.figures["scoring"]["closed"].values())
    assert any("not above the most frequent answer" in note for note in report.notes)


def test_a_small_pool_is_said():
    report = CharBench(words=385, resamples=0, batch=64, raw=True).run(toy())
    assert report.figures["questions"] == 4 * 378
    assert report.notes[0].startswith("the words of this text suffice for 378 questions")


def test_the_claim_runs_and_can_fail():
    outcome = CLAIM.run(seed=7, **{**CLAIM.fast, "steps": 20})
    json.dumps(outcome.details)
    assert CLAIM.judge(outcome) == "not shown" and outcome.n > 100  # twenty steps teach nothing
    assert {control.name for control in outcome.controls} >= {"random", "majority answer"}
