"""``compare --room reduce``: what reducers of image tokens keep of a model's answers, and what they cost and save.

Every method of the room, and whatever recipes are given, answers the same questions with the small vision-language
models of the package; of two models of a size, trained from different seeds, together.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenary.bench.progress import Reporter
from tokenary.bench.record import ComparisonRecord, Start, plain_json
from tokenary.bench.reduce_arms import Answers, answer, draw, measure_costs
from tokenary.bench.reduce_figures import BATCH, Part, part_of
from tokenary.core.errors import InputError, OptionError, RecipeError
from tokenary.core.files import sha256_of
from tokenary.core.recipe import Recipe
from tokenary.core.registry import cards, method_class
from tokenary.models.bench_vlm.loading import PREFIX, available, facts_of, folder_of, load, size_of
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.scenes import FAMILIES
from tokenary.reduce.base import Reducer

if TYPE_CHECKING:
    from rich.table import Table

TOOL = "tokenary compare --room reduce"
#: Percent of the image tokens that methods keep.
BUDGETS = (50.0, 25.0, 12.5, 6.25)
PER_FAMILY, DRAWS, TRAINING = 64, 5, 200


@dataclass(frozen=True)
class ReduceComparison(ComparisonRecord):
    """The record of a comparison of reducers.

    Parameters
    ----------
    record : dict
        Plain JSON types. Keys ``schema, tool, date, minutes, complete, model, machine, versions, settings, parts,
        left_out, warnings``.
    """

    tool = TOOL

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Pictures of the model's own side and, where asked for, large ones, seen as a thumbnail and four crops.

        Keys ``name, side, views, questions`` (of each family), ``families``: of each the accuracy on everything
        (``full``) and on nothing (``blind``), the accuracy ``needed`` of a trained model, and whether it is ``fit`` to
        measure on; and ``points``, everything first and nothing last.

        Keys of a point: ``curve, recipe, control, budget`` (percent, None for a recipe that was given), ``at, seeds``;
        ``kept``, the image tokens that the last layer read, ``tokens``, the mean over layers, and ``share`` of it;
        ``flops, flops_share``; ``kv_bytes, kv_share``; ``encode_ms, prefill_ms, overhead_ms`` (the choice, part of one
        of them), ``time_share``; ``accuracy``; ``retention`` (value, low, high) over families that are fit; ``models``:
        the same figure of each model; ``over``: the retention less that of the ``control`` that is best at this
        budget; ``same_time``: the retention less what random tokens and pooling reach in the same time, by control,
        or ``why`` that is not known; ``families``: accuracy and retention of each.
        """
        return self.record["parts"]

    @property
    def warnings(self) -> list[str]:
        """What the reader should know before trusting the figures, and what was left out."""
        return [*super().warnings, *(f"not measured: {line}" for line in self.record["left_out"])]

    def table(self) -> Table:
        """Return the table for a terminal."""
        from tokenary.bench.reduce_report import table

        return table(self.record)

    def page(self) -> str:
        """Return the report as one HTML page."""
        from tokenary.bench.reduce_report import render

        return render(self.record)


def compare_reduce(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    recipes: Iterable[str | Recipe] = (),
    *,
    budgets: Sequence[float] = BUDGETS,
    prompts: int = PER_FAMILY,
    crops: bool = False,
    seed: int = 0,
    draws: int = DRAWS,
    training: int = TRAINING,
    timed: int = len(FAMILIES),
    room: str | None = "reduce",
    progress: Any = None,
) -> ReduceComparison:
    """Compare reducers of image tokens: how many are read, what is still answered, what it costs.

    Parameters
    ----------
    models : str or path, or sequence of them
        Names of small vision-language models, or folders; a size (``xs``) stands for every one of it that ships. By
        default every one of the largest size that ships.
    recipes : iterable of str or Recipe
        One method of the room each, measured as they are beside the room.
    budgets : sequence of float
        Percent of the image tokens that methods keep.
    prompts : int
        Questions of each family, one a picture.
    crops : bool
        Also large pictures, seen as a thumbnail and four crops.
    seed : int
        Of the questions and of the first random choice.
    draws : int
        Random choices that are averaged.
    training : int
        Updates of a method that is trained for a model first.
    timed : int
        Pictures that are timed, one of each family at most.
    room : str, optional
        Whose methods are compared; with None, the recipes only.
    progress : callable or rich.progress.Progress, optional
        Told of every run; a callable gets a `Step`.

    Returns
    -------
    ReduceComparison
        After Ctrl-C it holds the questions that everybody was asked by then, and ``complete`` is False.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError, InputError
        Before any work is done.
    KeyboardInterrupt
        Only if nothing was measured yet.
    """
    chosen = [reducing(recipe) for recipe in recipes]
    budgets = check(budgets, prompts, draws, training, timed)
    start = Start.now()
    nets = load_all(models)
    if len(nets) > 1:
        _check_several(chosen)
    folders = {name: folder for name, (folder, _) in nets.items()}
    loaded = {name: net for name, (_, net) in nets.items()}
    first = next(iter(loaded.values()))
    with tempfile.TemporaryDirectory() as place:
        trained = _trained(loaded, room, Path(place), seed, training, progress)
        parts, left_out = list[Part](), list[str]()
        for name in ("pictures", "crops") if crops else ("pictures",):
            part, lines = Part.of(name, loaded, chosen, budgets, room, draws, seed, timed, trained)
            parts.append(part)
            left_out += lines
    complete, reporter = True, Reporter(progress, sum(part.steps(prompts) for part in parts))
    try:
        for part in parts:
            _measure(part, loaded, prompts, seed, reporter)
    except KeyboardInterrupt:
        complete = False
    asked = [part for part in parts if part.asked]
    if not asked:
        raise KeyboardInterrupt
    gates = {name: _gates(folder) for name, folder in folders.items()}
    return ReduceComparison(
        plain_json(
            {
                **start.head(TOOL, complete, _about(folders, first)),
                "settings": {
                    "recipes": [str(recipe) for recipe in chosen],
                    "models": list(loaded),
                    "budgets": budgets,
                    "prompts": prompts,
                    "crops": crops,
                    "seed": seed,
                    "draws": draws,
                    "training": training,
                    "timed": timed,
                },
                "parts": [part_of(part, first, gates) for part in asked],
                "left_out": list(dict.fromkeys(left_out)),
                "warnings": [*_warnings(asked, len(parts), prompts, complete, gates), *start.warnings()],
            }
        )
    )


# ------------------------------------------------------------------------------------------- before any work


def reducing(recipe: str | Recipe) -> Recipe:
    """Return a recipe that is one method of the room.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError
        It is none, or an option is wrong.
    """
    parsed = Recipe.parse(recipe)
    known = {card.slug for card in cards(room="reduce")}
    if len(parsed.steps) != 1 or parsed.steps[0].slug not in known:
        raise RecipeError(f"{parsed} is no method of the room reduce, which is what this compares")
    parsed.build()
    return parsed


def check(budgets: Sequence[float], prompts: int, draws: int, training: int, timed: int) -> tuple[float, ...]:
    """Refuse wrong settings before anything is loaded; return the budgets, the largest first."""
    for name, value in (("prompts", prompts), ("draws", draws), ("training", training), ("timed", timed)):
        if value < 1:
            raise OptionError(name, value, "an integer at least 1")
    for budget in budgets:
        if not 0 < budget <= 100:
            raise OptionError("budgets", budget, "percent above 0 and at most 100")
    return tuple(sorted(set(budgets), reverse=True))


def _check_several(recipes: Sequence[Recipe]) -> None:
    """Refuse what was trained for one model where there are several."""
    for recipe in recipes:
        step = recipe.steps[0]
        if step.card.training != "none" and any(Path(value).is_file() for _, value in step.options):
            raise RecipeError(f"{recipe} was trained for one model, and here are several: name one with --model")


def load_all(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> dict[str, tuple[Path, BenchVLM]]:
    """Load models of one size, with the folders that they lie in.

    Raises
    ------
    UnknownNameError, InputError
        There are no such models, or they are of different sizes.
    """
    given = [models] if isinstance(models, (str, os.PathLike)) else list(models)
    names = [one for name in given for one in _of_size(str(name))] if given else _of_size(size_of(available()[0]))
    found: dict[str, tuple[Path, BenchVLM]] = {}
    for name in dict.fromkeys(names):
        folder = folder_of(name)
        short = folder.name.removeprefix(PREFIX)
        short = short if short not in found else str(name)
        found[short] = folder, load(name).requires_grad_(False)
    sizes = {net.config for _, net in found.values()}
    if len(sizes) > 1:
        raise InputError(f"{', '.join(found)}: models of different sizes see different pictures; compare them apart")
    return found


def _of_size(name: str) -> list[str]:
    """Every model that ships of a size; the name itself where it is none."""
    return [each for each in available() if size_of(each) == name] or [name]


def _about(folders: Mapping[str, Path], net: BenchVLM) -> dict[str, Any]:
    """Which models a record was made with."""
    shipped = set(folders) <= set(available())
    return {
        "name": ", ".join(folders),
        "fingerprint": " ".join(sha256_of(folder / "model.safetensors") for folder in folders.values()),
        "source": "ships with tokenary" if shipped else ", ".join(map(str, folders.values())),
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
    }


def _gates(folder: Path) -> dict[str, dict[str, Any]]:
    """What was said of each family when the model's training ended; empty where it has not."""
    return facts_of(folder).get("gates", {})


# -------------------------------------------------------------------------------------------------- measuring


def _trained(
    nets: Mapping[str, BenchVLM], room: str | None, place: Path, seed: int, steps: int, progress: Any
) -> dict[str, dict[str, dict[str, str]]]:
    """Train what has to be trained for each model; return the options that say where it lies, by model and method."""
    methods = {card.slug: method_class(card.slug) for card in cards(room=room)} if room else {}
    kinds = {slug: cast(type[Reducer], kind) for slug, kind in methods.items() if getattr(kind, "learns", "")}
    reporter, found = Reporter(progress, steps * len(kinds) * len(nets)), dict[str, dict[str, dict[str, str]]]()
    for model, net in nets.items():
        found[model] = {}
        for slug, kind in kinds.items():
            file = place / f"{len(found)}-{slug}.safetensors"

            def told(step: int, of: str = f"{slug} for {model}") -> None:
                if step:
                    reporter.finish()
                reporter.start("training", of)

            kind.learn(net, file, steps=steps, seed=seed, told=told)
            reporter.finish()
            found[model][slug] = {kind.learns: str(file)}
    return found


def _measure(part: Part, nets: Mapping[str, BenchVLM], prompts: int, seed: int, reporter: Reporter) -> None:
    """Time every contender, then ask all of them batch after batch; a batch counts once everybody answered it."""
    net, names = next(iter(nets.values())), [each.recipe for each in part.compared]
    costs = iter(measure_costs(net, part.compared, part.examples))
    for number in range(len(part.examples)):
        for name in names:
            reporter.start(f"{part.name}, timing {number + 1} of {len(part.examples)}", name)
            part.costs = dict(next(costs))
            reporter.finish()
    size = BATCH[part.name]
    for start in range(0, prompts, size):
        numbers = range(start, min(start + size, prompts))
        asked = draw(net.config, numbers, seed, part.name == "crops")
        batch: dict[tuple[str, str], Answers] = {}
        for model, each in nets.items():
            said = iter(answer(each, part.contenders[model], asked))
            for name in names:
                reporter.start(f"{part.name}, {model}, question {numbers[0] + 1} of {prompts}", name)
                batch[model, name] = next(said)[1]
                reporter.finish()
        part.batches.append(batch)


def _warnings(
    parts: Sequence[Part],
    wanted: int,
    prompts: int,
    complete: bool,
    gates: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """What the reader should know before trusting the figures."""
    found = []
    if not complete:
        found.append("the run was interrupted: figures are over the questions that everybody was asked by then")
    if len(parts) < wanted:
        found.append("no question about crops was asked")
    unfinished = [name for name, known in gates.items() if not known]
    if unfinished:
        found.append(
            f"{', '.join(unfinished)}: the training has not ended; which families are fit to measure on is judged by"
            " these questions"
        )
    if min(part.asked for part in parts) < 32:
        found.append(f"{min(part.asked for part in parts)} questions of a family: intervals are wide")
    if len(gates) < 2:
        found.append("one model: whether another one, trained from another seed, ranks reducers alike is not known")
    else:
        found.append("intervals are those of the questions; how far the models differ is in their own figures")
    return found
