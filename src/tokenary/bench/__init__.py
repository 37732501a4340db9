"""The fair comparison: recipes timed in turns on the same prompts, their quality on real text, a table and a report.

``compare`` does all of it. Its parts: ``measure.measure`` (time, passes, bytes, equality of outputs) and
``quality.sweep`` (perplexity over budgets). Nothing here imports torch or plotly before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenary.bench.comparison import Comparison, balanced, compare
    from tokenary.bench.measure import Case, Measurement, Row, Spread, logit_gap
    from tokenary.bench.progress import Step
    from tokenary.bench.quality import Quality, evaluate, sliding_texts, sweep, teacher_forced
    from tokenary.bench.report import headline, render

_HOME = {
    "comparison": ("Comparison", "balanced", "compare"),
    "measure": ("Case", "Measurement", "Row", "Spread", "logit_gap"),
    "progress": ("Step",),
    "quality": ("Quality", "evaluate", "sliding_texts", "sweep", "teacher_forced"),
    "report": ("headline", "render"),
}

__all__ = [
    "Case",
    "Comparison",
    "Measurement",
    "Quality",
    "Row",
    "Spread",
    "Step",
    "balanced",
    "compare",
    "evaluate",
    "headline",
    "logit_gap",
    "render",
    "sliding_texts",
    "sweep",
    "teacher_forced",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
