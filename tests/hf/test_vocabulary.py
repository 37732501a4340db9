"""What the door to vocabularies relies on in transformers, and what it promises."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.token_map import Select, TokenMap
from tokenary.embed.laws import toy, toy_target, toy_tokenizer
from tokenary.hf.vocabulary import adopt_roles, on_vocabulary, rename_ids, roles, rust_tokenizer, tables
from tokenary.models.tiny import FAMILIES, tiny_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resized_model_shares_what_is_no_table(family):
    model = tiny_lm(family=family).model
    half = Select(torch.arange(0, 97, 2), 97)
    small = on_vocabulary(model, half, half)
    assert small.config.vocab_size == 49 and model.config.vocab_size == 97
    assert torch.equal(tables(small)[0], tables(model)[0][::2]) and tables(small)[1] is None
    own, old = dict(small.named_parameters()), dict(model.named_parameters())
    assert [n for n in own if own[n].data_ptr() != old[n].data_ptr()] == [
        n for n in own if n.endswith(("embed_tokens.weight", "wte.weight"))
    ]
    ids = torch.tensor([[3, 1, 40]])
    with torch.inference_mode():
        assert torch.equal(small(ids).logits, model(2 * ids).logits[..., ::2])


def test_equal_size_writes_nothing_into_the_old_model():
    model = tiny_lm().model
    before = tables(model)[0].detach().clone()
    turned = Select(torch.arange(96, -1, -1), 97)
    made = on_vocabulary(model, turned, turned)
    assert torch.equal(tables(model)[0], before) and torch.equal(tables(made)[0], before.flip(0))


def test_a_head_of_its_own_and_a_bias_are_mapped():
    lm = toy(tied=False)
    model = lm.model
    rows = len(tables(model)[0])
    model.lm_head.bias = torch.nn.Parameter(torch.arange(float(rows)))
    flip = Select(torch.arange(rows - 1, -1, -1), rows)
    made = on_vocabulary(model, TokenMap.identity(rows), flip)
    assert torch.equal(tables(made)[0], tables(model)[0])
    assert torch.equal(tables(made)[1], tables(model)[1].flip(0))
    assert torch.equal(made.lm_head.bias, model.lm_head.bias.flip(0))


def test_a_model_without_a_head():
    with pytest.raises(UnsupportedModelError, match="head"):
        tables(tiny_lm().model.model)


def test_roles_template_and_frame_are_the_models(tmp_path):
    source, target = toy().tokenizer, toy_target()
    made = adopt_roles(target, source)
    assert roles(made) == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert len(made) == target.get_vocab_size() + 2  # <s> and <|turn|>; </s> is there
    bare = made.encode("an", add_special_tokens=False)
    assert made.encode("an") == [made.bos_token_id, *bare] and made.bos_token_id not in bare
    chat = [{"role": "user", "content": "an ant"}]
    said = [t.apply_chat_template(chat, tokenize=False) for t in (source, made)]
    assert said[0] == said[1]
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("an</s> ate") == made.encode("an</s> ate") and roles(again) == roles(made)
    assert again.apply_chat_template(chat, tokenize=False) == said[0]


def test_a_plain_piece_with_the_name_of_a_special_token_becomes_special():
    target = toy_tokenizer(("an",), ())
    target.add_tokens([AddedToken("</s>", special=False)])
    made = adopt_roles(target, toy().tokenizer)
    assert rust_tokenizer(made).get_added_tokens_decoder()[made.eos_token_id].special


def test_spare_special_tokens_stay_behind():
    source = toy().tokenizer
    source.add_tokens([AddedToken("<unused7>", special=True), AddedToken("<tool>", special=True)], special_tokens=True)
    made = adopt_roles(toy_target(), source)
    assert "<tool>" in made.get_vocab() and "<unused7>" not in made.get_vocab()


def test_ids_of_the_configuration_follow():
    model = tiny_lm().model
    model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = 5, 6, 0
    model.generation_config.eos_token_id = [5, 7]
    rename_ids(model, {5: 50, 6: 60})
    config, generation = model.config, model.generation_config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (50, 60, None)
    assert generation.eos_token_id == [50]


def test_a_tokenizer_without_a_file():
    with pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        rust_tokenizer(object())
