"""Training of the classifier: random crops and flips, AdamW for vectors and Muon for matrices, a cosine to zero.

Every draw is named by seed and step, so a run that was broken off and goes on is the run that was not.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenary.core.seeding import substream
from tokenary.models.cifar_vit.model import CifarViT, ViTConfig
from tokenary.models.training import Checkpoint, State, fast_products, muon_and_adamw, schedule, set_rate


@dataclass(frozen=True)
class Training:
    """How to train.

    Parameters
    ----------
    epochs : int
        Passes over the training pictures.
    batch : int
    lr, weight_decay : float
        Peak of the schedule, of both optimisers.
    warmup : float
        Share of the steps in which the learning rate rises.
    smoothing : float
        Label smoothing.
    pad : int
        Pixels by which a crop may be shifted.
    seed : int
    save_every : float
        Minutes between two checkpoints.
    """

    epochs: int = 8
    batch: int = 125
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    smoothing: float = 0.1
    pad: int = 3
    seed: int = 0
    save_every: float = 2.0


class Trainer:
    """A run, with its checkpoint.

    Parameters
    ----------
    config : ViTConfig
    settings : Training
    pixels, labels : Tensor
        (N, S, S, 3) uint8 and (N,) int64.
    checkpoint : Path
        File of the state; where it exists, the run goes on from it.

    Raises
    ------
    InputError
        The checkpoint is of another run.
    """

    def __init__(
        self,
        config: ViTConfig,
        settings: Training,
        pixels: Tensor,
        labels: Tensor,
        checkpoint: Path,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = CifarViT(config)
        self.settings, self.pixels, self.labels = settings, pixels, labels
        matrices = [p for name, p in self.model.named_parameters() if name.startswith("blocks") and p.dim() == 2]
        others = [p for name, p in self.model.named_parameters() if not (name.startswith("blocks") and p.dim() == 2)]
        self.optimizers = muon_and_adamw(matrices, others, settings.lr, settings.weight_decay)
        self.steps_an_epoch = len(pixels) // settings.batch
        self.steps = settings.epochs * self.steps_an_epoch
        self.state = State()
        run = {**config.to_dict(), **asdict(settings), "pictures": len(pixels)}
        self.checkpoint = Checkpoint(checkpoint, run, self.state, [self.model, *self.optimizers])
        self.checkpoint.resume()

    def run_epoch(self) -> float:
        """Train to the next epoch's end, or to the point of a checkpoint; return the mean loss of these steps."""
        settings, start, total, count = self.settings, time.perf_counter(), 0.0, 0
        epoch = self.state.step // self.steps_an_epoch
        order = substream(settings.seed, "cifar-vit", "order", epoch).permutation(len(self.pixels))
        self.model.train()
        while self.state.step < (epoch + 1) * self.steps_an_epoch:
            at = self.state.step % self.steps_an_epoch * settings.batch
            rows = torch.from_numpy(order[at : at + settings.batch])
            pixels = augmented(self.pixels[rows], settings.pad, settings.seed, self.state.step)
            set_rate(self.optimizers, settings.lr * schedule(self.state.step / self.steps, settings.warmup))
            loss = self._loss(pixels, self.labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total, count = total + loss.item(), count + 1
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.step}")
            self.state.step += 1
            if time.perf_counter() - start > 60 * settings.save_every:
                break
        self.state.seconds += time.perf_counter() - start
        return total / count

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        with fast_products():
            logits = self.model(pixels)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.smoothing)


def augmented(pixels: Tensor, pad: int, seed: int, step: int) -> Tensor:
    """Shift each picture (B, S, S, 3) by up to `pad` pixels, black coming in, and mirror every second one or so."""
    generator, (count, side) = substream(seed, "cifar-vit", "augment", step), pixels.shape[:2]
    padded = F.pad(pixels, (0, 0, pad, pad, pad, pad))
    shifts = torch.from_numpy(generator.integers(0, 2 * pad + 1, (2, count)))
    rows, columns = shifts[..., None] + torch.arange(side)  # each (B, S)
    flip = torch.from_numpy(generator.random(count) < 0.5)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
