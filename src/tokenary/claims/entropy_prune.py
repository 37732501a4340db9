"""EntropyPrune: what the heads of a token say apart is worth more than how large its queries are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenary.bench.quality import sliding_texts
from tokenary.claims.retention import KEEPS, Key, controls, outcome
from tokenary.claims.scene_reading import Arm, about, asked, low_res, opened, read
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Outcome, standard_error
from tokenary.core.statistics import spearman
from tokenary.data import prose
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.decoder import DecoderReduction
from tokenary.reduce.entropy_prune import EntropyCurve, EntropyPrune, head_gram
from tokenary.reduce.reduce_random import ReduceRandom

CALIBRATED = 99  # seed of the pictures that the layer is found on; none of them is measured
AVERAGE = 0.6  # of the image tokens over all layers, where places are compared
RIVALS = ("largest query norms", "smallest query norms")


@torch.no_grad()
def entropies(model: BenchVLM, calibration: Questions, batch: int = 32) -> EntropyCurve:
    """Measure the entropy of the image tokens behind every layer."""
    data = calibration.batch
    with EntropyCurve(model.language, 1, model.config.num_patches) as curve:
        for pixels, ids in zip(data.pixels.split(batch), data.ids.split(batch), strict=True):
            model(model.image_tokens(pixels), ids)
    return curve


def rivals(model: BenchVLM, keep: float, place: str, large: bool, random_seeds: int, seed: int) -> dict[Key, Arm]:
    """Return the arms at one share kept, all in front of the same layer."""
    some: dict[str, Any] = {"keep": Budget(ratio=keep), "budget": "kept"}
    arms: dict[str, list[Reducer]] = {
        "entropy-prune": [EntropyPrune(**some)],
        "reversed": [EntropyPrune(**some, reverse=True)],
        RIVALS[0]: [EntropyPrune(**some, score="norm")],
        RIVALS[1]: [EntropyPrune(**some, score="norm", reverse=True)],
        "entropy of a spectrum that sums to 1": [EntropyPrune(**some, normalise="trace")],
        "spread of heads": [EntropyPrune(**some, score="spread")],
        **controls(Budget(ratio=keep), random_seeds, seed, "original"),
        "low resolution": [low_res(model, keep, large)],
    }
    return {(name, keep): (reducers, place) for name, reducers in arms.items()}


def by_place(model: BenchVLM, held_out: Questions, found: int, seed: int) -> dict[str, Any]:
    """Compare places in the first half of the layers, at the same number of tokens on average over all layers.

    If the entropy tells where to prune, what is retained jumps at the layer that was `found`: it goes up with being
    there or behind it. Later places leave fewer tokens.
    """
    layers, patches = model.config.layers, model.config.num_patches
    left = {k: int((layers * AVERAGE - k) / (layers - k) * patches + 1e-9) for k in range(1, layers // 2 + 1)}
    arms: dict[Key, Arm] = {}
    for k, kept in left.items():
        if kept > 0:
            some: dict[str, Any] = {"keep": Budget(tokens=kept)}
            arms[f"entropy-prune {k}", AVERAGE] = [EntropyPrune(**some, budget="kept")], f"decoder:{k}"
            random = ReduceRandom(**some, seed=seed)
            random.positions = "original"
            arms[f"random {k}", AVERAGE] = [random], f"decoder:{k}"
    readings = read(model, held_out, arms, keeps=(AVERAGE,))
    names = [name for name, _ in arms]
    places = [k for k, kept in left.items() if kept > 0]
    behind = [float(k >= found) for k in places]
    values = {rule: [readings.retained(f"{rule} {k}").value for k in places] for rule in ("entropy-prune", "random")}
    return {
        "average_share": AVERAGE,
        "kept": {str(k): left[k] for k in places},
        "retained": {name: readings.retained(name).to_json() for name in names},
        "gflops": {name: round(readings.flops[name, AVERAGE] / 1e9, 4) for name in names},
        "best_place": {rule: places[int(np.argmax(column))] for rule, column in values.items()},
        "rank_correlation_with_being_behind_the_collapse": {
            rule: spearman(column, behind) for rule, column in values.items()
        },
    }


@torch.inference_mode()
def prose_loss(texts: int, seed: int, length: int = 320, new: int = 64, random_seeds: int = 2) -> dict[str, Any]:
    """Return the loss of SmolLM2 (9 heads) behind half of a context of real prose, pruned behind its own collapse."""
    from tokenary.models import load as load_lm

    lm = load_lm("smollm2", dtype="float32")
    pieces = torch.tensor(sliding_texts(lm, prose(), texts, length + new))
    with EntropyCurve(lm.model, 1, length - 1) as curve:
        found = {"none": np.array([_loss(lm.model, piece, length) for piece in pieces])}
    half: dict[str, Any] = {"keep": Budget(ratio=0.5)}
    rules: dict[str, list[Reducer]] = {
        "entropy-prune": [EntropyPrune(**half, budget="kept")],
        "reversed": [EntropyPrune(**half, budget="kept", reverse=True)],
        RIVALS[0]: [EntropyPrune(**half, budget="kept", score="norm")],
        RIVALS[1]: [EntropyPrune(**half, budget="kept", score="norm", reverse=True)],
        "random": [ReduceRandom(**half, seed=seed + i) for i in range(random_seeds)],
    }
    for name, reducers in rules.items():
        losses = np.zeros((len(reducers), texts))
        for number, piece in enumerate(pieces):
            context = Context(grid=(1, length - 1), samples=(number,))
            for row, reducer in enumerate(reducers):
                reducer.positions = "original"
                with DecoderReduction(lm.model, reducer, curve.place, start=1, count=length - 1, context=context):
                    losses[row, number] = _loss(lm.model, piece, length)
        found[name] = losses.mean(0)
    gains = {name: losses - found["entropy-prune"] for name, losses in found.items() if name != "entropy-prune"}
    return {
        "nll": {name: round(float(losses.mean()), 4) for name, losses in found.items()},
        "lower_than": {
            name: {"gain": round(float(gain.mean()), 4), "spread": round(standard_error(gain), 4)}
            for name, gain in gains.items()
        },
        "place": curve.place,
        "texts": texts,
        "context": length,
    }


def _loss(model: Any, ids: Tensor, length: int) -> float:
    """Nats a token of what stands behind the context."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, length - len(ids) - 1 : -1]
    return float(F.cross_entropy(logits.float(), ids[length:]))


def run(
    seed: int = 0,
    model: str = "xs-0",
    families: Sequence[str] = (),
    count: int = 128,
    anyres: bool = False,
    random_seeds: int = 5,
    also: Sequence[float] = (0.0625,),
    calibrated_on: int = 128,
    places: bool = True,
    texts: int = 16,
) -> Outcome:
    """Measure what is answered when the language model drops image tokens behind the layer where entropy collapses.

    All arms drop them in front of the same layer, and shares are of what is left from there on; the layers below see
    everything. (The paper counts an average over all layers. Where three of six see everything, that is half at least.)
    Of 64 image tokens, 12.5% are 8.

    Parameters
    ----------
    seed : int
        Of the questions and of random choices.
    model : str
        A bench VLM.
    families : sequence of str
        Ask these; by default those whose gate the model has passed.
    count : int
        Questions of each family.
    anyres : bool
        Pictures of twice the side: a thumbnail and four crops. The layer is still that found on small ones.
    random_seeds : int
        Random choices that are averaged.
    also : sequence of float
        Further shares kept, for the details.
    calibrated_on : int
        Other pictures, on which the layer is found.
    places : bool
        Also compare places in the first half of the layers (small pictures).
    texts : int
        Pieces of prose for SmolLM2; 0 leaves them out.
    """
    vlm, fit = opened(model, families)
    curve = entropies(vlm, asked(vlm, fit, -(-calibrated_on // len(fit)), CALIBRATED, calibrating=True))
    held_out = asked(vlm, fit, count, seed, anyres)
    arms: dict[Key, Arm] = {}
    for keep in (*KEEPS, *also):
        arms |= rivals(vlm, keep, curve.place, anyres, random_seeds, seed)
    readings = read(vlm, held_out, arms, batch=16 if anyres else 32)
    norm = max(RIVALS, key=lambda name: readings.retained(name).value)
    tie = readings.retained("entropy-prune", minus=norm)
    details: dict[str, Any] = {
        "model": about(model),
        "left_out": readings.left_out,
        "collapse": {
            "entropy": [round(value, 4) for value in curve.curve],
            "layer": curve.layer,
            "place": curve.place,
            "falls": curve.curve[curve.layer + 1] < curve.curve[curve.layer],
        },
        "top_above_random": readings.retained("entropy-prune", minus="random").to_json(),
        "random_above_reversed": readings.retained("random", minus="reversed").to_json(),
        "the_gain_is_norm": bool(tie.low <= 0),
    }
    if places and not anyres:
        details["by_place"] = by_place(vlm, held_out, curve.layer + 1, seed)
    if texts:
        details["prose"] = prose_loss(texts, seed)
    return outcome(
        readings, "entropy-prune", RIVALS, random_seeds, details, ("reversed", "grid", "pooling", "low resolution")
    )


def timing(seed: int) -> dict[str, float]:
    """Measure how much longer the spectrum of 576 tokens takes from products of 128 x 128 than of 32 x 32."""
    heads = torch.randn(576, 32, 128, generator=torch.Generator().manual_seed(seed))

    def seconds(large: bool) -> float:
        start = time.perf_counter()
        if large:
            wide = heads.double() - heads.double().mean(1, keepdim=True)
            torch.linalg.eigvalsh(wide.mT @ wide / wide.shape[1])
        else:
            torch.linalg.eigvalsh(head_gram(heads))
        return time.perf_counter() - start

    pairs = [(seconds(True), seconds(False)) for _ in range(4)][1:]
    return {"128 x 128 over 32 x 32": round(float(np.median([a / b for a, b in pairs])), 2)}


CLAIM = Claim(
    slug="entropy-prune",
    statement="Behind the layer where entropy collapses, with 50, 25 and 12.5% of the image tokens from there on, on "
    "average, a small vision-language model retains at least 0.01 more of what the picture adds with EntropyPrune than "
    "with the largest, or the smallest, query norms",
    metric="share retained of the right answers that the picture adds, the mean over families of questions",
    direction="higher",
    threshold=0.01,
    effect="difference",
    run=run,
    variation="pictures of twice the side, as a thumbnail and four crops, pruned at the layer found on small ones",
    held_out={"anyres": True, "count": 64, "random_seeds": 2, "also": (), "texts": 0},
    model="bench-vlm-xs-0",
    minutes=9,
    fast={"count": 8, "random_seeds": 1, "also": (), "calibrated_on": 16, "places": False, "texts": 0},
    timing=timing,
)
