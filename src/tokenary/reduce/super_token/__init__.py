"""Super Token Sampling, SViT (Huang et al. 2022, arXiv 2211.11167).

Superpixels of tokens: cut the grid into cells, take the mean of each cell as its super token, let every token belong
in parts to the super tokens of its own cell and of the 8 around it, and average anew.

    q[p, n] = softmax over 9 cells n of x_p s_n / sqrt(C)       no gradient;  Q is (N, M), its rows sum to 1
    s_n     = sum_p q[p, n] x_p / sum_p q[p, n]                 P = diag(Q^T 1)^-1 Q^T
    X'      = Q Attention(P X)                                  global attention, factored; the same Q for the way back

`SuperToken` is the first half as a reducer, for any encoder: its map is the `Mix` of P with the mass Q^T, so that
``apply`` gives P X, ``sizes`` Q^T s (they sum to N), ``pinv`` Q, and ``apply`` on rows and columns of patches the
centroids. `among_super_tokens` puts the whole layer around the attention of a plain ViT: as many tokens leave it as
enter. `SViT` is the network of the paper, with convolutional position code and cells of 8, 4, 1 and 1.

Tokens of a plain ViT are of any length, and the paper's come out of a LayerNorm; the reducer therefore normalises what
it compares (and not what it averages). Cells that cannot be of one size, and what earlier reductions left, are cut as
`tokenary.reduce.grid` does; cells are neighbours where tokens of theirs touch.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.choose import chosen_in_order
from tokenary.reduce.grid import medians, partition
from tokenary.reduce.mix import Mix
from tokenary.reduce.super_token.association import Cells, associate, mass_of
from tokenary.reduce.super_token.layer import SuperTokenAttention, among_super_tokens
from tokenary.reduce.super_token.net import SIZES, SViT, SViTConfig

__all__ = [
    "SIZES", "Cells", "SViT", "SViTConfig", "SuperToken", "SuperTokenAttention", "among_super_tokens", "associate",
]  # fmt: skip

CARD = Card(
    slug="super-token",
    cls="SuperToken",
    room="reduce",
    title="Vision Transformer with Super Token Sampling",
    summary="makes soft superpixels of image tokens, and can give each token its share of them back",
    slot="reduce",
    paper="2211.11167",
    year=2022,
    code="hhb072/STViT",
    requires=("images",),
)


class SuperToken(Reducer):
    """Average tokens into super tokens, softly, within the cells around each.

    Parameters
    ----------
    keep : Budget
        How much stays; shared out evenly over views.
    rounds : int
        Of association and averaging; 1 in all published sizes.
    tau : float
        Divides the likeness; 1 is the paper's. Far below it super tokens could come out empty.
    proportional : bool
        Whether later layers weigh each super token by how much it stands for. The paper's do not.
    """

    kind = "merge"
    at = "vision:25%"

    def __init__(
        self,
        keep: Budget = Budget(ratio=0.25),  # noqa: B008 (frozen)
        rounds: Annotated[int, Field(ge=1, le=10)] = 1,
        tau: Annotated[float, Field(ge=0.25)] = 1.0,
        proportional: bool = True,
    ) -> None:
        super().__init__(keep)
        self.rounds, self.tau, self.proportional = rounds, tau, proportional

    def plan(self, x: Tensor, keep: int, context: Context) -> Mix:
        """Associate tokens with the super tokens around them."""
        assign = partition(x, keep, context)
        whole = context.per_view(x) and context.valid is None
        labels = (
            assign[0].view(context.views, *context.grid) if whole else torch.arange(keep, device=x.device)[None, None]
        )
        cells = Cells.cut(assign[:1] if whole else assign, touching(labels, keep))
        unit = F.layer_norm(x.float(), x.shape[-1:])
        mass = mass_of(associate(unit, cells, self.rounds, self.tau), cells)
        middle = medians(assign, keep)
        anchors = chosen_in_order(middle.clamp_min(0), middle >= 0, x.shape[1]).index
        return Mix.averages(mass, anchors.expand(len(x), -1), context.sizes)


def touching(labels: Tensor, count: int) -> Tensor:
    """Return the cells that each of `count` cells touches, corners included, and itself: (M, K), filled up with -1.

    `labels` (V, rows, columns) are the cells that patches lie in, of several views; -1 for none.
    """
    _, rows, columns = labels.shape
    padded = F.pad(labels, (1, 1, 1, 1), value=-1)
    touch = torch.zeros(count, count, dtype=torch.bool, device=labels.device)
    for down, right in product(range(3), range(3)):
        other = padded[:, down : down + rows, right : right + columns]
        both = (labels >= 0) & (other >= 0)
        touch[labels[both], other[both]] = True
    numbers = torch.arange(count, device=labels.device).expand(count, -1).masked_fill(~touch, count)
    table = numbers.sort(-1).values[:, : int(touch.sum(-1).max())]
    return table.masked_fill(table == count, -1)
