"""TokenSelect: a passage far back is read again, where sinks and a window of the same budget cannot see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.bench.long_context import LongSample, copy
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.data import stdlib_code, wikitext2
from tokenary.hf.target import Target, attached
from tokenary.memory.token_select import TokenSelect
from tokenary.memory.token_select.reading import TokenSelectLayer
from tokenary.models import LM
from tokenary.run import load

SINKS, LOCAL, READ, CHUNK = 16, 256, 128, 64
BASE = {"sinks": SINKS, "local": LOCAL, "read": READ, "chunk": CHUNK}


class RandomVotes(TokenSelect):
    """The control: the same machinery, with votes drawn at random."""

    def layer(self, index: int) -> RandomVotesLayer:
        """Return fresh state for one layer."""
        return RandomVotesLayer(self)


class RandomVotesLayer(TokenSelectLayer):
    """Votes drawn once for every rank."""

    def voted(self, turned: Tensor, key: Tensor, ranks: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
        """Choose at random."""
        drawn = torch.from_numpy(substream(0, "random votes", self.index).random(key.shape[2] + 1))
        scores = drawn[ranks.clamp(min=0)].masked_fill(~candidates, float("-inf"))
        most = min(int(count.max()), scores.shape[-1])
        chosen = torch.zeros_like(candidates).scatter(-1, scores.topk(most).indices, True)
        return chosen & candidates


#: The rivals: what each reads of the same text, sinks and window included, is 400 tokens.
RIVALS: dict[str, tuple[type[TokenSelect], dict[str, Any]]] = {
    "token-select": (TokenSelect, BASE),
    "sinks and window": (TokenSelect, {**BASE, "vote": "none", "local": LOCAL + READ}),
    "random": (RandomVotes, BASE),
}
#: Other votes and reuse, on the cache that TokenSelect's prompt left: only the repeat is read differently.
VOTES: dict[str, dict[str, Any]] = {
    "hard vote": {"vote": "hard"},
    "raw vote": {"vote": "raw"},
    **{f"reuse {threshold}": {"reuse": threshold} for threshold in (0.8, 0.9, 0.95)},
}


def run(
    seed: int = 0,
    texts: int = 3,
    length: int = 4096,
    depth: float = 0.2,
    code: bool = False,
    long: int = 12288,
    repeat: int = 200,
    votes: bool = True,
) -> Outcome:
    """Measure the loss on a passage that is repeated at the end of a text, in the precision that the model runs in.

    Parameters
    ----------
    seed : int
        Chooses the pieces of text.
    texts : int
        How many.
    length : int
        Tokens of each.
    depth : float
        Where the passage stands first.
    code : bool
        Python source instead of Wikipedia.
    long : int
        Tokens of one more text, past the model's context of 8192, read by every rival; 0 for none.
    repeat : int
        Tokens of the passage.
    votes : bool
        Also other votes, and reuse of choices.
    """
    lm = load("smollm2")
    source = stdlib_code(seed, 400_000) if code else wikitext2()[:400_000]
    assert lm.tokenizer is not None
    losses: dict[str, list[float]] = {}
    reused: dict[str, list[float]] = {}
    for number in range(texts):
        sample = copy(lm.tokenizer, source, length, depth, 1000 * seed + number, repeat)
        for name, loss in _losses(lm, sample, VOTES if votes else {}, reused).items():
            losses.setdefault(name, []).append(loss)
    found = {name: np.array(values) for name, values in losses.items()}

    def figure(name: str) -> Figure:
        return Figure.of(name, found[name])

    details: dict[str, Any] = {
        "losses": {name: float(values.mean()) for name, values in found.items()},
        "share of choices reused": {name: float(np.mean(values)) for name, values in reused.items()},
        "tokens read": SINKS + READ + LOCAL,
    }
    if long:
        sample = copy(lm.tokenizer, source, long, depth, seed, repeat)
        details[f"one text of {long} tokens"] = _far(lm, sample)
        sample = copy(lm.tokenizer, source, long // 2, depth, seed, repeat)
        details[f"token-select, one text of {long // 2} tokens"] = _read(
            lm, sample, _policy(lm, *RIVALS["token-select"])
        )[0]
    return Outcome(
        method=figure("token-select"),
        baseline=figure("sinks and window"),
        controls=(Figure.of("none", found["full"]), figure("random")),
        n=texts,
        paired_spread=standard_error(found["token-select"] - found["sinks and window"]),
        details=details,
    )


def _policy(lm: LM, kind: type[TokenSelect], options: dict[str, Any]) -> TokenSelect:
    policy = kind(**options)
    policy.prepare(lm.model)
    return policy


def _losses(
    lm: LM, sample: LongSample, others: dict[str, dict[str, Any]], reused: dict[str, list[float]]
) -> dict[str, float]:
    """Loss of every rival, and of other votes, on the repeat."""
    found = {"full": _read(lm, sample, None)[0]}
    for name, (kind, options) in RIVALS.items():
        found[name], target = _read(lm, sample, _policy(lm, kind, options))
        if name == "token-select":
            for other, changed in others.items():
                states = _policy(lm, kind, options | changed).attach(lm.model.config)
                for layer, state in zip(target.cache.token_layers, states, strict=True):
                    layer.reader = state
                found[other] = _repeat_loss(lm, target, sample)
                if "reuse" in changed:
                    caches = [state.cache for state in states if isinstance(state, TokenSelectLayer)]
                    kept = sum(cache.reused for cache in caches)
                    reused.setdefault(other, []).append(kept / (kept + sum(cache.chosen for cache in caches)))
    return found


def _far(lm: LM, sample: LongSample) -> dict[str, float]:
    """Loss of every rival on the repeat in one very long text."""
    found = {"full": _read(lm, sample, None)[0]}
    for name, (kind, options) in RIVALS.items():
        found[name] = _read(lm, sample, _policy(lm, kind, options))[0]
    return found


def _read(lm: LM, sample: LongSample, policy: TokenSelect | None) -> tuple[float, Target]:
    """Read a text up to its repeat under a policy; return the loss on the repeat, and the target before it."""
    target = Target(lm.model, readers=None if policy is None else policy.attach(lm.model.config))
    with attached(lm.model):
        target.prefill([sample.ids[: -sample.scored]])
    return _repeat_loss(lm, target, sample), target


def _repeat_loss(lm: LM, target: Target, sample: LongSample) -> float:
    """Mean loss on the repeat but its first token, in nats; the target stays as it was.

    The tokens are one draft that is rolled back: each reads what it would read alone.
    """
    tail: Sequence[int] = sample.ids[-sample.scored :]
    with attached(lm.model):
        logits = target.score(TokenTree.chains([list(tail[:-1])]))[0]
        target.commit([[]])
    return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(tail[1:])))


CLAIM = Claim(
    slug="token-select",
    statement="On a passage that is repeated thousands of tokens later, TokenSelect's loss is at most half of that of "
    "sinks and a window that read as many tokens",
    metric="loss on the repeat, nats a token",
    direction="lower",
    threshold=2.0,
    run=run,
    variation="Python source instead of Wikipedia, the passage at 0.6 of the text; no text past the context",
    held_out={"code": True, "depth": 0.6, "long": 0, "votes": False},
    minutes=12,
    fast={"texts": 2, "length": 768, "long": 0, "repeat": 64, "votes": False},
)
