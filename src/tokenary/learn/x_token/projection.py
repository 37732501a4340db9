"""W: which teacher tokens stand for a student token, by rules on strings; and which pairs are matched outright.

A token is cut with the other vocabulary, and the pieces weigh 0.9, 0.09, 0.009, ...: the first piece is what the other
model says next. Everything is arrays of (student, teacher, weight); nothing of size V_S x V_T is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenary.core.token_map import Sparse
from tokenary.hf.tokenizer import Vocabulary
from tokenary.learn.x_token.strings import alike, cuts, equal_tokens

_SLACK = 0.2
_RELAXED = 0.6


@dataclass(frozen=True, eq=False)
class Projection:
    """The weights of teacher tokens for each student token.

    Attributes
    ----------
    index : Tensor
        (V_S, k) int64, teacher tokens by falling weight; -1 for none.
    weight : Tensor
        (V_S, k) float32; rows sum to at most 1.
    teacher_size : int
        V_T.
    """

    index: Tensor
    weight: Tensor
    teacher_size: int

    @property
    def student_size(self) -> int:
        """V_S."""
        return len(self.index)

    @property
    def map(self) -> Sparse:
        """The map of student to teacher probabilities, (V_T, V_S)."""
        return self.columns(torch.arange(self.teacher_size, device=self.index.device))

    def columns(self, chosen: Tensor) -> Sparse:
        """Return the map to some teacher tokens alone, (K, V_S).

        Parameters
        ----------
        chosen : Tensor
            (K,) int64, without repeats.
        """
        place = torch.full((self.teacher_size,), -1, dtype=torch.int64, device=self.index.device)
        place[chosen] = torch.arange(len(chosen), device=self.index.device)
        row = torch.where(self.index >= 0, place[self.index.clamp_min(0)], -1)
        student, slot = torch.nonzero(row >= 0, as_tuple=True)
        where = torch.stack([row[student, slot], student])
        shape = (len(chosen), self.student_size)
        return Sparse(torch.sparse_coo_tensor(where, self.weight[student, slot], shape, check_invariants=False))

    def matches(self, relaxed: bool) -> tuple[Tensor, Tensor]:
        """Return pairs of tokens that count as the same, each teacher token at most once.

        Parameters
        ----------
        relaxed : bool
            False: the first weight is 1 and there is no second; of several student tokens the lowest id. True: the
            first weight is at least 0.6; of several the highest weight, then the lowest id.

        Returns
        -------
        student, teacher : Tensor
            (P,) int64 each, by ascending student id.
        """
        first = self.weight[:, 0]
        taken = first >= _RELAXED if relaxed else (first == 1) & ~(self.index[:, 1:] >= 0).any(1)
        student = torch.nonzero(taken & (self.index[:, 0] >= 0))[:, 0]
        if relaxed:
            student = student[first[student].argsort(descending=True, stable=True)]
        teacher = self.index[student, 0]
        rank = torch.arange(len(student), device=student.device)
        best = torch.full((self.teacher_size,), len(student), device=student.device)
        best = best.scatter_reduce(0, teacher, rank, "amin")
        won = student[best[teacher] == rank].sort().values
        return won, self.index[won, 0]

    def to(self, device: torch.device | str) -> Projection:
        """Return it on another device."""
        return Projection(self.index.to(device), self.weight.to(device), self.teacher_size)


def build_projection(
    student: Vocabulary,
    teacher: Vocabulary,
    pieces: int = 4,
    reverse: bool = True,
    special: float = 0.3,
    special_k: int = 32,
    slack: bool = True,
    exact: bool = True,
    top: int = 32,
    keep: int = 4,
) -> Projection:
    """Build W for a pair of vocabularies; seconds for 50,000 tokens each.

    Parameters
    ----------
    student, teacher : Vocabulary
        Tokens are compared by the bytes that they spell, however a vocabulary writes spaces and line ends.
    pieces : int
        Most pieces of a token that count.
    reverse : bool
        Cut the teacher's tokens with the student's vocabulary too, and add the same weights.
    special : float
        Likeness from which special tokens are mapped: 0.6 of the strings' matching ratio and 0.4 of the Jaccard index
        of their words.
    special_k : int
        Most partners of a special token.
    slack : bool
        Set the last of the `top` weights of a row to 0.2, whether a token stands there or not, before rows are
        normalised the second time: a token that is only cut then weighs less than one that is matched.
    exact : bool
        Give a token that both vocabularies spell alike weight 1 in its partner, and nothing else.
    top, keep : int
        Columns of a row before the slack, and at the end.

    Notes
    -----
    arXiv 2605.21699, initialisation of W from string rules; the numbers are those of the authors' tools.
    """
    parts = [cuts(student, teacher, pieces)]
    if reverse:
        cut, piece, weight = cuts(teacher, student, pieces)
        parts.append((piece, cut, weight))
    parts.append(alike(student, teacher, special, special_k))
    row, col, value = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    index, weight = _top(row, col, value, student.size, teacher.size, top)
    if slack:
        weight[:, -1] = _SLACK
        weight /= weight.sum(1, keepdims=True)
    if exact:
        same = equal_tokens(student, teacher)
        rows = np.flatnonzero(same >= 0)
        index[rows], weight[rows] = -1, 0
        index[rows, 0], weight[rows, 0] = same[rows], 1
    weight[index < 0] = 0
    order = np.argsort(-weight, axis=1, kind="stable")[:, :keep]
    index, weight = np.take_along_axis(index, order, 1), np.take_along_axis(weight, order, 1)
    return Projection(torch.from_numpy(index), torch.from_numpy(weight.astype(np.float32)), teacher.size)


def _top(
    row: np.ndarray, col: np.ndarray, value: np.ndarray, rows: int, cols: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add up what stands at one place, normalise each row, keep its largest: index (rows, top) or -1, weight."""
    place, inverse = np.unique(row * cols + col, return_inverse=True)
    total = np.bincount(inverse, weights=value, minlength=len(place))
    row, col = place // cols, place % cols
    total = total / np.bincount(row, weights=total, minlength=rows)[row]
    order = np.lexsort((col, -total, row))
    row, col, total = row[order], col[order], total[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < top
    index, weight = np.full((rows, top), -1, np.int64), np.zeros((rows, top))
    index[row[kept], rank[kept]], weight[row[kept], rank[kept]] = col[kept], total[kept]
    return index, weight
