"""Fewer tokens between the layers of an encoder, by hooks; and the record of what its layers computed."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.token_map import TokenMap
from tokenary.hf.hooks import watched_heads
from tokenary.reduce.base import Context, Point, Reducer, places
from tokenary.reduce.mix import anchors_of


@dataclass(frozen=True)
class Encoder:
    """An encoder as this room sees it; see `tokenary.reduce.base`.

    Attributes
    ----------
    blocks : list of nn.Module
    prefix : int
    grid : (int, int) or None
        None where the model does not say.
    """

    blocks: list[nn.Module]
    prefix: int
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, model: nn.Module) -> Encoder:
        """Read a model.

        Raises
        ------
        UnsupportedModelError
            If it has no list of blocks whose attention can be read.
        """
        layers = getattr(getattr(model, "encoder", None), "layer", None) or getattr(model, "layers", None)
        blocks = list(getattr(model, "blocks", None) or layers or [])
        if not blocks or not all(_project(block) or _projections(block) for block in blocks):
            raise UnsupportedModelError(f"{type(model).__name__} has no list of plain attention blocks to act between")
        embeddings = getattr(model, "embeddings", model)
        has_class = any(getattr(embeddings, name, None) is not None for name in ("class_token", "cls_token"))
        prefix = getattr(model, "prefix", int(has_class))
        return cls(blocks, prefix, getattr(model, "grid", None) or _grid(getattr(model, "config", None)))


def _grid(config: Any) -> tuple[int, int] | None:
    side = getattr(config, "side", None) or getattr(config, "image_size", None)
    patch = getattr(config, "patch", None) or getattr(config, "patch_size", None)
    return (side // patch, side // patch) if isinstance(side, int) and isinstance(patch, int) else None


def _project(block: nn.Module) -> bool:
    return hasattr(getattr(block, "attention", None), "project")


def _projections(block: nn.Module) -> bool:
    return hasattr(getattr(block, "attention", None), "q_proj")


@dataclass
class Record:
    """What layers computed in the newest pass: by layer, (B V, H, S, D); and the sizes they weighed with."""

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Factor on products of queries and keys, as it is where nothing else is said."""
        known = self.queries or self.keys
        return next(iter(known.values())).shape[-1] ** -0.5 if known else 1.0

    def clear(self) -> None:
        """Forget it."""
        for part in (self.queries, self.keys, self.values, self.sizes):
            part.clear()


@contextlib.contextmanager
def recorded(blocks: list[nn.Module], layers: Iterable[int], needs: frozenset[str], record: Record) -> Any:
    """Record queries, keys and values of some blocks, as far as they are needed, without computing them again."""
    kinds: list[str] = [kind for kind in ("queries", "keys", "values") if kind in needs]
    with contextlib.ExitStack() as stack:
        for layer in layers if kinds else ():
            stack.callback(_watch(blocks[layer].attention, layer, kinds, record))
        yield record


def _watch(attention: Any, layer: int, kinds: list[str], record: Record) -> Callable[[], None]:
    """Let an attention module leave what it projects in the record; return what undoes it."""
    if not hasattr(attention, "project"):
        handles = [
            watched_heads(attention, kind, functools.partial(getattr(record, kind).__setitem__, layer))
            for kind in kinds
        ]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove
    project, before = attention.project, attention.__dict__.get("project")

    def projected(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = project(x)
        for kind, each in zip(("queries", "keys", "values"), states, strict=True):
            if kind in kinds:
                getattr(record, kind)[layer] = each
        return states

    def undo() -> None:
        del attention.project
        if before is not None:
            attention.project = before

    attention.project = projected  # hides the method of the class
    return undo


def picture_numbers(pixels: Tensor) -> tuple[int, ...]:
    """Return a number for each picture (B, ...) that depends on its bytes alone."""
    plain = pixels.detach().cpu().contiguous()
    return tuple(zlib.crc32(picture.numpy().tobytes()) for picture in plain)


class VisionReduction:
    """An encoder that works on fewer and fewer tokens; inside a ``with`` block.

    Parameters
    ----------
    encoder : nn.Module
        See `tokenary.reduce.base`.
    reducer : Reducer
        Acts behind each block of the point. Its budget is what is left behind the last of them; before, tokens fall by
        the same factor each time.
    point : Point or str
        Of stage ``vision``.
    counts : mapping of int to int, optional
        How many image tokens stay behind each block, instead.
    dense : bool
        Behind the last block every token gets its place back, for outputs that have all of them.
    fill : {"last", "zero"}
        What a token that was dropped is then: as it was when it left, or zero.
    join : int
        Views (frames) that are joined into one sequence where it acts first; tokens of the prefix are averaged.
    **given
        Fields of `Context` that the caller knows, such as ``valid`` or ``text``.

    Attributes
    ----------
    maps : list of TokenMap
        Of the newest pass: (B, M, N) at each block of the point, over image tokens.
    sizes : (B, M) Tensor
        How many patches each token stands for.
    place : (B, M, 3) Tensor
        View, row and column of each token's anchor.
    anchors : (B, M) Tensor
        Number of that patch among all.
    there : (B, M) bool Tensor or None
        Which of them are tokens at all, where rows differ in number; None for all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        reducer: Reducer,
        point: Point | str,
        *,
        counts: Mapping[int, int] | None = None,
        dense: bool = False,
        fill: Literal["last", "zero"] = "last",
        join: int = 1,
        **given: Any,
    ) -> None:
        self.module, self.encoder, self.reducer = encoder, Encoder.of(encoder), reducer
        self.point, self.given, self.join = Point.parse(point, len(self.encoder.blocks)), given, join
        self.dense, self.fill, self.counts = dense, fill, dict(counts or {})
        if self.point.stage != "vision":
            raise OptionError("at", str(self.point), "a place inside the encoder, as vision:3")
        if counts is not None and set(counts) != set(self.point.layers):
            raise OptionError("counts", sorted(counts), f"one for each of the blocks {self.point.layers}")
        self.record = Record()
        self._samples: tuple[int, ...] | None = None
        self._reset(None)

    def _reset(self, x: Tensor | None) -> None:
        """Begin a pass, with the tokens (B, S, D) that enter the first block."""
        self.record.clear()
        self.maps: list[TokenMap] = []
        self._dropped: list[Tensor] = []  # image tokens before each map, where they are to come back
        self._sizes: Tensor | None = None
        self.there: Tensor | None = None
        if x is None:
            return
        self.tokens = x.shape[1] - self.encoder.prefix
        rows, columns = self.given.get("grid", self.encoder.grid) or (1, self.tokens)
        if rows * columns != self.tokens:
            raise UnsupportedModelError(f"{self.tokens} patches do not fill a grid of {rows} x {columns}")
        self.grid = (rows, columns)
        self.place = places(self.grid, 1, x.device).expand(len(x), -1, -1)
        self.anchors = torch.arange(self.tokens, device=x.device).expand(len(x), -1)

    @property
    def sizes(self) -> Tensor:
        """How many patches each image token stands for, (B, M)."""
        return torch.ones_like(self.anchors, dtype=torch.float32) if self._sizes is None else self._sizes

    def __enter__(self) -> Self:
        blocks, reducer = self.encoder.blocks, self.reducer
        first, last = blocks[0], blocks[-1]
        layers = {layer for point in self.point.layers for layer in reducer.layers(len(blocks), point)}
        with contextlib.ExitStack() as stack:  # what is refused half-way leaves nothing attached
            if "pixels" in reducer.needs:
                stack.callback(self.module.register_forward_pre_hook(self._number).remove)
            stack.callback(first.register_forward_pre_hook(lambda module, args: self._reset(args[0])).remove)
            stack.enter_context(recorded(blocks, sorted(layers), reducer.needs, self.record))
            for layer, block in enumerate(blocks):
                if layer > self.point.layers[0]:
                    hook = self._weighing(layer, block)
                    stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if layer in self.point.layers:
                    stack.callback(block.register_forward_hook(self._reducing(layer)).remove)
            if self.dense:
                stack.callback(last.register_forward_hook(lambda module, args, x: self._restored(x)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # -- hooks -------------------------------------------------------------------------------------------------

    def _number(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Name the pictures that come."""
        numbers = picture_numbers(args[0])
        self._samples = numbers[:: self.join]

    def _weighing(self, layer: int, block: nn.Module) -> Callable[..., Any]:
        """Hand sizes to a block, as the block takes them."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = self._sizes if self.reducer.proportional else None
            if self.there is not None:  # what stands for nothing has size 0, and no key
                own = self.there.float() if own is None else own.masked_fill(~self.there, 0)
            if own is None:
                return None
            sizes = torch.cat([own.new_ones(len(own), self.encoder.prefix), own], dim=1)
            self.record.sizes[layer] = sizes
            if _project(block):
                return args, {**kwargs, "sizes": sizes}
            return (args[0], sizes.log().to(args[0].dtype)[:, None, None]), kwargs  # as the layer's attention mask

        return hook

    def _reducing(self, layer: int) -> Callable[..., Tensor]:
        """Reduce what a block returns."""

        def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            prefix = self.encoder.prefix
            join = self.join if layer == self.point.layers[0] else 1
            if len(x) % join:
                raise OptionError("join", join, f"a divisor of the {len(x)} views in the batch")
            front, image = x[:, :prefix], x[:, prefix:]
            if join > 1:
                front, image = front.unflatten(0, (-1, join)).mean(1), self._joined(image, join)
            context = self._context(image, layer, join)
            kept = self._count(image, context, layer)
            chosen = TokenMap.identity(image.shape[1], x.device)
            if kept < image.shape[1] or context.valid is not None:
                chosen = self.reducer.plan(image, kept, context)
            if chosen.is_identity:
                self.maps.append(chosen)
                return x if join == 1 else torch.cat([front, image], dim=1)
            self._follow(chosen, image)
            return torch.cat([front, chosen.apply(image)], dim=1)

        return hook

    def _joined(self, image: Tensor, join: int) -> Tensor:
        """Make one sequence of the tokens of `join` views, (B V, N, D) to (B, V N, D)."""
        self.place = places(self.grid, join, image.device).expand(len(image) // join, -1, -1)
        self.anchors = torch.arange(join * self.tokens, device=image.device).expand(len(image) // join, -1)
        return image.unflatten(0, (-1, join)).flatten(1, 2)

    def _context(self, image: Tensor, layer: int, join: int) -> Context:
        context = Context(
            grid=self.grid,
            layout="clip" if join > 1 else "image",
            views=join,
            span=(self.encoder.prefix, image.shape[1] // join),
            place=self.place,
            sizes=self._sizes,
            scale=self.record.scale,
            layer=layer,
            n_layers=len(self.encoder.blocks),
            samples=self._samples,
            queries=dict(self.record.queries),
            keys=dict(self.record.keys),
            values=dict(self.record.values),
            recorded_sizes=dict(self.record.sizes),
        )
        given = {name: value for name, value in self.given.items() if name != "grid"}
        if self.maps:  # what was said of the patches holds for no token that was made of them
            given["valid"] = self.there
        return replace(context, **given)

    def _count(self, image: Tensor, context: Context, layer: int) -> int:
        """How many tokens stay behind a block."""
        if layer in self.counts:
            return min(self.counts[layer], image.shape[1])
        tokens = self.tokens * self.join
        left = self.reducer.count(tokens, context)
        step = self.point.layers.index(layer) + 1
        if step == len(self.point.layers):
            return min(left, image.shape[1])
        return min(round(tokens * (left / tokens) ** (step / len(self.point.layers))), image.shape[1])

    def _follow(self, chosen: TokenMap, image: Tensor) -> None:
        """Let sizes and places follow a map."""
        if self.reducer.kind != "prune":
            self._sizes = chosen.sizes(self.sizes if self._sizes is not None else None).float()
            self._sizes = self._sizes.expand(len(image), -1)
        n = torch.ones(image.shape[1], dtype=torch.bool, device=image.device)
        there = chosen.mask(n if self.there is None else self.there).expand(len(image), -1)
        self.there = None if bool(there.all()) else there
        at = anchors_of(chosen).expand(len(image), -1)
        self.place = self.place.gather(1, at[..., None].expand(-1, -1, 3))
        self.anchors = self.anchors.gather(1, at)
        self.maps.append(chosen)
        if self.dense and self.fill == "last":
            self._dropped.append(image)

    def _restored(self, x: Tensor) -> Tensor:
        """Give every token its place back: (B, prefix + M, D) to (B V, prefix + N, D)."""
        front, image = x[:, : self.encoder.prefix], x[:, self.encoder.prefix :]
        dropped = list(self._dropped)
        for chosen in reversed([each for each in self.maps if not each.is_identity]):
            image = chosen.pinv().apply(image)
            if dropped:
                ones = torch.ones(chosen.shape[-2], dtype=torch.bool, device=x.device)
                there = chosen.pinv().mask(ones).expand(len(x), -1)
                image = torch.where(there[..., None], image, dropped.pop())
        if self.join > 1:
            image = image.unflatten(1, (self.join, -1)).flatten(0, 1)
            front = front.repeat_interleave(self.join, dim=0)
        return torch.cat([front, image], dim=1)
