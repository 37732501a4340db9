"""Writing many answers at once: the ids that the model chose are the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenary.core.sampling import Sampler, invert
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.models.lm import LM

#: Given the tokens written so far and the logits (V,), which tokens may not come next.
Ban = Callable[[Sequence[int], Tensor], Sequence[int]]


@dataclass(frozen=True)
class Request:
    """One answer to write.

    Parameters
    ----------
    prompt : int
        Index of its prompt; several answers share the reading of one.
    sampler : Sampler
        How tokens are chosen; its `first_row` names the random numbers, so that requests of equal ones share them.
    limit : int
        Most new tokens.
    ban : callable, optional
        Tokens to leave out, asked before every token.
    """

    prompt: int
    sampler: Sampler
    limit: int
    ban: Ban | None = None


@torch.inference_mode()
def write(lm: LM, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> list[list[int]]:
    """Write answers to prompts in one batch; return their ids without the end token."""
    written: list[list[int]] = [[] for _ in requests]
    ends, live = set(lm.eos_token_ids), list(range(len(requests)))
    with attached(lm.model):
        target = Target(lm.model)
        logits = target.prefill(prompts)[[request.prompt for request in requests]]
        target.select_rows([request.prompt for request in requests])
        while live:
            chosen = [choose(logits[n], requests[i], written[i]) for n, i in enumerate(live)]
            going = []
            for n, (i, token) in enumerate(zip(live, chosen, strict=True)):
                if token not in ends:
                    written[i].append(token)
                    if len(written[i]) < requests[i].limit:
                        going.append(n)
            if not going:
                break
            if len(going) < len(live):
                target.select_rows(going)
                live = [live[n] for n in going]
            logits = target.score(TokenTree.roots([written[i][-1] for i in live]))[:, 0]
            target.commit([[0]] * len(live))
    return written


def choose(logits: Tensor, request: Request, written: Sequence[int]) -> int:
    """Choose the next token of one answer from logits (V,)."""
    sampler = request.sampler
    if request.ban is not None:
        banned = request.ban(written, logits)
        if banned:
            logits = logits.index_fill(0, torch.tensor(list(banned), device=logits.device), -torch.inf)
    if sampler.greedy:
        return int(logits.argmax())
    # The likeliest alone are sorted: a whole vocabulary costs as much as the pass.
    index = logits.topk(min(sampler.top_k or len(logits), len(logits))).indices
    number = substream(sampler.seed, "answer", sampler.first_row, len(written)).random()
    return int(index[invert(sampler.probabilities(logits[index][None]), [number])[0]])
