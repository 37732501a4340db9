"""Training from scratch: answer-only loss, a curriculum, held-out curves, gates, and a checkpoint to go on from.

The scenes of step n are named by (seed, n), the learning rate by the progress, so an interrupted run of a fixed
number of steps ends with the same weights as one that was not. Under a time limit the progress is the time spent.

For the first half an auxiliary head asks every image patch what it shows (its weight falls linearly to zero): without
it a ViT learns to read from answers alone several times more slowly. Another one asks the class token what there is in
the picture: nothing reads that token, and without a task its attention, which some reducers go by, would mean nothing.
The heads are not part of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenary.core.errors import OptionError
from tokenary.hf.float32_attention import FLOAT32
from tokenary.models import training
from tokenary.models.bench_vlm.batches import Batch, Order, Questions, TrainingScenes, questions
from tokenary.models.bench_vlm.canvas import NUM_CLASSES
from tokenary.models.bench_vlm.model import BenchVLM, sized
from tokenary.models.bench_vlm.scenes import FAMILIES
from tokenary.models.training import fast_products, schedule, set_rate

#: Exact-match accuracy that a family must reach; every family must also beat the blind model by `MARGIN`.
GATES = {"ocr": 0.70, "counting": 0.80, "existence": 0.95}
MARGIN = 0.30


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Parameters
    ----------
    size : str
        One of `model.SIZES`.
    seed : int
        Of weights and scenes.
    batch : int
        Scenes a step.
    minutes : float
        Time to spend, resumed time included; ignored where `steps` is given.
    steps : int, optional
        Steps instead of time: reproducible.
    lr, weight_decay, warmup : float
        AdamW; the rate rises over the share `warmup` of the progress and falls to zero along a cosine.
    easy : float
        Share of the progress that asks only for attributes and existence.
    dense : float
        Weight of the auxiliary loss at the start.
    dense_until : float
        Progress at which that weight has fallen to zero.
    tags : float
        Weight of the loss of the class token, all along.
    blind_every : int
        Every so many steps the batch is read without its pictures, so that a blind answer is a learnt one.
    anyres_every : int
        After 60 % of the progress, every so many steps an eighth of a batch comes at twice the side; 0: never.
    workers : int
        Processes that draw; 0 draws in between.
    evaluate_every : float
        Share of the progress between two points of the curve.
    per_family : int
        Held-out questions a family for a point of the curve; four times as many at the end.
    compile : bool
        Compile the layers with ``torch.compile``.
    """

    size: str = "xs"
    seed: int = 0
    batch: int = 64
    minutes: float = 10.0
    steps: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.02
    easy: float = 0.05
    dense: float = 1.0
    dense_until: float = 0.5
    tags: float = 0.5
    blind_every: int = 16
    anyres_every: int = 0
    workers: int = 0
    evaluate_every: float = 0.05
    per_family: int = 64
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.batch < 1:
            raise OptionError("batch", self.batch, "at least 1")
        if self.steps is None and self.minutes <= 0:
            raise OptionError("minutes", self.minutes, "more than 0")


@dataclass
class State(training.State):
    """Where a run stands, and how many scenes it has seen."""

    scenes: int = 0


class Trainer:
    """One training run.

    Parameters
    ----------
    options : TrainingOptions
    device : torch.device
    work : Path
        Folder of the checkpoint; a run with the same size and seed goes on from it.
    """

    def __init__(self, options: TrainingOptions, device: torch.device, work: Path) -> None:
        self.options, self.device = options, device
        torch.manual_seed(options.seed)
        self.model = BenchVLM(sized(options.size)).to(device)
        if device.type == "cpu":
            self.model.language.set_attn_implementation(FLOAT32)
        self.dense_head = nn.Linear(self.model.config.vision_width, NUM_CLASSES).to(device)
        self.tag_head = nn.Linear(self.model.config.vision_width, NUM_CLASSES).to(device)
        matrices = [p for p in self._parameters().values() if p.dim() >= 2]
        vectors = [p for p in self._parameters().values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.state = State()
        run, parts = {"size": options.size, "seed": options.seed}, [self.model, self.dense_head, self.tag_head]
        file = work / "checkpoint.pt"
        self.checkpoint = training.Checkpoint(file, run, self.state, [*parts, self.optimizer], device)
        self.checkpoint.resume()
        if options.compile:
            for layer in (*self.model.vision.blocks, *self.model.language.model.layers):
                layer.compile()
        self._held_out: Questions | None = None

    # -- the loop ----------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        if self.options.steps is not None:
            return min(1.0, self.state.step / self.options.steps)
        return min(1.0, self.state.seconds / (60 * self.options.minutes))

    def run(
        self, report: Callable[[State, dict[str, Any]], None] | None = None, stop_after: int | None = None
    ) -> State:
        """Train to the end (or for `stop_after` steps); call `report` after every step."""
        loader = DataLoader(
            TrainingScenes(self.model.config.geometry, self.options.seed),
            batch_size=None,
            sampler=_Orders(self),
            num_workers=self.options.workers,
            prefetch_factor=2 if self.options.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_one_thread,
        )
        next_point = self.progress + self.options.evaluate_every
        last_save, last = time.monotonic(), time.monotonic()
        stop = None if stop_after is None else self.state.step + stop_after
        for batch in loader:
            parts = self.train_step(batch)
            now = time.monotonic()
            self.state.seconds, last = self.state.seconds + now - last, now
            if self.progress >= next_point and self.progress < 1:
                self.evaluate_point(parts)
                next_point += self.options.evaluate_every
            if now - last_save > 120:
                self.checkpoint.save()
                last_save = now
            if report is not None:
                report(self.state, parts)
            if self.progress >= 1 or self.state.step == stop:
                break
        self.checkpoint.save()
        return self.state

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """Take one optimiser step; return the losses (tensors, so that nothing waits for the GPU)."""
        options, progress = self.options, self.progress
        set_rate([self.optimizer], options.lr * schedule(progress, options.warmup))
        self.model.train()
        batch = batch.to(self.device)
        loss, parts = self.loss(batch)
        loss.backward()
        parts["norm"] = nn.utils.clip_grad_norm_(list(self._parameters().values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.scenes += len(batch.pixels)
        return parts

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss to minimise and its parts."""
        model, options = self.model, self.options
        ordinary = batch.pixels.shape[1] == model.config.side
        blind = ordinary and self.state.step % options.blind_every == options.blind_every - 1
        with fast_products(self.device.type), self._stance(ordinary and not blind):
            if blind or not ordinary:
                answers = answer_loss(model(None if blind else model.image_tokens(batch.pixels), batch.ids), batch)
                return answers, {"blind" if blind else "anyres": answers.detach()}
            seen = model.vision(batch.pixels).last_hidden_state
            patches = seen[:, 1:]
            answers = answer_loss(model(model.projector(patches), batch.ids), batch)
            tags = tag_loss(self.tag_head(seen[:, 0]), batch)
            loss, parts = answers + options.tags * tags, {"loss": answers.detach(), "tags": tags.detach()}
            weight = options.dense * max(0.0, 1 - self.progress / options.dense_until)
            if weight == 0:
                return loss, parts
            balance = torch.ones(NUM_CLASSES, device=self.device)
            balance[0] = 0.1  # most patches show nothing
            logits = self.dense_head(patches).float().flatten(0, 1)
            dense = F.cross_entropy(logits, batch.classes.flatten(), balance)
        return loss + weight * dense, {**parts, "dense": dense.detach()}

    # -- measuring ---------------------------------------------------------------------------------------------

    def evaluate_point(self, parts: dict[str, Any]) -> None:
        """Add one point to the curve: losses and accuracy of every family on held-out scenes."""
        if self._held_out is None:
            self._held_out = questions(self.model.config.geometry, "val", self.options.per_family)
        accuracy = by_family(self._held_out, self.correct(self._held_out))
        losses = {name: round(float(value), 4) for name, value in parts.items()}
        point = {"step": self.state.step, "scenes": self.state.scenes, "seconds": round(self.state.seconds, 1)}
        self.state.curve.append({**point, **losses, "accuracy": accuracy})

    def correct(self, held_out: Questions, blind: bool = False) -> list[bool]:
        """Whether each answer would be generated exactly, greedily: every token of it the most likely one."""
        with self._stance(False), fast_products(self.device.type):
            return exact_match(self.model, held_out, self.device, blind, batch=self.options.batch)

    def final_report(self) -> dict[str, Any]:
        """Measure the finished model on test scenes, with and without pictures, and judge the gates."""
        held_out = questions(self.model.config.geometry, "test", 4 * self.options.per_family)
        seen = self.correct(held_out)
        full, blind = by_family(held_out, seen), by_family(held_out, self.correct(held_out, blind=True))
        report = {
            "split": "test",
            "questions_per_family": 4 * self.options.per_family,
            "full": full,
            "blind": blind,
            "kinds": by_kind(held_out, seen),
            "gates": judge(full, blind),
        }
        if self.options.anyres_every:
            large = questions(self.model.config.geometry, "test", self.options.per_family, anyres=True)
            report["anyres"] = by_family(large, self.correct(large))
        return report

    # -- parts -------------------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        modules = nn.ModuleDict({"model": self.model, "dense_head": self.dense_head, "tag_head": self.tag_head})
        return dict(modules.named_parameters())  # a tied parameter appears once

    def _stance(self, compiled: bool) -> Any:
        """Shapes that come seldom are not worth a compilation."""
        return nullcontext() if compiled or not self.options.compile else torch.compiler.set_stance("force_eager")


class _Orders:
    """The sampler: which batch each coming step needs. Read ahead by the loader's workers."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Order]:
        options, step = self.trainer.options, self.trainer.state.step
        while options.steps is None or step < options.steps:
            # under a number of steps the phase is that of the step itself, however far the workers read ahead
            progress = self.trainer.progress if options.steps is None else step / options.steps
            every = options.anyres_every
            anyres = bool(every) and progress > 0.6 and step % every == every // 2
            yield Order(step, max(1, options.batch // 8) if anyres else options.batch, progress < options.easy, anyres)
            step += 1


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the answer tokens; logits (B, L, V) at t predict token t + 1."""
    targets = batch.ids[:, 1:].masked_fill(~batch.predicted[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def tag_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of what there is in each picture, from logits (B, NUM_CLASSES)."""
    there = torch.zeros_like(logits, dtype=torch.float32).scatter(1, batch.classes.flatten(1), 1.0)
    return F.binary_cross_entropy_with_logits(logits.float(), there)


@torch.no_grad()
def exact_match(
    model: BenchVLM, held_out: Questions, device: torch.device, blind: bool = False, batch: int = 64
) -> list[bool]:
    """Whether the model would answer each question exactly.

    All tokens of the right answer being the most likely ones, given those before, is the same as the greedy answer
    being right; so one pass is enough.
    """
    model.eval()
    right: list[bool] = []
    data = held_out.batch
    for start in range(0, len(data.ids), batch):
        rows = slice(start, start + batch)
        tokens = None if blind else model.image_tokens(data.pixels[rows].to(device))
        best = model(tokens, data.ids[rows].to(device)).argmax(-1)[:, :-1].cpu()
        missed = (best != data.ids[rows, 1:]) & data.predicted[rows, 1:]
        right += (~missed.any(1)).tolist()
    return right


def by_family(held_out: Questions, right: list[bool]) -> dict[str, float]:
    """Accuracy of each family."""
    return _shares([turn.family for turn in held_out.turns], right)


def by_kind(held_out: Questions, right: list[bool]) -> dict[str, float]:
    """Accuracy of each kind of question, as ``family/kind``."""
    return _shares([f"{turn.family}/{turn.kind}" for turn in held_out.turns], right)


def _shares(keys: list[str], right: list[bool]) -> dict[str, float]:
    counts: dict[str, list[bool]] = {}
    for key, value in zip(keys, right, strict=True):
        counts.setdefault(key, []).append(value)
    return {key: round(sum(values) / len(values), 4) for key, values in sorted(counts.items())}


def judge(full: dict[str, float], blind: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Say for every family whether it is fit to measure reducers on.

    Where a gate is missed, what a reducer retains of that family means nothing.
    """
    return {
        family: {
            "needed": GATES.get(family, 0.0),
            "margin": round(full[family] - blind[family], 4),
            "passed": full[family] >= GATES.get(family, 0.0) and full[family] - blind[family] >= MARGIN,
        }
        for family in FAMILIES
    }
