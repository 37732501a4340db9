"""FASA against the obvious formulation, and its calibration."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig

from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.core.laws import check_class
from tokenary.core.tree import TokenTree
from tokenary.hf.rotation import rotation_of
from tokenary.hf.target import Target, attached
from tokenary.memory.fasa import FASA, union_of
from tokenary.memory.fasa.calibration import agreement_of, read, write
from tokenary.memory.fasa.chunks import Agreement, agreements, dominant, measure_agreement, pairs_of
from tokenary.memory.keyformer import Keyformer
from tokenary.memory.read_base import Seen
from tokenary.memory.read_laws import READ_LAWS
from tokenary.models import tiny_lm

TEXT = [(11 * i * i + 3 * i) % 97 for i in range(70)]


@pytest.mark.parametrize(
    "options", [{}, {"sets": "group", "dense": 0}, {"pairs": "adjacent", "chunks": 0.5}, {"chunks": 1}], ids=str
)
def test_it_keeps_the_laws_of_reading(options):
    report = check_class(FASA, READ_LAWS, **options)
    assert report.ok, str(report)


def calibrated(lm, tmp_path, agreement, pairs="rotation"):
    path = tmp_path / "agreement.json"
    write(path, lm.model, pairs, agreement)
    return str(path)


@pytest.mark.parametrize("pairs", ["rotation", "adjacent"])
@pytest.mark.parametrize("sets", ["head", "group"])
def test_it_reads_what_its_dominant_pairs_rank_highest(pairs, sets, tmp_path):
    lm = tiny_lm(seed=2, layers=2)
    mean = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    policy = FASA(
        read=7, chunks=0.5, pairs=pairs, sets=sets, calibration=calibrated(lm, tmp_path, Agreement((8,), mean), pairs)
    )
    policy.prepare(lm.model)
    target = Target(lm.model, readers=policy.attach(lm.model.config))
    assert target.cache.token_layers[0].reader is None  # the first layer stays dense
    layer, caught = target.cache.token_layers[1], {}
    choose = layer.reader.choose
    layer.reader.choose = lambda *given: caught.update(given=given, chosen=choose(*given)) or caught["chosen"]
    with attached(lm.model):
        target.prefill([TEXT])
        target.score(TokenTree.roots([5]))
    _, query, key, _, _ = caught["given"]
    ca = mean[0, 1] if sets == "head" else mean[0, 1].view(2, 2, 4).mean(1).repeat_interleave(2, 0)
    two = {"rotation": lambda i: (i, i + 4), "adjacent": lambda i: (2 * i, 2 * i + 1)}[pairs]
    for head in range(4):
        best = ca[head].topk(2).indices.tolist()
        score = sum(key[0, head // 2, :, dim] * query[0, head, 0, dim] for chunk in best for dim in two(chunk))
        assert set(caught["chosen"][0, head, 0].nonzero()[:, 0].tolist()) == set(score.topk(7).indices.tolist())


def test_all_chunks_are_the_oracle_and_the_sum_of_chunks_is_the_logit(tmp_path):
    lm = tiny_lm(seed=2)
    pairs = pairs_of(lm.model, "rotation")
    query, key = torch.randn(8), torch.randn(8)
    assert sum(query[p] @ key[p] for p in pairs).item() == pytest.approx((query @ key).item(), abs=1e-5)


def test_true_pairs_turn_together():
    """A chunk's part of a logit depends on the distance alone, which neighbours' parts do not."""
    lm = tiny_lm()
    rotation = rotation_of(lm.model)
    query, key = torch.randn(8), torch.randn(8)

    def parts(pairs, shift):
        turned = rotation(query, torch.tensor(9 + shift)), rotation(key, torch.tensor(4 + shift))
        return torch.stack([turned[0][p] @ turned[1][p] for p in pairs])

    for kind, alike in (("rotation", True), ("adjacent", False)):
        pairs = pairs_of(lm.model, kind)
        assert torch.allclose(parts(pairs, 0), parts(pairs, 50), atol=1e-4) == alike


def test_interleaved_models_turn_neighbours():
    config = CohereConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert pairs_of(model, "rotation").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    states, places = torch.randn(1, 1, 5, 8), torch.arange(5)
    cos, sin = model.model.rotary_emb(states, places[None])
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    torch.testing.assert_close(rotation_of(model)(states, places), apply_rotary_pos_emb(states, states, cos, sin)[0])


def test_agreement_is_the_share_of_common_tokens():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 2, 30, 8, generator=generator)
    pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    found = agreements(query, key, pairs, (3, 9), Seen.of(None, 1, key))
    assert found.shape == (2, 2, 1, 4, 4)
    for at, budget in enumerate((3, 9)):
        for row in range(2):
            for head in range(4):
                keys, q = key[row, head // 2], query[row, head, 0]
                whole = set((keys @ q).topk(budget).indices.tolist())
                for chunk, pair in enumerate(pairs):
                    alone = set((keys[:, pair] @ q[pair]).topk(budget).indices.tolist())
                    assert found[at, row, 0, head, chunk].item() == pytest.approx(len(whole & alone) / budget)


def test_calibration_looks_at_decoded_tokens_alone():
    lm = tiny_lm()
    pairs = pairs_of(lm.model, "rotation")
    found = measure_agreement(lm.model, [TEXT, TEXT[::-1]], 3, pairs, (4, 16, 64))
    assert found.budgets == (4, 16)  # 64 is more than half of the text
    assert found.mean.shape == (2, 2, 4, 4) and (found.mean > 0).all() and (found.mean <= 1).all()
    again = measure_agreement(lm.model, [TEXT, TEXT[::-1]], 3, pairs, (4, 16, 64))
    assert torch.equal(found.mean, again.mean)


def test_dominant_chunks():
    agreement = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.9, 0.2, 0.8, 0.1]])
    assert dominant(agreement, 2, 2, shared=False).tolist() == [[1, 2], [0, 2]]
    assert dominant(agreement, 2, 2, shared=True).tolist() == [[1, 2], [1, 2]]


def test_a_union_holds_what_every_head_wants():
    wanted = torch.tensor([[0, 4], [1, 5], [0, 4], [0, 4]])
    union, factor = union_of(wanted, 2, 8, torch.float32)
    assert union.shape == (2, 4) and sorted(union[0].tolist()) == [0, 1, 4, 5]
    assert len(set(union[1].tolist())) == 4 and union.max() < 8
    for head in range(4):
        assert sorted(union[head // 2][factor[head] == 1].tolist()) == wanted[head].tolist()


def test_what_is_held_twice_is_counted(tmp_path):
    lm = tiny_lm()
    path = calibrated(lm, tmp_path, Agreement((8,), torch.rand(1, 2, 4, 4)))
    policy = FASA(read=7, chunks=0.25, sets="group", dense=0, calibration=path)
    policy.prepare(lm.model)
    full, part = Target(lm.model), Target(lm.model, readers=policy.attach(lm.model.config))
    with attached(lm.model):
        for target in (full, part):
            target.prefill([TEXT])
            target.score(TokenTree.roots([5]))
    keys = 2 * 2 * (len(TEXT) + 1) * 8 * 4  # layers, key heads, tokens, dimensions, bytes
    assert part.nbytes - full.nbytes >= keys // 4


def test_it_reads_on_when_tokens_are_evicted():
    """Over a keep policy, the copy of dominant dimensions follows what is held."""
    lm = tiny_lm(context=64)
    policy, keep = FASA(read=8, dense=0), Keyformer(keep=20, interval=4)
    policy.prepare(lm.model)
    target = Target(lm.model, keep.attach(lm.model.config, lm.dtype), policy.attach(lm.model.config))
    with attached(lm.model):
        target.prefill([TEXT, TEXT[:40]])
        for token in range(12):
            target.score(TokenTree.roots([token, token + 1]))
            for layer in target.cache.token_layers:
                state = layer.reader
                index = state._union[None, :, None].expand(2, -1, layer.keys.shape[2], -1)
                copied, held = layer.keys.gather(-1, index), min(layer.held)
                assert torch.equal(state._copy[:, :, :held], copied[:, :, :held])
            target.commit([[0], [0]])


def test_files_are_read_back_and_checked(tmp_path):
    lm = tiny_lm()
    agreement = Agreement((8, 32), torch.rand(2, 2, 4, 4))
    path = calibrated(lm, tmp_path, agreement)
    found = read(lm.model, "rotation", path)
    assert found.budgets == (8, 32) and torch.allclose(found.mean, agreement.mean, atol=0.5 / 255 + 1e-6)
    assert torch.equal(found.near(30), found.mean[1]) and torch.equal(found.near(None), found.mean[1])
    with pytest.raises(UnsupportedModelError, match="another model"):
        read(tiny_lm(seed=1).model, "rotation", path)
    with pytest.raises(UnsupportedModelError):
        read(lm.model, "adjacent", path)
    for text in ("", "{}", json.dumps({"about": {}, "agreement": {"8": [["zz"]]}})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match="agreements"):
            agreement_of(lm.model, "rotation", str(tmp_path / "bad.json"))


def test_models_without_rotation_are_refused():
    with pytest.raises(UnsupportedModelError, match="rotary"):
        FASA().prepare(tiny_lm(family="gpt2").model)


def test_sliding_layers_are_left_alone():
    lm = tiny_lm(family="gemma3", layers=2, context=64)
    policy = FASA(read=8, dense=0)
    policy.prepare(lm.model)
    target = Target(lm.model, readers=policy.attach(lm.model.config))
    with attached(lm.model):
        target.prefill([TEXT])
        assert torch.isfinite(target.score(TokenTree.roots([5]))).all()
