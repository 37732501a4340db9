"""FASA: a quarter of a head's frequencies, found by calibration, find most of the tokens that the whole head finds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.bench.quality import sliding_texts
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.data import stdlib_code, wikitext2
from tokenary.hf.cache import TokenLayer
from tokenary.hf.target import Target, attached
from tokenary.memory.base import ReadLayer
from tokenary.memory.fasa import FASA
from tokenary.memory.fasa.calibration import write
from tokenary.memory.fasa.chunks import Agreement, Pairs, dominant, measure_agreement, pairs_of
from tokenary.memory.read_base import PartialRead, Seen, in_prompt
from tokenary.memory.read_oracle import ReadOracle, highest_logits
from tokenary.memory.read_random import ReadRandom
from tokenary.memory.read_recent import ReadRecent
from tokenary.models import LM
from tokenary.run import load

READ, SHARE = 128, 0.25
BUDGET = Budget(tokens=READ)
Sets = Mapping[str, tuple[Pairs, Agreement]]


class Overlap(ReadLayer):
    """Attends the ordinary way, and measures how much of every head's top tokens each rival finds.

    Parameters
    ----------
    factors : mapping of str to Tensor
        Dimensions that each rival ranks by, 1 or 0, (Hq, D).
    sparq : int
        Dimensions of the largest query entries that SparQ ranks by.
    """

    def __init__(self, factors: Mapping[str, Tensor], sparq: int) -> None:
        self.factors, self.sparq = factors, sparq
        self.shares: dict[str, float] = {}

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Measure on decoded tokens."""
        if in_prompt(layer):
            return
        seen = Seen.of(mask, query.shape[2], key)
        count = torch.full_like(seen.total, READ)
        best = highest_logits(query, key, seen, count)

        def share(chosen: Tensor) -> float:
            return float((chosen & best).sum()) / float(best.sum())

        for name, factor in self.factors.items():
            self.shares[name] = share(highest_logits(query * factor[:, None], key, seen, count))
        largest = query.abs().topk(self.sparq, dim=-1).indices
        large = torch.zeros_like(query).scatter_(-1, largest, query.gather(-1, largest))
        self.shares["SparQ"] = share(highest_logits(large, key, seen, count))
        recent = (seen.ranks < 4) | (seen.ranks >= (seen.total - (READ - 4))[..., None])
        self.shares["sinks and window"] = share((recent & seen.slots)[:, None].expand_as(best))
        self.shares["random"] = float((count / seen.total).float().mean())  # what a uniform choice finds on average


def run(
    seed: int = 0, texts: int = 4, length: int = 2048, steps: int = 16, decoded: int = 96, code: bool = False
) -> Outcome:
    """Measure which of each head's top 128 tokens are found, and the loss of reading only those, in float32.

    Parameters
    ----------
    seed : int
        Of random chunks, and of the code that is read.
    texts : int
        Texts to calibrate on, of 1500 tokens, and others to measure on.
    length : int
        Tokens of a text to measure on.
    steps : int
        Tokens written after each text of the calibration.
    decoded : int
        Last tokens of a text, which are decoded.
    code : bool
        Measure on Python source, calibrated on Wikipedia as always.
    """
    lm = load("smollm2", dtype="float32")
    source = stdlib_code(seed, 400_000) if code else wikitext2()[:400_000]
    sets = _sets(lm, texts, min(1500, length), steps, seed)
    pieces = sliding_texts(lm, source, texts, length)
    shares: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        policies = _policies(lm, sets, Path(folder))
        factors = {name: _factors(lm, *sets[name]) for name in sets}
        for ids in pieces:
            for name, share, loss in _measure(lm, ids, decoded, policies, factors):
                if share is not None:
                    shares.setdefault(name, []).append(share)
                if loss is not None:
                    losses.setdefault(name, []).append(loss)
    found = {name: np.array(values) for name, values in shares.items()}
    rise = {name: float(np.mean(values) - np.mean(losses["full"])) for name, values in losses.items()}

    def figure(name: str) -> Figure:
        return Figure.of(name, found[name])

    details: dict[str, Any] = {
        "overlap": {name: float(values.mean()) for name, values in found.items()},
        "loss of full attention": float(np.mean(losses["full"])),
        "rise of the loss": rise,
        "rise over that of sinks and window": rise["fasa"] / rise["read-recent"],
        "share of key dimensions read to rank": _dimensions(lm, sets["fasa"][1]),
    }
    if code:
        other = sliding_texts(lm, source, 2 * texts, min(1500, length), shift=0.5)[1::2]
        on_code = measure_agreement(lm.model, other, steps, pairs_of(lm.model, "rotation"), (READ,))
        details["dominant chunks shared with a calibration on code"] = _common(lm, sets["fasa"][1], on_code)
    return Outcome(
        method=figure("fasa"),
        baseline=figure("random chunks"),
        controls=(Figure("none", 1.0), figure("random"), figure("sinks and window"), figure("lowest frequencies")),
        n=texts,
        paired_spread=standard_error(found["fasa"] - found["random chunks"]),
        details=details,
    )


def _sets(lm: LM, texts: int, tokens: int, steps: int, seed: int) -> dict[str, tuple[Pairs, Agreement]]:
    """Agreement of every way to choose chunks: measured, or made up so that a certain choice comes out."""
    prompts = sliding_texts(lm, wikitext2("valid")[:400_000], texts, tokens)
    measured: dict[Pairs, Agreement] = {
        pairs: measure_agreement(lm.model, prompts, steps, pairs_of(lm.model, pairs), (READ,))
        for pairs in ("rotation", "adjacent")
    }
    shape = measured["rotation"].mean.shape
    drawn = torch.from_numpy(substream(seed, "fasa claim").random(shape)).float()
    slow = torch.arange(shape[-1]).float().expand(shape) / shape[-1]
    return {
        "fasa": ("rotation", measured["rotation"]),
        "neighbouring dimensions": ("adjacent", measured["adjacent"]),
        "random chunks": ("rotation", Agreement((READ,), drawn)),
        "lowest frequencies": ("rotation", Agreement((READ,), slow)),
    }


def _policies(lm: LM, sets: Sets, folder: Path) -> dict[str, PartialRead]:
    """Everything whose loss is measured, ready for the model."""
    made: dict[str, PartialRead] = {
        "read-oracle": ReadOracle(read=BUDGET),
        "read-recent": ReadRecent(read=BUDGET),
        "read-random": ReadRandom(read=BUDGET),
    }
    for name, (pairs, agreement) in sets.items():
        path = folder / f"{name}.json"
        write(path, lm.model, pairs, agreement)
        made[name] = FASA(read=BUDGET, chunks=SHARE, pairs=pairs, calibration=str(path))
    made["fasa, one set a group"] = FASA(read=BUDGET, chunks=SHARE, sets="group", calibration=str(folder / "fasa.json"))
    for policy in made.values():
        policy.prepare(lm.model)
    return made


def _chosen(lm: LM, agreement: Agreement, shared: bool = False) -> list[Tensor]:
    """Dominant chunks of every layer, (Hq, C)."""
    config = lm.model.config
    groups, chunks = config.num_attention_heads // config.num_key_value_heads, agreement.mean.shape[-1]
    return [dominant(layer, int(SHARE * chunks), groups, shared) for layer in agreement.near(READ)]


def _factors(lm: LM, pairs: Pairs, agreement: Agreement) -> list[Tensor]:
    """Dimensions of the dominant chunks of every layer, 1 or 0, (Hq, D)."""
    dims = [pairs_of(lm.model, pairs)[chunks].flatten(1) for chunks in _chosen(lm, agreement)]
    size = 2 * agreement.mean.shape[-1]
    return [torch.zeros(len(each), size).scatter_(1, each, 1.0) for each in dims]


def _measure(
    lm: LM, ids: list[int], decoded: int, policies: Mapping[str, PartialRead], factors: Mapping[str, list[Tensor]]
) -> list[tuple[str, float | None, float | None]]:
    """Overlap and loss of every rival on the last tokens of one text: name, overlap, loss.

    The text is read once. Its last tokens are one draft that is rolled back: each reads what it would read alone.
    """
    target, tail = Target(lm.model), ids[-decoded:]
    layers = target.cache.token_layers
    chosen = {name: each[1:] for name, each in factors.items()}  # the first layer reads everything
    watching = [Overlap({name: each[at] for name, each in chosen.items()}, 16) for at in range(len(layers) - 1)]

    def loss() -> float:
        logits = target.score(TokenTree.chains([tail[:-1]]))[0]
        target.commit([[]])
        return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(tail[1:])))

    with attached(lm.model):
        target.prefill([ids[:-decoded]])
        for layer, state in zip(layers[1:], watching, strict=True):
            layer.reader = state
        made: list[tuple[str, float | None, float | None]] = [("full", None, loss())]
        for name in watching[0].shares:
            made.append((name, float(np.mean([state.shares[name] for state in watching])), None))
        for name, policy in policies.items():
            states = policy.attach(lm.model.config)
            layers[0].reader = None
            for layer, reader in zip(layers[1:], states[1:], strict=True):
                layer.reader = reader
            made.append((name, None, loss()))
    return made


def _dimensions(lm: LM, agreement: Agreement) -> dict[str, float]:
    """Share of a key's dimensions that any query head of its group ranks by."""
    groups = lm.model.config.num_attention_heads // lm.model.config.num_key_value_heads
    found = {}
    for name, shared in (("head", False), ("group", True)):
        unions = [
            len(torch.unique(group))
            for layer in _chosen(lm, agreement, shared)[1:]
            for group in layer.view(-1, groups * layer.shape[1])
        ]
        found[name] = float(np.mean(unions)) / agreement.mean.shape[-1]
    return found


def _common(lm: LM, one: Agreement, other: Agreement) -> float:
    """Share of the dominant chunks that two calibrations have in common."""
    pairs = zip(_chosen(lm, one)[1:], _chosen(lm, other)[1:], strict=True)
    return float(np.mean([torch.isin(a, b).float().mean() for x, y in pairs for a, b in zip(x, y, strict=True)]))


CLAIM = Claim(
    slug="fasa",
    statement="A quarter of each head's frequency chunks, found by calibration, find at least 10% more of the head's "
    "top 128 tokens than as many random chunks",
    metric="share of a head's 128 largest logits that is found",
    direction="higher",
    threshold=1.1,
    run=run,
    variation="measured on Python source, calibrated on Wikipedia",
    held_out={"code": True},
    minutes=10,
    fast={"texts": 2, "length": 512, "steps": 2, "decoded": 32},
)
