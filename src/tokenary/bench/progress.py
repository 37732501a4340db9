"""Progress of a long measurement, for whoever draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """Where a measurement stands.

    Parameters
    ----------
    stage : str
        What is being done: ``warm-up``, ``round 1 of 3``, ``quality``, ...
    done, total : int
        Units of work of the whole task.
    detail : str
        The unit under way, such as a recipe.
    """

    stage: str
    done: int
    total: int
    detail: str = ""


class Reporter:
    """Tells a callback, or a ``rich.progress.Progress``, how far one task is.

    Parameters
    ----------
    progress : callable, rich.progress.Progress or None
        A callable gets a `Step` before every unit of work and once at the end.
    total : int
        Units of work.
    """

    def __init__(self, progress: Callable[[Step], None] | Any | None, total: int) -> None:
        self.total, self.done = total, 0
        self._call: Callable[[Step], None] | None = None
        if progress is None:
            return
        if hasattr(progress, "add_task"):
            bar: Any = progress
            task = bar.add_task("", total=total)

            def draw(step: Step) -> None:
                words = f"{step.stage}: {step.detail}" if step.detail else step.stage
                bar.update(task, completed=step.done, total=step.total, description=words)

            self._call = draw
        else:
            self._call = progress

    def start(self, stage: str, detail: str = "") -> None:
        """Say which unit begins."""
        if self._call is not None:
            self._call(Step(stage, self.done, self.total, detail))

    def finish(self) -> None:
        """Count the unit under way; after the last one, say so."""
        self.done += 1
        if self._call is not None and self.done == self.total:
            self._call(Step("done", self.done, self.total))
