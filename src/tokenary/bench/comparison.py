"""``compare``: recipes side by side on one model; speed, bytes and quality in one record, a table and a report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenary.bench.filled import filled_quality
from tokenary.bench.measure import balanced, fitting, measure
from tokenary.bench.measured import PLAIN, Measurement, Row
from tokenary.bench.peers import peers_of
from tokenary.bench.quality import Quality, memory_only, sliding_texts, sweep
from tokenary.bench.record import ComparisonRecord, Start, plain_json
from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe
from tokenary.data import prompts as shipped_prompts
from tokenary.data import prose
from tokenary.models import LM
from tokenary.run import load

if TYPE_CHECKING:
    from rich.table import Table

TOOL = "tokenary compare"
#: Sizes of the default comparison, chosen so that seven recipes on SmolLM2-135M take under five minutes on two cores.
N_PROMPTS, MAX_NEW_TOKENS = 6, 40
N_TEXTS, TEXT_TOKENS, SCORED_TOKENS = 4, 640, 128


@dataclass(frozen=True)
class Comparison(ComparisonRecord):
    """The record of a comparison.

    Parameters
    ----------
    record : dict
        Plain JSON types. Keys ``schema, tool, date, minutes, complete, model, machine, versions, settings, prompts,
        warmup, rows, quality, passes, outputs, warnings``.
    """

    tool = TOOL

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a contender, plain greedy first: the fields of `Row`, ``quality`` and ``filled``.

        The last two are None for a full cache, and for a model that fills no masks (see `tokenary.bench.filled`).
        """
        return self.record["rows"]

    def table(self) -> Table:
        """Return the table for a terminal."""
        return one_table([self])

    def page(self) -> str:
        """Return the report as one HTML page."""
        from tokenary.bench.report import render

        return render(self.record)


def one_table(found: Sequence[Comparison]) -> Table:
    """Return one table for a terminal, with a part for each model; ratios are to plain greedy of the same model."""
    from rich.box import SIMPLE
    from rich.table import Table

    from tokenary.bench.report import KINDS, cells, columns, headline

    table = Table(
        title="\n".join(headline(comparison.record) for comparison in found),
        title_justify="left",
        title_style="bold",
        caption="\n".join(_caption(comparison.record) for comparison in found),
        caption_justify="left",
        box=SIMPLE,
    )
    for name, justify in columns(found[0].record):
        table.add_column(name.replace(" ", "\n"), justify=justify, vertical="top", header_style="dim")
    for comparison in found:
        if len(found) > 1:
            table.add_row(comparison.record["model"]["name"], style="bold")
        for kind in KINDS:
            for row in comparison.rows:
                if row["kind"] == kind:
                    table.add_row(*cells(row, comparison.record), style="dim" if kind == "peer" else None)
            table.add_section()
    return table


def _caption(record: Mapping[str, Any]) -> str:
    model, machine, settings = record["model"], record["machine"], record["settings"]
    return (
        f"{model['name']} {model['dtype']}, {len(record['prompts'])} prompts x {settings['max_new_tokens']} tokens, "
        f"{settings['rounds']} rounds in turns; {machine['device']}, {machine['threads']} threads. "
        "Peak memory is that of the whole process. Brackets: least and greatest round."
    )


def compare(
    lm_or_name: LM | str | os.PathLike[str],
    recipes: Iterable[str | Recipe],
    *,
    prompts: Sequence[Any] | int = N_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    rounds: int = 3,
    seed: int = 0,
    budgets: Sequence[float] = (25, 50, 75),
    quality: bool = True,
    peers: bool = False,
    progress: Any = None,
) -> Comparison:
    """Compare recipes on one model: speed against plain greedy, bytes held, equality of outputs, quality lost.

    Parameters
    ----------
    lm_or_name : LM, str or path
        A loaded model, or what `tokenary.load` takes.
    recipes : iterable of str or Recipe
        Plain greedy is always measured, first.
    prompts : sequence of Prompt, str or token ids, or int
        A number takes so many of those that ship with the package, of all sets in turn, friendly and hostile ones.
    max_new_tokens : int
        Most tokens a prompt.
    rounds : int
        Counted repeats.
    seed : int
        Chooses among the prompts and texts that ship with the package.
    budgets : sequence of float
        Percent of the prompt's tokens at which keep policies are measured, beside their own.
    quality : bool
        Measure the perplexity of keep policies on prose that ships with the package, and, where the model fills masks,
        how likely it finds what was filled.
    peers : bool
        Also run transformers' ``generate`` on the same weights, and llama.cpp where it is installed.
    progress : callable or rich.progress.Progress, optional
        Told of every run; a callable gets a `Step`.

    Returns
    -------
    Comparison
        After Ctrl-C it holds what was measured so far and ``complete`` is False.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError, InputError, FetchError, UnsupportedModelError
        Before any work is done.
    KeyboardInterrupt
        Only if nothing was measured yet.
    """
    chosen = [Recipe.parse(recipe).for_writing() for recipe in recipes]
    for recipe in chosen:
        recipe.build()  # options are checked before a model is loaded
    for name, value in (("rounds", rounds), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise OptionError(name, value, "an integer at least 1")
    for budget in budgets:
        if not 0 < budget <= 100:
            raise OptionError("budgets", budget, "percent above 0 and at most 100")
    start = Start.now()
    lm = lm_or_name if isinstance(lm_or_name, LM) else load(lm_or_name, progress=progress is not None)
    if isinstance(prompts, int):
        prompts = balanced(fitting(lm, shipped_prompts(), max_new_tokens), prompts, seed)
    if peers and lm.kind != "causal":
        raise OptionError("peers", peers, f"False: no peer runs {lm.name}, a model of the kind {lm.kind}")
    others, warnings = peers_of(lm, max_new_tokens) if peers else ([], [])
    measurement = measure(
        lm, chosen, prompts, max_new_tokens=max_new_tokens, rounds=rounds, peers=others, progress=progress
    )
    rows = measurement.rows()
    if not rows:
        raise KeyboardInterrupt
    curves: dict[str, list[Quality]] = {}
    complete = measurement.complete
    filled: dict[str, dict[str, Any]] = {}
    if quality and complete and lm.kind == "diffusion":
        try:
            filled = filled_quality(lm, measurement)
        except KeyboardInterrupt:
            complete = False
    if quality and complete and any(map(memory_only, chosen)):
        try:
            texts, scored = _texts(lm, seed)
            for policy, point in sweep(lm, chosen, texts, len(texts[0]) - scored, budgets, progress):
                curves.setdefault(policy, []).append(point)
        except InputError as error:
            warnings.append(f"quality was not measured: {error}")
        except KeyboardInterrupt:
            complete = False
    record = {
        **start.head(TOOL, complete, about(lm)),
        "settings": {
            "recipes": [str(recipe) for recipe in chosen],
            "max_new_tokens": max_new_tokens,
            "rounds": rounds,
            "batch_size": 1,
            "seed": seed,
            "budgets": list(budgets),
            "peers": peers,
        },
        "prompts": [
            {
                "id": case.id,
                "set": case.set,
                "workload": case.workload,
                "tokens": len(case.token_ids),
                "text": case.text,
            }
            for case in measurement.cases
        ],
        "warmup": [case.id for case in measurement.lessons],
        "rows": [_row(row, curves) | {"filled": filled.get(row.name)} for row in rows],
        "quality": _quality(curves),
        "passes": _passes(measurement),
        "outputs": _outputs(measurement, lm),
        "warnings": [*warnings, *_warnings(rows, rounds, complete), *start.warnings()],
    }
    return Comparison(plain_json(record))


def about(lm: LM) -> dict[str, Any]:
    """Return which model a record was made with."""
    dtype = str(lm.dtype).removeprefix("torch.")
    return {"name": lm.name, "fingerprint": lm.fingerprint, "source": lm.source, "dtype": dtype}


def _texts(lm: LM, seed: int) -> tuple[list[list[int]], int]:
    """Pieces of prose, and how many tokens at the end of each are scored."""
    length = min(TEXT_TOKENS, lm.context_length)
    shift = seed * 0.618 % 1.0
    return sliding_texts(lm, prose(), N_TEXTS, length, shift), length * SCORED_TOKENS // TEXT_TOKENS


def _row(row: Row, curves: Mapping[str, list[Quality]]) -> dict[str, Any]:
    """A row as plain JSON types, with the quality of its keep policy."""
    made = asdict(row) | {"near_ties": row.near_ties, "quality": None, "keeps": False}
    part = memory_only(Recipe.parse(row.name)) if row.kind == "recipe" else None
    if part is not None:
        made["keeps"] = True
        points = [point for curve in curves.values() for point in curve if point.recipe == str(part)]
        if points:
            made["quality"] = points[0].to_json(curves[PLAIN][0])
    return made


def _quality(curves: Mapping[str, list[Quality]]) -> dict[str, Any] | None:
    """The curves as plain JSON types."""
    if not curves:
        return None
    full = curves[PLAIN][0]
    return {
        "text": "Moby-Dick",
        "prompt_tokens": full.prompt_tokens,
        "new_tokens": full.new_tokens,
        "curves": {
            name: [point.to_json(full) for point in sorted(points, key=lambda point: point.kv_bytes)]
            for name, points in curves.items()
        },
    }


def _passes(measurement: Measurement) -> dict[str, dict[str, list[list[int]]]]:
    """Drafted and accepted tokens of every pass, before anything was learned and in the first round."""
    made = {}
    for contender in measurement.contenders:
        if contender.learns:
            runs = {"cold": measurement.cold.get(contender.name, {}), "warm": measurement.rounds[0][contender.name]}
            made[contender.name] = {
                state: [list(one) for _, sample in sorted(samples.items()) for row in sample.per_pass for one in row]
                for state, samples in runs.items()
            }
    return made


def _outputs(measurement: Measurement, lm: LM) -> list[dict[str, Any]]:
    """What plain greedy and every drafting recipe said in the first round, in pieces of text, one a token."""
    made = []
    for index, case in enumerate(measurement.cases):
        for contender in measurement.contenders:
            found = measurement.output(contender.name, index)
            if found is None or not (contender.learns or contender.name == PLAIN):
                continue
            sample, row = found
            ids = sample.token_ids[row]
            made.append(
                {
                    "prompt": case.id,
                    "recipe": contender.name,
                    "token_ids": ids,
                    "pieces": [f"{token} " for token in ids] if lm.tokenizer is None else lm.pieces(ids),
                    "from_draft": sample.from_draft[row],
                    "passes": len(sample.per_pass[row]),
                }
            )
    return made


def _warnings(rows: Sequence[Row], rounds: int, complete: bool) -> list[str]:
    """What the reader should know before trusting the figures."""
    found = []
    if not complete:
        found.append("the run was interrupted: only what every recipe had done is compared")
    if rounds < 3:
        found.append(f"{rounds} counted round{'s' * (rounds > 1)}: the spread says little below three")
    unsteady = [row.name for row in rows if row.ratio.high - row.ratio.low > 0.15 * row.ratio.median]
    if unsteady:
        found.append(f"timings were unsteady (rounds more than 15% apart): {', '.join(unsteady)}")
    differences = [(row.name, difference) for row in rows if row.lossless for difference in row.differences]
    for name, difference in differences:
        if not difference.near_tie:
            gap = "" if difference.gap is None else f", where two logits are {difference.gap:.3g} apart"
            found.append(
                f"{name} differs from plain greedy on {difference.case} at token {difference.position + 1}{gap}"
            )
    ties = [difference.gap or 0.0 for _, difference in differences if difference.near_tie]
    if ties:
        found.append(f"at near-ties two logits are at most {max(ties):.3g} apart, so that rounding decides")
    return found
