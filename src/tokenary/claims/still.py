"""STILL: salient tokens and norm-preserving maps bring hybrid attention nearer to softmax attention than controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenary.bench.quality import sliding_texts
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.data import prose, stdlib_code
from tokenary.hf.target import Target, attached
from tokenary.memory.still import STILL, WEIGHTS
from tokenary.memory.still.branches import Exact
from tokenary.memory.still.hybrid import Plan
from tokenary.memory.still.maps import load_maps
from tokenary.memory.still.passes import Pass, passes
from tokenary.memory.still.routing import Rule
from tokenary.memory.still.training import Variant
from tokenary.models import LM
from tokenary.run import load

VARIANTS = {
    "still": Variant(),
    "position routing": Variant(routing="recent"),
    "hedgehog map": Variant(features="hedgehog"),
    "random": Variant(routing="random"),
    "still, linear branch rescaled": Variant(rescale=True),
}
ALONE = "{}, nothing linear"


class Silent(nn.Module):
    """A feature map to nothing: the linear branch adds neither values nor weight."""

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., D) to zeros (..., 2 D)."""
        return torch.cat([states, states], dim=-1) * 0.0


def run(
    seed: int = 0,
    texts: int = 6,
    length: int = 1024,
    chunk: int = 64,
    salient: int = 4,
    code: bool = False,
    perplexity: bool = True,
) -> Outcome:
    """Measure how far hybrid attention is from softmax attention in the layers that it replaces, and the loss.

    Parameters
    ----------
    seed : int
        Chooses the code that is read, and random tokens.
    texts, length : int
        Pieces of text, and tokens of each.
    chunk, salient : int
        Tokens a chunk, and how many of them stay exact, the same for all.
    code : bool
        Python source instead of a novel.
    perplexity : bool
        Measure the loss too, with the layers replaced: a detail.
    """
    lm, rule = load("smollm2", dtype="float32"), Rule(chunk, salient, seed=seed)
    pieces = sliding_texts(lm, stdlib_code(seed, 200_000) if code else prose(), texts, length)
    maps = {name: load_maps(WEIGHTS, variant.name, variant.features) for name, variant in VARIANTS.items()}
    found: list[dict[str, float]] = []
    consistency: list[float] = []
    for ids in pieces:
        errors: list[dict[str, float]] = []
        with torch.no_grad():
            for layer, seen in passes(lm.model, ids, list(maps["still"])).items():
                own = {name: each[layer] for name, each in maps.items()}
                errors.append(_errors(seen, own, rule, layer))
                consistency.append(_consistency(seen, rule))
        found.append({name: float(np.mean([each[name] for each in errors])) for name in errors[0]})

    values = {name: np.array([each[name] for each in found]) for name in found[0]}
    better = min(("position routing", "hedgehog map"), key=lambda name: values[name].mean())

    def figure(name: str) -> Figure:
        return Figure.of(name, values[name])

    details: dict[str, Any] = {
        "error": {name: float(each.mean()) for name, each in values.items()},
        "paired_spread": {name: standard_error(each - values["still"]) for name, each in values.items()},
        "spearman of saliency and attention received": float(np.mean(consistency)),
    }
    if perplexity:
        details["nats a token"] = _losses(lm, pieces, rule)
        details["bytes of the replaced layers over a full cache's"] = _share(lm, pieces[0], rule)
    others = [name for name in values if name not in ("still", better, "random")]
    return Outcome(
        method=figure("still"),
        baseline=figure(better),
        controls=(Figure("none", 0.0), figure("random"), *map(figure, others)),
        n=texts,
        paired_spread=standard_error(values["still"] - values[better]),
        details=details,
    )


def _errors(seen: Pass, maps: dict[str, Any], rule: Rule, layer: int) -> dict[str, float]:
    """Squared error of one layer's output over its mean square, for tokens behind the first two chunks."""
    first, errors = 2 * rule.chunk, dict[str, float]()
    truth = seen.softmax(first)

    def off(said: Tensor) -> float:
        return float((said - truth).square().mean() / truth.square().mean())

    branches: dict[str, tuple[Plan, Exact]] = {}
    for name, variant in VARIANTS.items():
        own = variant.rule(rule)
        if own.routing not in branches:
            branches[own.routing] = plan, exact = seen.exact(own, layer, first)
            errors[ALONE.format(name)] = off(exact.sums / exact.mass)
            if own.routing == "recent":  # what a window lacks most is the first token, which attention sinks into
                sinks = [torch.where(torch.arange(kept.shape[1]) == 0, 0, kept) for kept in plan.kept]
                exact = replace(plan, kept=sinks).exact(seen.query[:, first:], seen.key, seen.value, seen.scaling)
                errors[ALONE.format("position routing and the first token")] = off(exact.sums / exact.mass)
        errors[name] = off(seen.hybrid(maps[name], own, *branches[own.routing], first))
    return errors


def _consistency(seen: Pass, rule: Rule) -> float:
    """Rank correlation of a token's saliency with the mean attention of later tokens to it, a mean over key heads.

    The last two chunks, which few tokens look back on, are left out.
    """
    kv_heads, n_tokens, _ = seen.key.shape
    logits = seen.query.unflatten(0, (kv_heads, -1)) @ seen.key[:, None].mT * seen.scaling
    later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu_(1)
    attention = logits.masked_fill_(later, float("-inf")).softmax(-1).mean(1)  # (Hkv, N, N)
    received = (attention * later.mT).sum(1) / torch.arange(n_tokens - 1, -1, -1).clamp(min=1)
    ranks = [x[:, : -2 * rule.chunk].argsort(-1).argsort(-1).double() for x in (received, seen.scores(rule))]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)]))


def _losses(lm: LM, pieces: Sequence[Sequence[int]], rule: Rule) -> dict[str, float]:
    """Mean loss on the tokens behind the first two chunks, with the layers replaced."""
    losses = {"full": _loss(lm, None, pieces, rule)}
    for name, variant in VARIANTS.items():
        own = variant.routing, variant.features, variant.rescale
        policy = STILL(rule.chunk, rule.salient, *own, seed=rule.seed)
        policy.prepare(lm.model)
        losses[name] = _loss(lm, policy, pieces, rule)
        if name == "still":
            for maps in (policy.maps or {}).values():
                maps.add_module("key", Silent())
            losses[ALONE.format(name)] = _loss(lm, policy, pieces, rule)
    return losses


@torch.inference_mode()
def _loss(lm: LM, policy: STILL | None, pieces: Sequence[Sequence[int]], rule: Rule) -> float:
    found = []
    for ids in pieces:
        target = Target(lm.model, None if policy is None else policy.attach(lm.model.config, lm.dtype))
        real, first = torch.tensor(ids), 2 * rule.chunk
        with attached(lm.model):
            logits = target.forward(real[None], torch.arange(len(real))[None])[0, first:-1]
        found.append(float(nn.functional.cross_entropy(logits.float(), real[first + 1 :])))
    return float(np.mean(found))


def _share(lm: LM, ids: Sequence[int], rule: Rule) -> float:
    """Bytes held after a text by the layers that are replaced, sums and bookkeeping included, over those without."""
    policy, found = STILL(rule.chunk, rule.salient), []
    policy.prepare(lm.model)
    for states in (policy.attach(lm.model.config, lm.dtype), None):
        target = Target(lm.model, states)
        with attached(lm.model):
            target.prefill([ids])
        found.append(sum(target.cache.token_layers[layer].nbytes for layer in policy.maps or {}))
    return found[0] / found[1]


CLAIM = Claim(
    slug="still",
    statement="With four middle layers of SmolLM2-135M replaced, after 150 steps of attention transfer, the output of "
    "hybrid attention is nearer to that of softmax attention, by at least 5% of the squared error, than with position "
    "routing and than with a Hedgehog map, at the same number of exact tokens, and nearer than with random ones",
    metric="squared error of attention output over its mean square, mean over layers",
    direction="lower",
    threshold=1.05,
    run=run,
    variation="Python source instead of a novel, chunks of 32 tokens with 2 salient ones, the same maps",
    held_out={"code": True, "chunk": 32, "salient": 2},
    minutes=11,
    fast={"texts": 2, "length": 512, "perplexity": False},
)
