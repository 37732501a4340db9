from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenary.memory.still.branches import Exact, State
from tokenary.memory.still.hybrid import Plan, hybrid_attention
from tokenary.memory.still.maps import LEAST, HedgehogMap, Maps, NormMap, fresh_maps
from tokenary.memory.still.routing import EPS, Routing, Rule, leaving, prompt_saliency, self_saliency, staying

HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 8, 12
SCALE = SIZE**-0.5
ROUTINGS: list[Routing] = ["saliency", "recent", "random"]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def states_of(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and hidden states of a text."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, tokens, SIZE), (KV_HEADS, tokens, SIZE), (KV_HEADS, tokens, SIZE), (tokens, HIDDEN)
    query, key, value, hidden = (torch.randn(*shape, generator=generator) for shape in shapes)
    return 3 * query, 2 * key, value, 0.3 * hidden


def maps_of(features: str = "norm", seed: int = 0) -> Maps:
    (maps,) = fresh_maps(1, seed, features, heads=HEADS, size=SIZE, hidden=HIDDEN)
    return maps.requires_grad_(False)


# ------------------------------------------------------------------------------------------------- saliency


def slow_saliency(query: Tensor, key: Tensor, chunk: int) -> Tensor:
    """Score of every token, said as in the paper."""
    heads, tokens, _ = query.shape
    scores = torch.zeros(len(key), tokens)
    for head in range(heads):
        for t in range(tokens):
            window = range(max(0, t - chunk + 1), t + 1)
            logits = [float(query[head, t] @ key[head * len(key) // heads, i]) * SCALE for i in window]
            full = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
            rest = sum(map(math.exp, logits[:-1]))
            without = [math.exp(x) / rest for x in logits[:-1]] + [0.0]
            kl = sum(a * math.log((a + EPS) / (b + EPS)) for a, b in zip(full, without, strict=True))
            scores[head * len(key) // heads, t] += kl / (heads // len(key))
    return scores


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 30), chunk=st.integers(2, 9), data=st.data())
def test_saliency_is_that_of_the_paper_in_any_piece_of_a_prompt(seed, tokens, chunk, data) -> None:
    query, key, _, _ = states_of(tokens, seed)
    first = data.draw(st.integers(0, tokens - 1))
    expected = slow_saliency(query, key, chunk)
    torch.testing.assert_close(prompt_saliency(query[:, first:], key, SCALE, chunk), expected[:, first:])


def test_a_token_that_looks_at_itself_alone_is_salient() -> None:
    own = torch.tensor([False, False, True])
    scores = self_saliency(torch.tensor([[0.0, 0.0, -9.0], [0.0, 0.0, 0.0], [0.0, 0.0, 9.0]]), own)
    assert scores[0] < scores[1] < scores[2] and scores[2] > 15
    first = self_saliency(torch.tensor([[float("-inf"), float("-inf"), 0.3]]), own)
    assert torch.allclose(first, torch.tensor(-math.log(EPS)), atol=1e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_stays_and_what_leaves(routing: Routing) -> None:
    rule = Rule(chunk=6, salient=2, routing=routing)
    scores = torch.tensor([[0.0, 5, 1, 2, 9, 3], [7, 0, 1, 8, 2, 3]])
    stay = staying(rule, 4, scores, layer=1, number=3)
    expected = {"saliency": [[0, 1, 2, 3, 5, 8], [0, 1, 2, 3, 4, 7]], "recent": [[4, 5, 6, 7, 8, 9]] * 2}
    if routing == "random":
        assert (stay[:, :4] == torch.arange(4)).all() and (stay[:, 4:] >= 4).all() and (stay.diff() > 0).all()
        assert torch.equal(stay, staying(rule, 4, torch.zeros(2, 6), 1, 3))
        others = [staying(rule, 4, scores, 1, number) for number in range(4, 8)]
        assert not all(torch.equal(stay, other) for other in others)
    else:
        assert stay.tolist() == expected[routing]
    for kept, gone in zip(stay.tolist(), leaving(stay, 10).tolist(), strict=True):
        assert sorted(kept + gone) == list(range(10)) and gone == sorted(gone)


def test_heads_that_share_a_key_head_share_its_salient_tokens() -> None:
    query, key, _, _ = states_of(16, seed=3)
    scores = prompt_saliency(query, key, SCALE, 4)
    each = prompt_saliency(query, key.repeat_interleave(2, 0), SCALE, 4)
    assert torch.allclose(scores, each.view(KV_HEADS, 2, -1).mean(1))


# ------------------------------------------------------------------------------------------------- the maps


def test_the_norm_map_reflects_turns_and_gives_the_norm_back() -> None:
    torch.manual_seed(0)
    found, states = NormMap(HEADS, SIZE), torch.randn(HEADS, 5, SIZE) * 4
    features = found(states)
    for head in range(HEADS):
        unit = found.direction[head, 0] / found.direction[head, 0].norm()
        for token in range(5):
            x = states[head, token]
            z = found.weight[head] @ (x - 2 * unit * (unit @ x))
            x = x.norm() * z / z.norm()
            assert torch.allclose(x.norm(), states[head, token].norm())
            expected = torch.cat([x.softmax(0), (-x).softmax(0)]).clamp(min=LEAST)
            assert torch.allclose(features[head, token], expected)
    assert features.shape == (HEADS, 5, 2 * SIZE) and bool((features > 0).all())
    with torch.no_grad():  # how long W's rows are says nothing
        found.weight *= 7
        found.direction *= -3
    assert torch.allclose(found(states), features)


def test_the_hedgehog_map_starts_at_the_identity_and_knows_no_norm() -> None:
    found, states = HedgehogMap(HEADS, SIZE), torch.randn(HEADS, 5, SIZE)
    assert torch.allclose(found(states), torch.cat([states.softmax(-1), (-states).softmax(-1)], -1))
    with torch.no_grad():
        found.weight *= 7
    assert not torch.allclose(found(states), torch.cat([states.softmax(-1), (-states).softmax(-1)], -1))


def test_gates_are_for_each_channel_and_start_alike() -> None:
    maps, hidden = maps_of(), torch.randn(3, 5, HIDDEN)
    gates = maps.gates(hidden)
    assert gates.shape == (3, HEADS, 5, SIZE)
    assert torch.allclose(gates, hidden.sum(-1).sigmoid()[:, None, :, None].expand_as(gates))
    maps.gate.weight[9] = 0  # head 1, channel 1
    assert torch.allclose(maps.gates(hidden)[:, 1, :, 1], torch.tensor(0.5))


# ------------------------------------------------------------------------------------------------- hybrid attention


def exact_tokens(rule: Rule, scores: Tensor, head: int, t: int) -> list[int]:
    """The tokens that a query at t attends to exactly."""
    chunk, current = rule.chunk, t // rule.chunk
    near = list(range(max(0, current - 1) * chunk, t + 1))
    if rule.routing == "recent":
        return list(range(max(0, current - 1) * (chunk - rule.salient), t + 1))
    chosen = [staying(rule, 0, scores[:, c * chunk : c * chunk + chunk], 0, c) + c * chunk for c in range(current - 1)]
    return [token for part in chosen for token in part[head].tolist()] + near


def slow(query, key, value, gates, scores, maps: Maps, rule: Rule) -> Tensor:
    """Hybrid attention, query by query, head by head."""
    output = torch.zeros_like(query)
    phi_q, phi_k = maps.query(query), maps.key(key.repeat_interleave(2, 0))
    for head in range(HEADS):
        keys, values = key[head // 2], value[head // 2]
        for t in range(query.shape[1]):
            exact = exact_tokens(rule, scores, head // 2, t)
            rest = [i for i in range(t + 1) if i not in exact]
            logits = keys[exact] @ query[head, t] * SCALE
            weights = (logits - logits.max()).exp()
            linear = phi_k[head, rest] @ phi_q[head, t]
            if rule.rescale:
                linear = linear * (-logits.max()).exp()
            above = weights @ values[exact] + gates[head, t] * (linear @ values[rest])
            output[head, t] = above / (weights.sum() + linear.sum())
    return output


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 45),
    chunk=st.integers(2, 9),
    routing=st.sampled_from(ROUTINGS),
    features=st.sampled_from(["norm", "hedgehog"]),
    rescale=st.booleans(),
    data=st.data(),
)
def test_the_form_for_prompts_is_the_sum_of_the_paper(seed, tokens, chunk, routing, features, rescale, data) -> None:
    rule = Rule(chunk, data.draw(st.integers(0, chunk)), routing, rescale)
    first = data.draw(st.integers(0, tokens - 1))
    query, key, value, hidden = states_of(tokens, seed)
    maps, scores = maps_of(features, seed), prompt_saliency(query, key, SCALE, chunk)
    gates = maps.gates(hidden)
    found = hybrid_attention(query[:, first:], key, value, gates[:, first:], scores, maps, rule, SCALE)
    torch.testing.assert_close(found, slow(query, key, value, gates, scores, maps, rule)[:, first:])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rescale", [False, True])
def test_prompts_and_decoding_agree_token_for_token(routing: Routing, rescale: bool) -> None:
    rule, tokens = Rule(6, 2, routing, rescale), 45
    query, key, value, hidden = states_of(tokens)
    maps, scores = maps_of(), prompt_saliency(query, key, SCALE, 6)
    gates = maps.gates(hidden)
    whole = hybrid_attention(query, key, value, gates, scores, maps, rule, SCALE)
    state, held = State.empty(maps, query), torch.empty(KV_HEADS, 0, dtype=torch.long)
    for t in range(tokens):
        held = torch.cat([held, torch.full((KV_HEADS, 1), t)], dim=1)
        keys, values = (x.gather(1, held[..., None].expand(-1, -1, SIZE)) for x in (key, value))
        logits = query[:, t : t + 1].unflatten(0, (KV_HEADS, -1)) * SCALE @ keys[:, None].mT
        read = state.read(maps.query(query[:, t : t + 1]))
        said = Exact.of(logits, values).joined(read, gates[:, t : t + 1], rescale)
        torch.testing.assert_close(said, whole[:, t : t + 1], rtol=1e-12, atol=1e-12)
        if (t + 1) % 6 == 0 and t >= 11:  # the chunk before the last is now two chunks old
            number = (t + 1) // 6 - 2
            older, pool = number * 2, slice(0, number * 2 + 6)
            stay = staying(rule, older, scores[:, number * 6 : number * 6 + 6], 0, number)
            gone = leaving(stay, older + 6)[..., None].expand(-1, -1, SIZE)
            state = state.add(maps, keys[:, pool].gather(1, gone), values[:, pool].gather(1, gone))
            held = torch.cat([held[:, pool].gather(1, stay), held[:, older + 6 :]], dim=1)
    assert bool(state.weights.min() > 0) and held.shape[1] == 6 * 2 + 6 + 3


@pytest.mark.parametrize("routing", ROUTINGS)
def test_with_every_token_salient_it_is_causal_softmax_attention(routing: Routing) -> None:
    query, key, value, hidden = states_of(41)
    maps, scores = maps_of(), prompt_saliency(query, key, SCALE, 8)
    found = hybrid_attention(query, key, value, maps.gates(hidden), scores, maps, Rule(8, 8, routing), SCALE)
    logits = query @ key.repeat_interleave(2, 0).mT * SCALE
    logits = logits.masked_fill(torch.ones(41, 41, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(found, logits.softmax(-1) @ value.repeat_interleave(2, 0), rtol=1e-12, atol=1e-12)


def test_two_chunks_are_exact() -> None:
    query, key, value, hidden = states_of(17)
    maps, scores = maps_of(), prompt_saliency(query, key, SCALE, 8)
    few, all_ = (
        hybrid_attention(query, key, value, maps.gates(hidden), scores, maps, Rule(8, salient), SCALE)
        for salient in (1, 8)
    )
    assert torch.allclose(few[:, :16], all_[:, :16]) and not torch.allclose(few[:, 16], all_[:, 16])


def test_gradients_reach_every_map() -> None:
    query, key, value, hidden = states_of(40)
    (maps,) = fresh_maps(1, 0, heads=HEADS, size=SIZE, hidden=HIDDEN)
    scores = prompt_saliency(query, key, SCALE, 8)
    plan = Plan.of(Rule(8, 2), scores, 40)
    said = plan.exact(query, key, value, SCALE).joined(plan.linear(query, key, value, maps), maps.gates(hidden), False)
    said.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in maps.parameters())
