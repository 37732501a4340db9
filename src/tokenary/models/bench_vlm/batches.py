"""Scenes to arrays: training batches named by their step, and fixed question sets for every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenary.models.bench_vlm.assets import Split
from tokenary.models.bench_vlm.scenes import FAMILIES, Geometry, Scene, Turn, render
from tokenary.models.bench_vlm.vocabulary import PAD, VOCABULARY

TEXT_LENGTH = 64  # tokens of the questions about one training scene; what does not fit is left out
EASY = ("attribute", "existence")
EVALUATION_SEED = 1_000_000  # training seeds stay below


@dataclass
class Batch:
    """Arrays of some scenes.

    Attributes
    ----------
    pixels : (B, S, S, 3) uint8 Tensor
    ids : (B, L) int64 Tensor
        Questions and answers one after the other, padded on the right.
    predicted : (B, L) bool Tensor
        Which of them are answers.
    classes : (B, grid, grid) int64 Tensor
        What each patch shows.
    """

    pixels: Tensor
    ids: Tensor
    predicted: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Batch:
        """Move to a device."""
        return Batch(*(t.to(device, non_blocking=True) for t in (self.pixels, self.ids, self.predicted, self.classes)))

    def pin_memory(self) -> Batch:
        """Called by the data loader's pinning thread."""
        return Batch(*(t.pin_memory() for t in (self.pixels, self.ids, self.predicted, self.classes)))


def collate(scenes: Sequence[Scene], length: int = TEXT_LENGTH) -> Batch:
    """Stack scenes, each with as many of its questions as fit into `length` tokens."""
    ids = np.full((len(scenes), length), PAD, np.int64)
    predicted = np.zeros((len(scenes), length), bool)
    for row, scene in enumerate(scenes):
        end = 0
        for turn in scene.turns:
            tokens, answer = VOCABULARY.turn(turn.question, turn.answer)
            if end + len(tokens) <= length:
                ids[row, end : end + len(tokens)] = tokens
                predicted[row, end : end + len(tokens)] = answer
                end += len(tokens)
    return Batch(
        torch.from_numpy(np.stack([scene.image for scene in scenes])),
        torch.from_numpy(ids),
        torch.from_numpy(predicted),
        torch.from_numpy(np.stack([scene.classes for scene in scenes]).astype(np.int64)),
    )


@dataclass(frozen=True)
class Order:
    """Which batch a worker is to draw: the step it is for, how many scenes, easy ones, large ones."""

    step: int
    size: int
    easy: bool = False
    anyres: bool = False


class TrainingScenes(Dataset[Batch]):
    """Training batches; the same order gives the same batch, whichever process draws it."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        self.geometry, self.seed = geometry, seed

    def __getitem__(self, order: Order) -> Batch:
        """Draw the batch that is ordered."""
        geometry = replace(self.geometry, side=2 * self.geometry.side) if order.anyres else self.geometry
        families = EASY if order.easy else FAMILIES
        first = order.step * 65_536  # scenes of a step never overlap those of the next
        return collate([render(geometry, "train", self.seed, first + i, families) for i in range(order.size)])


@dataclass
class Questions:
    """One held-out question a picture.

    Attributes
    ----------
    batch : Batch
    scenes : list of Scene
    turns : list of Turn
        The question of each row.
    """

    batch: Batch
    scenes: list[Scene]
    turns: list[Turn]


def questions(
    geometry: Geometry,
    split: Split,
    per_family: int,
    families: tuple[str, ...] = FAMILIES,
    seed: int = EVALUATION_SEED,
    anyres: bool = False,
) -> Questions:
    """Draw the fixed questions of a split, `per_family` of each family, one a picture."""
    if anyres:
        geometry = replace(geometry, side=2 * geometry.side)
    scenes = [
        render(geometry, split, seed + FAMILIES.index(family), index, (family,), turns=1)
        for family in families
        for index in range(per_family)
    ]
    return Questions(collate(scenes, 48), scenes, [scene.turns[0] for scene in scenes])
