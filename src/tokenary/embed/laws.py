"""The laws of transplants: what is shared is copied, what is new is a mixture, and the model stays a model."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tokenary.core.laws import (
    LawFunction,
    Make,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.token_map import TokenMap, check_token_map
from tokenary.embed.apply import save, transfer, vocabularies
from tokenary.embed.base import Transplant, copied, new_ids
from tokenary.hf.vocabulary import tables
from tokenary.models import LM, load, tiny_lm

TEXTS = ("the theatre and another", "an ant ate 1024", "ça va, नमस्ते\n\t x")
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}</s>{% endfor %}"
OLD = ("th", "the", " the", "an", " an", "and", "er", "at", "re", " a", " x", "ca", "va", "no", "ot", "other")
NEW = ("the", " the", "an", " another", "another", "and the", "theatre", "10", "1024", "ca", "cat", "ç", "न")


def toy_tokenizer(words: tuple[str, ...], special: tuple[str, ...]) -> Tokenizer:
    """Make a byte-level vocabulary of special tokens, the 256 bytes, and every prefix of some words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: i for i, piece in enumerate([*special, *sorted(alphabet)])}
    merges = []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words:
        piece = byte_level.pre_tokenize_str(word)[0][0]
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = byte_level, decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def toy(padding: int = 0, tied: bool = True, family: str = "llama") -> LM:
    """Make a random net with a tokenizer that begins every text with <s>, and rows that no token has."""
    made = toy_tokenizer(OLD, ("<s>", "</s>", "<|turn|>"))
    made.post_processor = TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    lm = tiny_lm(vocab=made.get_vocab_size() + padding, family=family)
    model: Any = lm.model
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    if not tied:
        model.config.tie_word_embeddings = False
        noise = torch.randn(tables(model)[0].shape, generator=torch.Generator().manual_seed(1))
        model.lm_head.weight = torch.nn.Parameter(0.3 * noise)
    return LM(lm.name, model, tokenizer, lm.fingerprint, lm.source)


def toy_target() -> Tokenizer:
    """Make another vocabulary, with an end token of its own beside one that has the old one's name."""
    return toy_tokenizer(NEW, ("<|end|>", "</s>"))


def built(make: Make) -> Transplant:
    """Construct the method as it can be on a toy net."""
    return make(**make().toy_options)


def new_rows(method: Transplant, lm: LM) -> tuple[TokenMap, Tensor, Tensor, list[int]]:
    """Transplant a toy: the map, the old rows, the new rows, and the ids that are copies of nothing."""
    source, target, _ = vocabularies(lm, toy_target())
    rows = tables(lm.model)[0].detach()
    mapped = method.vocab_map(source, target, rows)
    return mapped, rows, mapped.apply(rows), new_ids(target, copied(source, target))


def logits(lm: LM, text: str) -> Tensor:
    """Logits (N, V) of a text, its own special tokens around it."""
    with torch.inference_mode():
        return lm.model(torch.tensor(lm.encode([text], raw=True))).logits[0]


def the_same_tokenizer_changes_nothing(make: Make) -> None:
    """With its own tokenizer a model keeps its table, its ids and its logits, padded rows included."""
    for padding in (0, 7):
        lm = toy(padding)
        assert lm.tokenizer is not None
        source, target, _ = vocabularies(lm, lm.tokenizer, len(tables(lm.model)[0]))
        mapped = built(make).vocab_map(source, target, tables(lm.model)[0])
        require(mapped.is_identity, f"{padding} padded rows: {mapped!r} is not the identity")
        moved = transfer(lm, lm.tokenizer, built(make), len(tables(lm.model)[0]))
        for text in TEXTS:
            require(lm.encode([text], raw=True) == moved.encode([text], raw=True), f"{text!r}: other ids")
            require(torch.equal(logits(lm, text), logits(moved, text)), f"{text!r}: other logits")


def shared_tokens_are_copied(make: Make) -> None:
    """The row of a token that both vocabularies spell alike is the old row, to the last bit."""
    lm = toy()
    source, target, _ = vocabularies(lm, toy_target())
    _, rows, made, _ = new_rows(built(make), lm)
    shared = {data: source.id_of[data] for data in target.spellings if data in source.id_of}
    require(len(shared) > 256, "the toys share only bytes")
    for data, old in shared.items():
        require(torch.equal(made[target.id_of[data]], rows[old]), f"the row of {data!r} is not the old one")


def special_tokens_are_kept(make: Make) -> None:
    """Every special token of the model has its row, its role and its place around a text; its ids are configured."""
    lm = toy()
    moved = transfer(lm, toy_target(), built(make))
    old, new = lm.tokenizer, moved.tokenizer
    assert old is not None and new is not None
    before, after = tables(lm.model)[0], tables(moved.model)[0]
    for token in ("<s>", "</s>", "<|turn|>"):
        there, here = old.convert_tokens_to_ids(token), new.convert_tokens_to_ids(token)
        require(torch.equal(after[here], before[there]), f"{token}: another row")
    require(new.special_tokens_map == old.special_tokens_map, f"roles {new.special_tokens_map}")
    require(moved.eos_token_ids == (new.eos_token_id,), f"ends with {moved.eos_token_ids}")
    require(moved.encode(["an"], raw=True)[0][0] == new.bos_token_id, "a text does not begin with <s>")
    (ids,) = moved.encode(["an ant"])
    said = str(new.decode(ids, skip_special_tokens=False))
    turns = [i for i in ids if i == new.convert_tokens_to_ids("<|turn|>")]
    require(len(turns) == 1 and "an ant</s>" in said, f"a chat reads {said!r}")


def the_map_is_lawful(make: Make) -> None:
    """The map has one row a new token and one column an old one, keeps the laws of maps, and is finite."""
    lm = toy()
    mapped, rows, made, _ = new_rows(built(make), lm)
    wanted = (vocabularies(lm, toy_target())[1].rows, len(rows))
    require(tuple(mapped.shape) == wanted, f"a map of shape {tuple(mapped.shape)} instead of {wanted}")
    broken = next(iter(check_token_map(mapped)), None)
    require(broken is None, str(broken))
    require(torch.isfinite(made).all(), "a row is not finite")
    empty = (mapped.sizes() == 0).nonzero().flatten().tolist()
    require(not empty, f"rows {empty[:5]} are made of nothing")


def new_rows_have_an_ordinary_length(make: Make) -> None:
    """A new row is not zero, and not longer than twice the longest old one."""
    _, rows, made, fresh = new_rows(built(make), toy())
    lengths, most = made[fresh].norm(dim=-1), rows.norm(dim=-1).max()
    require(len(fresh) > 5, "the toys have no new tokens")
    require(bool((lengths > 0).all()), "a new row is zero")
    require(bool((lengths <= 2 * most).all()), f"a new row has length {lengths.max():.2f}, the longest old {most:.2f}")


def it_is_made_the_same_again(make: Make) -> None:
    """A fresh instance makes the same map, and neither the table nor the tokenizers are touched."""
    lm = toy()
    before = tables(lm.model)[0].detach().clone()
    first, second = (new_rows(built(make), lm)[2] for _ in range(2))
    require(torch.equal(first, second), "another map the second time")
    require(torch.equal(tables(lm.model)[0], before), "the old table is changed")


def tied_stays_tied(make: Make) -> None:
    """A tied head stays tied, an untied one is mapped too, and the rest of the model is shared with the old one."""
    for family, tied in (("llama", True), ("llama", False), ("gpt2", True), ("gemma3", True)):
        lm = toy(tied=tied, family=family)
        kept = copy.deepcopy(lm.model.state_dict())
        moved = transfer(lm, toy_target(), built(make))
        inputs, head = tables(moved.model)
        require((head is None) == tied, f"{family}: tied={tied} became {head is None}")
        wide = moved.vocab_size == len(inputs) == logits(moved, TEXTS[0]).shape[-1]
        require(wide, f"{family}: {moved.vocab_size} logits, {len(inputs)} rows")
        if head is not None:
            assert lm.tokenizer is not None and moved.tokenizer is not None
            old = tables(lm.model)[1]
            there, here = (t.convert_tokens_to_ids("</s>") for t in (lm.tokenizer, moved.tokenizer))
            require(old is not None and torch.equal(head[here], old[there]), "a special token's head row is another")
        same = all(torch.equal(value, kept[name]) for name, value in lm.model.state_dict().items())
        require(same, f"{family}: the old model is changed")


def a_saved_model_is_the_same(make: Make) -> None:
    """Saved and loaded as a transformers folder, it encodes, predicts and chats as before."""
    moved = transfer(toy(), toy_target(), built(make), multiple=8)
    with tempfile.TemporaryDirectory() as folder:
        save(moved, Path(folder) / "model")
        again = load(Path(folder) / "model", dtype="float32")
    require(again.vocab_size % 8 == 0, f"{again.vocab_size} rows are no multiple of 8")
    same_tokens(again.encode(TEXTS), moved.encode(TEXTS), "chats")
    same_tokens(again.encode(TEXTS, raw=True), moved.encode(TEXTS, raw=True), "texts")
    for text in TEXTS:
        require(torch.equal(logits(again, text), logits(moved, text)), f"{text!r}: other logits")
        (ids,) = again.encode([text], raw=True)
        require(again.decode(ids) == text, f"{text!r} comes back as {again.decode(ids)!r}")
    require(again.eos_token_ids == moved.eos_token_ids, "it ends otherwise")


LAWS: dict[str, tuple[LawFunction, ...]] = {
    "vocabulary": (
        options_are_checked_and_fixed,
        the_recipe_survives_json,
        the_same_tokenizer_changes_nothing,
        shared_tokens_are_copied,
        special_tokens_are_kept,
        the_map_is_lawful,
        new_rows_have_an_ordinary_length,
        it_is_made_the_same_again,
        tied_stays_tied,
        a_saved_model_is_the_same,
    )
}
