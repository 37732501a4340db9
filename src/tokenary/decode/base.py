"""The protocol of drafting, and the one loop that verifies every draft."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from tokenary.core.decoding import Decoding, Emission
from tokenary.core.method import Method
from tokenary.core.sampling import Chooser
from tokenary.core.tree import TokenTree
from tokenary.decode.scores import Scores
from tokenary.decode.width import DraftWidth
from tokenary.hf.cache import TokenCache
from tokenary.hf.generate import GenerateCall
from tokenary.hf.target import Target, attached


class Proposer(Method):
    """Drafts tokens; a target model accepts what it would have said itself.

    Subclasses implement `propose` and, if they learn, `observe`. An instance may keep what it learned over calls
    (its drafts change how fast, never what is generated); what belongs to one sequence is reset by `start`.

    A proposer is a ``custom_generate`` callable: ``model.generate(**inputs, custom_generate=TokenRecycling())``.

    Attributes
    ----------
    width : DraftWidth
        Decides how many nodes are drafted.
    """

    width: DraftWidth

    def prepare(self, vocab_size: int, tokenizer: Any | None) -> None:
        """Get ready for a model, once, before its first batch.

        Parameters
        ----------
        vocab_size : int
            Width of the model's logits.
        tokenizer : PreTrainedTokenizerBase or None
            That of the model, where it is known.
        """

    def start(self, contexts: Sequence[Sequence[int]]) -> None:
        """Begin with a new batch of sequences, given as token ids."""

    def join(self, contexts: Sequence[Sequence[int]]) -> None:
        """Go on with these sequences behind the others of the batch."""

    def propose(self, contexts: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """Draft at most `nodes` tokens for each sequence.

        Parameters
        ----------
        contexts : sequence of sequence of int
            All tokens so far; the last one is the root of the tree.
        nodes : int
            At least 1.
        """
        raise NotImplementedError

    def observe(self, tree: TokenTree, scores: Scores, paths: Sequence[Sequence[int]]) -> None:
        """See what the target said of every node, and which path of each tree was accepted."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the state of these sequences of the batch, in this order."""

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Run as the decoding loop of ``model.generate``; stopping criteria are called after every token."""
        call = GenerateCall(
            input_ids, model_kwargs.get("attention_mask"), generation_config, logits_processor, stopping_criteria
        )
        self.prepare(model.config.get_text_config().vocab_size, None)
        with attached(model):
            target = Target(model)
            given = model_kwargs.get("past_key_values")
            if isinstance(given, TokenCache):
                target.cache = given
            loop = Loop(target, call.prompts, call, call.max_new_tokens, call.end_tokens, self, call.stops)
            for _ in loop:
                pass
        return call.result([sequence.new_ids for sequence in loop.sequences])


class Loop:
    """The verify loop: draft, score, accept, commit; greedy or sampling, chains or trees, any batch.

    Every emitted token is the target's own choice given the tokens before it: a draft is accepted exactly where it
    equals that choice, so that the output does not depend on the proposer. Iterating runs it, a pass at a time;
    to cancel, stop iterating.

    Sequences may come and go instead: `join` those that were read in a target of their own, `step` through passes,
    `cancel` one. A sequence that ended leaves before the next pass. Neither changes what the others write.

    Parameters
    ----------
    target : Target
        The model, inside `attached`.
    prompts : sequence of sequence of int
        Token ids.
    chooser : Chooser
        Chooses tokens from logits.
    max_new_tokens : int
        At least 0.
    end_tokens : sequence of int
        Tokens that end a sequence; they are part of the output.
    proposer : Proposer, optional
        Without one, every pass yields one token.
    stops : callable, optional
        ``stops(row, ids)`` ends a sequence after any token.
    told : callable, optional
        ``told(row, logits, nodes, tokens)`` is told which tokens were chosen from which nodes' logits (W, V), before
        they are taken; the last ones may be left.

    Attributes
    ----------
    sequences : list of Decoding
        Those of `prompts`.
    batch : list of Decoding
        Those that are rows of the target, in order; the ones that ended leave before the next pass.
    limits : dict
        Most new tokens of sequences that have a limit of their own, by their index.
    """

    def __init__(
        self,
        target: Target,
        prompts: Sequence[Sequence[int]],
        chooser: Chooser,
        max_new_tokens: int,
        end_tokens: Sequence[int] = (),
        proposer: Proposer | None = None,
        stops: Callable[[int, Sequence[int]], bool] | None = None,
        told: Callable[[int, Tensor, Sequence[int], Sequence[int]], None] | None = None,
    ) -> None:
        self.target, self.chooser, self.proposer, self.stops, self.told = target, chooser, proposer, stops, told
        self.max_new_tokens, self.end_tokens = max_new_tokens, frozenset(end_tokens)
        self.batch: list[Decoding] = []
        self.limits: dict[int, int] = {}
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(prompts)]
        self.branches: list[list[Decoding]] = [[] for _ in prompts]
        self.peak_bytes = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        if self.max_new_tokens <= 0:
            return
        logits = yield from self.target.reading([sequence.ids for sequence in self.sequences])
        emissions = self.join(self.target, logits, self.sequences)
        while self.calibrate():
            pass
        while emissions:
            yield emissions
            emissions = self.step()

    @torch.inference_mode()
    def join(self, target: Target, logits: Tensor, sequences: Sequence[Decoding]) -> list[Emission]:
        """Take sequences into the batch, behind the others, and choose their first tokens.

        Parameters
        ----------
        target : Target
            Of the same model and methods; it has read these sequences, and is not used again.
        logits : Tensor
            After the last token of each, (B, V).
        sequences : sequence of Decoding
            Their indices name them to the chooser and to `stops`; nobody else in the batch has the same.
        """
        self._drop_finished()
        contexts = [sequence.ids for sequence in sequences]
        if self.batch:
            self.target.join(target)
        else:
            self.target = target
        if self.proposer is not None:
            (self.proposer.join if self.batch else self.proposer.start)(contexts)
        self.batch += sequences
        first = self.chooser(logits, [sequence.index for sequence in sequences], contexts)
        emissions = []
        for row, (sequence, token) in enumerate(zip(sequences, first, strict=True)):
            if self.told is not None:
                self.told(sequence.index, logits[row : row + 1], [0], [token])
            emissions.append(self._emit(sequence, [token], [False]))
        return emissions

    @torch.inference_mode()
    def step(self) -> list[Emission]:
        """Run a pass; nothing where every sequence has ended."""
        self._drop_finished()
        return self._pass(self.batch) if self.batch else []

    def cancel(self, sequence: Decoding) -> None:
        """End a sequence of the batch: it leaves before the next pass."""
        sequence.finish = "cancelled"

    @torch.inference_mode()
    def calibrate(self) -> bool:
        """Time one more pass where the proposer chooses its width by that; return whether there are more to time.

        Until all are timed nothing is drafted.
        """
        width = None if self.proposer is None else self.proposer.width
        if width is None or width.ready:
            return False
        width.measure(self._seconds)
        return not width.ready

    def _pass(self, live: list[Decoding]) -> list[Emission]:
        """Draft, score, accept and commit once."""
        began = time.perf_counter()
        contexts = [sequence.ids for sequence in live]
        width = None if self.proposer is None else self.proposer.width
        nodes = width.choose(len(live)) if width is not None and width.ready else 0
        if self.proposer is None or nodes == 0:
            tree = TokenTree.roots([ids[-1] for ids in contexts])
        else:
            tree = self.proposer.propose(contexts, nodes)
        scores = Scores(self.target.score(tree))
        paths, chosen = self._walk(tree, scores, live)
        sizes = tree.sizes
        for row, sequence in enumerate(live):
            if self.told is not None:
                self.told(sequence.index, scores.logits[row], paths[row], chosen[row])
            room = self.target.room(row)
            left = self._limit(sequence) - len(sequence.new_ids)
            count = min(len(paths[row]), left if room is None else min(room, left))
            paths[row], chosen[row] = paths[row][:count], chosen[row][:count]
            sequence.trace.per_pass.append((int(sizes[row]) - 1, count - 1))
        self.target.commit(paths)
        self.peak_bytes = max(self.peak_bytes, self.target.nbytes)
        if self.proposer is not None:
            self.proposer.observe(tree, scores, paths)
            self.proposer.width.record(time.perf_counter() - began, tree.width, sizes.tolist(), paths)
        return [
            self._emit(sequence, tokens, [True] * (len(tokens) - 1) + [False])
            for sequence, tokens in zip(live, chosen, strict=True)
        ]

    def _walk(self, tree: TokenTree, scores: Scores, live: list[Decoding]) -> tuple[list[list[int]], list[list[int]]]:
        """Follow the target's choices down each tree: accepted nodes, and the token chosen at each of them."""
        paths: list[list[int]] = [[0] for _ in live]
        chosen: list[list[int]] = [[] for _ in live]
        walking = list(range(len(live)))
        while walking:
            nodes = [paths[row][-1] for row in walking]
            if self.chooser.greedy:
                tokens = [int(scores.argmax[row, node]) for row, node in zip(walking, nodes, strict=True)]
            else:
                histories = [live[row].ids + chosen[row] for row in walking]
                tokens = self.chooser(scores.logits[walking, nodes], [live[row].index for row in walking], histories)
            still = []
            for row, node, token in zip(walking, nodes, tokens, strict=True):
                chosen[row].append(token)
                child = tree.child(row, node, token)
                if child >= 0:
                    paths[row].append(child)
                    still.append(row)
            walking = still
        return paths, chosen

    def _emit(self, sequence: Decoding, tokens: list[int], from_draft: list[bool]) -> Emission:
        """Append tokens to a sequence up to where it ends."""
        taken = 0
        for token, drafted in zip(tokens, from_draft, strict=True):
            sequence.ids.append(token)
            sequence.trace.from_draft.append(drafted)
            taken += 1
            if token in self.end_tokens or (self.stops is not None and self.stops(sequence.index, sequence.ids)):
                sequence.finish = "stop"
            elif len(sequence.new_ids) >= self._limit(sequence):
                sequence.finish = "length"
            if sequence.finish:
                break
        return Emission(sequence.index, tokens[:taken], from_draft[:taken], sequence.finish)

    def _limit(self, sequence: Decoding) -> int:
        """Most new tokens of a sequence."""
        return self.limits.get(sequence.index, self.max_new_tokens)

    def _drop_finished(self) -> None:
        """Take sequences that ended out of the batch; the last ones stay in the target, which will be another one."""
        rows = [row for row, sequence in enumerate(self.batch) if sequence.finish is None]
        if rows and len(rows) < len(self.batch):
            self.target.select_rows(rows)
            if self.proposer is not None:
                self.proposer.select_rows(rows)
        self.batch = [self.batch[row] for row in rows]

    def _seconds(self, rows: int) -> float:
        """Seconds of a pass over so many nodes, shared among the sequences and rolled back."""
        batch = len(self.batch)
        tree = TokenTree.chains([[0] * max(1, rows // batch)] * batch)
        began = time.perf_counter()
        _ = Scores(self.target.score(tree)).argmax
        seconds = time.perf_counter() - began
        self.target.commit([[]] * batch)
        return seconds
