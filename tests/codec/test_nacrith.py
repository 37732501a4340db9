import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenary.codec.coder import Decoder, Encoder
from tokenary.codec.lockstep import cut, decode, encode, lane_lengths
from tokenary.codec.nacrith import Nacrith
from tokenary.codec.nacrith.ensemble import OnlineEnsemble, Settings
from tokenary.codec.nacrith.ngram import NGrams
from tokenary.core.errors import InputError, OptionError

VOCAB = 12
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=60)


def dense(text, context, order):
    """The n-gram distribution by its definition: order 0, then every order that knows the context."""
    p = np.array([text.count(v) + 1.0 for v in range(VOCAB)]) / (len(text) + VOCAB)
    for k in range(1, order + 1):
        if len(context) < k:
            break
        after = [text[i + k] for i in range(len(text) - k) if text[i : i + k] == context[-k:]]
        if after:
            share = len(after) / (len(after) + 5)
            p = share * np.bincount(after, minlength=VOCAB) / len(after) + (1 - share) * p
    return p


def counted(text, order=4, contexts=1000):
    grams = NGrams(VOCAB, order, contexts)
    for i, token in enumerate(text):
        grams.update(text[:i][-order:] if order else [], token)
    return grams


@given(TOKENS, st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_ngrams_are_their_definition(text, order):
    grams = counted(text, order)
    context = text[-order:] if order else []
    guess = grams.guess(context)
    found = np.array([grams.probability(guess, v) for v in range(VOCAB)])
    expected = dense(text, context, order)
    assert np.allclose(found, expected, atol=1e-12)
    assert abs(grams.entropy(guess) + (expected * np.log2(expected)).sum()) < 1e-9


def test_a_table_forgets_its_oldest_contexts_first():
    grams = counted([0, 1, 2, 3, 4, 5], order=1, contexts=3)
    assert [bool(grams.guess([token]).extra) for token in range(6)] == [False, False, True, True, True, False]


def test_a_context_keeps_64_continuations():
    grams = NGrams(200, 1)
    for token in range(100):
        grams.update([7], token)
    known = grams.guess([7]).extra
    assert len(known) == 64 and 99 in known and 0 not in known
    for token in known:
        grams.update([7], token)
    grams.update([7], 150)  # every continuation was seen twice: the newcomer is ignored
    assert 150 not in grams.guess([7]).extra


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kind(text, context, token, order):
    """The kind of a guess by its definition: the highest order that saw the token here, its count and share."""
    for k in range(min(order, len(context)), 0, -1):
        after = [text[i + k] for i in range(len(text) - k) if text[i : i + k] == context[-k:]]
        if token in after:
            count = after.count(token)
            share = 0 if count == len(after) else 1 if 2 * count >= len(after) else 2
            return k, {1: 0, 2: 1, 3: 2, 4: 2}.get(count, 3), share
    raise AssertionError


def reference(text, logits, settings):
    """Probabilities of each token by the formulas, in floating point; one lane."""
    bias, first, factors, found = np.zeros(VOCAB), {}, {}, []
    for i, token in enumerate(text):
        warm = i >= settings.warm_up and settings.mixer != "off"
        model = softmax(logits[i] + bias)
        p = model
        context = text[:i][-settings.order :]
        if warm:
            grams = dense(text[:i], context, settings.order)
            seen = counted(text[:i], settings.order).guess(context)
            level = {v: sum(model[v] < 0.5 / 4**k for k in range(6)) for v in seen.extra}
            cells = {v: (kind(text[:i], context, v, settings.order), level[v]) for v in seen.extra}
            raised = np.array([model[v] * factors.get(cells.get(v), 1.0) for v in range(VOCAB)])
            top = max(seen.extra.values(), default=0.0)
            key = 0 if settings.mixer == "paper" else (seen.order, min(int(top * 8), 7))
            entropy = -(grams * np.log2(grams)).sum()
            if settings.skip and seen.base < 0.5 and entropy < settings.skip:
                found.append(grams[token])
                continue
            model = raised / raised.sum()
            for v, cell in cells.items() if settings.mixer == "context" else ():
                factors[cell] = factors.get(cell, 1.0) * (1 - settings.factors * (model[v] - (v == token)))
            w = first.get(key, 0.85)
            p = w * model + (1 - w) * grams
            up, down = w * math.sqrt(max(model[token], 1e-8)), (1 - w) * math.sqrt(max(grams[token], 1e-8))
            w = up / (up + down)
            first[key] = 0.98 * w + 0.02 * 0.85 if settings.mixer == "context" else w
        found.append(p[token])
        if settings.head:
            bias -= settings.rate * (model - np.eye(VOCAB)[token])
    return np.array(found)


@pytest.mark.parametrize(
    "settings_",
    [
        Settings(warm_up=3, skip=0),
        Settings(warm_up=3, skip=0, factors=0.5),
        Settings(warm_up=0, skip=1.5),
        Settings(mixer="paper", rate=0.001, warm_up=5, skip=1.5),
        Settings(head=False, warm_up=0, skip=0, order=2),
        Settings(mixer="off", rate=0.3),
    ],
)
def test_the_ensemble_is_its_formulas(settings_):
    draws = np.random.default_rng(3)
    text = (draws.integers(0, VOCAB, 9).tolist() * 12)[:100]
    text = [token if draws.random() < 0.8 else int(draws.integers(0, VOCAB)) for token in text]
    logits = draws.normal(0, 3, (100, VOCAB)).astype(np.float32)
    ensemble, found, skipped = OnlineEnsemble(VOCAB, 1, settings_), [], 0
    for token, z in zip(text, logits, strict=True):
        (needed,) = ensemble.plan([0])
        skipped += not needed
        weights = ensemble.weights(0, z if needed else None)
        found.append(weights[token] / weights.sum())
        ensemble.update(0, token)
    assert np.abs(np.log(found) - np.log(reference(text, logits, settings_))).max() < 0.01
    assert (skipped > 0) == (settings_.skip > 0 and settings_.mixer != "off")


# ------------------------------------------------------------------------------------------------- the coder


def read_back(data, all_weights):
    """Decode as docs/codec.md says, in plain integers."""
    words = list(struct.unpack(f"<{len(data) // 4}I", data))
    take = lambda: words.pop(0) if words else 0  # noqa: E731
    lower, span = 0, 2**64 - 1
    point = take() << 32 | take()
    for weights in all_weights:
        size, total = len(weights), float(sum(weights))
        scale = (2**24 - size) / total
        ends, running = [], 0.0
        for i, weight in enumerate(weights):
            ends.append(int(running * scale) + i)
            running += weight
        ends.append(2**24)
        step = span >> 24
        quantile = ((point - lower) % 2**64) // step
        symbol = max(i for i in range(size) if ends[i] <= quantile)
        yield symbol
        lower = (lower + step * ends[symbol]) % 2**64
        span = step * (ends[symbol + 1] - ends[symbol])
        if span < 2**32:
            lower, span, point = (lower << 32) % 2**64, span << 32, ((point << 32) | take()) % 2**64


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 2**40), min_size=6, max_size=6)), max_size=80))
@settings(deadline=None, max_examples=60)
def test_the_coder_is_the_one_that_is_documented(symbols):
    symbols = [(s, np.array(w, np.float64)) for s, w in symbols if sum(w)]
    encoder = Encoder()
    for symbol, weights in symbols:
        encoder.put(symbol, weights)
    data = encoder.finish()
    decoder = Decoder(data)
    assert [decoder.get(weights) for _, weights in symbols] == [symbol for symbol, _ in symbols]
    assert list(read_back(data, [weights for _, weights in symbols])) == [symbol for symbol, _ in symbols]


def test_a_lane_of_odd_bytes_is_refused():
    with pytest.raises(InputError):
        Decoder(b"abc")


# ---------------------------------------------------------------------------------------------------- lanes


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("skip", [0.0, 1.5])
def test_lanes_come_back(reader, exact, skip, monkeypatch):
    codec = Nacrith(window=24, drop=8, warm_up=5, skip=skip)
    text = (np.random.default_rng(0).integers(0, 270, 17).tolist() * 12)[:190]
    lanes = codec.open(reader, 3)
    monkeypatch.setattr(type(lanes), "exact", exact)
    coded = encode(lanes, codec.ensemble(270, 3), cut(text, 3), 0)
    back = decode(codec.open(reader, 3), codec.ensemble(270, 3), lane_lengths(190, 3), coded, 0)
    assert [token for lane in back for token in lane] == text


def test_reading_ahead_changes_no_byte(reader, monkeypatch):
    text, codec = np.random.default_rng(0).integers(0, 270, 100).tolist(), Nacrith(window=24, drop=8, skip=1.0)
    found = []
    for exact in (True, False):
        lanes = codec.open(reader, 2)
        monkeypatch.setattr(type(lanes), "exact", exact)
        found.append(encode(lanes, codec.ensemble(270, 2), cut(text, 2), 0))
    assert found[0] == found[1]


def test_skipped_tokens_do_not_ask_the_model(reader):
    class Counted:
        exact, drop = False, 8

        def __init__(self):
            self.lanes, self.asked = reader.open(1, 24, 8), 0

        def read(self, tokens):
            return self.lanes.read(tokens)

        def logits(self, states):
            self.asked += len(states)
            return self.lanes.logits(states)

    asked = {}
    for skip in (0.0, 1.5):
        lanes = Counted()
        encode(lanes, Nacrith(window=24, drop=8, warm_up=5, skip=skip).ensemble(270, 1), [[5, 6, 7] * 40], 0)
        asked[skip] = lanes.asked
    assert asked[0.0] == 120 and asked[1.5] < 60


def test_options_are_refused():
    with pytest.raises(OptionError):
        Nacrith(window=16, drop=16)
    with pytest.raises(OptionError):
        Nacrith(window=16, drop=8, sinks=8)
    with pytest.raises(OptionError):
        Nacrith(window=64, drop=8, sinks=9)
    with pytest.raises(OptionError):
        Nacrith(mixer="soft")
    assert Nacrith(lanes=4, rate=0.001).spec() == "nacrith:lanes=4,rate=0.001" and Nacrith().spec() == "nacrith"
