"""Token reduction beyond efficiency (arXiv 2505.18227): what a reducer does to a model, as a vector of figures.

The paper argues that fewer tokens can align modalities, curb hallucination and over-thinking, keep long inputs coherent
and steady training. Each is a figure here, always as the difference to random dropping at the same budget on the same
items, with an interval; there is no composite score. Modules of this folder hold the figures as pure functions:

    effects        paired differences, bootstrap and jackknife intervals, rank correlation
    grounding      attention on the asked patches, through the token map
    maps           coverage, locality, redundancy, conservation of mass
    alignment      mutual neighbours, linear CKA, retrieval, with states pooled by size
    hallucination  false yes by kind of negative, also at equal recall; false names with recall; language prior
    overthinking   answers on the way and at the end of a chain of thought, per token of it
    coherence      repetition, contradictions, positions
    stability      spikes, variation, largest stable rate, effective rank, sinks

The probe itself asks a language model for facts stated in real prose, while part of its context is dropped. Reducers of
image tokens are measured by ``tokenary vlm card``, over the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.models.lm import LM
from tokenary.probe.base import Probe, Progress, Report, Table
from tokenary.probe.token_reduction_position.effects import effect, estimate, figures
from tokenary.probe.token_reduction_position.passages import DEPTHS, SCORED, Fact, Passage, Writer
from tokenary.probe.token_reduction_position.text import TextArm, Way, at_random, nothing, run_ways, strided

CARD = Card(
    slug="token-reduction-position",
    cls="TokenReductionPosition",
    room="probe",
    title="Token Reduction Should Go Beyond Efficiency in Generative Models",
    summary="measures what dropping context does to facts, coherence, repetition and positions",
    slot="probe",
    paper="2505.18227",
    year=2025,
)


class TokenReductionPosition(Probe):
    """Drops a part of a context in front of a language model, and measures what is left of coherence.

    Parameters
    ----------
    keep : float
        Share of the context's tokens that stays.
    length : int
        Tokens of the longest context; there are others of a half and a quarter of it.
    facts : int
        Facts at each length and each of three depths.
    passages : int
        Passages of each length, of which the last 64 tokens are scored and 32 more are written.
    seeds : int
        Random choices that are averaged.
    resamples : int
        Of the bootstrap.
    """

    toy_options: ClassVar[dict[str, Any]] = {"length": 240, "facts": 1, "passages": 1, "seeds": 2, "resamples": 50}

    def __init__(
        self,
        keep: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        length: Annotated[int, Field(ge=240)] = 512,
        facts: Annotated[int, Field(ge=1, le=500)] = 4,
        passages: Annotated[int, Field(ge=1, le=500)] = 3,
        seeds: Annotated[int, Field(ge=1, le=50)] = 3,
        resamples: Annotated[int, Field(ge=20, le=100_000)] = 2000,
    ) -> None:
        self.keep, self.length, self.facts, self.passages = keep, length, facts, passages
        self.seeds, self.resamples = seeds, resamples

    def run(self, lm: LM, seed: int = 0, progress: Progress | None = None) -> Report:
        """Read everything in every way.

        Raises
        ------
        UnsupportedModelError
            The model is not causal, has no tokenizer, or its tokens do not tell the values apart.
        OptionError
            The model has no positions for so long a context.
        """
        writer = Writer(lm, seed)
        if self.length + 2 * SCORED > lm.context_length:
            raise OptionError("length", self.length, f"at most {lm.context_length - 2 * SCORED} for {lm.name}")
        lengths = [self.length // 4, self.length // 2, self.length]
        facts, passages = writer.facts(lengths, self.facts), writer.passages(lengths, self.passages)
        ways = self.ways(seed)
        done, total = 0, sum(map(len, ways.values())) * (len(facts) + len(passages))
        arms: dict[str, TextArm] = {}
        for name, same in ways.items():
            for step in run_ways(lm.model, same, facts, passages, SCORED // 2):
                if step is not None:
                    arms[name] = step
                    continue
                done += 1
                if progress is not None:
                    progress(done, total)
        found = self.figures(arms, facts, passages, seed)
        return Report("token-reduction-position", lm.name, found, tables(found), notes(found))

    def ways(self, seed: int) -> dict[str, list[Way]]:
        """Return the arms: everything, random tokens, even distances counted anew or as they were, and nothing."""
        return {
            "none": [Way()],
            "random": [Way(at_random(self.keep, seed + i)) for i in range(self.seeds)],
            "strided": [Way(strided(self.keep))],
            "strided, original positions": [Way(strided(self.keep), compact=False)],
            "blind": [Way(nothing)],
        }

    def figures(
        self, arms: dict[str, TextArm], facts: Sequence[Fact], passages: Sequence[Passage], seed: int
    ) -> dict[str, Any]:
        """Return every arm's figures, their differences to random, and maps by length and depth."""
        some: dict[str, Any] = {"resamples": self.resamples, "seed": seed}
        parts = {name: arm.parts(facts) for name, arm in arms.items()}
        made: dict[str, Any] = {"keep": self.keep, "facts": len(facts), "passages": len(passages), "arms": {}}
        for name, arm in arms.items():
            made["arms"][name] = {
                "figures": figures({key: estimate(each, **some) for key, each in parts[name].items()}),
                "over_random": None
                if name == "random"
                else figures({key: effect(each, parts["random"][key], **some) for key, each in parts[name].items()}),
                "facts_by_length_and_depth": _map(arm, facts),
                "tail_nll_by_length": {
                    str(length): _mean(arm.nll[:, [p.length == length for p in passages]])
                    for length in dict.fromkeys(passage.length for passage in passages)
                },
            }
        made["original_over_compact"] = figures(
            {
                key: effect(parts["strided, original positions"][key], each, **some)
                for key, each in parts["strided"].items()
            }
        )
        return made


def _map(arm: TextArm, facts: Sequence[Fact]) -> dict[str, dict[str, float]]:
    right = arm.chosen == np.array([fact.stated for fact in facts])
    return {
        str(length): {
            str(depth): _mean(right[:, [f.length == length and f.depth == depth for f in facts]]) for depth in DEPTHS
        }
        for length in dict.fromkeys(fact.length for fact in facts)
    }


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)


def tables(found: dict[str, Any]) -> list[Table]:
    """Return the arms, and where facts are found."""
    keys = list(found["arms"]["none"]["figures"])
    rows = [[name, *(arm["figures"][key]["value"] for key in keys)] for name, arm in found["arms"].items()]
    lengths = list(found["arms"]["none"]["facts_by_length_and_depth"])
    heads = [f"{length} @ {depth}" for length in lengths for depth in DEPTHS]
    maps = [
        [name, *(arm["facts_by_length_and_depth"][length][str(depth)] for length in lengths for depth in DEPTHS)]
        for name, arm in found["arms"].items()
    ]
    return [
        Table("Coherence", ["arm", *(key.replace("_", " ") for key in keys)], rows),
        Table("Facts told right, by tokens of the context and depth", ["arm", *heads], maps),
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """Say what the figures cannot."""
    full, blind = (found["arms"][name]["figures"]["facts_right"] for name in ("none", "blind"))
    said = ["figures of dropping in front of the model; of what reducers do between layers, see tokenary vlm card"]
    if full["value"] <= (blind["high"] if blind["high"] is not None else 1.0):
        said.append("facts are told no better from all of the context than from none: what is kept of them says little")
    return said
