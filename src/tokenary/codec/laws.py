"""The laws of codecs: what was coded comes back, whatever the text, the lanes and the pieces the model reads in."""

from __future__ import annotations

import numpy as np

from tokenary.codec.base import TextCodec
from tokenary.codec.integer import IntegerLlama
from tokenary.codec.lockstep import Feed, cut, decode, encode, lane_lengths
from tokenary.core.laws import Make, options_are_checked_and_fixed, require, same_tokens, the_recipe_survives_json
from tokenary.core.seeding import substream
from tokenary.models.tiny import tiny_lm


def _reader() -> IntegerLlama:
    return IntegerLlama(tiny_lm(vocab=97))


def _texts() -> dict[str, list[int]]:
    draws = substream(0, "codec law")
    phrase = draws.integers(0, 97, 11).tolist()
    return {
        "no token": [],
        "one token": [5],
        "every token": list(range(97)),
        "random": draws.integers(0, 97, 150).tolist(),
        "repetitive": (phrase * 30)[:301],
        "one token only": [3] * 200,
    }


def _round_trip(codec: TextCodec, reader: IntegerLlama, text: list[int], count: int) -> tuple[int, list[int]]:
    coded = encode(codec.open(reader, count), codec.ensemble(97, count), cut(text, count), start=1)
    lanes = decode(
        codec.open(reader, count),
        codec.ensemble(97, count),
        lane_lengths(len(text), count),
        coded,
        start=1,
    )
    return sum(map(len, coded)), [token for lane in lanes for token in lane]


def what_was_coded_comes_back(make: Make) -> None:
    """Decoding gives the tokens that were coded, for any text and number of lanes."""
    reader = _reader()
    for name, text in _texts().items():
        for count in {1, 3, make().lanes_for(len(text))}:
            _, back = _round_trip(make(), reader, text, count)
            same_tokens([back], [text], f"{name}, {count} lanes")


def the_bits_are_those_of_the_weights(make: Make) -> None:
    """The coded length is what the weights say, within the last words of the lanes."""
    codec, reader, text, count = make(), _reader(), _texts()["repetitive"], 3
    ensemble, lanes = codec.ensemble(97, count), cut(text, count)
    feed, bits = Feed(codec.open(reader, count), count, 1), 0.0
    for number in range(len(lanes[0])):
        here = [lane for lane in range(count) if number < len(lanes[lane])]
        needed = [lane for lane, needs in zip(here, ensemble.plan(here), strict=True) if needs]
        logits = dict(zip(needed, feed.logits(needed), strict=True)) if needed else {}
        for lane in here:
            weights, token = ensemble.weights(lane, logits.get(lane)), lanes[lane][number]
            require(bool((weights >= 0).all() and np.isfinite(weights).all()), "a weight is negative or no number")
            require(bool((weights == np.rint(weights)).all()), "a weight is no whole number")
            bits -= float(np.log2((weights[token] / weights.sum() * (2**24 - 97) + 1) / 2**24))
            ensemble.update(lane, token)
            feed.add(lane, token)
    size, _ = _round_trip(make(), reader, text, count)
    require(bits / 8 - 1 <= size <= bits / 8 + 8 * count + 1, f"{size} bytes where the weights say {bits / 8:.1f}")


def repetition_is_learnt(make: Make) -> None:
    """A phrase that comes again and again costs less than random tokens do."""
    texts, reader = _texts(), _reader()
    repeated, _ = _round_trip(make(), reader, texts["repetitive"], 1)
    random, _ = _round_trip(make(), reader, texts["random"] + texts["random"][::-1] + [0], 1)
    require(repeated < 0.8 * random, f"{repeated} bytes, and {random} of random tokens")


def every_run_is_alike(make: Make) -> None:
    """Two encoders of one text give the same bytes, also from one instance of the method."""
    codec, reader, text = make(), _reader(), _texts()["random"]

    def once() -> list[bytes]:
        return encode(codec.open(reader, 2), codec.ensemble(97, 2), cut(text, 2), 1)

    first = once()
    require(first == once(), "a second run of the same instance gives other bytes")


LAWS = {
    "codec": (
        options_are_checked_and_fixed,
        the_recipe_survives_json,
        what_was_coded_comes_back,
        the_bits_are_those_of_the_weights,
        repetition_is_learnt,
        every_run_is_alike,
    )
}
