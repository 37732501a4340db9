from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rows import forget, leave_and_repeat
from safetensors.torch import load_file

from tokenary.core.errors import InputError, OptionError, RecipeError, UnsupportedModelError
from tokenary.core.files import write_json
from tokenary.core.recipe import Recipe
from tokenary.core.tree import TokenTree
from tokenary.data import prose
from tokenary.hf.cache import PassInfo, TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.laws import RAGGED, oracle, prompts_of, run
from tokenary.memory.learnt import mark
from tokenary.memory.still import STILL, WEIGHTS
from tokenary.memory.still.hybrid import hybrid_attention
from tokenary.memory.still.layer import StillLayer
from tokenary.memory.still.maps import Maps, fresh_maps, load_maps, save_maps
from tokenary.memory.still.passes import passes
from tokenary.memory.still.routing import Rule, prompt_saliency
from tokenary.memory.still.training import Variant, middle_layers, transfer
from tokenary.memory.still.tuning import next_token_loss, tune
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm
from tokenary.run import load

SIZES = {"heads": 4, "size": 8, "hidden": 32}


def moved(maps: Maps) -> Maps:
    """Maps whose gates are neither all open nor all shut."""
    with torch.no_grad():
        maps.gate.weight.copy_(torch.randn(maps.gate.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return maps


@pytest.fixture(scope="module")
def lm() -> LM:
    made = tiny_lm(layers=2)
    made.model.double()
    return made


@pytest.fixture(scope="module")
def folder(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained maps for both layers of the toy net, and for one control."""
    place = tmp_path_factory.mktemp("still")
    for name, features in (("model", "norm"), ("random", "norm"), ("hedgehog", "hedgehog")):
        maps = [moved(each) for each in fresh_maps(2, 5, features, **SIZES)]
        save_maps(place, name, dict(enumerate(maps)), mark(lm.model) if name == "model" else None)
    write_json(place / "config.json", {**SIZES, "layers": [0, 1], "model_layers": 2})
    return place


KINDS = [{}, {"routing": "random"}, {"features": "hedgehog"}]


def ready(lm: LM, folder: Path, **options: object) -> STILL:
    policy = STILL(**{"chunk": 8, "salient": 2, "weights": str(folder), **options})
    policy.prepare(lm.model)
    return policy


def target_of(lm: LM, policy: STILL | None) -> Target:
    return Target(lm.model, None if policy is None else policy.attach(lm.model.config, lm.dtype))


def written(lm: LM, policy: STILL | None, prompts=RAGGED, new: int = 40, draft=None) -> list[list[int]]:
    return run(lm, None, prompts, new, draft, target=target_of(lm, policy))


def layers_of(target: Target) -> list[StillLayer]:
    return [layer.policy for layer in target.cache.token_layers]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_prompt_read_at_once_gives_the_logits_of_one_read_token_by_token(lm, folder, options) -> None:
    policy, (prompt,) = ready(lm, folder, **options), prompts_of(75)
    whole, steps = target_of(lm, policy), target_of(lm, policy)
    whole.lengths = [0]
    with attached(lm.model):
        at_once = whole.forward(torch.tensor([prompt]), torch.arange(75)[None])[0]
        found = [steps.prefill([prompt[:1]])[0]]
        for token in prompt[1:]:
            found.append(steps.score(TokenTree.roots([token]))[0, 0])
            steps.commit([[0]])
        whole.commit([range(75)])
        torch.testing.assert_close(torch.stack(found), at_once, rtol=1e-4, atol=1e-4)
        last = [each.score(TokenTree.roots([3])) for each in (whole, steps)]
        torch.testing.assert_close(*last, rtol=1e-4, atol=1e-4)
    for one, other in zip(layers_of(whole), layers_of(steps), strict=True):
        torch.testing.assert_close(one._rows[0].state.products, other._rows[0].state.products, rtol=1e-4, atol=1e-4)
        scores = one._rows[0].scores, other._rows[0].scores
        if "routing" not in options:
            assert scores[0].shape == (2, 75 - 8 * 8)
            torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    dense = target_of(lm, None)
    with attached(lm.model):
        other = dense.forward(torch.tensor([prompt]), torch.arange(75)[None])[0]
    assert torch.allclose(at_once[:16], other[:16]) and not torch.allclose(at_once[16:], other[16:], atol=1e-2)


def test_attention_is_that_of_the_formula(lm, folder) -> None:
    """The first layer, computed in the open from the model's own projections."""
    policy, (prompt,), out = ready(lm, folder), prompts_of(60), {}
    block = lm.model.model.layers[0]
    handle = block.self_attn.o_proj.register_forward_pre_hook(lambda module, args: out.update(x=args[0]))
    target, full = target_of(lm, policy), Target(lm.model)
    with attached(lm.model):
        full.prefill([prompt])
        target.prefill([prompt[:50]])
        target.score(TokenTree.chains([prompt[50:56]]))
    handle.remove()
    hidden = block.input_layernorm(lm.model.model.embed_tokens(torch.tensor(prompt))).detach()
    layer = full.cache.token_layers[0]
    keys, values = layer.keys[0], layer.values[0]
    position = lm.model.model.rotary_emb(hidden[None], torch.arange(60)[None])
    query = block.self_attn.q_proj(hidden).view(60, 4, 8).transpose(0, 1).detach()
    half = torch.cat([-query[..., 4:], query[..., :4]], -1)
    query = query * position[0] + half * position[1]
    maps, scores = load_maps(folder)[0].double(), prompt_saliency(query, keys, 8**-0.5, 8)
    arguments = maps.gates(hidden), scores, maps, Rule(8, 2), 8**-0.5
    expected = hybrid_attention(query, keys, values, *arguments)[:, 50:56]
    found = out["x"][0].view(6, 4, 8).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_is_held_is_exactly_what_the_rule_says(lm, folder) -> None:
    policy = ready(lm, folder)
    seen = [0] * len(RAGGED)

    def after(target: Target, taken: list[int]) -> None:
        for row, count in enumerate(taken):
            seen[row] += count
            old = max(0, seen[row] // 8 - 1)
            for layer in target.cache.token_layers:
                assert layer.held[row] == old * 2 + seen[row] - old * 8
                state = layer.policy._rows[row]
                assert (state.seen, state.old) == (seen[row], old)
                assert state.scores.shape == (2, seen[row] - old * 8)
                if layer.positions is not None and old:
                    held = layer.positions[row, :, : layer.held[row]]
                    assert bool((held.diff() > 0).all())
                    assert torch.equal(held[:, : old * 2] // 8, torch.arange(old).repeat_interleave(2).expand(2, -1))

    run(lm, None, RAGGED, 40, after=after, target=target_of(lm, policy))


def test_bytes_are_counted_and_fall(folder) -> None:
    lm = tiny_lm(layers=2)
    policy, (prompt,) = ready(lm, folder), prompts_of(480)
    full, target = target_of(lm, None), target_of(lm, policy)
    with attached(lm.model):
        for each in (full, target):
            each.prefill([prompt])
    sums = 4 * 16 * (8 + 1) * 4  # query heads, features, channels and the weight, bytes
    for layer in target.cache.token_layers:
        assert layer.policy.nbytes == sums + layer.policy._rows[0].scores.nbytes
        slots = layer.storage.shape[3]
        assert slots < 160  # 59 chunks of 2, and up to 16
        assert layer.nbytes == 2 * 2 * 8 * 4 * slots + 4 * 2 * slots + layer.policy.nbytes
    assert target.nbytes < 0.5 * full.nbytes
    target.select_rows([0, 0])
    shared = [layer.policy.nbytes for layer in target.cache.token_layers]
    assert shared == [sums + layer.policy._rows[0].scores.nbytes for layer in target.cache.token_layers]


def test_with_every_token_salient_nothing_changes(lm, folder) -> None:
    assert written(lm, ready(lm, folder, salient=8)) == written(lm, None)
    assert written(lm, ready(lm, folder)) != written(lm, None)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_batch_is_its_sequences(lm, folder, options) -> None:
    policy = ready(lm, folder, **options)
    for prompt, text in zip(RAGGED, written(lm, policy), strict=True):
        assert written(lm, policy, [prompt]) == [text]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_drafts_change_nothing_and_leave_nothing_in_the_sums(lm, folder, options) -> None:
    policy = ready(lm, folder, **options)
    plain_target, target = target_of(lm, policy), target_of(lm, policy)
    plain = run(lm, None, RAGGED, 48, target=plain_target)
    truth = [prompt + ids for prompt, ids in zip(RAGGED, plain, strict=True)]
    stream, passes_ = np.random.default_rng(0), []
    drafted = run(
        lm, None, RAGGED, 40, lambda texts: oracle(texts, truth, stream), lambda t, n: passes_.append(max(n)), target
    )
    assert drafted == [ids[:40] for ids in plain] and max(passes_[1:]) > 2
    for one, other in zip(layers_of(plain_target), layers_of(target), strict=True):
        for row in range(len(RAGGED)):
            mine, theirs = one._rows[row], other._rows[row]
            if mine.old == theirs.old:
                torch.testing.assert_close(mine.state.products, theirs.state.products, rtol=1e-6, atol=1e-6)


def test_left_padding_changes_nothing(lm, folder) -> None:
    policy, longest = ready(lm, folder), max(map(len, RAGGED))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in RAGGED])
    cache = TokenCache(lm.model.config, policy.attach(lm.model.config, lm.dtype))
    with attached(lm.model):
        out = lm.model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, do_sample=False, pad_token_id=0
        )
    assert out[:, longest:].tolist() == written(lm, policy, new=30)


def test_pieces_of_a_prompt_change_nothing(lm, folder) -> None:
    policy = ready(lm, folder)
    whole, pieces = target_of(lm, policy), target_of(lm, policy)
    with attached(lm.model):
        one, other = whole.prefill(RAGGED), pieces.prefill(RAGGED, chunk=17)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        tree = TokenTree.roots([1, 2, 3, 4])
        torch.testing.assert_close(whole.score(tree), pieces.score(tree), rtol=1e-4, atol=1e-4)


def test_sequences_may_leave_come_twice_and_be_forgotten(lm, folder) -> None:
    policy = ready(lm, folder)
    target = target_of(lm, policy)
    leave_and_repeat(lm, target, written(lm, policy, new=25))
    forget(target)


def test_it_refuses_what_it_cannot_do(lm, folder, tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"scripts/train_still\.py"):
        STILL().prepare(lm.model)
    with pytest.raises(UnsupportedModelError, match="another model"):
        STILL(weights=str(folder), train=3).prepare(tiny_lm(layers=3).model)
    with pytest.raises(UnsupportedModelError, match="layers"):
        STILL(train=1).prepare(tiny_lm(family="gpt2").model)
    with pytest.raises(UnsupportedModelError, match="context"):
        STILL(train=1).prepare(tiny_lm(context=64).model)
    with pytest.raises(RecipeError, match="prepare"):
        STILL().attach(lm.model.config, torch.float32)
    with pytest.raises(InputError, match="no feature maps"):
        STILL(weights=str(tmp_path)).prepare(lm.model)
    with pytest.raises(InputError, match=r"recent\.safetensors"):
        ready(lm, folder, routing="recent")
    with pytest.raises(OptionError, match="at most chunk=8"):
        STILL(chunk=8, salient=9)
    with pytest.raises(RecipeError, match="attend in their own way"):
        Recipe.parse("still + fasa")
    with pytest.raises(RecipeError, match="hidden states"):
        target = target_of(lm, ready(lm, folder))
        with attached(lm.model):
            target.prefill(prompts_of(30))
            target.cache.begin(PassInfo())
            for layer in target.cache.token_layers:
                layer.policy.attend(layer, *(torch.zeros(1, 4, 1, 8),) * 3, None, 1.0)


def test_maps_survive_the_file(lm, folder) -> None:
    saved = [moved(each) for each in fresh_maps(2, 5, "hedgehog", **SIZES)]
    loaded = load_maps(folder, "hedgehog", "hedgehog")
    assert list(loaded) == [0, 1]
    for one, other in zip(saved, loaded.values(), strict=True):
        for name, tensor in one.state_dict().items():
            error, step = (tensor - other.state_dict()[name]).abs(), tensor.abs().amax(-1, keepdim=True) / 127
            assert error.norm() < 0.02 * (tensor - 1).norm() if "gate" in name else (error <= 0.51 * step).all()


def test_of_a_gate_the_file_holds_what_weighs_most(folder, monkeypatch) -> None:
    (one,) = fresh_maps(1, 5, "norm", **SIZES)
    learnt = torch.linalg.qr(torch.randn(2, *one.gate.weight.shape)).Q[:, :, :3] * torch.tensor([4.0, 2.0, 1.0])
    with torch.no_grad():
        one.gate.weight += learnt[0] @ learnt[1].mT
    found = {}
    for rank in (32, 2):
        monkeypatch.setattr("tokenary.memory.still.maps.RANK", rank)
        save_maps(folder, "gate", {0: one, 1: one})
        found[rank] = load_maps(folder, "gate")[0]
    error = {rank: float((each.gate.weight - one.gate.weight).detach().norm()) for rank, each in found.items()}
    assert error[32] < 0.2 and error[2] == pytest.approx(1.0, rel=0.1)  # the third of the singular values is 1
    assert found[2].gate.weight.shape == one.gate.weight.shape
    file = load_file(folder / "gate.safetensors")
    assert all(tensor.dtype == torch.int8 for name, tensor in file.items() if name.endswith((".out", ".query.weight")))


# ------------------------------------------------------------------------------------------------- training


def test_what_is_trained_on_is_what_attention_sees() -> None:
    lm = tiny_lm(layers=3)
    (ids,) = prompts_of(40)
    seen, out = passes(lm.model, ids, [0, 1]), {}
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda module, args, n=n: out.update({n: args[0]}))
        for n, block in enumerate(lm.model.model.layers)
    ]
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for layer, found in seen.items():
        said = found.softmax(7).transpose(0, 1).flatten(1)
        torch.testing.assert_close(said, out[layer][0, 7:], rtol=1e-4, atol=1e-4)
        query = lm.model.model.layers[layer].self_attn.q_proj(found.hidden_states).detach()
        assert torch.allclose(query.view(40, 4, 8).norm(dim=-1), found.query.norm(dim=-1).T, atol=1e-4)
    assert not any(block.self_attn._forward_pre_hooks or block._forward_hooks for block in lm.model.model.layers)


def test_maps_learn_what_attention_says_and_variants_do_not_disturb_each_other() -> None:
    lm = tiny_lm(layers=2)
    texts, rule = prompts_of(*[80] * 2, seed=5) * 40, Rule(8, 2)
    variants = [Variant(), Variant(routing="random"), Variant(features="hedgehog"), Variant(rescale=True)]
    assert [variant.name for variant in variants] == ["model", "random", "hedgehog", "rescaled"]
    losses = [loss for _, loss in transfer(lm.model, [0], texts, variants, rule)]
    for variant in variants:
        first, last = (sum(loss[variant.name] for loss in part) / 10 for part in (losses[:10], losses[-10:]))
        assert last < 0.99 * first, variant.name
    alone = [loss["model"] for _, loss in transfer(lm.model, [0], texts[:5], variants[:1], rule)]
    assert alone == [loss["model"] for loss in losses[:5]]


def test_rough_maps_are_trained_where_that_is_wanted() -> None:
    lm = tiny_lm(layers=3)
    policy = STILL(chunk=8, salient=2, train=3)
    policy.prepare(lm.model)
    policy.prepare(lm.model)
    states = policy.attach(lm.model.config, lm.dtype)
    assert [isinstance(state, StillLayer) for state in states] == [
        index in middle_layers(lm.model) for index in range(3)
    ]
    assert len(lm.model.model.layers[1].self_attn._forward_pre_hooks) == 1
    held: list[list[int]] = []
    run(
        lm,
        None,
        RAGGED,
        after=lambda t, n: held.append([layer.held[2] for layer in t.cache.token_layers]),
        target=Target(lm.model, states),
    )
    assert held[-1][0] == held[-1][2] == 140 and held[-1][1] < 60


@pytest.mark.parametrize("train_maps", [False, True])
def test_updates_learn_through_hybrid_attention_and_become_part_of_the_model(folder, train_maps) -> None:
    lm = tiny_lm(layers=2)
    policy, texts = ready(lm, folder), prompts_of(60) * 30
    before = [block.self_attn.q_proj.weight.clone() for block in lm.model.model.layers]
    gate = policy.maps[1].gate.weight.clone()
    with attached(lm.model):
        hybrid = target_of(lm, policy).forward(torch.tensor(texts[:1]), torch.arange(60)[None])[0]
    expected = torch.nn.functional.cross_entropy(hybrid[:-1], torch.tensor(texts[0][1:]))
    losses = list(tune(lm.model, policy, texts, rank=4, train_maps=train_maps))
    assert losses[0] == pytest.approx(float(expected), abs=1e-4)
    with torch.no_grad():
        assert float(next_token_loss(lm.model, policy, texts[0])) < losses[-1] < losses[0]
    for block, old in zip(lm.model.model.layers, before, strict=True):
        assert isinstance(block.self_attn.q_proj, torch.nn.Linear)
        changed = block.self_attn.q_proj.weight - old
        assert 0 < torch.linalg.matrix_rank(changed.detach(), rtol=1e-4) <= 4
    assert torch.equal(policy.maps[1].gate.weight, gate) != train_maps


def test_the_middle_of_a_model() -> None:
    assert [middle_layers(tiny_lm(layers=n).model) for n in (2, 3, 8)] == [[0], [1], [3]]
    assert middle_layers(tiny_lm(family="gemma3", layers=4).model) == [1]  # 0 and 2 slide


@pytest.mark.real
def test_shipped_maps_come_nearer_than_random_tokens_and_decoding_says_what_a_prompt_says() -> None:
    lm = load("smollm2", dtype="float32")
    ids = lm.tokenizer(prose()[:8000], verbose=False)["input_ids"][:400]
    policy, errors = STILL(), dict.fromkeys(("saliency", "random"), 0.0)
    trained = {"saliency": load_maps(WEIGHTS), "random": load_maps(WEIGHTS, "random")}
    assert list(trained["saliency"]) == [12, 13, 14, 15]
    for layer, seen in passes(lm.model, ids, [12, 13, 14, 15]).items():
        for routing, maps in trained.items():
            rule = Rule(routing=routing)
            with torch.no_grad():
                said, truth = seen.hybrid(maps[layer], rule, *seen.exact(rule, layer, 128), 128), seen.softmax(128)
            errors[routing] += float((said - truth).square().mean())
    assert errors["saliency"] < 0.5 * errors["random"]
    policy.prepare(lm.model)
    whole, pieces = target_of(lm, policy), target_of(lm, policy)
    with attached(lm.model):
        expected = whole.forward(torch.tensor([ids]), torch.arange(400)[None])[0, 310:]
        pieces.prefill([ids[:310]])
        found = []
        while pieces.lengths[0] < 400:
            at = pieces.lengths[0]
            width = min(pieces.room(0) or 1, 400 - at, 20)
            found.append(pieces.score(TokenTree.chains([ids[at : at + width]]))[0])
            pieces.commit([range(width)])
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-2, atol=1e-2)
