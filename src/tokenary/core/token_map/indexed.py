"""Maps with at most one nonzero a row (`Select`, `Permute`) or a column (`Scatter`, `Segment`), held as indices.

Gathering reads rows of x flattened to (rows, features), which copies whole rows; expanding an index over the features
costs ten times as much. Scattering is a segment sum over tokens sorted by group: ``embedding_bag`` does it in one pass
for every floating dtype, several times faster than ``index_add`` and CSR, and in a fixed order. (It has no second
derivative in x; integers take ``index_add``.)
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenary.core.errors import OptionError
from tokenary.core.token_map.base import Cost, TokenMap, num_rows, work_dtype

# ---------------------------------------------------------------------------------------------------------- kernels


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Read tokens ``index`` (*batch, M) of x (*lead, N, *features): (*L, M, *features), L the broadcast of both."""
    lead, features = x.shape[:dim], x.shape[dim + 1 :]
    if num_rows(index.shape[:-1]) == 1 and index.ndim - 1 <= dim:  # one index for all
        return x.index_select(dim, index.reshape(-1))
    if not x.is_contiguous():  # flattening would copy all of x
        grid = [torch.arange(n, device=x.device).view(-1, *[1] * (dim - d)) for d, n in enumerate(lead)]
        return x[(*grid, index)]
    rows = index + row_starts(lead, x.shape[dim], x.device)  # (*L, M)
    flat = x.reshape(num_rows(lead) * x.shape[dim], num_rows(features))
    return flat.index_select(0, rows.reshape(-1)).view(*rows.shape, *features)


def scatter(x: Tensor, order: Tensor, starts: Tensor, weights: Tensor | None, dim: int) -> Tensor:
    """Sum tokens into groups: tokens ``order`` (*batch, K), sorted by group, where group g begins at ``starts``.

    ``starts`` is (*batch, groups); a group ends where the next begins, the last with the row. x is (*lead, K,
    *features) and ``weights`` (*batch, K) or None.
    """
    lead, tokens, features = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
    full = torch.broadcast_shapes(lead, order.shape[:-1])
    rows = (order + row_starts(lead, tokens, x.device)).expand(*full, tokens)
    starts = starts + row_starts(full, tokens, x.device)
    if weights is not None:
        weights = weights.gather(-1, order).expand(*full, tokens).reshape(-1)
    out = bag(x.reshape(num_rows(lead) * tokens, num_rows(features)), rows.reshape(-1), starts.reshape(-1), weights)
    return out.view(*starts.shape, *features)


def bag(x: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Sum rows of x (R, F): bag b holds ``weights[i] * x[rows[i]]`` for i from ``starts[b]`` to the next start."""
    if weights is None and x.is_floating_point() and x.numel():
        return F.embedding_bag(rows, x, starts, mode="sum")
    if weights is not None:
        dtype = x.dtype
        work = work_dtype(x, weights)
        x, weights = x.to(work), weights.to(work)
        if x.is_floating_point() and x.numel():
            return F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=weights).to(dtype)
    ends = torch.cat([starts[1:], starts.new_tensor([rows.numel()])])[: starts.numel()]
    group = torch.repeat_interleave(ends - starts, output_size=rows.numel())
    taken = x.index_select(0, rows)
    taken = taken if weights is None else (taken * weights[:, None]).to(x.dtype)
    return x.new_zeros(starts.numel(), x.shape[1]).index_add(0, group, taken)


def row_starts(lead: torch.Size, tokens: int, device: torch.device) -> Tensor:
    """First flat row of each sequence, (*lead, 1)."""
    return (torch.arange(num_rows(lead), device=device) * tokens).view(*lead, 1)


def behind(t: Tensor, x: Tensor, dim: int) -> Tensor:
    """Append dims to t (*batch, M) until it broadcasts over the features of a tensor with token axis ``dim``."""
    return t.view(*t.shape, *[1] * (x.ndim - 1 - dim))


# ------------------------------------------------------------------------------------------------- checks of fields


def check_index(name: str, index: Tensor, low: int, high: int, valid: Tensor | None = None) -> None:
    """Raise `OptionError` unless ``index`` is int64 with every (valid) entry in [low, high)."""
    if index.numel() == 0:
        return
    if valid is not None:
        index = index.masked_fill(~valid, max(low, 0))
    least, most = (int(v) for v in index.aminmax())
    if least < low or most >= high:
        raise OptionError(name, f"{least}..{most}", f"entries from {low} to {high - 1}")


def broadcast_fields(name: str, index: Tensor, **others: Tensor | None) -> list[Tensor | None]:
    """Check dtypes, and broadcast the fields that are there to one (*batch, M), as views."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim == 0:
        found = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else index
        raise OptionError(name, found, "an int64 tensor (*batch, tokens)")
    valid = others.get("valid")
    if valid is not None and valid.dtype != torch.bool:
        raise OptionError("valid", valid.dtype, "a bool tensor")
    for key, other in others.items():
        if other is not None and (other.ndim == 0 or other.shape[-1] != index.shape[-1]):
            raise OptionError(key, tuple(other.shape), f"(*batch, {index.shape[-1]}), as {name} has")
    try:
        there = iter(torch.broadcast_tensors(index, *[t for t in others.values() if t is not None]))
    except RuntimeError:
        shapes = {key: tuple(t.shape) for key, t in others.items() if t is not None}
        raise OptionError(name, tuple(index.shape), f"a batch that broadcasts with {shapes}") from None
    return [next(there)] + [None if t is None else next(there) for t in others.values()]


def set_fields(target: TokenMap, **values: object) -> None:
    """Set fields of a frozen map under construction."""
    for name, value in values.items():
        object.__setattr__(target, name, value)


def nonzero(valid: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Where an indexed entry is there and not zero; None where all are."""
    if weights is None:
        return valid
    return weights != 0 if valid is None else valid & (weights != 0)


def undo_weights(index: Tensor, valid: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """Weights of the pseudo-inverse: v / sum of v² over entries that share an index, 0 where that is 0."""
    v = torch.ones(index.shape, dtype=torch.float64, device=index.device) if weights is None else weights
    norm = Scatter(index, groups, valid, validate=False).apply(v * v, dim=-1)
    norm = gather(norm, index, norm.ndim - 1)
    return torch.where(norm == 0, 0, v / torch.where(norm == 0, 1, norm))


# --------------------------------------------------------------------------------------------------------- the maps


@dataclass(frozen=True, eq=False, repr=False)
class Select(TokenMap):
    """Choose tokens: y[m] = x[index[m]], times ``weights[m]`` where given. The map of every pruner and evictor.

    Parameters
    ----------
    index : Tensor
        (*batch, M) int64, which token each output reads; repeats are allowed.
    num_tokens : int
        N, how many there are to choose from.
    valid : Tensor, optional
        (*batch, M) bool, for ragged rows: an output that is not valid is zero, whatever its index holds.
    weights : Tensor, optional
        (*batch, M) scale of each output.
    validate : bool
        Check the range of the index (waits for a GPU); switch off in hot loops.
    """

    index: Tensor
    num_tokens: int
    valid: Tensor | None = None
    weights: Tensor | None = None
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        index, valid, weights = broadcast_fields("index", self.index, valid=self.valid, weights=self.weights)
        assert index is not None
        if index.shape[-1] and self.num_tokens < 1:
            raise OptionError("num_tokens", self.num_tokens, "at least 1 token to choose from")
        if validate:
            check_index("index", index, 0, self.num_tokens, valid)
        index = index if valid is None else index.masked_fill(~valid, 0)
        set_fields(self, index=index, valid=valid, weights=weights)

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return torch.Size((*self.index.shape, self.num_tokens))

    @property
    def T(self) -> TokenMap:  # noqa: D102
        return Scatter(self.index, self.num_tokens, self.valid, self.weights, validate=False)

    def _apply(self, x: Tensor, dim: int) -> Tensor:
        if self.weights is not None:
            work_dtype(x, self.weights)
        y = gather(x, self.index, dim)
        dim += y.ndim - x.ndim  # the batch of the map may have added dims in front
        if self.weights is not None:
            y = (y * behind(self.weights, y, dim)).to(x.dtype)
        return y if self.valid is None else y.masked_fill(~behind(self.valid, y, dim), 0)

    def _collapse(self, inner: TokenMap) -> TokenMap | None:
        if not isinstance(inner, Select):
            return None
        if isinstance(self, Permute) and isinstance(inner, Permute):
            return Permute(self._read(inner.index), validate=False)
        valid = None if inner.valid is None else self._read(inner.valid)
        if self.valid is not None:
            valid = self.valid if valid is None else valid & self.valid
        weights = None if inner.weights is None else self._read(inner.weights)
        if self.weights is not None:
            weights = self.weights if weights is None else self.weights * weights
        return Select(self._read(inner.index), inner.num_tokens, valid, weights, validate=False)

    def _read(self, t: Tensor) -> Tensor:
        return gather(t, self.index, t.ndim - 1)

    def support(self) -> TokenMap:  # noqa: D102
        return Select(self.index, self.num_tokens, nonzero(self.valid, self.weights), validate=False)

    def mask(self, m: Tensor) -> Tensor:  # noqa: D102
        return self.support().apply(m, dim=-1) if m.dtype == torch.bool else super().mask(m)

    def _nearest(self, p: Tensor, far: float) -> Tensor:
        there = nonzero(self.valid, self.weights)
        return self._read(p) if there is None else self._read(p).masked_fill(~there, far)

    def cost(self, itemsize: int = 4) -> Cost:  # noqa: D102
        rows = self.index.numel()
        return Cost(rows if self.weights is not None else 0, 2 * rows * itemsize)

    def pinv(self) -> TokenMap:
        """Put the tokens back in their places (zero elsewhere; a token read twice is averaged)."""
        if self.weights is None and not self._repeats:
            return self.T
        weights = undo_weights(self.index, self.valid, self.weights, self.num_tokens)
        return Scatter(self.index, self.num_tokens, self.valid, weights, validate=False)

    @cached_property
    def _repeats(self) -> bool:
        counts = Scatter(self.index, self.num_tokens, self.valid, validate=False).sizes()
        return bool((counts > 1).any())

    @property
    def single_source(self) -> bool:  # noqa: D102
        return True

    @property
    def is_identity(self) -> bool:  # noqa: D102
        plain = self.weights is None and self.index.shape[-1] == self.num_tokens
        every = self.valid is None or bool(self.valid.all())
        return plain and every and bool((self.index == torch.arange(self.num_tokens, device=self.device)).all())

    def _describe(self) -> str:
        extra = ("" if self.valid is None else ", ragged") + ("" if self.weights is None else ", weighted")
        return f"{self.index.shape[-1]} of {self.num_tokens} tokens{extra}"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Permute(Select):
    """Reorder tokens: y[i] = x[index[i]], where each row of ``index`` (*batch, N) is a permutation."""

    def __init__(self, index: Tensor, *, validate: bool = True) -> None:
        broadcast_fields("index", index)
        n = index.shape[-1]
        if validate and not torch.equal(index.sort(-1).values, torch.arange(n, device=index.device).expand_as(index)):
            raise OptionError("index", tuple(index.shape), f"each of 0..{n - 1} once in every row")
        set_fields(self, index=index, num_tokens=n, valid=None, weights=None)

    @property
    def T(self) -> TokenMap:
        """The inverse permutation."""
        return Permute(self.index.argsort(-1), validate=False)

    def support(self) -> TokenMap:  # noqa: D102
        return self

    def pinv(self) -> TokenMap:
        """Return the inverse permutation."""
        return self.T

    def _describe(self) -> str:
        return f"{self.num_tokens} tokens"


@dataclass(frozen=True, eq=False, repr=False)
class Scatter(TokenMap):
    """Put tokens into places, the adjoint of `Select`: y[n] = sum of ``weights[k] * x[k]`` over k with index[k] = n.

    Parameters
    ----------
    index : Tensor
        (*batch, K) int64, the place of each token.
    num_places : int
        How many places there are; one that no token goes to is zero.
    valid, weights, validate
        As in `Select`; a token that is not valid goes nowhere.
    """

    index: Tensor
    num_places: int
    valid: Tensor | None = None
    weights: Tensor | None = None
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        index, valid, weights = broadcast_fields("index", self.index, valid=self.valid, weights=self.weights)
        assert index is not None
        if validate:
            check_index("index", index, 0, self.num_places, valid)
        index = index if valid is None else index.masked_fill(~valid, 0)
        set_fields(self, index=index, valid=valid, weights=weights)

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return torch.Size((*self.index.shape[:-1], self.num_places, self.index.shape[-1]))

    @property
    def T(self) -> TokenMap:  # noqa: D102
        if self.num_places == 0:  # no token is valid, and there is none to choose from
            return Segment(self.index.new_empty(*self.index.shape[:-1], 0), self.index.shape[-1], reduction="sum")
        return Select(self.index, self.num_places, self.valid, self.weights, validate=False)

    @cached_property
    def _layout(self) -> tuple[Tensor, Tensor]:
        """Tokens sorted by place (*batch, K), and where each place begins; those that go nowhere come last."""
        place = self.index if self.valid is None else self.index.masked_fill(~self.valid, self.num_places)
        place, order = place.sort(stable=True, dim=-1)
        bags = torch.arange(self.num_places + (self.valid is not None), device=place.device)
        return order, torch.searchsorted(place, bags.expand(*place.shape[:-1], -1).contiguous())

    def _apply(self, x: Tensor, dim: int) -> Tensor:
        order, starts = self._layout
        y = scatter(x, order, starts, self.weights, dim)
        return y.narrow(dim + y.ndim - x.ndim, 0, self.num_places)  # without the bag of tokens that go nowhere

    def _collapse(self, inner: TokenMap) -> TokenMap | None:
        return (inner.T @ self.T).T if isinstance(inner, Scatter) and self.num_places and inner.num_places else None

    def support(self) -> TokenMap:  # noqa: D102
        return Scatter(self.index, self.num_places, nonzero(self.valid, self.weights), validate=False)

    def _nearest(self, p: Tensor, far: float) -> Tensor:
        there = nonzero(self.valid, self.weights)
        full = self._lead(p.shape[:-1])
        p = p.expand(*full, -1) if there is None else p.expand(*full, -1).masked_fill(~there, far)
        places = p.new_full((*full, self.num_places), far)
        return places.scatter_reduce(-1, self.index.expand_as(p), p, "amin") if self.num_places else places

    def cost(self, itemsize: int = 4) -> Cost:  # noqa: D102
        tokens = self.index.numel()
        places = num_rows(self.batch_shape) * self.num_places
        return Cost(tokens * (2 if self.weights is not None else 1), (tokens + places) * itemsize)

    def pinv(self) -> TokenMap:
        """Read the tokens back from their places; one that shares its place gets its share of the sum."""
        weights = undo_weights(self.index, self.valid, self.weights, self.num_places) if self.num_places else None
        weighted = Scatter(self.index, self.num_places, self.valid, weights, validate=False)
        return weighted.T

    @property
    def is_identity(self) -> bool:  # noqa: D102
        return self.index.shape[-1] == self.num_places and self.T.is_identity

    def _describe(self) -> str:
        extra = ("" if self.valid is None else ", ragged") + ("" if self.weights is None else ", weighted")
        return f"{self.index.shape[-1]} tokens to {self.num_places} places{extra}"


@dataclass(frozen=True, eq=False, repr=False)
class Segment(TokenMap):
    """Pool or merge tokens by group: y[g] is the (weighted) mean or sum of the tokens with assign = g.

    Parameters
    ----------
    assign : Tensor
        (*batch, N) int64, the group of each token, in any order; below 0 the token belongs to none.
    num_groups : int
        M; an empty group, or one whose weights sum to zero under ``mean``, is a zero row.
    weights : Tensor, optional
        (*batch, N); ``mean`` divides by their sum in the group. Token merging gives the sizes here.
    reduction : {"mean", "sum"}
    validate : bool
        Check the range of ``assign`` (waits for a GPU).
    """

    assign: Tensor
    num_groups: int
    weights: Tensor | None = None
    reduction: Literal["mean", "sum"] = "mean"
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        if self.reduction not in ("mean", "sum"):
            raise OptionError("reduction", self.reduction, "mean or sum")
        assign, weights = broadcast_fields("assign", self.assign, weights=self.weights)
        assert assign is not None
        if validate:
            check_index("assign", assign.clamp_min(-1), -1, self.num_groups)
        set_fields(self, assign=assign, weights=weights)

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return torch.Size((*self.assign.shape[:-1], self.num_groups, self.assign.shape[-1]))

    @property
    def T(self) -> TokenMap:
        """Each token reads its group, times its weight in it."""
        return self.as_scatter().T

    def as_scatter(self) -> Scatter:
        """The same matrix as a plain weighted sum, the weights of a mean normalised (in float64 if none are given)."""
        if self.weights is not None and self.weights.requires_grad:
            return self._build()  # a graph must not outlive its backward pass
        return self._constant

    @cached_property
    def _constant(self) -> Scatter:
        return self._build()

    def _build(self) -> Scatter:
        valid, weights = self.assign >= 0, self.weights
        if self.reduction == "mean" and self.num_groups:
            if weights is None:
                weights = torch.ones(self.assign.shape, dtype=torch.float64, device=self.device)
            groups = Scatter(self.assign, self.num_groups, valid, validate=False)
            total = groups.T.apply(groups.apply(weights, dim=-1), dim=-1)  # of the token's own group, (*batch, N)
            weights = torch.where(total == 0, 0, weights / torch.where(total == 0, 1, total))
        return Scatter(self.assign, self.num_groups, valid, weights, validate=False)

    def _apply(self, x: Tensor, dim: int) -> Tensor:
        return self.as_scatter()._apply(x, dim)

    def support(self) -> TokenMap:  # noqa: D102
        return self.as_scatter().support()

    def _nearest(self, p: Tensor, far: float) -> Tensor:
        return self.as_scatter()._nearest(p, far)

    def cost(self, itemsize: int = 4) -> Cost:  # noqa: D102
        return self.as_scatter().cost(itemsize)

    def pinv(self) -> TokenMap:
        """Un-merge: a token gets the mean of its group copied back, or its share of a sum."""
        if self.reduction == "sum":
            return self.as_scatter().pinv()
        return Scatter(self.assign, self.num_groups, self.assign >= 0, validate=False).T

    @property
    def is_identity(self) -> bool:  # noqa: D102
        plain = self.weights is None and self.num_groups == self.assign.shape[-1]
        return plain and bool((self.assign == torch.arange(self.num_groups, device=self.device)).all())

    def _describe(self) -> str:
        return f"{self.reduction} of {self.assign.shape[-1]} tokens in {self.num_groups} groups"
