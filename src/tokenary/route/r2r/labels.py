"""Automatic labels: which tokens of the small model would change where the large model's text goes.

At each position of the large model's own answer where the small model would write another token, the large model
continues twice to the end of the sentence: from its own token (A: the answer itself) and from the small model's (B).
One model continues both, so the difference is the effect of that one token. A judge says whether it counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.route.r2r.router import entropy, top_logits

SENTENCE = 24  # tokens at most
_COMMON = """
a an the and or but of to in on at by for with from as is are was were be been being it its this that these those i you
he she they we his her their your our my me him them which who what there here so such can could will would may might
should do does did has have had also very more most some any each other than then into about over if when while how one
"""
_STOP = frozenset(_COMMON.split())
_NEGATION = re.compile(r"\b(?:no|not|never|none|nor|neither|without|cannot|\w+n't)\b")


def overlap(a: str, b: str) -> float:
    """F1 of the content words of two texts: first six letters, common words left out; 1 where neither has any."""
    one, other = (
        Counter(word[:6] for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in _STOP) for text in (a, b)
    )
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0


def divergent(a: str, b: str, threshold: float = 0.45) -> bool:
    """Judge two endings of one sentence: whether they say different things.

    The stand-in for a large judge model. They differ where their numbers or the count of their negations differ, or
    where the `overlap` of their content words is below the threshold.
    """
    a, b = a.lower().replace("\u2019", "'"), b.lower().replace("\u2019", "'")
    if Counter(re.findall(r"\d+(?:\.\d+)?", a)) != Counter(re.findall(r"\d+(?:\.\d+)?", b)):
        return True
    return len(_NEGATION.findall(a)) != len(_NEGATION.findall(b)) or overlap(a, b) < threshold


def ends_sentence(piece: str) -> bool:
    """Whether a token's text ends a sentence."""
    return "\n" in piece or piece.rstrip().endswith((".", "!", "?"))


class Labelled(NamedTuple):
    """Positions of one answer: what the router sees of each, and its label."""

    positions: np.ndarray  # (n,) int64, places in the answer's tokens
    hidden_states: np.ndarray  # (n, d) float16, the small model's
    tokens: np.ndarray  # (n,) int64, the small model's
    top_logits: np.ndarray  # (n, 100) float16
    entropy: np.ndarray  # (n,) float32
    mismatch: np.ndarray  # (n,) bool: the small model's token is not the large one's
    label: np.ndarray  # (n,) bool: divergent


@torch.inference_mode()
def label(
    large: PreTrainedModel,
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    answer: Sequence[int],
    end_tokens: Sequence[int],
    *,
    most: int = 12,
    name: int = 0,
    judge: Callable[[str, str], bool] = divergent,
) -> Labelled:
    """Label positions of one greedy answer of the large model.

    Parameters
    ----------
    large, small : PreTrainedModel
        With the same tokens.
    tokenizer : PreTrainedTokenizerBase
        Theirs.
    prompt, answer : sequence of int
        Token ids.
    end_tokens : sequence of int
        Tokens that end an answer.
    most : int
        About how many mismatches are continued; of a longer answer a random part of all positions is taken, so that
        their share stays what it is.
    name : int
        Names the random numbers.
    judge : callable
        ``judge(a, b)`` says whether two endings differ.
    """
    ids, start = [*prompt, *answer], len(prompt)
    output: Any = small.base_model(torch.tensor([ids[:-1]], device=small.device), use_cache=False)
    hidden = output.last_hidden_state[0, start - 1 :]
    head: Any = small.get_output_embeddings()
    logits = head(hidden)  # (len(answer), V)
    chosen = logits.argmax(-1)
    pieces = [str(tokenizer.decode([token])) for token in answer]
    stops = [at for at, token in enumerate(answer) if token in end_tokens or ends_sentence(pieces[at])]
    whole = (stops[-1] if stops else -1) + 1  # what comes after has no complete sentence to compare with
    mismatch = (chosen != torch.tensor(list(answer), device=chosen.device)).cpu().numpy()
    share = min(1.0, most / max(int(mismatch[:whole].sum()), 1))
    positions = np.flatnonzero(substream(0, "r2r labels", name).random(whole) < share)
    labels = np.zeros(len(positions), bool)
    asked = [at for at, position in enumerate(positions) if mismatch[position]]
    places = [int(positions[at]) for at in asked]
    others = chosen[places].tolist()
    endings = _continue(large, tokenizer, ids, [start + place for place in places], others, end_tokens)
    for at, place, ending in zip(asked, places, endings, strict=True):
        stop = min(next(s for s in stops if s >= place) + 1, place + SENTENCE)
        word = place  # both texts begin with the word that the token stands in
        while word > 0 and not pieces[word][:1].isspace() and not pieces[word - 1][-1:].isspace():
            word -= 1
        a, b = (str(tokenizer.decode([*answer[word:place], *end])) for end in (answer[place:stop], ending))
        labels[at] = judge(a, b)
    return Labelled(
        positions,
        hidden[positions].half().cpu().numpy(),
        chosen[positions].cpu().numpy(),
        top_logits(logits[positions]).half().cpu().numpy(),
        entropy(logits[positions]).cpu().numpy(),
        mismatch[positions],
        labels,
    )


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    places: Sequence[int],
    tokens: Sequence[int],
    end_tokens: Sequence[int],
) -> list[list[int]]:
    """Put another token at each place of a text and continue greedily to the end of the sentence."""
    texts = [[token] for token in tokens]
    if not places:
        return texts
    with attached(model):
        target = Target(model)
        target.prefill([ids[: max(places)]])  # the text is read once; every row holds its own beginning of it
        target.select_rows([0] * len(places))
        for layer in target.cache.token_layers:
            layer.held, layer.committed = list(places), list(places)
        target.lengths = list(places)
        live = list(range(len(places)))
        while True:
            rows = [
                row
                for row, text in enumerate(live)
                if len(texts[text]) < SENTENCE
                and texts[text][-1] not in end_tokens
                and not ends_sentence(str(tokenizer.decode(texts[text][-1:])))
            ]
            if not rows:
                return texts
            if len(rows) < len(live):
                target.select_rows(rows)
                live = [live[row] for row in rows]
            logits: Tensor = target.score(TokenTree.roots([texts[text][-1] for text in live]))[:, 0]
            target.commit([[0]] * len(live))
            for text, token in zip(live, logits.argmax(-1).tolist(), strict=True):
                texts[text].append(token)
