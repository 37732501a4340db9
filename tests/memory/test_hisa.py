from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import forget, leave_and_repeat
from torch import Tensor

from tokenary.core.errors import InputError, OptionError, RecipeError, UnsupportedModelError
from tokenary.core.recipe import Recipe
from tokenary.core.tree import TokenTree
from tokenary.data import prose
from tokenary.hf.cache import TokenCache
from tokenary.hf.rotation import rotation_of
from tokenary.hf.target import Target, attached
from tokenary.memory.hisa import HISA, WEIGHTS
from tokenary.memory.hisa.blocks import BlockIndex, Branches
from tokenary.memory.hisa.indexer import LightningIndexer, score, turn
from tokenary.memory.hisa.plan import Plan, evaluations
from tokenary.memory.hisa.search import search
from tokenary.memory.hisa.training import captured, distil, divergence, fresh, looks
from tokenary.memory.laws import RAGGED, oracle, prompts_of, run
from tokenary.memory.learnt import own_texts
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm
from tokenary.run import load

SMALL = {"read": 12, "block": 4, "blocks": 3, "train": 2}


# ------------------------------------------------------------------------------------------------- the search


def drawn(seed: int, n_queries: int, tokens: int, heads: int = 3, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers, so that every order of summation gives the same score, and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    return whole(n_queries, heads, width), whole(n_queries, heads), whole(tokens, width)


def slow(query: Tensor, weight: Tensor, keys: Tensor, place: int, count: int, plan: Plan) -> list[int]:
    """What one query reads, said as in the paper."""

    def rated(key: Tensor) -> float:
        return sum(float(w) * max(0.0, float(q @ key)) for q, w in zip(query, weight, strict=True))

    seen = range(place + 1)
    if plan.search == "flat":
        candidates = list(seen)
    else:
        current, size = place // plan.block, plan.block
        others = sorted(range(current), key=lambda b: -rated(keys[b * size : (b + 1) * size].mean(0)))
        least = -(-count // size)
        m = max(plan.blocks, least)
        if plan.ratio:
            m = max(-int(-(current + 1) // plan.ratio), least)
        if plan.search == "blocks":
            m = max(1, count // size)
        if plan.forced == "beside" and plan.search != "blocks":
            chosen = {0, current, *others[:m]}
        else:
            chosen = set([current, 0, *[b for b in others if b][: max(0, m - 2)]][:m])
        candidates = [s for s in seen if s // size in chosen]
    if plan.search == "blocks":
        return candidates
    return sorted(sorted(candidates, key=lambda s: -rated(keys[s]))[:count])


def found(result: tuple[Tensor, Tensor]) -> list[list[int]]:
    return [sorted(row[real].tolist()) for row, real in zip(*result, strict=True)]


def index_of(keys: Tensor, block: int) -> BlockIndex:
    index = BlockIndex(block, keys.shape[1])
    index.append(keys)
    return index


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 90),
    block=st.sampled_from([1, 2, 4, 8]),
    blocks=st.integers(1, 6),
    ratio=st.sampled_from([0.0, 2.0, 4.0]),
    forced=st.sampled_from(["beside", "inside"]),
    kind=st.sampled_from(["hierarchical", "flat", "blocks"]),
    count=st.integers(1, 20),
)
def test_the_search_is_that_of_the_paper(seed, tokens, block, blocks, ratio, forced, kind, count) -> None:
    queries, weights, keys = drawn(seed, 5, tokens)
    places = torch.randint(0, tokens, (5,), generator=torch.Generator().manual_seed(seed))
    counts = torch.full((5,), count).minimum(places + 1)
    plan = Plan(block, blocks, ratio, forced, kind)
    result = found(search(queries, weights, places, counts, index_of(keys, block), plan))
    for row, (place, most) in enumerate(zip(places.tolist(), counts.tolist(), strict=True)):
        assert result[row] == slow(queries[row], weights[row], keys, place, most, plan)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 80), count=st.integers(1, 30))
def test_the_three_regimes(seed: int, tokens: int, count: int) -> None:
    queries, weights, keys = drawn(seed, 1, tokens)
    places = torch.tensor([tokens - 1])
    index, flat = index_of(keys, 4), Plan(4, 1, search="flat")
    counts = torch.tensor([min(count, tokens)])
    if tokens <= count:  # everything is read
        assert found(search(queries, weights, places, counts, index, Plan(4, 8))) == [list(range(tokens))]
    if tokens <= 32:  # all blocks are searched
        exact = found(search(queries, weights, places, counts, index, flat))
        for forced in ("beside", "inside"):
            assert Plan(4, 8, forced=forced).searches_all(places // 4, counts)
            assert found(search(queries, weights, places, counts, index, Plan(4, 8, forced=forced))) == exact


def test_pruning_misses_tokens_whose_block_has_a_low_mean() -> None:
    """The mean is of keys, not of scores: a key whose neighbours point the other way is not found."""
    keys = torch.zeros(40, 4)
    keys[8], keys[9:12] = torch.tensor([8.0, 0, 0, 0]), torch.tensor([-4.0, 0, 0, 0])
    keys[20:24] = torch.tensor([1.0, 0, 0, 0])
    query, weight = torch.tensor([[[1.0, 0, 0, 0]]]), torch.ones(1, 1)
    arguments = query, weight, torch.tensor([39]), torch.tensor([4]), index_of(keys, 4)
    assert 8 in found(search(*arguments, Plan(4, 1, search="flat")))[0]
    assert 8 not in found(search(*arguments, Plan(4, 1)))[0]
    assert found(search(*arguments, Plan(4, 1)))[0] == [20, 21, 22, 23]


def test_lists_of_many_tiles_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, weights, keys = drawn(3, 40, 60)
    places, index = torch.arange(20, 60), index_of(keys, 4)
    for plan in (Plan(4, 3), Plan(4, 3, search="flat"), Plan(4, 3, search="blocks")):
        whole = found(search(queries, weights, places, torch.full((40,), 9), index, plan))
        monkeypatch.setattr("tokenary.memory.hisa.search.TILE", 200)
        assert found(search(queries, weights, places, torch.full((40,), 9), index, plan)) == whole
        monkeypatch.undo()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), block=st.sampled_from([1, 3, 4]), data=st.data())
def test_an_index_grows_as_its_tokens_come_and_can_be_cut(sizes: list[int], block: int, data: st.DataObject) -> None:
    keys = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(1))
    index, at = BlockIndex(block, 4), 0
    for size in sizes:
        if data.draw(st.booleans()):  # a draft that is rejected
            index.append(torch.full((data.draw(st.integers(0, 9)), 4), 7.0))
            index.cut(at)
        index.append(keys[at : at + size])
        at += size
    assert index.size == len(keys)
    assert torch.equal(index.keys, keys)
    closed = len(keys) // block
    assert torch.allclose(index.means, keys[: closed * block].view(closed, block, 4).mean(1), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    before=st.integers(0, 30),
    width=st.integers(1, 20),
    kind=st.sampled_from(["hierarchical", "flat", "blocks"]),
)
def test_a_token_of_a_tree_reads_what_it_would_read_at_the_end_of_its_path(seed, before, width, kind) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(max(0, i - 3), i, (), generator=generator)) for i in range(1, width)]
    sees = torch.eye(width, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    queries, weights, keys = drawn(seed, width, before + width)
    places = before + sees.sum(1) - 1
    plan = Plan(4, 2, search=kind)
    count = torch.full((width,), 7).minimum(places + 1)
    index = index_of(keys[:before], 4)
    result = found(search(queries, weights, places, count, index, plan, Branches(keys[before:], sees, places)))
    for node in range(width):
        path = [*range(before), *(before + sees[node].nonzero()[:, 0]).tolist()]
        expected = slow(queries[node], weights[node], keys[path], len(path) - 1, int(count[node]), plan)
        assert result[node] == sorted(path[s] for s in expected)


def test_evaluations_are_counted() -> None:
    assert evaluations(4096, Plan(32, 16, search="flat"), 128) == 4096
    assert evaluations(4096, Plan(32, 16), 128) == 127 + 18 * 32
    assert evaluations(17 * 32, Plan(32, 16), 128) == 17 * 32  # every block is searched
    assert evaluations(18 * 32, Plan(32, 16), 128) == 17 + 18 * 32
    assert evaluations(4096, Plan(32, 16, forced="inside"), 128) == 127 + 16 * 32
    assert evaluations(4096, Plan(32, 16, search="blocks"), 128) == 127
    assert evaluations(4096, Plan(32, 16, ratio=4.0), 128) == 127 + 34 * 32


# ------------------------------------------------------------------------------------------------- the indexer


def test_scores_are_weighted_sums_of_rectified_products() -> None:
    queries, weights, keys = drawn(0, 3, 7)
    expected = torch.einsum("qh,qhn->qn", weights, torch.einsum("qhd,nd->qhn", queries, keys).relu())
    assert torch.equal(score(queries, weights, keys), expected)
    assert torch.equal(score(queries, weights, keys.expand(3, -1, -1)), expected)


def test_an_index_score_depends_on_distance_alone_where_states_are_equal() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        indexer = LightningIndexer(8, 8, 2, 8)
        query_states, key_states = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    scores = [
        score(*indexer.queries(query_states, torch.tensor([at + 5])), indexer.keys(key_states, torch.tensor([at])))
        for at in (0, 1, 400)
    ]
    assert torch.allclose(scores[0], scores[1], atol=1e-5) and torch.allclose(scores[0], scores[2], atol=1e-4)
    moved = score(*indexer.queries(query_states, torch.tensor([90])), indexer.keys(key_states, torch.tensor([0])))
    assert not torch.allclose(scores[0], moved, atol=1e-4)
    still = turn(torch.ones(1, 8), torch.tensor([9]))
    assert torch.equal(still[:, 4:], torch.ones(1, 4)) and not torch.allclose(still[:, :4], torch.ones(1, 4))


def test_what_is_looked_at_is_the_models_attention() -> None:
    lm = tiny_lm()
    ids, places = prompts_of(30)[0], torch.tensor([29, 3, 11])
    found_looks = looks(lm.model, ids, places)
    lm.model.set_attn_implementation("eager")
    true = lm.model(torch.tensor([ids]), output_attentions=True).attentions
    for look, weights in zip(found_looks, true, strict=True):
        assert torch.allclose(look.attention(), weights[0, :, places].mean(0), atol=1e-5)


def test_an_indexer_learns_where_attention_goes() -> None:
    lm = tiny_lm()
    rotation = rotation_of(lm.model)
    texts = prompts_of(*[96] * 120, seed=5)
    check = looks(lm.model, prompts_of(96, seed=6)[0], torch.arange(60, 96))
    untrained = fresh(check, 0)
    *_, (indexers, loss) = distil(lm.model, rotation, texts)
    for before, after, look in zip(untrained, indexers, check, strict=True):
        assert divergence(after, look, rotation) < 0.95 * divergence(before, look, rotation)
        share, best = captured(after, look, rotation, 20)
        assert captured(before, look, rotation, 20)[0] < share <= best + 1e-6
    assert loss > 0


def test_own_texts_are_samples_of_the_model() -> None:
    lm = tiny_lm()
    texts = own_texts(lm.model, 3, 20, seed=0)
    assert [len(text) for text in texts] == [20] * 3 and len({tuple(text) for text in texts}) == 3
    assert own_texts(lm.model, 3, 20, seed=0) == texts != own_texts(lm.model, 3, 20, seed=1)


# ------------------------------------------------------------------------------------------------- in a model


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def ready(lm: LM, **options: object) -> HISA:
    policy = HISA(**{**SMALL, **options})
    policy.prepare(lm.model)
    return policy


def target_of(lm: LM, policy: HISA | None) -> Target:
    return Target(lm.model, None, None if policy is None else policy.attach(lm.model.config))


def written(lm: LM, policy: HISA | None, prompts=RAGGED, new: int = 40, draft=None) -> list[list[int]]:
    return run(lm, None, prompts, new, draft, target=target_of(lm, policy))


KINDS = [
    {},
    {"prefill": "sparse"},
    {"search": "flat"},
    {"search": "blocks"},
    {"forced": "inside", "ratio": 4.0, "read": "20%"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_pass_reads_what_the_search_says(lm: LM, options: dict) -> None:
    """One layer, computed in the open: index scores of all tokens, the search, attention to what it found."""
    policy = ready(lm, **options)
    prompt, rotation = prompts_of(75)[0], rotation_of(lm.model)
    block, at, out = lm.model.model.layers[0], 60 if policy.prefill == "sparse" else 74, {}
    target = target_of(lm, policy)
    handle = block.self_attn.o_proj.register_forward_pre_hook(lambda module, args: out.update(x=args[0]))
    with attached(lm.model):
        target.prefill([prompt[:at]])
        target.score(TokenTree.chains([prompt[at:]]))
    handle.remove()
    layer = target.cache.token_layers[0]
    keys, values = layer.keys[0], layer.values[0]
    embedded = lm.model.model.embed_tokens(torch.tensor([prompt])).detach()
    hidden = block.input_layernorm(embedded)
    query = block.self_attn.q_proj(hidden).view(75, 4, 8).transpose(0, 1)
    raw = block.self_attn.k_proj(hidden).view(75, 2, 8).transpose(0, 1)
    order = torch.arange(75)
    assert torch.allclose(rotation(raw, order), keys, atol=1e-5)
    indexer = policy.layer(0).indexer
    queries, weights = indexer.queries(query, order)
    index_keys = indexer.keys(raw, order)
    count = int(policy.count(torch.tensor(75)))
    chosen = slow(queries[74], weights[74], index_keys, 74, count, policy.plan)
    if policy.plan.search != "blocks":
        assert len(chosen) == count
    turned, kv = rotation(query, order)[:, 74], torch.arange(4) // 2
    logits = torch.einsum("hd,hnd->hn", turned, keys[kv][:, chosen]) * 8**-0.5
    expected = torch.einsum("hn,hnd->hd", logits.softmax(-1), values[kv][:, chosen]).flatten()
    assert torch.allclose(out["x"][0, -1], expected, atol=1e-4)


def test_reading_everything_changes_nothing(lm: LM) -> None:
    assert written(lm, ready(lm, read="100%", prefill="sparse")) == written(lm, None)
    assert written(lm, ready(lm)) != written(lm, None)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_batch_is_its_sequences(lm: LM, options: dict) -> None:
    policy = ready(lm, **options)
    batch = written(lm, policy)
    for prompt, text in zip(RAGGED, batch, strict=True):
        assert written(lm, policy, [prompt]) == [text]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_drafts_change_nothing_and_leave_nothing_in_the_index(lm: LM, options: dict) -> None:
    import numpy as np

    policy = ready(lm, **options)
    plain_target, target = target_of(lm, policy), target_of(lm, policy)
    plain = run(lm, None, RAGGED, 48, target=plain_target)
    truth = [prompt + ids for prompt, ids in zip(RAGGED, plain, strict=True)]
    stream = np.random.default_rng(0)
    drafted = run(lm, None, RAGGED, 40, lambda texts: oracle(texts, truth, stream), target=target)
    assert drafted == [ids[:40] for ids in plain]
    for one, other in zip(plain_target.cache.token_layers, target.cache.token_layers, strict=True):
        for mine, theirs in zip(one.reader._indices, other.reader._indices, strict=True):
            size = min(mine.size, theirs.size)
            assert size > 60
            assert torch.allclose(mine.keys[:size], theirs.keys[:size], atol=1e-3)


@pytest.mark.parametrize("options", KINDS[:3], ids=str)
def test_left_padding_changes_nothing(lm: LM, options: dict) -> None:
    policy = ready(lm, **options)
    longest = max(map(len, RAGGED))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in RAGGED])
    cache = TokenCache(lm.model.config, None, policy.attach(lm.model.config))
    with attached(lm.model):
        out = lm.model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, do_sample=False, pad_token_id=0
        )
    assert out[:, longest:].tolist() == written(lm, policy, new=30)


def test_pieces_of_a_prompt_change_nothing(lm: LM) -> None:
    policy, prompt = ready(lm, prefill="sparse"), prompts_of(101)
    whole, pieces = target_of(lm, policy), target_of(lm, policy)
    with attached(lm.model):
        assert torch.allclose(whole.prefill(prompt), pieces.prefill(prompt, chunk=17), atol=1e-4)


def test_sequences_may_leave_come_twice_and_be_forgotten(lm: LM) -> None:
    policy = ready(lm)
    target = target_of(lm, policy)
    leave_and_repeat(lm, target, written(lm, policy, new=25))
    reader = target.cache.token_layers[0].reader
    assert reader.nbytes > 0 and reader._indices[0] is not reader._indices[2]
    forget(target)


def test_it_refuses_what_it_cannot_do(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"scripts/train_hisa_indexer\.py"):
        HISA(train=0).prepare(lm.model)
    with pytest.raises(UnsupportedModelError, match="another model"):
        HISA(weights=str(WEIGHTS)).prepare(lm.model)
    for family in ("gpt2", "gemma3"):
        with pytest.raises(UnsupportedModelError, match="rotary"):
            HISA(train=1).prepare(tiny_lm(family=family).model)
    with pytest.raises(RecipeError, match="prepare"):
        HISA().attach(lm.model.config)
    with pytest.raises(InputError, match="no indexer"):
        HISA(weights=str(tmp_path)).prepare(lm.model)
    with pytest.raises(OptionError, match="at least 16"):
        HISA(read=64, block=4, blocks=15)
    with pytest.raises(OptionError, match="share"):
        HISA(read="64MB")
    with pytest.raises(RecipeError, match="its index holds every token"):
        Recipe.parse("hisa + keyformer")


def test_blocks_that_are_read_whole_may_be_larger_than_the_budget() -> None:
    seen = torch.tensor([3, 100])
    assert HISA(read=8, block=32, search="blocks").most(seen).tolist() == [3, 32]
    assert HISA(read=8, block=32).most(seen).tolist() == [3, 8]


@pytest.mark.real
def test_the_shipped_indexer_finds_most_of_the_attention() -> None:
    lm = load("smollm2")
    rotation, policy = rotation_of(lm.model), HISA(train=0)
    policy.prepare(lm.model)  # it belongs to the model: nothing is trained
    ids = lm.tokenizer(prose()[:8000], verbose=False)["input_ids"][:1024]
    shares = [
        captured(policy.layer(number).indexer, look, rotation, 128)
        for number, look in enumerate(looks(lm.model, ids, torch.arange(512, 1024, 16)))
    ]
    found, best = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    assert found > 0.85 * best
