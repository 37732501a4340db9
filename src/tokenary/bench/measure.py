"""Several recipes on the same prompts, timed in turns.

The protocol: one process, one copy of the weights, plain greedy always first. On every prompt all contenders run one
after the other (A B C A B C ...), so that a machine that slows down slows all of them down. Then:

1. *Cold.* The measured prompts once, by recipes that learn; the others on the first of them. Times are thrown away;
   how many tokens a pass yields while a method knows nothing is kept.
2. *Warm-up.* All that was learned is forgotten, and other prompts are run. What is learned from these stays.
3. *Rounds*, at least three. Each starts from that same state: no method ever sees a text twice.

The clock covers everything between token ids in and token ids out. Tokens are those that came out, counted alike for
all. Ratios are paired by round.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tokenary.bench.contender import Clock, Contender, RecipeContender, Sample
from tokenary.bench.measured import PLAIN, Case, Measurement
from tokenary.bench.progress import Reporter
from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe
from tokenary.core.tree import TokenTree
from tokenary.data import Prompt
from tokenary.data import prompts as shipped_prompts
from tokenary.hf.target import Target, attached
from tokenary.models import LM

#: Prompts that learning methods are warmed up with.
LESSONS = 18
#: Gaps between two logits that another order of summation can turn round.
NEAR_TIE = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-3, torch.float64: 1e-9}


def logit_gap(lm: LM, prompt: Sequence[int], new: Sequence[int], token: int, other: int) -> float:
    """Return by how much plain decoding prefers `token` to `other` after a prompt and some new tokens.

    The new tokens are read one at a time, as plain greedy decoding reads them.
    """
    with attached(lm.model):
        target = Target(lm.model)
        logits = target.prefill([prompt])[0]
        for known in new:
            logits = target.score(TokenTree.roots([known]))[0, -1]
            target.commit([[0]])
    return float(logits[token].float() - logits[other].float())


def cases_of(lm: LM, prompts: Sequence[Any], max_new_tokens: int) -> list[Case]:
    """Turn prompts (`Prompt`, user messages, token ids, or ready cases) into what is measured.

    Raises
    ------
    InputError
        No prompt, an empty one, or one that leaves no room for `max_new_tokens`.
    """
    if not prompts:
        raise InputError("no prompts to measure")
    made = []
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            prompt = Prompt(f"prompt-{number}", "given", "unknown", prompt)
        if isinstance(prompt, Prompt):
            ids = lm.encode([prompt.prompt])[0]
            prompt = Case(prompt.id, prompt.set, prompt.workload, prompt.prompt, tuple(ids))
        elif not isinstance(prompt, Case):
            prompt = Case(f"prompt-{number}", "given", "unknown", "", tuple(map(int, prompt)))
        if not prompt.token_ids:
            raise InputError(f"prompt {prompt.id} is empty")
        if len(prompt.token_ids) + max_new_tokens > lm.context_length:
            raise InputError(
                f"prompt {prompt.id} has {len(prompt.token_ids)} tokens; with max_new_tokens={max_new_tokens} that is"
                f" past {lm.name}'s context of {lm.context_length}"
            )
        made.append(prompt)
    return made


def fitting(lm: LM, prompts: Iterable[Prompt], max_new_tokens: int) -> list[Prompt]:
    """Return the prompts that leave room for `max_new_tokens` in the context of a model."""
    found = []
    for prompt in prompts:
        try:
            cases_of(lm, [prompt], max_new_tokens)
        except InputError:
            continue
        found.append(prompt)
    return found


def _batches(cases: Sequence[Case], size: int) -> list[list[int]]:
    """Indices of cases that run together: of one workload, in order."""
    if size == 1:
        return [[index] for index in range(len(cases))]
    made = []
    for workload in dict.fromkeys(case.workload for case in cases):
        same = [index for index, case in enumerate(cases) if case.workload == workload]
        made += [same[at : at + size] for at in range(0, len(same), size)]
    return made


def balanced(prompts: Sequence[Prompt], count: int, seed: int = 0) -> list[Prompt]:
    """Choose prompts so that sets and workloads are served alike, in file order.

    Parameters
    ----------
    prompts : sequence of Prompt
        To choose from.
    count : int
        How many; the first round takes one of each set, workloads alternating, the second the other way round.
    seed : int
        Another seed chooses others of the same kinds.
    """
    sets, workloads = (list(dict.fromkeys(getattr(p, field) for p in prompts)) for field in ("set", "workload"))
    cells = {(p.set, p.workload): [q for q in prompts if (q.set, q.workload) == (p.set, p.workload)] for p in prompts}
    chosen: list[Prompt] = []
    for turn in range(len(prompts) + len(workloads)):
        for number, name in enumerate(sets):
            cell = cells.get((name, workloads[(turn + number) % len(workloads)]), [])
            at = turn // len(workloads)
            if at < len(cell) and len(chosen) < count:
                chosen.append(cell[(at + seed) % len(cell)])
    return sorted(chosen, key=prompts.index)


def measure(
    lm: LM,
    recipes: Iterable[str | Recipe],
    prompts: Sequence[Any],
    *,
    warmup: Sequence[Any] | None = None,
    max_new_tokens: int = 64,
    rounds: int = 3,
    batch_size: int = 1,
    peers: Sequence[Contender] = (),
    progress: Any = None,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Time recipes in turns on the same prompts, decoding greedily; see the module for the protocol.

    Parameters
    ----------
    lm : LM
        The model. What its methods had learned before is left as it was.
    recipes : iterable of str or Recipe
        Plain greedy is put first; what is there twice is measured once.
    prompts : sequence of Prompt, str, token ids or Case
        At least one.
    warmup : sequence, optional
        Prompts to learn from before the rounds; by default eighteen that ship with the package and are not measured, of
        every set. With none, and for a model without tokenizer, every round starts cold.
    max_new_tokens : int
        Most tokens a prompt.
    rounds : int
        Counted repeats; below 3 the spread says little.
    batch_size : int
        Prompts that run together.
    peers : sequence of Contender
        Others that run in the same turns.
    progress : callable or rich.progress.Progress, optional
        Told of every run; a callable gets a `Step`.
    clock : callable
        Returns seconds.

    Returns
    -------
    Measurement
        With ``complete=False`` after Ctrl-C.

    Raises
    ------
    RecipeError, OptionError, UnknownNameError, InputError, UnsupportedModelError
        Before anything runs.
    """
    for option, value in (("max_new_tokens", max_new_tokens), ("rounds", rounds), ("batch_size", batch_size)):
        if value < 1:
            raise OptionError(option, value, "an integer at least 1")
    chosen = dict.fromkeys([Recipe(), *map(Recipe.parse, recipes)])
    contenders: list[Contender] = [RecipeContender(lm, recipe, max_new_tokens, clock) for recipe in chosen]
    contenders += peers
    cases = cases_of(lm, prompts, max_new_tokens)
    if warmup is None:
        measured = {case.id for case in cases} | {case.text for case in cases}
        spare = [] if lm.tokenizer is None else fitting(lm, shipped_prompts(), max_new_tokens)
        spare = [prompt for prompt in spare if prompt.id not in measured and prompt.prompt not in measured]
        warmup = balanced(spare, LESSONS)
    lessons = cases_of(lm, warmup, max_new_tokens) if warmup else []
    near_tie = NEAR_TIE.get(lm.dtype, 0.0)
    measurement = Measurement(contenders, cases, _batches(cases, batch_size), near_tie=near_tie, lessons=lessons)
    known = dict(lm.warm)
    try:
        _run(measurement, rounds, batch_size, progress)
        _explain(measurement, lm)
        measurement.complete = True
    except KeyboardInterrupt:
        pass
    finally:
        lm.warm.clear()
        lm.warm.update(known)
    return measurement


def _run(measurement: Measurement, rounds: int, batch_size: int, progress: Any) -> None:
    """Run everything in turns, writing samples into the measurement as they come."""
    contenders, batches = measurement.contenders, measurement.batches
    inputs = [[measurement.cases[case].token_ids for case in batch] for batch in batches]
    lessons = [case.token_ids for case in measurement.lessons]
    taught = [lessons[at : at + batch_size] for at in range(0, len(lessons), batch_size)]
    learners = [contender for contender in contenders if contender.learns]
    cold = [(batch, one) for batch in range(len(batches)) for one in contenders if one.learns or batch == 0]
    total = len(cold) + len(taught) * len(learners) + rounds * len(batches) * len(contenders)
    reporter = Reporter(progress, total)
    for batch, contender in cold:
        reporter.start("warm-up", contender.name)
        sample = contender.run(inputs[batch])
        if contender.learns:
            measurement.cold.setdefault(contender.name, {})[batch] = sample
        reporter.finish()
    for contender in learners:
        contender.forget()
    for lesson in taught:
        for contender in learners:
            reporter.start("warm-up", contender.name)
            contender.run(lesson)
            reporter.finish()
    for contender in contenders:
        contender.freeze()
    for number in range(rounds):
        for contender in contenders:
            contender.thaw()
        done: dict[str, dict[int, Sample]] = {contender.name: {} for contender in contenders}
        measurement.rounds.append(done)
        for batch, ids in enumerate(inputs):
            for contender in contenders:
                reporter.start(f"round {number + 1} of {rounds}", contender.name)
                done[contender.name][batch] = contender.run(ids)
                reporter.finish()


def _explain(measurement: Measurement, lm: LM) -> None:
    """Compute the logit gap of every difference that a lossless contender should not have."""
    for contender in measurement.contenders:
        if not contender.lossless:
            continue
        for index, at, plain, other in measurement.differing(contender.name)[1]:
            found = measurement.output(PLAIN, index)
            if plain is None or other is None or found is None:
                continue
            new = found[0].token_ids[found[1]][:at]
            gap = logit_gap(lm, measurement.cases[index].token_ids, new, plain, other)
            measurement.gaps[index, at, plain, other] = gap
