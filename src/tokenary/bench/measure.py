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

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tokenary.bench.contender import Clock, Contender, RecipeContender, Sample
from tokenary.bench.progress import Reporter
from tokenary.core.errors import InputError, OptionError
from tokenary.core.recipe import Recipe
from tokenary.core.tree import TokenTree
from tokenary.data import Prompt
from tokenary.data import prompts as shipped_prompts
from tokenary.hf.target import Target, attached
from tokenary.models import LM

PLAIN = "plain"

#: Prompts that learning methods are warmed up with.
LESSONS = 18
#: Gaps between two logits that another order of summation can turn round.
NEAR_TIE = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Case:
    """A prompt that is measured.

    Parameters
    ----------
    id, set, workload : str
        As in `tokenary.data.Prompt`.
    text : str
        The message; empty where only token ids were given.
    token_ids : tuple of int
        What the model reads.
    """

    id: str
    set: str
    workload: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds.

    Parameters
    ----------
    median, low, high : float
        The middle, the least and the greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Difference:
    """The first token in which an output differs from plain greedy's.

    Parameters
    ----------
    case : str
        Id of the prompt.
    position : int
        New tokens before it.
    plain, other : int or None
        The two tokens; None where a text ended.
    gap : float or None
        By how much plain greedy's logits prefer its token; None if it was not computed.
    near_tie : bool
        Whether the gap is so small that the order of a sum decides.
    """

    case: str
    position: int
    plain: int | None
    other: int | None
    gap: float | None = None
    near_tie: bool = False


@dataclass(frozen=True)
class Row:
    """The figures of one contender.

    Parameters
    ----------
    name : str
        Canonical text of the recipe, or name of the peer.
    kind : {"recipe", "peer"}
        Whether it is ours.
    lossless : bool
        Whether its output must equal plain greedy's.
    prompts, tokens : int
        Prompts, and new tokens of a round; where a method writes several texts a prompt, those of all.
    tokens_per_second : Spread
        All these tokens of a round by all its seconds, the prompts' reading included.
    ratio : Spread
        That, by plain greedy's in the same round.
    ratio_by_workload : dict
        The same for the prompts of each workload (``friendly``, ``hostile``, ...), where there is more than one.
    tokens_per_pass : float or None
        After the prompt's pass; None for a peer that does not tell.
    cold_tokens_per_pass : float or None
        The same on the same prompts before anything was learned; None for what does not learn.
    acceptance : float or None
        Share of the drafted tokens that were accepted; None without drafts.
    first_token_ms, ms_per_pass : float
        Medians over prompts and rounds, and over rounds.
    kv_bytes : int or None
        Most bytes of keys, values and bookkeeping held between two passes, for the prompt that took most.
    peak_bytes : int
        Peak memory of the whole process during its runs. Weights, libraries and what earlier runs left are part of it.
    identical : int
        Prompts whose output equals plain greedy's in every round.
    differences : tuple of Difference
        One for every other prompt.
    branches : int
        Texts that a method writes for a prompt; 0 where it writes the answer alone.
    rows_per_token : float or None
        Positions computed for each token, where passes fill masks.
    """

    name: str
    kind: Literal["recipe", "peer"]
    lossless: bool
    prompts: int
    tokens: int
    tokens_per_second: Spread
    ratio: Spread
    ratio_by_workload: dict[str, Spread]
    tokens_per_pass: float | None
    cold_tokens_per_pass: float | None
    acceptance: float | None
    first_token_ms: float
    ms_per_pass: float | None
    kv_bytes: int | None
    peak_bytes: int
    identical: int
    differences: tuple[Difference, ...]
    branches: int = 0
    rows_per_token: float | None = None

    @property
    def near_ties(self) -> int:
        """Differences that a near-tie explains."""
        return sum(difference.near_tie for difference in self.differences)


@dataclass
class Measurement:
    """All that was measured; rows are computed from it.

    Parameters
    ----------
    contenders : list of Contender
        Plain greedy first.
    cases : list of Case
        The prompts.
    batches : list of list of int
        Indices into `cases` that ran together, all of one workload.
    cold : dict
        ``cold[name][batch]``: runs before anything was learned.
    rounds : list of dict
        ``rounds[r][name][batch]``: the counted runs.
    complete : bool
        False if it was interrupted; only what every contender did is then compared.
    gaps : dict
        ``gaps[case, common tokens, plain, other]``: the logit gap at a difference.
    near_tie : float
        Largest gap that counts as a near-tie.
    lessons : list of Case
        Prompts of the warm-up.
    """

    contenders: list[Contender]
    cases: list[Case]
    batches: list[list[int]]
    cold: dict[str, dict[int, Sample]] = field(default_factory=dict)
    rounds: list[dict[str, dict[int, Sample]]] = field(default_factory=list)
    complete: bool = False
    gaps: dict[tuple[int, int, int | None, int | None], float] = field(default_factory=dict)
    near_tie: float = 0.0
    lessons: list[Case] = field(default_factory=list)

    def paired(self, workload: str | None = None) -> list[tuple[dict[str, dict[int, Sample]], list[int]]]:
        """Return the rounds with the batches that every contender did in them, without rounds that have none."""
        found = []
        for done in self.rounds:
            batches = [
                batch
                for batch, cases in enumerate(self.batches)
                if workload in (None, self.cases[cases[0]].workload)
                and all(batch in done.get(contender.name, {}) for contender in self.contenders)
            ]
            if batches:
                found.append((done, batches))
        return found

    @property
    def workloads(self) -> list[str]:
        """Workloads of the prompts, in order."""
        return list(dict.fromkeys(case.workload for case in self.cases))

    def speed(self, name: str, workload: str | None = None) -> tuple[Spread, Spread]:
        """Return tokens a second of a contender, and that by plain greedy's, over the rounds."""
        speeds, ratios = [], []
        for done, batches in self.paired(workload):
            own, plain = (
                sum(done[who][batch].tokens for batch in batches) / sum(done[who][batch].seconds for batch in batches)
                for who in (name, PLAIN)
            )
            speeds.append(own)
            ratios.append(own / plain)
        return Spread.of(speeds), Spread.of(ratios)

    def output(self, name: str, case: int, number: int = 0) -> tuple[Sample, int] | None:
        """Return the run that holds a prompt in a round, and its row in the batch; None if there was none."""
        batch = next(index for index, cases in enumerate(self.batches) if case in cases)
        sample = self.rounds[number].get(name, {}).get(batch) if self.rounds else None
        return None if sample is None else (sample, self.batches[batch].index(case))

    def differing(self, name: str) -> tuple[int, list[tuple[int, int, int | None, int | None]]]:
        """Compare outputs with plain greedy's, in every round.

        Returns
        -------
        int
            How many prompts were compared.
        list of (int, int, int or None, int or None)
            Of those that differ: the index, the new tokens in common, plain greedy's next token and the other one.
        """
        compared, found = 0, []
        for index in range(len(self.cases)):
            pairs = [
                (plain[0].token_ids[plain[1]], own[0].token_ids[own[1]])
                for number in range(len(self.rounds))
                if (plain := self.output(PLAIN, index, number)) and (own := self.output(name, index, number))
            ]
            compared += bool(pairs)
            pair = next(((plain, own) for plain, own in pairs if plain != own), None)
            if pair is not None:
                found.append((index, *_first_difference(*pair)))
        return compared, found

    def rows(self) -> list[Row]:
        """Compute the figures of every contender; nothing if no batch was done by all of them."""
        rounds = self.paired()
        return [self._row(contender, rounds) for contender in self.contenders] if rounds else []

    def _row(self, contender: Contender, rounds: list[tuple[dict[str, dict[int, Sample]], list[int]]]) -> Row:
        name = contender.name
        samples = [done[name][batch] for done, batches in rounds for batch in batches]
        speed, ratio = self.speed(name)
        parts = [workload for workload in self.workloads if self.paired(workload)]
        compared, differing = self.differing(name)
        differences = []
        for index, at, plain, other in differing:
            gap = self.gaps.get((index, at, plain, other))
            near = gap is not None and gap <= self.near_tie
            differences.append(Difference(self.cases[index].id, at, plain, other, gap, near))
        fills = samples[0].fills
        handed = sum(n for sample in samples for passes in sample.per_pass for n, _ in passes)
        taken = sum(n for sample in samples for passes in sample.per_pass for _, n in passes)
        first_done, first_batches = rounds[0]
        # A round in which no text went past its first token has no pass to time.
        a_pass = [
            sum(done[name][batch].seconds - done[name][batch].first_token_seconds for batch in batches) / passes
            for done, batches in rounds
            if (passes := sum(done[name][batch].passes for batch in batches))
        ]
        return Row(
            name=name,
            kind=contender.kind,
            lossless=contender.lossless,
            prompts=compared,
            tokens=sum(first_done[name][batch].tokens for batch in first_batches),
            tokens_per_second=speed,
            ratio=ratio,
            ratio_by_workload={part: self.speed(name, part)[1] for part in parts} if len(parts) > 1 else {},
            tokens_per_pass=tokens_per_pass(samples),
            cold_tokens_per_pass=tokens_per_pass(self.cold.get(name, {}).values()),
            acceptance=taken / handed if handed and not fills else None,
            first_token_ms=1e3 * statistics.median(sample.first_token_seconds for sample in samples),
            ms_per_pass=1e3 * statistics.median(a_pass) if a_pass else None,
            kv_bytes=max((sample.kv_bytes for sample in samples if sample.kv_bytes), default=None),
            peak_bytes=max(sample.peak_bytes for sample in samples),
            identical=compared - len(differences),
            differences=tuple(differences),
            branches=max(sample.branches for sample in samples),
            rows_per_token=handed / taken if fills else None,
        )


def tokens_per_pass(samples: Iterable[Sample]) -> float | None:
    """Return new tokens a pass and sequence, the prompts' own tokens apart; None where there was no pass."""
    passes = tokens = 0
    for sample in samples:
        for count, done in zip(sample.counts, sample.per_pass, strict=True):
            passes += len(done)
            if done:
                tokens += sum(filled for _, filled in done) if sample.fills else count - 1
    return tokens / passes if passes else None


def _first_difference(plain: list[int], other: list[int]) -> tuple[int, int | None, int | None]:
    """Where two lists differ first, and what stands there."""
    at = next(
        (i for i, (one, two) in enumerate(zip(plain, other, strict=False)) if one != two), min(len(plain), len(other))
    )
    return at, plain[at] if at < len(plain) else None, other[at] if at < len(other) else None


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
