"""One layer of a cache: exact keys and values of some tokens, and sums of all the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenary.core.errors import RecipeError
from tokenary.core.token_map import Select, TokenMap
from tokenary.hf.cache import TokenCache, TokenLayer
from tokenary.hf.hooks import hidden_states_of
from tokenary.memory.base import KeepLayer, PerRow
from tokenary.memory.read_base import in_prompt
from tokenary.memory.still.branches import Exact, State
from tokenary.memory.still.hybrid import hybrid_attention
from tokenary.memory.still.maps import Maps
from tokenary.memory.still.routing import leaving, prompt_saliency, self_saliency, staying

if TYPE_CHECKING:
    from tokenary.memory.still import STILL


class DenseLayer(KeepLayer):
    """A layer that stays as it is."""

    def choose(self, row: int, held: int, kept: int) -> Select:
        """Choose everything."""
        return Select(torch.arange(held), num_tokens=held)


@dataclass(frozen=True, eq=False)
class Row:
    """What a layer knows of one sequence beside its keys and values."""

    seen: int = 0  # tokens committed
    old: int = 0  # chunks that were chosen from
    scores: Tensor | None = None  # saliency of the tokens of all younger chunks, (Hkv, n)
    state: State | None = None  # of the linear branch


class StillLayer(KeepLayer):
    """Exact tokens in the cache, saliency of the last chunks, and the sums of the linear branch.

    A chunk is chosen from when it is two chunks old: at the commit that completes a chunk. `room` ends there, so that
    drafts change nothing. The prompt is attended to chunk by chunk before anything of it leaves.

    Parameters
    ----------
    policy : STILL
        Its rule.
    maps : Maps
        Of this layer.
    """

    takes = attends = True
    policy: STILL

    def __init__(self, policy: STILL, maps: Maps) -> None:
        super().__init__(policy)
        self.maps, self.rule = maps, policy.rule
        self.observes = self.rule.scores
        self._hidden: Tensor | None = None  # of the pass under way
        self._rows: PerRow[Row] = PerRow()

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and of the scores."""
        rows = {id(row): row for row in self._rows.values()}.values()  # a sequence that is repeated shares its own
        scores = sum(row.scores.nbytes for row in rows if row.scores is not None)
        return scores + sum(row.state.nbytes for row in rows if row.state is not None)

    def look(self, hidden_states: Tensor) -> None:
        """See what the queries of the pass under way are made of, (B, W, hidden): the gates depend on it."""
        self._hidden = hidden_states

    # -- saliency ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe_prompt(self, row: int, query_states: Tensor, key_states: Tensor, scaling: float) -> None:
        """Score a piece of one sequence's prompt."""
        scores = prompt_saliency(query_states.float(), key_states.float(), scaling, self.rule.chunk)
        self._append(row, scores)

    def observe(self, row: int, logits: Tensor) -> None:
        """Score newly committed tokens; logits (Hkv, G, A, N) of A tokens."""
        n_new, n_keys = logits.shape[2:]
        for number in range(n_new):
            at = n_keys - n_new + number  # its own column; those before it are the tokens before it
            window = logits[:, :, number, max(0, at + 1 - self.rule.chunk) : at + 1]
            own = torch.arange(window.shape[-1], device=logits.device) == window.shape[-1] - 1
            self._append(row, self_saliency(window, own).mean(1, keepdim=True))

    def _append(self, row: int, scores: Tensor) -> None:
        state = self._rows.get(row, Row())
        known = scores if state.scores is None else torch.cat([state.scores, scores], dim=1)
        self._rows[row] = replace(state, scores=known)

    # -- what stays --------------------------------------------------------------------------------------------

    def keep(self, row: int, held: int, n_new: int, prompt: bool) -> TokenMap | None:
        """Choose from the chunks that became old; None while there is none."""
        state = self._rows.get(row, Row())
        seen = held if prompt else state.seen + n_new
        self._rows[row] = replace(state, seen=seen)
        due = 0 if self.rule.everything else self.rule.old(seen) - state.old
        return self.choose(row, held, held - due * (self.rule.chunk - self.rule.salient)) if due > 0 else None

    def choose(self, row: int, held: int, kept: int) -> Select:
        """Choose from so many old chunks that `kept` tokens stay, one chunk after the other."""
        rule, state = self.rule, self._rows[row]
        scores = torch.zeros(self.kv_heads, held) if state.scores is None else state.scores
        older = state.old * rule.salient
        chosen = torch.arange(older, device=scores.device).expand(self.kv_heads, -1)
        due = (held - kept) // (rule.chunk - rule.salient)
        for number in range(due):
            start = number * rule.chunk
            stay = staying(rule, chosen.shape[1], scores[:, start : start + rule.chunk], self.index, state.old + number)
            fallen = torch.arange(older + start, older + start + rule.chunk, device=scores.device)
            chosen = torch.cat([chosen, fallen.expand(self.kv_heads, -1)], dim=1).gather(1, stay)
        rest = torch.arange(older + due * rule.chunk, held, device=scores.device).expand(self.kv_heads, -1)
        left = None if state.scores is None else state.scores[:, due * rule.chunk :].clone()
        self._rows[row] = replace(state, old=state.old + due, scores=left)
        return Select(torch.cat([chosen, rest], dim=1), num_tokens=held)

    def take(self, row: int, chosen: TokenMap, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add what leaves to the sums."""
        assert isinstance(chosen, Select)
        gone = leaving(chosen.index, chosen.num_tokens)[..., None].expand(-1, -1, keys.shape[-1])
        state = self._rows[row]
        sums = state.state or State.empty(self.maps, keys.new_empty(0, dtype=self.maps.gate.weight.dtype))
        added = sums.add(self.maps, keys.gather(1, gone), values.gather(1, gone))
        self._rows[row] = replace(state, state=added)

    def room(self, row: int, held: int) -> int | None:
        """Tokens up to the end of the chunk."""
        seen = self._rows.get(row, Row()).seen
        return None if self.rule.everything else self.rule.chunk - seen % self.rule.chunk

    # -- attention ---------------------------------------------------------------------------------------------

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend to exact tokens and to the sums; the ordinary way while every token is exact."""
        hidden, self._hidden = self._hidden, None
        info = layer.shared[0]
        reading = in_prompt(layer) and info.ancestors is None and info.visible is None
        states = [self._rows.get(row, Row()).state for row in range(query.shape[0])]
        if self.rule.everything or not (reading or any(states)) or (key.shape[2] <= 2 * self.rule.chunk and reading):
            return None
        if hidden is None:
            raise RecipeError("still looks at the hidden states of its model: call prepare(model) first")
        gates = self.maps.gates(hidden)  # (B, Hq, W, D)
        query = query.to(gates.dtype)
        if reading:
            found = self._read(layer, query, key, value, gates, scale)
        else:
            logits = layer.logits  # those that were made for `observe`
            if logits is None or logits.dtype != query.dtype:
                logits = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].to(query.dtype).mT * scale
                if mask is not None:
                    logits = logits + mask.view(mask.shape[0], 1, -1, *logits.shape[-2:])
            sums = [state or State.empty(self.maps, query) for state in states]
            read = State.stack(sums).read(self.maps.query(query))
            found = Exact.of(logits, value.to(query.dtype)).joined(read, gates, self.rule.rescale)
        return found.to(value.dtype).transpose(1, 2)

    def _read(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, gates: Tensor, scale: float
    ) -> Tensor:
        """Attend to a piece of a prompt, sequence by sequence: (B, Hq, W, D), zero at padding."""
        positions, output = layer.shared[0].positions, torch.zeros_like(query)
        valid = layer.valid if layer.valid is not None or positions is None else positions >= 0
        for row, held in enumerate(layer.held):
            every = torch.arange(query.shape[2], device=key.device)
            new = every if valid is None else valid[row].nonzero()[:, 0]
            if len(new):
                slots = torch.cat([torch.arange(held, device=key.device), layer.fill + new])
                keys, values = (x[row].index_select(1, slots).to(query.dtype) for x in (key, value))
                known = self._rows.get(row, Row()).scores
                scores = keys.new_zeros(keys.shape[:2]) if known is None else known
                queries, opened = query[row].index_select(1, new), gates[row].index_select(1, new)
                arguments = scores, self.maps, self.rule, scale, self.index
                output[row, :, new] = hybrid_attention(queries, keys, values, opened, *arguments)
        return output


def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the hidden states of a pass to the cache that comes with them: a pre-hook of attention modules."""
    cache, layer = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
    policy = cache.token_layers[layer].policy if isinstance(cache, TokenCache) and layer is not None else None
    look = getattr(policy, "look", None)
    if look is not None:
        look(hidden_states_of(args, kwargs))
