"""Nacrith: text written after the model was trained, in far fewer bits than general compressors need.

Every figure is the size of a whole coded block (lengths, checksum and all), not a log-likelihood, and one block of
every run is decoded. The model's own size is not counted. Beside the method stand ablations on the same tokens and
logits: what each part of the ensemble saves, and what counts of 16 instead of 24 bits would cost.
"""

from __future__ import annotations

import bz2
import lzma
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome
from tokenary.core.errors import InputError
from tokenary.core.seeding import substream

#: Packages of which a release note of 2026 stands in the description.
_NOTES = ("pydantic", "charset-normalizer", "pathspec")


def run(
    seed: int = 0,
    texts: Sequence[str] = ("notes", "notes", "enwik8", "enwik8", "enwik8"),
    piece: int = 8192,
    check: bool = True,
) -> Outcome:
    """Code pieces of texts; compare with the smaller of xz -9 and bzip2 -9 on each.

    Parameters
    ----------
    seed : int
        Chooses the pieces.
    texts : sequence of {"notes", "enwik8", "source", "french"}
        Where each piece is from: release notes of 2026 in installed packages, a random place of enwik8, modules of the
        standard library, the French Declaration of Human Rights.
    piece : int
        Bytes of each.
    check : bool
        Decode the first block and compare.
    """
    from tokenary.codec.backends import reader_for
    from tokenary.codec.blocks import decode_block, encode_block
    from tokenary.codec.container import CODED
    from tokenary.codec.files import machine_for
    from tokenary.codec.nacrith import Nacrith
    from tokenary.models import load

    lm = load("smollm2", dtype="float32")
    machine = machine_for(lm, Nacrith(), reader_for(lm))
    bits: list[float] = []
    rivals: list[float] = []
    parts: list[dict[str, float]] = []
    whole = True
    for number, name in enumerate(texts):
        data = _piece(name, piece, number, seed)
        kind, payload = encode_block(data, machine)
        if check and number == 0:
            whole = decode_block(kind, payload, len(data), machine) == data and kind == CODED
        bits.append(8 * len(payload) / len(data))
        rivals.append(8 * min(len(lzma.compress(data, preset=9)), len(bz2.compress(data, 9))) / len(data))
        parts.append(_ablation(data, machine))
    differences = np.array(rivals) - np.array(bits)
    mean = {key: float(np.mean([row[key] for row in parts])) for key in parts[0]}
    return Outcome(
        method=Figure("nacrith", float(np.mean(bits)) if whole else math.nan, _error(bits)),
        baseline=Figure("the smaller of xz -9 and bzip2 -9", float(np.mean(rivals)), _error(rivals)),
        controls=(
            Figure("none", 8.0),
            Figure("random", mean["random"]),
            Figure("the language model alone", mean["model alone"]),
        ),
        n=len(texts),
        paired_spread=_error(differences.tolist()),
        details={
            "bits a byte of each piece": dict(zip(_numbered(texts), bits, strict=True)),
            "xz or bzip2": dict(zip(_numbered(texts), rivals, strict=True)),
            "ablation, ideal bits a byte": mean,
            "ablation of each piece": dict(zip(_numbered(texts), parts, strict=True)),
            "a block came back": whole if check else None,
        },
    )


def _ablation(data: bytes, machine: Any) -> dict[str, float]:
    """Ideal bits a byte of the text under ensembles with and without each part, from the same logits."""
    from tokenary.codec.lockstep import FeedAhead, cut, rounds
    from tokenary.codec.nacrith import Nacrith

    codecs = {
        "model alone": Nacrith(head=False, mixer="off"),
        "and head": Nacrith(mixer="off"),
        "and n-grams": Nacrith(head=False),
        "all": Nacrith(),
        "all, without factors": Nacrith(factors=0.0),
        "all, and skip": Nacrith(skip=1.5),
        "the paper's options": Nacrith(mixer="paper", rate=0.001, skip=1.5),
    }
    tokens = [token for segment in machine.spelling.segments(data) for token in segment.tokens]
    lanes, size = cut(tokens, machine.codec.lanes_for(len(tokens))), machine.reader.vocab_size
    feed = FeedAhead(machine.codec.open(machine.reader, len(lanes)), lanes, machine.start)
    ensembles = {name: codec.ensemble(size, len(lanes)) for name, codec in codecs.items()}
    bits = dict.fromkeys((*codecs, "model alone, 16-bit counts"), 0.0)
    skipped = 0
    for number, here in enumerate(rounds([len(lane) for lane in lanes])):
        logits = feed.logits(here)
        for name, ensemble in ensembles.items():
            needed = ensemble.plan(here)
            skipped += needed.count(False) if name == "all, and skip" else 0
            for lane, needs, row in zip(here, needed, logits, strict=True):
                weights, token = ensemble.weights(lane, row if needs else None), lanes[lane][number]
                bits[name] += _cost(weights, token, 24)
                if name == "model alone":
                    bits["model alone, 16-bit counts"] += _cost(weights, token, 16)
                ensemble.update(lane, token)
        for lane in here:
            feed.add(lane, lanes[lane][number])
    rates = {name: value / len(data) for name, value in bits.items()}
    rates["random"] = len(tokens) * math.log2(size) / len(data)
    rates["share skipped"] = skipped / len(tokens)
    return rates


def _cost(weights: Any, token: int, precision: int) -> float:
    """Bits of a token under counts ``floor(p (2^precision - V)) + 1``, the rest to the likeliest."""
    size, total = len(weights), float(weights.sum())
    counts = np.floor(weights * ((2**precision - size) / total)) + 1
    counts[int(counts.argmax())] += 2**precision - counts.sum()
    return precision - math.log2(counts[token])


def _piece(name: str, size: int, number: int, seed: int) -> bytes:
    if name == "enwik8":
        from tokenary.data.loaders import enwik8

        start = int(substream(seed, "nacrith", number).integers(0, 99)) * 1_000_000
        return enwik8(start + size)[start:]
    whole = {"notes": _notes, "source": _source, "french": _french}[name]()
    start = int(substream(seed, "nacrith", number).integers(0, max(1, len(whole) - size)))
    return whole[start : start + size]


def _notes() -> bytes:
    """Release notes of 2026: of each package, what stands between its first date of 2026 and its first of 2025."""
    found = []
    for package in _NOTES:
        try:
            text = str(metadata(package).json.get("description", ""))
        except PackageNotFoundError:
            continue
        first = re.search(r"2026-\d\d-\d\d", text)
        if first is not None:
            last = re.search(r"2025-\d\d-\d\d", text)
            found.append(text[first.start() : last.start() if last else None])
    if not found:
        raise InputError(f"no release notes of 2026: install one of {', '.join(_NOTES)}")
    return "\n".join(found).encode()


def _source() -> bytes:
    import argparse
    import inspect
    import mailbox
    import statistics

    return "\n".join(map(inspect.getsource, (argparse, statistics, mailbox))).encode()


def _french() -> bytes:
    from tokenary.data.loaders import udhr

    return "\n".join(text for _, text in sorted(udhr("fra").items())).encode()


def _numbered(texts: Sequence[str]) -> list[str]:
    return [f"{name} {number}" for number, name in enumerate(texts)]


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def timing(seed: int = 0) -> Mapping[str, float]:
    """Tokens a second of one block of 8 lanes both ways, and of the loop of one token at a time in plain torch."""
    import time

    import torch

    from tokenary.codec.backends import reader_for
    from tokenary.codec.lockstep import cut, decode, encode, lane_lengths
    from tokenary.codec.nacrith import Nacrith
    from tokenary.models import load

    lm = load("smollm2", dtype="float32")
    reader, codec = reader_for(lm), Nacrith()
    tokens = lm.encode([_piece("enwik8", 16384, 0, seed).decode(errors="ignore")], raw=True)[0][:2048]
    size = reader.vocab_size
    began = time.perf_counter()
    coded = encode(codec.open(reader, 8), codec.ensemble(size, 8), cut(tokens, 8), 0)
    middle = time.perf_counter()
    decode(codec.open(reader, 8), codec.ensemble(size, 8), lane_lengths(len(tokens), 8), coded, 0)
    end = time.perf_counter()
    count, past = 256, None
    with torch.inference_mode():
        for token in tokens[:count]:
            found = lm.model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = found.past_key_values
            torch.softmax(found.logits[0, -1].double(), -1).cumsum(-1)
    naive = count / (time.perf_counter() - end)
    return {
        "tokens a second, encoding": len(tokens) / (middle - began),
        "tokens a second, decoding": len(tokens) / (end - middle),
        "tokens a second, one at a time in torch": naive,
        "encoding over one at a time": len(tokens) / (middle - began) / naive,
        "decoding over one at a time": len(tokens) / (end - middle) / naive,
    }


CLAIM = Claim(
    slug="nacrith",
    statement="pieces of 8 kB of release notes of 2026 and of enwik8 take at most half the bits of the smaller of "
    "xz -9 and bzip2 -9, and a block comes back",
    metric="bits a byte of the whole coded block (the model's size not counted)",
    direction="lower",
    threshold=2.0,
    run=run,
    variation="Python source of the standard library and the French Declaration of Human Rights, pieces of 6 kB",
    held_out={"texts": ("source", "french", "source", "french"), "piece": 6144},
    minutes=8,
    fast={"texts": ("notes", "notes"), "piece": 1536, "check": False},
    timing=timing,
)
