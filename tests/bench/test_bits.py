"""Bits a byte: the same bytes under every tokenizer, and sums that add up."""

from __future__ import annotations

import math

import pytest
import torch

from tokenary.bench.bits import bits_of, windows
from tokenary.core.errors import InputError
from tokenary.embed import MeanOfPieces
from tokenary.embed.apply import transfer
from tokenary.embed.laws import toy, toy_target

TEXT = "the theatre and another ant ate 1024 cats,\nça va and so on " * 60


def test_windows_begin_with_white_space_and_do_not_overlap():
    found = windows(TEXT, 3, context=100, body=200)
    joined = [context + body for context, body in found]
    starts = [TEXT.index(text, n * (len(TEXT) // 3)) for n, text in enumerate(joined)]
    assert all(text[0].isspace() for pair in found for text in pair)
    assert all(start + len(text) <= after for start, text, after in zip(starts, joined, starts[1:], strict=False))
    with pytest.raises(InputError, match="too short"):
        windows(TEXT, 30, context=100, body=200)


def test_bits_are_the_models_own():
    lm = toy()
    texts = windows(TEXT, 3, context=30, body=60)
    found = bits_of(lm, texts, new={5, 9})
    for number, (context, body) in enumerate(texts):
        first, rest = lm.tokenizer(context)["input_ids"], lm.tokenizer(body, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logp = lm.model(torch.tensor([first + rest])).logits[0].log_softmax(-1)
        wanted = -sum(float(logp[len(first) + i - 1, token]) for i, token in enumerate(rest)) / math.log(2)
        assert found.bits[number] == pytest.approx(wanted, rel=1e-4)
        assert found.n_bytes[number] == len(body.encode())
    assert found.tokens == sum(part["tokens"] for part in found.parts.values())
    assert found.bits.sum() == pytest.approx(sum(part["bits"] for part in found.parts.values()))
    assert found.n_bytes.sum() == sum(part["bytes"] for part in found.parts.values())


def test_the_same_bytes_under_another_tokenizer():
    lm = toy()
    moved = transfer(lm, toy_target(), MeanOfPieces())
    texts = windows(TEXT, 3, context=30, body=60)
    before, after = bits_of(lm, texts), bits_of(moved, texts, new=set(range(300)))
    assert before.n_bytes.tolist() == after.n_bytes.tolist() and before.tokens != after.tokens
    assert math.isnan(before.part("new")) and after.part("new") > 0


def test_what_cannot_be_measured():
    lm = toy()
    with pytest.raises(InputError, match="body"):
        bits_of(lm, [("the", "")])
    lm.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        bits_of(lm, [("the", " ant")])
