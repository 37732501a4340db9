"""What every keep policy must do, whatever it chooses: Keyformer and the two controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenary.core.budget import spread
from tokenary.core.errors import OptionError
from tokenary.core.recipe import Recipe
from tokenary.core.registry import card, method_class
from tokenary.core.sampling import Sampler
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Loop, Proposer
from tokenary.decode.width import DraftWidth
from tokenary.hf.cache import TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.keyformer import Keyformer
from tokenary.memory.laws import RAGGED as PROMPTS
from tokenary.memory.laws import prompts_of
from tokenary.memory.random import RandomTokens
from tokenary.memory.recent import RecentTokens
from tokenary.models.tiny import tiny_lm

POLICIES = pytest.mark.parametrize("policy_class", [Keyformer, RandomTokens, RecentTokens], ids=lambda c: c.__name__)
NEW = 40


@pytest.fixture(scope="module")
def model():
    return tiny_lm(layers=3, heads=6, kv_heads=2, hidden=48).model


def start(model, policy) -> Target:
    return Target(model, None if policy is None else policy.attach(model.config, torch.float32))


def generate(model, policy, prompts, proposer=None, sampler=Sampler(), end_tokens=(), target=None):  # noqa: B008
    """New tokens of each prompt, and the loop."""
    with attached(model):
        loop = Loop(target or start(model, policy), prompts, sampler, NEW, end_tokens, proposer)
        for _ in loop:
            pass
    return [sequence.new_ids for sequence in loop.sequences], loop


def teacher_forced(model, policy, prompt, new, chunk=1024):
    """Logits (1 + len(new), V) while the given tokens follow a prompt, and the target."""
    with attached(model):
        target = start(model, policy)
        logits = [target.prefill([prompt], chunk)]
        for token in new:
            logits.append(target.score(TokenTree.roots([token]))[:, 0])
            target.commit([[0]])
    return torch.cat(logits), target


def positions(layer, row=0):
    """Original positions that each key head holds, (Hkv, held)."""
    held = layer.held[row]
    if layer.positions is None:
        return torch.arange(held).expand(layer.storage.shape[2], -1)
    return layer.positions[row, :, :held].long()


# ------------------------------------------------------------------------------------------------ what is kept


@POLICIES
@pytest.mark.parametrize("layers", ["uniform", "pyramid"])
def test_budgets_are_held_and_nothing_dropped_returns(model, policy_class, layers):
    policy = policy_class("40%", layers=layers, interval=6)
    prompt, new = PROMPTS[2], PROMPTS[0]
    budgets = spread(40, 3, layers)  # floor of 40 % of 101
    assert (len(set(budgets)) == 3) == (layers == "pyramid")
    with attached(model):
        target = start(model, policy)
        target.prefill([prompt])
        before = [positions(layer) for layer in target.cache.layers]
        assert [p.shape[1] for p in before] == budgets
        for step, token in enumerate(new):
            target.score(TokenTree.roots([token]))
            target.commit([[0]])
            at = len(prompt) + step
            for index, layer in enumerate(target.cache.layers):
                now = positions(layer)
                assert now.shape[1] == budgets[index] + (step + 1) % 6
                for old, new_ in zip(before[index].tolist(), now.tolist(), strict=True):
                    assert set(new_) <= {*old, at} and at in new_
                    assert new_ == sorted(set(new_))
                before[index] = now


@POLICIES
def test_keys_and_values_stay_those_of_their_tokens(model, policy_class):
    prompt = PROMPTS[2]
    _, full = teacher_forced(model, None, prompt, [])
    _, target = teacher_forced(model, policy_class("40%"), prompt, [])
    for layer, whole in zip(target.cache.layers, full.cache.layers, strict=True):
        index = positions(layer)[None, ..., None].expand(1, -1, -1, 8)
        assert index.shape[2] == 40
        torch.testing.assert_close(layer.keys, whole.keys.gather(2, index))
        torch.testing.assert_close(layer.values, whole.values.gather(2, index))


def test_keyformer_and_random_choose_for_each_head_and_recent_for_all(model):
    for policy_class, apart in ((Keyformer, True), (RandomTokens, True), (RecentTokens, False)):
        _, target = teacher_forced(model, policy_class("40%"), PROMPTS[2], [])
        sets = {tuple(head) for layer in target.cache.layers for head in positions(layer).tolist()}
        assert len(sets) == (6 if apart else 1)


@POLICIES
def test_the_newest_tokens_stay(model, policy_class):
    _, target = teacher_forced(model, policy_class("40%", interval=10), PROMPTS[2], PROMPTS[0][:10])
    for layer in target.cache.layers:
        newest = positions(layer)[:, -12:]  # 30 % of 40
        assert newest.tolist() == [list(range(99, 111))] * 2


@pytest.mark.parametrize(("sinks", "kept"), [(4, 40), (0, 40), (4, 3)])
def test_recent_is_sinks_and_a_window(model, sinks, kept):
    policy = RecentTokens(kept, sinks=sinks, interval=5)
    _, target = teacher_forced(model, policy, PROMPTS[2], PROMPTS[0][:20])
    sinks = min(sinks, kept)
    expected = [*range(sinks), *range(121 - (kept - sinks), 121)]
    for layer in target.cache.layers:
        assert positions(layer).tolist() == [expected] * 2


def test_random_is_uniform_over_all_older_tokens():
    """However often it reduces, an older token is held as likely as any other."""
    counts, runs = torch.zeros(200), 200
    for seed in range(runs):
        layer = RandomTokens(40, interval=10, seed=seed).layer(0)
        layer.index, layer.n_layers, layer.kv_heads, layer.bytes_per_token = 0, 1, 1, 1
        held = torch.arange(60)[None]
        held = layer.keep(0, 60, 60, True).apply(held, dim=-1)
        for at in range(60, 200):
            held = torch.cat([held, torch.tensor([[at]])], dim=1)
            chosen = layer.keep(0, held.shape[1], 1, False)
            held = held if chosen is None else chosen.apply(held, dim=-1)
        assert held.shape == (1, 40) and held[0, -12:].tolist() == list(range(188, 200))
        counts[held[0]] += 1
    share, expected = counts[:188] / runs, 28 / 188
    assert abs(share[:94].mean() - share[94:].mean()) < 0.02
    chi2 = ((share - expected) ** 2).sum() * runs / (expected * (1 - expected))
    assert chi2 < 188 + 5 * (2 * 188) ** 0.5


# ------------------------------------------------------------------------------------------- keeping everything


@POLICIES
@pytest.mark.parametrize("keep", ["100%", "1000", "99MB"])
def test_keeping_everything_is_the_full_cache(model, policy_class, keep):
    prompt, new = PROMPTS[0], PROMPTS[1]
    full, _ = teacher_forced(model, None, prompt, new)
    found, target = teacher_forced(model, policy_class(keep), prompt, new)
    assert all(layer.held == [103] and layer.positions is None for layer in target.cache.layers)
    if keep == "100%" or policy_class is not Keyformer:
        assert torch.equal(found, full)
        assert target.room(0) is None or keep != "100%"
    else:  # other kernels compute the attention, since its logits are asked for
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)
    assert generate(model, policy_class(keep), PROMPTS)[0] == generate(model, None, PROMPTS)[0]


@POLICIES
def test_dropping_changes_the_text(model, policy_class):
    assert generate(model, policy_class("20%"), PROMPTS)[0] != generate(model, None, PROMPTS)[0]


# ---------------------------------------------------------------------------- batch, padding, pieces, state


@POLICIES
def test_a_batch_is_its_sequences(model, policy_class):
    policy = policy_class("40%", interval=7)
    together, _ = generate(model, policy, PROMPTS)
    assert together == [generate(model, policy, [prompt])[0][0] for prompt in PROMPTS]
    with attached(model):
        batch = start(model, policy)
        batch.prefill(PROMPTS, chunk=30)
        for row, prompt in enumerate(PROMPTS):
            single = start(model, policy)
            single.prefill([prompt])
            for one, other in zip(batch.cache.layers, single.cache.layers, strict=True):
                assert positions(one, row).tolist() == positions(other).tolist()


@POLICIES
def test_sequences_that_end_leave_the_others_alone(model, policy_class):
    policy = policy_class("40%", interval=7)
    alone = [generate(model, policy, [prompt])[0][0] for prompt in PROMPTS]
    ends = (alone[0][6], alone[2][20])
    together, loop = generate(model, policy, PROMPTS, end_tokens=ends)
    cut = [ids[: min([ids.index(end) + 1 for end in ends if end in ids], default=NEW)] for ids in alone]
    assert together == cut
    assert len({len(ids) for ids in cut}) > 1 and "stop" in {sequence.finish for sequence in loop.sequences}


@POLICIES
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_pieces_of_a_prompt_change_nothing(model, policy_class, chunk):
    policy = policy_class("40%")
    whole, one = teacher_forced(model, policy, PROMPTS[2], PROMPTS[1])
    cut, other = teacher_forced(model, policy, PROMPTS[2], PROMPTS[1], chunk)
    for left, right in zip(one.cache.layers, other.cache.layers, strict=True):
        assert positions(left).tolist() == positions(right).tolist()
    torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-3)


@POLICIES
def test_nothing_is_left_of_earlier_texts(model, policy_class):
    policy = policy_class("40%", interval=7)
    first, loop = generate(model, policy, PROMPTS)
    assert generate(model, policy, PROMPTS[2:])[0] == first[2:]
    loop.target.cache.reset()
    assert all(layer.policy.nbytes == 0 for layer in loop.target.cache.layers)
    assert generate(model, policy, PROMPTS, target=loop.target)[0] == first


@POLICIES
def test_reordered_and_repeated_sequences_go_on_as_they_would(model, policy_class):
    policy, rows = policy_class("40%", interval=7), [2, 0, 2]
    new = PROMPTS[3][:30]
    with attached(model):
        target = start(model, policy)
        target.prefill(PROMPTS[:3])
        for step, token in enumerate(new):
            if step == 10:
                target.select_rows(rows)
            batch = len(target.lengths)
            logits = target.score(TokenTree.roots([token] * batch))[:, 0]
            target.commit([[0]] * batch)
    for row, source in enumerate(rows):
        alone, _ = teacher_forced(model, policy, PROMPTS[source], new)
        torch.testing.assert_close(logits[row], alone[-1], rtol=1e-3, atol=1e-3)


@POLICIES
def test_generate_with_left_padding_gives_the_same_tokens(model, policy_class):
    policy = policy_class("40%", interval=7)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    with attached(model):
        cache = TokenCache(model.config, policy.attach(model.config, torch.float32))
        found = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    assert found[:, longest:].tolist() == generate(model, policy, PROMPTS)[0]


# ------------------------------------------------------------------------------------------------- with drafts


class Oracle(Proposer):
    """Drafts trees of the tokens that will come, between wrong ones; now and then a wrong one in their place."""

    def __init__(self, texts):
        self.texts, self.width, self.rng = texts, DraftWidth(8, fixed=8), np.random.default_rng(0)

    def propose(self, contexts, nodes):
        trees = []
        for ids in contexts:
            full = next(text for text in self.texts if text[: len(ids)] == list(ids)) + [0] * 8
            n = len(ids)
            tokens = [ids[-1], 96, full[n], full[n + 1], 95, full[n + 2], 94, full[n + 3], full[n + 4]]
            parents = [-1, 0, 0, 2, 2, 3, 5, 5, 7]
            if self.rng.random() < 0.3:
                tokens[5] = 93
            size = self.rng.integers(2, 10)
            trees.append((tokens[:size], parents[:size]))
        return TokenTree.stack(trees)


@POLICIES
@pytest.mark.parametrize("prompts", [PROMPTS[2:3], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, seed=5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("interval", [3, 16])
def test_drafts_change_nothing(model, policy_class, prompts, sampler, interval):
    policy = policy_class("40%", interval=interval)
    plain, one = generate(model, policy, prompts, sampler=sampler)
    oracle = Oracle([prompt + ids for prompt, ids in zip(prompts, plain, strict=True)])
    drafted, two = generate(model, policy, prompts, oracle, sampler)
    assert drafted == plain
    assert all(sequence.trace.tokens_per_pass > 1.5 for sequence in two.sequences)
    if len(prompts) == 1:  # the caches, too, end up holding the same tokens
        for left, right in zip(one.target.cache.layers, two.target.cache.layers, strict=True):
            assert positions(left).tolist() == positions(right).tolist()


# ---------------------------------------------------------------------------------------------------- memory


@POLICIES
def test_memory_really_falls(policy_class):
    config = LlamaConfig(
        vocab_size=97, hidden_size=576, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    shaped = LlamaForCausalLM(config).eval()
    prompt = prompts_of(600)[0]
    _, full = teacher_forced(shaped, None, prompt, [])
    _, target = teacher_forced(shaped, policy_class("50%"), prompt, [])
    assert target.nbytes <= 0.52 * full.nbytes
    held = [layer.storage.nbytes + layer.positions.nbytes for layer in target.cache.layers]
    book = {Keyformer: 3 * 300 * 4, RandomTokens: 3 * 300 * 4, RecentTokens: 0}[policy_class]
    assert target.nbytes == sum(held) + 2 * book
    _, later = teacher_forced(shaped, policy_class("50%"), prompt, prompts_of(20)[0])
    assert later.nbytes <= 0.56 * full.nbytes  # between two reductions


# --------------------------------------------------------------------------------------------------- the cards


@POLICIES
def test_the_card_and_the_recipe_find_it(policy_class):
    found = policy_class.card_of()
    assert method_class(found.slug) is policy_class and card(found.slug) == found
    assert found.slot == "keep" and not found.lossless
    assert found.baseline == (policy_class is not Keyformer)
    built = Recipe.parse(f"{found.slug}:keep=25%,interval=8").build()["keep"]
    assert isinstance(built, policy_class)
    assert (built.keep.ratio, built.interval, policy_class().keep.ratio, policy_class().interval) == (0.25, 8, 0.6, 16)


@POLICIES
@pytest.mark.parametrize("options", [{"keep": "0%"}, {"keep": "101%"}, {"layers": "cone"}, {"interval": 0}])
def test_wrong_options_are_refused(policy_class, options):
    with pytest.raises(OptionError):
        policy_class(**options)


@POLICIES
def test_options_are_those_of_the_method(policy_class):
    assert policy_class("30%").options["keep"].ratio == 0.3
    assert set(policy_class().options) == set(policy_class.schema()["properties"])
