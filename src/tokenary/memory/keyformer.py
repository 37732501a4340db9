"""Keyformer: KV Cache Reduction through Key Tokens Selection (Adnan et al. 2024, arXiv 2403.09054).

Keeps the newest tokens and, of the older ones, the *key tokens*: those that got most attention, judged by a softmax of
its own. Dropping tokens changes the denominator of the softmax, so that plain accumulated attention favours what it
liked early; noise on the logits, and a temperature that rises while tokens are dropped, soften that. Outputs are
computed from the untouched logits.

With logits x of a query over the tokens that it sees, and i.i.d. zeta of the standard Gumbel distribution::

    y = softmax((x + zeta) / tau)                          tau = tau_init in the prompt, then rising to tau_end
    f = sum of y over all query rows so far                those of the prompt and those of generated tokens
    kept = newest w tokens + the k - w others of largest f          w = recent * k

With grouped heads, f sums over the query heads of a group (the released models have none): a set for each key head.
Keys are cached rotated, so that a token keeps its original position, the better variant of the paper. With
``noise=none`` and both temperatures 1 this is H2O with a recent window.

Noise is named by (seed, layer, query), never by sequence, batch or pass: a text does not depend on its neighbours, nor
on how many tokens a pass reads or yields. A prompt of n tokens needs n^2 / 2 numbers a query head. Their logarithms are
saved: with E exponential, ``zeta = -log(E)`` and ``exp((x + zeta) / tau) = exp(x / tau) * E ** (-1 / tau)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from tokenary.core.budget import Budget, Layers
from tokenary.core.card import Card
from tokenary.core.seeding import substream
from tokenary.core.token_map import Select
from tokenary.memory.base import KeepLayer, KeepPolicy, PerRow, recent_and_top

CARD = Card(
    slug="keyformer",
    cls="Keyformer",
    room="memory",
    title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    summary="keeps recent tokens and those that got most attention under a noisy softmax; frees the rest of the cache",
    slot="keep",
    paper="2403.09054",
    year=2024,
    code="d-matrix-ai/keyformer-llm",
    requires=("kv-cache", "attention-logits"),
)

BLOCK = 64  # rows of a prompt whose noise is drawn, and whose attention is held, at once
_MEAN, _STD = 0.5772156649, 1.2825498302  # of the standard Gumbel distribution

_Temperature = Annotated[float, Field(ge=0.25, le=100)]  # below, the noise leaves the range of float32


class Keyformer(KeepPolicy):
    """Keep the newest tokens and the key tokens of each key head.

    Parameters
    ----------
    keep : Budget
        Tokens that stay; a share is of the prompt.
    recent : float
        Share of the budget that the newest tokens take, rounded down.
    tau_init, tau_end : float
        Temperature of the noisy softmax in the prompt, and from the `length`-th generated token on; linear between.
    length : int
        Tokens over which the temperature rises: how many will be generated.
    noise : {"gumbel", "none", "constant", "gaussian"}
        The paper's ablations beside its own: nothing, the mean of the Gumbel distribution on every logit (which a
        softmax cannot see: the same as nothing), or a normal distribution of the same mean and variance.
    layers : {"uniform", "pyramid"}
        How the budget is shared out over the layers.
    interval : int
        New tokens between two reductions. The authors' code has one that reduces every 8 and one that always does.
    seed : int
        Of the noise.
    """

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.6),  # noqa: B008 (frozen)
        recent: Annotated[float, Field(ge=0, le=1)] = 0.3,
        tau_init: _Temperature = 1.0,
        tau_end: _Temperature = 2.0,
        length: Annotated[int, Field(ge=1)] = 100,
        noise: Literal["gumbel", "none", "constant", "gaussian"] = "gumbel",
        layers: Layers = "uniform",
        interval: Annotated[int, Field(ge=1)] = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(keep, layers, interval)
        self.recent, self.noise, self.seed = recent, noise, seed
        self.tau_init, self.tau_end, self.length = tau_init, tau_end, length

    def layer(self, index: int) -> KeyformerLayer:
        """Return fresh state for one layer."""
        return KeyformerLayer(self)

    def temperature(self, step: int) -> float:
        """Return tau for the `step`-th generated token, counted from 1; 0 stands for the prompt."""
        return self.tau_init + (self.tau_end - self.tau_init) * min(step / self.length, 1.0)

    def perturbation(self, shape: Sequence[int], tau: float, *names: int | str) -> Tensor:
        """Draw ``exp(zeta / tau)``, float32 on the CPU, from the stream of that name."""
        stream = substream(self.seed, "keyformer", *names)
        if self.noise == "gumbel":
            drawn = torch.from_numpy(stream.standard_exponential(shape, dtype=np.float32))
            return drawn.clamp_(min=2**-24).pow_(-1 / tau)  # a draw may be 0
        if self.noise == "gaussian":
            drawn = torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
            return drawn.mul_(_STD).add_(_MEAN).div_(tau).exp_()
        return torch.tensor(_MEAN / tau if self.noise == "constant" else 0.0).exp().expand(*shape)


class KeyformerLayer(KeepLayer):
    """Scores f of every token held in one layer, for each sequence of a batch."""

    policy: Keyformer

    def __init__(self, policy: Keyformer) -> None:
        super().__init__(policy)
        self.observes = policy.keep.ratio != 1
        self._scores: PerRow[Tensor] = PerRow()  # f of each sequence, (Hkv, held) float32
        self._steps: PerRow[int] = PerRow()  # generated tokens of each sequence that were observed

    @property
    def nbytes(self) -> int:
        """Bytes of the scores."""
        return sum(scores.nbytes for scores in self._scores.values())

    def observe_prompt(self, row: int, query_states: Tensor, key_states: Tensor, scaling: float) -> None:
        """Add what a piece of one sequence's prompt pays attention to, in blocks of query rows."""
        heads, n_queries, size = query_states.shape
        kv_heads, n_keys, _ = key_states.shape
        scores = self._grown(row, kv_heads, n_keys, key_states.device)
        keys = key_states.float().transpose(1, 2)  # (Hkv, D, N)
        tau, first = self.policy.temperature(0), n_keys - n_queries
        for block in range(first // BLOCK, -(-n_keys // BLOCK)):
            start, stop = block * BLOCK, block * BLOCK + BLOCK
            low, high = max(start, first), min(stop, n_keys)  # the rows at hand
            # Drawn for the whole block, whatever part of it is at hand: so it never depends on the pieces of a prompt.
            noise = self.policy.perturbation((heads, BLOCK, stop), tau, self.index, "prompt", block)
            noise = noise[:, low - start : high - start, :high].to(keys.device)
            queries = query_states[:, low - first : high - first].float() * (scaling / tau)
            logits = torch.matmul(queries.view(kv_heads, -1, size), keys[..., :high]).view(noise.shape)
            later = torch.ones(high - low, high - low, dtype=torch.bool, device=keys.device).triu_(1)
            logits[..., low:].masked_fill_(later, float("-inf"))
            scores[:, :high] += received(logits.view(kv_heads, -1, high), noise.reshape(kv_heads, -1, high))
        self._scores[row] = scores

    def observe(self, row: int, logits: Tensor) -> None:
        """Add what newly generated tokens pay attention to; logits (Hkv, G, A, N) of A tokens."""
        kv_heads, groups, n_new, n_keys = logits.shape
        scores = self._grown(row, kv_heads, n_keys, logits.device)
        for new in range(n_new):
            seen = n_keys - n_new + new + 1
            step = self._steps[row] = self._steps.get(row, 0) + 1
            tau = self.policy.temperature(step)
            noise = self.policy.perturbation((kv_heads, groups, seen), tau, self.index, "step", step)
            scores[:, :seen] += received(logits[:, :, new, :seen] / tau, noise.to(logits.device))
        self._scores[row] = scores

    def choose(self, row: int, held: int, kept: int) -> Select:
        """Choose the newest and the key tokens, and forget the scores of the others."""
        window = int(self.policy.recent * kept + 1e-9)
        chosen = recent_and_top(self._scores[row], kept, window)
        self._scores[row] = chosen.apply(self._scores[row], dim=-1)
        return chosen

    def _grown(self, row: int, kv_heads: int, held: int, device: torch.device) -> Tensor:
        """Copy the scores of a sequence, with zeros for its newest tokens, (Hkv, held)."""
        old = self._scores.get(row)
        if old is None:
            return torch.zeros(kv_heads, held, device=device)
        return pad(old, (0, held - old.shape[1]))


def received(logits: Tensor, noise: Tensor) -> Tensor:
    """Sum the noisy softmax over query rows: what each token receives.

    Parameters
    ----------
    logits : Tensor
        x / tau, (Hkv, R, N) float32, R rows of all query heads of a group; -inf, which no noise revives, where a row
        must not look.
    noise : Tensor
        ``exp(zeta / tau)``, of the same shape.

    Returns
    -------
    Tensor
        (Hkv, N).
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_().mul_(noise)
    return torch.matmul(weights.sum(-1).reciprocal_()[:, None], weights)[:, 0]
