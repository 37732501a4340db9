"""A key-value cache whose rows are overwritten in place: a pass computes some positions and looks at others.

For a model that looks both ways, nothing is ever appended. Each layer holds keys and values of all T positions of a
sequence, rotated at their true positions. A pass hands over `computed` positions, whose rows are replaced, and sees
the rows of `attended` ones. Called through transformers' own door: ``past_key_values=cache, position_ids=computed``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from tokenary.core.errors import UnsupportedModelError


class ScatterLayer(CacheLayerMixin):
    """Keys and values of one layer, one row a position.

    Parameters
    ----------
    cache : ScatterCache
        Knows which positions the pass under way computes and attends to.
    """

    is_sliding = False

    def __init__(self, cache: ScatterCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first keys and values, (1, Hkv, W, D)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._cache.length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of the computed positions, (1, Hkv, W, D); return those of the attended, (1, Hkv, N, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        computed, attended = self._cache.computed, self._cache.attended
        if computed is None:
            self.keys.copy_(key_states)
            self.values.copy_(value_states)
        else:
            self.keys.index_copy_(2, computed, key_states)
            self.values.index_copy_(2, computed, value_states)
        if attended is None:
            return self.keys, self.values
        return self.keys.index_select(2, attended), self.values.index_select(2, attended)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a pass sees, and 0."""
        attended = self._cache.attended
        return (self._cache.length if attended is None else len(attended)), 0

    def get_seq_length(self) -> int:
        """Return 0: positions are always given, never counted on."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of positions."""
        return self._cache.length


class ScatterCache(Cache):
    """A cache of `ScatterLayer` for one sequence.

    Parameters
    ----------
    config : PretrainedConfig
        Of a bidirectional model.
    length : int
        Positions of the sequence, T.
    """

    def __init__(self, config: PretrainedConfig, length: int) -> None:
        self.length = length
        self.computed: Tensor | None = None
        self.attended: Tensor | None = None
        self.scatter_layers = [ScatterLayer(self) for _ in range(config.get_text_config().num_hidden_layers)]
        super().__init__(layers=list(self.scatter_layers))

    def begin(self, computed: Tensor | None, attended: Tensor | None) -> None:
        """Announce a pass.

        Parameters
        ----------
        computed, attended : Tensor or None
            Positions, (W,) and (N,) long, ascending; None for all. Whatever is attended to was computed before, or is
            in this pass.
        """
        self.computed, self.attended = computed, attended

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        held = [tensor for layer in self.scatter_layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def check_scatter(model: PreTrainedModel) -> None:
    """Refuse a model whose attention cannot work over a `ScatterCache`.

    Raises
    ------
    UnsupportedModelError
        If it looks only backwards, or has layers that are no full attention layers.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if getattr(config, "is_causal", True):
        raise UnsupportedModelError(f"{name} looks only backwards; a window over masked positions needs both sides")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if strange:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(strange)}; only full attention can be windowed"
        )


@torch.inference_mode()
def scatter_pass(
    model: PreTrainedModel, cache: ScatterCache, input_ids: Tensor, logits_at: Tensor | None = None
) -> Tensor:
    """Run the model on the positions that `cache.begin` announced.

    Parameters
    ----------
    model : PreTrainedModel
        Bidirectional.
    cache : ScatterCache
        Of the same sequence, told of the pass.
    input_ids : Tensor
        (1, T) long, all tokens of the sequence.
    logits_at : Tensor, optional
        Positions (K,) long, all of them computed ones, ascending; without it, all computed positions.

    Returns
    -------
    Tensor
        (1, K, V) logits; the head runs on these rows only.
    """
    computed = cache.computed
    if computed is None:
        positions, rows = torch.arange(cache.length, device=input_ids.device), logits_at
    else:
        input_ids, positions = input_ids[:, computed], computed
        rows = None if logits_at is None else torch.searchsorted(computed, logits_at)
    return model(
        input_ids=input_ids,
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=0 if rows is None else rows,
    ).logits
