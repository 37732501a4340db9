"""The hypernetwork, what it is trained on, and the map that its predictions become."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.embed import ZeTT
from tokenary.embed.apply import vocabularies
from tokenary.embed.base import copied, pieces_of
from tokenary.embed.laws import toy, toy_target, toy_tokenizer
from tokenary.embed.zett import WEIGHTS, load_network, pivots, predict
from tokenary.embed.zett.net import LENGTH, Hypernetwork, surface
from tokenary.embed.zett.training import (
    RowExamples,
    TextExamples,
    TokenizerSampler,
    cosines,
    descend,
    fresh,
    row_loss,
    train_on_rows,
)
from tokenary.hf.tokenizer import Vocabulary
from tokenary.hf.vocabulary import tables

TEXT = "the theatre and another ant ate another cat in the theatre\nwhile the other ant ran at the cat and the rat\n"


@pytest.fixture(scope="module")
def pair():
    lm = toy()
    source, target, _ = vocabularies(lm, toy_target())
    return lm, source, target, tables(lm.model)[0].detach()


def test_an_untrained_network_gives_the_mean_of_the_pieces():
    rows = torch.randn(50, 12)
    net = Hypernetwork(rows, 64, 2).eval()
    parts = [[3], [4, 9], [1, 1, 7], list(range(LENGTH + 3))]
    for row, part in zip(predict(net, rows, parts), parts, strict=True):
        assert torch.allclose(row, rows[part[:LENGTH]].mean(0), atol=1e-5)


def test_padding_changes_no_prediction():
    rows = torch.randn(50, 12)
    net = Hypernetwork(rows, 64, 2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    together = predict(net, rows, [[4, 9], list(range(7))])
    assert torch.allclose(together[:1], predict(net, rows, [[4, 9]]), atol=1e-5)
    assert surface([[1, 2], list(range(9))])[0].shape == (2, LENGTH)
    assert predict(net, rows, []).shape == (0, 12)


def test_the_map_gives_the_predictions(pair):
    _, source, target, rows = pair
    method = ZeTT(steps=4)
    made = method.vocab_map(source, target, rows).apply(rows)
    new = [i for i, old in enumerate(copied(source, target).tolist()) if old < 0]
    wanted = predict(train_on_rows(source, rows, 4), rows, pieces_of(source, target, new))
    assert torch.allclose(made[new], wanted, atol=1e-4)
    assert not torch.allclose(ZeTT(steps=4, seed=1).vocab_map(source, target, rows).apply(rows)[new], wanted, atol=1e-4)


def test_pivots_span_the_space():
    torch.manual_seed(0)
    rows = torch.randn(300, 16)
    rows[:200] = rows[0] * torch.rand(200, 1)  # most of them say the same
    basis = pivots(rows, list(range(300)))
    assert len(set(basis.tolist())) == 16 and torch.linalg.cond(rows[basis]) < 100
    with pytest.raises(UnsupportedModelError, match="span 1 of 16"):
        pivots(rows[:200], list(range(200)))


def test_another_model_needs_another_network(pair, tmp_path):
    _, source, target, rows = pair
    with pytest.raises(InputError, match="no hypernetwork"):
        ZeTT(weights=str(tmp_path)).vocab_map(source, target, rows)
    net = train_on_rows(source, rows, 2)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "width": 64, "layers": 3}))
    method = ZeTT(weights=str(tmp_path))
    made = method.vocab_map(source, target, rows).apply(rows)
    assert torch.allclose(made, ZeTT(steps=2).vocab_map(source, target, rows).apply(rows), atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="another model"):
        method.vocab_map(source, target, torch.randn_like(rows))


def test_a_cut_spells_its_token(pair):
    _, source, _, rows = pair
    examples = RowExamples(source, sorted(source.id_of.values()))
    stream = np.random.default_rng(0)
    assert len(examples.ids) >= 20
    for i in examples.ids:
        cuts = {tuple(examples.cut(int(i), stream)) for _ in range(20)}
        for cut in cuts:
            assert 2 <= len(cut) <= LENGTH
            assert b"".join(source.spellings[part] for part in cut) == source.spellings[i]
    with pytest.raises(UnsupportedModelError, match="nothing to learn"):
        train_on_rows(Vocabulary(toy_tokenizer((), ())), rows[:256], 1)


def test_rows_that_follow_a_rule_are_learned(pair):
    """Rows that are a fixed map of their parts: the network beats their mean on tokens that it never saw."""
    _, source, _, _ = pair
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32))[0]
    rows = torch.randn(source.size, 32)
    whole = RowExamples(source, sorted(source.id_of.values()))
    for i in whole.ids:  # left to right: parts come before what they make
        left, right = whole._halves[int(i)][0]
        rows[i] = (rows[left] - rows[right]) @ turn
    unseen = RowExamples(source, whole.ids[::4].tolist())
    seen = RowExamples(source, sorted(set(whole.ids.tolist()) - set(unseen.ids.tolist())))
    net, optimizer = fresh(rows, 0, width=64, layers=1)
    stream = np.random.default_rng(0)
    batch = seen.batch(64, stream)
    before = row_loss(net, rows, batch).item()
    for _ in range(60):
        descend(net, optimizer, row_loss(net, rows, seen.batch(64, stream)))
    assert row_loss(net, rows, batch).item() < 0.7 * before
    predicted, mean = cosines(net, rows, seen.batch(64, stream))
    assert predicted > mean + 0.2


def test_every_step_samples_another_tokenizer():
    texts = itertools.repeat(TEXT * 3)
    sampler = TokenizerSampler(texts, size=60, seed=0)
    drawn = [sampler.draw() for _ in range(6)]
    vocabularies_ = [frozenset(tokenizer.get_vocab()) for tokenizer in drawn]
    assert len(set(vocabularies_)) > 3
    again = TokenizerSampler(itertools.repeat(TEXT * 3), size=60, seed=0)
    assert [frozenset(again.draw().get_vocab()) for _ in range(6)] == vocabularies_
    for number, tokenizer in enumerate(drawn):
        pieces = tokenizer.encode(TEXT).tokens
        assert "".join(pieces) == TEXT.replace(" ", "Ġ").replace("\n", "Ċ")
        across = any("Ġ" in piece.lstrip("Ġ") for piece in vocabularies_[number])
        assert across == bool(number % 2)


def test_the_loss_on_text_reaches_the_network(pair):
    lm, source, _, rows = pair
    lm.model.requires_grad_(False)
    sampler = TokenizerSampler(itertools.repeat(TEXT * 3), size=80, seed=1)
    reader = TextExamples(lm.model, source, rows, sampler, itertools.repeat(TEXT))
    net, optimizer = fresh(rows, 0, width=64, layers=1)
    stream = np.random.default_rng(0)
    losses = []
    for _ in range(12):
        loss = reader.loss(net, 4, 8, 16, stream)
        descend(net, optimizer, loss)
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.out[1].weight.abs().sum() > 0 and all(p.grad is None for p in lm.model.parameters())


def test_the_network_that_ships():
    assert (WEIGHTS / "model.safetensors").stat().st_size < 6_000_000
    report = json.loads((WEIGHTS / "report.json").read_text())
    assert report["cosine_of_unseen_rows"] > report["cosine_of_the_mean_of_pieces"]
    net = load_network(WEIGHTS)
    assert net.mean.shape == (576,) and all(torch.isfinite(p).all() for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == report["parameters"]
