"""What the methods of the memory room do in one layer of a cache: keep, read, or store tokens in a form of their own.

One object of these serves all sequences of a batch; `select_rows` and `join` say how the batch changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tokenary.core.token_map import TokenMap

if TYPE_CHECKING:
    from tokenary.hf.cache import TokenLayer


class LayerState(Protocol):
    """What all of them share."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it holds."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the state of these sequences of the batch, in this order; none of them resets it."""

    def join(self, other: Any, rows: int) -> None:
        """Append the sequences of another one of its kind behind our `rows` sequences; the other is not used again."""


class LayerPolicy(LayerState, Protocol):
    """What of one layer's past is kept; implemented by the methods of the memory room, one object a layer."""

    #: Whether `observe` and `observe_prompt` must be called.
    observes: bool
    #: Whether `take` must be called, with what is about to leave the cache.
    takes: bool
    #: Whether `attend` must be asked, as a `LayerReader`'s is.
    attends: bool

    def observe_prompt(self, row: int, query_states: Tensor, key_states: Tensor, scaling: float) -> None:
        """See a piece of one sequence's prompt: queries (Hq, Q, D) that are the newest of the keys (Hkv, N, D)."""

    def observe(self, row: int, logits: Tensor) -> None:
        """See the attention logits (Hkv, G, A, N) of A newly committed tokens, -inf where they must not look."""

    def keep(self, row: int, held: int, n_new: int, prompt: bool) -> TokenMap | None:
        """Choose what stays of the `held` tokens of a sequence after `n_new` came: a map (Hkv, M, held), or None."""

    def take(self, row: int, chosen: TokenMap, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """See keys and values (Hkv, N, D) and original positions (Hkv, N) before only the `chosen` ones stay."""

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend instead of the cache; see `LayerReader.attend`."""

    def room(self, row: int, held: int) -> int | None:
        """How many tokens may be committed before the next choice; None for any number."""


class LayerReader(LayerState, Protocol):
    """What one layer reads of what it holds; implemented by methods of the memory room, one object a layer."""

    #: Whether queries and keys must come unrotated (the model is then told that every token stands at position 0);
    #: true positions are in ``layer.shared[0].positions`` and, where tokens were evicted, in ``layer.positions``.
    unrotated: bool

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend in its own way; None for the ordinary one.

        Parameters
        ----------
        layer : TokenLayer
            Slots up to ``layer.held[b]`` are the past of sequence b, the last ``layer.pending`` ones are new.
        query, key, value : Tensor
            (B, Hq, W, D), and (B, Hkv, N, D) with the new tokens at the end.
        mask : Tensor or None
            0 or -inf, (B, 1, G * W, N), rows by head of the group, then by token; None where all may be seen.
        scale : float
            Factor on the logits.

        Returns
        -------
        Tensor or None
            Output, (B, W, Hq, D).
        """


class LayerStore(LayerState, Protocol):
    """How one layer stores its older tokens; implemented by methods of the memory room, one object a layer.

    It owns the oldest tokens of every sequence; the newer ones lie open in the layer until it takes them.
    """

    #: Whether `observe` must be called.
    observes: bool

    def observe(self, row: int, query_states: Tensor, scaling: float) -> None:
        """See the queries (Hq, A, D) of A newly committed tokens of a sequence."""

    def take(self, row: int, keys: Tensor, values: Tensor, prompt: bool) -> int:
        """Store some of the oldest open tokens, of keys and values (Hkv, M, D); return how many."""

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values stored, (Hkv, N, D), in the order of the tokens."""

    def attend(
        self, row: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend to what is stored, all of it, and to open keys and values; they may hold rows that are masked.

        Parameters
        ----------
        row : int
            A sequence.
        query : Tensor
            (Hkv, R, D), R rows of all query heads of a group.
        keys, values : Tensor
            (Hkv, M, D).
        mask : Tensor or None
            0 or -inf, (R, M).
        scale : float
            Factor on the logits.

        Returns
        -------
        Tensor
            (Hkv, R, D).
        """

    def room(self, row: int, n_open: int) -> int | None:
        """How many tokens may be committed before it takes the next ones; None for any number."""
