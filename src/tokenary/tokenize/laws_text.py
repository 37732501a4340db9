"""The laws of numbers, transforms and merges of text tokens: whatever they do, the text can be read back.

They run on a byte-level tokenizer of single bytes and a few words, which is built here.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenary.core.laws import (
    LawFunction,
    Make,
    options_are_checked_and_fixed,
    require,
    the_recipe_survives_json,
)
from tokenary.core.seeding import substream
from tokenary.core.token_map import check_token_map
from tokenary.models.tiny import tiny_lm
from tokenary.tokenize.base import TextTokenizer

TEXTS = (
    "In 1987 it sold 1,234,567.50 (or -0.10) of 10.0.0.1 on 2020-01-05; 6.02e23, 007, .5!",
    "the cat and the dog and the cat and the caterpillar",
    "naïve café 日本語 👩‍👩‍👧 \n\n\t x  y",
    "a",
    "",
)


@functools.cache
def tokenizer() -> TextTokenizer:
    """A byte-level BPE of single bytes, some merges and one special token."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("h", "e"), ("c", "a"), ("a", "t"), ("ca", "t"), ("Ġ", "the"), ("a", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return TextTokenizer(made.to_str(), "law")


def end_id() -> int:
    """Return the id of the special token."""
    return next(iter(tokenizer().special_ids))


def random_text(seed: int) -> str:
    """Digits, points, separators and letters in no order."""
    drawn = substream(seed, "law text").choice(list("0123456789012.,-e a:"), 200)
    return "".join(drawn)


# ---------------------------------------------------------------------------------------------------- numbers


def the_text_comes_back(make: Make) -> None:
    """Marking a text and reading it back gives the text; a form that pads is read back the same a second time."""
    method: Any = make()
    for text in (*TEXTS, *map(random_text, range(20))):
        marked = method.mark(text)
        back = method.unmark(marked).text
        if method.scheme.form == "lossless":
            require(back == text, f"{text!r} comes back as {back!r}")
        require(method.mark(back) == marked, f"{text!r}: {back!r} is not marked as it was")


def a_group_says_its_magnitude(make: Make) -> None:
    """The groups of a numeral, each times its power, add up to the numeral."""
    from fractions import Fraction

    method: Any = make()
    size = method.scheme.group
    for number in ("0", "7", "42.5", "0.05"):
        if "." in number and len(number.partition(".")[2]) > size * method.scheme.fraction_groups:
            continue
        if len(number.partition(".")[0]) > size * method.scheme.integer_groups:
            continue
        total = Fraction(0)
        for digits, level in method.split(number):
            places = size * level + (size - len(digits) if level < 0 else 0)
            total += int(digits) * Fraction(10) ** places
        require(total == Fraction(number), f"the groups of {number} add up to {float(total)}")


def the_tokenizer_file_needs_no_code(make: Make) -> None:
    """An extended tokenizer, saved and loaded by the tokenizers library alone, writes and reads the same."""
    method: Any = make()
    extended = method.extend(tokenizer().tokenizer)
    file = Tokenizer.from_str(extended.tokenizer.to_str())
    for text in TEXTS:
        ids = file.encode(text).ids
        marked = extended.scheme.mark(text)
        require(ids == extended.encode(text).ids, f"{text!r} is written otherwise")
        require(file.decode(ids) == method.unmark(marked).text, f"{text!r} comes back as {file.decode(ids)!r}")
        require(extended.decode(ids).text == file.decode(ids), f"{text!r}: the two decoders differ")


# --------------------------------------------------------------------------------------------------- transform


def the_decoded_text_never_changes(make: Make) -> None:
    """A transformed sequence decodes to the same text, and special tokens and padding stay what they were."""
    method: Any = make()
    transform = method.transform(tokenizer())
    for text in TEXTS:
        ids = [*tokenizer().encode(text).tolist(), end_id()]
        made = transform({"input_ids": [end_id(), *ids], "attention_mask": [0] + [1] * len(ids)})
        found = made["input_ids"]
        require(tokenizer().decode(found) == tokenizer().decode([end_id(), *ids]), f"{text!r} decodes otherwise")
        require(found.count(end_id()) == 2 and found[-1] == end_id(), f"{text!r}: a special token is touched")
        require(made["attention_mask"].count(0) == 1, f"{text!r}: the padding is touched")


def labels_follow_their_tokens(make: Make) -> None:
    """A label is the token at its place; a token without loss stays without."""
    transform = make().transform(tokenizer())
    ids = tokenizer().encode(TEXTS[1]).tolist()
    made = transform({"input_ids": ids, "labels": [-100] * 9 + ids[9:], "at": list(range(len(ids)))})
    for id, label, at in zip(made["input_ids"], made["labels"], made["at"], strict=True):
        require(label == (-100 if at < 9 else id), f"token {at} is {id}, its label {label}")


def a_batch_is_its_rows(make: Make) -> None:
    """What happens to a sequence depends on nothing else in the batch, and happens again."""
    transform = make().transform(tokenizer())
    rows = [tokenizer().encode(text).tolist() for text in TEXTS if text]
    alone = [transform({"input_ids": row})["input_ids"] for row in rows]
    require(transform({"input_ids": rows[::-1]})["input_ids"] == alone[::-1], "a batch of columns differs")
    listed = [made["input_ids"] for made in transform([{"input_ids": row} for row in rows])]
    require(listed == alone, "a list of examples differs")


# -------------------------------------------------------------------------------------------------- retokenize


def merged_tokens_spell_the_same(make: Make) -> None:
    """The parts of the merged tokens are the tokens before, row by row; special tokens are merged with nothing."""
    method: Any = make()
    rows = [[end_id(), *tokenizer().encode(text).tolist(), end_id()] for text in TEXTS]
    merged = method.retokenize(rows, method.rules(tokenizer()))
    require(merged.original() == rows, "the parts are not the tokens before")
    for row in merged.rows:
        require(row.count(end_id()) == 2, "a special token is merged")
    again = method.retokenize(rows, method.rules(tokenizer()))
    require(again.rows == merged.rows, "a second run merges otherwise")


def the_map_is_lawful_and_counts_its_tokens(make: Make) -> None:
    """A batch returns a token map that keeps the laws of maps, whose sizes add up to the tokens before."""
    method: Any = make()
    rows = [tokenizer().encode(text).tolist() for text in TEXTS[:3]]
    merged = method.retokenize(rows, method.rules(tokenizer()))
    for side in ("left", "right"):
        mapping = merged.token_map(side)
        broken = next(iter(check_token_map(mapping)), None)
        require(broken is None, str(broken))
        require(mapping.sizes().sum(-1).tolist() == list(map(len, rows)), "its sizes are not the tokens before")


def no_merge_changes_nothing(make: Make) -> None:
    """Without merges a model reads the same numbers as from its own embeddings."""
    lm = tiny_lm(vocab=300)
    rows = [tokenizer().encode(TEXTS[1]).tolist()]
    made, merged = make(merges=0).attach(lm.model, tokenizer())(rows)
    require(merged.rows == rows, "tokens are merged")
    expected = lm.model.get_input_embeddings()(torch.tensor(rows))
    require(torch.equal(made["inputs_embeds"], expected), "the embeddings differ")


def padding_changes_nothing(make: Make) -> None:
    """What a model reads of a sequence does not depend on how far its batch is padded."""
    lm, method = tiny_lm(vocab=300), make()
    rows = [tokenizer().encode(text).tolist() for text in TEXTS[:3]]
    made, merged = method.attach(lm.model, tokenizer())(rows)
    for side in ("left", "right"):
        made = method.attach(lm.model, tokenizer())(rows, side)[0]
        kept = made["attention_mask"].bool()
        require(kept.sum(-1).tolist() == list(map(len, merged.rows)), "the mask does not count the merged tokens")
        positions = [made["position_ids"][b][kept[b]].tolist() for b in range(len(rows))]
        require(positions == [list(range(len(row))) for row in merged.rows], "positions do not count merged tokens")
        require(np.isfinite(made["inputs_embeds"].numpy()).all(), "an embedding is not finite")


_OF_ALL: tuple[LawFunction, ...] = (options_are_checked_and_fixed, the_recipe_survives_json)

#: Laws by slot, for `tokenary.tokenize.laws`.
LAWS: dict[str, tuple[LawFunction, ...]] = {
    "numbers": (*_OF_ALL, the_text_comes_back, a_group_says_its_magnitude, the_tokenizer_file_needs_no_code),
    "transform": (*_OF_ALL, the_decoded_text_never_changes, labels_follow_their_tokens, a_batch_is_its_rows),
    "retokenize": (
        *_OF_ALL,
        merged_tokens_spell_the_same,
        the_map_is_lawful_and_counts_its_tokens,
        no_merge_changes_nothing,
        padding_changes_nothing,
    ),
}
