"""The engine: takes jobs, runs them in lanes, a step at a time, and tells what became of them.

Jobs of one recipe share a lane. A step gives the lane that worked least so far one turn: a pass of those who write, and
a piece of newcomers' prompts. So nobody waits longer than a pass and a piece of every other lane, whether it streams
or has yet to begin. What a job needs built is built in a thread meanwhile, but for methods that are handed the model.
What a job's text is depends on the job alone.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any

from tokenary.core.errors import TokenaryError
from tokenary.core.recipe import Recipe
from tokenary.hf.strategy import Strategy
from tokenary.hf.target import attached
from tokenary.models import LM
from tokenary.run import build
from tokenary.serve.engine.batch import BatchLane
from tokenary.serve.engine.building import Builder
from tokenary.serve.engine.choosing import Schemas
from tokenary.serve.engine.failures import failed
from tokenary.serve.engine.solo import SoloLane
from tokenary.serve.engine.work import Clock, EngineOptions, Lane, Work
from tokenary.serve.protocol import Event, Failed, Job

__all__ = ["Engine", "EngineOptions"]

_HANDED_THE_MODEL = ("keep", "read")  # slots whose methods may run or change it when they are built
_PATIENCE = 0.05  # seconds in which somebody without any work listens again


class Engine:
    """Runs jobs on one model. It is not safe to call from several threads at once.

    Parameters
    ----------
    lm : LM
        The model. While the engine is idle it is as it was.
    options : EngineOptions, optional
        How the machine is shared.
    clock : callable
        Seconds.
    """

    def __init__(self, lm: LM, options: EngineOptions | None = None, clock: Clock = time.perf_counter) -> None:
        self.lm, self.options, self._clock = lm, options or EngineOptions(), clock
        self._schemas, self._builder = Schemas(lm), Builder()
        self._waiting: deque[Work] = deque()
        self._lanes: dict[Recipe, Lane] = {}
        self._cancelled: set[str] = set()
        self._events: list[Event] = []
        self._attached = contextlib.ExitStack()  # holds the model's attention while there are lanes

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._waiting or self._lanes or self._events)

    def submit(self, job: Job) -> None:
        """Take a job. What is wrong with it is told by the next step.

        Raises
        ------
        ValueError
            If a job of that name is under way.
        """
        if any(work.job.id == job.id for work in self._works()):
            raise ValueError(f"a job {job.id!r} is under way")
        try:
            work = Work.of(self.lm, job, self._clock())
        except TokenaryError as error:
            self._events.append(Failed(job.id, 422, " ".join(str(error).split())))
            return
        if len(self._waiting) >= self.options.max_waiting:
            self._events.append(Failed(job.id, 429, f"{len(self._waiting)} jobs wait already"))
        else:
            self._waiting.append(work)

    def cancel(self, id: str) -> None:
        """End a job, if it has not ended: before the next pass."""
        if any(work.job.id == id for work in self._works()):
            self._cancelled.add(id)

    def step(self) -> list[Event]:
        """Give one lane a turn; return what is to be told."""
        events, self._events = self._events, []
        if not self._lanes and self.lm.kind == "causal":
            self._attached.enter_context(attached(self.lm.model))
        events += self._end()
        events += self._admit()
        if not self._lanes and self._waiting:
            self._builder.wait(_PATIENCE)
            events += self._admit()
        if self._lanes:
            recipe = min(self._lanes, key=lambda recipe: self._lanes[recipe].spent)
            events += self._turn(recipe, self._lanes[recipe])
        if not self._lanes:
            self._attached.close()
        return events

    def _works(self) -> list[Work]:
        """All jobs that have not ended, those that wait first."""
        return [*self._waiting, *(work for lane in self._lanes.values() for work in lane.works)]

    def _end(self) -> list[Event]:
        """End the jobs that were cancelled, those whose time is up, and those that waited too long."""
        now, events = self._clock(), list[Event]()
        for work in self._works():
            job, age = work.job, now - work.taken
            finish = "cancelled" if job.id in self._cancelled else "deadline" if age >= job.seconds else None
            refused = work.begun is None and job.wait is not None and age >= job.wait
            if finish is None and not refused:
                continue
            if work in self._waiting:
                self._waiting.remove(work)
            else:
                self._lanes[work.recipe].drop(work)
            if finish is None:
                events.append(Failed(job.id, 429, f"it waited {job.wait:g} s and was not begun; try again"))
            else:
                events += work.broken_off(finish, now)
        self._cancelled.clear()
        self._close()
        return events

    def _admit(self) -> list[Event]:
        """Begin jobs that find a place, in the order in which they came."""
        events: list[Event] = []
        for work in list(self._waiting):
            lane = self._lanes.get(work.recipe)
            if lane is None and len(self._lanes) >= self.options.max_lanes:
                break  # nobody overtakes it, so that a lane comes free
            if lane is not None and not lane.has_room:
                continue
            try:
                if not self._built(work):
                    continue
                lane = lane or self._lane(work.recipe)
                work.begun = self._clock()
                lane.begin(work)
                self._lanes[work.recipe] = lane
            except Exception as error:
                events.append(failed(work, error))
            self._waiting.remove(work)
        self._builder.keep({key for work in self._waiting for key in (work.recipe, work.job.schema)})
        return events

    def _built(self, work: Work) -> bool:
        """Whether what a job needs is there; if not, it is being built."""
        recipe, schema, warm = work.recipe, work.job.schema, self.lm.warm
        apart = recipe.steps and not any(step.card.slot in _HANDED_THE_MODEL for step in recipe.steps)
        if apart and recipe not in warm:
            methods = self._builder.take(recipe, lambda: build(self.lm, recipe))
            if methods is None:
                return False
            warm[recipe] = methods
        if schema is not None and schema not in self._schemas:
            matcher = self._builder.take(schema, lambda: self._schemas.compile(schema))
            if matcher is None:
                return False
            self._schemas.add(schema, matcher)
        return True

    def _lane(self, recipe: Recipe) -> Lane:
        """Make the lane of a recipe; it starts beside the one that worked least."""
        methods, options = self._methods(recipe), self.options
        owner = any(isinstance(method, Strategy) and method.owns_loop for method in methods.values())
        lane: Lane
        if owner or self.lm.kind != "causal":
            lane = SoloLane(self.lm, recipe, self._clock)
        else:
            lane = BatchLane(self.lm, methods, self._schemas, self._clock, options.max_batch, options.piece)
        lane.spent = min((other.spent for other in self._lanes.values()), default=0.0)
        return lane

    def _methods(self, recipe: Recipe) -> dict[str, Any]:
        """Build the methods of a recipe, or take those that were kept; the ones not used for longest are let go."""
        warm = self.lm.warm
        warm[recipe] = warm.pop(recipe) if recipe in warm else build(self.lm, recipe)
        for old in [old for old in warm if old not in self._lanes and old != recipe]:
            if len(warm) > self.options.max_recipes:
                del warm[old]
        return warm[recipe]

    def _turn(self, recipe: Recipe, lane: Lane) -> list[Event]:
        """Let a lane work; where that fails, its jobs fail, and it starts afresh for those to come."""
        began = self._clock()
        try:
            events = lane.step()
        except Exception as error:
            events = [failed(work, error) for work in lane.works]
            lane.works.clear()
            self.lm.warm.pop(recipe, None)
        lane.spent += self._clock() - began
        self._close()
        return events

    def _close(self) -> None:
        """Let lanes go that have nothing to do, and all that they held."""
        self._lanes = {recipe: lane for recipe, lane in self._lanes.items() if lane.works}
