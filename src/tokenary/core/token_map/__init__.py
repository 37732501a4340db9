"""Token maps: linear operators y = P x on a token axis, kept structured.

A `TokenMap` has shape (*batch, M, N): it reads N tokens and writes M. ``batch`` broadcasts, as in ``torch.matmul``,
against the dims of x in front of the token axis; everything behind the axis is features. Choosing tokens is `Select`,
reordering `Permute`, putting tokens back `Scatter`, pooling or merging `Segment`; `Sparse` holds vocabulary-sized
maps, `Dense` learned ones, and `Compose` a product. Each kind brings ``apply``, ``shape`` and ``T``; sizes, positions,
masks, the matrix and the rest are derived once, in the base class. `check_token_map` holds any map to the laws.

>>> merge = Segment(torch.tensor([0, 0, 1, 1]), num_groups=2)          # average neighbours
>>> pooled = merge @ hidden_states                                     # (B, 4, D) -> (B, 2, D)
>>> bias = merge.sizes().log()                                         # proportional attention
>>> restored = merge.pinv() @ pooled                                   # (B, 2, D) -> (B, 4, D)
"""

from tokenary.core.token_map.base import Compose, Cost, TokenMap
from tokenary.core.token_map.indexed import Permute, Scatter, Segment, Select
from tokenary.core.token_map.laws import check_token_map
from tokenary.core.token_map.matrix import Dense, Sparse

__all__ = [
    "Compose",
    "Cost",
    "Dense",
    "Permute",
    "Scatter",
    "Segment",
    "Select",
    "Sparse",
    "TokenMap",
    "check_token_map",
]
