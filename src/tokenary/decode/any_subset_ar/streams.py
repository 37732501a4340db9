"""Passes of a two-stream model over the rows that are needed, with the contents seen so far in a cache.

A content row of rank r depends on contents of rank <= r alone (a visible one on all visible ones), so its keys and
values stay right whatever is decoded later. They are stored by position; who sees them is decided by rank. A rejected
draft is therefore never removed: no row looks at its slot before it is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenary.hf.two_stream_cache import TwoStreamCache
from tokenary.models.text_diffusion import TextDiffusionModel, any_subset_ranks


class Streams:
    """The passes of one batch.

    Parameters
    ----------
    model : TextDiffusionModel
        Trained with ``objective="any-subset"``.
    masked : Tensor
        (B, T) bool; shorter sequences are padded at the end with True.

    Attributes
    ----------
    cache : TwoStreamCache
        Keys and values of what was read.
    rows : int
        Content and query rows computed so far, padding apart: what the floating-point work is proportional to.
    """

    def __init__(self, model: TextDiffusionModel, masked: Tensor) -> None:
        masked = masked.to(model.device)
        self.model, self.rows = model, 0
        self.cache = TwoStreamCache(model.config, masked.shape[1])
        rank = any_subset_ranks(masked)
        # the slot of padding comes last, and no real row sees it
        self._rank = torch.cat([rank, torch.full_like(rank[:, :1], self.cache.length)], dim=1)  # (B, T + 1)
        self._visible = (~masked).sum(1, keepdim=True)

    def run(
        self,
        tokens: Sequence[Sequence[int]],
        contents: Sequence[Sequence[int]],
        queries: Sequence[Sequence[int]],
        seen: Sequence[Sequence[int]],
    ) -> Tensor:
        """Read the tokens at some positions, and ask about others.

        Parameters
        ----------
        tokens : sequence of sequence of int
            For each sequence, all its tokens by position.
        contents : sequence of sequence of int
            Positions whose tokens are read in this pass, and stay in the cache.
        queries : sequence of sequence of int
            Positions asked about; the longest has at least one.
        seen : sequence of sequence of int
            How many ranks each query sees: its own rank for the true order, that of the first for independent drafts.

        Returns
        -------
        Tensor
            Logits (B, Q, V) float32, -inf for the mask token; those of padding mean nothing.
        """
        mask_id, length = self.model.config.mask_token_id, self.cache.length
        read, asked = self._padded(contents, length), self._padded(queries, length)
        limit = self._padded(seen, length + 1)
        ids = self._padded([[row[i] for i in at] for row, at in zip(tokens, contents, strict=True)], mask_id)
        self.rows += sum(map(len, contents)) + sum(map(len, queries))
        of_read = torch.maximum(self._rank.gather(1, read) + 1, self._visible)
        sees = self._rank[:, None] < torch.cat([of_read, limit], dim=1)[:, :, None]  # (B, C + Q, T + 1)
        own = torch.eye(asked.shape[1], dtype=torch.bool, device=ids.device)
        own = torch.cat([torch.zeros_like(own[:1]).expand(read.shape[1], -1), own])  # contents see no query
        sees = torch.cat([sees, own.expand(len(ids), -1, -1)], dim=2)[:, None]
        mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=ids.device)
        self.cache.begin(read)
        logits = self.model(
            input_ids=torch.cat([ids, torch.full_like(asked, mask_id)], dim=1),
            position_ids=torch.cat([read, asked], dim=1),
            attention_mask=mask.masked_fill_(~sees, torch.finfo(mask.dtype).min),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=asked.shape[1],
        ).logits.float()
        logits[..., mask_id] = float("-inf")
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order."""
        index = torch.tensor(list(rows), device=self._rank.device)
        self._rank, self._visible = self._rank[index], self._visible[index]
        self.cache.select(rows)

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(1, *map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=self._rank.device)


@torch.inference_mode()
def log_density(model: TextDiffusionModel, input_ids: Tensor, masked: Tensor) -> Tensor:
    """Exact ``log p(masked tokens | visible tokens)`` in one pass, as ASSD samples them at temperature 1.

    It is the sum over masked positions, left to right, of the log-probability given the visible tokens and the masked
    ones before it; the mask token itself has probability 0.

    Parameters
    ----------
    model : TextDiffusionModel
        Trained with ``objective="any-subset"``.
    input_ids : Tensor
        (B, T) long.
    masked : Tensor
        (B, T) bool, any set, another one for each row.

    Returns
    -------
    Tensor
        (B,) float32, nats, on the model's device.
    """
    input_ids, masked = input_ids.to(model.device), masked.to(model.device)
    queries = [row.nonzero()[:, 0].tolist() for row in masked]
    rank = any_subset_ranks(masked)
    contents = [range(masked.shape[1])] * len(masked)
    seen = [ranks[hidden].tolist() for ranks, hidden in zip(rank, masked, strict=True)]
    logits = Streams(model, masked).run(input_ids.tolist(), contents, queries, seen)
    asked = torch.arange(logits.shape[1], device=model.device) < masked.sum(1, keepdim=True)  # (B, Q)
    wanted = torch.zeros_like(asked, dtype=torch.long).masked_scatter_(asked, input_ids[masked])
    found = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return found.masked_fill(~asked, 0).sum(1)
