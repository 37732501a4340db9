"""TokenSelect against the obvious formulation: token by token, chunk by chunk, with plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.errors import OptionError, RecipeError, UnsupportedModelError
from tokenary.core.laws import check_class
from tokenary.core.recipe import Recipe
from tokenary.core.tree import TokenTree
from tokenary.hf.cache import TokenCache
from tokenary.hf.rotation import rotation_of
from tokenary.hf.target import Target, attached
from tokenary.memory.read_laws import READ_LAWS
from tokenary.memory.token_select import TokenSelect
from tokenary.memory.token_select.reuse import parents_of
from tokenary.memory.token_select.votes import pooled, votes
from tokenary.models import tiny_lm

TEXT = [(11 * i * i + 3 * i) % 97 for i in range(80)]
OPTIONS = {"read": 6, "sinks": 2, "local": 8, "chunk": 8}


@pytest.mark.parametrize(
    "options",
    [{}, {"reuse": 0.7}, {"vote": "hard", "scale": "width"}, {"vote": "raw"}, {"pool": 3, "reuse": 0.9}],
    ids=str,
)
def test_it_keeps_the_laws_of_reading(options):
    report = check_class(TokenSelect, READ_LAWS, **options)
    assert report.ok, str(report)


def slow_logits(lm, text, prompt, sinks, read, local, chunk, reuse=1.0):
    """Logits at every token behind the prompt, and how often a choice was reused, from the model's own modules."""
    model, rotation = lm.model.model, rotation_of(lm.model)
    config = lm.model.config
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden = model.embed_tokens(torch.tensor(text))
    parts = [range(a, min(a + chunk, prompt)) for a in range(0, prompt, chunk)]
    parts += [range(a, a + 1) for a in range(prompt, len(text))]
    reused = 0
    for block in model.layers:
        normed, attn = block.input_layernorm(hidden), block.self_attn
        q = attn.q_proj(normed).view(-1, heads, size)
        k = attn.k_proj(normed).view(-1, kv, size)
        v = attn.v_proj(normed).view(-1, kv, size)
        output, last = torch.zeros(len(text), heads, size), None
        for part in parts:
            n = part.stop
            places = list(range(n))
            if n > sinks + read + local:
                turned = rotation(q[part.start : n].transpose(0, 1), torch.arange(local, local + len(part))).mean(1)
                if last is None or torch.cosine_similarity(turned.flatten(), last[0], dim=0) < reuse:
                    score = torch.zeros(n)
                    for head in range(heads):
                        logits = k[sinks : n - local, head // (heads // kv)] @ turned[head]
                        score[sinks : n - local] += logits.softmax(0)
                    score = score.bfloat16()  # equal tokens are equal: the earlier one wins
                    order = sorted(range(sinks, n - local), key=lambda at: (-float(score[at]), at))
                    last = turned.flatten(), sorted(order[:read])
                else:
                    reused += 1
                places = [*range(sinks), *last[1], *range(n - local, n)]
            for at in part:
                mine = [place for place in places if place <= at]
                where = torch.arange(len(mine))
                for head in range(heads):
                    keys = rotation(k[mine, head // (heads // kv)], where)
                    query = rotation(q[at, head], torch.tensor(len(mine) - 1))
                    weights = (keys @ query * size**-0.5).softmax(0)
                    output[at, head] = weights @ v[mine, head // (heads // kv)]
        hidden = hidden + attn.o_proj(output.flatten(1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return lm.model.lm_head(model.norm(hidden))[prompt - 1 :], reused


@pytest.mark.parametrize("reuse", [1.0, 0.6])
@pytest.mark.parametrize("layers", [1, 3])
@torch.inference_mode()
def test_logits_are_those_of_the_slow_formulation(reuse, layers):
    lm = tiny_lm(seed=4, layers=layers)
    expected, reused = slow_logits(lm, TEXT, 50, 2, 6, 8, 8, reuse)
    policy = TokenSelect(**OPTIONS, reuse=reuse)
    policy.prepare(lm.model)
    target = Target(lm.model, readers=policy.attach(lm.model.config))
    with attached(lm.model):
        found = [target.prefill([TEXT[:50]])]
        for width in (1, 3, 26):
            start = target.lengths[0]
            found += target.score(TokenTree.chains([TEXT[start : start + width]]))[0].split(1)
            target.commit([range(width)])
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-3, rtol=1e-3)
    assert sum(layer.reader.cache.reused for layer in target.cache.token_layers) == reused
    assert (reused > 0) == (reuse < 1)


def test_accepted_branches_carry_their_choice():
    """After a tree, what is reused is the choice of the path that was accepted."""
    lm, options = tiny_lm(seed=4), {**OPTIONS, "reuse": 0.5}
    policies = [TokenSelect(**options) for _ in range(2)]
    targets = []
    for policy in policies:
        policy.prepare(lm.model)
        targets.append(Target(lm.model, readers=policy.attach(lm.model.config)))
    tree = TokenTree.stack([([4, 9, 8, 2, 9], [-1, 0, 0, 1, 2])])
    with attached(lm.model):
        for target in targets:
            target.prefill([TEXT[:50]])
        targets[0].score(tree)
        targets[0].commit([[0, 2, 4]])
        for token in (4, 8, 9):
            targets[1].score(TokenTree.roots([token]))
            targets[1].commit([[0]])
        one, other = (target.score(TokenTree.roots([5])) for target in targets)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    states = [[layer.reader.cache.last(0).ranks.tolist() for layer in t.cache.token_layers] for t in targets]
    assert states[0] == states[1]


def test_soft_votes_cannot_be_drowned():
    """One head with huge logits decides raw votes, and has no more than one vote among soft ones."""
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0, 0] = torch.tensor([900.0, 0, 0, 0])
    logits[0, 1:, 0] = torch.tensor([0.0, 0, 5, 5])
    everyone, one = torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([[1]])
    assert votes(logits, everyone, one, "raw").argmax() == 0
    soft = votes(logits, everyone, one, "soft")[0, 0]
    assert soft[0] < 1.1 and soft.sum() == pytest.approx(3, abs=0.05)
    assert votes(logits, everyone, one, "hard")[0, 0].tolist() == [1, 0, 2, 0]
    assert votes(logits, everyone & False, one, "none").max() == float("-inf")


def test_votes_are_for_candidates_only():
    logits, candidates = torch.randn(1, 2, 1, 5), torch.tensor([[[False, True, True, False, True]]])
    for vote in ("soft", "hard", "raw"):
        found = votes(logits, candidates, torch.tensor([[2]]), vote)
        assert torch.equal(found > float("-inf"), candidates)
    alone = votes(logits[..., candidates[0, 0]], torch.ones(1, 1, 3).bool(), torch.tensor([[2]]), "soft")
    torch.testing.assert_close(votes(logits, candidates, torch.tensor([[2]]), "soft")[candidates], alone[0, 0])


@given(st.permutations(range(6)))
def test_neighbours_are_neighbours_in_the_text(order):
    scores = torch.tensor([[[0.0, 5, 1, 2, 9, 3]]])
    places = torch.tensor([[order]])
    shuffled = torch.zeros_like(scores)
    shuffled[0, 0] = scores[0, 0, order]  # slot s holds the token of rank order[s]
    found = pooled(shuffled, places, 3)
    assert found[0, 0].tolist() == [[5.0, 5, 5, 9, 9, 9][rank] for rank in order]


def test_parents_are_the_nearest_ancestors():
    tree = TokenTree.stack([([1, 2, 3, 4, 5], [-1, 0, 0, 1, 3])])
    assert parents_of(torch.from_numpy(tree.ancestors)[0]) == [-1, 0, 0, 1, 3]


def test_longer_than_the_context_no_key_stands_far():
    """Keys are never rotated by more than the length of the list."""
    lm = tiny_lm(seed=4)
    policy = TokenSelect(**OPTIONS)
    policy.prepare(lm.model)
    seen, rotation = [], policy.rotation

    def watched(states, positions):
        seen.append(int(positions.max()))
        return rotation(states, positions)

    policy.rotation = watched
    target = Target(lm.model, readers=policy.attach(lm.model.config))
    with attached(lm.model):
        target.prefill([TEXT * 9])
        target.score(TokenTree.roots([1]))
    assert max(seen) < 2 + 6 + 8 + 8


def test_models_and_mates_that_do_not_fit_are_refused():
    for family, match in (("gpt2", "rotary"), ("gemma3", "sliding")):
        with pytest.raises(UnsupportedModelError, match=match):
            TokenSelect().prepare(tiny_lm(family=family).model)
    with pytest.raises(RecipeError, match="unrotated"):
        Recipe.parse("token-select + recent")
    with pytest.raises(OptionError, match="odd"):
        TokenSelect(pool=2)
    lm, policy = tiny_lm(), TokenSelect(**OPTIONS)
    policy.prepare(lm.model)
    cache = TokenCache(lm.model.config, readers=policy.attach(lm.model.config))
    with attached(lm.model), pytest.raises(UnsupportedModelError, match="generate"):
        lm.model.generate(torch.tensor([TEXT]), past_key_values=cache, max_new_tokens=2, pad_token_id=0)
