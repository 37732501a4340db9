"""The acid test: Token Recycling over Keyformer, a batch of four, left padding, streaming, cancelled half-way."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import tokenary
from tokenary.core.registry import method_class
from tokenary.core.sampling import Sampler
from tokenary.decode.base import Loop
from tokenary.decode.token_recycling import TokenRecycling
from tokenary.decode.width import DraftWidth
from tokenary.hf.cache import TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.keyformer import Keyformer
from tokenary.models.tiny import tiny_lm
from tokenary.run import Generation

NEW = 64
PROMPTS = [
    torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (70, 33, 101, 64)
]
LONGEST = max(map(len, PROMPTS))


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(layers=3, heads=6, kv_heads=2, hidden=48)


def keyformer():
    return Keyformer(keep="50%", interval=8)


def recycling():
    method = TokenRecycling(nodes=24)
    method.width = DraftWidth(24, fixed=24)
    return method


@pytest.fixture(scope="module")
def expected(lm):
    """Keyformer decoded greedily, a token a pass, every sequence alone."""
    texts = []
    for prompt in PROMPTS:
        with attached(lm.model):
            loop = Loop(Target(lm.model, keyformer().attach(lm.model.config, lm.dtype)), [prompt], Sampler(), NEW)
            for _ in loop:
                pass
        assert loop.sequences[0].trace.drafted == 0
        texts.append(loop.sequences[0].new_ids)
    return texts


def left_padded():
    ids = torch.tensor([[0] * (LONGEST - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


class Watch(StoppingCriteria):
    """Streams every sequence as it grows, and cancels all of them once the first has `limit` new tokens."""

    def __init__(self, limit):
        self.limit, self.cancelled, self.texts = limit, threading.Event(), {}

    def __call__(self, input_ids, scores, **kwargs):
        for ids in input_ids.tolist():  # as `generate` shows them: behind prompts padded to one length
            row = next(r for r, prompt in enumerate(PROMPTS) if ids[LONGEST - len(prompt) : LONGEST] == prompt)
            new = ids[LONGEST:]
            before = self.texts.get(row, [])
            assert new[:-1] == before  # token by token, nothing taken back
            self.texts[row] = new
            if len(new) >= self.limit:
                self.cancelled.set()
        return torch.full((len(input_ids),), self.cancelled.is_set())


def test_the_dropping_and_the_drafting_are_real(lm, expected):
    """Otherwise the test below would prove nothing: tokens are dropped, and drafts are accepted over them."""
    with attached(lm.model):
        full = Loop(Target(lm.model), PROMPTS, Sampler(), NEW)
        for _ in full:
            pass
        loop = Loop(
            Target(lm.model, keyformer().attach(lm.model.config, lm.dtype)), PROMPTS, Sampler(), NEW, (), recycling()
        )
        for _ in loop:
            pass
    assert [s.new_ids for s in full.sequences] != expected
    assert [s.new_ids for s in loop.sequences] == expected
    assert sum(s.trace.accepted for s in loop.sequences) > 20
    for layer in loop.target.cache.layers:  # the rows that still ran at the end
        assert max(layer.held) <= 50 + 8


@pytest.mark.parametrize("limit", [NEW // 2, 11])
def test_recycling_over_keyformer_batched_padded_streamed_cancelled(lm, expected, limit):
    cache = TokenCache(lm.model.config, keyformer().attach(lm.model.config, lm.dtype))
    watch = Watch(limit)
    before = lm.model.config._attn_implementation
    found = lm.model.generate(
        **left_padded(),
        past_key_values=cache,
        custom_generate=recycling(),
        stopping_criteria=StoppingCriteriaList([watch]),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert lm.model.config._attn_implementation == before  # the model is as it was
    assert sorted(watch.texts) == [0, 1, 2, 3]
    for row, streamed in watch.texts.items():
        assert 0 < len(streamed) < NEW  # half-way
        assert streamed == expected[row][: len(streamed)]
        assert found[row, LONGEST : LONGEST + len(streamed)].tolist() == streamed
        assert not found[row, LONGEST + len(streamed) :].any()  # padding
    assert max(len(streamed) for streamed in watch.texts.values()) >= limit


def test_the_same_through_our_own_stream(lm, expected):
    recipe = tokenary.Recipe.parse("token-recycling:nodes=24 + keyformer:keep=50%,interval=8")
    generation = Generation(lm, PROMPTS, recipe, NEW, Sampler())
    streamed = {row: [] for row in range(4)}
    for piece in generation:
        streamed[piece.row] += piece.token_ids
        if len(streamed[0]) >= NEW // 2:
            break  # cancelled
    outputs = generation.outputs
    for row, output in enumerate(outputs):
        assert output.stats.finish == "cancelled"
        assert output.token_ids == expected[row][: len(output.token_ids)]
        assert output.token_ids[: len(streamed[row])] == streamed[row]
        assert len(output.token_ids) < NEW
    again = tokenary.generate(lm, PROMPTS, recipe, max_new_tokens=NEW)  # nothing is left of the cancelled run
    assert [output.token_ids for output in again] == expected


def test_neither_file_knows_the_other():
    sources = {
        slug: inspect.getsource(inspect.getmodule(method_class(slug))) for slug in ("token-recycling", "keyformer")
    }
    for word in ("keyformer", "memory", "evict", "keeppolicy"):
        assert word not in sources["token-recycling"].lower()
    for word in ("recycling", "tokenary.decode", "draft", "proposer"):
        assert word not in sources["keyformer"].lower()
