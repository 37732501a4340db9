"""Haystacks: exact length, everything hidden once, questions with the answers that stand in the text, scores."""

import pytest

from tokenary.bench.haystack import COPIED, CUE, TASKS, Haystack, Question, haystacks
from tokenary.core.errors import InputError
from tokenary.data import prose

TEXT = prose()[:30_000]


@pytest.fixture(scope="module")
def made(tokenizer):
    return haystacks(tokenizer, TEXT, 6000, 3, seed=2)


def answers(tokenizer, question):
    return [tokenizer.decode(question.answer[start:end]).strip() for start, end in question.parts]


def test_haystacks_have_their_length_and_depend_on_the_seed(tokenizer, made):
    assert [len(one.ids) for one in made] == [6000] * 3
    assert made == haystacks(tokenizer, TEXT, 6000, 3, seed=2) != haystacks(tokenizer, TEXT, 6000, 3, seed=3)
    assert len({one.ids for one in made}) == 3
    assert {question.task for question in made[0].questions} == set(TASKS)


def test_what_is_asked_for_stands_in_the_text_once(tokenizer, made):
    for one in made:
        text = tokenizer.decode(one.ids)
        for question in one.questions:
            asked = tokenizer.decode(question.ids)
            for number in answers(tokenizer, question):
                assert text.count(number) == 1 and number not in asked
            if question.task == "needle":
                (number,) = answers(tokenizer, question)
                place = text.index(number)
                assert abs(place - question.depth * len(text)) < 900
                city = text[:place].removesuffix(" is ").rpartition(" ")[2]
                assert f"The secret number of {city} is" in asked
            if question.task == "key-value":
                (number,) = answers(tokenizer, question)
                word = text[: text.index(number)].removesuffix(": ").rpartition("\n")[2]
                assert asked == f"\nThe number of {word} is" and word in TEXT


def test_all_needles_are_asked_for_in_the_order_of_the_question(tokenizer, made):
    for one in made:
        (question,) = (each for each in one.questions if each.task == "multi-needle")
        text, asked = tokenizer.decode(one.ids), tokenizer.decode(question.ids)
        cities = asked.rpartition("number of ")[2].removesuffix(" is").split(" and ")
        assert len(cities) == 3
        for city, number in zip(cities, answers(tokenizer, question), strict=True):
            assert f" The secret number of {city} is {number}." in text
        assert tokenizer.decode(question.answer) == " " + " and ".join(answers(tokenizer, question))


def test_the_rest_is_the_text_itself(tokenizer, made):
    for one in made:
        copied = next(each for each in one.questions if each.task == "copy")
        follows = next(each for each in one.questions if each.task == "perplexity")
        passage = tokenizer.decode([*copied.ids, *copied.answer])
        assert len(copied.ids) == CUE and len(copied.answer) == COPIED
        assert passage in TEXT and passage in tokenizer.decode(one.ids)
        assert tokenizer.decode([*one.ids[-100:], *follows.ids, *follows.answer]) in TEXT


def test_scores():
    question = Question("multi-needle", (1,), (5, 6, 9, 7, 8), ((0, 2), (3, 5)))
    losses = [1.0, 2.0, 100.0, 3.0, 4.0]
    assert question.score(losses, [5, 6, 0, 7, 8]) == (2.5, 1.0)
    assert question.score(losses, [5, 6, 9, 7, 0]) == (2.5, 0.5)
    assert question.score(losses, [0] * 5) == (2.5, 0.0)
    assert Question("copy", (1,), (5, 6)).score([1.0, 2.0], [5, 6]) == (1.5, None)


def test_json_holds_the_questions():
    one = Haystack((1, 2), (Question("needle", (3,), (4, 5), ((0, 2),)),))
    assert one.to_json() == {
        "ids": [1, 2],
        "questions": [{"task": "needle", "ids": [3], "answer": [4, 5], "parts": [[0, 2]]}],
    }


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(InputError, match="too short to hide"):
        haystacks(tokenizer, TEXT, 100, 1)
    with pytest.raises(InputError, match="too few for a haystack"):
        haystacks(tokenizer, TEXT, 100_000, 1)
