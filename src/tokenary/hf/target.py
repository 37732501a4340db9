"""The target: a model with a cache that scores draft trees, keeps the accepted path and forgets the rest."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.decoding import Emission
from tokenary.core.errors import InputError, UnsupportedModelError
from tokenary.core.tree import TokenTree
from tokenary.hf import attention
from tokenary.hf.cache import LayerPolicy, LayerReader, LayerStore, PassInfo, TokenCache


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model that cannot decode over our cache.

    Raises
    ------
    UnsupportedModelError
        If it is an encoder, an encoder-decoder, or has an attention of its own.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedModelError(f"{name} is no decoder-only language model")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not use transformers' attention interface")


class Target:
    """A causal language model over a batch of sequences, one pass at a time.

    Use it inside `attention.attached(model)`. Sequences may have different lengths; none is padded in the cache.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model.
    policies : sequence of LayerPolicy or None, optional
        What each layer keeps of the past.
    readers : sequence of LayerReader or None, optional
        What each layer reads of what it keeps.
    stores : sequence of LayerStore or None, optional
        How each layer stores its older tokens.

    Attributes
    ----------
    lengths : list of int
        Tokens of each sequence that were committed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policies: Sequence[LayerPolicy | None] | None = None,
        readers: Sequence[LayerReader | None] | None = None,
        stores: Sequence[LayerStore | None] | None = None,
    ) -> None:
        check_causal(model)
        self.model = model
        self.cache = TokenCache(model.config, policies, readers, stores)
        self.lengths: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int = 1024) -> Tensor:
        """Read the prompts; return the logits after each one's last token, (B, V).

        Parameters
        ----------
        prompts : sequence of sequence of int
            Token ids, at least one each; lengths may differ.
        chunk : int
            Tokens a pass, which bounds the memory of long prompts.

        Raises
        ------
        InputError
            If a prompt is empty.
        """
        reading = self.reading(prompts, chunk)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return end.value

    @torch.inference_mode()
    def reading(self, prompts: Sequence[Sequence[int]], chunk: int = 1024) -> Generator[list[Emission], None, Tensor]:
        """Read the prompts as `prefill` does, and let others run between passes: yields that there is nothing new."""
        lengths = [len(prompt) for prompt in prompts]
        if not prompts or min(lengths) == 0:
            raise InputError("a prompt has no tokens")
        device, longest = self.model.device, max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.as_tensor(prompt)
        last = torch.empty(0)
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            steps = torch.arange(start, stop)
            positions = torch.stack([torch.where(steps < length, steps, -1) for length in lengths]).to(device)
            ends = sorted({length - 1 - start for length in lengths if start < length <= stop})
            self.cache.begin(PassInfo(positions=positions, prompt=True, more=stop < longest))
            logits = self.model(
                input_ids=ids[:, start:stop].to(device),
                position_ids=self._rotation(positions.clamp(min=0)),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor(ends or [0], device=device),
            ).logits
            if start == 0:
                last = logits.new_zeros(len(prompts), logits.shape[-1])
            for row, length in enumerate(lengths):
                if start < length <= stop:
                    last[row] = logits[row, ends.index(length - 1 - start)]
            self.cache.commit([range(min(max(length - start, 0), stop - start)) for length in lengths])
            if stop < longest:
                yield []
        self.lengths = lengths
        return last

    @torch.inference_mode()
    def score(self, tree: TokenTree) -> Tensor:
        """Run the model once over the nodes of a batch of trees; return logits (B, W, V)."""
        positions = torch.from_numpy(tree.depth) + torch.tensor(self.lengths)[:, None]
        ancestors = None if tree.width == 1 else torch.from_numpy(tree.ancestors)
        return self.forward(torch.from_numpy(tree.ids), positions, ancestors)

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, positions: Tensor, ancestors: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Run the model once over new tokens, which stay pending until `commit`; return logits (B, W, V).

        Parameters
        ----------
        ids, positions : Tensor
            Tokens and their logical positions, int64, (B, W). Positions need not follow what was committed.
        ancestors : Tensor, optional
            Which new tokens each new token may look at, itself included, (B, W, W) bool; without it, those before it.
        visible : Tensor, optional
            Which held slots it may look at, (B, W, N) bool, N of the longest sequence; without it, all. Slots lie in
            the order of the commits. Made for caches that keep everything.
        """
        device = self.model.device
        ancestors, visible = (None if mask is None else mask.to(device) for mask in (ancestors, visible))
        positions = positions.to(device)
        self.cache.begin(PassInfo(ancestors=ancestors, visible=visible, positions=positions))
        return self.model(
            input_ids=ids.to(device),
            position_ids=self._rotation(positions),
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def _rotation(self, positions: Tensor) -> Tensor:
        """Return the positions that the model is told."""
        return torch.zeros_like(positions) if self.cache.unrotated else positions

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep these nodes of each tree (ascending, from the root) and roll back the others."""
        self.cache.commit(paths)
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]

    def room(self, row: int) -> int | None:
        """How many tokens of a sequence may be committed at once; None for any number."""
        return self.cache.room(row)

    @torch.inference_mode()
    def select_rows(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order."""
        self.cache.select_rows(rows)
        self.lengths = [self.lengths[row] for row in rows]

    @torch.inference_mode()
    def join(self, other: Target) -> None:
        """Append the sequences of another target of this model and these methods behind ours.

        Neither may have rows that wait for a `commit`; the other is not used again.
        """
        self.cache.join(other.cache)
        self.lengths = self.lengths + other.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and bookkeeping held."""
        return self.cache.nbytes


attached = attention.attached

__all__ = ["Target", "attached", "check_causal"]
