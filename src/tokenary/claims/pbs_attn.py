"""PBS-Attn: sorting keys inside segments lets block-sparse attention compute fewer blocks at the same error.

The selector is the same in every arm; only the order of the keys differs. A model reads real texts with full attention;
in some of its layers the queries, keys and values at hand are attended to sparsely beside it, and the outputs compared.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenary.bench.quality import sliding_texts
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.data import prose, stdlib_code
from tokenary.hf.cache import TokenCache, TokenLayer
from tokenary.hf.target import attached
from tokenary.memory.base import ReadLayer
from tokenary.memory.pbs_attn import PBSAttn
from tokenary.models import LM
from tokenary.run import load

ORDERS = ("importance", "none", "random")
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95)
Arm = tuple[str, float]  # order of the keys, mass
Points = dict[Arm, tuple[float, float]]  # density, and error or loss


def table() -> str:
    """Return a table of 10,000 characters, one a line: code, name, category, direction and decomposition."""
    rows = (chr(code) for code in range(0x20, 0x3000))
    fields = (unicodedata.category, unicodedata.bidirectional, unicodedata.decomposition)
    named = [(f"{ord(c):04X}", unicodedata.name(c, ""), *(field(c) for field in fields)) for c in rows]
    return "\n".join(";".join(row) for row in named if row[1])


class Probe(ReadLayer):
    """Attends fully, and notes for every arm its density and the relative error of its output."""

    def __init__(self, arms: dict[Arm, PBSAttn], index: int) -> None:
        self.arms, self.index = arms, index
        self.found: Points = {}

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend to everything, then again in every arm."""
        full = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        for arm, policy in self.arms.items():
            state = policy.layer(self.index)
            output = state.read(query[0], key[0], value[0], scale)
            self.found[arm] = (state.density, float((output - full[0]).norm() / full.norm()))
        return full.transpose(1, 2)


@torch.inference_mode()
def loss_of(lm: LM, readers: Sequence[ReadLayer | None], ids: Sequence[int], scored: int) -> float:
    """Read a text in one pass; return the mean loss of its last `scored` tokens, nats a token."""
    cache = TokenCache(lm.model.config, None, readers)
    with attached(lm.model):
        logits = lm.model(
            input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=scored + 1
        ).logits[0, :-1]
    real = torch.tensor(list(ids[-scored:]))[:, None]
    return -float(logits.float().log_softmax(-1).gather(-1, real).mean())


def density_at(points: Sequence[tuple[float, float]], limit: float) -> float:
    """Lowest density at which an arm is as good as `limit`, linear between its settings.

    Parameters
    ----------
    points : sequence of (float, float)
        Density and error of each setting.
    limit : float
        Largest error allowed. An arm whose sparsest setting is good enough gets that setting's density; one that has
        no good setting gets 1, full attention.
    """
    ordered = sorted(points)
    for at, (density, error) in enumerate(ordered):
        if error <= limit:
            if at == 0:
                return density
            before, worse = ordered[at - 1]
            return before + (density - before) * (worse - limit) / (worse - error)
    return 1.0


def run(
    seed: int = 0,
    pieces: int = 2,
    length: int = 4096,
    block: int = 64,
    segment: int = 256,
    queries: int = 64,
    every: int = 5,
    masses: Sequence[float] = MASSES,
    loss_masses: Sequence[float] = (0.8, 0.95),
    scored: int = 512,
) -> Outcome:
    """Read prose, code and a table with SmolLM2 in float32, in one pass each.

    Parameters
    ----------
    seed : int
        Of the random order; chooses the code, and which pieces of the texts are read.
    pieces, length : int
        Pieces of each kind of text, and tokens a piece.
    block, segment, queries
        As in `PBSAttn`.
    every : int
        Outputs are compared in every so many layers, from the first on.
    masses : sequence of float
        Settings of every arm; the error of the unsorted keys at 0.9 is what all arms must reach.
    loss_masses : sequence of float
        Settings at which the first piece of each kind is read sparsely in all layers.
    scored : int
        Tokens at its end whose loss is compared.
    """
    lm = load("smollm2", dtype="float32")
    sources = {"prose": prose(), "code": stdlib_code(seed, 200_000), "table": table()}
    texts = {
        (kind, number): ids
        for kind, text in sources.items()
        for number, ids in enumerate(sliding_texts(lm, text, pieces, length, shift=0.5 * (seed % 2)))
    }
    count = lm.model.config.get_text_config(decoder=True).num_hidden_layers

    def arm(order: str, mass: float) -> PBSAttn:
        return PBSAttn(mass=mass, block=block, segment=segment, queries=queries, order=order, seed=seed)  # type: ignore[arg-type]

    arms = {(order, mass): arm(order, mass) for order in ORDERS for mass in masses}
    points: list[Points] = []
    losses: dict[str, Any] = {}
    for (kind, number), ids in texts.items():
        probes = [Probe(arms, index) if index % every == 0 else None for index in range(count)]
        full = loss_of(lm, probes, ids, scored)
        used = [probe.found for probe in probes if probe is not None]
        points.append({name: _mean([found[name] for found in used]) for name in arms})
        if number == 0 and loss_masses:
            losses[kind] = {"full": full, **_losses(lm, arm, loss_masses, ids, scored, full)}
    limits = [found["none", 0.9][1] for found in points]
    densities = {
        order: np.array(
            [density_at([found[order, m] for m in masses], limit) for found, limit in zip(points, limits, strict=True)]
        )
        for order in ORDERS
    }
    ours, plain = densities["importance"], densities["none"]
    kinds = {kind: [at for at, (own, _) in enumerate(texts) if own == kind] for kind in sources}
    return Outcome(
        method=Figure.of("keys sorted by importance", ours),
        baseline=Figure.of("keys in the order of the text", plain),
        controls=(
            Figure("none", 1.0),
            Figure.of("random", densities["random"]),
        ),
        n=len(texts),
        paired_spread=standard_error(plain - ours),
        details={
            "error_to_be_reached": round(fmean(limits), 4),
            "density_by_text": {
                kind: {order: round(float(densities[order][at].mean()), 4) for order in ORDERS}
                for kind, at in kinds.items()
            },
            "kinds_of_text_with_a_lower_density": sum(
                float(ours[at].mean()) < float(plain[at].mean()) for at in kinds.values()
            ),
            "density_and_error": {
                order: {str(m): [round(x, 4) for x in _mean([found[order, m] for found in points])] for m in masses}
                for order in ORDERS
            },
            "loss_of_the_last_tokens": losses,
        },
    )


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean density, and mean error."""
    return fmean(density for density, _ in points), fmean(error for _, error in points)


def _losses(lm: LM, arm: Any, masses: Sequence[float], ids: Sequence[int], scored: int, full: float) -> dict[str, Any]:
    """Read a text sparsely in all layers: density and rise of the perplexity, and the density at a rise of 1%."""
    made: dict[str, Any] = {}
    for order in ORDERS:
        found = []
        for mass in masses:
            states = arm(order, mass).attach(lm.model.config)
            rise = 100 * math.expm1(loss_of(lm, states, ids, scored) - full)
            found.append((fmean(state.density for state in states), rise))
        made[order] = {
            "density_and_percent": {
                str(m): [round(x, 4) for x in point] for m, point in zip(masses, found, strict=True)
            },
            "density_at_1_percent": round(density_at(found, 1.0), 4),
        }
    return made


CLAIM = Claim(
    slug="pbs-attn",
    statement="Sorting keys inside segments by importance, block-sparse attention computes at least 10% fewer pairs of "
    "blocks than with keys in the order of the text, at the error that those have with nine tenths of the mass",
    metric="pairs of blocks computed, of those that causal attention has, at equal error of the attention output",
    direction="lower",
    threshold=1.1,
    run=run,
    variation="segments of 1024, importance judged by the last 256 queries, other pieces of the texts",
    held_out={"segment": 1024, "queries": 256, "loss_masses": ()},
    minutes=12,
    fast={"pieces": 1, "length": 1024, "every": 15, "masses": (0.7, 0.9), "loss_masses": ()},
)
