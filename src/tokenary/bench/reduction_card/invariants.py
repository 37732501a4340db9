"""What must hold of any reducer in a model: where it does not, every other figure of its card is in doubt."""

from __future__ import annotations

import torch

from tokenary.bench.reduction_card.watching import Watched
from tokenary.core.recipe import Step
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.vocabulary import VOCABULARY
from tokenary.probe.token_reduction_position.coherence import position_errors
from tokenary.reduce.base import Reducer

SHOWN, WRITTEN = 8, 8


@torch.inference_mode()
def invariants(model: BenchVLM, reducer: Reducer, at: str, asked: Questions) -> dict[str, float | int | None]:
    """Measure how far a reducer is from what must hold.

    Returns
    -------
    dict
        ``full_budget``: largest difference of log-probabilities between the whole model and the reducer with
        everything kept, None where it has no such budget. ``batch``: the same between a batch and single pictures.
        ``cache``: tokens that decoding with a cache writes otherwise than reading everything anew. ``positions``: image
        tokens at other positions than the map says, None where positions are made between layers or rows have newlines.
    """
    pixels, ids = asked.batch.pixels[:SHOWN], asked.batch.ids[:SHOWN]
    with Watched(model, reducer, at) as watched:
        together = watched(watched.image_tokens(pixels), ids).log_softmax(-1)
        wrong = _positions(watched, at)
        alone = torch.cat(
            [watched(watched.image_tokens(pixels[i : i + 1]), ids[i : i + 1]).log_softmax(-1) for i in range(len(ids))]
        )
        prompt = torch.tensor([VOCABULARY.prompt("list all objects.")] * len(ids))
        texts = watched.generate(watched.image_tokens(pixels), prompt, WRITTEN)
        differ = sum(_rewritten(watched, pixels[i : i + 1], prompt[i : i + 1], text) for i, text in enumerate(texts))
    return {
        "full_budget": _full(model, reducer, at, pixels, ids),
        "batch": float((together - alone).abs().max()),
        "cache": differ,
        "positions": wrong,
    }


def _full(model: BenchVLM, reducer: Reducer, at: str, pixels: torch.Tensor, ids: torch.Tensor) -> float | None:
    if "keep" not in reducer.options:
        return None
    options = tuple(sorted((name, str(value)) for name, value in reducer.options.items() if name != "keep"))
    kept = Step(reducer.card.slug, (("keep", "100%"), *((n, v) for n, v in options if v != "None"))).build()
    with Watched(model, kept, at) as all_kept, Watched(model, None) as whole:
        first, second = (each(each.image_tokens(pixels), ids).log_softmax(-1) for each in (all_kept, whole))
    return float((first - second).abs().max())


def _positions(watched: Watched, at: str) -> int | None:
    numbers, reducer = watched.read_numbers, watched.reducer
    if at.startswith("decoder") or watched.views > 1 or numbers is None or reducer is None:
        return None
    found = 0
    for row in range(len(numbers)):
        there = numbers[row] >= 0
        own = watched.laid.positions[row, 1 : 1 + watched.laid.image][there] - 1
        found += position_errors(own.numpy(), numbers[row][there].numpy(), reducer.positions == "compact")
    return found


def _rewritten(watched: Watched, pixels: torch.Tensor, prompt: torch.Tensor, text: list[int]) -> int:
    """Count the tokens of a text that are not the most likely ones when everything is read at once.

    Near ties, of less than a thousandth of a nat, are no difference.
    """
    if not text:
        return 0
    said = torch.tensor([text])
    logits = watched(watched.image_tokens(pixels), torch.cat([prompt, said], dim=1))[0, -len(text) - 1 : -1]
    return int((logits.amax(-1) - logits.gather(1, said[0][:, None])[:, 0] > 1e-3).sum())
