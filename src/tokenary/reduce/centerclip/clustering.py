"""Clusters of tokens around real tokens: k-medoids from a fixed start, on the tokens or on the spectrum of a graph."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = float("inf")


def distances(points: Tensor, metric: Literal["euclidean", "cosine"] = "euclidean") -> Tensor:
    """Return how far points (B, N, D) lie from each other, (B, N, N) float32; 0 for equal ones.

    ``cosine`` is 1 less the cosine. Differences are taken entry by entry, so that equal points are at exactly 0.
    """
    points = points.float() if metric == "euclidean" else F.normalize(points.float(), dim=-1)
    found = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return found if metric == "euclidean" else found.square() / 2


def first_medoids(apart: Tensor, norms: Tensor, count: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Choose where to begin (KKZ): the largest norm, then again and again what is farthest from all chosen.

    Returns
    -------
    index, there : (B, count) Tensor
        What was chosen, in that order; False where there was nothing left.
    """
    left, nearest = norms.masked_fill(~allowed, -FAR), torch.full_like(norms, FAR)
    taken, index, there = ~allowed, list[Tensor](), list[Tensor]()
    for _ in range(count):
        best = left.max(-1)  # of equal ones the first
        index.append(best.indices)
        there.append(best.values > -FAR)
        nearest = torch.minimum(nearest, _rows(apart, best.indices[:, None])[:, 0])
        taken = taken.scatter(1, best.indices[:, None], True)
        left = nearest.masked_fill(taken, -FAR)
    return torch.stack(index, 1), torch.stack(there, 1)


def k_medoids(
    apart: Tensor, norms: Tensor, count: int, allowed: Tensor, rounds: int = 100, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster around tokens; the same tokens give the same clusters.

    Parameters
    ----------
    apart : Tensor
        (B, N, N) distances.
    norms : Tensor
        (B, N); the largest begins.
    count : int
        K.
    allowed : Tensor
        (B, N) bool; others are of no cluster.
    rounds : int
        At most.
    tolerance : float
        Summed way of the medoids in a round below which a row is done.

    Returns
    -------
    medoids, there : (B, K) Tensor
        In ascending order; False, at the end, where fewer are allowed.
    assign : (B, N) Tensor
        Cluster of each token, -1 for none.
    """
    medoids, there = first_medoids(apart, norms, count, allowed)
    running = torch.ones(len(apart), 1, dtype=torch.bool, device=apart.device)
    for _ in range(rounds):
        centres = _centres(apart, norms, nearest_medoid(apart, medoids, there, allowed), count)
        moved = torch.where(there, centres, medoids)
        way = _rows(apart, medoids).gather(2, moved[..., None])[..., 0].masked_fill(~there, 0)  # (B, K)
        medoids = torch.where(running, moved, medoids)
        running = running & (way.sum(1, keepdim=True, dtype=torch.float64) >= tolerance)
        if not bool(running.any()):
            break
    medoids = medoids.masked_fill(~there, apart.shape[-1]).sort(-1).values
    there = medoids < apart.shape[-1]
    medoids = medoids.masked_fill(~there, 0)
    return medoids, there, nearest_medoid(apart, medoids, there, allowed)


def nearest_medoid(apart: Tensor, medoids: Tensor, there: Tensor, allowed: Tensor) -> Tensor:
    """Return the nearest of the medoids (B, K) of each token, of equal ones the first: (B, N), -1 for none.

    A medoid is its own, whatever lies at the same point.
    """
    assign = _rows(apart, medoids).masked_fill(~there[..., None], FAR).argmin(1)
    number = torch.arange(medoids.shape[1], device=apart.device).expand_as(medoids)
    column = medoids.masked_fill(~there, apart.shape[-1])  # behind the last token, for what is not there
    assign = F.pad(assign, (0, 1)).scatter(1, column, number)[:, :-1]
    return assign.masked_fill(~allowed, -1)


def _centres(apart: Tensor, norms: Tensor, assign: Tensor, count: int) -> Tensor:
    """Return the member of each cluster that is nearest to all its members, (B, K).

    Two are always equally near to each other: the one with the larger norm is taken, of equal ones the first.
    """
    n, part = assign.shape[1], assign.clamp_min(0)
    apart = apart.masked_fill(assign[:, :, None] != assign[:, None], 0)
    cost = apart.sum(-1, dtype=torch.float64)  # (B, N), never (B, K, N, N)
    best = assign >= 0
    for score in (-cost, norms):
        score = score.double().masked_fill(~best, -FAR)
        most = score.new_full((len(assign), count), -FAR).scatter_reduce(1, part, score, "amax")
        best = best & (score == most.gather(1, part))
    number = torch.arange(n, device=assign.device).masked_fill(~best, n)
    return torch.full((len(assign), count), n, device=assign.device).scatter_reduce(1, part, number, "amin")


def _rows(apart: Tensor, index: Tensor) -> Tensor:
    """Distances of tokens (B, K) to all others, (B, K, N)."""
    return apart.gather(1, index[..., None].expand(-1, -1, apart.shape[-1]))


def gaussian(apart: Tensor, sigma: float = 2.0) -> Tensor:
    """Return the weights exp(-d^2 / 2 sigma^2) of a graph, (B, N, N)."""
    return (-apart.double().square() / (2 * sigma**2)).exp()


def neighbour_graph(apart: Tensor, count: int, allowed: Tensor) -> Tensor:
    """Return the graph of tokens one of which is among the `count` nearest of the other, (B, N, N) of 0 and 1."""
    itself = torch.eye(apart.shape[-1], dtype=torch.bool, device=apart.device)
    apart = apart.masked_fill(itself | ~allowed[:, None], FAR)
    order = apart.argsort(dim=-1, stable=True)[..., :count]
    near = torch.zeros_like(apart, dtype=torch.bool).scatter(2, order, True) & (apart < FAR)
    return (near | near.mT).double()


def window(place: Tensor, high: int, wide: int, long: int) -> Tensor:
    """Say which tokens, at frame, row and column ``place`` (B, N, 3), lie in each other's window, (B, N, N) bool."""
    off = (place[:, :, None] - place[:, None]).abs()
    return (off <= off.new_tensor([long // 2, high // 2, wide // 2])).all(-1)


def spectral_points(weights: Tensor, count: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the tokens of a graph lie in its `count` smoothest modes.

    Parameters
    ----------
    weights : Tensor
        (B, N, N) float64, symmetric.
    count : int
        K.
    allowed : Tensor
        (B, N) bool.

    Returns
    -------
    points : (B, N, K) Tensor
        Rows of the eigenvectors of D^-1/2 (D - W) D^-1/2 with the smallest eigenvalues (they are its singular vectors,
        up to signs that change no distance), scaled to length 1.
    norms : (B, N) Tensor
        Their lengths before.
    """
    weights = weights * (allowed[:, :, None] & allowed[:, None])
    degree = weights.sum(-1)
    scale = torch.where(degree > 0, degree.clamp_min(1e-300).rsqrt(), 0)
    laplacian = (degree.diag_embed() - weights) * scale[:, :, None] * scale[:, None]
    laplacian = laplacian + 3.0 * (~allowed).double().diag_embed()  # behind all others, whose eigenvalues are at most 2
    modes = torch.linalg.eigh(laplacian).eigenvectors[..., :count]
    return F.normalize(modes, dim=-1), modes.norm(dim=-1)
