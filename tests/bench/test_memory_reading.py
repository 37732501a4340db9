"""One reading of a prompt for many memories gives what each gives alone, whoever reads, keeps or stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokenary.bench.memory_curves as memory_curves
from tokenary.bench.haystack import Haystack, Question
from tokenary.bench.memory_curves import budget_option, points_of
from tokenary.bench.memory_reading import _alone, read_haystack
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.recipe import Recipe
from tokenary.core.registry import card, cards
from tokenary.hf.target import Target, attached
from tokenary.memory.base import ReadLayer, ReadPolicy
from tokenary.models import tiny_lm
from tokenary.run import build

RNG = np.random.default_rng(5)
IDS = RNG.integers(1, 97, 220).tolist()
QUESTIONS = (
    Question("needle", (7, 8, 9), (10, 11), ((0, 2),)),
    Question("copy", tuple(IDS[20:24]), tuple(IDS[24:44])),
)
HAYSTACK = Haystack(tuple(IDS), QUESTIONS)
BUDGETS = {"keep": (20.0, 50.0), "read": (10.0, 30.0)}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(seed=2, layers=3)


@pytest.fixture(scope="module")
def points(lm):
    return points_of(lm, [], BUDGETS, len(IDS), "memory")


@pytest.fixture(scope="module")
def answers(lm, points):
    return dict(read_haystack(lm, HAYSTACK, {point.recipe: point.methods for point in points[0]}))


def log_likelihood(lm, question):
    """The reference: one full pass, no cache."""
    ids = torch.tensor([[*IDS, *question.ids, *question.answer]])
    with torch.no_grad():
        logits = lm.model(ids).logits[0, -len(question.answer) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(question.answer)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_full_cache_gives_the_models_own_loss(family):
    lm = tiny_lm(seed=2, family=family)
    ((name, found),) = read_haystack(lm, HAYSTACK, {"plain": {}})
    assert name == "plain"
    for loss, question in zip(found.losses, QUESTIONS, strict=True):
        assert loss == pytest.approx(log_likelihood(lm, question), abs=1e-4)
    assert found.right[0] in (0.0, 1.0) and found.right[1] is None


def test_every_method_of_the_room_answers_or_says_why_not(points, answers):
    found, left_out = points
    slugs = {each.slug for each in cards(room="memory")}
    assert {point.curve for point in found} | {line.partition(":")[0] for line in left_out} >= slugs
    assert set(answers) == {point.recipe for point in found}
    for curve in ("keyformer", "random", "recent", "read-oracle", "read-random", "read-recent"):
        assert sum(point.curve == curve for point in found) == 2


@pytest.mark.parametrize("curve", ["plain", *(each.slug for each in cards(room="memory"))])
def test_sharing_the_prompt_changes_nothing(lm, points, answers, curve):
    for point in points[0]:
        if point.curve != curve:
            continue
        with torch.inference_mode():  # with methods that were prepared at this very budget
            alone = _alone(lm, HAYSTACK, build(lm, Recipe.parse(point.recipe)))
        shared = answers[point.recipe]
        assert shared.losses == pytest.approx(alone.losses, abs=1e-4), point.recipe
        assert shared.right == alone.right and shared.read_tokens == alone.read_tokens
        assert shared.kv_bytes == pytest.approx(alone.kv_bytes, rel=0.02), point.recipe


def test_memories_differ_and_cost_what_they_say(answers):
    full = answers["plain"]
    assert full.read_tokens == 221
    for name in ("keyformer:keep=20%", "random:keep=20%", "recent:keep=20%"):
        assert answers[name].kv_bytes < 0.4 * full.kv_bytes and answers[name].read_tokens == 45
        assert answers[name].losses != pytest.approx(full.losses, abs=1e-4)
    assert answers["read-oracle:read=10%"].read_tokens == 22
    assert answers["read-oracle:read=10%"].kv_bytes == full.kv_bytes
    assert answers["zipcache"].kv_bytes < 0.5 * full.kv_bytes
    assert answers["pbs-attn"].prompt_share is not None and full.prompt_share is None


def test_questions_leave_no_trace(lm, points):
    """Asked in the other order, every question gets the same answer."""
    turned = Haystack(HAYSTACK.ids, QUESTIONS[::-1])
    methods = {point.recipe: point.methods for point in points[0]}
    once, twice = (dict(read_haystack(lm, each, methods)) for each in (HAYSTACK, turned))
    for name in methods:
        assert once[name].losses == pytest.approx(twice[name].losses[::-1], abs=1e-4), name


class Stubborn(ReadPolicy):
    """Refuses the model, as late as it can."""

    def layer(self, index: int) -> StubbornLayer:
        return StubbornLayer()


class StubbornLayer(ReadLayer):
    def attend(self, layer, query, key, value, mask, scale):
        raise UnsupportedModelError("not this model")


class Own(Stubborn):
    """Attends to a prompt in a way of its own: to nothing but the value of each token itself."""

    def layer(self, index: int) -> OwnLayer:
        return OwnLayer()


class OwnLayer(ReadLayer):
    def attend(self, layer, query, key, value, mask, scale):
        width = query.shape[2]
        return value[:, :, -width:].repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2)


def test_a_method_that_fails_and_one_that_reads_prompts_itself_disturb_nobody(lm, answers):
    methods = {"plain": {}, "stubborn": {"read": Stubborn()}, "own": {"read": Own()}}
    told = []
    found = dict(read_haystack(lm, HAYSTACK, methods, told.append))
    assert isinstance(found["stubborn"], UnsupportedModelError)
    assert found["plain"].losses == pytest.approx(answers["plain"].losses, abs=1e-5)
    target = Target(lm.model, readers=Own().attach(lm.model.config))
    with attached(lm.model):
        target.prefill([IDS])
    assert found["own"].losses != pytest.approx(found["plain"].losses, abs=1e-3)
    assert told == ["prompt", "plain", "stubborn", "own"]


def test_budgets_are_found_in_the_signature():
    named = {each.slug: budget_option(each) for each in cards(room="memory")}
    assert named["keyformer"] == "keep" and named["fasa"] == "read"
    assert named["zipcache"] is None and named["pbs-attn"] is None


def test_a_reader_that_always_reads_something_is_measured_at_the_same_total(lm, monkeypatch):
    monkeypatch.setattr(memory_curves, "cards", lambda room: [card("token-select")])
    found, left_out = points_of(lm, [], {"read": (10.0, 40.0)}, 2000, "memory")
    assert found[1].recipe == "token-select:read=160" and len(found) == 2
    assert len(left_out) == 1 and "token-select:read=10%" in left_out[0]
    found, left_out = points_of(lm, [], {"read": (10.0,)}, 2000, "memory")
    assert found[1].recipe == "token-select:read=10%" and not left_out


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_other_families_answer_too(family):
    lm = tiny_lm(seed=2, family=family)
    found, left_out = points_of(lm, [], {"keep": (30.0,), "read": (30.0,)}, len(IDS), "memory")
    answers = dict(read_haystack(lm, HAYSTACK, {point.recipe: point.methods for point in found}))
    assert "keyformer:keep=30%" in answers and all(np.isfinite(one.losses).all() for one in answers.values())
    if family == "gemma3":
        assert any(line.startswith("token-select: ") for line in left_out)
