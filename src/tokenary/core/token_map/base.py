"""The operator itself: three primitives a kind, everything else derived; and the product of two maps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor

from tokenary.core.errors import OptionError

PositionPolicy = Literal["keep", "first", "mean", "reindex"]


@dataclass(frozen=True)
class Cost:
    """What one feature column of ``apply`` costs, all batch elements of the map together.

    Attributes
    ----------
    flops : int
        Multiplications and additions.
    bytes : int
        Values read and written. Indices are read once, not once a column, and are left out.
    """

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class TokenMap(ABC):
    """A linear operator on a token axis, y = P x, with P of shape (*batch, M, N).

    ``batch`` broadcasts, right-aligned as in ``torch.matmul``, against the dims of x in front of the token axis: a map
    of batch (B,) fits hidden states (B, N, D); for keys (B, H, N, D), share it over the heads by ``map[:, None]``.
    Maps are immutable, compared by identity, and differentiable in x and in floating weights.
    """

    # A kind writes these: three primitives, then the few facts that the derived operations rest on.

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape (*batch, M, N) of the matrix."""

    @property
    @abstractmethod
    def T(self) -> TokenMap:
        """The transpose, (*batch, N, M), as structured as the map."""

    @abstractmethod
    def _apply(self, x: Tensor, dim: int) -> Tensor:
        """Compute P x; ``dim`` counts from the front and shapes have been checked."""

    @abstractmethod
    def support(self) -> TokenMap:
        """The 0/1 map of where P is nonzero; of a `Compose`, the number of paths from source to output."""

    @abstractmethod
    def _nearest(self, p: Tensor, far: float) -> Tensor:
        """Smallest p among the sources of each output, ``far`` where it has none: (*batch, N) -> (*batch, M)."""

    @abstractmethod
    def cost(self, itemsize: int = 4) -> Cost:
        """Return flops and bytes a feature column, for values of ``itemsize`` bytes."""

    @abstractmethod
    def pinv(self) -> TokenMap:
        """The map that undoes this one as far as can be (un-prune, un-merge, un-permute): P P⁻ P = P."""

    @property
    def single_source(self) -> bool:
        """Whether by its kind no output has more than one source, so that an output can keep its position."""
        return False

    @property
    def is_identity(self) -> bool:
        """Whether P is known to be the identity; False also when nobody looked. O(N), and waits for a GPU."""
        return False

    def _collapse(self, inner: TokenMap) -> TokenMap | None:
        """Product ``self @ inner`` as one structured map, or None where only `Compose` will do."""
        return None

    # The rest is derived.

    @staticmethod
    def identity(num_tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Return the shared map that changes nothing."""
        from tokenary.core.token_map.indexed import Permute

        return Permute(torch.arange(num_tokens, device=device), validate=False)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dims of the map; () is a map shared by the whole batch."""
        return self.shape[:-2]

    @property
    def device(self) -> torch.device:
        """Where the map lives."""
        return next(p.device for f in fields(self) if hasattr(p := getattr(self, f.name), "device"))  # type: ignore[arg-type]

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """Return P x along the token axis ``dim``.

        Parameters
        ----------
        x : Tensor
            (*lead, N, *features), any dtype; a map with fractional weights wants a floating one.
        dim : int
            The token axis of x. The dims in front of it broadcast with the batch of the map.

        Returns
        -------
        Tensor
            (*broadcast(lead, batch), M, *features), in the dtype of x. Half precision is summed in float32.

        Raises
        ------
        OptionError
            When the token axis has not N entries, or the batch does not broadcast.
        """
        if not -x.ndim <= dim < x.ndim:
            raise OptionError("dim", dim, f"a dim of x, which has shape {tuple(x.shape)}")
        dim %= x.ndim
        if x.shape[dim] != self.shape[-1]:
            raise OptionError("x", tuple(x.shape), f"{self.shape[-1]} tokens on dim {dim}, as {self!r} reads")
        self._lead(x.shape[:dim])
        return self._apply(x, dim)

    def _lead(self, lead: torch.Size) -> torch.Size:
        """Broadcast the dims in front of a token axis with the batch of the map."""
        try:
            return torch.broadcast_shapes(lead, self.batch_shape)
        except RuntimeError:
            expected = f"dims that broadcast with the map's batch {tuple(self.batch_shape)}"
            raise OptionError("x.shape[:dim]", tuple(lead), expected) from None

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: TokenMap) -> TokenMap: ...

    def __matmul__(self, other: Tensor | TokenMap) -> Tensor | TokenMap:
        """Apply to a tensor (..., N, D) or vector (N,), or compose: ``(A @ B) @ x == A @ (B @ x)``."""
        if isinstance(other, Tensor):
            return self.apply(other, dim=-1 if other.ndim == 1 else -2)
        if not isinstance(other, TokenMap):
            return NotImplemented
        return self._collapse(check_chain(self, other)) or Compose(self, other)

    def sizes(self, prior: Tensor | None = None) -> Tensor:
        """Count the source tokens that each output stands for, the row sums of |P| > 0.

        Proportional attention (Bolya et al. 2022, eq. 1, arXiv 2210.09461) adds ``sizes().log()`` to the scores.

        Parameters
        ----------
        prior : Tensor, optional
            (*lead, N) sizes that the inputs already have from earlier merges; 1 each by default.

        Returns
        -------
        Tensor
            (*lead, M), float32 or the dtype of ``prior``; 0 for an output without a source. A `Compose` adds up sizes
            along its parts: a token that reaches an output by two paths counts twice, which no chain of selections
            (without repeats), permutations and segments can bring about.
        """
        if prior is None:
            prior = torch.ones(self.shape[-1], device=self.device)
        return self.support().apply(prior, dim=-1)

    def positions(self, p: Tensor, policy: PositionPolicy = "keep") -> Tensor:
        """Return the positions of the outputs, given positions ``p`` (*lead, N) of the inputs.

        Parameters
        ----------
        p : Tensor
            Integer or floating positions.
        policy : {"keep", "first", "mean", "reindex"}
            ``keep``: that of the one source; refused by kinds whose outputs may have several. ``first``: the smallest
            among the sources. ``mean``: their mean, each path once, in float32 unless p is floating. ``reindex``:
            0, 1, 2, ... in the order of the outputs, counting only those with a source.

        Returns
        -------
        Tensor
            (*lead, M); an output without a source is at 0 (``mask`` tells which).
        """
        m, n = self.shape[-2:]
        if p.ndim == 0 or p.shape[-1] != n:
            raise OptionError("p", tuple(p.shape), f"(..., {n}) positions")
        lead = self._lead(p.shape[:-1])
        if policy == "keep" and not self.single_source:
            raise OptionError("policy", policy, f"first, mean or reindex: {self!r} may draw an output from many tokens")
        if policy in ("keep", "first"):
            far = float("inf") if p.is_floating_point() else torch.iinfo(p.dtype).max
            nearest = self._nearest(p, far)
            return nearest.masked_fill(nearest == far, 0)
        if policy == "mean":
            total = self.support().apply(p.double(), dim=-1)
            mean = total / self.sizes().clamp_min(1)
            return mean.to(p.dtype if p.is_floating_point() else torch.float32)
        if policy == "reindex":
            filled = self.mask(torch.ones(n, dtype=torch.bool, device=p.device))
            return (filled.cumsum(-1) - 1).clamp_min(0).to(p.dtype).expand(*lead, m)
        raise OptionError("policy", policy, "keep, first, mean or reindex")

    def mask(self, m: Tensor) -> Tensor:
        """Carry a bool mask (*lead, N) of the inputs over: an output is kept if any of its sources is."""
        if m.dtype != torch.bool:
            raise OptionError("mask", m.dtype, "a bool tensor")
        return self.support().apply(m.float(), dim=-1) > 0

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix (*batch, M, N)."""
        return self.apply(torch.eye(self.shape[-1], dtype=dtype, device=self.device))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the map on another device, its floating weights in another dtype."""
        return self._rebuild(
            lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None),
            lambda part: part.to(device, dtype),
        )

    def __getitem__(self, key: Any) -> TokenMap:
        """Index the batch dims as a tensor's: ``map[b]``, ``map[:, None]``, ``map[beam_indices]``."""
        key = key if isinstance(key, tuple) else (key,)
        taken = sum(k.ndim if isinstance(k, Tensor) and k.dtype == torch.bool else 1 for k in key if k is not None)
        if Ellipsis in [k for k in key if not isinstance(k, Tensor)]:
            raise OptionError("key", key, "no ellipsis; dims that are not named are kept")
        if taken > len(self.batch_shape):
            raise OptionError("key", key, f"at most {len(self.batch_shape)} indices: only batch dims are indexed")
        return self._index(key)

    def _index(self, key: tuple[Any, ...]) -> TokenMap:
        return self._rebuild(lambda t: t[(*key, ...)], lambda part: part)

    def _expand(self, batch: torch.Size) -> TokenMap:
        """Broadcast a batched map to ``batch``, as views; a shared one stays shared."""
        own = len(self.batch_shape)
        if not own:
            return self
        return self._rebuild(lambda t: t.expand(*batch, *t.shape[own:]), lambda part: part._expand(batch))

    def _rebuild(self, tensor: Callable[[Tensor], Tensor], part: Callable[[Any], Any]) -> Self:
        """Copy with every tensor field and every part replaced; nothing is checked again."""
        new = object.__new__(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = tensor(value)
            elif isinstance(value, TokenMap):
                value = part(value)
            object.__setattr__(new, field.name, value)
        return new

    def _describe(self) -> str:
        return f"{self.shape[-1]} to {self.shape[-2]}"

    def __repr__(self) -> str:
        batch = f", batch {tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"{type(self).__name__}({self._describe()}{batch})"


@dataclass(frozen=True, eq=False, repr=False)
class Compose(TokenMap):
    """The product of two maps, ``outer @ inner``; nothing is multiplied out."""

    outer: TokenMap
    inner: TokenMap

    def __post_init__(self) -> None:
        check_chain(self.outer, self.inner)

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        batch = torch.broadcast_shapes(self.outer.batch_shape, self.inner.batch_shape)
        return torch.Size((*batch, self.outer.shape[-2], self.inner.shape[-1]))

    @property
    def T(self) -> TokenMap:  # noqa: D102
        return self.inner.T @ self.outer.T

    def _apply(self, x: Tensor, dim: int) -> Tensor:
        dim -= x.ndim  # from the back: the inner map may add batch dims in front
        return self.outer.apply(self.inner.apply(x, dim), dim)

    def support(self) -> TokenMap:  # noqa: D102
        return Compose(self.outer.support(), self.inner.support())

    def _nearest(self, p: Tensor, far: float) -> Tensor:
        return self.outer._nearest(self.inner._nearest(p, far), far)

    def cost(self, itemsize: int = 4) -> Cost:  # noqa: D102
        return self.outer.cost(itemsize) + self.inner.cost(itemsize)

    def pinv(self) -> TokenMap:
        """Undo in reverse order; P P⁻ P = P holds where the rows of the inner map are independent."""
        return self.inner.pinv() @ self.outer.pinv()

    @property
    def single_source(self) -> bool:  # noqa: D102
        return self.outer.single_source and self.inner.single_source

    @property
    def is_identity(self) -> bool:  # noqa: D102
        return self.outer.is_identity and self.inner.is_identity

    def _index(self, key: tuple[Any, ...]) -> TokenMap:
        batch = self.batch_shape
        return self._rebuild(lambda t: t, lambda part: part._expand(batch)._index(key) if part.batch_shape else part)

    def __repr__(self) -> str:
        return f"({self.outer!r} @ {self.inner!r})"


def check_chain(outer: TokenMap, inner: TokenMap) -> TokenMap:
    """Return ``inner`` if ``outer @ inner`` is defined, else raise `OptionError`."""
    if outer.shape[-1] != inner.shape[-2]:
        raise OptionError("inner", inner, f"a map that writes {outer.shape[-1]} tokens, as {outer!r} reads")
    outer._lead(inner.batch_shape)
    return inner


def work_dtype(x: Tensor, weights: Tensor) -> torch.dtype:
    """Dtype to compute a weighted sum in: that of x, float32 for half precision; an integer x is refused."""
    if not (x.is_floating_point() or x.is_complex()):
        if weights.is_floating_point():
            raise OptionError("x.dtype", x.dtype, "a floating dtype: the map has fractional weights")
        return x.dtype
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def num_rows(lead: torch.Size | tuple[int, ...]) -> int:
    """Count the rows of the given leading dims."""
    return math.prod(lead)
