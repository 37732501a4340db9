"""The lane of methods with a loop of their own, and of models that fill masks: one job at a time."""

from __future__ import annotations

from tokenary.core.errors import InputError
from tokenary.core.recipe import Recipe
from tokenary.models import LM
from tokenary.run import Generation
from tokenary.serve.engine.work import Clock, Work
from tokenary.serve.protocol import Event


class SoloLane:
    """Jobs of one recipe, one at a time: methods with a loop of their own, and models that fill masks.

    An answer is told as far as everything before it is there: of several branches the chosen one, in the end.

    Parameters
    ----------
    lm : LM
        The model.
    recipe : Recipe
        The recipe.
    clock : callable
        Seconds.
    """

    def __init__(self, lm: LM, recipe: Recipe, clock: Clock) -> None:
        self._lm, self._recipe, self._clock = lm, recipe, clock
        self.works: list[Work] = []
        self.spent = 0.0
        self._generation: Generation | None = None

    @property
    def has_room(self) -> bool:
        """Whether no job is under way."""
        return not self.works

    def begin(self, work: Work) -> None:
        """Begin a job.

        Raises
        ------
        TokenaryError
            If the recipe, or its loop, does not do what the job asks.
        """
        job = work.job
        if job.schema is not None or job.logprobs is not None:
            asked = "keeps no schema" if job.schema is not None else "tells no log-probabilities"
            raise InputError(f"{self._recipe} on this model writes with a loop of its own, which {asked}")
        self._generation = Generation(
            self._lm, [job.prompt], self._recipe, job.max_new_tokens, work.sampler, stop=list(filter(None, job.stop))
        )
        self._passes = self._generation.passes()
        self._drafted: dict[int, bool] = {}  # by place, whether the token came from a draft
        self.works.append(work)

    def step(self) -> list[Event]:
        """Run a pass."""
        work, generation = self.works[0], self._generation
        assert generation is not None
        pieces = next(self._passes, None)
        for piece in [piece for piece in pieces or () if piece.branch is None]:
            places = range(len(self._drafted), len(self._drafted) + len(piece.token_ids))
            self._drafted.update(zip(piece.at or places, piece.from_draft, strict=True))
        sequence = generation.sequences[0]
        work.trace, work.kv_bytes = sequence.trace, generation.peak_bytes
        ended = pieces is None or sequence.finish is not None
        ids, known = sequence.new_ids, work.new_tokens
        mask = getattr(self._lm.model.config, "mask_token_id", None)
        settled = ids[known : ids.index(mask) if mask in ids else None]
        for token in settled:
            work.text.add(token)
        events, now = list[Event](), self._clock()
        if settled or ended:
            drafted = [self._drafted.get(known + at, False) for at in range(len(settled))]
            events.append(work.progress(settled, drafted, ended, now))
        if ended:
            events.append(work.done(sequence.finish or "cancelled", now))
            self.drop(work)
        return events

    def drop(self, work: Work) -> None:
        """Forget a job that ended from outside."""
        self.works.remove(work)
        self._passes.close()
        self._generation = None
