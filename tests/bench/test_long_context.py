"""Long-context workloads: exact lengths, what is hidden is there once, and scores."""

import pytest

from tokenary.bench.long_context import CITIES, TASKS, copy, key_value, multi_needle, needle, prose_loss
from tokenary.core.errors import InputError, OptionError
from tokenary.data import prose

TEXT = prose()[:30_000]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_depend_on_the_seed(task, tokenizer):
    one, same, other = (TASKS[task](tokenizer, TEXT, 1500, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert one.task == task
    assert len(one.ids) == 1500 if task != "key-value" else 1450 < len(one.ids) <= 1500
    assert bool(one.answers) != bool(one.scored)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_needle_stands_once_at_its_depth_between_sentences(depth, tokenizer):
    sample = needle(tokenizer, TEXT, 4000, depth, seed=1)
    text, _, question = tokenizer.decode(sample.ids).rpartition("\n\nQuestion")
    (number,) = sample.answers
    assert text.count(number) == 1 and number not in question
    fact = text.index(" The secret number of")
    assert abs(fact - depth * len(text)) < 500
    assert fact == 0 or text[:fact].endswith(".")
    rest = text.replace(text[fact : text.index(number) + 6], "")
    assert rest in TEXT  # else the text is untouched


def test_several_needles_are_asked_for_in_order(tokenizer):
    sample = multi_needle(tokenizer, TEXT, 4000, (0.7, 0.1, 0.4), seed=1)
    text = tokenizer.decode(sample.ids)
    places = [text.index(number) for number in sample.answers]
    assert places[1] < places[2] < places[0]
    names = [text[:place].rpartition("number of ")[2].split()[0] for place in places]
    assert f"The secret number of {' and '.join(names)} is" in text.rpartition("Answer:")[2]


def test_pairs_hold_what_is_asked_for(tokenizer):
    for depth in (0.0, 0.5, 1.0):
        sample = key_value(tokenizer, TEXT, 1200, depth, seed=2)
        text = tokenizer.decode(sample.ids)
        word = text.rpartition("The number of ")[2].split()[0]
        pairs = dict(line.split(": ") for line in text.splitlines() if ": " in line)
        assert (pairs[word],) == sample.answers
        assert abs(list(pairs).index(word) / len(pairs) - depth) < 0.05
        assert all(word in TEXT for word in pairs)


def test_a_copy_repeats_its_passage(tokenizer):
    sample = copy(tokenizer, TEXT, 1000, 0.3, seed=5, repeat=80)
    assert sample.scored == 80 and sample.ids[-80:] == sample.ids[300:380]
    assert tokenizer.decode(sample.ids[:-80]) in TEXT
    with pytest.raises(OptionError, match="depth"):
        copy(tokenizer, TEXT, 1000, 0.9, repeat=80)


def test_prose_is_untouched(tokenizer):
    assert tokenizer.decode(prose_loss(tokenizer, TEXT, 700, seed=1).ids) in TEXT


def test_scores(tokenizer):
    sample = multi_needle(tokenizer, TEXT, 2000, (0.2, 0.8), seed=1)
    first, second = sample.answers
    assert sample.score(f" {first} and {second}.") == 1.0
    assert sample.score(f"{second}") == 0.5
    assert sample.score(f"I do not know\n{first} {second}") == 0.0
    with pytest.raises(InputError, match="loss"):
        copy(tokenizer, TEXT, 1000).score("")


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(InputError, match="tokens"):
        needle(tokenizer, TEXT, 100_000)
    with pytest.raises(InputError, match="pair"):
        key_value(tokenizer, TEXT, 30)
    with pytest.raises(OptionError, match="depth"):
        needle(tokenizer, TEXT, 1000, 1.5)
    with pytest.raises(OptionError, match="depth"):
        multi_needle(tokenizer, TEXT, 1000, [0.5] * (len(CITIES) + 1))
