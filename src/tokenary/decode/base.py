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
    ) -> None:
        self.target, self.chooser, self.proposer, self.stops = target, chooser, proposer, stops
        self.max_new_tokens, self.end_tokens = max_new_tokens, frozenset(end_tokens)
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(prompts)]
        self.branches: list[list[Decoding]] = [[] for _ in prompts]
        self.peak_bytes = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        if self.max_new_tokens <= 0:
            return
        live = list(self.sequences)
        contexts = [sequence.ids for sequence in live]
        if self.proposer is not None:
            self.proposer.start(contexts)
        logits = self.target.prefill(contexts)
        first = self.chooser(logits, [s.index for s in live], contexts)
        if self.proposer is not None:
            self.proposer.width.calibrate(self._measure, len(live))
        yield [self._emit(sequence, [token], [False]) for sequence, token in zip(live, first, strict=True)]
        live = self._drop_finished(live)
        while live:
            yield self._pass(live)
            live = self._drop_finished(live)

    def _pass(self, live: list[Decoding]) -> list[Emission]:
        """Draft, score, accept and commit once."""
        began = time.perf_counter()
        contexts = [sequence.ids for sequence in live]
        nodes = 0 if self.proposer is None else self.proposer.width.choose(len(live))
        if self.proposer is None or nodes == 0:
            tree = TokenTree.roots([ids[-1] for ids in contexts])
        else:
            tree = self.proposer.propose(contexts, nodes)
        scores = Scores(self.target.score(tree))
        paths, chosen = self._walk(tree, scores, live)
        sizes = tree.sizes
        for row, sequence in enumerate(live):
            room = self.target.room(row)
            left = self.max_new_tokens - len(sequence.new_ids)
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
            elif len(sequence.new_ids) >= self.max_new_tokens:
                sequence.finish = "length"
            if sequence.finish:
                break
        return Emission(sequence.index, tokens[:taken], from_draft[:taken], sequence.finish)

    def _drop_finished(self, live: list[Decoding]) -> list[Decoding]:
        """Take sequences that ended out of the batch."""
        rows = [row for row, sequence in enumerate(live) if sequence.finish is None]
        if rows and len(rows) < len(live):
            self.target.select_rows(rows)
            if self.proposer is not None:
                self.proposer.select_rows(rows)
        return [live[row] for row in rows]

    def _measure(self, width: int) -> float:
        """Seconds of a pass of `width` nodes a sequence, rolled back; the best of three."""
        batch = len(self.sequences)
        tree = TokenTree.chains([[0] * width] * batch)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            _ = Scores(self.target.score(tree)).argmax
            times.append(time.perf_counter() - began)
            self.target.commit([[]] * batch)
        return min(times)
