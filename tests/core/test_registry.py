"""Cards are read from source; nothing is imported to list them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys

import pytest

import tokenary
from tokenary.core.card import ROOMS, Card
from tokenary.core.errors import UnknownNameError
from tokenary.core.method import Method
from tokenary.core.registry import card, cards, method_class, read_card, room_attribute

LINE = """CARD = Card(
    slug="x-y",
    cls="XY",
    room="decode",
    title="T",
    summary="S",
    slot="draft",
)
"""


def test_a_card_is_read_from_source_that_cannot_be_imported(tmp_path):
    file = tmp_path / "x_y.py"
    file.write_text("import no_such_module\n\n" + LINE + "\n1 / 0\n")
    assert read_card(file) == Card(slug="x-y", cls="XY", room="decode", title="T", summary="S", slot="draft")


@pytest.mark.parametrize("source", ["", "X = 1\n", "def f():\n    CARD = Card(\n    slug=1\n    )\n"])
def test_a_file_without_a_card(tmp_path, source):
    file = tmp_path / "a.py"
    file.write_text(source)
    assert read_card(file) is None


@pytest.mark.parametrize("value", ["NAME", "open('x')", "'a'.upper()", "__import__('os').getcwd()"])
def test_a_card_holds_literals_only(tmp_path, value):
    file = tmp_path / "a.py"
    file.write_text(LINE.replace('"T"', value))
    with pytest.raises(ValueError, match="malformed"):
        read_card(file)


def test_a_card_of_no_room():
    with pytest.raises(ValueError, match="room 'attic'"):
        Card(slug="a", cls="A", room="attic", title="", summary="", slot="")


@pytest.mark.parametrize("found", cards(), ids=lambda found: found.slug)
def test_every_card_fits_its_file_and_class(found):
    method = method_class(found.slug)
    assert issubclass(method, Method) and method.__name__ == found.cls and method.card_of() == found
    source = inspect.getsource(inspect.getmodule(method))
    assert source.startswith('"""')
    assert found.room in ROOMS and found.title and found.summary and len(found.summary) < 120
    assert found.baseline or (found.paper and found.year >= 2017)
    assert card(found.slug) == found and room_attribute(found.room, found.cls) is method
    assert getattr(getattr(tokenary, found.room), found.cls) is method
    json.dumps(found.to_dict())
    assert all(
        parameter.default is not inspect.Parameter.empty for parameter in inspect.signature(method).parameters.values()
    )


def test_the_first_methods_are_there():
    assert {"token-recycling", "aded", "prompt-lookup", "keyformer", "random", "recent"} <= {c.slug for c in cards()}


def test_listing_by_room_and_kind():
    assert {c.room for c in cards(room="decode")} == {"decode"}
    assert all(c.lossless for c in cards(lossless=True)) and not any(c.lossless for c in cards(lossless=False))
    assert len(cards(lossless=True)) + len(cards(lossless=False)) == len(cards())
    assert not any(c.baseline for c in cards(baselines=False))


def test_wrong_names_get_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean keyformer"):
        card("keyfromer")
    with pytest.raises(UnknownNameError, match="did you mean decode"):
        cards(room="decod")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        room_attribute("decode", "Nothing")
    with pytest.raises(AttributeError):
        tokenary.nothing  # noqa: B018


def test_cards_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        cards()[0].slug = "other"


def test_listing_imports_no_method_and_nothing_heavy():
    code = "import sys, tokenary; tokenary.methods(); print(' '.join(sys.modules))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout.split()
    assert not {"torch", "transformers", "pydantic", "numpy", "tokenary.decode.base"} & set(found)
