"""A scorer for a bench VLM, from scenes of the split that the model itself was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenary.models.bench_vlm.batches import Batch, Order, TrainingScenes
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.training import answer_loss
from tokenary.reduce.idpruner.scorer import Scorer
from tokenary.reduce.idpruner.training import train_scorer

#: Scenes are numbered by their step; models were trained on the first of these.
FIRST_STEP = 10_000_000
STEPS, SCENES, RATE = 200, 16, 1e-3


class _Seen(Sequence[Tensor]):
    """Image tokens of one batch of training scenes a step, seen when they are asked for; the newest batch is kept."""

    def __init__(self, model: BenchVLM, steps: int, scenes: int, seed: int, told: Callable[[int], None]) -> None:
        self.model, self.steps, self.scenes, self.told = model, steps, scenes, told
        self.drawn = TrainingScenes(model.config.geometry, seed)
        self.batch: Batch | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> Tensor:  # type: ignore[override]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        self.told(step)
        self.batch = self.drawn[Order(FIRST_STEP + step, self.scenes)].to(self.model.device)
        with torch.no_grad():
            return self.model.image_tokens(self.batch.pixels)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[step] for step in range(self.steps))


def learn_scorer(
    model: BenchVLM,
    *,
    steps: int = STEPS,
    scenes: int = SCENES,
    seed: int = 0,
    told: Callable[[int], None] = lambda step: None,
) -> tuple[Scorer, list[tuple[float, float]]]:
    """Train a scorer.

    Parameters
    ----------
    model : BenchVLM
        Stays as it is; its weights ask for no gradients.
    steps, scenes : int
        Updates, and scenes of each.
    seed : int
        Of the scorer and the scenes.
    told : callable
        Called before every update with its number.

    Returns
    -------
    Scorer
    list of (float, float)
        Loss of the answers and of the hardening, by step.
    """
    scorer, seen = Scorer(model.config.width, seed), _Seen(model, steps, scenes, seed, told)

    def loss(step: int, weighed: Tensor) -> Tensor:
        assert seen.batch is not None
        return answer_loss(model(weighed, seen.batch.ids), seen.batch)

    return scorer, train_scorer(scorer, seen, loss, lr=RATE)
