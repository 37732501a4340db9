"""ZipCache against its definition: quantizers one number at a time, saliency one query at a time, segments by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.core.errors import OptionError, RecipeError
from tokenary.core.laws import check_class, laws_of
from tokenary.core.recipe import Recipe
from tokenary.core.sampling import Sampler
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Loop
from tokenary.decode.prompt_lookup import PromptLookup
from tokenary.hf.cache import TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.base import ReadLayer
from tokenary.memory.keyformer import Keyformer
from tokenary.memory.laws import RAGGED as PROMPTS
from tokenary.memory.zipcache import CARD, ZipCache
from tokenary.memory.zipcache import layer as zip_layer
from tokenary.memory.zipcache.packing import Codes, pack, unpack
from tokenary.memory.zipcache.quantizers import GROUP, SCHEMES
from tokenary.memory.zipcache.saliency import Chooser, normalize, probe_positions, received
from tokenary.memory.zipcache.segment import Segment, attend
from tokenary.models.tiny import tiny_lm

# ------------------------------------------------------------------------------------------------------ packing


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing_and_takes_no_more_than_the_bits(bits, size, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (3, 2, size), dtype=np.uint8))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and torch.equal(unpack(packed, bits, size), codes)
    if size % 8 == 0:
        assert packed.shape[-1] * 8 == bits * size


def test_the_bytes_are_as_described():
    assert pack(torch.tensor([[1, 2, 3, 0, 2, 1, 0, 3]], dtype=torch.uint8), 2).tolist() == [
        [1 | 3 << 2 | 2 << 4 | 0 << 6, 2 | 0 << 2 | 1 << 4 | 3 << 6]
    ]
    assert pack(torch.tensor([[5, 9, 15, 7]], dtype=torch.uint8), 4).tolist() == [[5 | 15 << 4, 9 | 7 << 4]]


# --------------------------------------------------------------------------------------------------- quantizers


def states(seed, heads=2, count=30, size=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, count, size, generator=generator)
    x[:, :, 3] = 20 + 5 * x[:, :, 3]  # a channel of large numbers
    x[0, 7] *= 6  # a large token
    x[1, :, 11] = 0.0
    x[1, :, 12] = 1.5
    return x


def split_sets(seed, heads=2, count=30, n_high=18):
    generator = torch.Generator().manual_seed(seed)
    salient = torch.zeros(heads, count, dtype=torch.bool)
    for head in range(heads):
        salient[head, torch.randperm(count, generator=generator)[:n_high]] = True
    orders = tuple(torch.stack([each.nonzero()[:, 0] for each in mask]) for mask in (salient, ~salient))
    return salient, orders


def rounded(values, bits, least=None, most=None):
    """Round numbers to a grid between their least and their largest, one at a time; scales are float16."""
    least = np.float64(np.float16(min(values) if least is None else least))
    step = np.float64(np.float16((max(values) if most is None else most) - least)) / (2**bits - 1)
    if step == 0:
        return [least for _ in values]
    return [least + step * min(max(np.round((v - least) / step), 0), 2**bits - 1) for v in values]


def reference(x, salient, bits, scheme):
    """What is restored, by loops over heads, tokens and channels, float64."""
    x, out = x.double().numpy(), np.zeros(x.shape)
    heads, count, size = x.shape
    width = np.where(salient.numpy(), *bits)
    if scheme == "channel":
        for head, channel, each in itertools.product(range(heads), range(size), (True, False)):
            tokens = [i for i in range(count) if salient[head, i] == each]
            out[head, tokens, channel] = rounded(x[head, tokens, channel], bits[0] if each else bits[1])
    elif scheme == "group":
        for head, i, first in itertools.product(range(heads), range(count), range(0, size, GROUP)):
            out[head, i, first : first + GROUP] = rounded(x[head, i, first : first + GROUP], width[head, i])
    else:
        c = np.ones((heads, 1, size))
        if scheme == "separable":
            c = np.sqrt(np.abs(x).max(1, keepdims=True)).astype(np.float16).astype(float)
            c[c == 0] = 1
        even = x / c
        for i, head in itertools.product(range(count), range(heads)):
            out[head, i] = rounded(even[head, i], width[head, i], even[:, i].min(), even[:, i].max())
        out *= c
    return out


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("bits", [(4, 2), (3, 1), (8, 8)])
def test_quantizers_are_the_reference(scheme, bits):
    x, (salient, orders) = states(1), split_sets(2)
    made = SCHEMES[scheme].of(x, orders, bits, scheme == "separable")
    found = torch.empty_like(x)
    restored = made.restored(orders, torch.float32)
    for head in range(2):
        found[head, torch.cat(orders, 1)[head]] = restored[head]
    expected = torch.from_numpy(reference(x, salient, bits, scheme)).float()
    # A number half-way between two codes may fall on either side.
    near = (found - expected).abs() < 1e-3 * (1 + x.abs())
    assert near.float().mean() > 0.999
    assert (found - x).abs().max() < 3 * (expected - x).abs().max() + 1e-2


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("bits", [(4, 2), (16, 2), (16, 16)])
def test_products_without_restoring_are_those_with(scheme, bits):
    x, (_, orders) = states(3), split_sets(4)
    made = SCHEMES[scheme].of(x, orders, bits, scheme == "separable")
    query, weights = torch.randn(2, 5, 40), torch.rand(2, 5, 30)
    restored = made.restored(orders, torch.float32)
    torch.testing.assert_close(made.dot(query, orders), query @ restored.mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(made.mix(weights, orders), weights @ restored, rtol=1e-4, atol=1e-3)
    if bits == (16, 16):
        assert torch.equal(restored, torch.stack([x[h, torch.cat(orders, 1)[h]] for h in range(2)]))


def test_separable_scales_tame_channels_and_cost_one_number_each():
    x, (_, orders) = states(5), split_sets(6)
    errors, sizes = {}, {}
    for scheme, kind in SCHEMES.items():
        made = kind.of(x, orders, (4, 4), scheme == "separable")
        back = torch.stack([x[h, torch.cat(orders, 1)[h]] for h in range(2)])
        calm = [c for c in range(40) if c != 3]
        errors[scheme] = float((made.restored(orders, torch.float32) - back)[..., calm].norm())
        sizes[scheme] = sum(tensor.nbytes for tensor in made.tensors())
    codes = 2 * 30 * 40 // 2
    assert errors["separable"] < 0.5 * errors["token"]
    assert sizes == {
        "channel": codes + 2 * 2 * (2 * 2 * 40),
        "separable": codes + 2 * 2 * 30 + 2 * 2 * 40,
        "token": codes + 2 * 2 * 30,
        "group": codes + 2 * 2 * (2 * 30 * 2),
    }


def test_constant_and_huge_numbers_are_held():
    x = torch.full((1, 4, 8), 3.0)
    x[0, :, 0] = 0.0
    orders = [torch.arange(4)[None]]
    for scheme, kind in SCHEMES.items():
        made = kind.of(x, orders, [2], scheme == "separable")
        torch.testing.assert_close(made.restored(orders, torch.float32), x, rtol=2e-3, atol=2e-3)
        large = kind.of(1e6 * x, orders, [2], scheme == "separable")
        assert large.restored(orders, torch.float32).isfinite().all()
    assert Codes.of(torch.ones(1, 2), torch.ones(1), torch.zeros(1), 2).numbers(torch.float32).tolist() == [[0.0, 0.0]]


# ----------------------------------------------------------------------------------------------------- saliency


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.sampled_from(["both", "recent", "random", "all"]), st.floats(0.02, 1.0))
def test_probes_are_the_share_that_was_asked_for(count, kind, share):
    found = probe_positions(count, share, kind, 0, "x")
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < count
    if kind in ("both", "recent"):
        newest = min(count, max(1, round(count * share / (2 if kind == "both" else 1))))
        assert found[-newest:] == list(range(count - newest, count))
    if kind == "both":
        assert len(found) == min(count, 2 * newest)
    assert len(found) == count or kind != "all"


def test_random_probes_are_named_and_spread():
    counts = np.zeros(100)
    for seed in range(300):
        counts[probe_positions(100, 0.1, "both", seed, 3, 0)] += 1
    assert (counts[95:] == 300).all() and counts[:95].sum() == 1500
    assert abs(counts[:47].mean() - counts[47:95].mean()) < 3
    assert probe_positions(100, 0.1, "both", 0, 3, 0) != probe_positions(100, 0.1, "both", 0, 4, 0)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def attention_received(q, k, probes, first):
    """Attention summed over probes and heads, and how many probes see each token, by loops."""
    q, k = q.double().numpy(), k.double().numpy()
    total, visible = np.zeros((len(k), k.shape[1])), np.zeros(k.shape[1])
    group = len(q) // len(k)
    for number, p in enumerate(probes):
        visible[: p + 1] += 1
        for head in range(len(q)):
            x = np.array([q[head, number] @ k[head // group, j] / math.sqrt(q.shape[-1]) for j in range(p + 1)])
            total[head // group, : p + 1] += softmax(x)
    return total[:, first:], visible[first:]


@pytest.mark.parametrize(("count", "first", "kind"), [(40, 0, "both"), (150, 0, "all"), (60, 35, "both")])
def test_saliency_is_the_reference(count, first, kind):
    generator = torch.Generator().manual_seed(count)
    probes = [first + at for at in probe_positions(count - first, 0.2, kind, 1)]
    q = 2 * torch.randn(6, len(probes), 8, generator=generator)
    k = torch.randn(2, count, 8, generator=generator)
    total, visible = attention_received(q, k, probes, first)
    at = torch.tensor(probes)
    found = received(q, at, k, 8**-0.5, first)
    np.testing.assert_allclose(found.numpy(), total, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(normalize(found, at, first, "normalized").numpy(), total / visible, rtol=1e-4, atol=1e-6)
    lengths = count - np.arange(first, count)
    np.testing.assert_allclose(normalize(found, at, first, "length").numpy(), total / lengths, rtol=1e-4, atol=1e-6)
    assert torch.equal(normalize(found, at, first, "accumulated"), found)


def test_accumulated_attention_favours_early_tokens_and_normalized_does_not():
    """Every query looks everywhere alike: a token's share says only how many tokens there were."""
    q, k, at = torch.zeros(1, 50, 4), torch.zeros(1, 50, 4), torch.arange(50)
    total = received(q, at, k, 1.0)
    falling = total.diff()
    assert (falling < 0).all()
    ratio = total[0, 0] / total[0, -1], normalize(total, at, 0, "normalized")[0, [0, -1]]
    assert ratio[0] > 200 and ratio[1][0] / ratio[1][1] < 5


def test_tokens_that_no_probe_sees_are_salient():
    at = torch.tensor([3])
    scores = normalize(received(torch.zeros(1, 1, 4), at, torch.zeros(1, 6, 4), 1.0), at, 0, "normalized")
    assert scores.isinf().tolist() == [[False] * 4 + [True] * 2]


@pytest.mark.parametrize("count", [1, 2, 10, 99, 100])
@pytest.mark.parametrize("saliency", ["normalized", "length", "accumulated", "recent", "random"])
def test_as_many_tokens_are_salient_in_every_head(count, saliency):
    chooser = Chooser(0.6, saliency, "both", 0.1, 0, 1)
    queries = torch.randn(4, len(chooser.probes_of(0, count)), 8) if chooser.asks else None
    salient = chooser.choose(0, torch.randn(2, count, 8), queries, 0.3)
    assert (~salient).sum(1).tolist() == [int(0.4 * count + 1e-9)] * 2
    if saliency == "recent":
        assert salient[0].tolist() == sorted(salient[0].tolist())


# ------------------------------------------------------------------------------------- segments, and their bytes


def test_a_segment_holds_what_it_says_and_nothing_behind_it():
    keys, values, (salient, _) = states(7, size=64), states(8, size=64), split_sets(9)
    segment = Segment.of(keys, values, salient, (4, 2), ("channel", "separable"))
    high, low = 2 * 18 * 64 // 2, 2 * 12 * 64 // 4
    scales = {"keys": 2 * 2 * 2 * (2 * 64), "values": 2 * 2 * 30 + 2 * (2 * 64)}
    assert segment.nbytes == 2 * (high + low) + sum(scales.values()) + 2 * 4
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in segment.tensors())
    back = segment.read()
    expected = torch.from_numpy(reference(keys, salient, (4, 2), "channel")).float()
    torch.testing.assert_close(back[0], expected, rtol=1e-3, atol=2e-2)
    query, mask = torch.randn(2, 6, 64), torch.zeros(6, 3)
    mask[:2, 2] = float("-inf")
    opened = torch.randn(2, 2, 3, 64)
    found = attend([segment, segment], query, *opened, mask, 0.125)
    k, v = (torch.cat([part, part, new], 1) for part, new in zip(back, opened, strict=True))
    logits = query @ k.mT * 0.125
    logits[..., -3:] += mask
    torch.testing.assert_close(found, logits.softmax(-1) @ v, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ a cache


@pytest.fixture(scope="module")
def lm():
    made = tiny_lm(layers=3, heads=6, kv_heads=2, hidden=48)
    made.model.double()  # else rounding turns a difference in the last digit into one of a whole step
    return made


def start(lm, policy, **more) -> Target:
    target = Target(lm.model)
    target.cache = TokenCache(lm.model.config, stores=policy.attach(lm.model.config), **more)
    return target


def generate(lm, policy, prompts, proposer=None, sampler=Sampler(), new=40, **more):  # noqa: B008
    with attached(lm.model):
        loop = Loop(start(lm, policy, **more), prompts, sampler, new, (), proposer)
        for _ in loop:
            pass
    return [sequence.new_ids for sequence in loop.sequences], loop


def test_segments_are_the_prompt_and_then_windows_whose_sets_are_the_reference(lm, monkeypatch):
    """Queries and keys are caught on the way; sets, chosen by the loops above, must be those that were stored."""
    policy, ids = ZipCache(interval=10, probed=0.4, seed=3), PROMPTS[0]
    chosen, seen = [], {}
    choose = Chooser.choose

    def caught(self, first, keys, queries, scaling):
        salient = choose(self, first, keys, queries, scaling)
        if self.layer == 1:
            chosen.append((first, keys, salient))
        return salient

    monkeypatch.setattr(Chooser, "choose", caught)
    observe = zip_layer.ZipLayer.observe

    def noted(self, row, query_states, scaling):
        if self.chooser.layer == 1:
            at = len(seen)
            seen.update({at + i: query_states[:, i].clone() for i in range(query_states.shape[1])})
        observe(self, row, query_states, scaling)

    monkeypatch.setattr(zip_layer.ZipLayer, "observe", noted)
    with attached(lm.model):
        target = start(lm, policy)
        target.prefill([ids[:45]], chunk=20)
        for token in ids[45:]:
            target.score(TokenTree.roots([token]))
            target.commit([[0]])
    layer = target.cache.token_layers[1]
    assert [segment.shape[1] for segment in layer.store._rows[0].segments] == [45, 10, 10]
    assert (layer.held, layer.stored) == ([70], [65]) and layer.storage.shape[3] < 45
    assert [first for first, _, _ in chosen] == [0, 45, 55]
    for first, keys, salient in chosen:
        count = keys.shape[1] - first
        probes = [first + at for at in probe_positions(count, 0.4, "both", 3, 1, first)]
        queries = torch.stack([seen[p] for p in probes], 1)
        total, visible = attention_received(queries, keys, probes, first)
        for head in range(2):
            lowest = np.argsort(total[head] / visible)[: int(0.4 * count)]
            assert set((~salient[head]).nonzero()[:, 0].tolist()) == set(lowest.tolist())
    waiting = layer.store._rows[0]
    assert waiting.at == tuple(p for p in layer.store.chooser.probes_of(65, 10) if p < 70)


def test_16_bits_are_the_full_cache(lm):
    full = [generate(lm, ZipCache(16, 16, interval=7), [prompt])[0][0] for prompt in PROMPTS]
    with attached(lm.model):
        loop = Loop(Target(lm.model), PROMPTS, Sampler(), 40, (), None)
        for _ in loop:
            pass
    assert full == [sequence.new_ids for sequence in loop.sequences]
    assert generate(lm, ZipCache(2, 1, interval=7), PROMPTS)[0] != full


@pytest.mark.parametrize("options", [{}, {"saliency": "random"}, {"keys": "group", "values": "group"}, {"high": 3}])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, seed=5)], ids=["greedy", "sampled"])
def test_drafts_and_neighbours_change_nothing(lm, options, sampler):
    policy = ZipCache(interval=9, **options)
    prompts = [prompt + prompt[-12:] * 2 for prompt in PROMPTS]
    plain, _ = generate(lm, policy, prompts, sampler=sampler)
    drafted, loop = generate(lm, policy, prompts, PromptLookup(), sampler)
    assert drafted == plain
    if not sampler.temperature:
        assert sum(sequence.trace.accepted for sequence in loop.sequences) > 0
        assert plain == [generate(lm, policy, [prompt], sampler=sampler)[0][0] for prompt in prompts]


def test_repeated_rows_go_on_as_they_would(lm):
    policy, rows, new = ZipCache(interval=6), [2, 0, 2], PROMPTS[3][:20]
    with attached(lm.model):
        target = start(lm, policy)
        target.prefill(PROMPTS[:3])
        for step, token in enumerate(new):
            if step == 10:
                target.select_rows(rows)
            logits = target.score(TokenTree.roots([token] * len(target.lengths)))[:, 0]
            target.commit([[0]] * len(target.lengths))
        for row, source in enumerate(rows):
            alone = start(lm, policy)
            alone.prefill([PROMPTS[source]])
            for token in new:
                expected = alone.score(TokenTree.roots([token]))[:, 0]
                alone.commit([[0]])
            torch.testing.assert_close(logits[row], expected[0], rtol=1e-3, atol=1e-3)


def test_plain_generate_may_commit_past_a_window(lm):
    """Assisted decoding knows no `room`: a pass may fill more than one window, and each is stored as its own."""
    layer = ZipCache(interval=4, seed=1).attach(lm.model.config)[0]
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 30, 8, generator=generator), torch.randn(6, 30, 8, generator=generator)
    layer.observe(0, queries[:, :9], 0.3)
    assert layer.take(0, keys[:, :9], keys[:, :9], True) == 9
    layer.observe(0, queries[:, 9:20], 0.3)
    assert layer.take(0, keys[:, 9:20], keys[:, 9:20], False) == 8
    one = ZipCache(interval=4, seed=1).attach(lm.model.config)[0]
    one.observe(0, queries[:, :9], 0.3)
    one.take(0, keys[:, :9], keys[:, :9], True)
    for at in range(9, 17):
        one.observe(0, queries[:, at : at + 1], 0.3)
        one.take(0, keys[:, 9 + (at - 9) // 4 * 4 : at + 1], keys[:, 9 + (at - 9) // 4 * 4 : at + 1], False)
    assert all(torch.equal(a, b) for a, b in zip(layer.read(0), one.read(0), strict=True))


class Counting(ReadLayer):
    """Looks at what it is given, and leaves the attending to the cache."""

    def __init__(self, unrotated=False):
        self.unrotated, self.shapes = unrotated, []

    def attend(self, layer, query, key, value, mask, scale):
        self.shapes.append((key.shape[2], layer.fill + layer.pending))
        return None


def test_readers_see_all_tokens_restored(lm):
    readers = [Counting() for _ in range(3)]
    policy = ZipCache(interval=5)
    plain, _ = generate(lm, policy, PROMPTS)
    assert generate(lm, policy, PROMPTS, readers=readers)[0] == plain
    assert all(seen == whole for seen, whole in readers[0].shapes) and len(readers[0].shapes) == 40
    with pytest.raises(RecipeError, match="unrotated"):
        start(lm, policy, readers=[Counting(True)] * 3)


def test_it_does_not_compose_with_what_drops_tokens(lm):
    with pytest.raises(RecipeError, match="do not compose"):
        start(lm, ZipCache(), policies=Keyformer("50%").attach(lm.model.config, lm.dtype))
    with pytest.raises(RecipeError, match="one scale over all heads"):
        Recipe.parse("zipcache + keyformer:keep=50%")
    recipe = Recipe.parse("zipcache:high=8,low=4 + token-recycling")
    assert not recipe.lossless and recipe.build()["store"].high == 8


def test_bfloat16_is_attended_to_as_it_is_stored(lm):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 60, 64, generator=generator).bfloat16()
    query = torch.randn(2, 6, 64, generator=generator).bfloat16()
    segment = Segment.of(keys, values, split_sets(1, count=60, n_high=36)[0], (4, 2), ("channel", "separable"))
    back = segment.read()
    assert back[0].dtype == torch.bfloat16
    found = attend([segment], query, keys[:, :2], values[:, :2], None, 0.125)
    k, v = torch.cat([back[0], keys[:, :2]], 1).float(), torch.cat([back[1], values[:, :2]], 1).float()
    expected = (query.float() @ k.mT * 0.125).softmax(-1) @ v
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.03)


# ------------------------------------------------------------------------------------- laws, and what they catch


class RoundsTwice(zip_layer.ZipLayer):
    def _store(self, row, keys, values):
        before = self.read(row) if row in self._rows and self._rows[row].segments else None
        super()._store(row, keys, values)
        if before is not None:
            state, newest = self._rows[row], self._rows[row].segments[-1]
            salient = torch.ones(before[0].shape[:2], dtype=torch.bool)
            again = Segment.of(*before, salient, (2, 2), ("token", "token"))
            self._rows[row] = zip_layer.replace(state, segments=(again, newest))


class TakesEarly(zip_layer.ZipLayer):
    def take(self, row, keys, values, prompt):
        if not prompt and keys.shape[1]:
            self._store(row, keys, values)  # whatever this pass happened to bring
            return keys.shape[1]
        return super().take(row, keys, values, prompt)


class HidesBytes(zip_layer.ZipLayer):
    bits_per_value = 4.0


class ForgetsOrder(zip_layer.ZipLayer):
    def read(self, row):
        keys, values = super().read(row)
        return keys.flip(1), values


class MixesRows(zip_layer.ZipLayer):
    def select_rows(self, rows):
        self._rows = {new: self._rows[new] for new in range(len(rows)) if new in self._rows}


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (RoundsTwice, "nothing is rounded twice"),
        (TakesEarly, "drafts change nothing"),
        (HidesBytes, "stored bytes really fall"),
        (ForgetsOrder, "more bits are nearer"),
        (ForgetsOrder, "attention is that over restored numbers"),
        (MixesRows, "sequences may leave"),
    ],
)
def test_laws_catch_stores_that_are_wrong(wrong, law):
    class Wrong(ZipCache):
        def layer(self, index):
            made = super().layer(index)
            return wrong(self, made.bits, made.schemes, made.chooser)

    Wrong.__module__ = ZipCache.__module__
    chosen = tuple(each for each in laws_of("zipcache") if each.__name__.replace("_", " ") == law)
    assert len(chosen) == 1
    report = check_class(Wrong, chosen)
    assert [finding.verdict for finding in report.findings] == ["broken"], str(report)


@pytest.mark.parametrize("options", [{"high": 9}, {"low": 0}, {"salient": 1.2}, {"interval": 0}, {"keys": "row"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(OptionError):
        ZipCache(**options)


def test_text_passes_the_same_gate():
    built = Recipe.parse("zipcache:high=16,low=3,salient=0.3,probes=recent").build()["store"]
    assert (built.high, built.low, built.salient, built.probes) == (16, 3, 0.3, "recent")
    assert CARD.slot == "store" and not CARD.lossless
