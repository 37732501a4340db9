"""Fewer image tokens from one layer of a language model on; the layers below keep them all."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.token_map import TokenMap
from tokenary.hf.hooks import attention_modules, edited_layer, watched_heads
from tokenary.hf.rotation import rotated
from tokenary.reduce.base import Context, Point, Reducer
from tokenary.reduce.encoder import Record
from tokenary.reduce.mix import anchors_of


class DecoderReduction:
    """A language model whose layers from one on see fewer image tokens; inside a ``with`` block.

    One block is one prompt and what is decoded after it: the map that is made when the prompt is read also says what of
    the mask belongs to the rows that the upper layers of the cache hold. With an empty cache, or none, it begins anew.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only language model.
    reducer : Reducer
    point : Point or str
        Of stage ``decoder``; with layer k, layers 0 to k - 1 see everything.
    start : int
        Where the image tokens begin in the prompt.
    count : int
        How many they are.
    context : Context
        What is known of them. Queries, keys and values of the layers below are added to it, rotated.

    Attributes
    ----------
    map : TokenMap or None
        (B, M, N) over the image tokens, once a prompt was read.
    """

    def __init__(
        self, model: PreTrainedModel, reducer: Reducer, point: Point | str, *, start: int, count: int, context: Context
    ) -> None:
        self.model, self.reducer, self.start = model, reducer, start
        self.count, self.context, self.record = count, context, Record()
        self.attention = attention_modules(model)
        self.point = Point.parse(point, len(self.attention))
        if self.point.stage != "decoder":
            raise OptionError("at", str(self.point), "a place inside the language model, as decoder:2")
        self.first = self.point.layers[0]
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
        if set(kinds) != {"full_attention"}:
            raise UnsupportedModelError(f"{type(model).__name__} has layers that do not attend to all that they hold")
        self._reset()

    def _reset(self) -> None:
        self.map: TokenMap | None = None
        self.rows: Tensor | None = None  # (B, M') tokens of the prompt that the rows of upper layers stand at
        self.valid: Tensor | None = None  # (B, M') bool; None where each row is a token
        self.bias: Tensor | None = None  # (B, M') logarithms of sizes; None where all are 1
        self.prompt = 0  # tokens of the prompt
        self._shared: dict[str, Any] = {}  # what layers from the first on get in this pass

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        below = self.first - 1
        wanted = sorted(self.reducer.layers(len(self.attention), below))
        if wanted and (wanted[0] < 0 or wanted[-1] > below):
            raise OptionError("at", str(self.point), f"layers below {self.first} to look at, not {wanted}")
        with contextlib.ExitStack() as undo:  # what is refused half-way leaves nothing attached
            undo.callback(self._stack.close)
            for layer in wanted:
                self._watch(layer)
            for layer in range(self.first, len(self.attention)):
                edit = self._enter_pass if layer == self.first else self._same_pass
                self._stack.enter_context(edited_layer(self.model, layer, edit))
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # -- what is recorded below --------------------------------------------------------------------------------

    def _watch(self, layer: int) -> None:
        """Record what a layer projects, without computing it again."""
        for kind in sorted({"queries", "keys", "values"} & self.reducer.needs):
            keep = functools.partial(getattr(self.record, kind).__setitem__, layer)
            self._stack.callback(watched_heads(self.attention[layer], kind, keep).remove)

    def _rotate(self, states: dict[int, Tensor], embeddings: tuple[Tensor, Tensor] | None) -> dict[int, Tensor]:
        return {layer: rotated(self.model, each, embeddings) for layer, each in states.items()}

    # -- the pass ----------------------------------------------------------------------------------------------

    def _enter_pass(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Reduce a prompt, or adapt a pass after it, at the first layer that sees less."""
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length(self.first) == 0:
            hidden = self._read_prompt(hidden, kwargs)
            self._shared = {} if self.rows is None else self._prompt_kwargs(hidden, kwargs)
        else:
            self._shared = {} if self.rows is None else self._later_kwargs(hidden, kwargs)
        return self._same_pass(hidden, kwargs)

    def _same_pass(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        return hidden, {**kwargs, **self._shared}

    def _read_prompt(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self._reset()
        start, stop = self.start, self.start + self.count
        if hidden.shape[1] < stop:
            raise UnsupportedModelError("a prompt must be read in one pass when image tokens are dropped on the way")
        image, embeddings = hidden[:, start:stop], kwargs.get("position_embeddings")
        context = replace(
            self.context,
            span=(start, self.count),
            layer=self.first - 1,
            n_layers=len(self.attention),
            queries=self._rotate(self.record.queries, embeddings),
            keys=self._rotate(self.record.keys, embeddings),
            values=dict(self.record.values),
            scale=getattr(self.attention[0], "scaling", 1.0),
        )
        self.record.clear()
        self.map = chosen = self.reducer.reduce(image, context)
        if chosen.is_identity:
            return hidden
        self.prompt = hidden.shape[1]
        self._set_rows(chosen, hidden)
        return torch.cat([hidden[:, :start], chosen.apply(image), hidden[:, stop:]], dim=1)

    def _set_rows(self, chosen: TokenMap, hidden: Tensor) -> None:
        """Say which token each row of the upper layers stands at, and how many it stands for."""
        batch, device, stop = len(hidden), hidden.device, self.start + self.count
        tokens = torch.arange(self.prompt, device=device).expand(batch, -1)
        kept = anchors_of(chosen).expand(batch, -1) + self.start
        self.rows = torch.cat([tokens[:, : self.start], kept, tokens[:, stop:]], dim=1)
        there = chosen.mask(torch.ones(self.count, dtype=torch.bool, device=device)).expand(batch, -1)
        if not bool(there.all()):
            yes = torch.ones_like(tokens, dtype=torch.bool)
            self.valid = torch.cat([yes[:, : self.start], there, yes[:, : self.prompt - stop]], dim=1)
        if self.reducer.proportional and self.reducer.kind != "prune":
            sizes = chosen.sizes(self.context.sizes).float().clamp_min(1e-9).log().expand(batch, -1)
            ends = sizes.new_zeros(batch, 1)
            self.bias = torch.cat([ends.expand(-1, self.start), sizes, ends.expand(-1, self.prompt - stop)], dim=1)

    def _prompt_kwargs(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert self.rows is not None
        rows, width = self.rows, self.rows.shape[1]
        found = dict[str, Any]()
        mask: Tensor | None = kwargs.get("attention_mask")
        causal = torch.ones(width, width, dtype=torch.bool, device=rows.device).tril()
        if mask is not None and mask.ndim == 2:
            mask = mask[:, -self.prompt :].bool().gather(1, rows)
            found["attention_mask"] = mask if self.valid is None else mask & self.valid
        elif mask is not None or self.valid is not None or self.bias is not None:
            if mask is None:
                mask = causal.expand(len(rows), 1, -1, -1)
            else:
                mask = mask.expand(len(rows), -1, -1, -1)
                mask = _gather(_gather(mask, rows, 2), rows, 3)
            itself = torch.eye(width, dtype=torch.bool, device=rows.device)  # so that every softmax is defined
            seen = None if self.valid is None else self.valid[:, None, None] | itself
            found["attention_mask"] = self._weighed(mask, seen, hidden)
        if (ids := kwargs.get("position_ids")) is not None:
            ids = ids.expand(len(rows), -1).gather(1, rows)
            if self.reducer.positions == "compact":
                there = torch.ones_like(rows) if self.valid is None else self.valid.long()
                ids = (ids - rows + there.cumsum(1) - 1).clamp_min(0)  # less those that were dropped before
            found |= self._positions(hidden, ids, kwargs)
        return found

    def _later_kwargs(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Adapt mask and positions of a pass after the prompt."""
        assert self.rows is not None
        rows, found = self.rows, dict[str, Any]()
        mask: Tensor | None = kwargs.get("attention_mask")
        ours = (
            mask is not None and mask.ndim == 2
        )  # our cache knows what it holds, and looks at the newest columns alone
        if not ours and (mask is not None or self.valid is not None or self.bias is not None):
            if mask is None:
                after = kwargs["past_key_values"].get_seq_length(0) - self.prompt
                mask = torch.ones(len(rows), 1, hidden.shape[1], self.prompt + after, device=rows.device).bool()
            mask = mask.expand(len(rows), -1, -1, -1)
            old, new = _gather(mask[..., : self.prompt], rows, 3), mask[..., self.prompt :]
            seen = None
            if self.valid is not None:
                yes = torch.ones(len(rows), new.shape[-1], dtype=torch.bool, device=rows.device)
                seen = torch.cat([self.valid, yes], dim=1)[:, None, None]
            found["attention_mask"] = self._weighed(torch.cat([old, new], dim=-1), seen, hidden)
        if self.reducer.positions == "compact" and (ids := kwargs.get("position_ids")) is not None:
            held = self.rows.new_full((len(rows), 1), rows.shape[1]) if self.valid is None else self.valid.sum(1, True)
            found |= self._positions(hidden, ids - (self.prompt - held), kwargs)
        return found

    def _weighed(self, mask: Tensor, seen: Tensor | None, hidden: Tensor) -> Tensor:
        """Take what is not there out of a mask (B, 1, Q, K), and weigh the first columns by sizes."""
        if mask.dtype == torch.bool:
            mask = mask if seen is None else mask & seen
            if self.bias is None:
                return mask
            term = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device)
            mask = term.masked_fill(~mask, torch.finfo(term.dtype).min)
        elif seen is not None:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        if self.bias is None:
            return mask
        term = torch.nn.functional.pad(self.bias, (0, mask.shape[-1] - self.bias.shape[1]))
        return mask + term[:, None, None].to(mask.dtype)

    def _positions(self, hidden: Tensor, ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"position_ids": ids}
        if kwargs.get("position_embeddings") is not None:
            base: Any = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model
            found["position_embeddings"] = base.rotary_emb(hidden, position_ids=ids)
        return found


def _gather(mask: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take entries ``index`` (B, M) of a mask (B, 1, Q, K) along queries (2) or keys (3)."""
    shape = list(mask.shape)
    shape[dim] = index.shape[1]
    index = index[:, None, :, None] if dim == 2 else index[:, None, None]
    return mask.gather(dim, index.expand(shape))
