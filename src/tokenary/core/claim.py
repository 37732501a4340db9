"""Claims: the headline of a paper as an experiment, and a verdict that is computed from its figures."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["shown", "direction only", "not shown", "needs a GPU"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Parameters
    ----------
    name : str
        What was measured, or the baseline's name.
    value : float
        Mean over the runs.
    spread : float
        Standard error of the mean; 0 for an exact count.
    """

    name: str
    value: float
    spread: float = 0.0

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> Figure:
        """Return the mean of samples (n,) with its standard error."""
        return cls(name, float(values.mean()), standard_error(values))


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of samples (n,); infinite for fewer than two."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


@dataclass(frozen=True)
class Outcome:
    """What one run of an experiment measured: the method, its baseline and the controls, in one unit.

    Parameters
    ----------
    method : Figure
        The method.
    baseline : Figure
        What the paper compares with.
    controls : tuple of Figure
        *none* and *random*, where they exist. A control named ``random`` must be beaten too.
    n : int
        Samples (prompts, texts, steps).
    runs : int
        Repeats or seeds.
    paired_spread : float, optional
        Standard error of the difference between method and baseline, where both saw the same samples. It takes the
        place of their own spreads, which mostly say how much the samples differ.
    details : mapping
        Further figures worth keeping, plain JSON types.
    """

    method: Figure
    baseline: Figure
    controls: tuple[Figure, ...] = ()
    n: int = 1
    runs: int = 1
    paired_spread: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A statement that an experiment can refute.

    A claim file holds one ``CLAIM`` and nothing that knows the verdict.

    Parameters
    ----------
    slug : str
        The method.
    statement : str
        What is claimed, in one sentence with its threshold.
    metric : str
        What is measured, with its unit.
    direction : {"higher", "lower"}
        Which is better.
    threshold : float
        Least effect for ``shown``: a ratio method/baseline (of ``higher``) or baseline/method (of ``lower``) with
        ``effect="ratio"``; a gain in the metric's unit with ``effect="difference"``.
    run : callable
        ``run(seed, **variation)`` performs the experiment and returns its `Outcome`.
    variation : str
        What the held-out run changes, chosen before looking.
    held_out : mapping
        Keyword arguments of `run` for it.
    effect : {"ratio", "difference"}
        How the threshold is read.
    model : str
        Catalogue name of the model it runs on; empty for none.
    minutes : float
        Rough time on two cores.
    gpu : bool
        Cannot be run without one.
    fast : mapping or None
        Keyword arguments of `run` for a subset that ordinary tests can afford; None if there is none.
    timing : callable or None
        ``timing(seed)`` returns wall-clock figures by name. They decide nothing, and can be measured again alone, on a
        machine that does nothing else.
    """

    slug: str
    statement: str
    metric: str
    direction: Direction
    threshold: float
    run: Callable[..., Outcome]
    variation: str
    held_out: Mapping[str, Any]
    effect: Literal["ratio", "difference"] = "ratio"
    model: str = "smollm2"
    minutes: float = 1.0
    gpu: bool = False
    fast: Mapping[str, Any] | None = None
    timing: Callable[[int], Mapping[str, float]] | None = None

    def judge(self, outcome: Outcome) -> Verdict:
        """Compute the verdict of one run.

        ``shown``: the effect reaches the threshold and exceeds twice its own standard error, over the baseline, and
        the method beats the control *random*. ``direction only``: it beats both by more than the error, below the
        threshold. Anything else, a missing number included: ``not shown``.
        """
        sign = 1.0 if self.direction == "higher" else -1.0
        method, baseline = outcome.method, outcome.baseline
        gain = sign * (method.value - baseline.value)
        error = outcome.paired_spread
        if error is None:
            error = math.hypot(method.spread, baseline.spread)
        rivals = [control for control in outcome.controls if control.name == "random"]
        beats = all(sign * (method.value - rival.value) > 0 for rival in rivals)
        if not beats or not math.isfinite(gain) or not gain > 2 * error:  # an unknown error too
            return "not shown"
        return "shown" if self.size(outcome) >= self.threshold else "direction only"

    def size(self, outcome: Outcome) -> float:
        """Return the effect in the unit of the threshold."""
        method, baseline = outcome.method.value, outcome.baseline.value
        if self.effect == "difference":
            return (method - baseline) if self.direction == "higher" else (baseline - method)
        above, below = (method, baseline) if self.direction == "higher" else (baseline, method)
        return above / below if below else math.inf

    def wall_clock(self, seed: int = 0) -> dict[str, Any] | None:
        """Measure the wall-clock figures; return them with the date and the threads, None where there are none."""
        import torch

        if self.timing is None:
            return None
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"figures": dict(self.timing(seed)), "threads": torch.get_num_threads(), "started_at": started}

    def record(self, seed: int = 0, model: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run the claim and its held-out variation; return the record, plain JSON types.

        Parameters
        ----------
        seed : int
            Of every random draw.
        model : mapping, optional
            Name and hash of the model, for the record.
        """
        import torch

        started, began = datetime.datetime.now(datetime.UTC), time.perf_counter()
        base = {
            "slug": self.slug,
            "claim": self.statement,
            "metric": self.metric,
            "direction": self.direction,
            "effect": self.effect,
            "threshold": self.threshold,
        }
        about = {
            "seed": seed,
            "model": dict(model or {}),
            "versions": versions(),
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "started_at": started.isoformat(timespec="seconds"),
        }
        if self.gpu and not torch.cuda.is_available():
            return {**base, "verdict": "needs a GPU", **about}
        outcome = self.run(seed=seed)
        varied = self.run(seed=seed + 1, **self.held_out)
        return {
            **base,
            "value": outcome.method.value,
            "spread": outcome.method.spread,
            "paired_spread": outcome.paired_spread,
            "baseline": asdict(outcome.baseline),
            "controls": [asdict(control) for control in outcome.controls],
            "size": self.size(outcome),
            "verdict": self.judge(outcome),
            "held_out": {
                "varied": self.variation,
                "value": varied.method.value,
                "spread": varied.method.spread,
                "paired_spread": varied.paired_spread,
                "baseline": asdict(varied.baseline),
                "controls": [asdict(control) for control in varied.controls],
                "size": self.size(varied),
                "verdict": self.judge(varied),
                "details": dict(varied.details),
            },
            "n": outcome.n,
            "runs": outcome.runs,
            "details": dict(outcome.details),
            "timing": self.wall_clock(seed),
            "minutes": round((time.perf_counter() - began) / 60, 2),
            **about,
        }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the figures depend on."""
    from importlib.metadata import version

    names = ("tokenary", "torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def device_name() -> str:
    """Return the name of the GPU, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
