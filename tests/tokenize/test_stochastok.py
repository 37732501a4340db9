"""StochasTok: every cut of every token, uniform draws, the same text, labels that follow."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

import tokenary
from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.token_map import check_token_map
from tokenary.data import prose, stdlib_code
from tokenary.tokenize.base import TextTokenizer, load_tokenizer
from tokenary.tokenize.stochastok import SplitTable, StochasTok, expand

STRINGS = [
    "hello there",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family 🇫🇷",
    "\t\n\r x  y",
    "",
    "a",
    "zürich\u0301 ﷺ",
    "don't \x00 stop",
]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2")


@pytest.fixture(scope="module")
def table(smollm2):
    return SplitTable.of(smollm2)


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer("stories260k")


def toy() -> TextTokenizer:
    """Bytes, and some words; `ab` and `abc` overlap."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("abc", "d"), ("Ã", "©")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    made.add_special_tokens(["<|ab|>"])
    return TextTokenizer(made.to_str(), "toy")


def test_all_cuts_are_found_not_only_the_merge():
    tokenizer = toy()
    table = SplitTable.of(tokenizer)
    id_of = {tokenizer.piece(i): i for i in tokenizer.ids}

    def cuts(piece):
        span = slice(table.starts[id_of[piece]], table.starts[id_of[piece] + 1])
        pairs = zip(table.left[span], table.right[span], strict=True)
        return {(tokenizer.piece(a), tokenizer.piece(b)) for a, b in pairs}

    assert cuts("abc") == {("a", "bc"), ("ab", "c")}
    assert cuts("abcd") == {("ab", "cd"), ("abc", "d")}
    assert cuts("Ã©") == {("Ã", "©")}  # half a character each
    assert cuts("a") == cuts("<|ab|>") == set()


def test_the_table_of_smollm2_is_that_of_the_brief(smollm2, table):
    splittable = table.counts[table.counts > 0]
    assert len(splittable) == 48_900 == sum(len(data) > 1 for data in smollm2.id_of)
    assert [int((splittable == n).sum()) for n in (1, 2, 3)] == [13_216, 19_139, 12_387]
    assert splittable.mean() == pytest.approx(2.20, abs=0.005)
    assert splittable.max() > 10
    assert not table.counts[list(smollm2.special_ids)].any()
    rng = np.random.default_rng(0)
    for id in rng.choice(np.flatnonzero(table.counts), 500):
        for cut in range(table.starts[id], table.starts[id + 1]):
            joined = smollm2.token_bytes(int(table.left[cut])) + smollm2.token_bytes(int(table.right[cut]))
            assert joined == smollm2.token_bytes(int(id))


def slow_expand(ids, table, p, draws):
    """The paper's loop: splice a list at a uniform position."""
    ids = list(ids)
    for position, choice in draws[: int(len(ids) * p)]:
        at = int(position * len(ids))
        first, count = table.starts[ids[at]], table.counts[ids[at]]
        if count:
            cut = first + int(choice * count)
            ids[at : at + 1] = [int(table.left[cut]), int(table.right[cut])]
    return ids


def test_it_draws_from_the_same_distribution_as_splicing():
    tokenizer = toy()
    table = SplitTable.of(tokenizer)
    ids = tokenizer.encode("abcdabc")
    fast = Counter(tuple(expand(ids, table, 1.5, 0, n).ids.tolist()) for n in range(5_000))
    rng = np.random.default_rng(1)
    slow = Counter(tuple(slow_expand(ids, table, 1.5, rng.random((8, 2)))) for _ in range(5_000))
    assert fast.keys() == slow.keys()
    assert len(fast) > 5
    chi2 = sum((fast[k] - slow[k]) ** 2 / (fast[k] + slow[k]) for k in fast)
    assert chi2 < len(fast) + 5 * (2 * len(fast)) ** 0.5


def test_cuts_are_drawn_uniformly(smollm2, table):
    id = int(np.argmax(table.counts))
    drawn = Counter(tuple(expand([id], table, 1.0, 0, n).ids.tolist()) for n in range(4_000))
    assert len(drawn) == table.counts[id]
    expected = 4_000 / len(drawn)
    chi2 = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi2 < len(drawn) + 5 * (2 * len(drawn)) ** 0.5


@pytest.mark.parametrize("name", ["smollm2", "stories260k", "toy"])
def test_the_text_stays_the_same(name):
    tokenizer = toy() if name == "toy" else load_tokenizer(name)
    table = SplitTable.of(tokenizer)
    assert table.counts.any()
    texts = STRINGS + [line for line in prose().split("\n")[:500]] + stdlib_code(0, 30_000).split("\n")[:500]
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        for p in (0.1, 1.0, 4.0):
            expanded = expand(ids, table, p, 0, number)
            assert tokenizer.decode(expanded.ids) == tokenizer.decode(ids)
            assert len(ids) <= len(expanded.ids) <= len(ids) + int(len(ids) * p)


@settings(deadline=None)
@given(st.lists(st.integers(0, 511), max_size=60), st.floats(0, 5), st.integers(0, 9))
def test_any_ids_of_a_byte_fallback_vocabulary_keep_their_text(ids, p, seed):
    tokenizer = load_stories()
    expanded = expand(ids, SPLITS["stories"], p, seed)
    assert tokenizer.decode(expanded.ids) == tokenizer.decode(ids)
    pieces = [[int(i) for i in expanded.ids[expanded.origin == n]] for n in range(len(ids))]
    special = tokenizer.special_ids | {tokenizer.unk_id}
    for id, piece in zip(ids, pieces, strict=True):
        assert piece == [id] or id not in special
        assert b"".join(map(tokenizer.token_bytes, piece)) == tokenizer.token_bytes(id)


SPLITS: dict = {}


def load_stories():
    if not SPLITS:
        SPLITS["tokenizer"] = load_tokenizer("stories260k")
        SPLITS["stories"] = SplitTable.of(SPLITS["tokenizer"])
    return SPLITS["tokenizer"]


def test_how_much_a_text_grows(smollm2, table):
    # English documentation, of whose running tokens about 77% can be split; the figures are of another such text.
    text = " ".join(line.strip() for line in _documentation().split("\n"))
    ids = smollm2.encode(text)
    assert 0.72 < (table.counts[ids] > 0).mean() < 0.82
    for p, growth in ((0.05, 0.040), (0.1, 0.074), (0.3, 0.215)):
        found = np.mean([len(expand(ids, table, p, seed).ids) / len(ids) - 1 for seed in range(5)])
        assert found == pytest.approx(growth, abs=0.005), p
    part = ids[:5000]  # splicing is quadratic
    slow = len(slow_expand(part, table, 1.0, np.random.default_rng(0).random((len(part), 2)))) / len(part)
    fast = np.mean([len(expand(part, table, 1.0, seed).ids) / len(part) for seed in range(5)])
    assert fast == pytest.approx(slow, abs=0.02)


def _documentation() -> str:
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def test_most_splittable_tokens_are_split_in_fifty_passes(smollm2, table):
    ids = smollm2.encode(prose()[:4000])
    split = np.zeros(len(ids), bool)
    for epoch in range(50):
        origin = expand(ids, table, 0.1, 0, epoch).origin
        split |= np.bincount(origin, minlength=len(ids)) > 1
    assert split[table.counts[ids] > 0].mean() >= 0.95


def test_draws_have_names(smollm2, table):
    ids = smollm2.encode(prose()[:2000])
    same = [expand(ids, table, 0.3, 1, "a").ids.tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != expand(ids, table, 0.3, 2, "a").ids.tolist()
    assert same[0] != expand(ids, table, 0.3, 1, "b").ids.tolist()
    assert expand(ids, table, 0.0).ids.tolist() == ids.tolist()


def test_protected_tokens_and_the_limit(smollm2, table):
    ids = smollm2.encode(prose()[:3000])
    protected = np.arange(len(ids)) % 2 == 0
    found = expand(ids, table, 3.0, protected=protected)
    counts = np.bincount(found.origin)
    assert (counts[protected] == 1).all() and (counts[~protected] > 1).any()
    assert len(expand(ids, table, 3.0, limit=7).ids) == len(ids) + 7


def test_it_returns_a_map(smollm2, table):
    ids = smollm2.encode("Some words to split up")
    found = expand(ids, table, 2.0)
    assert found.token_map.shape == (len(ids), len(found.ids))
    assert not list(check_token_map(found.token_map))
    assert found.token_map.sizes().sum() == len(found.ids)


def test_labels_masks_and_positions_follow(smollm2):
    transform = StochasTok(p=2.0).transform(smollm2)
    ids = smollm2.encode("user asks something; the assistant answers at length").tolist()
    asked = 4
    example = {
        "input_ids": ids,
        "labels": [-100] * asked + ids[asked:],
        "attention_mask": [1] * len(ids),
        "position_ids": list(range(len(ids))),
        "words": list(range(len(ids))),
        "name": "x",
    }
    made = transform(example)
    size = len(made["input_ids"])
    assert size > len(ids) and smollm2.decode(made["input_ids"]) == smollm2.decode(ids)
    assert made["position_ids"] == list(range(size)) and made["name"] == "x"
    for id, label, word in zip(made["input_ids"], made["labels"], made["words"], strict=True):
        assert label == (-100 if word < asked else id)
    assert len(made["attention_mask"]) == size
    with pytest.raises(InputError, match="labels"):
        transform({"input_ids": ids, "labels": [*ids[1:], -100]})


def test_any_loader_can_use_it(smollm2):
    transform = pickle.loads(pickle.dumps(StochasTok(p=1.0).transform(smollm2)))
    rows = [smollm2.encode(line).tolist() for line in ("one more line of text", "another, quite different one")]
    examples = [{"input_ids": row} for row in rows]
    one = [transform(example)["input_ids"] for example in examples]
    assert [made["input_ids"] for made in transform(examples)] == one
    assert transform({"input_ids": rows})["input_ids"] == one  # columns, as datasets.map(batched=True) gives
    assert transform({"input_ids": rows[::-1]})["input_ids"] == one[::-1]  # the order of the data changes nothing
    assert transform.before(lambda batch: [made["input_ids"] for made in batch])(examples) == one
    tensors = transform({"input_ids": torch.tensor(rows[0])})["input_ids"]
    assert isinstance(tensors, torch.Tensor) and tensors.tolist() == one[0]
    padded = {"input_ids": [rows[0][0]] * 3 + rows[0], "attention_mask": [0] * 3 + [1] * len(rows[0])}
    made = transform(padded)
    assert made["attention_mask"].count(0) == 3
    transform.set_epoch(1)
    assert [made["input_ids"] for made in transform(examples)] != one


def test_a_million_equal_tokens(smollm2, table):
    id = int(np.argmax(table.counts))
    found = expand(np.full(1_000_000, id), table, 1.0)
    assert 1_300_000 < len(found.ids) <= 2_000_000
    assert (np.diff(found.origin) >= 0).all()


def test_what_is_refused(table):
    with pytest.raises(OptionError):
        StochasTok(p=-1)
    with pytest.raises(InputError):
        expand([10**6], table)
    with pytest.raises(InputError):
        expand([[1, 2]], table)
    assert expand([], table, 1.0).ids.tolist() == []
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModelError, match="join"):
        SplitTable.of(words)
    with pytest.raises(InputError):
        SplitTable.of("no tokenizer")


def test_it_takes_a_transformers_tokenizer(table):
    lm = tokenary.load("stories260k")
    assert SplitTable.of(lm.tokenizer).counts.tolist() == SplitTable.of(load_stories()).counts.tolist()
