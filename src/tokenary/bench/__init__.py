"""The fair comparison: recipes timed in turns on the same prompts, their quality on real text, a table and a report.

``compare`` does all of it, ``compare_memory`` asks memories about long texts, ``compare_reduce`` reducers of image
tokens about pictures. Parts of them: ``measure.measure`` (time, passes, bytes, equality of outputs), ``quality.sweep``
(perplexity over budgets), ``memory_reading.read_haystack`` and ``reduction.run_arm``.
Nothing here imports torch or plotly before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenary.bench.comparison import Comparison, compare, one_table
    from tokenary.bench.measure import balanced, logit_gap
    from tokenary.bench.measured import Case, Measurement, Row, Spread
    from tokenary.bench.memory_room import MemoryComparison, compare_memory
    from tokenary.bench.progress import Step
    from tokenary.bench.quality import Quality, evaluate, sliding_texts, sweep, teacher_forced
    from tokenary.bench.reduce_room import ReduceComparison, compare_reduce
    from tokenary.bench.report import headline, render
    from tokenary.bench.rooms import recipes_of

_HOME = {
    "comparison": ("Comparison", "compare", "one_table"),
    "measure": ("balanced", "logit_gap"),
    "measured": ("Case", "Measurement", "Row", "Spread"),
    "memory_room": ("MemoryComparison", "compare_memory"),
    "progress": ("Step",),
    "quality": ("Quality", "evaluate", "sliding_texts", "sweep", "teacher_forced"),
    "reduce_room": ("ReduceComparison", "compare_reduce"),
    "report": ("headline", "render"),
    "rooms": ("recipes_of",),
}

__all__ = [
    "Case",
    "Comparison",
    "Measurement",
    "MemoryComparison",
    "Quality",
    "ReduceComparison",
    "Row",
    "Spread",
    "Step",
    "balanced",
    "compare",
    "compare_memory",
    "compare_reduce",
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
