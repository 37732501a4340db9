from __future__ import annotations

import pytest

from tokenary.core import errors
from tokenary.core.errors import OptionError, TokenaryError, UnknownNameError


def test_every_error_for_users_has_one_base():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) >= 7
    assert all(issubclass(kind, TokenaryError) for kind in classes)


def test_an_option_error_names_option_value_and_range():
    error = OptionError("keep", "120%", "at most 100%")
    assert str(error) == "option keep='120%': expected at most 100%"
    assert (error.option, error.value, error.expected) == ("keep", "120%", "at most 100%")


@pytest.mark.parametrize(
    ("name", "near"),
    [("keyforme", ["keyformer"]), ("tokenrecycling", ["token-recycling"]), ("qqqq", [])],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    error = UnknownNameError("method", name, ["keyformer", "token-recycling", "aded"])
    assert error.near == near and repr(name) in str(error) and "\n" not in str(error)
    if near:
        assert f"did you mean {near[0]}?" in str(error)
    else:
        assert "known: aded, keyformer, token-recycling" in str(error)


def test_an_unknown_name_among_none():
    assert str(UnknownNameError("model", "x", [])) == "unknown model 'x'"
