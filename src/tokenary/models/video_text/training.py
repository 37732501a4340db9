"""Training: InfoNCE between clips and captions, in two stages that share one loop.

First the whole network learns on a few frames of each clip, one from each equal part of it. Two heads that are thrown
away help (their weight falls to zero at 70%): one asks every patch what it shows; one asks the vectors of clips and of
captions, alike, which colour and which thing goes which way in either half. The captions' side learns to answer that
alone, in seconds, before there are clips: while neither side tells the order, nothing draws the other to it.

Then, for each way of reducing, the blocks behind the reduction are tuned with it in place, on all frames; what stands
in front of them, and the captions' side, stay as they are, and every way sees the same clips.

Every draw is named by seed and step, so a run that was broken off and goes on is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenary.core.seeding import substream
from tokenary.models.training import Checkpoint, State, fast_products, muon_and_adamw, schedule, set_rate
from tokenary.models.video_text.clips import Clip, render, stack
from tokenary.models.video_text.model import VideoText, contrastive_loss
from tokenary.models.video_text.stories import COLOURS, NUM_CLASSES, THINGS, WAYS, Story

TOLD = 2 * [len(COLOURS) * len(WAYS), len(THINGS) * len(WAYS)]  # answers in either half


@dataclass(frozen=True)
class Training:
    """How to train.

    Parameters
    ----------
    steps, batch : int
    frames : int
        Of those that are rendered, one from each of so many equal parts.
    rendered : int
        Frames of a clip.
    lr, weight_decay : float
        Peak of the schedule, of both optimisers.
    warmup : float
        Share of the steps in which the learning rate rises.
    dense : float
        Weight of the auxiliary losses at the start.
    captions : int
        Steps in which the captions' side learns alone, before all others.
    seed : int
        Of clips.
    """

    steps: int = 900
    batch: int = 64
    frames: int = 4
    rendered: int = 12
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    dense: float = 1.0
    captions: int = 1000
    seed: int = 0


class Pool:
    """Training stories and the vectors of their captions.

    Parameters
    ----------
    stories : sequence of Story
        Different ones, each followed by its twin, as `candidates` draws them.
    vectors : (K, 384) Tensor
    """

    def __init__(self, stories: Sequence[Story], vectors: Tensor) -> None:
        self.stories, self.vectors = stories, vectors
        starts = [i for i, story in enumerate(stories) if i == 0 or stories[i - 1] != story.twin]
        self.groups = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(stories)], strict=True)]

    def batch(self, seed: int, step: int, size: int) -> list[int]:
        """Return numbers of different stories, twins together."""
        rng, found = substream(seed, "video-text", "batch", step), list[int]()
        for group in rng.permutation(len(self.groups))[:size].tolist():
            found += self.groups[group]
        return found[:size]


class Trainer:
    """A run, with its checkpoint.

    Parameters
    ----------
    model : VideoText
        Trained in place.
    settings : Training
    pool : Pool
    checkpoint : Path
        File of the state; where it exists, the run goes on from it.
    name : str
        Of the run: the checkpoint belongs to it.
    tail : sequence of str
        What the names of weights that learn begin with; all, where it is empty.
    within : callable
        Returns a context in which the frame encoder is run, as a reducer's ``attach``.

    Raises
    ------
    InputError
        The checkpoint is of another run.
    """

    def __init__(
        self,
        model: VideoText,
        settings: Training,
        pool: Pool,
        checkpoint: Path,
        name: str = "base",
        tail: Sequence[str] = (),
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.settings, self.pool = model, settings, pool
        self.name, self.within, self.state = name, within, State()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            shown, told = nn.Linear(model.config.width, NUM_CLASSES), nn.Linear(model.config.space, sum(TOLD))
            self.heads = nn.ModuleDict({"shown": shown, "told": told})
        model.train()
        for each, parameter in model.named_parameters():
            parameter.requires_grad_(each.startswith(tuple(tail)) if tail else True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters += list(self.heads.parameters()) if settings.dense else []
        blocks = {id(p) for p in model.vision.blocks.parameters() if p.dim() == 2}
        matrices = [p for p in self.parameters if id(p) in blocks]
        others = [p for p in self.parameters if id(p) not in blocks]
        self.optimizers = muon_and_adamw(matrices, others, settings.lr, settings.weight_decay)
        run = {"name": name, "stories": len(pool.stories), **model.config.to_dict(), **asdict(settings)}
        self.checkpoint = Checkpoint(checkpoint, run, self.state, [model, self.heads, *self.optimizers])
        if not self.checkpoint.resume():
            self._fit_captions()

    def run(self, steps: int) -> float:
        """Train for so many steps, or to the end; return their mean loss."""
        start, total, end = time.perf_counter(), 0.0, min(self.state.step + steps, self.settings.steps)
        count = end - self.state.step
        self.model.train()
        with self.within():
            while self.state.step < end:
                total += self._step()
                if not math.isfinite(total):
                    raise FloatingPointError(f"the loss is not finite at step {self.state.step}")
                self.state.step += 1
        self.state.seconds += time.perf_counter() - start
        return total / max(1, count)

    def _step(self) -> float:
        settings, step = self.settings, self.state.step
        progress = step / settings.steps
        set_rate(self.optimizers, settings.lr * schedule(progress, settings.warmup))
        rows = self.pool.batch(settings.seed, step, settings.batch)
        first = step * settings.batch  # no two steps see the same clip
        stories = [self.pool.stories[row] for row in rows]
        clips = [render(story, "train", settings.seed, first + i, settings.rendered) for i, story in enumerate(stories)]
        pixels, classes, moment = thinned(clips, settings.frames, settings.seed, step)
        with fast_products():
            tokens = self.model.vision(pixels.flatten(0, 1), moment.flatten())
            found = self.model.clip_vectors(tokens, moment)
            captions = self.model.encode_captions(self.pool.vectors[rows])
        main = contrastive_loss(found, captions, self.model.scale)
        loss, weight = main, settings.dense * max(0.0, 1 - progress / 0.7)
        if weight:
            told = targets(stories)
            loss = main + weight * (
                self._shown(tokens[:, 1:], classes) + self._told(found, told) + self._told(captions, told)
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.scale.clamp_(max=math.log(100))
        return main.item()

    def _fit_captions(self, batch: int = 256, lr: float = 3e-3) -> None:
        """Teach the captions' side what goes where when."""
        learning = [*self.model.text.parameters(), *self.heads["told"].parameters()]
        optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=self.settings.weight_decay, betas=(0.9, 0.98))
        told = targets(self.pool.stories)
        for step in range(self.settings.captions):
            optimizer.param_groups[0]["lr"] = lr * schedule(step / self.settings.captions, self.settings.warmup)
            drawn = substream(self.settings.seed, "video-text", "captions", step).integers(0, len(told[0]), batch)
            rows = torch.from_numpy(drawn)
            self._told(self.model.encode_captions(self.pool.vectors[rows]), [each[rows] for each in told]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _shown(self, patches: Tensor, classes: Tensor) -> Tensor:
        """Ask patches what they show."""
        balance = torch.ones(NUM_CLASSES)
        balance[0] = 0.1  # most show nothing
        return F.cross_entropy(self.heads["shown"](patches.float()).flatten(0, 1), classes.flatten().long(), balance)

    def _told(self, vectors: Tensor, told: Sequence[Tensor]) -> Tensor:
        """Ask vectors (B, D) of clips or captions what goes where when."""
        logits = self.heads["told"](10 * vectors).split(TOLD, dim=1)
        return torch.stack([F.cross_entropy(each, wanted) for each, wanted in zip(logits, told, strict=True)]).mean()


def targets(stories: Sequence[Story]) -> list[Tensor]:
    """Return by half the distribution of what goes which way, over colours and over things: four of (B, 4 n)."""
    ways, found = list(WAYS), list[Tensor]()
    for half in (0, 1):
        for name, count in (("colour", len(COLOURS)), ("thing", len(THINGS))):
            wanted = torch.zeros(len(stories), count * len(ways))
            for row, story in zip(wanted, stories, strict=True):
                steps = story.moving(half)
                for step in steps:
                    row[getattr(step, name) * len(ways) + ways.index(step.way)] += 1 / len(steps)
            found.append(wanted)
    return found


def thinned(clips: Sequence[Clip], frames: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep one frame of each of `frames` equal parts of clips.

    Returns
    -------
    pixels : (B, frames, S, S, 3) uint8 Tensor
    classes : (B, frames, g, g) uint8 Tensor
    moment : (B, frames) Tensor
    """
    pixels, classes = stack(clips)
    part = pixels.shape[1] // frames
    drawn = substream(seed, "video-text", "frames", step).integers(0, part, (len(clips), frames))
    kept = np.arange(frames) * part + drawn
    row = np.arange(len(clips))[:, None]
    moment = torch.from_numpy(kept).float().add(0.5) / pixels.shape[1]
    return torch.from_numpy(pixels[row, kept]), torch.from_numpy(classes[row, kept]), moment
