"""ZipCache: at the same bits, tokens chosen by normalized attention deserve their precision more than others."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.bench.quality import sliding_texts
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.tree import TokenTree
from tokenary.data import prose, stdlib_code
from tokenary.hf.cache import PassInfo, TokenCache
from tokenary.hf.target import Target, attached
from tokenary.memory.zipcache import ZipCache
from tokenary.memory.zipcache.quantizers import SCHEMES, Scheme
from tokenary.memory.zipcache.saliency import Probes, Saliency, normalize, probe_positions, received
from tokenary.models import LM
from tokenary.run import load

#: Every set is of the same size; those of the last four rows are no sets, but other ways to spend about as many bits.
METHODS: dict[str, dict[str, Any]] = {
    "zipcache": {},
    "accumulated": {"saliency": "accumulated", "probes": "all"},
    "random": {"saliency": "random"},
    "recent": {"saliency": "recent"},
    "all queries": {"probes": "all"},
    "divided by length": {"saliency": "length"},
    "3 bits": {"high": 3, "low": 3},
    "3 bits, a token": {"high": 3, "low": 3, "keys": "token", "values": "token"},
    "4 bits, a token": {"high": 4, "low": 4, "keys": "token", "values": "token"},
    "groups of 32": {"high": 3, "low": 2, "keys": "group", "values": "group", "salient": 0.3},
}


class Read:
    """A text whose prompt was read once, so that every method starts from the same numbers."""

    def __init__(self, lm: LM, ids: Sequence[int], prompt_tokens: int) -> None:
        self.lm, self.ids, self.prompt_tokens = lm, list(ids), prompt_tokens
        # With stores that ask for queries, those of the prompt are there; nothing is stored before a commit.
        self.cache = TokenCache(lm.model.config, stores=ZipCache().attach(lm.model.config))
        self.cache.begin(PassInfo(prompt=True))
        prompt = torch.tensor([self.ids[:prompt_tokens]])
        self.logits: Tensor = lm.model(
            input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        for layer in self.cache.token_layers:
            layer.store = None

    def states(self, layer: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Queries (Hq, N, D), keys and values (Hkv, N, D) of a layer, and the scale of the logits."""
        found = self.cache.token_layers[layer]
        assert found.queries is not None and found.keys is not None and found.values is not None
        return found.queries[0][0], found.keys[0], found.values[0], found.queries[1]

    def loss(self, method: ZipCache | None) -> tuple[float, float, float]:
        """Nats a token behind the prompt; bits a stored number after the prompt, and at the end."""
        target = Target(self.lm.model)
        target.cache, target.lengths = copy.deepcopy(self.cache), [0]
        layers = target.cache.token_layers
        stores = [None] * len(layers) if method is None else method.attach(self.lm.model.config)
        for layer, store in zip(layers, stores, strict=True):
            layer.store = store
        target.commit([range(self.prompt_tokens)])

        def bits() -> float:
            return 32.0 if method is None else float(np.mean([store.bits_per_value for store in stores if store]))

        after, logits, at = bits(), [self.logits[0]], self.prompt_tokens
        while at < len(self.ids) - 1:
            width = min(len(self.ids) - 1 - at, target.room(0) or 64)
            logits.append(target.score(TokenTree.chains([self.ids[at : at + width]]))[0])
            target.commit([range(width)])
            at += width
        real = torch.tensor(self.ids[self.prompt_tokens :])
        return float(torch.nn.functional.cross_entropy(torch.cat(logits).float(), real)), after, bits()


@torch.inference_mode()
def run(
    seed: int = 0,
    texts: int = 8,
    prompt_tokens: int = 1024,
    new_tokens: int = 256,
    salient: float = 0.6,
    code: bool = False,
    methods: Sequence[str] = tuple(METHODS),
) -> Outcome:
    """Measure the rise of the loss over a full cache, in float32, on real text.

    Parameters
    ----------
    seed : int
        Of probes and random sets; chooses the code that is read.
    texts : int
        Pieces of text.
    prompt_tokens, new_tokens : int
        Of each piece: read and stored, then fed as they are.
    salient : float
        Share of the tokens in 4 bits; the others get 2.
    code : bool
        Python source instead of prose.
    methods : sequence of str
        Names of `METHODS`; the first three are needed.
    """
    lm = load("smollm2", dtype="float32")
    pieces = sliding_texts(lm, stdlib_code(seed, 200_000) if code else prose(), texts, prompt_tokens + new_tokens)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    full: list[float] = []
    errors: list[dict[str, float]] = []
    ranks: list[dict[str, float]] = []
    with attached(lm.model):
        for number, ids in enumerate(pieces):
            text = Read(lm, ids, prompt_tokens)
            full.append(text.loss(None)[0])
            for name in methods:
                options = {"salient": salient, "seed": seed, **METHODS[name]}
                found[name].append(text.loss(ZipCache(**options)))
            if number < 2:
                errors.append(value_errors(text))
                ranks.append(correlations(text, seed))
    rises = {name: np.array([loss for loss, _, _ in rows]) - np.array(full) for name, rows in found.items()}
    ours, theirs = rises["zipcache"], rises["accumulated"]

    def figure(name: str) -> Figure:
        return Figure.of(name, rises[name])

    return Outcome(
        method=figure("zipcache"),
        baseline=figure("accumulated"),
        controls=(Figure("none", 0.0), *(figure(name) for name in methods[2:])),
        n=len(pieces),
        paired_spread=standard_error(ours - theirs),
        details={
            "full_nll": float(np.mean(full)),
            "texts_better_than_accumulated": int((ours < theirs).sum()),
            "texts_better_than_random": int((ours < rises["random"]).sum()),
            "paired_spread_over_random": standard_error(ours - rises["random"]),
            "bits_a_number_after_the_prompt": {name: rows[0][1] for name, rows in found.items()},
            "bits_a_number_at_the_end": {name: rows[0][2] for name, rows in found.items()},
            "relative_error_of_values": _mean(errors),
            "rank_correlation_with_all_queries": _mean(ranks),
        },
    )


def value_errors(text: Read) -> dict[str, float]:
    """Relative error of values, and bits a number, for each quantizer at 2 and at 4 bits; mean over layers."""
    schemes: tuple[Scheme, ...] = ("separable", "token", "group")
    found: dict[str, list[float]] = {}
    for layer in range(len(text.cache.token_layers)):
        values = text.states(layer)[2]
        orders = [torch.arange(values.shape[1]).expand(len(values), -1)]
        for bits in (2, 4):
            for scheme in schemes:
                made = SCHEMES[scheme].of(values, orders, [bits], scheme == "separable")
                off = made.restored(orders, values.dtype) - values
                found.setdefault(f"{scheme}, {bits} bits", []).append(float(off.norm() / values.norm()))
                size = 8 * sum(tensor.nbytes for tensor in made.tensors()) / values.numel()
                found.setdefault(f"{scheme}, {bits} bits: bits", []).append(size)
    return {name: float(np.mean(each)) for name, each in found.items()}


def correlations(text: Read, seed: int) -> dict[str, float]:
    """Spearman correlation of scores with those of all queries, normalized; mean over layers and heads."""
    kinds: dict[str, tuple[Probes, Saliency]] = {
        "both": ("both", "normalized"),
        "recent": ("recent", "normalized"),
        "random": ("random", "normalized"),
        "accumulated, all": ("all", "accumulated"),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for layer in range(len(text.cache.token_layers)):

        def score(probes: Probes, saliency: Saliency, layer: int = layer) -> Tensor:
            queries, keys, _, scale = text.states(layer)
            at = torch.tensor(probe_positions(keys.shape[1], 0.1, probes, seed, layer))
            return normalize(received(queries[:, at], at, keys, scale), at, 0, saliency)

        exact = _ranks(score("all", "normalized"))
        for name, kind in kinds.items():
            ranks = _ranks(score(*kind))
            found[name] += [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(exact, ranks, strict=True)]
    return {name: float(np.mean(each)) for name, each in found.items()}


def _ranks(scores: Tensor) -> Tensor:
    return scores.argsort(-1).argsort(-1).float()


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@torch.inference_mode()
def timing(seed: int = 0, prompt_tokens: int = 1024, repeats: int = 15) -> dict[str, float]:
    """Milliseconds a pass of one token at a context: full cache, packed numbers, and the same restored first."""
    lm = load("smollm2", dtype="float32")
    ids = sliding_texts(lm, prose(), 1, prompt_tokens)[0]
    full, packed = Target(lm.model), Target(lm.model)
    packed.cache = TokenCache(lm.model.config, stores=ZipCache(seed=seed).attach(lm.model.config))
    new, at = torch.tensor([ids[-1:]]), torch.tensor([[prompt_tokens]])
    everything = torch.ones(1, 1, prompt_tokens, dtype=torch.bool)
    passes: dict[str, tuple[Target, Tensor | None]] = {
        "full": (full, None),
        "packed": (packed, None),
        "restored": (packed, everything),
    }
    found: dict[str, list[float]] = {name: [] for name in passes}
    with attached(lm.model):
        for target in (full, packed):
            target.prefill([ids])
        for repeat in range(repeats + 2):
            for name, (target, visible) in passes.items():
                began = time.perf_counter()
                target.forward(new, at, None, visible)
                took = time.perf_counter() - began
                target.commit([[]])
                if repeat >= 2:
                    found[name].append(1000 * took)
    return {f"ms_a_pass_{name}": float(np.median(each)) for name, each in found.items()}


CLAIM = Claim(
    slug="zipcache",
    statement="With 60% of the tokens in 4 bits and the others in 2, choosing them by normalized attention of a tenth "
    "of the queries raises the loss on real text less than by accumulated attention of all (H2O), or at random",
    metric="rise of the negative log-likelihood over a full cache, nats a token",
    direction="lower",
    threshold=1.0,
    run=run,
    variation="30% of the tokens in 4 bits, Python source instead of prose",
    held_out={"code": True, "salient": 0.3},
    minutes=14,
    fast={
        "texts": 2,
        "prompt_tokens": 256,
        "new_tokens": 64,
        "methods": ("zipcache", "accumulated", "random", "3 bits, a token"),
    },
    timing=timing,
)
