"""A key-value cache whose logical and physical length are apart, with roll-back, eviction and draft trees.

Rows of a pass are *pending* until they are committed. Who decodes with a `Target` commits the accepted path of a
tree; under plain ``model.generate`` the next pass commits what ``crop`` left over. Eviction happens only at a
commit, so that a rejected draft can always be rolled back; so does the move of the oldest tokens into a store, which
keeps them in a form of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from tokenary.core.errors import RecipeError, UnsupportedModelError
from tokenary.core.token_map import Select, TokenMap
from tokenary.hf.layer_protocols import LayerPolicy, LayerReader, LayerState, LayerStore

__all__ = ["LayerPolicy", "LayerReader", "LayerStore", "PassInfo", "TokenCache", "TokenLayer"]

_CHUNK = 32  # slots that a growing cache takes at a time


@dataclass
class PassInfo:
    """What all layers share during one pass."""

    #: Ancestor-or-self relation of the new tokens, (B, W, W) bool; None for a chain.
    ancestors: Tensor | None = None
    #: Which held slots each new token may look at, (B, W, fill) bool; None for all.
    visible: Tensor | None = None
    #: Logical positions of the new tokens, (B, W); -1 at padding behind a shorter sequence. None: counted on.
    positions: Tensor | None = None
    #: Whether this pass is a piece of a prompt, and whether more of it follows.
    prompt: bool = False
    more: bool = False
    masks: dict[tuple, Tensor | None] = field(default_factory=dict)


class TokenLayer(CacheLayerMixin):
    """Keys and values of one layer; slot s < held[b] of sequence b is valid, whatever was evicted or padded.

    Parameters
    ----------
    shared : list of PassInfo
        One element: the pass under way, shared by the layers of a cache.
    policy : LayerPolicy, optional
        What is kept; everything without one.
    sliding_window : int, optional
        Width of the attention window of this layer. Older tokens are freed.
    reader : LayerReader, optional
        What is read of what is held; everything without one.
    store : LayerStore, optional
        Owns the oldest ``stored[b]`` of the slots; without one all lie open.
    """

    is_croppable = True

    def __init__(
        self,
        shared: list[PassInfo],
        policy: LayerPolicy | None = None,
        sliding_window: int | None = None,
        reader: LayerReader | None = None,
        store: LayerStore | None = None,
    ) -> None:
        self.shared, self.policy, self.sliding_window = shared, policy, sliding_window
        self.reader, self.store = reader, store
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything, and the policy's state with it."""
        self.storage: Tensor | None = None  # (2, B, Hkv, capacity, D); its slot s of sequence b is stored[b] + s
        self.positions: Tensor | None = None  # (B, Hkv, capacity); None while slot s holds token s
        self.held: list[int] = []  # valid slots of each sequence
        self.stored: list[int] = []  # how many of them, the first ones, the store owns
        self.committed: list[int] = []  # tokens of each sequence that were ever committed
        self.fill = 0  # slots before the pending ones: the longest `held`
        self.n_open = 0  # of them in `storage`: the largest `held` less `stored`
        self.pending = 0
        self.seen = 0
        self.valid: Tensor | None = None  # (B, W): which pending rows are no padding; None for all
        self.logits: Tensor | None = None  # (B, Hkv, G, W, N) of the pass, where the policy asks for them
        self.queries: tuple[Tensor, float] | None = None  # (B, Hq, W, D) of the pass and their scale, for the store
        self.is_initialized = False
        for state in self._states:
            state.select_rows([])

    # -- transformers' interface -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first keys, (B, Hkv, W, D)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        if value_states.shape[-1] != width:
            raise UnsupportedModelError("keys and values of different width are not supported")
        self.storage = key_states.new_empty(2, batch, heads, 0, width)
        self.held, self.stored, self.committed = [0] * batch, [0] * batch, [0] * batch
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the pass's keys and values, (B, Hkv, W, D), as pending rows; return all open ones, (B, Hkv, N, D).

        The returned keys carry this layer, so that the attention function finds it without global state.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.pending:
            self.commit()
        assert self.storage is not None
        self.pending = key_states.shape[2]
        self.seen += self.pending
        end = self.n_open + self.pending
        if end > self.storage.shape[3]:
            self._resize(-(-end // _CHUNK) * _CHUNK)
        self.storage[0, :, :, self.n_open : end] = key_states
        self.storage[1, :, :, self.n_open : end] = value_states
        keys, values = self.storage[0, :, :, :end], self.storage[1, :, :, :end]
        keys.cache_layer = self  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: what positions are counted from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the physical cache for a mask over it."""
        physical = self.fill + self.pending
        return physical + query_length, self.seen - physical

    def get_max_length(self) -> int:
        """No fixed maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the newest ``-tokens_to_remove`` pending tokens."""
        count = abs(tokens_to_remove)
        if count > self.pending:
            raise UnsupportedModelError(f"cannot roll back {count} tokens: only {self.pending} are not yet committed")
        self.pending -= count
        self.seen -= count
        self.valid = None if self.valid is None else self.valid[:, : self.pending]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self.select_rows(indices.tolist() if indices.dtype != torch.bool else indices.nonzero()[:, 0].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences of the batch."""
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self.select_rows([row for row in range(len(self.held)) for _ in range(repeats)])

    # -- ours --------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys held, (B, Hkv, N, D)."""
        return None if self.storage is None else self.whole()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values held, (B, Hkv, N, D)."""
        return None if self.storage is None else self.whole()[1]

    def whole(self) -> Tensor:
        """Return keys and values of all slots, (2, B, Hkv, N, D); a copy where some of them are stored."""
        assert self.storage is not None
        opened = self.storage[:, :, :, : self.n_open + self.pending]
        if self.store is None or not any(self.stored):
            return opened
        made = opened.new_zeros(*opened.shape[:3], self.fill + self.pending, opened.shape[4])
        made[:, :, :, self.fill :] = opened[:, :, :, self.n_open :]
        for row, (held, stored) in enumerate(zip(self.held, self.stored, strict=True)):
            if stored:
                made[0, row, :, :stored], made[1, row, :, :stored] = self.store.read(row)
            made[:, row, :, stored:held] = opened[:, row, :, : held - stored]
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors really held, free slots and bookkeeping included."""
        held = [tensor for tensor in (self.storage, self.positions) if tensor is not None]
        return sum(tensor.nbytes for tensor in held) + sum(state.nbytes for state in self._states)

    @property
    def _states(self) -> list[LayerState]:
        return [state for state in (self.policy, self.reader, self.store) if state is not None]

    def commit(self, paths: Sequence[Sequence[int]] | None = None) -> None:
        """Make pending rows part of the past, drop the others, then let policy and store do what they do.

        Parameters
        ----------
        paths : sequence of sequence of int, optional
            The pending rows of each sequence to take, ascending; all that are no padding without it.
        """
        if paths is None:
            all_rows = range(self.pending)
            paths = (
                [all_rows] * len(self.held) if self.valid is None else [v.nonzero()[:, 0].tolist() for v in self.valid]
            )
        else:
            self.seen -= self.pending - max(map(len, paths), default=0)
        info, first = self.shared[0], self.fill == 0
        self._observe(paths)
        self._take(paths)
        self.pending, self.valid, self.logits, self.queries = 0, None, None, None
        self._measure()
        if not info.more:
            self._reduce(list(map(len, paths)), first or info.prompt)

    def _observe(self, paths: Sequence[Sequence[int]]) -> None:
        """Show the policy the logits, and the store the queries, of the rows that are about to be committed."""
        if self.store is not None and self.store.observes and self.queries is not None:
            query, scale = self.queries
            for row, path in enumerate(paths):
                if len(path):
                    chosen = torch.as_tensor(path, device=self.device)
                    self.store.observe(row, query[row].index_select(1, chosen), scale)
        if self.logits is None or self.policy is None:
            return
        for row, path in enumerate(paths):
            if len(path):
                chosen = torch.as_tensor(path, device=self.device)
                columns = torch.cat([torch.arange(self.held[row], device=self.device), chosen + self.fill])
                self.policy.observe(row, self.logits[row].index_select(2, chosen).index_select(3, columns))

    def _take(self, paths: Sequence[Sequence[int]]) -> None:
        """Move the pending rows of each sequence's path behind what it holds: all sequences in one copy."""
        assert self.storage is not None
        rows, sources, targets, numbers = list[int](), list[int](), list[int](), list[int]()
        for row, path in enumerate(paths):
            start, first, count = self.held[row] - self.stored[row], self.committed[row], len(path)
            lies = start == self.n_open and (not count or path[-1] == count - 1)
            if self.positions is not None or not lies:
                rows += [row] * count
                sources += [self.n_open + node for node in path]
                targets += range(start, start + count)
                numbers += range(first, first + count)
            self.held[row] += count
            self.committed[row] += count
        if sources != targets:
            row, source, target = torch.tensor([rows, sources, targets], device=self.device)
            self.storage[:, row, :, target] = self.storage[:, row, :, source]
        if self.positions is not None and rows:
            row, target, number = torch.tensor([rows, targets, numbers], device=self.device)
            self.positions[row, :, target] = number.to(self.positions.dtype)[:, None]

    def _reduce(self, taken: Sequence[int], prompt: bool) -> None:
        """Let the policy or the sliding window free tokens, or the store take some."""
        changed = False
        for row, held in enumerate(self.held):
            chosen: TokenMap | None = None
            if self.policy is not None:
                chosen = self.policy.keep(row, held, taken[row], prompt)
            elif self.sliding_window is not None and held > self.sliding_window + _CHUNK:
                chosen = Select(torch.arange(held - self.sliding_window, held, device=self.device), num_tokens=held)
            if chosen is not None:
                self._keep(row, chosen)
                changed = True
            elif self.store is not None:
                changed |= self._move(row, self.store, prompt)
        if changed:
            self._measure()
            self._resize(self.n_open + 8)

    def _measure(self) -> None:
        """Find how many slots lie before the pending ones."""
        self.fill = max(self.held, default=0)
        self.n_open = max((held - stored for held, stored in zip(self.held, self.stored, strict=True)), default=0)

    def _move(self, row: int, store: LayerStore, prompt: bool) -> bool:
        """Let the store take of one sequence's open tokens; return whether it did."""
        assert self.storage is not None
        n_open = self.held[row] - self.stored[row]
        taken = store.take(row, self.storage[0, row, :, :n_open], self.storage[1, row, :, :n_open], prompt)
        self.storage[:, row, :, : n_open - taken] = self.storage[:, row, :, taken:n_open].clone()
        self.stored[row] += taken
        return taken > 0

    def _keep(self, row: int, chosen: TokenMap) -> None:
        """Apply a map (Hkv or shared, M, held) to one sequence's keys, values and positions."""
        assert self.storage is not None
        held, kept = self.held[row], chosen.shape[-2]
        chosen = chosen.to(self.device)  # a policy that looks at no tensor does not know the device
        positions = self._number()
        if self.policy is not None and self.policy.takes:
            keys, values = self.storage[:, row, :, :held]
            self.policy.take(row, chosen, keys, values, positions[row, :, :held])
        self.storage[:, row, :, :kept] = chosen.apply(self.storage[:, row, :, :held])
        positions[row, :, :kept] = chosen.apply(positions[row, :, :held], dim=-1)
        self.held[row] = kept

    def _number(self) -> Tensor:
        """Return the positions of the tokens held; while none was evicted they are those of the slots."""
        assert self.storage is not None
        if self.positions is None:
            slots = torch.arange(self.storage.shape[3], dtype=torch.int32, device=self.device)
            self.positions = slots.repeat(*self.storage.shape[1:3], 1)
        return self.positions

    def _resize(self, capacity: int) -> None:
        """Reallocate to `capacity` slots, keeping what is held; free ones hold zeros, as a masked NaN would be one."""
        assert self.storage is not None
        old = self.storage
        kept = min(old.shape[3], capacity)
        self.storage = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
        self.storage[:, :, :, :kept] = old[:, :, :, :kept]
        if self.positions is not None:
            positions = self.positions.new_zeros(*self.positions.shape[:2], capacity)
            positions[:, :, :kept] = self.positions[:, :, :kept]
            self.positions = positions

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.storage is None:
            return
        index = torch.as_tensor(list(rows), device=self.device, dtype=torch.long)
        self.storage = self.storage.index_select(1, index)
        self.positions = None if self.positions is None else self.positions[index]
        self.valid = None if self.valid is None else self.valid[index]
        self.logits = None if self.logits is None else self.logits[index]
        self.queries = None if self.queries is None else (self.queries[0][index], self.queries[1])
        self.held = [self.held[row] for row in rows]
        self.stored = [self.stored[row] for row in rows]
        self.committed = [self.committed[row] for row in rows]
        if not self.pending:  # the longest sequence may have left
            self._measure()
        for state in self._states:
            state.select_rows(rows)

    def join(self, other: TokenLayer) -> None:
        """Append the sequences of another layer of this kind behind ours; neither has pending rows.

        The other is not used again.
        """
        if other.storage is None:
            return
        if self.storage is None:
            self.lazy_initialization(*other.storage[:, :0])
        assert self.storage is not None
        capacity = (max(self.n_open, other.n_open) // _CHUNK + 2) * _CHUNK
        if self.positions is not None or other.positions is not None:
            self.positions = _behind(self._number(), other._number(), 0, capacity)
        self.storage = _behind(self.storage, other.storage, 1, capacity)
        for ours, theirs in zip(self._states, other._states, strict=True):
            ours.join(theirs, len(self.held))
        self.held, self.stored = self.held + other.held, self.stored + other.stored
        self.committed, self.seen = self.committed + other.committed, max(self.seen, other.seen)
        self._measure()

    def mask(self, padding: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """What each pending token may look at, as a term on the logits; None where it is everything.

        Parameters
        ----------
        padding : Tensor, optional
            True at tokens that are no padding, (B, >= W); its last W columns belong to the pending tokens.
        groups : int
            Query heads a key head, G.
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        Tensor or None
            0 or -inf, (B, 1, G * W, N).
        """
        width, info = self.pending, self.shared[0]
        if padding is not None and width > 1:
            newest = padding[:, -width:].bool()
            self.valid = None if bool(newest.all()) else newest
        window = self.sliding_window if self.sliding_window and self.fill + width > self.sliding_window else None
        if width == 1 and min(self.held) == self.fill and window is None and info.visible is None:
            return None
        key = (tuple(self.held), width, window, groups)
        if key not in info.masks:
            seen = self._visible(width, info, window)
            term = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
            info.masks[key] = term[:, None].repeat(1, 1, groups, 1)
        return info.masks[key]

    def _visible(self, width: int, info: PassInfo, window: int | None) -> Tensor:
        """What each pending token may look at, (B, W, N) bool."""
        batch, device = len(self.held), self.device
        held = torch.as_tensor(self.held, device=device)
        past = torch.arange(self.fill, device=device) < held[:, None, None]  # (B, 1, fill)
        if info.visible is not None:
            past = past & info.visible
        if info.ancestors is not None:
            new = info.ancestors
        else:
            new = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
        if self.valid is not None:  # a padded query sees itself, so that its softmax is defined
            new = new & (self.valid[:, None] | torch.eye(width, dtype=torch.bool, device=device))
        visible = torch.cat([past.expand(batch, width, -1), new], dim=-1)
        if window is None:
            return visible
        if info.positions is not None:
            queries = info.positions
        elif self.valid is not None:
            queries = self.valid.cumsum(1) - 1
        else:
            queries = torch.as_tensor(self.committed, device=device)[:, None] + torch.arange(width, device=device)
        slots = torch.arange(self.fill, device=device).expand(batch, -1)
        old = slots if self.positions is None else self.positions[:, 0, : self.fill]
        keys = torch.cat([old, queries], dim=1)  # (B, N)
        return visible & (queries[:, :, None] - keys[:, None] < window)


def _behind(ours: Tensor, theirs: Tensor, dim: int, capacity: int) -> Tensor:
    """Join tensors along the sequences, dimension `dim`; their slots, two dimensions on, get another number."""
    shape, count = [*ours.shape], ours.shape[dim]
    shape[dim], shape[dim + 2] = count + theirs.shape[dim], capacity
    joined = ours.new_zeros(shape)
    for at, part in ((0, ours), (count, theirs)):
        slots = min(capacity, part.shape[dim + 2])
        joined.narrow(dim, at, part.shape[dim]).narrow(dim + 2, 0, slots).copy_(part.narrow(dim + 2, 0, slots))
    return joined


class TokenCache(Cache):
    """A cache of `TokenLayer`, passed to a model as ``past_key_values``.

    Parameters
    ----------
    config : PretrainedConfig
        Configuration of the model; its layer types decide which layers slide.
    policies : sequence of LayerPolicy or None, optional
        What each layer keeps; sliding layers ignore theirs, since their window already bounds them.
    readers : sequence of LayerReader or None, optional
        What each layer reads; sliding layers ignore theirs.
    stores : sequence of LayerStore or None, optional
        How each layer stores its older tokens; sliding layers ignore theirs.

    Raises
    ------
    UnsupportedModelError
        If the model has layers that are no attention layers, or some that slide where keys must come unrotated.
    RecipeError
        If stores come with policies, or with readers that want keys unrotated.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        policies: Sequence[LayerPolicy | None] | None = None,
        readers: Sequence[LayerReader | None] | None = None,
        stores: Sequence[LayerStore | None] | None = None,
    ) -> None:
        if policies is not None and stores is not None:
            raise RecipeError("a cache that drops tokens and one that stores them in another form do not compose")
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if strange:
            raise UnsupportedModelError(f"layers of type {', '.join(strange)} have no cache of keys and values")
        self.shared = [PassInfo()]
        sliding = [kind == "sliding_attention" for kind in kinds]
        self.token_layers = [
            TokenLayer(
                self.shared,
                None if policies is None or slides else policies[layer],
                text.sliding_window if slides else None,
                None if readers is None or slides else readers[layer],
                None if stores is None or slides else stores[layer],
            )
            for layer, slides in enumerate(sliding)
        ]
        super().__init__(layers=list(self.token_layers))
        told = [layer.reader is not None and layer.reader.unrotated for layer in self.token_layers]
        if any(told) and not all(told):
            raise UnsupportedModelError("keys cannot come unrotated to some layers and rotated to others")
        if any(told) and stores is not None:
            raise RecipeError("a store judges tokens by rotated queries and keys; here they come unrotated")

    @property
    def unrotated(self) -> bool:
        """Whether keys are held, and must come, unrotated."""
        return any(layer.reader is not None and layer.reader.unrotated for layer in self.token_layers)

    def begin(self, info: PassInfo) -> None:
        """Announce what the next pass looks like."""
        self.shared[0] = info

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit pending rows in every layer; see `TokenLayer.commit`."""
        for layer in self.token_layers:
            layer.commit(paths)

    def room(self, row: int) -> int | None:
        """How many tokens of a sequence may be committed at once without skipping a policy's choice."""
        rooms: list[int | None] = []
        for layer in self.token_layers:
            if layer.policy is not None:
                rooms.append(layer.policy.room(row, layer.held[row]))
            if layer.store is not None:
                rooms.append(layer.store.room(row, layer.held[row] - layer.stored[row]))
        return min((room for room in rooms if room is not None), default=None)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order."""
        for layer in self.token_layers:
            layer.select_rows(rows)

    def join(self, other: TokenCache) -> None:
        """Append the sequences of another cache of this kind behind ours; see `TokenLayer.join`."""
        for ours, theirs in zip(self.token_layers, other.token_layers, strict=True):
            ours.join(theirs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(layer.nbytes for layer in self.token_layers)
