"""What a reducer of image tokens keeps of a model's answers, and what it costs and saves.

Accuracy alone says little: some questions are answered right without the picture. *Retention* is the part of what the
picture adds that is left, (acc - blind) / (full - blind). All of it is paired: every arm answers the same questions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenary.core.errors import InputError
from tokenary.core.seeding import substream
from tokenary.core.statistics import Array, Interval, interval
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.model import BenchVLM, VLMConfig
from tokenary.models.bench_vlm.training import exact_match
from tokenary.reduce.base import Reducer
from tokenary.reduce.vlm import ReducedVLM


def retention(reduced: float, full: float, blind: float) -> float:
    """Return (reduced - blind) / (full - blind), nan where seeing does not help."""
    return (reduced - blind) / (full - blind) if full > blind else math.nan


def per_question(right: Sequence[Any] | NDArray[Any]) -> Array:
    """Return how often each question was answered right, (n,), of one run (n,) or of several seeds (seeds, n)."""
    array = np.asarray(right, dtype=np.float64)
    return array.mean(0) if array.ndim == 2 else array


def retained(
    reduced: Sequence[Any] | NDArray[Any],
    full: Sequence[Any] | NDArray[Any],
    blind: Sequence[Any] | NDArray[Any],
    families: Sequence[str] | None = None,
    *,
    minus: Sequence[Any] | NDArray[Any] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Measure retention, the mean over families, with a paired bootstrap over questions.

    Parameters
    ----------
    reduced, full, blind : array of bool or float
        Whether each question is answered right: (n,), or (seeds, n) for a method that draws.
    families : sequence of str, optional
        The family of each question. Retention is taken in each, and questions are drawn anew in each.
    minus : array, optional
        Right answers of another arm: then the figure is the difference of the two retentions.
    resamples : int
        Draws of the bootstrap.
    level : float
        Of the interval.
    seed : int
        Of the draws.

    Raises
    ------
    InputError
        If the arrays are of different length, or empty.

    Notes
    -----
    Where in more than one of a hundred draws seeing does not help in some family, there is no interval.
    """
    arms = [per_question(each) for each in (reduced, full, blind)]
    arms += [] if minus is None else [per_question(minus)]
    n = len(arms[0])
    names = list(families) if families is not None else [""] * n
    if n == 0 or {len(each) for each in arms} | {len(names)} != {n}:
        raise InputError(f"answers of different numbers of questions: {[len(each) for each in arms]}, {len(names)}")
    table, stream = np.stack(arms), substream(seed, "retention")
    values, draws = [], []
    for family in dict.fromkeys(names):
        part = table[:, [name == family for name in names]]  # (arms, questions)
        values.append(_figure(part.mean(1, keepdims=True))[0])
        count = part.shape[1]
        drawn = stream.multinomial(count, np.full(count, 1 / count), size=resamples) / count  # weights of questions
        draws.append(_figure(part @ drawn.T))
    return interval(float(np.mean(values)), np.mean(draws, axis=0), level)


def _figure(means: Array) -> Array:
    """Retention of accuracies (arms, draws), or the difference of two; nan where seeing does not help."""
    reduced, full, blind = means[:3]
    over = means[3] if len(means) == 4 else blind
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(full > blind, (reduced - over) / (full - blind), np.nan)


# ------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """One way of reducing on one set of questions.

    Parameters
    ----------
    name : str
        What it is called.
    right : array of bool
        (seeds, n).
    kept : float
        Image tokens that the language model read, the mean over pictures.
    flops : float
        Of a picture and its question, read once.
    kv_bytes : float
        Keys and values of the prompt in float16, all layers.
    """

    name: str
    right: NDArray[np.bool_]
    kept: float
    flops: float
    kv_bytes: float


def run_arm(
    model: BenchVLM,
    name: str,
    reducers: Sequence[Reducer | None],
    held_out: Questions,
    *,
    at: str | None = None,
    blind: bool = False,
    batch: int = 64,
) -> Arm:
    """Answer questions with a reducer in the model.

    Parameters
    ----------
    model : BenchVLM
        In its mode for inference.
    name : str
        What the arm is called.
    reducers : sequence of Reducer or None
        One, or one a seed; None reads everything.
    held_out : Questions
        What is asked.
    at : str, optional
        Where; by default where each belongs.
    blind : bool
        Show no picture.
    batch : int
        Pictures a pass.
    """
    right, kept, flops, held = [], [], [], []
    for reducer in reducers:
        place = at or (reducer.at if reducer is not None else "encoder")
        reduced = _Counting(model, reducer, place)
        with reduced:
            right.append(exact_match(cast(BenchVLM, reduced), held_out, model.device, blind, batch))
        kept += reduced.all_kept
        flops.append(vlm_flops(model.config, reduced.vision_tokens, reduced.language_tokens, reduced.views))
        held.append(kv_bytes(model.config, reduced.language_tokens))
    return Arm(name, np.array(right, bool), float(np.mean(kept)), float(np.mean(flops)), float(np.mean(held)))


class _Counting(ReducedVLM):
    """Remembers how many tokens were kept of every picture."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.all_kept: list[int] = []

    def __call__(self, *args: Any) -> Tensor:
        """Score, and count."""
        logits = super().__call__(*args)
        self.all_kept += self.kept
        return logits


def summary(
    arms: Sequence[Arm], full: Arm, blind: Arm, families: Sequence[str], *, resamples: int = 2000
) -> list[dict[str, Any]]:
    """Return one row of figures an arm: retention on average and by family, tokens, FLOPs and bytes."""
    rows = []
    for arm in arms:
        found: dict[str, Any] = {
            "name": arm.name,
            "accuracy": round(float(per_question(arm.right).mean()), 4),
            "kept": round(arm.kept, 2),
            "gflops": round(arm.flops / 1e9, 4),
            "kv_bytes": round(arm.kv_bytes),
        }
        found["retention"] = retained(arm.right, full.right, blind.right, families, resamples=resamples).to_json()
        found["families"] = {}
        for family in dict.fromkeys(families):
            here = np.array([name == family for name in families])
            parts = (arm.right[:, here], full.right[:, here], blind.right[:, here])
            found["families"][family] = {
                "accuracy": round(float(parts[0].mean()), 4),
                **retained(*parts, resamples=resamples).to_json(),
            }
        rows.append(found)
    return rows


# ------------------------------------------------------------------------------------------------------- cost


def block_flops(tokens: int, width: int, *, inner: int, matrices: int = 2, kv_width: int | None = None) -> int:
    """Count multiplications and additions of one transformer block.

    Parameters
    ----------
    tokens : int
        Tokens of one sequence; every one is taken to attend to every one.
    width : int
        Of the hidden states.
    inner : int
        Of the MLP.
    matrices : int
        Of the MLP: 2, or 3 where it is gated.
    kv_width : int, optional
        Of keys and values, where heads share them.
    """
    shared = width if kv_width is None else kv_width
    linear = 2 * width * width + 2 * width * shared + matrices * width * inner  # q, o; k, v; MLP
    return 2 * tokens * linear + 4 * tokens * tokens * width


def vlm_flops(config: VLMConfig, vision: Sequence[int], language: Sequence[int], views: int = 1) -> int:
    """Count what a picture and its question cost to read.

    Parameters
    ----------
    config : VLMConfig
        Of the model.
    vision : sequence of int
        Tokens that each block of the encoder computes and, last, those that leave it, of one view, with a class token;
        empty for a blind answer.
    language : sequence of int
        Tokens that each layer of the language model reads.
    views : int
        Views of the picture.
    """
    wide = config.vision_width
    seen = sum(block_flops(n, wide, inner=4 * wide) for n in vision[:-1])
    if vision:
        patches = vision[0] - 1
        seen += 2 * patches * 3 * config.patch**2 * wide
        seen += 2 * (vision[-1] - 1) * (2 * wide * wide + 2 * wide * config.width)  # projector
    read = sum(block_flops(n, config.width, inner=config.intermediate, matrices=3) for n in language)
    return views * seen + read


def kv_bytes(config: VLMConfig, language: Sequence[int]) -> int:
    """Count the bytes of a prompt's keys and values in half precision, layers of different length each with its own."""
    return sum(2 * 2 * n * config.width for n in language)


@dataclass(frozen=True)
class Times:
    """Seconds, medians of several passes.

    Parameters
    ----------
    encode : float
        Pixels to image tokens, what the reducer does in the encoder included.
    prefill : float
        Image tokens and question to the logits of the first token, the choice of tokens included.
    plan : float
        The reducer's own choice, part of one of the two.
    """

    encode: float
    prefill: float
    plan: float


@torch.inference_mode()
def measure_times(
    model: BenchVLM, reducer: Reducer | None, pixels: Tensor, ids: Tensor, *, at: str | None = None, repeats: int = 5
) -> Times:
    """Time reading pictures (B, S, S, 3) with questions (B, L), after one pass whose times are thrown away."""
    spent = [0.0]
    place = at or (reducer.at if reducer is not None else "encoder")
    found: list[tuple[float, float, float]] = []
    with ReducedVLM(model, reducer, place) as reduced, _Clock(reducer, spent):
        for _ in range(repeats + 1):
            spent[0] = 0.0
            start = time.perf_counter()
            seen = reduced.image_tokens(pixels)
            middle = time.perf_counter()
            reduced(seen, ids)
            found.append((middle - start, time.perf_counter() - middle, spent[0]))
    return Times(*(statistics.median(column) for column in zip(*found[1:], strict=True)))


class _Clock:
    """Adds up what a reducer's choice takes."""

    def __init__(self, reducer: Reducer | None, spent: list[float]) -> None:
        self.reducer, self.spent = reducer, spent

    def __enter__(self) -> None:
        if self.reducer is not None:
            self.plan: Callable[..., Any] = self.reducer.plan
            self.reducer.plan = self._plan  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        if self.reducer is not None:
            del self.reducer.plan

    def _plan(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = self.plan(*args, **kwargs)
        self.spent[0] += time.perf_counter() - start
        return found
