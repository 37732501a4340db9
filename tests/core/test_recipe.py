from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError, RecipeError, UnknownNameError
from tokenary.core.recipe import Recipe, Step

DRAFTS = ["token-recycling", "aded", "prompt-lookup"]
KEEPS = ["keyformer", "random", "recent"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "plain"),
        ("", "plain"),
        ("plain", "plain"),
        ([], "plain"),
        ("keyformer", "keyformer"),
        (" keyformer : keep = 50% ", "keyformer:keep=50%"),
        ("token-recycling:nodes=24 + keyformer:keep=50%", "keyformer:keep=50% + token-recycling:nodes=24"),
        ("keyformer:keep=50%+token-recycling:nodes=24", "keyformer:keep=50% + token-recycling:nodes=24"),
        (["token-recycling:nodes=24", "keyformer:keep=50%"], "keyformer:keep=50% + token-recycling:nodes=24"),
        ("keyformer:seed=3,keep=50%", "keyformer:keep=50%,seed=3"),
        ("aded:store=/a,b/c=d,seed=1", None),
    ],
)
def test_reading(source, text):
    if text is None:  # a value may hold commas that open no new option
        assert dict(Recipe.parse("aded:store=/a,b c,seed=1").steps[0].options) == {"store": "/a,b c", "seed": "1"}
        return
    recipe = Recipe.parse(source)
    assert str(recipe) == text and Recipe.parse(text) == recipe and Recipe.parse(recipe) is recipe


@given(st.sampled_from([None, *DRAFTS]), st.sampled_from([None, *KEEPS]), st.integers(1, 60), st.integers(1, 100))
def test_round_trips(draft, keep, nodes, percent):
    parts = [f"{draft}:nodes={nodes}"] * (draft is not None) + [f"{keep}:keep={percent}%"] * (keep is not None)
    one, other = Recipe.parse(parts), Recipe.parse(list(reversed(parts)))
    assert one == other and hash(one) == hash(other) and one.digest() == other.digest()
    for back in (Recipe.parse(str(one)), Recipe.from_json(json.dumps(one.to_json())), Recipe.parse(one.to_json())):
        assert back == one and back.digest() == one.digest()
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.lossless == (keep is None)


def test_a_digest_is_the_same_on_every_machine():
    assert Recipe().digest() == "a116c9ed46d6"
    assert Recipe.parse("keyformer:keep=50%").digest() != Recipe.parse("keyformer:keep=51%").digest()


@pytest.mark.parametrize("one", DRAFTS)
@pytest.mark.parametrize("other", DRAFTS)
def test_two_of_one_slot_are_refused_with_the_reason(one, other):
    with pytest.raises(RecipeError, match="do not compose: both are the 'draft'"):
        Recipe.parse([one, other])


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("keyfomer", UnknownNameError, "did you mean keyformer"),
        ("keyformer:keep", RecipeError, "options are name=value"),
        ("keyformer:=3", RecipeError, "options are name=value"),
        ("keyformer:keep=50%,keep=40%", RecipeError, "given twice"),
        ("+ keyformer: +", UnknownNameError, None),
        ({"methods": [{"options": {}}]}, RecipeError, "not a recipe in JSON"),
        ({"steps": []}, RecipeError, "not a recipe in JSON"),
    ],
)
def test_what_is_no_recipe(text, error, words):
    if words is None:
        assert str(Recipe.parse(text)) == "keyformer"
        return
    with pytest.raises(error, match=words) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


def test_json_that_is_none():
    for text in ("{", "[]", "3", '{"methods": [3]}', '{"methods": [{"slug": "aded", "options": 3}]}'):
        with pytest.raises(RecipeError, match="not a recipe in JSON"):
            Recipe.from_json(text)


def test_a_refusal_of_a_card_is_the_reason(monkeypatch):
    from tokenary.core import recipe as module
    from tokenary.core.card import Card

    made = {
        "a": Card(
            slug="a", cls="A", room="decode", title="", summary="", slot="draft", refuses=(("keep", "it rereads all"),)
        ),
        "b": Card(slug="b", cls="B", room="memory", title="", summary="", slot="keep"),
    }
    monkeypatch.setattr(module, "card", made.__getitem__)
    with pytest.raises(RecipeError, match="a and b do not compose: it rereads all"):
        Recipe.parse("a + b")
    assert str(Recipe.parse("a")) == "a"


def test_building_checks_options():
    built = Recipe.parse("token-recycling:nodes=24 + keyformer:keep=25%").build()
    assert sorted(built) == ["draft", "keep"]
    assert built["keep"].keep == Budget(ratio=0.25) and built["draft"].options["nodes"] == 24
    with pytest.raises(OptionError, match="nodes='500'"):
        Recipe.parse("token-recycling:nodes=500").build()
    with pytest.raises(UnknownNameError, match="did you mean nodes"):
        Recipe.parse("token-recycling:node=3").build()


def test_bytes_is_a_budget_too():
    assert Recipe.parse("keyformer:bytes=64MB").build()["keep"].keep == Budget(bytes=64_000_000)
    with pytest.raises(RecipeError, match="keep or bytes, not both"):
        Recipe.parse("keyformer:bytes=64MB,keep=50%").build()


def test_two_builds_share_nothing():
    recipe = Recipe.parse("token-recycling")
    assert recipe.build()["draft"] is not recipe.build()["draft"]


def test_steps_do_not_change():
    with pytest.raises(AttributeError):
        Step("aded").slug = "x"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("awrs:regex=[a-z]+", ["awrs:regex=[a-z]+"]),
        ("awrs:regex=a+b", ["awrs:regex=a+b"]),
        ("awrs:regex=[0-9]+ + token-recycling:nodes=4", ["awrs:regex=[0-9]+", "token-recycling:nodes=4"]),
        ("awrs:regex=a++token-recycling", ["awrs:regex=a+", "token-recycling"]),
        ("token-recycling+keyformer:keep=50%", ["keyformer:keep=50%", "token-recycling"]),
        ("token-recycling +keyformer", ["keyformer", "token-recycling"]),
        ("awrs:regex=a+tokens", ["awrs:regex=a+tokens"]),
    ],
)
def test_an_option_may_hold_a_plus(text, steps):
    assert [str(step) for step in Recipe.parse(text).steps] == steps
    assert [str(step) for step in Recipe.parse([text]).steps] == steps
