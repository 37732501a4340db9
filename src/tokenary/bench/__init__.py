"""The fair comparison: recipes timed in turns on the same prompts, their quality on real text, a table and a report.

``compare`` does all of it. Its parts: ``measure.measure`` (time, passes, bytes, equality of outputs) and
``quality.sweep`` (perplexity over budgets). Nothing here imports torch or plotly before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenary.bench.comparison import Comparison, compare, one_table
    from tokenary.bench.measure import Case, Measurement, Row, Spread, balanced, logit_gap
    from tokenary.bench.progress import Step
    from tokenary.bench.quality import Quality, evaluate, sliding_texts, sweep, teacher_forced
    from tokenary.bench.report import headline, render
    from tokenary.bench.rooms import recipes_of

_HOME = {
    "comparison": ("Comparison", "compare", "one_table"),
    "measure": ("Case", "Measurement", "Row", "Spread", "balanced", "logit_gap"),
    "progress": ("Step",),
    "quality": ("Quality", "evaluate", "sliding_texts", "sweep", "teacher_forced"),
    "report": ("headline", "render"),
    "rooms": ("recipes_of",),
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
    "one_table",
    "recipes_of",
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
