"""A reduced model that is watched: attention of answer tokens, states of image tokens, who stands for which patch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenary.bench.reduction_card.patches import mass_of
from tokenary.hf.hooks import attention_modules, decoder_layers, hidden_states_of, watched_heads
from tokenary.hf.rotation import rotated
from tokenary.reduce.layout import Prompt, Seen
from tokenary.reduce.vlm import ReducedVLM


@dataclass
class Notes:
    """What is noted of one pass, by layer of the language model.

    Attributes
    ----------
    attention : list of (B, S) Tensor
        Of the watched row of each prompt, mean over heads.
    entering : list of (B, S, D) Tensor
        States that enter the attention of the layer, normed.
    leaving : list of (B, S, D) Tensor
        States behind the layer; only where asked for.
    logit : float
        Largest scaled product of a query of a watched row and a key.
    """

    attention: list[Tensor] = field(default_factory=list)
    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    logit: float = float("-inf")


class Watched(ReducedVLM):
    """A `ReducedVLM` that keeps what a report card needs of its newest pass.

    Attributes
    ----------
    shown : Seen or None
        What was seen, before anything behind the encoder.
    laid : Prompt
        What was read.
    read_numbers : (B, M) Tensor or None
        Patches that the tokens stand at which enter the language model, view after view.
    """

    shown: Seen | None
    laid: Prompt
    read_numbers: Tensor | None

    def prompt(self, seen: Seen | None, ids: Tensor, text_mask: Tensor | None = None) -> Prompt:
        """Lay out what is read, and remember it."""
        self.shown, self.laid = seen, super().prompt(seen, ids, text_mask)
        self.read_numbers = self.numbers
        return self.laid

    # -- who stands for what -----------------------------------------------------------------------------------

    def read_mass(self) -> Tensor:
        """Return the part of each patch that every token stands for that enters the language model, (B, M, N).

        Tokens in the order of `read_numbers`, patches view after view.
        """
        assert self.shown is not None
        batch, views = len(self.shown.tokens), self.shown.context.views
        mass = torch.eye(self.shown.total // views).expand(batch * views, -1, -1)
        for each in self.shown.vision:
            mass = mass_of(each) @ mass
        count = mass.shape[1]
        whole = mass.new_zeros(batch, views, count, views, self.shown.total // views)
        for view in range(views):
            whole[:, view, :, view] = mass.unflatten(0, (batch, views))[:, view]
        mass = whole.flatten(3, 4).flatten(1, 2)
        if self.map is not None and self.point.stage == "encoder":
            mass = mass_of(self.map) @ mass
        if self.read_numbers is not None:
            mass = mass.masked_fill((self.read_numbers < 0)[..., None], 0)
        return mass

    def layer_mass(self) -> list[Tensor]:
        """Return for each layer the patches that every image column of its prompt stands for, (B, M, N)."""
        mass = self.read_mass()
        if self.shown is not None and self.shown.context.layout == "anyres" and self.views > 1:
            mass = self._in_reading_order(mass)
        if self.laid.mask is not None:
            mass = mass * self.laid.mask[:, 1 : 1 + self.laid.image, None]
        layers = self.model.language.config.num_hidden_layers
        if self.point.stage != "decoder" or self.map is None or self.map.is_identity:
            return [mass] * layers
        upper, first = mass_of(self.map) @ mass, self.point.layers[0]
        return [mass if layer < first else upper for layer in range(layers)]

    def _in_reading_order(self, mass: Tensor) -> Tensor:
        """Order tokens as they are read, with newlines, which stand for nothing, among them."""
        assert self.laid.context is not None and self.laid.context.place is not None and self.read_numbers is not None
        view, row, column = self.laid.context.place.expand(len(mass), -1, -1).unbind(-1)
        number = (view * self.grid[0] + row) * self.grid[1] + column
        total = mass.shape[2]
        index = self.read_numbers.new_full((len(mass), total + 1), mass.shape[1])
        own = torch.arange(mass.shape[1]).expand(len(mass), -1)
        index.scatter_(1, self.read_numbers.masked_fill(self.read_numbers < 0, total), own)
        index[:, total] = mass.shape[1]  # of newlines
        wanted = index.gather(1, number.masked_fill(view < 0, total))
        padded = torch.cat([mass, mass.new_zeros(len(mass), 1, total)], dim=1)
        return padded.gather(1, wanted[..., None].expand(-1, -1, total))

    def claimed_sizes(self) -> Tensor:
        """Return how many patches each token stands for as the reducer says, (B, M) float32; ones by default."""
        assert self.shown is not None
        if self.map is not None and self.point.stage == "decoder":
            context = self.laid.context
            newline = None if context is None or context.place is None else (context.place[..., 0] >= 0).float()
            prior = newline if context is None or context.sizes is None else context.sizes
            sizes = self.map.sizes(prior).expand(len(self.shown.tokens), -1)
            return sizes * (self.numbers >= 0) if self.numbers is not None else sizes
        sizes = self.shown.context.size_of(self.shown.tokens)
        if self.shown.context.sizes is None and self.shown.vision:  # of pictures that were scaled down
            sizes = self.shown.vision[-1].sizes().expand(len(sizes), -1)
        if self.map is not None:
            sizes = self.map.sizes(sizes).expand(len(sizes), -1)
        return sizes * (self.read_numbers >= 0) if self.read_numbers is not None else sizes

    # -- watching ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self, rows: Tensor | None, width: int, leaving: bool = False) -> Iterator[Notes]:
        """Note what the language model does in the passes of a block.

        Parameters
        ----------
        rows : (B,) int64 Tensor or None
            The text token of each prompt whose attention is noted; None for the last.
        width : int
            Tokens of the text.
        leaving : bool
            Note the states behind every layer.
        """
        notes, language = Notes(), self.model.language
        with contextlib.ExitStack() as stack:
            for module in attention_modules(language):
                heads: dict[str, Tensor] = {}
                for kind in ("queries", "keys"):
                    stack.callback(watched_heads(module, kind, partial(heads.__setitem__, kind)).remove)
                hook = partial(self._note, notes, heads, rows, width)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for layer in decoder_layers(language) if leaving else ():
                keep = partial(_keep, notes.leaving)
                stack.callback(layer.register_forward_hook(keep).remove)
            yield notes

    def _note(self, notes: Notes, heads: dict[str, Tensor], rows: Tensor | None, width: int, *call: Any) -> None:
        """Compute the attention of the watched rows as the layer itself does."""
        module, args, kwargs, _ = call
        states = hidden_states_of(args, kwargs)
        queries, keys = (
            rotated(self.model.language, heads[kind], kwargs.get("position_embeddings")) for kind in ("queries", "keys")
        )
        length = states.shape[1]
        own = torch.full((len(states),), length - 1) if rows is None else length - width + rows
        queries = queries.gather(2, own[:, None, None, None].expand(-1, queries.shape[1], 1, queries.shape[3]))
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        logits = (queries @ keys.mT).float()[:, :, 0] * module.scaling  # (B, H, S)
        behind = torch.arange(length) > own[:, None]
        logits = logits.masked_fill(behind[:, None], -torch.inf)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            mask = mask.expand(len(states), -1, -1, -1)[:, 0].gather(1, own[:, None, None].expand(-1, 1, length))
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        notes.logit = max(notes.logit, float(logits.detach().amax()))
        notes.attention.append(logits.softmax(-1).mean(1))
        notes.entering.append(states)


def _keep(found: list[Tensor], module: Any, args: Any, output: Any) -> None:
    found.append(output[0] if isinstance(output, tuple) else output)
