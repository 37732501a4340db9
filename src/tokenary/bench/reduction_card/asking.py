"""What is asked, and what one arm answers: everything that figures are made of, question by question."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.bench.reduction import kv_bytes, vlm_flops
from tokenary.bench.reduction_card.patches import large_places, patches_of
from tokenary.bench.reduction_card.questions import Asked, trimmed
from tokenary.bench.reduction_card.watching import Notes, Watched
from tokenary.core.statistics import Array
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.scenes import Scene, Turn
from tokenary.models.bench_vlm.vocabulary import VOCABULARY
from tokenary.probe.token_reduction_position.alignment import pooled
from tokenary.probe.token_reduction_position.grounding import grounding
from tokenary.probe.token_reduction_position.hallucination import agreement, listing
from tokenary.probe.token_reduction_position.maps import conserved, coverage, locality, redundancy
from tokenary.reduce.base import Reducer

LISTED = "list all objects."
YES, NO = (VOCABULARY.encode(word)[0] for word in ("yes", "no"))
BATCH = 64


@dataclass
class Answers:
    """What one run of an arm gave, n questions: those of all families, then those of existence.

    Attributes
    ----------
    right, swapped : (n,) float64
        Whether the answer is right, and whether its first token stays the same with another picture.
    margin : (n,) float64
        Log-odds of yes over no.
    first : (n, V) Tensor
        Log-probabilities of the first token of the answer.
    maps : dict of str to (n,) float64
        Grounding, and what the token map is like; empty where nothing is seen. Grounding is nan where no object is
        asked for.
    counts : mapping
        Of lists, see `listing`.
    texts : list of list of int
        Lists as they were written.
    states : list of (pairs, D) Tensor
        Of listed pictures, by layer, pooled by size.
    kept, flops, kv_bytes : float
    layer_tokens : float
        Image tokens that a layer reads, mean over layers.
    """

    right: Array
    swapped: Array
    margin: Array
    first: Tensor
    maps: dict[str, Array]
    counts: Any
    texts: list[list[int]]
    states: list[Tensor]
    kept: float
    flops: float
    kv_bytes: float
    layer_tokens: float


@torch.inference_mode()
def answers_of(model: BenchVLM, reducer: Reducer | None, asked: Asked, at: str, blind: bool = False) -> Answers:
    """Ask one arm everything."""
    found: list[dict[str, Any]] = []
    kept: list[int] = []
    costs: list[tuple[float, float, float]] = []
    with Watched(model, reducer, at) as watched:
        for part in (asked.families, asked.existence):
            for start in range(0, len(part.scenes), BATCH):
                found.append(_batch(watched, part, slice(start, start + BATCH), blind))
                kept += watched.kept
                width = trimmed(part, slice(start, start + BATCH))[0].shape[1] + 1
                costs.append(
                    (
                        vlm_flops(model.config, [] if blind else watched.vision_tokens, watched.language_tokens,
                                  watched.views),
                        kv_bytes(model.config, watched.language_tokens),
                        float(np.mean(watched.language_tokens)) - width,
                    )
                )  # fmt: skip
        counts, texts, states = _lists(watched, asked.listing, blind)
    flops, held, tokens = (float(column.mean()) for column in np.array(costs).T)
    keys = [key for key in found[0] if key not in ("first", "maps")]
    joined = {key: np.concatenate([each[key] for each in found]) for key in keys}
    maps = {key: np.concatenate([each["maps"][key] for each in found]) for key in found[0]["maps"]}
    first = torch.cat([each["first"] for each in found])
    return Answers(
        **joined, first=first, maps=maps, counts=counts, texts=texts, states=states, kept=float(np.mean(kept)),
        flops=flops, kv_bytes=held, layer_tokens=tokens,
    )  # fmt: skip


def _batch(watched: Watched, part: Questions, rows: slice, blind: bool) -> dict[str, Any]:
    """Answer a batch with its own pictures, and with those of the neighbours."""
    ids, predicted = trimmed(part, rows)
    seen = None if blind else watched.image_tokens(part.batch.pixels[rows])
    last = predicted.int().argmax(1) - 1  # where the first token of the answer is predicted
    others = [*range(1, len(ids)), 0]
    swapped = watched(None if seen is None else seen[others], ids)[torch.arange(len(ids)), last].argmax(-1)
    with watched.watching(last, ids.shape[1]) as notes:
        logits = watched(seen, ids)
    wrong = (logits.argmax(-1)[:, :-1] != ids[:, 1:]) & predicted[:, 1:]
    first = logits[torch.arange(len(ids)), last].float().log_softmax(-1)
    maps = {} if blind else _maps(watched, notes, part.scenes[rows], part.turns[rows])
    return {
        "right": (~wrong.any(1)).double().numpy(),
        "swapped": agreement(first.argmax(-1), swapped).numpy(),
        "margin": (first[:, YES] - first[:, NO]).double().numpy(),
        "first": first,
        "maps": maps,
    }


def _maps(watched: Watched, notes: Notes, scenes: Sequence[Scene], turns: Sequence[Turn]) -> dict[str, Array]:
    """Figures of the token map, and of attention through it."""
    masses = watched.layer_mass()
    own = torch.from_numpy(np.stack([s.patches(turn.targets) for s, turn in zip(scenes, turns, strict=True)]))
    asked = patches_of(own, watched.grid, watched.views)
    image = [a[:, 1 : 1 + m.shape[1]] for a, m in zip(notes.attention, masses, strict=True)]
    ground = grounding(image, masses, asked)
    there = asked.any(1)
    layer = watched.point.layers[0] if watched.point.stage == "decoder" else 0
    upper, entering = masses[-1], notes.entering[layer]
    numbers = watched.numbers
    assert numbers is not None
    flat = watched.read_mass() if watched.point.stage != "decoder" else upper
    total = flat.shape[2]
    found = {
        "grounding_mass": ground.mass.masked_fill(~there, torch.nan),
        "pointing": ground.pointing.masked_fill(~there, torch.nan),
        "evidence": ground.evidence.masked_fill(~there, torch.nan),
        "image_attention": ground.image,
        "coverage": coverage(upper),
        "locality": locality(flat, numbers, large_places(watched.grid, watched.views)),
        "redundancy": redundancy(entering[:, 1 : 1 + upper.shape[1]], upper.sum(2) > 0),
        "conserved": conserved(watched.claimed_sizes(), total),
    }
    return {name: values.double().numpy() for name, values in found.items()}


def _lists(watched: Watched, scenes: Sequence[Scene], blind: bool) -> tuple[Any, list[list[int]], list[Tensor]]:
    """List the objects of pictures, and pool their states."""
    texts: list[list[int]] = []
    states: list[list[Tensor]] = []
    prompt = VOCABULARY.prompt(LISTED)
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        ids = torch.tensor([prompt] * len(part))
        seen = None if blind else watched.image_tokens(torch.from_numpy(np.stack([s.image for s in part])))
        texts += watched.generate(seen, ids)
        if not blind:
            with watched.watching(None, ids.shape[1], leaving=True) as notes:
                watched(seen, ids)
            states.append(pooled_states(watched, notes.leaving))
    named = [[name.strip() for name in VOCABULARY.decode(text).split(",") if name.strip()] for text in texts]
    there = [[item.label for item in scene.items] for scene in scenes]
    return listing(named, there), texts, [torch.cat(layer) for layer in zip(*states, strict=True)]


def pooled_states(watched: Watched, leaving: Sequence[Tensor]) -> list[Tensor]:
    """Pool the states of image tokens behind every layer, by the patches they stand for."""
    masses = watched.layer_mass()
    return [pooled(x[:, 1 : 1 + m.shape[1]], m.sum(2)) for x, m in zip(leaving, masses, strict=True)]


@torch.inference_mode()
def caption_states(model: BenchVLM, scenes: Sequence[Scene]) -> list[Tensor]:
    """Return the states of the lists as texts without a picture, by layer: means over their tokens, (pairs, D)."""
    said = [VOCABULARY.encode(scene.turns[0].answer) for scene in scenes]
    longest = max(map(len, said))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in said])
    there = torch.tensor([[1.0] * len(text) + [0.0] * (longest - len(text)) for text in said])
    with Watched(model, None) as watched, watched.watching(None, longest, leaving=True) as notes:
        watched(None, ids)
    weight = there[..., None] / there.sum(1)[:, None, None]
    return [(x[:, 1:] * weight).sum(1) for x in notes.leaving]


def flipped(reducer: Reducer) -> Reducer:
    """Return the same reducer with the other positions: counted anew, or as they were."""
    other = copy.copy(reducer)
    other.positions = "compact" if reducer.positions == "original" else "original"
    return other
