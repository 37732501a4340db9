"""Reducers on questions about pictures: which take part at which budgets, what they answer, and what they cost."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenary.bench.memory_curves import budget_option
from tokenary.bench.quality import PLAIN
from tokenary.bench.reduction import Times, kv_bytes, measure_times, vlm_flops
from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import TokenaryError
from tokenary.core.recipe import Recipe, Step
from tokenary.core.registry import cards, method_class
from tokenary.core.token_map import TokenMap
from tokenary.models.bench_vlm.batches import EVALUATION_SEED, Questions, collate
from tokenary.models.bench_vlm.model import BenchVLM, VLMConfig
from tokenary.models.bench_vlm.scenes import FAMILIES, render
from tokenary.models.bench_vlm.training import exact_match
from tokenary.models.bench_vlm.vocabulary import PAD, VOCABULARY
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.layout import Seen
from tokenary.reduce.vlm import ReducedVLM

BLIND = "blind"


@dataclass(frozen=True)
class Contender:
    """One way of reducing.

    Parameters
    ----------
    curve : str
        The method, or the recipe, that it is a point of.
    recipe : str
        Canonical text, without the seed.
    reducers : tuple of Reducer or None
        One, or one a seed; None reads everything.
    control : bool
        Whether it is a baseline that others are measured against.
    budget : float, optional
        Percent of the image tokens that it was told to keep.
    """

    curve: str
    recipe: str
    reducers: tuple[Reducer | None, ...] = (None,)
    control: bool = True
    budget: float | None = None

    @property
    def blind(self) -> bool:
        """Whether no picture is shown."""
        return self.recipe == BLIND

    @property
    def at(self) -> str:
        """Where it acts."""
        return self.reducers[0].at if self.reducers[0] is not None else "encoder"

    @property
    def shares(self) -> bool:
        """Whether the encoder runs as it would without it, so that one pass is enough for all that do so."""
        return Point.stage_of(self.at) != "vision" and not hasattr(self.reducers[0], "look")


def contenders_of(
    recipes: Sequence[Recipe], budgets: Sequence[float], room: str | None, config: VLMConfig, *, views: int, draws: int,
    seed: int, trained: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> tuple[list[Contender], list[str]]:  # fmt: skip
    """Return who is compared, and one line for each method that is not.

    Parameters
    ----------
    recipes : sequence of Recipe
        One reducer each, measured as they are.
    budgets : sequence of float
        Percent of the image tokens at which every method of the room is measured.
    room : str, optional
        Whose methods are compared; none with None.
    config : VLMConfig
        Of the model.
    views : int
        Of a picture.
    draws : int
        Seeds of a method that draws.
    seed : int
        The first of them.
    trained : mapping
        By method, the options that say where what was trained for the model lies; ``trained`` in its recipe.

    Returns
    -------
    list of Contender
        First the one that reads everything, last the one that sees nothing.
    list of str
        What was left out, with the reason.
    """
    found, left_out = list[Contender](), list[str]()
    for card in sorted(cards(room=room), key=lambda card: card.baseline) if room else []:
        reason, more = _elsewhere(card, trained), trained.get(card.slug, {})
        if reason:
            left_out.append(f"{card.slug}: {reason}")
        elif card.slug != BLIND:
            found += [_at(card, budget, config, views, range(seed, seed + draws), more) for budget in budgets]
    distinct = {contender.recipe: contender for contender in found}  # of the same ones that of the smallest budget
    left_out += [
        f"crops: {each.curve} at {each.budget:g}%: is {each.recipe}, as at {distinct[each.recipe].budget:g}%"
        for each in found
        if each is not distinct[each.recipe]
    ]
    found = list(distinct.values())
    given = [
        Contender(str(recipe), str(recipe), (recipe.steps[0].build(),), recipe.steps[0].card.baseline)
        for recipe in dict.fromkeys(recipes)
        if str(recipe) not in {*distinct, BLIND}
    ]
    return [Contender(PLAIN, PLAIN), *given, *found, Contender(BLIND, BLIND)], left_out


def _elsewhere(card: Card, trained: Mapping[str, Any]) -> str:
    """Say why a method of the room is not compared; empty where it is."""
    if "frames" in inspect.signature(method_class(card.slug)).parameters:
        return "joins the frames of clips, and these are pictures"
    if card.slug != BLIND and budget_option(card) is None:
        return "has no option that says how much stays"
    if card.training != "none" and card.slug not in trained:
        return f"is trained for a model first ({card.training}); a trained one is compared with --with {card.slug}:..."
    return ""


def _at(card: Card, budget: float, config: VLMConfig, views: int, seeds: range, more: Mapping[str, str]) -> Contender:
    """A method at a budget."""
    kind, option = method_class(card.slug), budget_option(card)
    assert option is not None
    value = f"{budget:g}%"
    if views > 1 and hasattr(kind, "look"):  # it sees one view, and may keep of that as much as others of all
        value = str(min(config.num_patches, max(1, int(budget / 100 * views * config.num_patches))))
    drawn = seeds if "seed" in inspect.signature(kind).parameters else [None]
    reducers = [kind(**{option: value, **more} | ({} if seed is None else {"seed": seed})) for seed in drawn]
    recipe = Recipe((Step(card.slug, ((option, value), *((name, "trained") for name in more))),))
    return Contender(card.slug, str(recipe), tuple(cast(list[Reducer], reducers)), card.baseline, budget)


# ------------------------------------------------------------------------------------------------- questions


def draw(config: VLMConfig, numbers: Sequence[int], seed: int = 0, crops: bool = False) -> Questions:
    """Draw questions of the test split, one a picture: all families of the first number, then of the next.

    Parameters
    ----------
    config : VLMConfig
        Of the model.
    numbers : sequence of int
        Which questions of each family.
    seed : int
        0 for those that a model is measured on when its training ends.
    crops : bool
        Pictures of twice the side.
    """
    geometry = replace(config.geometry, side=config.side * (2 if crops else 1))
    scenes = [
        render(geometry, "test", EVALUATION_SEED + 100 * seed + place, number, (family,), turns=1)
        for number in numbers
        for place, family in enumerate(FAMILIES)
    ]
    batch = collate(scenes, 48)
    longest = int((batch.ids != PAD).sum(1).max())
    batch = replace(batch, ids=batch.ids[:, :longest], predicted=batch.predicted[:, :longest])
    return Questions(batch, [], [scene.turns[0] for scene in scenes])


# --------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Answers:
    """What one contender said to some questions.

    Parameters
    ----------
    right : (seeds, n) array of bool
    kept : (seeds, n) array of int
        Image tokens that the last layer of the language model read of each picture, newlines included.
    tokens : (seeds, n) array of float
        The same, the mean over its layers.
    """

    right: NDArray[np.bool_]
    kept: NDArray[np.int64]
    tokens: NDArray[np.float64]


class Watching(Reducer):
    """Keeps everything, and is shown what any of some reducers would be shown."""

    def __init__(self, reducers: list[Any]) -> None:
        super().__init__(Budget(ratio=1.0))
        self.reducers = reducers
        self.needs = frozenset(need for reducer in reducers for need in reducer.needs)  # type: ignore[misc]

    def layers(self, n_layers: int, layer: int) -> tuple[int, ...]:
        """Return the layers of all of them."""
        return tuple(sorted({each for reducer in self.reducers for each in reducer.layers(n_layers, layer)}))

    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Keep everything."""
        return TokenMap.identity(x.shape[1], x.device)


class Shown:
    """A reduced model that is shown what another one, its `eyes`, has seen of the pictures."""

    def __init__(self, reduced: ReducedVLM, eyes: ReducedVLM, seen: Seen) -> None:
        reduced.views, reduced.vision_tokens = eyes.views, eyes.vision_tokens
        self.reduced, self.seen = reduced, seen

    def eval(self) -> None:
        """Get ready for inference."""
        self.reduced.eval()

    def image_tokens(self, pixels: Tensor) -> Seen:
        """Return what was seen."""
        return self.seen

    def __call__(self, seen: Seen | None, ids: Tensor) -> Tensor:
        """Return the logits at the text."""
        return self.reduced(seen, ids)


@torch.no_grad()
def answer(
    model: BenchVLM, contenders: Sequence[Contender], asked: Questions, *, share: bool = True
) -> Iterator[tuple[Contender, Answers]]:
    """Let contenders answer questions, one after the other.

    The encoder runs once for all that leave it as it is; what they need of its layers is recorded on the way.

    Parameters
    ----------
    model : BenchVLM
        In its mode for inference.
    contenders : sequence of Contender
        Who is asked.
    asked : Questions
        One batch.
    share : bool
        False lets the encoder run anew for each.

    Yields
    ------
    Contender, Answers
    """
    pixels, count = asked.batch.pixels.to(model.device), len(asked.batch.ids)
    sharing = [reducer for each in contenders if each.shares for reducer in each.reducers if reducer is not None]
    whole = ReducedVLM(model, Watching([each for each in sharing if Point.stage_of(each.at) == "encoder"]))
    seen = whole.image_tokens(pixels) if share and any(each.shares and not each.blind for each in contenders) else None
    for contender in contenders:
        right, kept, tokens = [], [], []
        for reducer in contender.reducers:
            reduced = ReducedVLM(model, reducer, contender.at)
            net: Any = reduced
            if seen is not None and contender.shares:
                net = Shown(reduced, whole, seen)
            right.append(exact_match(net, asked, model.device, contender.blind, count))
            kept.append(reduced.kept)
            below = reduced.point.layers[0] if reduced.point.stage == "decoder" else 0  # layers that read everything
            share_below = below / len(reduced.language_tokens)
            everything = reduced.language_tokens[0] - 1 - asked.batch.ids.shape[1]
            tokens.append([share_below * everything + (1 - share_below) * each for each in reduced.kept])
        yield contender, Answers(np.array(right, bool), np.array(kept), np.array(tokens, float))


# ----------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Cost:
    """What one picture and its question cost, read once: means, and medians of seconds.

    Parameters
    ----------
    flops : float
        Without those of the choice itself.
    kv_bytes : float
        Keys and values of the prompt in float16, all layers.
    times : Times
        Seconds.
    """

    flops: float
    kv_bytes: float
    times: Times


def sample(asked: Questions) -> list[tuple[Tensor, Tensor]]:
    """Return pictures (1, S, S, 3) and questions up to where the answer begins (1, L), one by one."""
    prompts = [torch.tensor([VOCABULARY.prompt(turn.question)]) for turn in asked.turns]
    return [(asked.batch.pixels[row : row + 1], prompt) for row, prompt in enumerate(prompts)]


@torch.no_grad()
def count(model: BenchVLM, contender: Contender, pixels: Tensor, ids: Tensor) -> tuple[int, int, int]:
    """Return FLOPs, bytes of keys and values, and image tokens kept of one picture with its question.

    Raises
    ------
    TokenaryError
        If the reducer does not fit the model, the pictures or the budget.
    """
    reduced = ReducedVLM(model, contender.reducers[0], contender.at)
    reduced(None if contender.blind else reduced.image_tokens(pixels.to(model.device)), ids.to(model.device))
    flops = vlm_flops(model.config, reduced.vision_tokens, reduced.language_tokens, reduced.views)
    return flops, kv_bytes(model.config, reduced.language_tokens), reduced.kept[0]


def fitting(
    model: BenchVLM, contenders: Sequence[Contender], examples: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Contender], list[str]]:
    """Try every contender on a picture; return those that reduce it, and why the others do not."""
    found, left_out, whole = list[Contender](), list[str](), 0
    for contender in contenders:
        try:
            kept = count(model, contender, *examples[0])[2]
        except TokenaryError as error:
            left_out.append(f"{contender.recipe}: {error}")
            continue
        if contender.recipe == PLAIN:
            whole = kept
        if contender.budget is not None and contender.budget < 100 and kept >= whole:
            left_out.append(f"{contender.recipe}: leaves pictures of this kind whole")
        else:
            found.append(contender)
    return found, left_out


def measure_costs(
    model: BenchVLM, contenders: Sequence[Contender], examples: Sequence[tuple[Tensor, Tensor]], repeats: int = 3
) -> Iterator[Mapping[str, Cost]]:
    """Count and time contenders in turns, a picture at a time.

    Yields
    ------
    mapping of str to Cost
        By recipe, after every pass of a contender over a picture, over what was measured so far. Of the blind one only
        the counts: nothing is seen, and its times are nan.
    """
    flops: dict[str, list[int]] = {each.recipe: [] for each in contenders}
    held: dict[str, list[int]] = {each.recipe: [] for each in contenders}
    times: dict[str, list[Times]] = {each.recipe: [] for each in contenders}
    costs: dict[str, Cost] = {}
    for pixels, ids in examples:
        for contender in contenders:
            name = contender.recipe
            counted = count(model, contender, pixels, ids)
            flops[name].append(counted[0])
            held[name].append(counted[1])
            if not contender.blind:
                pair = pixels.to(model.device), ids.to(model.device)
                times[name].append(measure_times(model, contender.reducers[0], *pair, at=contender.at, repeats=repeats))
            costs[name] = Cost(statistics.fmean(flops[name]), statistics.fmean(held[name]), _medians(times[name]))
            yield costs


def _medians(times: Sequence[Times]) -> Times:
    if not times:
        return Times(np.nan, np.nan, np.nan)
    return Times(*(statistics.median(getattr(each, name) for each in times) for name in ("encode", "prefill", "plan")))
