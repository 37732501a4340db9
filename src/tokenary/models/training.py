"""What trainings share: the course of the learning rate, precision, optimisers, where a run stands, checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenary.core.errors import InputError
from tokenary.core.files import written_whole


@dataclass
class State:
    """Where a run stands.

    Attributes
    ----------
    step : int
        Steps taken.
    seconds : float
        Spent on them.
    curve : list of dict
        What was measured on the way.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """The file from which a run that was broken off goes on.

    Parameters
    ----------
    file : Path
    run : dict
        What the run is, in plain values: sizes and settings.
    state : State
        `resume` fills it.
    parts : sequence
        Networks and optimisers, which `resume` fills.
    device : torch.device, optional
        Where they are; by default where they were.
    """

    file: Path
    run: dict[str, Any]
    state: State
    parts: Sequence[Any]
    device: torch.device | None = None

    def save(self) -> None:
        """Write the file, whole or not at all."""
        parts = [part.state_dict() for part in self.parts]
        with written_whole(self.file) as stream:
            torch.save({"parts": parts, "state": asdict(self.state), "run": self.run}, stream)

    def resume(self) -> bool:
        """Go on from the file; return False where there is none.

        Raises
        ------
        InputError
            It is of another run.
        """
        if not self.file.exists():
            return False
        saved = torch.load(self.file, map_location=self.device, weights_only=True)
        if saved["run"] != self.run:
            raise InputError(f"{self.file} is of another run, with other settings: {saved['run']}")
        for part, values in zip(self.parts, saved["parts"], strict=True):
            part.load_state_dict(values)
        vars(self.state).update(saved["state"])
        return True


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to zero."""
    if progress < warmup:
        return max(0.02, progress / warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def muon_and_adamw(
    matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of blocks and AdamW for all else, at one learning rate."""
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]


def fast_products(device: str = "cpu") -> contextlib.AbstractContextManager[Any]:
    """Multiply in bfloat16 on a GPU, and on a processor that has instructions for it."""
    fast = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device, dtype=torch.bfloat16) if fast else contextlib.nullcontext()
