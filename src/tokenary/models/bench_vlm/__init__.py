"""A family of small vision-language models that the project trains itself, from scratch, on scenes that it draws.

``load("s-0")`` gives a trained `BenchVLM`; ``render`` draws a scene with questions, and says exactly which patches
carry each answer; ``questions`` draws a held-out set and ``exact_match`` measures on it.
``scripts/train_bench_vlm.py`` trains.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenary.models.bench_vlm.scenes import FAMILIES, Geometry, Scene, Turn, render
from tokenary.models.bench_vlm.vocabulary import VOCABULARY

if TYPE_CHECKING:
    from tokenary.models.bench_vlm.batches import Questions, questions
    from tokenary.models.bench_vlm.loading import available, load, save
    from tokenary.models.bench_vlm.model import SIZES, BenchVLM, VLMConfig, sized
    from tokenary.models.bench_vlm.training import GATES, Trainer, TrainingOptions, exact_match

_LAZY = {  # these import torch
    "BenchVLM": "model", "GATES": "training", "Questions": "batches", "SIZES": "model", "Trainer": "training",
    "TrainingOptions": "training", "VLMConfig": "model", "available": "loading", "exact_match": "training",
    "load": "loading", "questions": "batches", "save": "loading", "sized": "model",
}  # fmt: skip

__all__ = [
    "FAMILIES", "GATES", "SIZES", "VOCABULARY", "BenchVLM", "Geometry", "Questions", "Scene", "Trainer",
    "TrainingOptions", "Turn", "VLMConfig", "available", "exact_match", "load", "questions", "render", "save", "sized",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
