"""How good filled masks are in the eyes of the model that filled them.

Filling several masks in one pass treats them as independent given the rest. What that costs shows when each filled
token is masked again, alone, and predicted from all the others::

    pseudo-nll = -1/n sum over the n filled positions i of log p(x_i | x without i)        nats a token
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tokenary.bench.measured import PLAIN, Measurement
from tokenary.models import LM

#: Sequences a pass.
BATCH = 16


@torch.inference_mode()
def pseudo_nll(lm: LM, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Nats a filled token.

    Parameters
    ----------
    lm : LM
        With a mask token.
    prompt : sequence of int
        What was given, with masks where something was to be filled.
    ids : sequence of int
        The whole text; what is behind the prompt was filled too.
    """
    mask, text = lm.model.config.mask_token_id, torch.tensor(list(ids))
    filled = torch.tensor(_filled(prompt, len(ids), mask))
    rows = text.repeat(len(filled), 1)
    rows[torch.arange(len(filled)), filled] = mask
    total = 0.0
    for part, at in zip(rows.split(BATCH), filled.split(BATCH), strict=True):
        logits = lm.model(part.to(lm.device), use_cache=False).logits[torch.arange(len(at)), at].float()
        total += float(cross_entropy(logits.cpu(), text[at], reduction="sum"))
    return total / len(filled)


def agreement(prompt: Sequence[int], one: Sequence[int], other: Sequence[int], mask: int) -> float:
    """Share of the filled positions at which two whole texts are the same; where one has ended they differ."""
    places = _filled(prompt, max(len(one), len(other)), mask)
    return sum(i < min(len(one), len(other)) and one[i] == other[i] for i in places) / len(places)


def _filled(prompt: Sequence[int], length: int, mask: int) -> list[int]:
    return [i for i in range(length) if i >= len(prompt) or prompt[i] == mask]


def filled_quality(lm: LM, measurement: Measurement) -> dict[str, dict[str, Any]]:
    """Measure the texts of the first round, each beside plain decoding's.

    Returns
    -------
    dict
        For each contender ``nats`` (pseudo-nll, mean over prompts), ``increase_nats`` over plain decoding and its
        standard error ``increase_stderr`` (paired), and ``same``, the mean `agreement` with it.
    """
    mask = lm.model.config.mask_token_id
    prompts = [case.token_ids for case in measurement.cases]
    texts: dict[str, list[list[int]]] = {contender.name: [] for contender in measurement.contenders}
    for case, prompt in enumerate(prompts):
        start = prompt.index(mask) if mask in prompt else len(prompt)  # where the answer begins
        for name, rows in texts.items():
            found = measurement.output(name, case)
            assert found is not None  # the measurement is complete
            rows.append([*prompt[:start], *found[0].token_ids[found[1]]])
    losses = {name: [pseudo_nll(lm, *pair) for pair in zip(prompts, rows, strict=True)] for name, rows in texts.items()}
    made = {}
    for name, own in losses.items():
        rises = [a - b for a, b in zip(own, losses[PLAIN], strict=True)]
        same = [agreement(*row, mask) for row in zip(prompts, texts[name], texts[PLAIN], strict=True)]
        made[name] = {
            "nats": statistics.fmean(own),
            "increase_nats": statistics.fmean(rises),
            "increase_stderr": statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0,
            "same": statistics.fmean(same),
        }
    return made
