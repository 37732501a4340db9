"""The arms of a report card: reducers, and the controls at each one's place and budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenary.bench.reduction_card.asking import Answers, answers_of
from tokenary.bench.reduction_card.questions import Asked
from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError, RecipeError
from tokenary.core.recipe import Step
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.reduce.base import Point, Reducer
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_low_res import ReduceLowRes
from tokenary.reduce.reduce_random import ReduceRandom

Runs = list[Answers]


@dataclass(frozen=True)
class Entry:
    """A reducer on the card.

    Parameters
    ----------
    name : str
        Recipe text, or what a caller calls it.
    reducer : Reducer
    at : str
        Where it acts.
    """

    name: str
    reducer: Reducer
    at: str


def entries(recipes: dict[str, Reducer] | list[str], budgets: list[float], at: str | None) -> list[Entry]:
    """Read recipes, each at its own budget, or at every one of `budgets` (percent).

    Raises
    ------
    RecipeError
        If a recipe is no reducer of image tokens, or has no budget that could be set.
    OptionError
        If a budget is no percentage between 0 and 100.
    """
    if isinstance(recipes, dict):
        return [Entry(name, reducer, at or reducer.at) for name, reducer in recipes.items()]
    found = []
    for text in recipes:
        step = Step.parse(text)
        if step.card.room != "reduce" or step.slug == "blind":
            raise RecipeError(f"{step.slug}: a card is made of a reducer; see tokenary methods --room reduce")
        for budget in budgets or [None]:  # type: ignore[list-item]
            if budget is not None and not 0 < budget < 100:
                raise OptionError("budget", budget, "a percentage above 0 and below 100")
            one = step
            if budget is not None:
                rest = tuple((name, value) for name, value in step.options if name not in ("keep", "bytes"))
                one = Step(step.slug, tuple(sorted((*rest, ("keep", f"{budget:g}%")))))
            reducer = one.build()
            found.append(Entry(str(one), reducer, at or reducer.at))
    return found


class Arms:
    """Answers of all arms, each asked once.

    Parameters
    ----------
    model : BenchVLM
    asked : Asked
    seeds : int
        Of the random control.
    seed : int
        The first of them.
    """

    def __init__(self, model: BenchVLM, asked: Asked, seeds: int, seed: int) -> None:
        self.model, self.asked, self.seeds = model, asked, range(seed, seed + seeds)
        self.known: dict[tuple[str, str, str], Runs] = {}
        self.full = self.runs("none", "encoder", "", lambda: [None])[0]
        self.blind = answers_of(model, None, asked, "encoder", blind=True)

    def runs(self, name: str, at: str, keep: str, make: Callable[[], list[Any]]) -> Runs:
        """Ask an arm, or return what it answered before."""
        key = (name, at, keep)
        if key not in self.known:
            self.known[key] = [answers_of(self.model, reducer, self.asked, at) for reducer in make()]
        return self.known[key]

    def of(self, entry: Entry) -> Runs:
        """Ask a reducer."""
        return self.runs(entry.name, entry.at, str(entry.reducer.keep), lambda: [entry.reducer])

    def controls(self, entry: Entry) -> Iterator[tuple[str, str, Runs]]:
        """Ask the controls of a reducer at its place and budget: name, place and answers, random first."""
        runs = self.of(entry)
        keep = self._budget(entry, runs[0])
        yield "random", entry.at, self.random(entry)
        yield "grid", entry.at, self.runs("grid", entry.at, str(keep), lambda: [ReduceGrid(keep)])
        # of a picture that is scaled down every layer reads as much: what the reducer's layers read on average
        small = Budget(tokens=max(1, round(runs[0].layer_tokens)))
        yield "low-res", "encoder", self.runs("low-res", "encoder", str(small), lambda: [ReduceLowRes(small)])

    def random(self, entry: Entry) -> Runs:
        """Ask random tokens, of several seeds, at the place and budget of a reducer."""
        keep = self._budget(entry, self.of(entry)[0])
        return self.runs("random", entry.at, str(keep), lambda: [ReduceRandom(keep, each) for each in self.seeds])

    def _budget(self, entry: Entry, answers: Answers) -> Budget:
        """Return the budget that makes another method keep as much where the reducer acts."""
        if Point.stage_of(entry.at) == "decoder":  # its own budget may be that of all layers together
            return Budget(tokens=max(1, round(answers.kept)))
        if entry.reducer.exact:
            return entry.reducer.keep
        return Budget(ratio=min(1.0, max(answers.kept / self.full.kept, 1e-3)))
