"""ADED: the trigram store, its drift, the tree search, and drafting in the verify loop."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenary.core.errors import InputError, OptionError, UnknownNameError
from tokenary.core.registry import method_class
from tokenary.core.sampling import Sampler
from tokenary.decode.aded import ADED, TrigramStore, build_store, count_text
from tokenary.decode.aded import store as store_module
from tokenary.decode.aded.drift import Drift
from tokenary.decode.aded.search import ITERATIONS, MOST, STATES, beam, mcts
from tokenary.decode.base import Loop
from tokenary.hf.target import Target, attached

texts = st.lists(st.lists(st.integers(0, 6), max_size=40), max_size=4)


def random_text(seed, length=600, vocabulary=24):
    """A text with likely and unlikely successors."""
    rng = np.random.default_rng(seed)
    return (rng.zipf(1.6, length) % vocabulary).tolist()


def table_of(drift, vocabulary):
    """The scores as an ordinary dictionary of dictionaries, likeliest successor first."""
    rows = {(a, b): drift.successors(a, b) for a in range(vocabulary) for b in range(vocabulary)}
    return {pair: row for pair, row in rows.items() if row}


# --- the slow obvious search ---


class Node:
    def __init__(self, pair, parent, p):
        self.pair, self.parent, self.p = pair, parent, p
        self.children, self.visits, self.total = [], 0, 0.0

    def path(self):
        return () if self.parent is None else (*self.parent.path(), self.pair[1])

    def puct(self):
        if self.visits == 0:
            return math.inf
        n = self.parent.visits
        explore = (32 + math.log((n + 8 + 1) / 8)) * self.p * math.sqrt(n) / (1 + self.visits)
        return self.total / self.visits + explore


def intended(table, before, after):
    return table[before][after[1]]


def slipped(table, before, after):
    return table[before].get(before[1], 0.0)


def nothing(table, before, after):
    return 0.0


def slow_search(table, prev, last, uniforms, gain):
    """The paper's search and read-out with objects; returns the weight of every path of the tree."""
    root = Node((prev, last), None, 0.0)
    nodes = [root]
    for draws in uniforms:
        node, states = root, [root.pair]
        while node.children and len(states) < 4:
            node = max(node.children, key=Node.puct)  # max takes the first of equals
            states.append(node.pair)
        if len(states) < 4 and node.pair in table:
            node.children = [Node((node.pair[1], x), node, p) for x, p in table[node.pair].items()]
            nodes += node.children
            node = node.children[0]
            states.append(node.pair)
        while len(states) < 4 and states[-1] in table:
            row = table[states[-1]]
            sums = np.cumsum(list(row.values()))
            drawn = np.searchsorted(sums, draws[len(states) - 1] * sums[-1])
            states.append((states[-1][1], list(row)[drawn]))
        reward = 1.0
        for before, after in pairwise(states):
            reward += gain(table, before, after)
        while node is not None:
            node.visits += 1
            node.total += reward
            node = node.parent
    ranked = sorted(nodes, key=lambda node: -node.visits)[:24]
    weights = {node.path(): node.visits for node in ranked}
    for node in ranked:
        if node is not root and node.pair in table:
            row = table[node.pair]
            best = next(iter(row))
            weights.setdefault((*node.path(), best), node.visits * row[best] / sum(row.values()))
    return weights


def paths_of(ids, parents):
    """The path of each node of a tree, without the root's token."""
    paths = [()]
    for token, parent in zip(ids[1:], parents[1:], strict=True):
        paths.append((*paths[parent], int(token)))
    return paths


@pytest.mark.parametrize("slip", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_search_equals_the_slow_one(seed, slip):
    text = random_text(seed)
    drift = Drift(build_store([text[:400]]))
    for end in range(420, 440):
        drift.touch(text[:end])
    uniforms = np.random.default_rng(seed).random((ITERATIONS, STATES - 1))
    table = table_of(drift, 24)
    for prev, last in list(table)[::7]:
        weights = slow_search(table, prev, last, uniforms, slipped if slip else intended)
        ids, parents = mcts(drift.table, prev, last, uniforms, 64, slip)
        assert ids[0] == last
        assert paths_of(ids, parents) == sorted(weights, key=lambda path: -weights[path])


def test_compat_reward_is_constant_where_no_token_repeats():
    text = [
        a for a, b in pairwise(random_text(2, vocabulary=8)) if a != b
    ]  # no token after itself: the slip finds no score at all
    drift = Drift(build_store([text]))
    table, uniforms = table_of(drift, 8), np.random.default_rng(0).random((ITERATIONS, STATES - 1))
    differ = 0
    for pair in table:
        weights = slow_search(table, *pair, uniforms, nothing)
        paths = paths_of(*mcts(drift.table, *pair, uniforms, 64, True))
        assert paths == sorted(weights, key=lambda path: -weights[path])
        differ += paths != paths_of(*mcts(drift.table, *pair, uniforms, 64, False))
    assert differ > 0


@pytest.mark.parametrize("budget", [1, 7, 46])
def test_beam_takes_the_likeliest_paths(budget):
    text = random_text(3, length=150, vocabulary=12)
    drift = Drift(build_store([text]))
    table = table_of(drift, 12)
    for prev, last in list(table)[::9]:
        weights, level = {(): 1.0}, [((prev, last), ())]
        for _ in range(4):
            below = []
            for pair, path in level:
                for token, score in table.get(pair, {}).items():
                    weights[*path, token] = weights[path] * score / sum(table[pair].values())
                    below.append(((pair[1], token), (*path, token)))
            level = below
        paths = paths_of(*beam(drift.table, prev, last, 4, budget))
        best = sorted(weights.values(), reverse=True)[: budget + 1]
        np.testing.assert_allclose([weights[path] for path in paths], best, rtol=1e-6)


# --- the store ---


@given(texts, st.integers(1, 4))
def test_counting_equals_counter(given_texts, keep):
    counts = defaultdict(Counter)
    for text in given_texts:
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            counts[a, b][c] += 1
    store = build_store(given_texts, keep)
    assert len(store) == len(counts)
    drafted = set()
    for (a, b), row in counts.items():
        kept = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:keep]
        drafted.update(c for c, _ in kept)
        assert list(store.successors(a, b).items()) == [(c, float(np.float32(n / row.total()))) for c, n in kept]
    assert store.successors(7, 7) == {}
    assert store.largest_token == max(drafted, default=-1)


def test_count_text_joins_blocks(monkeypatch):
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 30)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    text = "".join(f"w{i % 31}{' ' if i % 4 else chr(10)}" for i in np.random.default_rng(0).integers(0, 30, 500))
    whole = build_store([tokenizer(text)["input_ids"]])
    monkeypatch.setattr(store_module, "_BLOCK", 50)
    blocks = count_text(tokenizer, text)
    for name in ("keys", "starts", "tokens", "scores"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))
    assert len(count_text(tokenizer, "")) == 0


def test_store_refuses_wrong_ids():
    for ids in ([1, -1, 2], [1, 1 << 21, 2]):
        with pytest.raises(InputError, match="token id"):
            build_store([ids])
    with pytest.raises(InputError, match="keep=0"):
        build_store([[1, 2, 3]], keep=0)
    assert len(build_store([[1, 2], []])) == 0


def test_save_and_load(tmp_path):
    store, path = build_store([random_text(0)]), tmp_path / "store.safetensors"
    for _ in range(2):  # over an older file too
        store.save(path)
    loaded = TrigramStore.load(path)
    for name in ("keys", "starts", "tokens", "scores"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(store, name))
    assert [item.name for item in tmp_path.iterdir()] == ["store.safetensors"]
    build_store([]).save(path)
    assert len(TrigramStore.load(path)) == 0


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    store, path = build_store([random_text(0)]), tmp_path / "store.safetensors"
    store.save(path)
    before = path.read_bytes()

    def broken(arrays, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(store_module, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        build_store([]).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("scores"),
        lambda arrays: arrays.update(starts=arrays["starts"] + 1),
        lambda arrays: arrays.update(starts=arrays["starts"][::-1].copy()),
        lambda arrays: arrays.update(starts=arrays["starts"][:0]),
        lambda arrays: arrays.update(tokens=arrays["tokens"].astype(np.int64)),
        lambda arrays: arrays.update(tokens=arrays["tokens"][:-1]),
        lambda arrays: arrays.update(tokens=-arrays["tokens"] - 1),
        lambda arrays: arrays.update(keys=arrays["keys"][::-1].copy()),
        lambda arrays: arrays.update(scores=arrays["scores"] * np.float32("nan")),
        lambda arrays: arrays.update(other=arrays["scores"]),
    ],
)
def test_a_bad_file_is_refused(tmp_path, change):
    store, path = build_store([random_text(0)]), tmp_path / "bad.safetensors"
    arrays = {name: getattr(store, name) for name in ("keys", "starts", "tokens", "scores")}
    change(arrays)
    store_module.save_file(arrays, path)
    with pytest.raises(InputError, match="no trigram store"):
        TrigramStore.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(OptionError, match="store="):
        ADED(store=str(path))


# --- the drift ---


def slow_touch(table, context):
    window = context[-16:]
    for a, b, c in zip(window, window[1:], window[2:], strict=False):
        row = table.setdefault((a, b), {})
        row[c] = min(np.float32(row.get(c, 0)) + np.float32(0.04), np.float32(3))


@settings(max_examples=30, deadline=None)
@given(texts, st.lists(st.integers(0, 6), min_size=1, max_size=60), st.lists(st.integers(1, 5), max_size=80))
def test_drift_is_exact(counted, context, steps):
    drift = Drift(build_store(counted, keep=3))
    table = table_of(drift, 7)
    for step in steps:
        context = context + context[:step]
        drift.touch(context)
        slow_touch(table, context)
    now = table_of(drift, 7)
    assert now == table
    assert all(list(row.values()) == sorted(row.values(), reverse=True) for row in now.values())


def test_drift_window_step_and_cap():
    store = build_store([[1, 2, 3, 1, 2, 4]])
    drift = Drift(store)
    drift.touch([1, 2, 4, *range(10, 24)])  # 17 tokens: the first trigram lies outside
    assert drift.successors(1, 2) == store.successors(1, 2) == {3: 0.5, 4: 0.5}
    assert drift.successors(2, 4) == pytest.approx({10: 0.04}) and drift.successors(21, 22) == pytest.approx({23: 0.04})
    for times in range(1, 80):
        drift.touch([1, 2, 4])
        assert drift.successors(1, 2) == pytest.approx({4: min(0.5 + 0.04 * times, 3), 3: 0.5}, rel=1e-5)
        assert list(drift.successors(1, 2)) == [4, 3]
    assert drift.successors(1, 2)[4] == 3
    assert store.successors(1, 2) == {3: 0.5, 4: 0.5}  # the counted table stays


def test_drift_grows():
    drift, table = Drift(build_store([])), {}
    context = np.random.default_rng(0).integers(0, 40, 900).tolist()
    context += [token for successor in range(101) for token in (1, 2, successor)]  # one pair, many successors
    for end in range(3, len(context)):
        drift.touch(context[:end])
        slow_touch(table, context[:end])
    assert len(table) > 256 and len(table[1, 2]) >= 100
    assert {pair: drift.successors(*pair) for pair in table} == table
    ids, parents = mcts(drift.table, 1, 2, np.full((ITERATIONS, STATES - 1), 0.5), 64, False)
    assert len(ids) > 1 and (parents[1:] < np.arange(1, len(ids))).all()


# --- drafting ---


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=200),
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=40), min_size=1, max_size=3),
    st.sampled_from(["mcts", "beam"]),
    st.integers(1, 64),
)
def test_trees_are_ordered_and_any_prefix_is_a_tree(counted, contexts, search, nodes):
    proposer = ADED(nodes=64, search=search)
    proposer.store = build_store([counted])
    trees = []
    for budget in (64, nodes):
        proposer.start(contexts)
        trees.append(proposer.propose(contexts, budget))
    full, cut = trees
    for row, context in enumerate(contexts):
        size = full.sizes[row]
        assert size <= 1 + MOST and full.ids[row, 0] == context[-1] and full.parents[row, 0] == -1
        assert (full.parents[row, 1:size] < np.arange(1, size)).all() and (full.parents[row, 1:size] >= 0).all()
        assert (full.parents[row, size:] == -1).all()
        paths = paths_of(full.ids[row, :size], full.parents[row, :size])
        assert len(set(paths)) == len(paths) and max(map(len, paths)) <= 4
        n = cut.sizes[row]
        assert n == min(size, 1 + nodes)
        assert cut.ids[row, :n].tolist() == full.ids[row, :n].tolist()
        assert cut.parents[row, :n].tolist() == full.parents[row, :n].tolist()


def drafts(proposer, contexts):
    tree = proposer.propose(contexts, 46)
    return [list(zip(tree.ids[row, :n], tree.parents[row, :n], strict=True)) for row, n in enumerate(tree.sizes)]


def test_batch_drafts_equal_single_ones_and_start_resets():
    contexts = [random_text(seed, 200) for seed in range(3)]
    proposer = ADED(nodes=46)
    proposer.store = build_store(contexts)
    single = []
    for context in contexts:
        proposer.start([context[:50]])
        single.append([drafts(proposer, [context[:end]])[0] for end in range(50, 60)])
    proposer.start([context[:50] for context in contexts])
    for step, end in enumerate(range(50, 55)):
        assert drafts(proposer, [context[:end] for context in contexts]) == [rows[step] for rows in single]
    proposer.select_rows([2, 0])
    for step, end in enumerate(range(55, 60), start=5):
        assert drafts(proposer, [contexts[2][:end], contexts[0][:end]]) == [single[2][step], single[0][step]]


def test_what_drifts_and_what_does_not():
    context = [5, 6, 7, 5, 6]
    adaptive, static, shared = ADED(nodes=8), ADED(nodes=8, adaptive=False), ADED(nodes=8, drift="shared")
    for proposer in (adaptive, static, shared):
        proposer.start([context])
    assert [token for token, _ in drafts(adaptive, [context])[0]] == [6, 7, 5, 6, 7]
    assert drafts(static, [context]) == [[(6, -1)]]
    drafts(shared, [context])
    for proposer in (adaptive, shared):
        proposer.start([[6]])
    assert drafts(adaptive, [[0, 5, 6]])[0][1:] == []
    assert drafts(shared, [[0, 5, 6]])[0][1:] != []


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3], [10] * 9, [4]]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("options", [{}, {"nodes": 12, "drift": "shared"}, {"nodes": 46, "search": "beam"}], ids=str)
def test_lossless(llama, tmp_path, prompts, temperature, options):
    sampler = Sampler(temperature=temperature, seed=3)
    path = tmp_path / "store.safetensors"
    with attached(llama):
        plain = Loop(Target(llama), prompts, sampler, 40, (9,))
        list(plain)
        # Half of what will be said, so that drafts are right at times and wrong at others.
        build_store([s.ids[: len(s.ids) // 2] for s in plain.sequences] + [random_text(0, 400, 67)]).save(path)
        drafted = Loop(Target(llama), prompts, sampler, 40, (9,), ADED(store=str(path), **options))
        list(drafted)
    assert [s.new_ids for s in drafted.sequences] == [s.new_ids for s in plain.sequences]
    if "nodes" in options:  # "auto" may find that no draft pays on a toy
        drawn, kept = (sum(getattr(s.trace, name) for s in drafted.sequences) for name in ("drafted", "accepted"))
        assert 0 < kept < drawn


def test_options():
    assert method_class("aded") is ADED and ADED.card_of().lossless
    for name, value in (
        ("nodes", 0),
        ("nodes", 65),
        ("nodes", "many"),
        ("search", "greedy"),
        ("drift", "none"),
        ("adaptive", "perhaps"),
        ("seed", -1),
        ("store", "/no/such/file.safetensors"),
    ):
        with pytest.raises(OptionError, match=f"option {name}="):
            ADED(**{name: value})
    with pytest.raises(UnknownNameError):
        ADED(stores="none")
    assert ADED(nodes="24", adaptive="false").options["nodes"] == 24
    assert set(ADED.schema()["properties"]) == {
        "nodes", "store", "adaptive", "search", "drift", "compat_reward", "seed",
    }  # fmt: skip
