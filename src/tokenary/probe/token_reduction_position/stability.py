"""Stability of training: figures of a loss curve, of gradient norms, of states and of attention; and of a ladder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def spikes(losses: Sequence[float], window: int = 20, deviations: float = 4.0) -> int:
    """Count steps whose loss is above the mean of the `window` steps before by more than so many deviations of theirs.

    The first `window` steps cannot be spikes; a loss that is not finite is one.
    """
    found = 0
    for step in range(window, len(losses)):
        before = [loss for loss in losses[step - window : step] if math.isfinite(loss)]
        if not math.isfinite(losses[step]):
            found += 1
        elif len(before) > 1:
            found += losses[step] > statistics.fmean(before) + deviations * statistics.stdev(before)
    return found


def variation(values: Sequence[float]) -> float:
    """Return the coefficient of variation, standard deviation by mean; nan of what is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    mean = statistics.fmean(values)
    return statistics.stdev(values) / mean if mean else math.nan


def diverged(losses: Sequence[float], last: int = 5) -> bool:
    """Whether training ended no better than it began: a loss that is not finite, or a last mean above the first."""
    if not all(map(math.isfinite, losses)):
        return True
    return statistics.fmean(losses[-last:]) >= statistics.fmean(losses[:last])


def largest_stable(runs: Mapping[float, Sequence[Sequence[float]]]) -> float | None:
    """Return the largest learning rate up to which no seed diverged, given loss curves by rate; None if none is."""
    stable = None
    for rate in sorted(runs):
        if any(diverged(losses) for losses in runs[rate]):
            break
        stable = rate
    return stable


def effective_rank(states: Tensor) -> float:
    """Return exp(H(p)) of the normalised singular values p of centred token states (n, D); nan where not finite."""
    if not bool(torch.isfinite(states).all()):
        return math.nan
    values = torch.linalg.svdvals(states.double() - states.double().mean(0))
    if float(values.sum()) == 0:
        return 1.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def sink_share(attention: Tensor, factor: float = 10.0) -> float:
    """Return the share of attention that falls on sinks: keys that get `factor` times the mean of all keys or more.

    Parameters
    ----------
    attention : (..., K) Tensor
        Attention that each key gets, mean over queries.
    factor : float
        Above 1.
    """
    mean = attention.mean(-1, keepdim=True)
    sinks = attention >= factor * mean
    total = attention.sum()
    return float((attention * sinks).sum() / total) if float(total) > 0 else math.nan


def dead_share(attention: Tensor, factor: float = 0.1) -> float:
    """Return the share of keys that get less than `factor` of the mean of all keys, (..., K)."""
    return float((attention < factor * attention.mean(-1, keepdim=True)).double().mean())
