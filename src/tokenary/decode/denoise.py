"""The one loop of masked-diffusion models: which masks are filled, and which positions are computed, are methods.

The text is a prompt and masks. Each pass predicts the masked positions given everything else; an `Unmasker` says which
predictions are committed; a committed token never changes. A `Window` says which positions a pass computes and which it
attends to; without one every pass computes all of them. Blocks are filled left to right (semi-autoregressive, as in
Nie et al. 2025, arXiv 2502.09992)::

    x0_i = argmax of the logits, or a sample          c_i = softmax(logits_i)[x0_i] in float64
    candidates = masked positions of the leftmost block that holds a mask, among the computed ones

A prompt may hold mask tokens itself: then it is a template, and the answer begins at its first mask. Random numbers are
named by (seed, row, position, pass).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenary.core.decoding import Decoding, Emission, Trace
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.method import Method
from tokenary.core.sampling import invert
from tokenary.core.seeding import substream
from tokenary.hf.scatter_cache import ScatterCache, check_scatter, scatter_pass
from tokenary.hf.strategy import Task


@dataclass(frozen=True)
class Candidates:
    """What an unmasker chooses from.

    Parameters
    ----------
    tokens : Tensor
        (B, T) long, the prediction at each candidate.
    confidence : Tensor
        (B, T) float64, the probability of the prediction; -inf where there is no candidate.
    rows : tuple of int
        Numbers of these sequences over all batches, which name random numbers.
    step : int
        Passes before this one.
    """

    tokens: Tensor
    confidence: Tensor
    rows: tuple[int, ...]
    step: int

    @property
    def eligible(self) -> Tensor:
        """Where the candidates are, (B, T) bool."""
        return self.confidence.isfinite()


class Unmasker(Method):
    """Chooses which predictions are committed.

    Attributes
    ----------
    block : int
        New tokens a block, counted from the end of the prompt; a template's own masks are before them, in blocks
        counted from the start. 0 makes the whole text one block.
    """

    block: int = 32

    def unmask(self, candidates: Candidates) -> Tensor:
        """Choose from the candidates of each sequence, at least one; (B, T) bool."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pass:
    """Positions of one pass over one sequence, each (n,) long and ascending; None for all.

    Parameters
    ----------
    computed : Tensor or None
        Whose hidden states are computed, and whose keys and values are written.
    attended : Tensor or None
        Whose keys and values are looked at.
    """

    computed: Tensor | None = None
    attended: Tensor | None = None


class WindowState:
    """The window of one sequence."""

    def plan(self, masked: Tensor, fresh: Tensor) -> Pass:
        """Choose the positions of the next pass.

        Parameters
        ----------
        masked : Tensor
            (T,) bool, what is still masked.
        fresh : Tensor
            (T,) bool, what the last pass committed; nothing before the first.
        """
        raise NotImplementedError


class Window(Method):
    """Chooses which positions a pass computes and attends to.

    Attributes
    ----------
    everything : dict
        Options under which the window leaves nothing out, so that the full decoder must come out.
    early_stop : bool
        Drop what stands behind an end token as soon as it is committed, and compute everything anew.
    """

    everything: dict[str, int] = {}  # noqa: RUF012 (never changed)
    early_stop: bool = False

    def begin(self) -> WindowState:
        """Return the state of a new sequence."""
        raise NotImplementedError


class _Text:
    """One sequence under way: its tokens, what is masked, how far it is filled from the left."""

    def __init__(self, ids: list[int], n_given: int, mask: int, device: torch.device) -> None:
        self.ids = torch.tensor(ids, device=device)
        self.masked = self.ids == mask
        self.fresh = torch.zeros_like(self.masked)
        self.n_given = n_given
        self.settled = int(self.masked.int().argmax()) if bool(self.masked.any()) else len(ids)

    def candidates(self, block: int, computed: Tensor | None) -> Tensor:
        """Masked positions of the leftmost block that holds a mask, among the computed ones, (T,) bool."""
        eligible = self.masked
        if block:
            # blocks begin at the end of the prompt; a template's own masks come first, in blocks from its start
            gaps = self.settled < self.n_given
            base = 0 if gaps else self.n_given
            end = base + ((self.settled - base) // block + 1) * block
            end = min(end, self.n_given) if gaps else end
            eligible = eligible & (torch.arange(len(eligible), device=eligible.device) < end)
        if computed is not None:
            inside = torch.zeros_like(eligible)
            inside[computed] = True
            eligible = eligible & inside
        return eligible


class Denoise:
    """The loop: predict, choose, commit, until no mask is left or an end token closes the text.

    It satisfies `tokenary.core.decoding.Running`. A trace counts passes (NFE), with the positions that each computed
    and the tokens that it committed. With a window, sequences are written one after the other; without one, together.
    An end token closes a text once everything before it is filled; what was written behind it is dropped.

    Parameters
    ----------
    task : Task
        Model of the kind ``diffusion``, prompts and sampler.
    unmasker : Unmasker, optional
        By default one token a pass, in blocks of 32.
    window : Window, optional
        By default every pass computes everything.

    Raises
    ------
    UnsupportedModelError
        If the model has no mask token, or no attention that a window can work with.
    """

    def __init__(self, task: Task, unmasker: Unmasker | None = None, window: Window | None = None) -> None:
        from tokenary.decode.confidence import Confidence

        mask = getattr(task.model.config, "mask_token_id", None)
        if mask is None:
            raise UnsupportedModelError(
                f"{type(task.model).__name__} has no mask token: it is no masked-diffusion model"
            )
        if window is not None:
            check_scatter(task.model)
        self.task, self.mask = task, int(mask)
        self.unmasker, self.window = unmasker or Confidence(), window
        self.sequences, self._texts = [], []
        for row, prompt in enumerate(task.prompts):
            ids = [*prompt, *[self.mask] * task.max_new_tokens]
            text = _Text(ids, len(prompt), self.mask, task.model.device)
            self._texts.append(text)
            self.sequences.append(Decoding(row, ids, min(text.settled, len(prompt)), Trace(fills=True)))
        self.branches: list[list[Decoding]] = [[] for _ in task.prompts]
        self.peak_bytes = 0

    def __iter__(self) -> Iterator[list[Emission]]:
        rows = [s.index for s in self.sequences if self._texts[s.index].masked.any()]
        for group in [rows] if self.window is None else [[row] for row in rows]:
            yield from self._write(group)

    @torch.inference_mode()
    def _write(self, rows: list[int]) -> Iterator[list[Emission]]:
        """Write some sequences together, or one over a window."""
        state, cache, step = None if self.window is None else self.window.begin(), None, 0
        while rows:
            texts = [self._texts[row] for row in rows]
            if state is None:
                candidates, computed = self._full(rows, step), [len(text.ids) for text in texts]
            else:
                assert self.window is not None
                if cache is None:
                    cache = ScatterCache(self.task.model.config, len(texts[0].ids))
                chosen = state.plan(texts[0].masked, texts[0].fresh)
                candidates = self._windowed(rows[0], step, chosen, cache)
                computed = [len(texts[0].ids) if chosen.computed is None else len(chosen.computed)]
                self.peak_bytes = max(self.peak_bytes, cache.nbytes)
            commit = self.unmasker.unmask(candidates) & candidates.eligible
            if not bool(commit.any(1).all()):
                raise RuntimeError(f"{self.unmasker.card.slug} committed nothing in pass {step}")
            yield [self._commit(row, commit[at], candidates.tokens[at], computed[at]) for at, row in enumerate(rows)]
            rows, step = [row for row in rows if self.sequences[row].finish is None], step + 1
            if cache is not None and rows and self.window.early_stop and self._cut(rows[0]):  # type: ignore[union-attr]
                state, cache = self.window.begin(), None  # type: ignore[union-attr]

    def _full(self, rows: list[int], step: int) -> Candidates:
        """Compute every position of some sequences, shorter ones padded on the right."""
        texts = [self._texts[row] for row in rows]
        longest = max(len(text.ids) for text in texts)
        ids = torch.full((len(texts), longest), self.mask, device=self.task.model.device)
        real, eligible = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for at, text in enumerate(texts):
            ids[at, : len(text.ids)], real[at, : len(text.ids)] = text.ids, True
            eligible[at, : len(text.ids)] = text.candidates(self.unmasker.block, None)
        columns = eligible.any(0).nonzero()[:, 0]  # the head runs on these only
        logits = self.task.model(
            input_ids=ids,
            attention_mask=None if bool(real.all()) else real,
            use_cache=False,
            logits_to_keep=columns,
        ).logits
        return self._candidates(logits, columns, eligible, rows, step)

    def _windowed(self, row: int, step: int, chosen: Pass, cache: ScatterCache) -> Candidates:
        """Compute the chosen positions of one sequence."""
        text = self._texts[row]
        eligible = text.candidates(self.unmasker.block, chosen.computed)
        columns = eligible.nonzero()[:, 0]
        cache.begin(chosen.computed, chosen.attended)
        logits = scatter_pass(self.task.model, cache, text.ids[None], columns)
        return self._candidates(logits, columns, eligible[None], [row], step)

    def _candidates(
        self, logits: Tensor, columns: Tensor, eligible: Tensor, rows: Sequence[int], step: int
    ) -> Candidates:
        """Predict from logits (B, K, V) at `columns` (K,); what is not eligible (B, T) gets no confidence."""
        logits[..., self.mask] = float("-inf")  # a mask is no token
        sampler = self.task.sampler
        names = tuple(sampler.first_row + row for row in rows)
        if sampler.greedy:
            best = logits.argmax(-1)
        else:
            flat = sampler.probabilities(logits.flatten(0, 1))
            last = int(columns[-1]) + 1
            numbers = [
                # the i-th number of the stream belongs to position i, whichever positions are asked for
                substream(sampler.seed, "denoise", name, step).random(last)[columns.cpu().numpy()]
                for name in names
            ]
            best = torch.tensor(invert(flat, [n for row in numbers for n in row]), device=logits.device)
            best = best.view(logits.shape[:2])
        exact = logits.double()
        found = (exact.gather(-1, best[..., None])[..., 0] - exact.logsumexp(-1)).exp()  # (B, K)
        tokens = torch.zeros_like(eligible, dtype=torch.long)
        confidence = torch.full(eligible.shape, float("-inf"), dtype=torch.float64, device=logits.device)
        tokens[:, columns], confidence[:, columns] = best, found
        return Candidates(tokens, confidence.masked_fill(~eligible, float("-inf")), names, step)

    def _commit(self, row: int, commit: Tensor, tokens: Tensor, computed: int) -> Emission:
        """Write the committed tokens of one sequence, and see whether it ends."""
        text, sequence = self._texts[row], self.sequences[row]
        size = len(text.ids)
        commit = commit[:size]
        text.ids = torch.where(commit, tokens[:size], text.ids)
        text.masked, text.fresh = text.masked & ~commit, commit
        at = commit.nonzero()[:, 0].tolist()
        new = text.ids[commit].tolist()
        for position, token in zip(at, new, strict=True):
            sequence.ids[position] = token
        sequence.trace.per_pass.append((computed, len(at)))
        sequence.trace.from_draft += [False] * len(at)
        masked = text.masked.nonzero()[:1, 0].tolist()
        before, text.settled = text.settled, masked[0] if masked else size
        for position in range(max(before, text.n_given), text.settled):
            stopped = self.task.stops is not None and self.task.stops(row, sequence.ids[: position + 1])
            if stopped or sequence.ids[position] in self.task.end_tokens:
                sequence.finish = "stop"
                del sequence.ids[position + 1 :]
                break
        if sequence.finish is None and not masked:
            sequence.finish = "length"
        places = [position - sequence.n_prompt for position in at]
        return Emission(row, new, [False] * len(at), sequence.finish, at=places)

    def _cut(self, row: int) -> bool:
        """Drop everything behind the first end token, whatever before it is still masked."""
        text, sequence = self._texts[row], self.sequences[row]
        ends = torch.isin(text.ids, torch.tensor(list(self.task.end_tokens), device=text.ids.device)) & ~text.masked
        ends[: text.n_given] = False
        where = ends.nonzero()[:1, 0].tolist()
        if not where or where[0] + 1 == len(text.ids):
            return False
        size = where[0] + 1
        text.ids, text.masked, text.fresh = text.ids[:size], text.masked[:size], text.fresh[:size]
        del sequence.ids[size:]
        return True


def most_confident(confidence: Tensor) -> Tensor:
    """Mark the most confident candidate of each row, the leftmost among equals; (B, T) bool."""
    first = confidence.argmax(-1, keepdim=True)
    return torch.zeros_like(confidence, dtype=torch.bool).scatter_(-1, first, True)
