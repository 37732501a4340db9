"""What was measured of several recipes on the same prompts, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenary.bench.contender import Contender, Sample

PLAIN = "plain"


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
