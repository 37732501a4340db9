"""``compare --room memory``: what memories are worth on long texts, over the bytes they hold or the tokens they read.

Every method of the room, and whatever recipes are given, answers the same questions about the same texts (`haystack`).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenary.bench.comparison import about
from tokenary.bench.haystack import LONGEST, SHORTEST, TASKS, Haystack, haystacks
from tokenary.bench.memory_curves import Point, points_of
from tokenary.bench.memory_peers import kvpress
from tokenary.bench.memory_reading import Answers, read_haystack
from tokenary.bench.progress import Reporter
from tokenary.bench.quality import PLAIN, stderr
from tokenary.bench.record import ComparisonRecord, Start, plain_json
from tokenary.core.errors import InputError, OptionError, TokenaryError
from tokenary.core.recipe import Recipe
from tokenary.data import prose, wikitext2
from tokenary.hf.target import check_causal
from tokenary.models import LM
from tokenary.run import load

if TYPE_CHECKING:
    from rich.table import Table

TOOL = "tokenary compare --room memory"
#: Percent of the text that methods keep, or read: the first costs memory, the second time.
BUDGETS: Mapping[str, tuple[float, ...]] = {"keep": (12.5, 25, 50), "read": (3.125, 6.25, 12.5)}
CONTEXT, N_TEXTS = 2048, 1

Found = dict[str, dict[int, Answers]]


@dataclass(frozen=True)
class MemoryComparison(ComparisonRecord):
    """The record of a comparison of memories.

    Parameters
    ----------
    record : dict
        Plain JSON types. Keys ``schema, tool, date, minutes, complete, model, machine, versions, settings, text,
        questions, points, left_out, warnings``.
    """

    tool = TOOL

    @property
    def points(self) -> list[dict[str, Any]]:
        """One a memory and budget, the full cache first.

        Keys ``curve, recipe, control, peer``; ``kv_bytes, kv_share`` (of the full cache's); ``read_tokens,
        read_share``; ``share``, the smaller of the two; ``seconds``; ``prompt_share``; ``texts``; and ``tasks``: for
        each workload ``loss`` (nats a token), its ``increase`` over the full cache and the ``stderr`` of that over the
        questions, ``right`` (share of what was hidden that is found; None where only the loss counts), ``questions``.
        """
        return self.record["points"]

    @property
    def warnings(self) -> list[str]:
        """What the reader should know before trusting the figures, and what was left out."""
        return [*super().warnings, *(f"not measured: {line}" for line in self.record["left_out"])]

    def table(self) -> Table:
        """Return the table for a terminal."""
        from rich.box import SIMPLE
        from rich.table import Table

        from tokenary.bench.memory_report import cells, columns, findings

        made = Table(
            title="\n".join(findings(self.record)),
            title_justify="left",
            title_style="bold",
            caption=_caption(self.record),
            caption_justify="left",
            box=SIMPLE,
        )
        for name, justify in columns(self.record):
            made.add_column(name.replace(" ", "\n"), justify=justify, vertical="top", header_style="dim")
        before = self.points[0]["curve"]
        for point in self.points:
            if point["curve"] != before:
                made.add_section()
            before = point["curve"]
            made.add_row(*cells(point), style="dim" if point["control"] or point["peer"] else None)
        return made

    def page(self) -> str:
        """Return the report as one HTML page."""
        from tokenary.bench.memory_report import render

        return render(self.record)


def _caption(record: Mapping[str, Any]) -> str:
    model, machine, settings = record["model"], record["machine"], record["settings"]
    return (
        f"{model['name']} {model['dtype']}, texts: {settings['prompts']}, of {settings['context']:,} tokens,"
        f" {record['questions']} questions each; {machine['device']}, {machine['threads']} threads. Cells: nats a token"
        " of the expected answer, and the share that greedy decoding would write. Dim: controls and other programs."
    )


def compare_memory(
    lm_or_name: LM | str | os.PathLike[str],
    recipes: Iterable[str | Recipe] = (),
    *,
    context: int = CONTEXT,
    prompts: int = N_TEXTS,
    budgets: Sequence[float] | Mapping[str, Sequence[float]] = BUDGETS,
    seed: int = 0,
    room: str | None = "memory",
    peers: bool = False,
    progress: Any = None,
) -> MemoryComparison:
    """Compare memories on long texts: what they hold, what they read, and what is still found.

    Parameters
    ----------
    lm_or_name : LM, str or path
        A loaded model, or what `tokenary.load` takes; causal, with its tokenizer.
    recipes : iterable of str or Recipe
        Measured as they are, beside the room.
    context : int
        Tokens of a text and a question; may be more than the model was trained for.
    prompts : int
        Texts.
    budgets : sequence of float, or mapping
        Percent of the text that methods with a budget keep or read; one list for all, or one a slot.
    seed : int
        Of what is hidden, and of where the texts lie.
    room : str, optional
        Whose methods are compared; with None, the recipes only.
    peers : bool
        Also run presses of kvpress, where `scripts/install_kvpress.py` made an environment for it.
    progress : callable or rich.progress.Progress, optional
        Told of every run; a callable gets a `Step`.

    Returns
    -------
    MemoryComparison
        After Ctrl-C it holds what was measured so far and ``complete`` is False.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError, InputError, FetchError, UnsupportedModelError
        Before any work is done.
    KeyboardInterrupt
        Only if nothing was measured yet.
    """
    chosen = [Recipe.parse(recipe).for_writing() for recipe in recipes]
    shares = {slot: tuple(budgets[slot] if isinstance(budgets, Mapping) else budgets) for slot in BUDGETS}
    check(chosen, context, prompts, shares)
    start = Start.now()
    lm = lm_or_name if isinstance(lm_or_name, LM) else load(lm_or_name, progress=progress is not None)
    check_causal(lm.model)
    if lm.tokenizer is None:
        raise InputError(f"{lm.name} has no tokenizer, so that no text can be made for it")
    source, length = _source(context * prompts), context - LONGEST
    made = haystacks(lm.tokenizer, source[1], length, prompts, seed)
    points, left_out = points_of(lm, chosen, shares, length, room, progress)
    found: Found = {}
    complete = True
    reporter = Reporter(progress, prompts * (len(points) + 1) + (prompts if peers else 0))
    try:
        for number, haystack in enumerate(made):
            _measure(lm, number, haystack, points, found, left_out, reporter)
        if peers:
            for name, number, answers in kvpress(lm, made, shares["keep"], left_out, reporter):
                found.setdefault(name, {})[number] = answers
    except KeyboardInterrupt:
        complete = False
    if PLAIN not in found:
        raise KeyboardInterrupt
    return MemoryComparison(
        plain_json(
            {
                **start.head(TOOL, complete, about(lm) | {"context": lm.context_length}),
                "settings": {
                    "recipes": [str(recipe) for recipe in chosen],
                    "context": context,
                    "haystack": length,
                    "prompts": prompts,
                    "budgets": shares,
                    "seed": seed,
                    "peers": peers,
                },
                "text": source[0],
                "questions": len(made[0].questions),
                "points": _points(points, found, made),
                "left_out": list(dict.fromkeys(left_out)),
                "warnings": [*_warnings(lm, context, prompts, complete), *start.warnings()],
            }
        )
    )


def check(recipes: Iterable[Recipe], context: int, prompts: int, budgets: Mapping[str, Sequence[float]]) -> None:
    """Refuse wrong settings before anything is loaded; see `compare_memory`."""
    for recipe in recipes:
        recipe.build()
    if context < SHORTEST + LONGEST:
        raise OptionError("context", context, f"at least {SHORTEST + LONGEST} tokens")
    if prompts < 1:
        raise OptionError("prompts", prompts, "an integer at least 1")
    for budget in (budget for shares in budgets.values() for budget in shares):
        if not 0 < budget <= 100:
            raise OptionError("budgets", budget, "percent above 0 and at most 100")


def _source(tokens: int) -> tuple[str, str]:
    """A real text, and its name: the novel that ships, or where it is too short what WikiText-2 holds."""
    novel = prose()
    return ("Moby-Dick", novel) if 6 * tokens < len(novel) else ("WikiText-2 (test)", wikitext2())


def _measure(
    lm: LM,
    number: int,
    haystack: Haystack,
    points: Sequence[Point],
    found: Found,
    left_out: list[str],
    reporter: Reporter,
) -> None:
    """Ask every memory about one text, writing answers as they come."""
    stage, begun = f"text {number + 1}", False

    def told(name: str) -> None:
        nonlocal begun
        if begun:
            reporter.finish()
        begun = True
        reporter.start(stage, name)

    for name, answers in read_haystack(lm, haystack, {point.recipe: point.methods for point in points}, told):
        if isinstance(answers, TokenaryError):
            left_out.append(f"{name}: {answers}")
        else:
            found.setdefault(name, {})[number] = answers
    reporter.finish()


def _points(points: Sequence[Point], found: Found, made: Sequence[Haystack]) -> list[dict[str, Any]]:
    """The figures of every memory that answered, ours in the order of the curves, then other programs."""
    full = found[PLAIN]
    about = {point.recipe: {"curve": point.curve, "control": point.control, "peer": False} for point in points}
    for name in found:  # whatever is not ours is another program's
        about.setdefault(name, {"curve": name.partition(":")[0], "control": False, "peer": True})
    return [
        {"recipe": name, **each, **_figures(found[name], full, made)} for name, each in about.items() if name in found
    ]


def _figures(own: Mapping[int, Answers], full: Mapping[int, Answers], made: Sequence[Haystack]) -> dict[str, Any]:
    """Means over the texts that both this memory and the full cache were asked about."""
    texts = sorted(set(own) & set(full))
    kv, kv_full, read, read_full, seconds = (
        statistics.fmean(values)
        for values in (
            [own[text].kv_bytes for text in texts],
            [full[text].kv_bytes for text in texts],
            [own[text].read_tokens for text in texts],
            [full[text].read_tokens for text in texts],
            [own[text].seconds for text in texts],
        )
    )
    shares = [share for text in texts if (share := own[text].prompt_share) is not None]
    return {
        "kv_bytes": round(kv),
        "kv_share": kv / kv_full,
        "read_tokens": read,
        "read_share": read / read_full,
        "share": min(kv / kv_full, read / read_full),
        "seconds": seconds,
        "prompt_share": statistics.fmean(shares) if shares else None,
        "texts": len(texts),
        "tasks": {task: _task(task, own, full, [(text, made[text]) for text in texts]) for task in TASKS},
    }


def _task(
    task: str, own: Mapping[int, Answers], full: Mapping[int, Answers], texts: Sequence[tuple[int, Haystack]]
) -> dict[str, Any]:
    """Loss and right answers of one workload, and the paired increase of the loss over a full cache."""
    asked = [(text, at) for text, made in texts for at, one in enumerate(made.questions) if one.task == task]
    losses = [own[text].losses[at] for text, at in asked]
    increases = [own[text].losses[at] - full[text].losses[at] for text, at in asked]
    right = [found for text, at in asked if (found := own[text].right[at]) is not None]
    return {
        "loss": statistics.fmean(losses),
        "increase": statistics.fmean(increases),
        "stderr": stderr(increases),
        "right": statistics.fmean(right) if right else None,
        "questions": len(asked),
    }


def _warnings(lm: LM, context: int, prompts: int, complete: bool) -> list[str]:
    """What the reader should know before trusting the figures."""
    found = []
    if not complete:
        found.append("the run was interrupted: means are over what was asked by then")
    if context > lm.context_length:
        found.append(f"{context:,} tokens are past the {lm.context_length:,} that {lm.name} was made for")
    if prompts < 3:
        found.append(f"{prompts} text{'s' * (prompts > 1)}: differences of a few hundredths of a nat mean little")
    return found
