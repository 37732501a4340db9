"""What a stranger's recipe may set: never a file, never work without end."""

from __future__ import annotations

import pytest

from tokenary.core.registry import cards, method_class
from tokenary.serve import recipes
from tokenary.serve.errors import ApiError


@pytest.mark.parametrize("text", ["", "aded", "aded:store=none", "awrs:regex=a+", "latr:group=4", "hisa", "still"])
def test_what_is_harmless_passes(text: str) -> None:
    recipes.parse(text, "causal")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aded:store=/etc/passwd", "auto, builtin, none may"),
        ("awrs:json=/etc/passwd", "may not set json"),
        ("hisa:weights=/tmp", "may not set weights"),
        ("hisa:train=3", "may not set train"),
        ("latr:group=9", "group to 8 at most"),
        ("awrs:regex=a+,particles=64", "particles to 8 at most"),
        ("group-think:thinkers=64", "thinkers to 8 at most"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_is_not_is_refused_before_any_work(text: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as refused:
        recipes.parse(text, "causal")
    assert refused.value.status == 422


def test_free_text_is_closed_unless_a_method_opens_it() -> None:
    described = {method["slug"]: method["options"]["properties"] for method in recipes.methods("causal")}
    opened = set()
    for card in cards():
        for name, schema in method_class(card.slug).schema().get("properties", {}).items():
            free = schema.get("type") == "string" and not {"enum", "const", "pattern", "examples"} & schema.keys()
            if free and name in described.get(card.slug, {}):
                assert "remote" in schema, f"{card.slug}:{name}"
                opened.add(f"{card.slug}:{name}")
    assert opened == {"aded:store", "awrs:regex"}
