"""The laws of measures: counts add up, their order does not matter, and nothing is said about nothing."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenary.core.laws import LawFunction, Make, options_are_checked_and_fixed, require, the_recipe_survives_json
from tokenary.core.seeding import substream
from tokenary.core.spelling import CHAR_OF
from tokenary.tokenize import laws_text
from tokenary.tokenize.base import EncodedText, TextTokenizer


def toy_tokenizer() -> TextTokenizer:
    """Make a byte-level vocabulary of 256 bytes and a few merges."""
    vocabulary = {CHAR_OF[byte]: byte for byte in range(256)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("Ġ", "a")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return TextTokenizer(made.to_str(), "toy")


def sentences(tokenizer: TextTokenizer) -> list[list[EncodedText]]:
    """Random parallel sentences of three languages, in four parts."""
    words = ["the", "an", "another", "theatre", "ça", "नमस्ते", "x"]
    parts: list[list[EncodedText]] = [[] for _ in range(4)]
    for language in ("eng", "fra", "hin"):
        for key in range(24):
            stream = substream(0, "law of measures", language, key)
            text = " ".join(words[i] for i in stream.integers(0, len(words), 12))
            row = EncodedText(language, f"{key:03d}", text, tokenizer.encode(text))
            parts[key % 4].append(row)
    return parts


def said(measure: Any, tokenizer: TextTokenizer, counts: Any) -> str:
    """Figures as JSON, every digit."""
    return json.dumps(measure.figures(tokenizer, counts), sort_keys=True, allow_nan=False)


def the_order_of_parts_does_not_matter(make: Make) -> None:
    """Counts of parts, added in any order and grouping, give the same figures to the last digit."""
    measure, tokenizer = make(), toy_tokenizer()
    counts = [measure.count(tokenizer, part) for part in sentences(tokenizer)]
    expected = said(measure, tokenizer, counts[0] + counts[1] + counts[2] + counts[3])
    for order in itertools.permutations(range(4)):
        a, b, c, d = (counts[i] for i in order)
        for name, whole in (("in turn", ((a + b) + c) + d), ("in pairs", (a + b) + (c + d))):
            require(said(measure, tokenizer, whole) == expected, f"parts {order}, {name}: other figures")


def languages_in_one_part_or_apart(make: Make) -> None:
    """Languages counted together give what they give counted apart."""
    measure, tokenizer = make(), toy_tokenizer()
    part = sentences(tokenizer)[0]
    apart = [
        measure.count(tokenizer, [text for text in part if text.language == language])
        for language in ("hin", "eng", "fra")
    ]
    together = said(measure, tokenizer, measure.count(tokenizer, part))
    require(said(measure, tokenizer, apart[0] + apart[1] + apart[2]) == together, "other figures when counted apart")


def nothing_adds_nothing(make: Make) -> None:
    """Counts of no text change nothing, and alone say nothing but why."""
    measure, tokenizer = make(), toy_tokenizer()
    some, nothing = measure.count(tokenizer, sentences(tokenizer)[0]), measure.count(tokenizer, [])
    expected = said(measure, tokenizer, some)
    for whole in (some + nothing, nothing + some):
        require(said(measure, tokenizer, whole) == expected, "counts of no text change the figures")
    found = measure.figures(tokenizer, nothing)
    require(not found.get("languages"), f"figures for languages that were never seen: {found}")


def figures_are_json(make: Make) -> None:
    """Figures are plain JSON without infinities, and a rebuilt tokenizer gives the same."""
    measure, tokenizer = make(), toy_tokenizer()
    again = copy.deepcopy(tokenizer)  # rebuilt from its text, as when it is sent somewhere
    part = sentences(tokenizer)[1]
    require(
        said(measure, tokenizer, measure.count(tokenizer, part)) == said(measure, again, measure.count(again, part)),
        "another figure after the tokenizer was rebuilt",
    )


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "measure": (
        the_order_of_parts_does_not_matter,
        languages_in_one_part_or_apart,
        nothing_adds_nothing,
        figures_are_json,
        options_are_checked_and_fixed,
        the_recipe_survives_json,
    ),
    **laws_text.LAWS,
}
