"""The hypernetwork: from the rows of a token's old pieces to its row.

    x_i = (E[p_i] - mean) / std                            the columns of the table, scaled in
    z   = transformer(proj(x) + position)                  three layers over at most 7 pieces
    H   = g sum_i softmax_i(a(z_i)) E[p_i] + std * out(z_0)

The published network predicts the row whole and is as wide as the model. This one is narrow and predicts what the mean
of the pieces lacks: a, g and out begin as that mean, which takes the place of the identity warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LENGTH = 7  # pieces that are read of a token


class Residual(nn.Module):
    """Linear, gelu, linear, gelu, added and normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.norm(x + self.inner(x))


class Hypernetwork(nn.Module):
    """Predicts rows of new tokens.

    Parameters
    ----------
    table : Tensor
        (V, D) float, the old rows; only their column means and deviations are kept.
    width : int
        Of the transformer; a multiple of 64.
    layers : int
        Of the transformer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, table: Tensor, width: int = 256, layers: int = 3) -> None:
        super().__init__()
        size = table.shape[1]
        self.register_buffer("mean", table.mean(0))
        self.register_buffer("std", table.std(0).clamp_min(1e-6))
        self.project = nn.Sequential(nn.Linear(size, width), Residual(width))
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 2 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.share, self.gain = nn.Linear(width, 1), nn.Linear(width, 1)
        self.out = nn.Sequential(Residual(width), nn.Linear(width, size))
        for last in (self.share, self.gain, self.out[1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, pieces: Tensor, mask: Tensor) -> Tensor:
        """Predict rows.

        Parameters
        ----------
        pieces : Tensor
            (B, L, D), rows of the old pieces, L up to 7.
        mask : Tensor
            (B, L) bool, which are there; the first always is.

        Returns
        -------
        Tensor
            (B, D).
        """
        scaled = (pieces - self.mean) / self.std
        hidden = self.project(scaled) + self.position[: pieces.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=~mask)
        share = self.share(hidden).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        first = hidden[:, 0]
        return (1 + self.gain(first)) * (share * pieces).sum(1) + self.std * self.out(first)


def surface(parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lay the pieces of tokens out as (B, L) ids, at most 7 each, and the mask of those that are there."""
    cut = [list(part[:LENGTH]) for part in parts]
    longest = max(map(len, cut), default=0)
    ids = torch.tensor([part + [0] * (longest - len(part)) for part in cut], dtype=torch.int64)
    mask = torch.arange(longest) < torch.tensor([len(part) for part in cut])[:, None]
    return ids.view(len(cut), longest), mask
