"""The constructor's signature is the option schema, and the gate."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnknownNameError
from tokenary.core.method import Method

CARD = Card(slug="toy", cls="Toy", room="decode", title="A toy", summary="does nothing", slot="draft")


class Base(Method):
    def __init__(self, keep: Budget = Budget(ratio=0.5), interval: int = 16) -> None:  # noqa: B008
        self.keep, self.interval = keep, interval


class Toy(Base):
    def __init__(
        self,
        nodes: Annotated[int, Field(ge=1, le=80)] | Literal["auto"] = "auto",
        keep: Budget = Budget(ratio=0.5),  # noqa: B008
        rate: Annotated[float, Field(ge=0, le=1)] = 0.3,
        mode: Literal["all", "some"] = "all",
        fast: bool = False,
        note: str = "",
    ) -> None:
        super().__init__(keep)
        self.nodes, self.rate, self.mode, self.fast, self.note = nodes, rate, mode, fast, note


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("nodes", "24", 24),
        ("nodes", "auto", "auto"),
        ("keep", "25%", Budget(ratio=0.25)),
        ("keep", 100, Budget(tokens=100)),
        ("rate", "0.5", 0.5),
        ("rate", 1, 1.0),
        ("mode", "some", "some"),
        ("fast", "true", True),
        ("fast", "no", False),
    ],
)
def test_text_and_values_pass_the_same_gate(option, text, value):
    toy = Toy(**{option: text})
    assert getattr(toy, option) == value == toy.options[option]
    assert type(toy.options[option]) is type(value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("nodes", 0),
        ("nodes", "81"),
        ("nodes", "many"),
        ("keep", "0%"),
        ("keep", "x"),
        ("rate", 1.1),
        ("rate", "nan"),
        ("mode", "none"),
        ("fast", "perhaps"),
    ],
)
def test_out_of_range_is_one_line_that_names_the_option(option, value):
    with pytest.raises(OptionError) as caught:
        Toy(**{option: value})
    assert caught.value.option == option and caught.value.value == value
    assert str(caught.value).startswith(f"option {option}={value!r}: expected ") and "\n" not in str(caught.value)


def test_an_unknown_option_gets_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean nodes"):
        Toy(node=3)


def test_too_many_arguments():
    with pytest.raises(OptionError, match="too many positional"):
        Toy(1, "50%", 0.1, "all", True, "", 7)


def test_options_are_all_read_only_and_those_of_the_outer_class():
    toy = Toy(24, note="x")
    assert dict(toy.options) == {
        "nodes": 24,
        "keep": Budget(ratio=0.5),
        "rate": 0.3,
        "mode": "all",
        "fast": False,
        "note": "x",
    }
    with pytest.raises(TypeError):
        toy.options["nodes"] = 3
    assert toy.interval == 16 and dict(Base().options) == {"keep": Budget(ratio=0.5), "interval": 16}


def test_the_schema_has_type_range_and_default():
    fields = Toy.schema()["properties"]
    assert list(fields) == ["nodes", "keep", "rate", "mode", "fast", "note"]
    integer, choice = fields["nodes"]["anyOf"]
    assert (integer["type"], integer["minimum"], integer["maximum"], choice["const"]) == ("integer", 1, 80, "auto")
    assert fields["rate"] | {"title": ""} == {"type": "number", "minimum": 0, "maximum": 1, "default": 0.3, "title": ""}
    assert fields["mode"]["enum"] == ["all", "some"] and fields["keep"]["type"] == "string"


def test_the_card_is_the_one_beside_the_class():
    assert Toy().card is CARD and Toy.card_of() is CARD


def test_repr_shows_the_options():
    assert repr(Toy(note="x")).startswith("Toy(nodes='auto', keep=Budget(ratio=0.5")
