"""The laws that every token map keeps."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tokenary.core.token_map.base import TokenMap
from tokenary.core.token_map.indexed import Permute


def check_token_map(map: TokenMap) -> list[str]:
    """Hold a map to the laws of linear operators and of its batch.

    Parameters
    ----------
    map : TokenMap
        Any kind; checked in float64, on its own device.

    Returns
    -------
    list of str
        The laws that are broken, one text each; empty when all hold.
    """
    map = map.to(dtype=torch.float64)
    batch, (m, n) = map.batch_shape, map.shape[-2:]
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(map.device)

    x = noise(*batch, n, 3)
    px, matrix = map.apply(x), map.dense(torch.float64)
    y = noise(*px.shape)
    flip = Permute(torch.arange(n, device=map.device).flip(0))
    positions = torch.arange(n, device=map.device)
    broken = []

    def law(text: str, left: Tensor, right: Tensor) -> None:
        if left.shape != right.shape or not torch.allclose(left, right, rtol=1e-9, atol=1e-9):
            broken.append(f"{text}: {map!r}")

    law("apply(x) == dense() @ x", px, matrix @ x)
    law("dim=-1 is dim=-2 transposed", map.apply(x[..., 0].contiguous(), dim=-1), px[..., 0])
    law("T.dense() == dense().mT", map.T.dense(torch.float64), matrix.mT)
    law("<P x, y> == <x, P.T y>", (px * y).sum(), (x * map.T.apply(y)).sum())
    law("(A @ B) x == A (B x)", (map @ flip).apply(x), map.apply(flip.apply(x)))
    law("(P.T @ P) x == P.T (P x)", (map.T @ map).apply(x), map.T.apply(px))
    law("identity changes nothing", TokenMap.identity(n, map.device).apply(x), x)
    if map.is_identity:
        law("is_identity maps x to x", px, x)
    for b in itertools.product(*(range(size) for size in batch)):
        law(f"row {b} alone == row {b} of the batch", map[b].apply(x[b]), px[b])
    for policy in ("first", "mean", "reindex"):
        if map.positions(positions, policy).shape != (*batch, m):
            broken.append(f"positions({policy}) has shape (*batch, M): {map!r}")
    filled = map.mask(torch.ones(n, dtype=torch.bool, device=map.device))
    law("mask is where sizes are above 0", filled.double(), (map.sizes() > 0).double())
    if bool(map.mask(torch.zeros(n, dtype=torch.bool, device=map.device)).any()):
        broken.append(f"nothing masked in, nothing masked out: {map!r}")
    return broken
