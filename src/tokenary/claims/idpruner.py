"""IDPruner: important tokens that are no copies are worth more than the most important, or the most diverse ones."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenary.claims import formula_reading, scene_reading
from tokenary.claims.retention import KEEPS, Answers, Key, controls, outcome
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Outcome
from tokenary.core.seeding import substream
from tokenary.core.token_map import Select
from tokenary.models import bench_vlm
from tokenary.models.latex_ocr import LatexOcr, load
from tokenary.models.latex_ocr.model import BOS, EOS, PAD
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.choose import top
from tokenary.reduce.idpruner import (
    IDPruner,
    Scorer,
    learn_scorer,
    marginal_relevance,
    save_scorer,
    scaled,
    trade_off,
    train_scorer,
)
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_random import ReduceRandom

TAUGHT = 98  # seed of the pictures that the scorer is trained on; none of them is measured
SCENES = 16  # an update
ENDS = ("importance alone", "diversity alone")
WEIGHTS = (0.3, 0.7)  # beside the default
CURVE = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
History = tuple[tuple[float, float], ...]


@functools.cache
def taught(count: int, steps: int, batch: int = 4, lr: float = 1e-3) -> tuple[Scorer, History]:
    """Train a scorer on formulas as the network itself spells them from all tokens; with its losses by step."""
    model, shown = load(), formula_reading.pages(count, TAUGHT)
    with torch.no_grad():
        memory = torch.cat([model.encoder(part) for part in shown.pixels.split(8)])
        spelled = [ids for part in memory.split(8) for ids in model.generate(part, max_new_tokens=96)]
    finished = [i for i, ids in enumerate(spelled) if len(ids) < 96]
    drawn = [substream(TAUGHT, "batch", step).choice(finished, batch, replace=False).tolist() for step in range(steps)]

    def loss_of(step: int, weighed: Tensor) -> Tensor:
        return loss(model, [spelled[i] for i in drawn[step]], weighed)

    scorer = Scorer(memory.shape[-1])
    history = train_scorer(scorer, [memory[rows] for rows in drawn], loss_of, lr=lr)
    return scorer, tuple(history)


def loss(model: LatexOcr, spelled: list[list[int]], memory: Tensor) -> Tensor:
    """Return the cross-entropy of spellings, given what the decoder reads (B, N, D)."""
    longest = max(map(len, spelled))
    ids = torch.tensor([[BOS, *each] + [PAD] * (longest - len(each)) for each in spelled])
    ahead = torch.tensor([[*each, EOS] + [PAD] * (longest - len(each)) for each in spelled])
    return F.cross_entropy(model(ids, memory).flatten(0, 1), ahead.flatten(), ignore_index=PAD)


@functools.cache
def taught_scenes(name: str, steps: int) -> tuple[Scorer, History]:
    """Train a scorer on scenes of the split that the model itself was trained on; with its losses by step."""
    scorer, history = learn_scorer(bench_vlm.load(name).requires_grad_(False), steps=steps, scenes=SCENES, seed=TAUGHT)
    return scorer, tuple(history)


def rivals(keep: float, file: Path, random_seeds: int, seed: int, more: bool) -> dict[str, list[Reducer]]:
    """Return the arms at one share kept."""
    budget = Budget(ratio=keep)
    some: dict[str, Any] = {"keep": budget, "scorer": str(file)}
    arms: dict[str, list[Reducer]] = {
        "idpruner": [IDPruner(**some)],
        "importance alone": [IDPruner(**some, weight=1.0)],
        "diversity alone": [IDPruner(**some, weight=0.0)],
        **controls(budget, random_seeds, seed, "original"),
    }
    if more:
        arms |= {f"idpruner, weight {weight}": [IDPruner(**some, weight=weight)] for weight in WEIGHTS}
        arms["idpruner, attention instead of the scorer"] = [IDPruner(budget)]
    return arms


class Pareto:
    """Gathers what choices hold of importance, and how well they cover all tokens, at one share kept."""

    def __init__(self, scorer: Scorer, keep: float = 0.25) -> None:
        self.scorer, self.keep = scorer, keep
        self.found: dict[str, list[Tensor]] = {}

    def __call__(self, memory: Tensor, context: Context, numbers: slice) -> None:
        """Take a batch of pictures."""
        raw, count = self.scorer(memory), int(self.keep * memory.shape[1])
        importance = scaled(raw, torch.ones_like(raw, dtype=torch.bool))
        unit = F.normalize(memory, dim=-1)
        crowd = (unit @ unit.mean(1)[..., None])[..., 0]  # mean cosine of each with all
        choices: dict[str, Select] = {"random": _select(ReduceRandom, count, memory, context)}
        choices["grid"] = _select(ReduceGrid, count, memory, context)
        for weight in CURVE:
            choices[f"idpruner {weight}"] = marginal_relevance(raw, memory, count, weight)
            choices[f"weighed top {weight}"] = top(weight * importance - (1 - weight) * crowd, count)
        for name, chosen in choices.items():
            self.found.setdefault(name, []).append(torch.stack(trade_off(chosen, raw, memory), dim=1))

    def points(self) -> dict[str, tuple[float, float]]:
        """Return importance held and cover of all tokens by choice, means over pictures."""
        means = {name: torch.cat(column).mean(0).tolist() for name, column in self.found.items()}
        return {name: (round(held, 4), round(cover, 4)) for name, (held, cover) in means.items()}

    def dominated(self) -> list[str]:
        """Return the points of IDPruner that some weighed top beats in both."""
        points = self.points()
        plain = [point for name, point in points.items() if name.startswith("weighed")]
        return [
            name
            for name, (held, cover) in points.items()
            if name.startswith("idpruner") and any(a > held and b > cover for a, b in plain)
        ]


def _select(kind: type[Reducer], count: int, memory: Tensor, context: Context) -> Select:
    chosen = kind(Budget(tokens=count)).plan(memory, count, context)
    assert isinstance(chosen, Select)
    return chosen


def refuted(answers: Answers, end: str, names: list[str]) -> bool:
    """Whether every weight is below the better end, beyond the interval."""
    return all(answers.retained(name, minus=end).high < 0 for name in names)


# ------------------------------------------------------------------------------------------------------- beds


def on_formulas(
    scorer: Scorer, count: int, seed: int, dpi: float, keeps: Sequence[float], random_seeds: int, more: bool
) -> tuple[Answers, dict[str, Any], Pareto]:
    """Read formulas with a pretrained network of 1,024 tokens."""
    model, shown, pareto = load(), formula_reading.pages(count, seed, dpi), Pareto(scorer)
    with saved(scorer) as file:
        arms = {
            (name, keep): reducers
            for keep in keeps
            for name, reducers in rivals(keep, file, random_seeds, seed, more).items()
        }
    return formula_reading.read(model, shown, arms, pareto if more else None), {}, pareto


def on_scenes(
    scorer: Scorer,
    name: str,
    families: Sequence[str],
    count: int,
    seed: int,
    keeps: Sequence[float],
    random_seeds: int,
    more: bool,
) -> tuple[Answers, dict[str, Any], Pareto]:
    """Answer questions about scenes with a small model of our own."""
    (model, fit), pareto = scene_reading.opened(name, families), Pareto(scorer)
    arms: dict[Key, scene_reading.Arm] = {}
    with saved(scorer) as file:
        for keep in keeps:
            here = rivals(keep, file, random_seeds, seed, more)
            here["low resolution"] = [scene_reading.low_res(model, keep)]
            arms |= {(arm, keep): (reducers, "encoder") for arm, reducers in here.items()}
    held_out = scene_reading.asked(model, fit, count, seed)
    readings = scene_reading.read(model, held_out, arms, look=pareto if more else None)
    return readings, {"model": scene_reading.about(name), "left_out": readings.left_out}, pareto


@contextlib.contextmanager
def saved(scorer: Scorer) -> Iterator[Path]:
    """Write a scorer to a file that lasts as long as the block."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scorer.safetensors"
        save_scorer(scorer, file)
        yield file


def run(
    seed: int = 0,
    bed: Literal["scenes", "formulas"] = "scenes",
    model: str = "xs-0",
    families: Sequence[str] = (),
    count: int = 128,
    dpi: float = 200.0,
    random_seeds: int = 5,
    more: bool = True,
    also: Sequence[float] = (0.0625,),
    taught_on: int = 64,
    steps: int = 300,
) -> Outcome:
    """Measure what is read when a decoder or a language model sees fewer of an encoder's tokens.

    Parameters
    ----------
    seed : int
        Of the pictures and of random choices.
    bed : {"scenes", "formulas"}
        A bench VLM that answers questions, or a pretrained network that reads formulas.
    model : str
        The bench VLM.
    families : sequence of str
        Ask it these; by default those whose gate it has passed.
    count : int
        Formulas, or questions of each family.
    dpi : float
        Size of the type that formulas are set in.
    random_seeds : int
        Random choices that are averaged.
    more : bool
        Also other weights, importance from attention, and the points of the trade-off.
    also : sequence of float
        Further shares kept, for the details.
    taught_on : int
        Formulas that the scorer is trained on; scenes are others at every update.
    steps : int
        Updates of the scorer.
    """
    keeps = (*KEEPS, *also)
    if bed == "formulas":
        scorer, history = taught(taught_on, steps)
        answers, found, pareto = on_formulas(scorer, count, seed, dpi, keeps, random_seeds, more)
    else:
        scorer, history = taught_scenes(model, steps)
        answers, found, pareto = on_scenes(scorer, model, families, count, seed, keeps, random_seeds, more)
    end = max(ENDS, key=lambda name: answers.retained(name).value)
    names = ["idpruner", *(f"idpruner, weight {weight}" for weight in WEIGHTS if more)]
    last = history[-max(1, len(history) // 10) :]
    found["every_weight_below_the_better_end"] = refuted(answers, end, names)
    found["scorer"] = {
        "pictures": taught_on if bed == "formulas" else SCENES * steps,
        "updates": steps,
        "first_loss": [round(v, 4) for v in history[0]],
        "last_loss": [round(sum(column) / len(last), 4) for column in zip(*last, strict=True)],
    }
    if more:
        found["trade_off_at_25%"] = {"points": pareto.points(), "dominated": pareto.dominated()}
    return outcome(answers, "idpruner", ENDS, random_seeds, found, ("grid", "pooling"))


CLAIM = Claim(
    slug="idpruner",
    statement="With 50, 25 and 12.5% of the encoder's tokens, on average, at least 0.01 more of what the picture adds "
    "is retained with IDPruner (weight 0.5, a scorer trained for the model) than with the better of importance and "
    "diversity alone",
    metric="share retained of what the picture adds to right answers, the mean over families of questions",
    direction="higher",
    threshold=0.01,
    effect="difference",
    run=run,
    variation="a pretrained reader of formulas with 1,024 tokens; what the picture adds to one minus the edit distance "
    "of symbols",
    held_out={
        "bed": "formulas",
        "dpi": 250.0,
        "random_seeds": 2,
        "count": 32,
        "more": False,
        "also": (),
        "steps": 120,
    },
    model="bench-vlm-xs-0",
    minutes=9,
    fast={"count": 8, "random_seeds": 1, "more": False, "also": (), "steps": 4},
)
