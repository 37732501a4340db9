"""What the laws of the room share: a toy model, and random tokens with all that a reducer may be shown."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenary.models.bench_vlm.model import BenchVLM, VLMConfig
from tokenary.models.bench_vlm.vocabulary import PAD, VOCABULARY
from tokenary.reduce.base import Context, Point, Reducer, places

QUESTIONS = ("is there a red star ?", "how many objects are there ?", "what color is the circle ?")
WIDTH, HEADS, LAYERS = 32, 2, 3


@functools.cache
def toy_vlm(seed: int = 0) -> BenchVLM:
    """Build a random model of 8 x 8 patches: an encoder of 3 layers, a language model of 4; float32, in eval mode.

    Weights are drawn large enough that pictures and questions change the answer.
    """
    config = VLMConfig("toy", 64, 8, WIDTH, LAYERS, HEADS, 32, 4, 4, 64, max_objects=3, max_glyphs=1, cell=16)
    with torch.random.fork_rng(devices=[]):
        model = BenchVLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            noise *= 0.5
        elif parameter.ndim == 1:
            noise = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            noise *= 1.5 / parameter.shape[1] ** 0.5
        parameter.data = noise
    return model.eval().requires_grad_(False)


def pictures(count: int, side: int = 64, seed: int = 0) -> Tensor:
    """Random pictures (B, S, S, 3) uint8: coloured rectangles, so that patches differ."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, side, side, 3, dtype=torch.uint8)
    for picture in found:
        for _ in range(6):
            top, left = torch.randint(0, side - 8, (2,), generator=generator).tolist()
            high, wide = torch.randint(6, side // 2, (2,), generator=generator).tolist()
            picture[top : top + high, left : left + wide] = torch.randint(0, 256, (3,), generator=generator)
        picture += torch.randint(0, 6, picture.shape, generator=generator, dtype=torch.uint8)
    return found


def asked() -> tuple[Tensor, Tensor]:
    """Questions of unequal length as ids (B, L), padded on the left, and what is no padding (B, L)."""
    prompts = [VOCABULARY.prompt(question) for question in QUESTIONS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])


def toy_tokens(
    reducer: Reducer, *, batch: int = 3, grid: tuple[int, int] = (6, 8), views: int = 1, seed: int = 0
) -> tuple[Tensor, Context]:
    """Random image tokens (B, N, D) as the last layer of an encoder with a class token would leave them.

    For a method that belongs into a language model, as the third of its layers would, behind one token.

    Only what the reducer says it needs is recorded.
    """
    generator = torch.Generator().manual_seed(seed)
    n, size = grid[0] * grid[1], WIDTH // HEADS

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = noise(batch, views * n, WIDTH)
    drawn = {name: noise(LAYERS, batch * views, HEADS, 1 + n, size) * 1.5 for name in ("queries", "keys", "values")}
    drawn["text"] = noise(batch, 5, WIDTH)
    shown: dict[str, Any] = {}
    for name, states in drawn.items():
        if name in reducer.needs:
            wanted = reducer.layers(LAYERS, LAYERS - 1)
            shown[name] = states if name == "text" else {layer: states[layer] for layer in wanted}
    if "pixels" in reducer.needs:
        shown["samples"] = tuple(range(100, 100 + batch))
    return x, Context(
        grid=grid,
        layout="anyres" if views > 1 else "image",
        views=views,
        crops=(2, 2) if views == 5 else (1, max(1, views - 1)),
        span=(1, n),
        place=places(grid, views),
        scale=size**-0.5,
        layer=LAYERS - 1,
        n_layers=4 * LAYERS if Point.stage_of(reducer.at) == "decoder" else LAYERS,
        **shown,
    )


def rows_of(context: Context, rows: list[int]) -> Context:
    """What is known of some pictures of a batch."""
    views = [row * context.views + view for row in rows for view in range(context.views)]

    def some(states: Any) -> Any:
        return {layer: each[views] for layer, each in states.items()}

    def of_batch(states: Tensor | None, dims: int) -> Tensor | None:
        return states[rows] if states is not None and states.ndim == dims else states

    return replace(
        context,
        queries=some(context.queries),
        keys=some(context.keys),
        values=some(context.values),
        recorded_sizes=some(context.recorded_sizes),
        place=of_batch(context.place, 3),
        sizes=of_batch(context.sizes, 2),
        valid=of_batch(context.valid, 2),
        text=of_batch(context.text, 3),
        text_mask=of_batch(context.text_mask, 2),
        samples=None if context.samples is None else tuple(context.samples[row] for row in rows),
    )


def permuted(context: Context, order: Tensor) -> Context:
    """What is known of the tokens in another order, (N,) int64; of one view, with one token in front."""
    full = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])

    def some(states: Any) -> Any:
        return {layer: each[:, :, full] for layer, each in states.items()}

    return replace(
        context,
        queries=some(context.queries),
        keys=some(context.keys),
        values=some(context.values),
        place=None if context.place is None else context.place[..., order, :],
        sizes=None if context.sizes is None else context.sizes[:, order],
    )


def floats(context: Context) -> list[Tensor]:
    """Return every tensor of a context."""
    found = [context.place, context.sizes, context.valid, context.text]
    for states in (context.queries, context.keys, context.values):
        found += list(states.values())
    return [each for each in found if each is not None]
