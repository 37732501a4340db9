"""What one layer does under TokenSelect, in the prompt (chunk by chunk) and behind it (query by query)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenary.core.errors import UnsupportedModelError
from tokenary.hf.cache import TokenLayer
from tokenary.memory.read_base import PartialLayer, Seen, attend_to, highest, in_prompt, listed
from tokenary.memory.token_select.reuse import SelectionCache
from tokenary.memory.token_select.votes import pooled, votes

if TYPE_CHECKING:
    from tokenary.memory.token_select import TokenSelect


class TokenSelectLayer(PartialLayer):
    """Chooses for each query, or chunk of the prompt, one list of tokens for all heads."""

    unrotated = True
    policy: TokenSelect

    def __init__(self, policy: TokenSelect) -> None:
        super().__init__(policy)
        self.cache = SelectionCache(policy.reuse)

    @property
    def nbytes(self) -> int:
        """Bytes of the choices that are kept."""
        return self.cache.nbytes

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the state of these sequences, in this order."""
        self.cache.select_rows(rows)

    def join(self, other: TokenSelectLayer, rows: int) -> None:
        """Append the sequences of another one behind ours."""
        self.cache.join(other.cache, rows)

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend to what was chosen, rotated by its place in the list."""
        if layer.shared[0].positions is None:  # the model was told true positions
            raise UnsupportedModelError("token-select wants keys unrotated, which plain model.generate does not give")
        self.cache.settle(layer)
        if in_prompt(layer):
            return self._read_prompt(layer, query, key, value, scale)
        seen = Seen.of(mask, query.shape[2], key)
        chosen = self.choose(layer, query, key, seen, self.policy.count(seen.total))
        slots, real = listed(chosen)
        rotation, places = self.policy.rotation, torch.arange(slots.shape[-1], device=key.device)
        last = chosen.sum(-1) - 1  # (B, 1, W): the query stands at the end of its list
        return attend_to(rotation(query, last), key, value, slots, real, scale, lambda keys: rotation(keys, places))

    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose sinks, window and the tokens with the most votes, (B, 1, W, N) bool."""
        policy = self.policy
        short = seen.total <= policy.sinks + count + policy.local  # everything is read
        window = (seen.total - policy.local)[..., None]
        always = short[..., None] | (seen.ranks < policy.sinks) | (seen.ranks >= window)
        chosen, candidates = seen.slots & always, seen.slots & ~always
        if not bool(short.all()):
            turned = policy.rotation(query, torch.tensor(policy.local))
            chosen |= self._picked(layer, turned, key, seen, candidates, count)
        return chosen[:, None]

    def _picked(
        self, layer: TokenLayer, turned: Tensor, key: Tensor, seen: Seen, candidates: Tensor, count: Tensor
    ) -> Tensor:
        """Choose among the candidates, or take what an earlier query chose, (B, W, N) bool."""
        if self.policy.reuse >= 1:
            return self.voted(turned, key, seen.ranks, candidates, count)
        fingerprints = turned.transpose(1, 2).flatten(2)  # (B, W, Hq * D)
        asks, new = candidates.any(-1).tolist(), key[:, 0, layer.fill :]
        plans = [self.cache.plan(layer, row, fingerprints[row], asks[row], new[row]) for row in range(len(asks))]
        picked = torch.zeros_like(candidates)
        if any(entry is not None and entry.ranks is None for plan in plans for entry in plan):
            picked = self.voted(turned, key, seen.ranks, candidates, count)
        for row, plan in enumerate(plans):
            for node, entry in enumerate(plan):
                if not asks[row][node]:
                    picked[row, node] = False
                elif entry.ranks is None:
                    entry.ranks = seen.ranks[row, node][picked[row, node]]
                else:  # of an earlier query, or made just now by an ancestor
                    belongs = torch.zeros(key.shape[2], dtype=torch.bool, device=key.device)
                    belongs[entry.ranks] = True
                    picked[row, node] = belongs[seen.ranks[row, node].clamp(min=0)] & candidates[row, node]
        return picked

    def voted(self, turned: Tensor, key: Tensor, ranks: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
        """Let the heads vote.

        Parameters
        ----------
        turned : Tensor
            Queries at the distance of the window, (B, Hq, W, D).
        key : Tensor
            Unrotated, (B, Hkv, N, D).
        ranks, candidates : Tensor
            (B, W, N) int64 and bool.
        count : Tensor
            (B, W) int64.

        Returns
        -------
        Tensor
            (B, W, N) bool.
        """
        batch, heads, width, size = turned.shape
        policy = self.policy
        folded = turned.reshape(batch, key.shape[1], -1, size)
        logits = folded.matmul(key.transpose(2, 3)).float().view(batch, heads, width, -1)
        if policy.scale == "width":
            logits *= size**-0.5
        scores = votes(logits, candidates, count, policy.vote)
        if policy.pool > 1:
            scores = pooled(scores, ranks, policy.pool)
        return highest(scores, count)

    def _read_prompt(self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Read a piece of the prompt, sequence by sequence and chunk by chunk, (B, W, Hq, D)."""
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        positions = layer.shared[0].positions
        valid = layer.valid if layer.valid is not None or positions is None else positions >= 0
        chunk = min(self.policy.chunk, self.policy.local)
        for row, held in enumerate(layer.held):
            new = torch.arange(query.shape[2], device=key.device)
            new = new if valid is None else new[valid[row]]
            slots = torch.cat([torch.arange(held, device=key.device), layer.fill + new])
            keys, values = key[row].index_select(1, slots), value[row].index_select(1, slots)
            start = held
            while start < len(slots):
                stop = min(start - start % chunk + chunk, len(slots))
                at = new[start - held : stop - held]
                output[row, at] = self._read_chunk(row, query[row][:, at], keys[:, :stop], values[:, :stop], scale)
                start = stop
        return output

    def _read_chunk(self, row: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend from the newest C tokens (Hq, C, D) of all tokens so far (Hkv, n, D), (C, Hq, D)."""
        ranks = self._ranks(row, query, key)
        if ranks is not None:
            key, value = key.index_select(1, ranks), value.index_select(1, ranks)
        (width, length), rotation = (query.shape[1], key.shape[1]), self.policy.rotation
        places = torch.arange(length, device=key.device)
        turned = rotation(query, places[-width:])
        causal = torch.ones(width, length, dtype=torch.bool, device=key.device).tril(length - width)
        output = scaled_dot_product_attention(
            turned[None], rotation(key, places)[None], value[None], attn_mask=causal, scale=scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)

    def _ranks(self, row: int, query: Tensor, key: Tensor) -> Tensor | None:
        """Return what a chunk (Hq, C, D) reads of n tokens (Hkv, n, D), ascending; None for everything."""
        policy, length, device = self.policy, key.shape[1], key.device
        total = torch.tensor([[length]], device=device)
        count = policy.count(total)
        if length <= policy.sinks + int(count) + policy.local:
            return None
        places = torch.arange(policy.local, policy.local + query.shape[1], device=device)
        mean = policy.rotation(query, places).mean(1)  # (Hq, D)
        entry = self.cache.entry(self.cache.last(row), mean.flatten())
        if entry.ranks is None:
            inner = key[None, :, policy.sinks : length - policy.local]
            ranks = torch.arange(inner.shape[2], device=device)[None, None]
            picked = self.voted(mean[None, :, None], inner, ranks, torch.ones_like(ranks, dtype=torch.bool), count)
            entry.ranks = picked[0, 0].nonzero()[:, 0] + policy.sinks
        self.cache.keep(row, entry)
        sinks, window = (
            torch.arange(policy.sinks, device=device),
            torch.arange(length - policy.local, length, device=device),
        )
        return torch.cat([sinks, entry.ranks, window])
