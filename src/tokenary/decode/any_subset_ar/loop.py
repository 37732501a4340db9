"""The loop of ASSD: draft, verify, accept or draw anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenary.core.decoding import Decoding, Emission
from tokenary.core.sampling import Sampler, invert
from tokenary.core.seeding import substream
from tokenary.decode.any_subset_ar.streams import Streams
from tokenary.hf.strategy import Task
from tokenary.models.text_diffusion import TextDiffusionModel


def accept_drafts(p: Tensor, q: Tensor, drafts: Tensor, widths: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Accept a prefix of drafts drawn from `p` so that what results is distributed as `q`.

    Draft s is accepted with probability ``min(1, q_s[x_s] / p_s[x_s])``; the first one that is not is drawn anew from
    ``max(q_s - p_s, 0)``, normalised.

    Parameters
    ----------
    p, q : Tensor
        (B, k, V) probabilities; those of q given the drafts before.
    drafts, widths : Tensor
        (B, k) long, and how many of them count, (B,) long.
    numbers : Tensor
        (B, k, 2) uniform in [0, 1): for accepting, for drawing anew.

    Returns
    -------
    Tensor, Tensor
        How many are accepted, (B,); the token that takes the place of the next draft, (B,), without meaning where all
        are accepted.
    """
    p_x, q_x = (part.gather(2, drafts[..., None])[..., 0].double() for part in (p, q))
    steps = torch.arange(drafts.shape[1], device=drafts.device)
    passed = (numbers[..., 0] * p_x < q_x) & (steps < widths[:, None])
    accepted = passed.long().cumprod(1).sum(1)
    rows, at = torch.arange(len(p), device=p.device), accepted.clamp(max=drafts.shape[1] - 1)
    q_at = q[rows, at]
    residual = (q_at - p[rows, at]).clamp(min=0)
    # p = q up to rounding leaves nothing to draw from; the draft was then refused by rounding alone
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q_at)
    return accepted, torch.tensor(invert(residual, numbers[rows, at, 1].tolist()), device=p.device)


class NGram:
    """How often each token follows another in the known part of one sequence.

    Parameters
    ----------
    tokens : sequence of int
        The sequence; it may grow more known.
    known : sequence of int
        Positions that are known.
    """

    def __init__(self, tokens: Sequence[int], known: Sequence[int]) -> None:
        self._tokens, self._known = tokens, set[int]()
        self._unigrams: Counter[int] = Counter()
        self._bigrams: dict[int, Counter[int]] = {}
        for position in known:
            self.add(position)

    def add(self, position: int) -> None:
        """Count the token at a position that is now known, and its pairs with known neighbours."""
        self._known.add(position)
        self._unigrams[self._tokens[position]] += 1
        for left in (position - 1, position):
            if left in self._known and left + 1 in self._known:
                self._bigrams.setdefault(self._tokens[left], Counter())[self._tokens[left + 1]] += 1

    def probabilities(self, position: int, p: Tensor) -> None:
        """Write the distribution at a position, given the token on its left, into `p` (V,) of zeros."""
        left = self._tokens[position - 1] if position else None
        counts = self._bigrams.get(left, self._unigrams) if left is not None else self._unigrams
        if counts:
            p[list(counts)] = torch.tensor(list(counts.values()), dtype=p.dtype, device=p.device)
        else:  # nothing is known: any token
            p += 1
        p /= p.sum()


@dataclass
class Row:
    """One sequence under way.

    Parameters
    ----------
    sequence : Decoding
        What is reported.
    tokens : list of int
        All tokens by position, drafts and masks included.
    targets : list of int
        Masked positions, left to right: the order of decoding.
    numbers : ndarray
        (T, 3) uniform: for drafting, accepting and drawing anew at each position.
    pending : list of int
        Visible or decoded positions that the network has not read yet.
    table : NGram or None
        What the n-gram drafter knows.
    given : int
        Length of the prompt, its masks included.
    done : int
        Targets decoded.
    drafted : list of int
        Targets of the round.
    """

    sequence: Decoding
    tokens: list[int]
    targets: list[int]
    numbers: np.ndarray
    pending: list[int]
    table: NGram | None
    given: int
    done: int = 0
    drafted: list[int] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Rank of the next target: how many positions are visible or decoded."""
        return len(self.tokens) - len(self.targets) + self.done


class Filling:
    """Fills the masks of prompts, then writes `max_new_tokens` more; iterating runs a round at a time.

    A prompt with masks is a template: its answer begins at the first mask, and emissions say where tokens are placed.
    A trace counts every network call.

    Parameters
    ----------
    task : Task
        Prompts may hold mask tokens; `max_new_tokens` may be 0.
    k, drafter, verify, draft_temperature
        As in `ASSD`.
    name : str
        First name of the random numbers.
    """

    def __init__(
        self, task: Task, k: int, drafter: Literal["self", "ngram"], verify: bool, draft_temperature: float, name: str
    ) -> None:
        self.task, self.k, self.drafter = task, k, drafter
        self.verify, self.draft_temperature = verify, draft_temperature
        self.model = cast(TextDiffusionModel, task.model)
        mask_id = self.model.config.mask_token_id
        self.sequences: list[Decoding] = []
        self.branches: list[list[Decoding]] = [[] for _ in task.prompts]
        self.peak_bytes = 0
        self._live: list[Row] = []
        size = max(map(len, task.prompts)) + task.max_new_tokens
        masked = []
        for index, prompt in enumerate(task.prompts):
            tokens = [*prompt, *[mask_id] * task.max_new_tokens]
            visible = [i for i, token in enumerate(tokens) if token != mask_id]
            targets = [i for i, token in enumerate(tokens) if token == mask_id]
            template = mask_id in prompt
            sequence = Decoding(index, list(tokens if template else prompt), targets[0] if template else len(prompt))
            self.sequences.append(sequence)
            if not targets:
                sequence.finish = "length"
                continue
            names = (task.sampler.seed, name, task.sampler.first_row + index)
            numbers = substream(*names).random((len(tokens), 3))
            table = NGram(tokens, visible) if drafter == "ngram" else None
            self._live.append(Row(sequence, tokens, targets, numbers, visible, table, len(prompt)))
            masked.append([i >= len(tokens) or tokens[i] == mask_id for i in range(size)])
        self.streams = Streams(self.model, torch.tensor(masked, dtype=torch.bool).view(-1, size))

    def width(self, row: Row) -> int:
        """How many targets the next round takes from a sequence, as far as it has them; with `verify` always `k`."""
        return self.k

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        while self._live:
            for row in self._live:
                row.drafted = row.targets[row.done :][: self.width(row)]
            yield self._round()
            self.peak_bytes = max(self.peak_bytes, self.streams.cache.nbytes)

    def _round(self) -> list[Emission]:
        """Draft, and verify what is more than one token; decode at least as many tokens as passes."""
        if self.drafter == "ngram":
            return self._verify(self._look_up(), None)
        p, logits = self._draft()
        if not self.verify or self.k == 1:
            return self._finish([self._write(row, 0) for row in self._live])
        # one token, the last of its sequence, needs no verification
        more = [i for i, row in enumerate(self._live) if len(row.drafted) > 1]
        emissions = self._finish([self._write(row, 0) for row in self._live if len(row.drafted) == 1])
        return emissions + self._verify(p[more], logits[more, 0]) if more else emissions

    def _draft(self) -> tuple[Tensor, Tensor]:
        """Draw the drafts from one pass that shows them none of each other; return what from, and the logits."""
        logits = self._pass([row.pending for row in self._live], [[row.rank] * len(row.drafted) for row in self._live])
        cooled = torch.cat([logits[:, :1], logits[:, 1:] / self.draft_temperature], dim=1)
        p = probabilities(cooled, self.task.sampler)
        numbers = self._numbers(p.shape[1])[..., 0]
        drafts = invert(p.flatten(0, 1), numbers.flatten().tolist())
        for i, row in enumerate(self._live):
            row.pending = []
            for step, position in enumerate(row.drafted):
                row.tokens[position] = drafts[i * p.shape[1] + step]
        return p, logits

    def _look_up(self) -> Tensor:
        """Draw the drafts from the tables, each given its left neighbour; return what from."""
        width = max(len(row.drafted) for row in self._live)
        p = torch.zeros(len(self._live), width, self.model.config.vocab_size, device=self.model.device)
        for of_row, row in zip(p, self._live, strict=True):
            assert row.table is not None
            for p_step, position in zip(of_row, row.drafted, strict=False):
                row.table.probabilities(position, p_step)
                if self.task.sampler.greedy:
                    p_step.copy_(one_hot(p_step.argmax(), len(p_step)))
                row.tokens[position] = invert(p_step[None], [row.numbers[position, 0]])[0]
        return p

    def _verify(self, p: Tensor, first: Tensor | None) -> list[Emission]:
        """Ask for each draft's distribution given those before it; keep what passes, draw what comes then.

        `first` are the logits (B, V) that the first drafts were drawn from, where the same network drew them.
        """
        logits = self._pass(
            [row.pending + row.drafted[:-1] for row in self._live],
            [[row.rank + step for step in range(len(row.drafted))] for row in self._live],
        )
        q = probabilities(logits, self.task.sampler)
        size = q.shape[1]
        drafts = [[row.tokens[i] for i in row.drafted] + [0] * (size - len(row.drafted)) for row in self._live]
        widths = torch.tensor([len(row.drafted) for row in self._live], device=p.device)
        numbers = self._numbers(size)[..., 1:]
        if first is not None:  # its two distributions are one, so that it stands: each round decodes two or more
            off = (first.softmax(-1) - logits[:, 0].softmax(-1)).abs().max().item()
            assert off <= _tolerance(self.model.dtype), f"the passes differ by {off} on the first drafts"
            numbers[:, 0, 0] = -1
        accepted, tokens = accept_drafts(p[:, :size], q, torch.tensor(drafts, device=p.device), widths, numbers)
        emissions = []
        for row, count, token in zip(self._live, accepted.tolist(), tokens.tolist(), strict=True):
            row.sequence.trace.per_pass[-1] = (len(row.drafted), count)
            if count < len(row.drafted):
                row.tokens[row.drafted[count]] = token
                row.drafted = row.drafted[: count + 1]
            emissions.append(self._write(row, count))
        return self._finish(emissions)

    def _pass(self, contents: list[list[int]], seen: list[list[int]]) -> Tensor:
        """Run the network once for the drafted positions of all live sequences."""
        for row in self._live:
            row.sequence.trace.per_pass.append((0, 0))
        tokens, queries = [row.tokens for row in self._live], [row.drafted for row in self._live]
        return self.streams.run(tokens, contents, queries, seen)

    def _write(self, row: Row, accepted: int) -> Emission:
        """Commit the drafted positions of a sequence, the first `accepted` of which are verified drafts."""
        sequence, ids = row.sequence, row.sequence.ids
        row.pending = row.drafted[-1:] if self.verify else row.drafted
        row.done += len(row.drafted)
        placed: list[int] = []
        for position in row.drafted:
            if row.table is not None:
                row.table.add(position)
            ids[position : position + 1] = [row.tokens[position]]  # behind a prompt without masks this appends
            placed.append(position)
            if position >= row.given and self._ends(sequence, position):
                sequence.finish = "stop"
                del ids[position + 1 :]
                break
        if sequence.finish is None and row.done == len(row.targets):
            sequence.finish = "length"
        assert sequence.finish is None or sequence.trace.passes <= row.done, "more network calls than tokens"
        flags = [step < accepted for step in range(len(placed))]
        sequence.trace.from_draft += flags
        at = None if sequence.n_prompt == row.given else [position - sequence.n_prompt for position in placed]
        return Emission(sequence.index, [ids[position] for position in placed], flags, sequence.finish, at=at)

    def _ends(self, sequence: Decoding, position: int) -> bool:
        """Whether a sequence ends at a position behind its prompt."""
        stops = self.task.stops
        if sequence.ids[position] in self.task.end_tokens:
            return True
        return stops is not None and stops(sequence.index, sequence.ids[: position + 1])

    def _finish(self, emissions: list[Emission]) -> list[Emission]:
        """Take sequences that ended out of the batch."""
        kept = [i for i, row in enumerate(self._live) if row.sequence.finish is None]
        if kept and len(kept) < len(self._live):
            self.streams.select(kept)
        self._live = [self._live[i] for i in kept]
        return emissions

    def _numbers(self, width: int) -> Tensor:
        """Uniform numbers (B, width, 3) of the drafted positions."""
        numbers = np.zeros((len(self._live), width, 3))
        for of_row, row in zip(numbers, self._live, strict=True):
            of_row[: len(row.drafted)] = row.numbers[row.drafted]
        return torch.from_numpy(numbers).to(self.model.device)


def probabilities(logits: Tensor, sampler: Sampler) -> Tensor:
    """Return what is sampled from: float32 probabilities, shaped as the logits (B, k, V); greedy is a certainty."""
    if sampler.greedy:
        return one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return sampler.probabilities(logits.flatten(0, 1)).view_as(logits)


def _tolerance(dtype: torch.dtype) -> float:
    """How far two passes may round apart, as a probability."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 0.25
