"""What read policies share, and the controls, against the obvious formulation."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.laws import check_class
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.memory.read_base import PartialLayer, PartialRead, Seen, attend_to, highest, listed
from tokenary.memory.read_laws import READ_LAWS
from tokenary.memory.read_oracle import ReadOracle
from tokenary.memory.read_random import ReadRandom
from tokenary.memory.read_recent import ReadRecent
from tokenary.models import tiny_lm

PROMPT = [(7 * i) % 97 for i in range(60)]
CONTROLS = [ReadRandom, ReadRecent, ReadOracle]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (ReadRandom, {}),
        (ReadRandom, {"recent": 0, "seed": 3}),
        (ReadRecent, {}),
        (ReadRecent, {"sinks": 0}),
        (ReadOracle, {}),
    ],
)
def test_controls_keep_the_laws_of_reading(policy, options):
    report = check_class(policy, READ_LAWS, **options)
    assert report.ok, str(report)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 14), st.integers(0, 11))
def test_highest_takes_the_earlier_of_equal_scores(values, count, hidden):
    scores = torch.tensor(values, dtype=torch.float)
    scores[: hidden % len(values)] = float("-inf")
    order = sorted(range(len(values)), key=lambda at: (-scores[at], at))
    expected = {at for at in order[:count] if scores[at] > float("-inf")}
    found = highest(scores[None], torch.tensor([count]))[0]
    assert set(found.nonzero()[:, 0].tolist()) == expected


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_lists_hold_the_sets(rows):
    chosen = torch.tensor(rows)
    slots, real = listed(chosen)
    for row, (at, is_real) in enumerate(zip(slots, real, strict=True)):
        assert at[is_real].tolist() == chosen[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("lists", [1, 2, 4])
def test_attending_to_lists_is_attending_under_a_mask(lists):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 19, 8, generator=generator), torch.randn(2, 2, 30, 8, generator=generator)
    value = torch.randn(2, 2, 30, 6, generator=generator)
    chosen = torch.rand(2, lists, 19, 30, generator=generator) < 0.3
    chosen[..., 0] = True
    found = attend_to(query, key, value, *listed(chosen), 0.3)
    mask = chosen.repeat_interleave(4 // lists, dim=1)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(found, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


def chosen_by(policy, n=40, width=3):
    """What the layer of a policy chooses for the last tokens of a chain, (Hq or Hkv or 1, W, N)."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 4, width, 8, generator=generator), torch.randn(1, 2, n, 8, generator=generator)
    mask = torch.full((width, n), float("-inf")).triu(n - width + 1).repeat(2, 1)[None, None]
    seen = Seen.of(mask, width, key)
    state = policy.layer(1)
    state.index = 1
    return state.choose(None, query, key, seen, policy.count(seen.total))[0], query, key


def test_the_oracle_reads_the_largest_logits():
    chosen, query, key = chosen_by(ReadOracle(read=5))
    for head in range(4):
        for at in range(3):
            logits = key[0, head // 2, : 38 + at] @ query[0, head, at]
            assert set(chosen[head, at].nonzero()[:, 0].tolist()) == set(logits.topk(5).indices.tolist())


def test_sinks_and_window():
    chosen, _, _ = chosen_by(ReadRecent(read=6, sinks=2))
    assert [row.nonzero()[:, 0].tolist() for row in chosen[0]] == [[0, 1, *range(n - 4, n)] for n in (38, 39, 40)]


def test_random_sets_differ_by_head_and_stay():
    chosen, _, _ = chosen_by(ReadRandom(read=10, recent=0.3))
    assert chosen.shape[0] == 2 and not torch.equal(chosen[0], chosen[1])
    assert (chosen.sum(-1) == 10).all()
    assert chosen[:, 0, 35:38].all() and not chosen[:, 0, 38:].any()
    assert (chosen[:, 0, :35] & chosen[:, 2, :35]).sum() >= 2 * 5  # what was read is read again, but for what moved


def test_a_share_is_of_what_a_query_sees():
    seen = torch.tensor([[3, 40, 100]])
    assert ReadOracle(read="25%").count(seen).tolist() == [[1, 10, 25]]
    assert ReadOracle(read=30).count(seen).tolist() == [[3, 30, 30]]
    with pytest.raises(OptionError, match="read"):
        ReadOracle(read="1MB")


@pytest.mark.parametrize("policy", CONTROLS)
def test_reading_less_changes_logits(policy):
    """Else the laws would hold for a policy that does nothing."""
    lm, made = tiny_lm(), policy(read=5)
    full, part = Target(lm.model), Target(lm.model, readers=made.attach(lm.model.config))
    with attached(lm.model):
        one, other = (target.prefill([PROMPT]) for target in (full, part))
        assert torch.equal(one, other)  # the prompt reads everything
        tree = TokenTree.roots([3])
        assert not torch.allclose(full.score(tree), part.score(tree), atol=1e-3)


# -------------------------------------------------------------------------------------- readers that are wrong


class Wrong(PartialRead):
    """Reads the newest tokens; the base of the wrong ones."""

    state: type[PartialLayer]

    def __init__(self, read: Budget = Budget(tokens=64)) -> None:  # noqa: B008
        super().__init__(read)

    def layer(self, index):
        return self.state(self)


class Newest(PartialLayer):
    def choose(self, layer, query, key, seen, count):
        return (seen.slots & (seen.ranks >= (seen.total - count)[..., None]))[:, None]


class BySlot(Newest):
    """Counts slots, so that neighbours and drafts change what is read."""

    def choose(self, layer, query, key, seen, count):
        far = torch.arange(key.shape[2]) >= key.shape[2] - count[..., None]
        own = seen.ranks == (seen.total - 1)[..., None]
        return (seen.slots & (far | own))[:, None]


class TooMany(Newest):
    def choose(self, layer, query, key, seen, count):
        return super().choose(layer, query, key, seen, count + 1)


class ByPass(Newest):
    """Lets the other new tokens of the pass choose with it."""

    def choose(self, layer, query, key, seen, count):
        return super().choose(layer, query, key, seen, (count - query.shape[2] + 1).clamp(min=1))


class ByRow(Newest):
    def choose(self, layer, query, key, seen, count):
        return super().choose(layer, query, key, seen, (count - torch.arange(len(count))[:, None]).clamp(min=1))


class Peeks(Newest):
    def choose(self, layer, query, key, seen, count):
        return torch.ones_like(seen.slots)[:, None] & (torch.arange(key.shape[2]) >= key.shape[2] - count.amax())


def broken(state, monkeypatch):
    monkeypatch.setattr(Wrong, "state", state, raising=False)
    laws = tuple(law for law in READ_LAWS if law.__name__ != "the_recipe_survives_json")
    monkeypatch.setattr(
        sys.modules[__name__],
        "CARD",
        Card(slug="here", cls="Wrong", room="memory", title="", summary="", slot="read"),
        raising=False,
    )
    return {finding.law for finding in check_class(Wrong, laws).broken}


@pytest.mark.parametrize(
    ("state", "law"),
    [
        (BySlot, "a batch is its sequences"),
        (TooMany, "a query reads no more than it may"),
        (ByPass, "drafts change nothing"),
        (ByRow, "a batch is its sequences"),
        (Peeks, "a query reads no more than it may"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_reader_is_caught(state, law, monkeypatch):
    assert law in broken(state, monkeypatch)


def test_a_right_reader_breaks_nothing(monkeypatch):
    assert not broken(Newest, monkeypatch)
