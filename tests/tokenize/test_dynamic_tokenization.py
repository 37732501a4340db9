"""Dynamic tokenization: merges against the plain loop, what may merge, maps, rows, the index of a large vocabulary."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.token_map import check_token_map
from tokenary.data import prose
from tokenary.models.tiny import tiny_lm
from tokenary.tokenize.base import TextTokenizer, load_tokenizer
from tokenary.tokenize.dynamic_tokenization import (
    DynamicTokenization,
    LargeVocabulary,
    OutputIndex,
    PairRules,
    RowCache,
    generate,
    merge_batch,
    merges_for,
)
from tokenary.tokenize.dynamic_tokenization.rows import last_part, mean_of_parts, merge_parents, ridge_of_parts
from tokenary.tokenize.dynamic_tokenization.rules import LONGEST, NEVER, UNKNOWN, joined


def toy(special: int = 1) -> TextTokenizer:
    """Single bytes, and a special token with id 256."""
    alphabet = sorted(ByteLevel.alphabet(), key=lambda char: (ord(char) > 255, char))
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.add_special_tokens([f"<{n}>" for n in range(special)])
    return TextTokenizer(made.to_str(), "toy")


TOY = toy()


def as_parts(merged):
    return [[merged.parts(id) for id in row] for row in merged.rows]


@pytest.mark.parametrize("boundary", ["pretokens", "word", "word-hyphen", "sentence"])
@settings(deadline=None)
@given(
    rows=st.lists(st.text("ab a-b,é\n", max_size=30), max_size=4),
    merges=st.none() | st.integers(0, 12),
    special=st.booleans(),
)
def test_merges_are_those_of_the_plain_loop(boundary, rows, merges, special):
    rules = PairRules(TOY, boundary)
    ids = [([256] if special else []) + TOY.encode(text).tolist() for text in rows]
    # A pair counts as the ids that it joins: two merges that spell the same are two tokens in both formulations.
    merged = merge_batch(ids, rules, merges)
    if merges is not None:
        assert len(merged.pairs) <= merges
    assert merged.original() == ids
    assert merged.lengths[-1] == sum(map(len, merged.rows))
    expected = slow_merges(ids, rules, merges)
    assert merged.rows == expected


def slow_merges(rows, rules, merges):
    """Count every pair of the batch anew, merge the most frequent, the first counted on a tie."""
    data = {id: rules.bytes_of(id) for row in rows for id in row}
    rows, base, made = [list(row) for row in rows], TOY.id_limit, 0
    while merges is None or made < merges:
        counts = Counter()
        for row in rows:
            for a, b in pairwise(row):
                if data[a] and data[b] and rules.allows(data[a], data[b]):
                    counts[a, b] += 1
        if not counts:
            break
        best = counts.most_common(1)[0][0]
        new_id = base + made
        data[new_id] = data[best[0]] + data[best[1]]
        for n, row in enumerate(rows):
            new, i = [], 0
            while i < len(row):
                if (row[i], row[i + 1] if i + 1 < len(row) else None) == best:
                    new.append(new_id)
                    i += 2
                else:
                    new.append(row[i])
                    i += 1
            rows[n] = new
        made += 1
    return rows


CHARS = ["a", "é", "日", "\U0001f600", " ", "\n", "\u3000", "\x1c", "-", "!"]


@st.composite
def neighbours(draw):
    """Bytes cut in two anywhere, inside a character too, sometimes with bytes that are none."""
    data = "".join(draw(st.lists(st.sampled_from(CHARS), min_size=1, max_size=6))).encode()
    data += draw(st.sampled_from([b"", b"", b"\xff", b"\xe0\x80", b"\xe6", b"\x97"]))
    start, cut = draw(st.integers(0, len(data) - 1)), draw(st.integers(1, len(data)))
    return data[start : start + cut], data[start + cut :] + draw(st.sampled_from([b"", b"b", b" b"]))


@pytest.mark.parametrize("boundary", ["pretokens", "word", "word-hyphen", "sentence"])
@settings(deadline=None, max_examples=300)
@given(pair=neighbours())
def test_kinds_say_what_the_rules_say(boundary, pair):
    rules = PairRules(TOY, boundary)
    if not all(pair):
        return
    found = joined(*map(rules.kind, pair), rules.asks)
    assert found in (UNKNOWN, rules.join(*pair))
    assert rules.allows(*pair) == (rules.join(*pair) != NEVER)
    if rules.allows(*pair):
        assert rules.join(*pair) == rules.kind(b"".join(pair))


def test_an_id_that_is_none_is_refused():
    with pytest.raises(InputError, match="has no token 257"):
        merge_batch([[0, 257]], PairRules(TOY))


def test_no_merge_changes_nothing_and_all_merges_reach_the_words():
    rules = PairRules(TOY, "word")
    ids = [TOY.encode("the cat saw the dog").tolist()]
    assert merge_batch(ids, rules, 0).rows == ids
    merged = merge_batch(ids, rules)
    assert [TOY.decode(parts) for parts in as_parts(merged)[0]] == ["the", " cat", " saw", " the", " dog"]


@pytest.mark.parametrize(
    ("boundary", "left", "right", "allowed"),
    [
        ("pretokens", " the", "re", True),
        ("pretokens", "a", " b", False),
        ("pretokens", "don", "'t", False),
        ("pretokens", "x", "1", False),
        ("pretokens", " ", "a", True),
        ("pretokens", " ", " ", True),
        ("pretokens", "\n", "\n", False),
        ("pretokens", "\t", "a", False),
        ("word", "don", "'t", True),
        ("word", "end", ".", True),
        ("word", "a", " b", False),
        ("word", "a ", "b", False),
        ("word-hyphen", "end", ".", False),
        ("word-hyphen", "well", "-", True),
        ("word-hyphen", "well-", "known", True),
        ("word-hyphen", "(", "a", True),
        ("word-hyphen", "!", "?", True),
        ("sentence", "a", " b", True),
        ("sentence", "\n", "\n", True),
    ],
)
def test_what_may_merge(boundary, left, right, allowed):
    assert PairRules(TOY, boundary).allows(left.encode(), right.encode()) is allowed


def test_parts_of_a_character_may_merge_and_special_tokens_never():
    rules = PairRules(TOY, "pretokens")
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert rules.allows(first, second) and rules.allows(b"a", first)
    ids = [[256, 256, 256, 256]]
    assert merge_batch(ids, PairRules(TOY, "sentence")).rows == ids


def test_the_map_of_a_batch():
    rows = [TOY.encode(text).tolist() for text in ("aa bb aa bb", "aa", "")]
    for side in ("left", "right"):
        merged = merge_batch(rows, PairRules(TOY, "word"), 2)
        mapping = merged.token_map(side)
        assert mapping.shape == (3, max(map(len, merged.rows)), 11)
        assert not list(check_token_map(mapping))
        assert mapping.sizes().sum(-1).tolist() == [11, 2, 0]
        lengths = [len(row) for row in merged.rows]
        assert (mapping.sizes() > 0).sum(-1).tolist() == lengths
        assert bool((mapping.sizes()[1] > 0)[-1 if side == "left" else 0])
    values = [[f"{b}:{i}" for i in range(len(row))] for b, row in enumerate(rows)]
    carried = merged.first(values)
    assert [len(row) for row in carried] == lengths and carried[0][0] == "0:0" and carried[2] == []


def test_the_share_of_the_reachable_reduction():
    rows = [TOY.encode(prose()[:3000]).tolist()]
    rules = PairRules(TOY)
    curve = merge_batch(rows, rules).lengths
    assert curve == sorted(curve, reverse=True)
    for share in (0.0, 0.25, 0.5, 1.0):
        merged = DynamicTokenization(share=share).retokenize(rows, rules)
        wanted = curve[0] - share * (curve[0] - curve[-1])
        assert merged.lengths[-1] <= wanted
        assert len(merged.pairs) == merges_for(curve, share)
        assert not merged.pairs or merged.lengths[-2] > wanted
        assert merged.lengths == curve[: len(merged.lengths)]


def test_a_million_equal_characters():
    merged = merge_batch([[TOY.encode("a")[0]] * 1_000_000], PairRules(TOY))
    assert merged.sizes[0][0] == LONGEST and len(merged.pairs) < 30
    assert sum(merged.sizes[0]) == 1_000_000


def test_a_batch_after_some_of_its_merges():
    rows = [TOY.encode(line).tolist() for line in prose()[:2000].split("\n")]
    rules = PairRules(TOY)
    limit = merge_batch(rows, rules)
    for merges in (0, 1, 7, len(limit.pairs)):
        assert limit.after(merges) == merge_batch(rows, rules, merges)


def test_inputs_of_a_model():
    tokenizer, lm = toy(), tiny_lm(vocab=300)
    rows = [TOY.encode(text).tolist() for text in ("the cat and the dog", "the end")]
    inputs = DynamicTokenization(share=1.0).attach(lm.model, tokenizer)
    made, merged = inputs(rows)
    table = lm.model.get_input_embeddings().weight
    for b, row in enumerate(merged.rows):
        for n, id in enumerate(row, start=made["inputs_embeds"].shape[1] - len(row)):
            expected = table[list(merged.parts(id))].mean(0)
            torch.testing.assert_close(made["inputs_embeds"][b, n], expected)
            assert made["position_ids"][b, n] == n - (made["inputs_embeds"].shape[1] - len(row))
    logits = lm.model(**made).logits
    alone = lm.model(**inputs.embed(merge_rows(merged, 1))).logits
    torch.testing.assert_close(logits[1, -1], alone[0, -1], atol=1e-4, rtol=1e-4)  # padding changes nothing
    same, unmerged = DynamicTokenization(merges=0).attach(lm.model, tokenizer)(rows[:1])
    assert unmerged.rows == rows[:1]
    torch.testing.assert_close(lm.model(**same).logits, lm.model(torch.tensor(rows[:1])).logits)


def merge_rows(merged, row):
    return replace(merged, rows=[merged.rows[row]])


def test_other_rows_and_the_door_for_a_hypernetwork():
    tokenizer, lm = toy(), tiny_lm(vocab=300)
    rows = [TOY.encode("the cat and the dog").tolist()]
    table = lm.model.get_input_embeddings().weight.detach()
    made, merged = DynamicTokenization(share=1.0, rows="last").attach(lm.model, tokenizer)(rows)
    for n, id in enumerate(merged.rows[0]):
        torch.testing.assert_close(made["inputs_embeds"][0, n], table[merged.parts(id)[-1]])
    asked = []

    def predict(parts):
        asked.append(list(parts))
        return torch.stack([table[list(token)].sum(0) for token in parts])

    attached = DynamicTokenization(share=1.0).attach(lm.model, tokenizer, predict)
    made, merged = attached(rows)
    attached(rows)
    assert len(asked) == 1 and len(set(asked[0])) == len(asked[0])  # the second batch is served from the cache
    for n, id in enumerate(merged.rows[0]):
        torch.testing.assert_close(made["inputs_embeds"][0, n], table[list(merged.parts(id))].sum(0))
    with pytest.raises(UnsupportedModelError):
        DynamicTokenization().attach(tiny_lm(vocab=97).model, tokenizer)


def test_the_cache_forgets_what_was_not_used_for_longest():
    seen = []

    def predict(parts):
        seen.extend(parts)
        return torch.tensor([[float(sum(token))] for token in parts])

    cache = RowCache(predict, 2)
    assert cache.look_up([(1, 2), (3,), (1, 2)]).tolist() == [[3.0], [3.0], [3.0]]
    cache.look_up([(1, 2)])
    cache.look_up([(4,)])
    assert len(cache) == 2
    cache.look_up([(1, 2)])
    assert seen == [(1, 2), (3,), (4,)]
    cache.look_up([(3,)])
    assert seen[-1] == (3,)
    big = cache.look_up([(n,) for n in range(10, 15)])  # more than fit are served all the same
    assert big[:, 0].tolist() == [10, 11, 12, 13, 14] and len(cache) == 2
    with pytest.raises(InputError):
        RowCache(lambda parts: torch.zeros(1, 2), 5).look_up([(1,), (2,)])


def test_rows_of_parts():
    tokenizer = load_tokenizer("stories260k")
    parents = merge_parents(tokenizer)
    assert len(parents) > 100
    for id, (left, right) in list(parents.items())[:50]:
        assert tokenizer.token_bytes(left) + tokenizer.token_bytes(right) == tokenizer.token_bytes(id)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 8, generator=generator)
    parts = [(5, 6), (7,), (8, 9, 10, 11, 12)]
    torch.testing.assert_close(mean_of_parts(rows)(parts)[2], rows[8:13].mean(0))
    torch.testing.assert_close(last_part(rows)(parts), rows[[6, 7, 12]])
    # where tokens are a linear map of their parts, the regression finds it
    weight = torch.randn(2, 8, 8, generator=generator) / 8**0.5
    made = rows.clone()
    pairs = {id: pair for id, pair in parents.items() if not set(pair) & parents.keys()}
    for id, (left, right) in pairs.items():
        made[id] = (rows[left] + rows[right]) / 2 + rows[left] @ weight[0] + rows[right] @ weight[1]
    fitted = ridge_of_parts(made, tokenizer, strength=1e-3)
    wanted = made[list(pairs)]
    error = (fitted(list(pairs.values())) - wanted).norm() / wanted.norm()
    assert error < 0.75 * (mean_of_parts(made)(list(pairs.values())) - wanted).norm() / wanted.norm()
    with pytest.raises(UnsupportedModelError):
        ridge_of_parts(rows, TOY)


@pytest.fixture(scope="module")
def large():
    corpus = [TOY.encode(line).tolist() for line in prose()[:20_000].split("\n")]
    return LargeVocabulary(TOY, merge_batch(corpus, PairRules(TOY), 600))


def test_a_large_vocabulary_encodes_by_longest_prefix(large):
    text = "Call me Ishmael: the whale é, the whale 日本!"
    ids = large.encode(text)
    assert large.decode(ids) == text
    assert large.original(ids) == [int(i) for byte in text.encode() for i in [TOY.id_of[bytes([byte])]]]
    assert len(ids) < len(text)
    known = {data: id for data, id in TOY.id_of.items()}
    for n, parts in enumerate(large.parts):
        known[b"".join(map(TOY.token_bytes, parts))] = large.base + n
    data, at, slow = text.encode(), 0, []
    while at < len(data):
        size = max(n for n in range(1, 40) if data[at : at + n] in known and at + n <= len(data))
        slow.append(known[data[at : at + size]])
        at += size
    assert ids.tolist() == slow
    assert len(large) == large.base + len(large.parts)


def test_a_large_vocabulary_of_a_tokenizer_that_puts_a_space_before_a_text():
    tokenizer = load_tokenizer("stories260k")
    merged = merge_batch([tokenizer.encode(line).tolist() for line in ("the cat sat", "the cat")], PairRules(tokenizer))
    large = LargeVocabulary(tokenizer, merged)
    ids = large.encode("the cat sat")
    assert large.decode(ids) == "the cat sat" and len(ids) < len(tokenizer.encode("the cat sat"))


@pytest.mark.real
def test_a_byte_that_the_vocabulary_lacks():
    tokenizer = load_tokenizer("smollm2")
    large = LargeVocabulary(tokenizer, merge_batch([tokenizer.encode(prose()[:3000]).tolist()], PairRules(tokenizer)))
    assert large.decode(large.encode("the whale")) == "the whale"
    with pytest.raises(InputError, match="0x04"):
        large.encode("a\x04b")


def test_the_index_and_generation(large):
    lm = tiny_lm(vocab=300, hidden=32)
    table = lm.model.get_input_embeddings().weight.detach()
    rows = torch.cat([table[: large.base], mean_of_parts(table)(large.parts)])
    queries = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    exact = OutputIndex(rows, leaves=0, candidates=20)
    ids, logits = exact.search(queries)
    wanted = (queries @ rows.T).sort(dim=-1, descending=True)
    torch.testing.assert_close(logits, wanted.values[:, :20])
    assert ids[:, 0].tolist() == wanted.indices[:, 0].tolist() and exact.recall(queries) == 1.0
    prompt = large.encode("the whale").tolist()
    made = generate(lm.model, rows, exact, prompt, 8)
    text, embeds = list(prompt), rows
    for token in made:  # the plain loop: everything anew for each token
        hidden = lm.model.base_model(inputs_embeds=embeds[torch.tensor(text)][None]).last_hidden_state[0, -1]
        assert int((hidden @ rows.T).argmax()) == token
        text.append(token)
    assert generate(lm.model, rows, exact, prompt, 8, frozenset(made[2:3])) == made[: made.index(made[2])]


def test_an_approximate_index_finds_nearly_all():
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 16, generator=generator)
    queries = torch.randn(200, 16, generator=generator)
    index = OutputIndex(rows, leaves=50, searched=20)
    assert index.recall(queries) > 0.95 > OutputIndex(rows, leaves=50, searched=1).recall(queries)
    ids, logits = index.search(queries)
    torch.testing.assert_close(logits, (queries @ rows.T).gather(1, ids))  # exact on what is found
    assert ids.shape == (200, 200) and (logits.diff(dim=-1) <= 0).all()
    few, logits = OutputIndex(rows, leaves=50, searched=1).search(queries)  # a leaf may hold fewer than 200 rows
    assert few.min() >= 0 and torch.isinf(logits).any()


def test_an_index_needs_its_library_and_enough_rows(monkeypatch):
    with pytest.raises(OptionError, match="leaves"):
        OutputIndex(torch.zeros(5, 2), leaves=6)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="faiss"):
        OutputIndex(torch.zeros(5, 2), leaves=2)


def test_options():
    for wrong in ({"share": 1.5}, {"boundary": "x"}, {"merges": -2}, {"rows": "x"}, {"cache": 0}):
        with pytest.raises(OptionError):
            DynamicTokenization(**wrong)


@pytest.mark.real
def test_smollm2_reads_a_shorter_prompt():
    import tokenary

    lm = tokenary.load("smollm2", dtype="float32")
    tokenizer = load_tokenizer("smollm2")
    rows = [tokenizer.encode(prose()[i * 2000 : i * 2000 + 500]).tolist() for i in range(3)]
    inputs, merged = DynamicTokenization(share=0.5).attach(lm.model, tokenizer)(rows)
    assert merged.original() == rows
    assert inputs["inputs_embeds"].shape[1] < max(map(len, rows))
    ids = lm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == 3 and np.isfinite(inputs["inputs_embeds"].numpy()).all()
