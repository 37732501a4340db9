"""The lightning indexer: a small network a layer that says how much a query will attend to each token.

::

    I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s])        j over the indexer's heads; one key a token serves them all

DSA projects q, k and w from a layer's hidden states. Here they are projected from what the layer's attention itself is
made of: its queries and keys, their rotation taken back. Queries hold all of the hidden state where there are as many
of them as hidden dimensions; keys hold all that attention can see of a token. As in DSA, keys are normalised and a part
of the width is rotated by the position.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenary.core.errors import InputError

BASE = 10_000.0  # of the indexer's own rotation
PIECE = 4096  # tokens that are scored at once, so that the products of all heads stay in the processor's cache


class LightningIndexer(nn.Module):
    """The indexer of one layer.

    Parameters
    ----------
    query_size, key_size : int
        Query heads times their width, key heads times their width, of the layer.
    heads, width : int
        Of the indexer.
    """

    query_scale: Tensor
    key_scale: Tensor

    def __init__(self, query_size: int, key_size: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query = nn.Linear(query_size, heads * width, bias=False)
        self.weight = nn.Linear(query_size, heads, bias=False)
        self.key = nn.Linear(key_size, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("query_scale", torch.ones(()))  # brings the inputs to a mean square of one
        self.register_buffer("key_scale", torch.ones(()))

    def queries(self, query_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Project queries.

        Parameters
        ----------
        query_states : Tensor
            (Hq, N, D), not rotated.
        positions : Tensor
            (N,).

        Returns
        -------
        Tensor, Tensor
            Queries (N, H, d) and weights of the heads (N, H), float32.
        """
        merged = query_states.float().transpose(0, 1).flatten(1) * self.query_scale
        made = self.query(merged).view(-1, self.heads, self.width)
        return turn(made, positions[:, None]), self.weight(merged) * (self.heads * self.width) ** -0.5

    def keys(self, key_states: Tensor, positions: Tensor) -> Tensor:
        """Project keys (Hkv, N, D), not rotated, of tokens at `positions` (N,): (N, d) float32."""
        merged = key_states.float().transpose(0, 1).flatten(1) * self.key_scale
        return turn(self.norm(self.key(merged)), positions)


def turn(states: Tensor, positions: Tensor) -> Tensor:
    """Rotate the first half of the width by the position; the second half says nothing of it.

    Parameters
    ----------
    states : Tensor
        (..., d), d a multiple of 4.
    positions : Tensor
        Broadcastable to (...).
    """
    pairs = states.shape[-1] // 4
    angles = positions[..., None].float() * BASE ** -(torch.arange(pairs, device=states.device) / pairs)
    cos, sin = angles.cos(), angles.sin()
    first, second, still = states.split([pairs, pairs, 2 * pairs], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], dim=-1)


def score(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Score tokens, or means of tokens' keys.

    Parameters
    ----------
    queries, weights : Tensor
        (Q, H, d) and (Q, H).
    keys : Tensor
        (N, d), or (Q, N, d) where every query has its own.

    Returns
    -------
    Tensor
        (Q, N).
    """
    n_queries, heads, width = queries.shape
    found = [queries.new_zeros(n_queries, 0)]
    for start in range(0, keys.shape[-2], PIECE):
        part = keys[..., start : start + PIECE, :].transpose(-1, -2)
        if keys.dim() == 2:
            products = (queries.reshape(-1, width) @ part).view(n_queries, heads, -1)
        else:
            products = torch.bmm(queries, part)
        found.append(torch.bmm(weights[:, None], products.relu())[:, 0])
    return torch.cat(found, dim=1)


def load_indexers(folder: Path) -> list[LightningIndexer]:
    """Load a trained indexer, one net a layer.

    Raises
    ------
    InputError
        The folder lacks its files.
    """
    config = _config(folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    del tensors["mark"]
    layers = config.pop("layers")
    with torch.device("meta"):  # no random weights for what is read
        indexers = [LightningIndexer(**config) for _ in range(layers)]
    nn.ModuleList(indexers).load_state_dict(tensors, assign=True)
    return indexers


def belongs_to(folder: Path) -> tuple[int, Tensor]:
    """Return by what an indexer knows its model: how many layers, and the mean input embedding, (hidden,).

    Raises
    ------
    InputError
        The folder lacks its files.
    """
    layers = _config(folder)["layers"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return layers, file.get_tensor("mark").float()


def _config(folder: Path) -> dict[str, int]:
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no indexer (config.json, model.safetensors)")
    config: dict[str, int] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
