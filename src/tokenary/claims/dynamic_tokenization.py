"""Dynamic tokenization: a prompt shortened by merges costs less than one shortened by dropping its oldest tokens."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.data import prose, stdlib_code, udhr
from tokenary.run import load
from tokenary.tokenize.base import TextTokenizer, load_tokenizer
from tokenary.tokenize.dynamic_tokenization import (
    DynamicTokenization,
    LargeVocabulary,
    Merged,
    OutputIndex,
    PairRules,
    merge_batch,
    merges_for,
)

BATCH = 4
JUDGED = ("ridge", "drop oldest", "random", "mean", "last")


def run(
    seed: int = 0,
    texts: int = 12,
    prefix: int = 256,
    following: int = 64,
    cuts: Sequence[float] = (0.2, 0.1, 0.3),
    code: bool = False,
) -> Outcome:
    """Measure the loss of the tokens behind a shortened prompt, in float32, over that behind the whole one.

    Parameters
    ----------
    seed : int
        Of the random merges; chooses the code that is read.
    texts : int
        Windows of the text, merged as one batch.
    prefix, following : int
        Tokens of each that are shortened, and that are then predicted as they are.
    cuts : sequence of float
        Shares of the prefix that are saved; the first is judged, for the others there are fewer controls.
    code : bool
        Python source instead of prose.
    """
    lm, tokenizer = load("smollm2", dtype="float32"), load_tokenizer("smollm2")
    ids = tokenizer.encode(stdlib_code(seed, 400_000) if code else prose())
    size = prefix + following
    starts = [int(start) for start in np.linspace(0, len(ids) - size, texts)]
    prompts = [ids[start : start + prefix].tolist() for start in starts]
    behind = torch.tensor(np.stack([ids[start + prefix : start + size] for start in starts]), dtype=torch.int64)
    attached: dict[str, Any] = {
        kind: DynamicTokenization(rows=kind).attach(lm.model, tokenizer) for kind in ("ridge", "mean", "last")
    }
    table, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()

    @torch.inference_mode()
    def loss(merged: Merged, kind: str, states: list[torch.Tensor] | None = None) -> np.ndarray:
        """Mean loss of the tokens behind each prompt, in nats; the hidden states before them go to `states`."""
        found = []
        for at in range(0, texts, BATCH):
            inputs = attached[kind].embed(replace(merged, rows=merged.rows[at : at + BATCH]))
            wanted = behind[at : at + BATCH]
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(wanted)], dim=1)
            hidden = lm.model.base_model(
                inputs_embeds=torch.cat([inputs["inputs_embeds"], table(wanted)], dim=1),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            ).last_hidden_state[:, -following - 1 : -1]
            found += cross_entropy(head(hidden).float().transpose(1, 2), wanted, reduction="none").mean(-1).tolist()
            if states is not None:
                states.append(hidden.flatten(0, 1))
        return np.array(found)

    rules = PairRules(tokenizer, "sentence")
    states: list[torch.Tensor] = []
    limit = merge_batch(prompts, rules)
    full = loss(limit.after(0), "mean", states)

    def rises(merged: Merged, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Rise of each text's loss over that behind its whole prompt, at the length that the merges leave."""
        lengths = [len(row) for row in merged.rows]
        arms = {kind: (merged, kind) for kind in attached}
        dropped = [prompt[prefix - length :] for prompt, length in zip(prompts, lengths, strict=True)]
        arms["drop oldest"] = merge_batch(dropped, rules, 0), "mean"
        arms["random"] = _random(prompts, lengths, seed, merged.base), "mean"
        return {name: loss(*arms[name]) - full for name in names}

    found = {str(cut): rises(limit.after(_merges(limit, cut)), JUDGED[: 5 if cut == cuts[0] else 2]) for cut in cuts}
    judged = found[str(cuts[0])]
    words = merge_batch(prompts, PairRules(tokenizer, "word"))
    within = words.after(_merges(words, cuts[0]))

    def figure(name: str) -> Figure:
        return Figure.of(name, judged[name])

    bytes_behind = float(tokenizer.byte_lengths[behind.numpy()].sum()) / behind.numel()
    read = {"text": prompts} | {
        name: [tokenizer.encode(article).tolist() for article in udhr(name).values()] for name in ("eng", "deu_1996")
    }
    return Outcome(
        method=figure("ridge"),
        baseline=figure("drop oldest"),
        controls=(Figure("none", 0.0), *map(figure, JUDGED[2:])),
        n=texts,
        paired_spread=standard_error(judged["ridge"] - judged["drop oldest"]),
        details={
            "full_nll": float(full.mean()),
            "full_bits_a_byte": float(full.mean()) / math.log(2) / bytes_behind,
            "rise": {cut: {name: float(v.mean()) for name, v in arms.items()} for cut, arms in found.items()},
            "within_words": {
                "saved": 1 - within.lengths[-1] / within.lengths[0],
                "rise": {name: float(v.mean()) for name, v in rises(within, JUDGED).items()},
            },
            "reachable_reduction": {name: _reachable(rows, tokenizer) for name, rows in read.items()},
            "prefill_time": _prefill_time(lm, tokenizer, prompts[:BATCH], cuts[0], attached["ridge"].cache.predict),
            "index_recall": _recall(tokenizer, limit, torch.cat(states), attached["ridge"].cache.predict, table),
        },
    )


def _merges(limit: Merged, cut: float) -> int:
    """Return the fewest merges that save a share of all tokens; all merges, if they do not."""
    return merges_for(limit.lengths, min(1.0, cut * limit.lengths[0] / (limit.lengths[0] - limit.lengths[-1])))


def _reachable(rows: Sequence[Sequence[int]], tokenizer: TextTokenizer) -> dict[str, float]:
    """Return which share of the tokens all merges within a boundary save."""
    found = {}
    for boundary in ("pretokens", "word", "word-hyphen"):
        curve = merge_batch(rows, PairRules(tokenizer, boundary)).lengths
        found[boundary] = 1 - curve[-1] / curve[0]
    return found


@torch.inference_mode()
def _prefill_time(lm: Any, tokenizer: TextTokenizer, prompts: list[list[int]], cut: float, predict: Any) -> float:
    """Time of merging, predicting rows without a cache, and reading the prompts, over that of reading them whole."""
    merges = _merges(merge_batch(prompts, PairRules(tokenizer, "sentence")), cut)
    method, whole = DynamicTokenization(merges=merges, boundary="sentence"), torch.tensor(prompts)
    ratios = []
    for _ in range(4):
        began = time.perf_counter()
        lm.model.base_model(input_ids=whole)
        between = time.perf_counter()
        lm.model.base_model(**method.attach(lm.model, tokenizer, predict)(prompts)[0])
        ratios.append((time.perf_counter() - between) / (between - began))
    return float(np.median(ratios[1:]))


def _recall(tokenizer: TextTokenizer, limit: Merged, states: torch.Tensor, predict: Any, table: Any) -> float | None:
    """Return how often an index that searches an eighth of its leaves finds the best of all tokens, merged ones too."""
    if not importlib.util.find_spec("faiss"):
        return None
    large = LargeVocabulary(tokenizer, limit.after(_merges(limit, 0.3)))
    rows = torch.cat([table.weight.detach()[: large.base], predict(large.parts)])
    return OutputIndex(rows, leaves=200, searched=25).recall(states)


def _random(prompts: Sequence[Sequence[int]], lengths: Sequence[int], seed: int, base: int) -> Merged:
    """Join neighbours that are drawn at random, until every prompt has its length."""
    rows: list[list[int]] = []
    pairs: list[tuple[int, int]] = []
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        stream = substream(seed, "dynamic tokenization claim", number)
        joined = set(stream.choice(np.arange(1, len(prompt)), len(prompt) - length, replace=False).tolist())
        row: list[int] = []
        for at, id in enumerate(prompt):
            if at in joined:
                pairs.append((row[-1], id))
                row[-1] = base + len(pairs) - 1
            else:
                row.append(id)
        rows.append(row)
    return Merged(rows, base, pairs, [])


CLAIM = Claim(
    slug="dynamic-tokenization",
    statement="Behind a prompt of which merges save 20% of the tokens, with rows from a ridge regression, SmolLM2 "
    "predicts real text at least 0.01 nats a token better than behind one whose oldest 20% were dropped",
    metric="rise of the loss of the next 64 tokens over the whole prompt, nats a token",
    direction="lower",
    threshold=0.01,
    effect="difference",
    run=run,
    variation="Python source instead of prose",
    held_out={"code": True},
    minutes=10,
    fast={"texts": 4, "prefix": 96, "following": 32, "cuts": (0.2,)},
)
