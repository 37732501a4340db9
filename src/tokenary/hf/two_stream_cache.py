"""A key-value cache of a two-stream pass: contents are stored by position, queries are seen in their own pass only.

A pass hands over C contents, whose rows are written where they belong (anew, where they were written before), then Q
queries. It sees all slots, then its queries; which of them each row really looks at is the attention mask's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin


class TwoStreamLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, T + 1, D): a slot for each position, and one for padding.

    Parameters
    ----------
    cache : TwoStreamCache
        Knows which slots the pass under way writes.
    """

    is_sliding = False

    def __init__(self, cache: TwoStreamCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first keys and values, (B, H, C + Q, D)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._cache.length + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of the contents; return all slots and the rows of the queries, (B, H, T + 1 + Q, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        count = self._cache.slots.shape[1]
        slots = self._cache.slots[:, None, :, None].expand(-1, key_states.shape[1], -1, key_states.shape[3])
        self.keys.scatter_(2, slots, key_states[:, :, :count])
        self.values.scatter_(2, slots, value_states[:, :, :count])
        return (
            torch.cat([self.keys, key_states[:, :, count:]], dim=2),
            torch.cat([self.values, value_states[:, :, count:]], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a pass sees, and 0."""
        return self._cache.length + 1 + query_length - self._cache.slots.shape[1], 0

    def get_seq_length(self) -> int:
        """Return 0: positions are always given, never counted on."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of positions."""
        return self._cache.length


class TwoStreamCache(Cache):
    """A cache of `TwoStreamLayer` for a batch.

    Parameters
    ----------
    config : PretrainedConfig
        Of a bidirectional model.
    length : int
        Positions of the longest sequence, T; slot T takes padding.
    """

    def __init__(self, config: PretrainedConfig, length: int) -> None:
        self.length = length
        self.slots = torch.empty(0, 0, dtype=torch.long)
        self._held = [TwoStreamLayer(self) for _ in range(config.get_text_config().num_hidden_layers)]
        super().__init__(layers=list(self._held))

    def begin(self, slots: Tensor) -> None:
        """Announce a pass: the slots (B, C) long of its contents, which come before its queries."""
        self.slots = slots

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order."""
        for layer in self._held:
            if layer.keys is not None and layer.values is not None:
                index = torch.tensor(list(rows), device=layer.keys.device)
                layer.keys, layer.values = layer.keys[index], layer.values[index]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        held = [part for layer in self._held for part in (layer.keys, layer.values)]
        return sum(part.nbytes for part in held if part is not None)
