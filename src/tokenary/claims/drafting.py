"""What the claims about drafting share: run a proposer over prompts, compare with greedy decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenary.core.claim import Figure
from tokenary.core.decoding import Decoding
from tokenary.core.sampling import Sampler
from tokenary.decode.base import Loop, Proposer
from tokenary.hf.target import Target, attached
from tokenary.models import LM


@dataclass(frozen=True)
class Drafted:
    """What a proposer did on some prompts, one sequence each."""

    sequences: list[Decoding]

    def rates(self, skip: int = 0) -> np.ndarray:
        """Tokens a pass of each prompt after the first `skip`."""
        return np.array([sequence.trace.tokens_per_pass for sequence in self.sequences[skip:]])

    def figure(self, name: str, skip: int = 0) -> Figure:
        """Mean of the rates, with its standard error."""
        return Figure.of(name, self.rates(skip))


def draft(lm: LM, prompts: Iterable[Sequence[int]], proposer: Proposer | None, max_new_tokens: int) -> Drafted:
    """Decode every prompt greedily, alone, with one proposer that keeps what it learns."""
    done = []
    with attached(lm.model):
        for prompt in prompts:
            loop = Loop(Target(lm.model), [prompt], Sampler(), max_new_tokens, lm.eos_token_ids, proposer)
            for _ in loop:
                pass
            done += loop.sequences
    return Drafted(done)


def differences(lm: LM, drafted: Drafted, plain: Drafted) -> dict[str, float | int]:
    """Count outputs that are not greedy's, and how near a tie the first differing choice was.

    Returns
    -------
    dict
        ``outputs``, ``identical``, and ``largest_gap``: over the outputs that differ, how far apart the model's
        own logits of the two tokens are; 0 if all are identical.
    """
    gaps = []
    for ours, theirs in zip(drafted.sequences, plain.sequences, strict=True):
        pairs = zip(ours.new_ids, theirs.new_ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is not None:
            with torch.inference_mode():
                ids = torch.tensor([theirs.ids[: theirs.n_prompt + at]], device=lm.device)
                logits = lm.model(ids, logits_to_keep=1).logits[0, -1].float()
            gaps.append(float((logits[theirs.new_ids[at]] - logits[ours.new_ids[at]]).abs()))
    count = len(plain.sequences)
    return {"outputs": count, "identical": count - len(gaps), "largest_gap": max(gaps, default=0.0)}
