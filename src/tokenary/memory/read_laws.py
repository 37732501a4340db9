"""The laws of reading: nothing is lost, a query reads no more than it may, and what it reads is its own affair.

They run with the `toy_options` of a method, so that something is left out of a short text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.core.errors import UnsupportedModelError
from tokenary.core.laws import (
    LawFunction,
    Make,
    NotApplicable,
    options_are_checked_and_fixed,
    require,
    same_tokens,
    the_recipe_survives_json,
)
from tokenary.core.tree import TokenTree
from tokenary.hf.cache import TokenCache, TokenLayer
from tokenary.hf.target import Target, attached
from tokenary.memory import law_tools
from tokenary.memory.law_tools import RAGGED, oracle, sequences_come_and_go, toy
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm

NEW = 32


def a_net(family: str = "llama") -> LM:
    """Return a tiny net whose context is short: what is calibrated on its own writing is so at once."""
    return tiny_lm(layers=3, family=family, context=64)


def reading(lm: LM, policy: Any | None) -> Target:
    """Return a target with a read policy, or without."""
    if policy is None:
        return Target(lm.model)
    policy.prepare(lm.model)
    return Target(lm.model, readers=policy.attach(lm.model.config))


def run(lm: LM, policy: Any | None, prompts: Sequence[Sequence[int]], new: int = NEW, **how: Any) -> list[list[int]]:
    """Greedy tokens of each prompt; see `law_tools.run`."""
    target = how.pop("target", None) or reading(lm, policy)
    return law_tools.run(lm, None, prompts, new, target=target, **how)


# ---------------------------------------------------------------------------------------------------- the laws


def reading_all_changes_nothing(make: Make) -> None:
    """With the whole budget the text is that of ordinary attention."""
    whole = {"mass": 1.0} if "mass" in make().options else {"read": "100%"}
    for family in ("llama", "qwen2"):
        lm = a_net(family)
        same_tokens(run(lm, toy(make, **whole), RAGGED), run(lm, None, RAGGED), f"{family}, {whole}")


def everything_stays(make: Make) -> None:
    """Every layer holds every token, and its bytes are those of a full cache or more: reading less frees nothing."""
    lm = a_net()
    full, target = reading(lm, None), reading(lm, toy(make))
    for each in (full, target):
        run(lm, None, RAGGED, target=each)
    for index, layer in enumerate(target.cache.token_layers):
        require(layer.held == layer.committed, f"layer {index} holds {layer.held} of {layer.committed} tokens")
    require(target.nbytes >= full.nbytes, f"{target.nbytes} bytes are counted where {full.nbytes} are held")


class Watched:
    """One layer's state, asked for its attention weights instead of its output."""

    def __init__(self, inner: Any, policy: Any) -> None:
        self.inner, self.policy, self.most = inner, policy, 0.0

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the state itself."""
        return getattr(self.inner, name)

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend, and check the weights: those of a softmax over visible tokens, at most as many as are allowed."""
        units = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        weights = self.inner.attend(layer, query, key, units, mask, scale)  # (B, W, Hq, N)
        if weights is None:
            return None
        if not (layer.shared[0].prompt or layer.fill == 0):
            seen = torch.ones_like(weights[:, :, 0], dtype=torch.bool)
            if mask is not None:
                seen = mask[:, 0, : query.shape[2]] == 0
            total, found = seen.sum(-1), (weights > 0).sum(-1).amax(-1)
            require(not (weights * ~seen[:, :, None]).any(), "a query reads what it must not see")
            require(torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-4), "weights do not sum to 1")
            require((found <= self.policy.most(total)).all(), f"{found.tolist()} tokens are read of {total.tolist()}")
            self.most = max(self.most, float((total - found).max()))
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return torch.einsum("bwhn,bhnd->bwhd", weights, values)


def a_query_reads_no_more_than_it_may(make: Make) -> None:
    """Attention is a softmax over visible tokens, no more of them than the budget, and less than all."""
    lm, policy = a_net(), toy(make)
    if not hasattr(policy, "most"):
        raise NotApplicable("it reads prompts in part, and everything behind them")
    policy.prepare(lm.model)
    states = [None if state is None else Watched(state, policy) for state in policy.attach(lm.model.config)]
    target = Target(lm.model, readers=states)
    found = run(lm, None, RAGGED, target=target)
    same_tokens(found, run(lm, toy(make), RAGGED), "watched")
    require(any(state is not None and state.most > 0 for state in states), "everything was always read")


def the_same_options_give_the_same_text(make: Make) -> None:
    """Two fresh instances, and one instance twice, give the same text."""
    lm, used = a_net(), toy(make)
    first = run(lm, used, RAGGED)
    same_tokens(run(lm, toy(make), RAGGED), first, "a fresh instance")
    same_tokens(run(lm, used, RAGGED[2:]), first[2:], "after a larger batch")


def a_reset_forgets(make: Make) -> None:
    """After ``reset`` a cache writes what a new one writes."""
    lm = a_net()
    target = reading(lm, toy(make))
    first = run(lm, None, RAGGED, target=target)
    target.cache.reset()
    require(target.nbytes == 0, f"{target.nbytes} bytes are held after a reset")
    same_tokens(run(lm, None, RAGGED[1:], target=target), first[1:], "after a reset")


def a_batch_is_its_sequences(make: Make) -> None:
    """Neighbours in a batch change no text."""
    lm = a_net()
    texts = run(lm, toy(make), RAGGED)
    for row, prompt in enumerate(RAGGED):
        same_tokens(run(lm, toy(make), [prompt]), [texts[row]], f"sequence {row} alone")


def sequences_may_leave(make: Make) -> None:
    """When sequences leave the batch, or are reordered, the others go on as they would."""
    lm = a_net()
    whole, target = run(lm, toy(make), RAGGED), reading(lm, toy(make))
    texts, rows = [list(prompt) for prompt in RAGGED], list(range(len(RAGGED)))
    with attached(lm.model):
        logits = target.prefill(RAGGED)
        for step in range(NEW):
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                texts[row].append(token)
            if step in (6, 21):
                order = [2, 0, 3] if step == 6 else [1, 0]
                rows = [rows[at] for at in order]
                target.select_rows(order)
            logits = target.score(TokenTree.roots([texts[row][-1] for row in rows]))[:, 0]
            target.commit([[0]] * len(rows))
    for row, prompt in enumerate(RAGGED):
        found = texts[row][len(prompt) :]
        same_tokens([found], [whole[row][: len(found)]], f"sequence {row}")


def sequences_may_join(make: Make) -> None:
    """A sequence that joins a running batch, and one that leaves it, change nobody's tokens, with drafts too."""
    lm, policy = a_net(), toy(make)
    sequences_come_and_go(lm, lambda: reading(lm, policy), NEW)


def left_padding_changes_nothing(make: Make) -> None:
    """Under ``model.generate`` with left-padded prompts, padding is not looked at."""
    lm, policy, prompts = a_net(), toy(make), RAGGED
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    policy.prepare(lm.model)
    cache = TokenCache(lm.model.config, readers=policy.attach(lm.model.config))

    def generate() -> list[list[int]]:
        with attached(lm.model):
            found = lm.model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        return found[:, longest:].tolist()

    if cache.unrotated:  # generate has the model rotate keys: that must be refused
        with contextlib.suppress(UnsupportedModelError):
            require(not generate(), "rotated keys are taken for unrotated ones")
        return
    same_tokens(generate(), run(lm, toy(make), prompts), "generate with left padding")


def pieces_of_a_prompt_change_nothing(make: Make) -> None:
    """A prompt read in several passes gives the logits of one pass."""
    if "mass" in make().options:
        raise NotApplicable("what a prompt reads is chosen pass by pass")
    lm = a_net()
    whole, cut = reading(lm, toy(make)), reading(lm, toy(make))
    with attached(lm.model):
        first, second = whole.prefill(RAGGED), cut.prefill(RAGGED, chunk=32)
        off = float((first - second).abs().max())
        require(off < 1e-3, f"logits after the prompt differ by {off}")
        tree = TokenTree.roots(first.argmax(-1).tolist())
        off = float((whole.score(tree) - cut.score(tree)).abs().max())
        require(off < 1e-3, f"logits of the next token differ by {off}")


def drafts_change_nothing(make: Make) -> None:
    """Draft trees, right and wrong, verified over the policy give the text of one token a pass."""
    lm = a_net()
    for prompts in (RAGGED[2:3], RAGGED):
        plain = run(lm, toy(make), prompts, NEW + 8)
        truth = [prompt + ids for prompt, ids in zip(prompts, plain, strict=True)]
        stream = np.random.default_rng(0)

        def draft(texts: list[list[int]], truth: list[list[int]] = truth, stream: Any = stream) -> TokenTree:
            return oracle(texts, truth, stream)

        found = run(lm, toy(make), prompts, NEW, draft=draft)
        same_tokens(found, [ids[:NEW] for ids in plain], f"drafts, batch of {len(prompts)}")


READ_LAWS: tuple[LawFunction, ...] = (
    reading_all_changes_nothing,
    everything_stays,
    a_query_reads_no_more_than_it_may,
    the_same_options_give_the_same_text,
    a_reset_forgets,
    a_batch_is_its_sequences,
    sequences_may_leave,
    sequences_may_join,
    left_padding_changes_nothing,
    pieces_of_a_prompt_change_nothing,
    drafts_change_nothing,
    options_are_checked_and_fixed,
    the_recipe_survives_json,
)
