"""The protocols of keeping a part of the past, of storing it in fewer bits, and of reading a part of what is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tokenary.core.budget import Budget, Layers, spread
from tokenary.core.method import Method
from tokenary.core.token_map import Select, TokenMap
from tokenary.hf.cache import TokenLayer

T = TypeVar("T")


class PerRow(dict[int, T], Generic[T]):
    """What is remembered of each sequence of a batch, by its row; nothing of some of them."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep what belongs to these sequences, in this order."""
        kept = {new: self[old] for new, old in enumerate(rows) if old in self}
        self.clear()
        self.update(kept)

    def join(self, other: PerRow[T], rows: int) -> None:
        """Append what belongs to other sequences behind our `rows` sequences."""
        self.update({rows + row: value for row, value in other.items()})


class RowState:
    """State for every sequence of a batch: its attributes that are `PerRow` move with the sequences.

    A class that remembers in another form overrides both methods.
    """

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the state of these sequences, in this order; none of them resets it."""
        for value in vars(self).values():
            if isinstance(value, PerRow):
                value.select_rows(rows)

    def join(self, other: Any, rows: int) -> None:
        """Append the sequences of another one of this kind behind our `rows` sequences; the other is not used again."""
        for name, value in vars(self).items():
            if isinstance(value, PerRow):
                value.join(vars(other)[name], rows)


def recent_and_top(scores: Tensor, kept: int, window: int) -> Select:
    """Choose the newest tokens and, of the older ones, those with the largest scores.

    Parameters
    ----------
    scores : Tensor
        (Hkv, N), in the order of the tokens.
    kept : int
        Tokens that stay, at most N.
    window : int
        How many of them are the newest, at most `kept`.

    Returns
    -------
    Select
        (Hkv, kept, N); the order of the tokens is kept.
    """
    held = scores.shape[-1]
    older = scores[:, : held - window].topk(kept - window).indices.sort(-1).values
    newest = torch.arange(held - window, held, device=scores.device).expand(len(scores), -1)
    return Select(torch.cat([older, newest], dim=-1), num_tokens=held)


class KeepPolicy(Method):
    """Keeps a part of the past of every sequence: reduces at the end of the prompt, then every `interval` tokens.

    A subclass names its options in ``__init__``, calls this one's, and implements `layer`.

    Parameters
    ----------
    keep : Budget
        How much stays; a share is of the prompt. Between two reductions a cache grows by `interval` tokens.
    layers : {"uniform", "pyramid"}
        How the budget is shared out over the layers.
    interval : int
        New tokens between two reductions during decoding.

    Attributes
    ----------
    toy_options : mapping
        Options with which something is dropped of a toy text; the laws run with them.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, keep: Budget, layers: Layers = "uniform", interval: int = 16) -> None:
        self.keep, self.layers, self.interval = keep, layers, interval

    def prepare(self, model: PreTrainedModel) -> None:
        """Get ready for a model, once: load what was learnt for it. Most have nothing to do.

        Raises
        ------
        UnsupportedModelError
            If the method does not work with this model.
        """

    @abstractmethod
    def layer(self, index: int) -> KeepLayer:
        """Return fresh state for one layer."""

    def attach(self, config: PretrainedConfig, dtype: torch.dtype) -> list[KeepLayer]:
        """Return fresh state for every layer of a model, with nothing left of earlier sequences."""
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        made = []
        for index in range(text.num_hidden_layers):
            state = self.layer(index)
            state.index, state.n_layers, state.kv_heads = index, text.num_hidden_layers, heads
            state.bytes_per_token = 2 * text.num_hidden_layers * heads * size * dtype.itemsize
            made.append(state)
        return made


class KeepLayer(RowState):
    """State of a keep policy in one layer, for every sequence of a batch; see `tokenary.hf.cache.LayerPolicy`.

    Subclasses implement `choose`; those that look at attention set `observes` and implement the two observers.
    """

    observes = False
    takes = False
    attends = False
    index: int
    n_layers: int
    kv_heads: int
    bytes_per_token: int

    def __init__(self, policy: KeepPolicy) -> None:
        self.policy = policy
        self._budget: PerRow[int | None] = PerRow()

    @abstractmethod
    def choose(self, row: int, held: int, kept: int) -> TokenMap:
        """Choose `kept` of the `held` tokens of a sequence: a map (Hkv or shared, kept, held)."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return 0

    def observe_prompt(self, row: int, query_states: Tensor, key_states: Tensor, scaling: float) -> None:
        """See a piece of one sequence's prompt: queries (Hq, Q, D) that are the newest of the keys (Hkv, N, D)."""

    def observe(self, row: int, logits: Tensor) -> None:
        """See the attention logits (Hkv, G, A, N) of A newly committed tokens, -inf where they must not look."""

    def take(self, row: int, chosen: TokenMap, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """See keys and values (Hkv, N, D) and original positions (Hkv, N) before only the `chosen` ones stay."""

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend instead of the cache; see `tokenary.hf.cache.LayerReader.attend`."""
        return None

    def keep(self, row: int, held: int, n_new: int, prompt: bool) -> TokenMap | None:
        """Choose what stays after `n_new` tokens came; None for everything."""
        if prompt:
            total = self.policy.keep.resolve(held, self.bytes_per_token)
            shares = None if total is None else spread(total, self.n_layers, self.policy.layers)
            self._budget[row] = None if shares is None else shares[self.index]
        kept = self._budget.get(row)
        if kept is None or held <= kept or (not prompt and held < kept + self.policy.interval):
            return None
        return self.choose(row, held, kept)

    def room(self, row: int, held: int) -> int | None:
        """How many tokens may be committed before the next reduction; None for any number."""
        kept = self._budget.get(row)
        return None if kept is None else max(1, kept + self.policy.interval - held)


class StorePolicy(Method):
    """Keeps every token, and stores the older ones in fewer bits: the prompt, then every `interval` new tokens.

    A subclass names its options in ``__init__``, calls this one's, and implements `layer`.

    Parameters
    ----------
    high, low : int
        Bits of the numbers that are stored more, and less, finely; with 16 they stay as the model made them.
    interval : int
        New tokens that are stored together; until then they lie open.
    """

    def __init__(self, high: int, low: int, interval: int) -> None:
        self.high, self.low, self.interval = high, low, interval

    @abstractmethod
    def layer(self, index: int) -> StoreLayer:
        """Return fresh state for one layer."""

    def attach(self, config: PretrainedConfig) -> list[StoreLayer]:
        """Return fresh state for every layer of a model, with nothing left of earlier sequences."""
        return [self.layer(index) for index in range(config.get_text_config(decoder=True).num_hidden_layers)]


class StoreLayer(RowState):
    """State of a store policy in one layer, for every sequence of a batch; see `tokenary.hf.cache.LayerStore`.

    What is stored must follow from committed tokens alone, and be taken `interval` tokens at a time: then drafts change
    nothing.
    """

    observes = False

    def __init__(self, policy: StorePolicy) -> None:
        self.policy = policy

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors held."""

    @property
    @abstractmethod
    def bits_per_value(self) -> float:
        """Bits that one stored number takes, with its part of scales, offsets and bookkeeping; nan if none is."""

    def observe(self, row: int, query_states: Tensor, scaling: float) -> None:
        """See the queries (Hq, A, D) of A newly committed tokens of a sequence."""

    @abstractmethod
    def take(self, row: int, keys: Tensor, values: Tensor, prompt: bool) -> int:
        """Store some of the oldest open tokens, of keys and values (Hkv, M, D); return how many."""

    @abstractmethod
    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values stored, (Hkv, N, D), in the order of the tokens."""

    @abstractmethod
    def attend(
        self, row: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend to what is stored and to open tokens; see `tokenary.hf.cache.LayerStore.attend`."""

    def room(self, row: int, n_open: int) -> int | None:
        """How many tokens may be committed before the next ones are stored."""
        return max(1, self.policy.interval - n_open)


class ReadPolicy(Method):
    """Keeps everything and reads a part of it: for every query, the tokens that matter to it.

    A subclass names its options in ``__init__`` and implements `layer`; `prepare` sees the model first.

    Attributes
    ----------
    extends_context : bool
        Whether texts may be longer than the model has positions for.
    toy_options : mapping
        Options with which something is left out of a toy text; the laws run with them.
    """

    extends_context: bool = False
    toy_options: ClassVar[Mapping[str, Any]] = {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Get ready for a model, once: read its rotation, load what was calibrated for it.

        Raises
        ------
        UnsupportedModelError
            If the method does not work with this model.
        """

    @abstractmethod
    def layer(self, index: int) -> ReadLayer | None:
        """Return fresh state for one layer; None for a layer that reads everything."""

    def attach(self, config: PretrainedConfig) -> list[ReadLayer | None]:
        """Return fresh state for every layer of a model, with nothing left of earlier sequences."""
        return [self.layer(index) for index in range(config.get_text_config(decoder=True).num_hidden_layers)]


class ReadLayer(RowState):
    """State of a read policy in one layer, for every sequence of a batch; see `tokenary.hf.cache.LayerReader`.

    What is read must depend on the query, on tokens before it and on nothing else: never on the other new tokens of
    the pass. Then drafts change nothing.
    """

    unrotated = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return 0

    @abstractmethod
    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend to what matters; see `tokenary.hf.cache.LayerReader.attend`."""
