"""The report card of a reducer: retention, grounding, alignment, hallucination, thinking, coherence, cost, intervals.

Every figure also stands as the difference to random tokens at the same place and budget, on the same questions, with an
interval. There is no composite score. The figures themselves are those of `tokenary.probe.token_reduction_position`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenary.bench.record import ComparisonRecord, Start, plain_json
from tokenary.bench.reduction_card.arms import Arms, Entry, entries
from tokenary.bench.reduction_card.asking import caption_states
from tokenary.bench.reduction_card.figures import Retention
from tokenary.bench.reduction_card.language import text_part
from tokenary.bench.reduction_card.questions import Asked
from tokenary.bench.reduction_card.rows import Card, Say, explained
from tokenary.bench.reduction_card.setting import weights_of
from tokenary.models.bench_vlm import available, load
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.reduce.base import Reducer

if TYPE_CHECKING:
    from rich.table import Table

TOOL = "tokenary vlm card"
TOLERANCE = 1e-4  # of log-probabilities that should be equal


@dataclass(frozen=True)
class ReductionCard(ComparisonRecord):
    """The record of a report card.

    Parameters
    ----------
    record : dict
        Plain JSON types. Keys ``schema, tool, date, minutes, complete, model, machine, versions, settings, gates,
        arms, explained, text, stability, warnings``.
    """

    tool = TOOL

    @property
    def arms(self) -> list[dict[str, Any]]:
        """One row an arm.

        Keys ``name``, ``role`` (none, blind, reducer, control), ``at``, ``keep``, ``beside`` (the reducer that it is a
        control of), ``cost``, ``accuracy``, ``retention``, ``figures``, ``alignment``; ``over_random`` with the same as
        differences; of reducers ``positions``, ``invariants``, ``seconds`` and ``same_time`` (over controls).
        """
        return self.record["arms"]

    def table(self) -> Table:
        """Return the table for a terminal."""
        from rich.box import SIMPLE
        from rich.table import Table

        from tokenary.bench.reduction_card.report import COLUMNS, cells, findings

        made = Table(title="\n".join(findings(self.record)), title_justify="left", title_style="bold", box=SIMPLE)
        for name, _ in COLUMNS:
            made.add_column(name.replace(" ", "\n"), justify="left" if name == "arm" else "right", header_style="dim")
        for arm in self.arms:
            made.add_row(*cells(arm), style=None if arm["role"] == "reducer" else "dim")
        return made

    def page(self) -> str:
        """Return the report as one HTML page."""
        from tokenary.bench.reduction_card.report import render

        return render(self.record)


def reduction_card(
    recipes: Sequence[str] | Mapping[str, Reducer],
    model: BenchVLM | str | Path = "",
    *,
    budgets: Sequence[float] = (),
    at: str | None = None,
    per_family: int = 50,
    per_kind: int = 60,
    listed: int = 200,
    random_seeds: int = 5,
    anyres: bool = False,
    seed: int = 0,
    resamples: int = 2000,
    text: str = "",
    stability: bool = False,
    say: Say | None = None,
) -> ReductionCard:
    """Make the report card of reducers.

    Parameters
    ----------
    recipes : sequence of str, or mapping
        Reducers, as ``hiprune:keep=25%``; or reducers that were built, by name.
    model : BenchVLM, str or Path
        A model, or the name of one that ships, or a folder; by default the largest that ships.
    budgets : sequence of float
        Percent of the image tokens kept, in place of those in the recipes.
    at : str, optional
        Where all act; by default each where it belongs.
    per_family, per_kind, listed : int
        Questions of each family; existence questions of each kind of negative, with three times as many positives;
        pictures whose objects are listed.
    random_seeds : int
        Of the random control.
    anyres : bool
        Pictures of twice the side, seen as a thumbnail and four crops.
    seed : int
        Of questions, random tokens and the bootstrap.
    resamples : int
        Of the bootstrap.
    text : str
        A language model on whose texts and thoughts those reducers are tried too that act between its layers; none by
        default.
    stability : bool
        Train small models with every reducer, at a ladder of learning rates; minutes.
    say : callable, optional
        Told what is under way.

    Returns
    -------
    ReductionCard
        After Ctrl-C it holds the arms that were measured so far and ``complete`` is False.

    Raises
    ------
    RecipeError, OptionError
        If a recipe is no reducer, or an option is wrong.
    KeyboardInterrupt
        Only if no reducer was measured yet.
    """
    start = Start.now()
    chosen = entries(dict(recipes) if isinstance(recipes, Mapping) else list(recipes), list(budgets), at)
    net, name = _model(model)
    say = say or (lambda line: None)
    asked = Asked.drawn(net.config.geometry, per_family, per_kind, listed, seed, anyres)
    some = {"resamples": resamples, "seed": seed}
    arms = Arms(net, asked, random_seeds, seed)
    card = Card(arms, Retention(arms.full, arms.blind, asked, some), caption_states(net, asked.listing), some)
    rows, complete = list[dict[str, Any]](), True
    try:
        for row in card.rows(chosen, say):
            rows.append(row)
    except KeyboardInterrupt:
        if not any(row["role"] == "reducer" for row in rows):
            raise
        complete, text, stability = False, "", False
    on_text, trained = text_part(text, chosen, some, say), _stability(chosen, stability, say)
    record = {
        **start.head(TOOL, complete, weights_of(net, name)),
        "settings": {
            **some, "per_family": per_family, "per_kind": per_kind, "listed": len(asked.listing),
            "random_seeds": random_seeds, "anyres": anyres, "reducers": [entry.name for entry in chosen],
        },
        "gates": card.retention.gates, "arms": rows, "explained": explained(rows),
        "text": on_text, "stability": trained, "warnings": [],
    }  # fmt: skip
    record["warnings"] = [*warnings(record), *start.warnings()]
    return ReductionCard(plain_json(record))


def _model(model: BenchVLM | str | Path) -> tuple[BenchVLM, str]:
    if isinstance(model, BenchVLM):
        return model.eval().requires_grad_(False), model.config.name
    name = str(model) or available()[0]
    return load(name).requires_grad_(False), name


def _stability(chosen: Sequence[Entry], wanted: bool, say: Say) -> dict[str, Any] | None:
    if not wanted:
        return None
    from tokenary.bench.reduction_card.stability import ladder

    return ladder(chosen, say=say)


def warnings(record: Mapping[str, Any]) -> list[str]:
    """Say what a reader should know before trusting the figures."""
    found = [] if record["complete"] else ["the run was interrupted: what was measured by then is here"]
    found.append("drawn scenes are plainer than photographs: there is more to leave out, and what matters stands out")
    weak = [family for family, gate in record["gates"].items() if not gate["counts"]]
    if weak:
        found.append(f"seeing adds too little in {', '.join(weak)}; retention leaves them out")
    for arm in record["arms"]:
        broken = [name for name, value in arm.get("invariants", {}).items() if value is not None and value > TOLERANCE]
        if broken:
            found.append(f"{arm['name']}: {', '.join(broken)} should be 0, so its other figures are in doubt")
    if record["text"]["left_out"]:
        found.append(record["text"]["left_out"])
    elif not record["text"]["thinking"]["gate"]["counts"]:
        found.append("thinking: the context does not help this model to answer, so reducing it says nothing there")
    if record["stability"] is None:
        found.append("training stability was not measured; it takes minutes and is asked for")
    return found
