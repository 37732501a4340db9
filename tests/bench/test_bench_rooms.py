"""A room as one comparison."""

import pytest

from tokenary.bench import recipes_of
from tokenary.core.errors import InputError, UnknownNameError
from tokenary.core.registry import cards


def test_every_method_of_a_room_is_compared_on_a_model_of_its_kind():
    by_model = recipes_of("decode", "smollm2")
    assert next(iter(by_model)) == "smollm2"
    names = {model: {str(recipe) for recipe in recipes} for model, recipes in by_model.items()}
    assert {"token-recycling", "prompt-lookup", "latr"} <= names["smollm2"]
    assert {"local-leap", "window-diffusion"} <= names["wiki-diffusion"] and "any-subset-ar" in names["wiki-any-subset"]
    assert sum(map(len, names.values())) == len(cards(room="decode"))


def test_a_model_of_another_kind_is_used_where_it_fits():
    by_model = recipes_of("decode", "my-diffusion", "diffusion")
    assert "local-leap" in {str(recipe) for recipe in by_model["my-diffusion"]} and "wiki-diffusion" not in by_model
    assert "token-recycling" in {str(recipe) for recipe in by_model["smollm2"]}


def test_rooms_that_write_nothing_are_refused():
    with pytest.raises(InputError, match="takes part in writing"):
        recipes_of("tokenize", "smollm2")
    with pytest.raises(UnknownNameError, match="decode"):
        recipes_of("decoed", "smollm2")
