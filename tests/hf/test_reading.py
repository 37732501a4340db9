"""What a layer reads and what leaves a cache: readers and takers against the ordinary attention and a full cache."""

import pytest
import torch

from tokenary.core.budget import Budget
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.token_map import Select
from tokenary.core.tree import TokenTree
from tokenary.hf.cache import TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.base import KeepLayer, KeepPolicy, ReadLayer, ReadPolicy
from tokenary.models import tiny_lm

PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3], [10, 11] * 5]
TREE = TokenTree.stack([([4, 9, 8, 2], [-1, 0, 0, 1]), ([7, 7], [-1, 0]), ([3, 1, 2], [-1, 0, 1])])
PATHS = [[0, 1, 3], [0], [0, 1]]


class Slow(ReadLayer):
    """Reads everything, one query at a time."""

    def __init__(self, policy):
        self.policy = policy
        self.unrotated = policy.frequencies is not None

    def attend(self, layer, query, key, value, mask, scale):
        self.policy.calls += 1
        batch, heads, width, size = query.shape
        groups = heads // key.shape[1]
        if self.unrotated:
            query, key = (self.rotate(x, layer, where) for x, where in ((query, "new"), (key, "all")))
        output = torch.empty(batch, width, heads, size)
        for head in range(heads):
            for at in range(width):
                logits = (key[:, head // groups] @ query[:, head, at, :, None])[..., 0] * scale
                if mask is not None:
                    logits = logits + mask[:, 0, (head % groups) * width + at]
                elif width > 1:
                    logits[:, key.shape[2] - width + at + 1 :] = float("-inf")
                output[:, at, head] = (logits.softmax(-1)[:, None] @ value[:, head // groups])[:, 0]
        return output

    def rotate(self, states, layer, where):
        new = layer.shared[0].positions.clamp(min=0)
        held = torch.arange(layer.fill).expand(len(new), -1)
        positions = new if where == "new" else torch.cat([held, new], dim=1)
        angles = positions[:, None, :, None] * self.policy.frequencies
        cos, sin = angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2)
        one, other = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-other, one], dim=-1) * sin

    def select_rows(self, rows):
        self.policy.rows.append(list(rows))


class Everything(ReadPolicy):
    def __init__(self):
        self.calls, self.rows, self.frequencies = 0, [], None

    def layer(self, index):
        return Slow(self)


def logits_of(target):
    """Logits after ragged prompts, of a tree, and after its accepted paths and a shorter batch."""
    with attached(target.model):
        found = [target.prefill(PROMPTS), target.score(TREE)[:, :2]]
        target.commit(PATHS)
        target.select_rows([1, 0])
        found.append(target.score(TokenTree.roots([4, 5])))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("unrotated", [False, True])
def test_a_reader_of_everything_changes_nothing(family, unrotated):
    model = tiny_lm(seed=3, family=family).model
    policy = Everything()
    if unrotated:
        policy.frequencies = model.model.rotary_emb.inv_freq
    found = logits_of(Target(model, readers=policy.attach(model.config)))
    for one, other in zip(found, logits_of(Target(model)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert policy.calls == 3 * model.config.num_hidden_layers and policy.rows[-1] == [1, 0]


def test_layers_are_not_told_different_rotations():
    model, policy = tiny_lm(family="gemma3").model, Everything()
    policy.frequencies = torch.ones(4)
    with pytest.raises(UnsupportedModelError, match="unrotated"):
        TokenCache(model.config, readers=policy.attach(model.config))


class Taker(KeepLayer):
    """Keeps the newest four tokens and remembers the others."""

    takes = True

    def __init__(self, policy):
        super().__init__(policy)
        self.gone = []

    def choose(self, row, held, kept):
        return Select(torch.arange(held - kept, held), num_tokens=held)

    def take(self, row, chosen, keys, values, positions):
        left = positions.shape[-1] - chosen.shape[-2]
        self.gone.append((row, keys[:, :left].clone(), values[:, :left].clone(), positions[:, :left].clone()))


class Four(KeepPolicy):
    def __init__(self):
        super().__init__(keep=Budget(tokens=4), interval=2)

    def layer(self, index):
        return Taker(self)


def test_what_leaves_is_shown_before_it_leaves():
    model, policy = tiny_lm(seed=3).model, Four()
    full, taking = Target(model), Target(model, policy.attach(model.config, torch.float32))
    prompt = [5, 6, 7, 8, 9, 3, 2, 1, 4]
    with attached(model):
        for target in (full, taking):
            target.prefill([prompt])
    layer, whole = taking.cache.token_layers[0], full.cache.token_layers[0]
    (row, keys, values, positions) = layer.policy.gone[0]
    assert row == 0 and positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.equal(torch.cat([keys, layer.keys[0, :, :4]], 1), whole.keys[0, :, :9])
    assert torch.equal(torch.cat([values, layer.values[0, :, :4]], 1), whole.values[0, :, :9])


def test_new_tokens_see_only_the_slots_they_may():
    """Two new tokens that each see another part of the past: what each says equals a text of that part alone."""
    model = tiny_lm(seed=3).model
    target, prompts = Target(model), [[5, 6, 7, 8], [9, 3, 2, 1, 4, 6, 6]]
    with attached(model):
        target.prefill(prompts)
        target.select_rows([0])  # the longer one leaves
        visible = torch.tensor([[[True, True, False, False], [True, True, True, True]]])
        ids, positions = torch.tensor([[11, 12]]), torch.tensor([[4, 5]])
        found = target.forward(ids, positions, torch.eye(2, dtype=torch.bool)[None], visible)
    alone = torch.full((1, 1, 6, 6), float("-inf")).triu(1)
    alone[0, 0, 4, 2:4], alone[0, 0, 5, 4] = float("-inf"), float("-inf")
    expected = model(torch.tensor([[*prompts[0], 11, 12]]), attention_mask=alone).logits[:, 4:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
