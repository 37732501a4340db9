"""The protocol of reducing: what a reducer is shown, and what it returns.

Models are taken as they are. An *encoder* has

    blocks      a list of pre-norm blocks, called as ``block(x)``; or ``block(x, sizes)``, with sizes (B, S), where its
                attention is to weigh keys by how many patches each token stands for
    prefix      tokens in front of the patches (class token, registers); 1 where it has a ``class_token``, else 0
    grid        rows and columns of patches

and a block ``norm1`` and ``attention.project(x) -> queries, keys, values``, each (B, H, S, D), which its own pass
calls too; so they are recorded and not computed again. `tokenary.models.bench_vlm` and `tokenary.models.cifar_vit` are
built so; the layers of transformers' ViT are understood too.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError
from tokenary.core.method import Method
from tokenary.core.token_map import TokenMap

#: What a reducer may ask to be shown, beside tokens and places.
Need = Literal["queries", "keys", "values", "text", "pixels"]
#: What the outputs of a reducer are: chosen tokens that stand for themselves; chosen tokens that stand for groups;
#: means of tokens. With the last two sizes add up to the number of tokens, with the last the sum of tokens is kept.
Kind = Literal["prune", "group", "merge"]


@dataclass(frozen=True)
class Point:
    """Where a model is reduced.

    Parameters
    ----------
    stage : {"vision", "encoder", "decoder"}
        Behind layers of the encoder, behind the whole encoder (and its projector), or in front of a layer of the
        language model.
    layers : tuple of int
        Counted from 0; for ``vision`` the blocks behind which tokens become fewer, for ``decoder`` the first layer that
        sees fewer; empty for ``encoder``.
    """

    stage: Literal["vision", "encoder", "decoder"]
    layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, value: Point | str, n_layers: int) -> Point:
        """Read a place in an encoder or a language model of `n_layers`.

        Parameters
        ----------
        value : str
            ``encoder``; ``vision:3``, ``vision:2,4,6`` or ``vision:25%,50%``, behind these blocks, or behind this share
            of all; ``decoder:2`` or ``decoder:25%``, in front of this layer, or behind this share of all.
        n_layers : int
            Blocks of the encoder or layers of the language model.

        Raises
        ------
        OptionError
            If it is none of these, or the model has no such layers.
        """
        if isinstance(value, Point):
            return value._checked(n_layers)
        text = value.strip()
        if text == "encoder":
            return cls("encoder")
        found = re.fullmatch(r"(vision|decoder):(\d+%?(?:,\d+%?)*)", text)
        if not found:
            raise OptionError("at", value, "encoder, vision:3, vision:2,4,6, vision:50%, decoder:2 or decoder:25%")
        layers = []
        for part in found[2].split(","):
            share = math.ceil(int(part[:-1]) / 100 * n_layers - 1e-9) if part.endswith("%") else None
            if share is None:
                layers.append(int(part))
            else:
                layers.append(max(0, share - 1) if found[1] == "vision" else max(1, share))
        unique = tuple(sorted(set(layers))) if "%" in text else tuple(layers)
        return cls("vision" if found[1] == "vision" else "decoder", unique)._checked(n_layers)

    def _checked(self, n_layers: int) -> Point:
        least = 1 if self.stage == "decoder" else 0
        ascending = list(self.layers) == sorted(set(self.layers)) and (self.stage != "decoder" or len(self.layers) == 1)
        if self.layers and not (ascending and least <= self.layers[0] and self.layers[-1] < n_layers):
            which = "one layer" if self.stage == "decoder" else "layers, ascending,"
            raise OptionError("at", str(self), f"{self.stage}:LAYER, {which} from {least} to {n_layers - 1}")
        return self

    @staticmethod
    def stage_of(value: Point | str) -> str:
        """Return the stage that a place names."""
        return value.stage if isinstance(value, Point) else value.strip().partition(":")[0]

    def __str__(self) -> str:
        return self.stage + (f":{','.join(map(str, self.layers))}" if self.layers else "")


@dataclass(frozen=True)
class Context:
    """What is known of the N image tokens that are to become fewer.

    A picture may be seen in several *views*: a thumbnail and crops, or the frames of a clip. Its image tokens then lie
    view after view. What layers of the encoder computed is recorded a view: tensors of (B V, H, S, D), the views of
    a picture one after the other, S with the tokens that are not of the image. `image` and `by_picture` bring such
    tensors to (B, N, ...).

    Attributes
    ----------
    grid : (int, int)
        Rows and columns of patches of one view, when none were missing.
    layout : {"image", "anyres", "clip"}
        ``anyres``: view 0 is a thumbnail of the picture, the others are its crops, row by row. ``clip``: views are
        frames.
    views : int
    crops : (int, int)
        Rows and columns of crops.
    span : (int, int) or None
        Where the image tokens of a view begin in recorded tensors, and how many they are; what stands in front is the
        class token, or the start of the text. None where nothing is recorded.
    place : (N, 3) or (B, N, 3) Tensor
        View, row and column of each token (of a merged one, of its anchor); -1 for one that is no patch, as newlines.
    sizes : (B, N) Tensor or None
        How many patches each token stands for; None for one each.
    valid : (N,) or (B, N) bool Tensor or None
        Tokens that may be kept or merged; padding is not. None for all.
    queries, keys, values : mapping of int to Tensor
        By layer, (B V, H, S, D); of a decoder rotated, keys and values with their own number of heads.
    recorded_sizes : mapping of int to Tensor
        Sizes (B V, S) that the layer's attention was weighed with.
    scale : float
        Factor on products of queries and keys.
    layer : int
        The newest layer that ran; of an encoder that was run through, the last.
    n_layers : int
    text : (B, L, D) Tensor or None
        Embeddings of the text, in the space of the image tokens.
    text_mask : (B, L) bool Tensor or None
        Which of them are the question: no padding, and nothing of an answer that is read with it. None for all.
    samples : tuple of int or None
        A number for each picture that depends on its pixels alone; draws are named by it.
    """

    grid: tuple[int, int]
    layout: Literal["image", "anyres", "clip"] = "image"
    views: int = 1
    crops: tuple[int, int] = (1, 1)
    span: tuple[int, int] | None = None
    place: Tensor | None = None
    sizes: Tensor | None = None
    valid: Tensor | None = None
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)
    recorded_sizes: Mapping[int, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    layer: int = 0
    n_layers: int = 1
    text: Tensor | None = None
    text_mask: Tensor | None = None
    samples: tuple[int, ...] | None = None

    def image(self, states: Tensor, dim: int) -> Tensor:
        """Return the part of a recorded tensor that belongs to image tokens, along an axis of length S: N / V long."""
        start, count = self.span or (0, states.shape[dim])
        return states.narrow(dim, start, count)

    def by_picture(self, states: Tensor) -> Tensor:
        """Join the views of each picture: (B V, n, ...) to (B, V n, ...)."""
        return states.unflatten(0, (-1, self.views)).flatten(1, 2)

    def attention_logits(self, layer: int | None = None, rows: slice = slice(None)) -> Tensor:
        """Return scaled products of queries (those in `rows`) and keys before the softmax, (B V, H, Q, S) float32.

        Of a decoder they are not masked, and keys that queries share are repeated.
        """
        layer = self.layer if layer is None else layer
        queries, keys = self.queries[layer][:, :, rows].float(), self.keys[layer].float()
        if queries.shape[1] != keys.shape[1]:
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        return queries @ keys.mT * self.scale

    def attention(self, layer: int | None = None, rows: slice = slice(None)) -> Tensor:
        """Return the attention of an encoder's layer, (B V, H, Q, S) float32, as the layer itself weighed it."""
        layer = self.layer if layer is None else layer
        logits = self.attention_logits(layer, rows)
        if layer in self.recorded_sizes:
            logits = logits + self.recorded_sizes[layer].log()[:, None, None, :]
        return logits.softmax(-1)

    def size_of(self, x: Tensor) -> Tensor:
        """Sizes of tokens (B, N, D), ones where nothing was merged: (B, N) float32."""
        return torch.ones(x.shape[:2], device=x.device) if self.sizes is None else self.sizes

    def allowed(self, x: Tensor) -> Tensor:
        """Which of the tokens (B, N, D) may be kept or merged, (B, N) bool."""
        if self.valid is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self.valid.expand(x.shape[:2])

    def places(self, x: Tensor) -> Tensor:
        """View, row and column of tokens (B, N, D): (B, N, 3) int64."""
        place = places(self.grid, self.views, x.device) if self.place is None else self.place
        return place.expand(len(x), -1, -1)

    def per_view(self, x: Tensor) -> bool:
        """Whether the tokens (B, N, D) are still those of whole grids, view after view."""
        rows, columns = self.grid
        return x.shape[1] == self.views * rows * columns


def places(grid: tuple[int, int], views: int = 1, device: torch.device | None = None) -> Tensor:
    """View, row and column of every patch of whole grids, (V rows columns, 3) int64."""
    rows, columns = grid
    axes = (torch.arange(n, device=device) for n in (views, rows, columns))
    return torch.cartesian_prod(*axes).view(-1, 3)


class Reducer(Method):
    """Makes fewer of the tokens of a picture.

    A subclass names its options in ``__init__``, calls this one's, and implements `plan`.

    Parameters
    ----------
    keep : Budget
        How much stays, as a share of the image tokens or as their number.

    Attributes
    ----------
    needs : frozenset of {"queries", "keys", "values", "text", "pixels"}
        What it must be shown; nothing else is recorded.
    kind : {"prune", "group", "merge"}
        What its outputs are; see `Kind`.
    at : str
        Where it acts unless the caller says otherwise, as `Point.parse` reads it.
    positions : {"compact", "original"}
        Whether kept tokens are counted anew by the language model, or keep the numbers that they had among all.
    proportional : bool
        Whether later layers weigh each token by how many it stands for.
    exact : bool
        Whether exactly the budget is kept, not just at most that.
    permutes : bool
        Whether it treats tokens as a set: no place and no neighbour counts.
    learns : str
        The option that takes what `learn` writes, for a method that is trained for a model first.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    kind: Kind = "prune"
    at: str = "encoder"
    positions: Literal["compact", "original"] = "compact"
    proportional: bool = False
    exact: ClassVar[bool] = True
    permutes: ClassVar[bool] = False
    learns: ClassVar[str] = ""

    def __init__(self, keep: Budget) -> None:
        if keep.bytes is not None:
            raise OptionError("keep", str(keep), "a share (25%) or a number of tokens (64)")
        self.keep = keep

    @classmethod
    def learn(cls, model: Any, file: Path, *, steps: int, seed: int, told: Callable[[int], None]) -> None:
        """Train what it needs for a bench VLM, and write it; `told` is called before every step with its number."""
        raise NotImplementedError(f"{cls.__name__} learns nothing")

    def layers(self, n_layers: int, layer: int) -> tuple[int, ...]:
        """Return the layers whose queries, keys or values it must be shown: of `n_layers`, of which `layer` ran last.

        By default the newest one.
        """
        return (layer,)

    def count(self, num_tokens: int, context: Context) -> int:
        """Return how many of the tokens stay, 1 to `num_tokens`."""
        kept = self.keep.resolve(num_tokens, 1)
        return num_tokens if kept is None else min(kept, num_tokens)

    @abstractmethod
    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Choose, a pure function of what it is given.

        Parameters
        ----------
        x : Tensor
            (B, N, D) image tokens where it acts.
        keep : int
            M, 1 to N.
        context : Context
            What else is known.

        Returns
        -------
        TokenMap
            (B, M, N), outputs in the order of the tokens they come from; `Select`, `Segment` (with ``weights`` the
            sizes so far) or `Mix`. Rows of unequal number are filled up with outputs without a source.
        """

    def reduce(self, x: Tensor, context: Context) -> TokenMap:
        """Return the map for the budget; with everything kept it is the identity."""
        kept = self.count(x.shape[1], context)
        if kept >= x.shape[1] and context.valid is None:
            return TokenMap.identity(x.shape[1], x.device)
        return self.plan(x, kept, context)

    def attach(self, model: nn.Module, at: Point | str | None = None, **options: Any) -> AbstractContextManager[Any]:
        """Let a model work on fewer tokens inside a ``with`` block.

        Parameters
        ----------
        model : nn.Module
            A vision-language model (``vision``, ``projector``, ``language``), or an encoder (``blocks``).
        at : Point or str, optional
            Where; by default where the method belongs.
        **options
            Of the adapter: `ReducedVLM` or `VisionReduction`.

        Returns
        -------
        context manager
            That yields a `ReducedVLM` of a vision-language model, and of an encoder a `VisionReduction`, while the
            encoder itself works on fewer tokens.

        Raises
        ------
        OptionError
            If there is no such place in the model, or the method cannot act there.
        """
        from tokenary.reduce.encoder import VisionReduction
        from tokenary.reduce.vlm import ReducedVLM

        at = at or self.at
        adapter = ReducedVLM if hasattr(model, "language") else VisionReduction
        return adapter(model, self, at, **options)
