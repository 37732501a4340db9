"""AWRS: a constraint is asked about a handful of tokens instead of the whole vocabulary; weights stay unbiased."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.decode.awrs import AWRS, Choice, Tester
from tokenary.decode.awrs.sampler import awrs
from tokenary.decode.base import Loop
from tokenary.hf.strategy import Task
from tokenary.hf.target import attached
from tokenary.run import load

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "born": {"type": "integer", "minimum": 1000, "maximum": 2025},
            "field": {"enum": ["physics", "mathematics", "music", "painting", "literature"]},
        },
        "required": ["name", "born", "field"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    }
)
DATE = r"\d{4}-\d{2}-\d{2}: [A-Z][a-z ]{10,60}\."
PEOPLE = (
    *("Isaac Newton", "Marie Curie", "Johann Sebastian Bach", "Ada Lovelace"),
    *("Claude Monet", "Leonhard Euler", "Jane Austen", "Niels Bohr"),
)
QUESTIONS = {
    "json": "Describe {} as a JSON object with the keys name, born (a year) and field.",
    "regex": "Give one date in the life of {} as YYYY-MM-DD, a colon, and a short sentence that says what happened.",
    "no e": "Tell me in one sentence who {} was.",
}


@dataclass(frozen=True)
class Context:
    """One draw: tests it took, plainly and with a weight, and what it takes to check it."""

    plain: int
    weighted: int
    log_mass: float
    probabilities: np.ndarray
    allowed: np.ndarray


def without_e(text: str) -> bool:
    """Whether there is no letter e."""
    return "e" not in text.lower()


class Recorder(Choice):
    """Chooses as AWRS does, and notes every draw together with the full mask."""

    def __init__(self, method: AWRS, task: Task) -> None:
        super().__init__(method, task)
        self.contexts: list[Context] = []

    def _choose(self, scores: np.ndarray, row: int, history: Sequence[int]) -> int:
        token = super()._choose(scores, row, history)
        assert self._counts is not None
        accepts = Tester(self._matchers[row], self._ends)
        allowed = np.array([accepts(t) for t in range(len(scores))])
        accepts.checks = 0
        awrs(scores, accepts, substream(self._sampler.seed, "awrs claim", row, len(history)))
        mass = float(scores[allowed].sum() / scores.sum())
        self.contexts.append(
            Context(self._counts.per_token[-1], accepts.checks, math.log(mass), scores.astype(np.float32), allowed)
        )
        return token


def exactness(context: Context, draws: int, stream: np.random.Generator) -> tuple[float, float, np.ndarray]:
    """Compare many draws in one context with the exhaustive mask.

    Returns
    -------
    float
        The largest z-score of the mean weight against Z, and of E[w 1{x}] against p(x), of the tokens that a draw in
        20 takes at least and of all others together.
    float
        Total variation of the tokens from the masked distribution.
    ndarray
        (20,), the same of as many draws from that distribution itself.
    """
    p, allowed = context.probabilities.astype(np.float64), context.allowed
    p /= p.sum()
    drawn = [awrs(p, lambda token: bool(allowed[token]), stream) for _ in range(draws)]
    tokens = np.array([draw.token for draw in drawn])
    weights = np.exp([draw.log_weight for draw in drawn])
    masked = np.where(allowed, p, 0) / p[allowed].sum()
    bins = np.where(masked >= 1 / 20, np.arange(len(p)), len(p))
    worst = z_score(weights, p[allowed].sum())
    for part in np.unique(bins):
        worst = max(worst, z_score(weights * (bins[tokens] == part), p[allowed & (bins == part)].sum()))
    counts = np.stack([np.bincount(tokens, minlength=len(p)), *stream.multinomial(draws, masked, 20)])
    distances = abs(counts / draws - masked).sum(1) / 2
    return worst, float(distances[0]), distances[1:]


def z_score(values: np.ndarray, expected: float) -> float:
    """Return how many standard errors the mean of draws in [0, 1] is away from what is expected.

    Draws that are all alike have not seen what is rarer than one in their number; their error is 1 / n.
    """
    gap = abs(float(values.mean()) - expected)
    return gap / (standard_error(values) if values.std() > 1e-9 * values.mean() else 1 / len(values))


def run(
    seed: int = 0,
    people: int = 8,
    new_tokens: int = 48,
    constraints: tuple[str, ...] = ("json", "regex"),
    checked: int = 20,
    draws: int = 4000,
) -> Outcome:
    """Count constraint evaluations a token, weights included, on real prompts at temperature 1, in float32.

    Draws that are not exact count as full masking, and the claim is then not shown: a z-score of 4.5 or more of the
    weights in any of the checked contexts, or of the distance of the tokens from the masked distribution, over that of
    independent draws from it.

    Parameters
    ----------
    seed : int
        Of every draw.
    people : int
        Prompts for each constraint.
    new_tokens : int
        Most tokens of an answer.
    constraints : tuple of str
        Of ``json`` (schema), ``regex`` and ``no e`` (a Python predicate).
    checked, draws : int
        Contexts in which `draws` draws are compared with the exhaustive mask.
    """
    lm = load("smollm2", dtype="float32")
    makes = {"json": {"json": SCHEMA}, "regex": {"regex": DATE}, "no e": {"predicate": without_e}}
    found: dict[str, list[Context]] = {}
    for name in constraints:
        method = AWRS(**makes[name])  # type: ignore[arg-type]
        method.prepare(lm.model, lm.tokenizer)
        prompts = lm.encode([QUESTIONS[name].format(person) for person in PEOPLE[:people]])
        task = Task(lm.model, lm.tokenizer, prompts, Sampler(1.0, seed=seed), new_tokens, lm.eos_token_ids)
        recorder = Recorder(method, task)
        with attached(lm.model):
            for _ in Loop(task.target(), prompts, recorder, new_tokens, task.end_tokens):
                pass
        found[name] = recorder.contexts
    contexts = [context for part in found.values() for context in part]
    stream = substream(seed, "awrs exactness")
    picked = stream.choice(len(contexts), min(checked, len(contexts)), replace=False)
    exact = [exactness(contexts[i], draws, stream) for i in picked.tolist()]
    worst = max(result[0] for result in exact)
    floors = np.sum([result[2] for result in exact], axis=0)
    further = (sum(result[1] for result in exact) - floors.mean()) / max(float(floors.std(ddof=1)), 1e-9)
    tests = np.array([context.weighted for context in contexts], float)
    naive = np.array([float(stream.geometric(math.exp(context.log_mass))) for context in contexts])
    vocabulary = float(lm.vocab_size)
    method_figure = Figure.of("awrs", tests)
    if max(worst, further) >= 4.5:
        method_figure = Figure("awrs, not exact", vocabulary)
    surprise = np.array([-context.log_mass for context in contexts])
    return Outcome(
        method=method_figure,
        baseline=Figure("full masking", vocabulary),
        controls=(Figure("none", 0.0), Figure.of("random", naive)),
        n=len(contexts),
        runs=1,
        details={
            "mean": float(tests.mean()),
            "median": float(np.median(tests)),
            "without weights": float(np.mean([context.plain for context in contexts])),
            "by constraint": {
                name: {
                    "contexts": len(part),
                    "mean": float(np.mean([context.weighted for context in part])),
                    "median": float(np.median([context.weighted for context in part])),
                    "kl": float(np.mean([-context.log_mass for context in part])),
                }
                for name, part in found.items()
            },
            "rank correlation of tests and kl": float(np.corrcoef(ranks(tests), ranks(surprise))[0, 1]),
            "exactness": {
                "largest z of the weights": float(worst),
                "z of the distance": float(further),
                "contexts": len(exact),
                "draws": draws,
            },
        },
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


CLAIM = Claim(
    slug="awrs",
    statement="AWRS draws tokens under a JSON schema or a regular expression, with an unbiased weight, after at least "
    "100 times fewer constraint evaluations than masking the 49,152 tokens of the vocabulary",
    metric="constraint evaluations a token, mean",
    direction="lower",
    threshold=100.0,
    run=run,
    variation="a Python predicate that the model dislikes: no letter e",
    held_out={"constraints": ("no e",)},
    minutes=5,
    fast={"people": 2, "new_tokens": 10, "checked": 3, "draws": 400},
)
