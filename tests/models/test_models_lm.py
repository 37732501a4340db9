from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenary.core.errors import InputError
from tokenary.models import load, tiny_lm

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.real
class TestSmolLM2:
    def test_identity(self, smollm2):
        assert smollm2.eos_token_ids == (2,)
        assert smollm2.context_length == 8192 and smollm2.vocab_size == 49152
        assert smollm2.fingerprint == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        assert smollm2.dtype == torch.float32 and not smollm2.model.training

    def test_encode_uses_the_chat_template_unless_raw(self, smollm2):
        (chat,), (raw,) = smollm2.encode(["Hello"]), smollm2.encode(["Hello"], raw=True)
        text = smollm2.tokenizer.decode(chat)
        assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
        assert smollm2.tokenizer.decode(raw) == "Hello"

    def test_it_answers_and_stops(self, smollm2):
        (ids,) = smollm2.encode(["What is the capital of France?"])
        out = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
        assert "Paris" in smollm2.decode(out[len(ids) :])
        assert out[-1] in smollm2.eos_token_ids

    def test_prompt_past_the_context(self, smollm2):
        with pytest.raises(InputError, match=r"prompt 2 has \d+ tokens; smollm2 has a context of 8192"):
            smollm2.encode(["short", "word " * 9000])

    def test_two_loads_are_equal(self, smollm2):
        again = load("smollm2", dtype="float32")
        assert again.fingerprint == smollm2.fingerprint
        pairs = zip(smollm2.model.state_dict().items(), again.model.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        assert again.tokenizer.get_vocab() == smollm2.tokenizer.get_vocab()

    def test_pieces_of_characters_over_several_tokens(self, smollm2):
        text = "naïve 🦜🏳️‍🌈 ภาษาไทย 漢字"
        (ids,) = smollm2.encode([text], raw=True)
        pieces = smollm2.pieces(ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)
        assert "\ufffd" not in "".join(pieces) and "" in pieces

    @quick
    @given(text=st.text(min_size=1, max_size=60))
    def test_pieces_join_to_any_text(self, smollm2, text):
        ids = smollm2.tokenizer(text)["input_ids"]
        pieces = smollm2.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == smollm2.decode(ids)

    @quick
    @given(ids=st.lists(st.integers(0, 49151), max_size=40))
    def test_pieces_join_for_any_ids(self, smollm2, ids):
        pieces = smollm2.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == smollm2.decode(ids)


def test_encode_refuses_empty_prompts(stories):
    with pytest.raises(InputError, match="prompt 2 is empty"):
        stories.encode(["fine", ""], raw=True)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        stories.encode(["  \n"])


def test_a_prompt_just_below_the_context_fits(stories):
    words = " a" * 510  # one token each, after the bos
    assert len(stories.encode([words[1:]], raw=True)[0]) == 511
    with pytest.raises(InputError, match=r"512 tokens.*context of 512 \(at most 511"):
        stories.encode([words[1:] + " a"], raw=True)


def test_text_without_tokenizer():
    with pytest.raises(InputError, match="has no tokenizer"):
        tiny_lm().encode(["x"])


def test_pieces_of_nothing(stories):
    assert stories.pieces([]) == []


def test_special_tokens_have_no_text(stories):
    assert stories.pieces([1, 403, 2]) == ["", "Once", ""]
