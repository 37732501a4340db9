"""Maps held as matrices: `Sparse` for vocabularies, `Dense` for learned or data-dependent mixing."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from tokenary.core.errors import OptionError
from tokenary.core.token_map.base import Cost, TokenMap, num_rows, work_dtype
from tokenary.core.token_map.indexed import Scatter, bag, set_fields


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Sparse(TokenMap):
    """A shared sparse matrix (M, N), such as the weights that make a new vocabulary out of an old one.

    Parameters
    ----------
    matrix : Tensor
        2-D, of layout COO or CSR (``tensor.to_sparse()``); of a COO tensor, entries at one place are added up.

    Attributes
    ----------
    crow, col, values : Tensor
        The matrix by rows: row m holds ``values[crow[m]:crow[m + 1]]`` at the columns ``col[...]``.
    num_tokens : int
        N.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    num_tokens: int

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
            found = f"{matrix.layout} of shape {tuple(matrix.shape)}"
            raise OptionError("matrix", found, "a 2-D sparse COO or CSR tensor")
        if matrix.layout == torch.sparse_csr:
            crow, col, values = matrix.crow_indices().long(), matrix.col_indices().long(), matrix.values()
        else:
            matrix = matrix.coalesce()  # sorted by row
            (row, col), values = matrix.indices(), matrix.values()
            crow = torch.searchsorted(row.contiguous(), torch.arange(matrix.shape[0] + 1, device=row.device))
        set_fields(self, crow=crow, col=col, values=values, num_tokens=matrix.shape[1])

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return torch.Size((self.crow.numel() - 1, self.num_tokens))

    @property
    def T(self) -> TokenMap:  # noqa: D102
        indices = torch.stack([self.col, self._row])
        return Sparse(torch.sparse_coo_tensor(indices, self.values, self.shape[::-1], check_invariants=False))

    @property
    def _row(self) -> Tensor:
        return torch.repeat_interleave(self.crow.diff(), output_size=self.col.numel())

    def _apply(self, x: Tensor, dim: int) -> Tensor:
        front = x.movedim(dim, 0)  # one matrix for all: batch and features are columns alike
        flat = front.reshape(self.num_tokens, num_rows(front.shape[1:]))
        y = bag(flat, self.col, self.crow[:-1], self.values)
        return y.view(-1 if y.numel() else self.shape[0], *front.shape[1:]).movedim(0, dim)

    def support(self) -> TokenMap:  # noqa: D102
        return self._rebuild(lambda t: (t != 0).to(t.dtype) if t is self.values else t, lambda part: part)

    def _nearest(self, p: Tensor, far: float) -> Tensor:
        rows = Scatter(self._row, self.shape[0], self.values != 0, validate=False)
        return rows._nearest(p[..., self.col], far)

    def cost(self, itemsize: int = 4) -> Cost:  # noqa: D102
        nonzeros = self.col.numel()
        return Cost(2 * nonzeros, (nonzeros + self.shape[0]) * itemsize)

    def pinv(self) -> TokenMap:
        """Return the Moore-Penrose inverse, which is dense: O(M N min(M, N)), for small maps only."""
        return Dense(torch.linalg.pinv(self.dense(self.values.dtype)))

    def _index(self, key: tuple[object, ...]) -> TokenMap:
        return self  # no batch to index

    def _describe(self) -> str:
        return f"{self.shape[0]} x {self.num_tokens}, {self.col.numel()} entries"


@dataclass(frozen=True, eq=False, repr=False)
class Dense(TokenMap):
    """Any matrix (*batch, M, N): resamplers, learned queries, soft assignments."""

    matrix: Tensor
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        if validate and (
            not isinstance(self.matrix, Tensor) or self.matrix.ndim < 2 or self.matrix.layout != torch.strided
        ):
            found = tuple(self.matrix.shape) if isinstance(self.matrix, Tensor) else self.matrix
            raise OptionError("matrix", found, "a dense tensor (*batch, M, N)")

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return self.matrix.shape

    @property
    def T(self) -> TokenMap:  # noqa: D102
        return Dense(self.matrix.mT)

    def _apply(self, x: Tensor, dim: int) -> Tensor:
        work = x.dtype if x.dtype == self.matrix.dtype else work_dtype(x, self.matrix)
        flat = x.reshape(*x.shape[: dim + 1], num_rows(x.shape[dim + 1 :]))  # (*lead, N, features)
        y = self.matrix.to(work) @ flat.to(work)
        return y.view(*y.shape[:-1], *x.shape[dim + 1 :]).to(x.dtype)

    def support(self) -> TokenMap:  # noqa: D102
        return Dense((self.matrix != 0).to(self.matrix.dtype))

    def _nearest(self, p: Tensor, far: float) -> Tensor:
        if self.shape[-1] == 0:
            return p.new_full((*self._lead(p.shape[:-1]), self.shape[-2]), far)
        return torch.where(self.matrix != 0, p[..., None, :], far).to(p.dtype).amin(-1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        return self.matrix.to(dtype)

    def cost(self, itemsize: int = 4) -> Cost:  # noqa: D102
        batch, (m, n) = num_rows(self.batch_shape), self.shape[-2:]
        return Cost(2 * batch * m * n, batch * (m + n) * itemsize)

    def pinv(self) -> TokenMap:
        """Return the Moore-Penrose inverse."""
        return Dense(torch.linalg.pinv(self.matrix))

    @property
    def is_identity(self) -> bool:  # noqa: D102
        m, n = self.shape[-2:]
        return m == n and bool((self.matrix == torch.eye(n, dtype=self.matrix.dtype, device=self.device)).all())

    def _describe(self) -> str:
        return f"{self.shape[-2]} x {self.shape[-1]}"
