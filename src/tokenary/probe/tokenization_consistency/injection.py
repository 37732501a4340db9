"""Phantoms put into clean copies: whether the probe finds what it looks for, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from tokenary.core.encodings import alternatives
from tokenary.core.seeding import substream
from tokenary.probe.tokenization_consistency.alignment import Text
from tokenary.probe.tokenization_consistency.codec import Codec, splice
from tokenary.probe.tokenization_consistency.outcomes import judge, kind


def sensitivity(codec: Codec, plains: Sequence[Text], seed: int, share: float = 0.05) -> dict[str, int]:
    """Put phantoms into clean copies and count what is found.

    Returns
    -------
    dict
        Phantoms that were ``injected``, those ``found``, those of the ``same_class``, and ``false`` ones: other words
        that count as phantoms, there or in the clean copy.
    """
    counts = dict.fromkeys(("injected", "found", "same_class", "false"), 0)
    for n, plain in enumerate(plains):
        stream, copy, injected = substream(seed, "injected phantoms", n), plain.ids, {}
        for i in reversed(range(len(plain.words))):  # from the end, so that places before stay what they are
            own = plain.span(*plain.words[i])
            options = alternatives(codec.vocabulary.id_of, b"".join(own.pieces).decode(), own.pieces)
            if stream.random() >= share or not options:
                continue
            pieces = options[int(stream.integers(len(options)))]
            stop = plain.words[i][1]
            respelled = splice(codec.text(copy), stop - len(b"".join(own.pieces)), stop, codec.ids(pieces))
            if respelled is not None:
                copy = respelled
                injected[i] = kind(own.pieces, pieces, plain.initial(plain.words[i][0]))
        every = range(len(plain.words))
        for i, found in enumerate(judge(plain, plain, every, codec.text(copy), plain).edits):
            if i in injected:
                counts["injected"] += 1
                counts["found"] += found.outcome == "phantom"
                counts["same_class"] += found.kind == injected[i]
            else:
                counts["false"] += found.outcome == "phantom"
        counts["false"] += sum(e.outcome == "phantom" for e in judge(plain, plain, every, plain, plain).edits)
    return counts
