"""Vocabularies, the protocol of transplants, and each method against its slow and obvious formulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import tokenary.embed
from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.laws import check_class
from tokenary.core.token_map import Select, Sparse
from tokenary.embed import OMP, Focus, MeanOfPieces, RandomRows, TokenAdapt
from tokenary.embed import laws as room
from tokenary.embed.apply import load_target, save, transfer, vocabularies
from tokenary.embed.base import Mixture, assemble, copied, pieces_of
from tokenary.embed.focus import sparsemax
from tokenary.embed.laws import toy, toy_target, toy_tokenizer
from tokenary.embed.nearest import shared_ids
from tokenary.embed.omp import pursue
from tokenary.embed.strings import encode_strings
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import tables


def sentencepiece(words):
    """A Unigram with ▁ and byte fallback."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((word, -1.0) for word in words)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


@pytest.fixture(scope="module")
def pair():
    """Old and new vocabulary of the toys, the old rows, and the ids that are new."""
    lm = toy()
    source, target, _ = vocabularies(lm, toy_target())
    new = [i for i, old in enumerate(copied(source, target).tolist()) if old < 0]
    return source, target, tables(lm.model)[0].detach(), new


def weights(mixture, count, size):
    """A mixture as a matrix."""
    made = torch.zeros(count, size)
    return made.index_put((mixture.owner, mixture.index), mixture.weight.float(), accumulate=True)


# ------------------------------------------------------------------------------------------------ vocabularies


def test_a_token_is_its_bytes_however_it_is_written():
    byte_level = Vocabulary(toy_tokenizer((" the", "ç"), ("</s>",)))
    pieces = Vocabulary(sentencepiece(["▁the", "ç", "a", "▁"]))
    assert byte_level.spellings[byte_level.tokenizer.token_to_id("Ġthe")] == b" the"
    assert pieces.spellings[pieces.tokenizer.token_to_id("▁the")] == b" the"
    assert pieces.spellings[pieces.tokenizer.token_to_id("<0x0A>")] == b"\n"
    assert pieces.id_of[b"a"] == pieces.tokenizer.token_to_id("a")  # not the byte fallback <0x61>
    shared = {pieces.spellings[i] for i in shared_ids(pieces, byte_level)}
    assert {b" the", "ç".encode(), b"\xe3"} <= shared
    assert byte_level.special == {0: "</s>"} and byte_level.spellings[0] == b""


def test_pieces_spell_the_token():
    both = toy_tokenizer((" the", "an"), ()), sentencepiece(["▁the", "an", "▁", "e"])
    for vocabulary in map(Vocabulary, both):
        for data in (b" the an", "नç\n".encode(), b"\xe0\xa4", b"\xff"):
            cut = vocabulary.pieces(data)
            assert b"".join(vocabulary.spellings[i] for i in cut) == data
    assert vocabulary.pieces(b"") == []
    assert vocabulary.text(vocabulary.id_of[b"\xe0"]) is None and vocabulary.text(0) == "<unk>"


def test_what_the_old_vocabulary_cannot_write_is_missing():
    only = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    assert Vocabulary(only).pieces(b"axb") == [0, 1]


# ---------------------------------------------------------------------------------------------------- protocol


def test_special_tokens_are_copied_by_name_and_by_role():
    source = Vocabulary(toy_tokenizer(("an",), ("<s>", "</s>")), {"eos_token": "</s>"})
    target = Vocabulary(toy_tokenizer(("an",), ("<|end|>", "<s>", "<new>")), {"eos_token": "<|end|>"})
    assert copied(source, target)[:3].tolist() == [1, 0, -1]


def test_a_tokenizer_that_says_its_roles_keeps_them_apart():
    """The end token of the new tokenizer gets the row of the old one's, whose own name is kept too."""
    lm, made = toy(), toy_tokenizer(("an",), ("<|end|>",))
    moved = transfer(lm, PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>"), MeanOfPieces())
    rows, old = tables(moved.model)[0], tables(lm.model)[0][lm.tokenizer.eos_token_id]
    assert moved.tokenizer.eos_token == "</s>"
    assert torch.equal(rows[moved.tokenizer.convert_tokens_to_ids("<|end|>")], old)
    assert torch.equal(rows[moved.tokenizer.eos_token_id], old)


def test_spare_rows_are_filled():
    made = toy_tokenizer(("an",), ())
    padded, plain = Vocabulary(made, rows=260), Vocabulary(made)
    wide = Vocabulary(made, rows=264)
    assert copied(padded, wide)[257:].tolist() == [257, 258, 259, 257, 258, 259, 257]
    rows = torch.randn(257, 4)
    found = MeanOfPieces().vocab_map(plain, wide, rows).apply(rows)
    sample = rows[torch.from_numpy(np.linspace(0, 256, 64).astype(int))].mean(0)
    assert torch.equal(found[:257], rows) and torch.allclose(found[257:], sample.expand(7, 4), atol=1e-6)
    with pytest.raises(InputError, match="260"):
        MeanOfPieces().vocab_map(padded, wide, rows)


def test_copies_stay_a_selection():
    assert isinstance(assemble(np.array([2, 0]), np.array([], int), Mixture.of([]), 3), Select)
    assert assemble(np.arange(3), np.array([], int), Mixture.of([]), 3).is_identity
    mixed = assemble(np.array([2, -1]), np.array([1]), Mixture.of([[0, 0, 1]]), 3)
    assert isinstance(mixed, Sparse)
    assert torch.allclose(mixed.dense(), torch.tensor([[0, 0, 1], [2 / 3, 1 / 3, 0]]))


class Broken(MeanOfPieces):
    """Base of transplants that are wrong on purpose; they stand beside a card that is not theirs."""

    @classmethod
    def card_of(cls):
        return MeanOfPieces.card_of()


class Moody(Broken):
    def mix(self, source, target, new, rows):
        return Mixture(torch.arange(len(new)), torch.randint(0, source.size, (len(new),)), torch.ones(len(new)))


class Loud(Broken):
    def mix(self, source, target, new, rows):
        return super().mix(source, target, new, rows).scaled(torch.full((len(new),), 9.0))


class Silent(Broken):
    def mix(self, source, target, new, rows):
        return super().mix(source, target, new, rows).scaled(torch.zeros(len(new)))


class Mixes(Broken):
    """Means even of what is shared."""

    def vocab_map(self, source, target, rows):
        parts = pieces_of(source, target, range(target.size))
        return assemble(np.full(target.rows, -1), np.arange(target.size), Mixture.of([p[:1] for p in parts]), len(rows))


class Forgets(Broken):
    """Gives special tokens the rows of their texts."""

    def vocab_map(self, source, target, rows):
        bare = Vocabulary(source.tokenizer, {}, source.rows)
        bare.special = {}
        return super().vocab_map(bare, target, rows)


class Writes(Broken):
    def mix(self, source, target, new, rows):
        with torch.no_grad():
            rows[3] += 1
        return super().mix(source, target, new, rows)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Moody, "it is made the same again"),
        (Loud, "new rows have an ordinary length"),
        (Silent, "new rows have an ordinary length"),
        (Silent, "the map is lawful"),
        (Mixes, "shared tokens are copied"),
        (Mixes, "the same tokenizer changes nothing"),
        (Forgets, "special tokens are kept"),
        (Writes, "it is made the same again"),
    ],
)
def test_the_laws_catch_it(wrong, law):
    stated = next(one for one in room.LAWS["vocabulary"] if one.__name__ == law.replace(" ", "_"))
    assert check_class(wrong, (stated,)).broken
    assert not check_class(MeanOfPieces, (stated,)).broken


def test_the_room_names_its_methods():
    assert tokenary.embed.TokenAdapt is TokenAdapt and tokenary.embed.transfer is transfer
    with pytest.raises(AttributeError):
        _ = tokenary.embed.NoSuchMethod


# ----------------------------------------------------------------------------------------------------- methods


def test_mean_of_pieces(pair):
    source, target, rows, new = pair
    made = MeanOfPieces().vocab_map(source, target, rows).apply(rows)
    for i in new:
        text = target.spellings[i] or target.special[i].encode()
        parts = source.pieces(text)
        assert len(parts) > 1 and torch.allclose(made[i], rows[parts].mean(0), atol=1e-6)


def test_random_rows_are_old_rows(pair):
    source, target, rows, new = pair
    made = RandomRows().vocab_map(source, target, rows).apply(rows)
    assert all((made[i] == rows).all(-1).any() for i in new)
    other = RandomRows(seed=1).vocab_map(source, target, rows).apply(rows)
    assert not torch.equal(made, other)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    torch.manual_seed(0)
    for scores in (torch.randn(50, 7), torch.zeros(1, 5), torch.tensor([[9.0, 0.0, 0.0]])):
        scores = scores.sort(-1, descending=True).values
        found = sparsemax(scores)
        assert torch.allclose(found.sum(-1), torch.ones(len(scores)), atol=1e-5) and (found >= 0).all()
        gap = scores - found  # optimal: equal on the support, not larger elsewhere
        level = torch.where(found > 0, gap, -torch.inf).amax(-1, keepdim=True)
        assert torch.allclose(torch.where(found > 0, gap, level), level.expand_as(gap), atol=1e-5)
        assert (torch.where(found > 0, -torch.inf, gap) <= level + 1e-5).all()


def test_focus_mixes_shared_tokens(pair):
    source, target, rows, new = pair
    shared = [i for i in shared_ids(source, target) if source.text(i)]
    keys = encode_strings("characters", [source.text(i) for i in shared])
    found = weights(Focus().mix(source, target, new, rows), len(new), len(rows))
    for n, i in enumerate(new):
        text = target.text(i) or target.special.get(i)
        likeness = (encode_strings("characters", [text]) @ keys.T)[0] if text else torch.zeros(1)
        expected = torch.zeros(len(rows))
        if likeness.max() > 0:
            order = likeness.argsort(descending=True)
            expected[torch.tensor(shared)[order]] = sparsemax(likeness[order])
        else:
            for part in pieces_of(source, target, [i])[0]:
                expected[part] += 1 / len(pieces_of(source, target, [i])[0])
        assert torch.allclose(found[n], expected, atol=1e-5), text


def test_orthogonal_matching_pursuit_is_the_slow_one():
    torch.manual_seed(0)
    atoms, queries = torch.randn(40, 12) * torch.rand(40, 1), torch.randn(30, 12)
    index, weight = pursue(queries, atoms, 5)
    for query, chosen, found in zip(queries, index, weight, strict=True):
        kept, left = [], query
        for _ in range(5):
            likeness = (atoms @ left / atoms.norm(dim=-1)).abs()
            likeness[kept] = -1
            kept.append(int(likeness.argmax()))
            solved = torch.linalg.lstsq(atoms[kept].T, query[:, None]).solution[:, 0]
            left = query - solved @ atoms[kept]
        assert chosen.tolist() == kept
        assert torch.allclose(found, solved, atol=1e-3)


def test_pursuit_ends_at_an_exact_solution():
    atoms = torch.eye(4)
    index, weight = pursue(torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0], [0.0] * 4]), atoms, 3)
    found = torch.zeros(3, 4).scatter_add(1, index, weight)
    assert torch.allclose(found, torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0], [0.0] * 4]))


def test_a_donor_carries_its_coefficients_over(tmp_path):
    """Where the model's space is the donor's, turned, the new rows are the donor's, turned, as far as k atoms reach."""
    old, to = toy(), toy_target()
    donor = transfer(old, to, MeanOfPieces())
    save(donor, tmp_path / "donor")
    source, target, _ = vocabularies(old, donor.tokenizer)
    rows = tables(old.model)[0].detach()
    made = OMP(k=32, donor=str(tmp_path / "donor")).vocab_map(source, target, rows).apply(rows)
    wanted = tables(donor.model)[0].detach()
    new = [i for i in np.flatnonzero(copied(source, target) < 0) if target.spellings[i]]
    assert len(new) > 5 and torch.allclose(made[new], wanted[new], atol=1e-3)
    with pytest.raises(InputError, match="lacks"):
        save(old, tmp_path / "other")
        OMP(donor=str(tmp_path / "other")).vocab_map(source, target, rows)


def slow_tokenadapt(source, target, i, weight=0.3, temperature=0.3, k=3, threshold=0.0):
    """The formulas of the paper, one token, as a dictionary of weights; None where the k nearest are not unique."""
    text, parts = target.text(i) or target.special.get(i), pieces_of(source, target, [i])[0]
    found: dict[int, float] = {}
    if text is None:  # a part of a character: length alone
        length = np.array([len(source.text(p) or source.spellings[p]) for p in parts], float)
        score = (np.ones(len(parts)) / len(parts) + length / length.sum()) / 2
        share = np.exp(score / temperature) / np.exp(score / temperature).sum()
        for part, value in zip(parts, share, strict=True):
            found[part] = found.get(part, 0) + value
        return found
    (query,) = encode_strings("characters", [text])
    parts = [p for p in parts if source.text(p)] or parts
    near = [i for i in range(source.size) if source.text(i)]
    keys = encode_strings("characters", [source.text(i) for i in near])
    likeness = np.array([float(query @ keys[near.index(p)]) if p in near else 0.0 for p in parts])
    u = np.exp(likeness) / np.exp(likeness).sum()
    lengths = np.array([len(source.text(p) or source.spellings[p]) for p in parts], float)
    score = (u + lengths / lengths.sum()) / 2
    local = np.exp(score / temperature) / np.exp(score / temperature).sum()
    value, place = (keys @ query).topk(k + 1)
    if value[k - 1] - value[k] < 1e-5:
        return None
    value, place = value[:k], place[:k]
    share = torch.softmax(value / temperature, -1) * (value >= threshold)
    some = float(share.sum()) > 0
    for part, one in zip(parts, local, strict=True):
        found[part] = found.get(part, 0) + one * ((1 - weight) if some else 1)
    for one, p in zip((share / share.sum()).tolist() if some else [], place.tolist(), strict=False):
        found[near[p]] = found.get(near[p], 0) + weight * one
    return found


@pytest.mark.parametrize(
    "options", [{}, {"weight": 0.0}, {"weight": 1.0, "k": 5}, {"temperature": 1.0, "threshold": 0.6}]
)
def test_tokenadapt_follows_its_formulas(pair, options):
    source, target, rows, new = pair
    mixture = TokenAdapt(encoder="characters", **options).mix(source, target, new, rows)
    found = weights(mixture, len(new), len(rows))
    assert any(target.text(i) is None and i not in target.special for i in new)  # parts of characters are among them
    compared = 0
    for n, i in enumerate(new):
        wanted = slow_tokenadapt(source, target, i, **options)
        if wanted is None:
            continue
        expected = torch.zeros(len(rows))
        for part, value in wanted.items():
            expected[part] = value
        assert torch.allclose(found[n], expected, atol=1e-4), target.spellings[i]
        compared += 1
    assert compared > len(new) / 2


def test_rescaled_rows_are_as_long_as_their_parts(pair):
    source, target, rows, new = pair
    plain = weights(TokenAdapt(encoder="characters").mix(source, target, new, rows), len(new), len(rows))
    longer = weights(TokenAdapt(encoder="characters", rescale=True).mix(source, target, new, rows), len(new), len(rows))
    wanted = plain @ rows.norm(dim=-1)
    assert torch.allclose((longer @ rows).norm(dim=-1), wanted, rtol=1e-4)
    assert ((plain @ rows).norm(dim=-1) < wanted).all()


def test_options_out_of_range():
    for wrong in ({"weight": 1.5}, {"temperature": 0}, {"k": 0}, {"encoder": "no such"}):
        with pytest.raises(OptionError):
            TokenAdapt(**wrong)


# ----------------------------------------------------------------------------------------------------- folders


def test_a_model_moves_there_and_back():
    """Where nothing is new, the way back restores the table."""
    lm = toy()
    there = transfer(lm, toy_tokenizer(room.OLD[:6], ("</s>",)), MeanOfPieces())
    back = transfer(there, lm.tokenizer, MeanOfPieces())
    old, new = tables(lm.model)[0], tables(back.model)[0]
    kept = [i for i in range(len(old)) if lm.tokenizer.convert_ids_to_tokens(i) in there.tokenizer.get_vocab()]
    assert len(kept) > 259 and torch.equal(old[kept], new[kept])


def test_a_padded_table():
    lm = toy()
    assert transfer(lm, toy_target(), MeanOfPieces(), multiple=64).vocab_size % 64 == 0


def test_what_cannot_be_moved_or_saved(tmp_path):
    lm = toy()
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match="not an empty folder"):
        save(lm, tmp_path)
    with pytest.raises(InputError, match="that can be read"):
        load_target(tmp_path)
    lm.model.lm_head = torch.nn.Linear(32, 5)
    with pytest.raises(UnsupportedModelError, match="different shape"):
        transfer(lm, toy_target(), MeanOfPieces())
    lm.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        transfer(lm, toy_target(), MeanOfPieces())
