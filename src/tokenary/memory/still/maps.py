"""Feature maps of the linear branch, and the gate: all that STILL learns in a layer.

Norm-preserving map, a set of parameters for each query head (u a unit vector)::

    z = W (x - 2 u (u . x))      x' = |x| z / |z|      phi(x) = [softmax(x'), softmax(-x')]

`HedgehogMap` is the same without reflection and without the norm of x: ``phi(x) = [softmax(W x), softmax(-W x)]``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tokenary.core.errors import InputError
from tokenary.core.files import written_whole

Features = Literal["norm", "hedgehog"]
LEAST = 1e-12  # of a feature
RANK = 32  # of what a gate learnt, in files
_GATE, _OUT, _INTO, _SCALE = "gate.weight", ".out", ".into", ".scale"


class NormMap(nn.Module):
    """The norm-preserving feature map.

    Parameters
    ----------
    heads, size : int
        Query heads, and their width D.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(heads, 1, size))  # of the reflection; its length does not matter
        self.weight = nn.Parameter(torch.empty(heads, size, size))
        for matrix in self.weight:
            nn.init.kaiming_uniform_(matrix)

    def forward(self, states: Tensor) -> Tensor:
        """Map queries or keys (..., H, N, D) to features (..., H, N, 2 D), all above zero."""
        unit = nn.functional.normalize(self.direction, dim=-1)
        reflected = states - 2 * unit * (states * unit).sum(-1, keepdim=True)
        turned = nn.functional.normalize(reflected @ self.weight.mT, dim=-1)
        return both_signs(states.norm(dim=-1, keepdim=True) * turned)


class HedgehogMap(nn.Module):
    """Hedgehog's feature map, which starts at the identity.

    Parameters
    ----------
    heads, size : int
        Query heads, and their width D.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size).repeat(heads, 1, 1))

    def forward(self, states: Tensor) -> Tensor:
        """Map queries or keys (..., H, N, D) to features (..., H, N, 2 D), all above zero."""
        return both_signs(states @ self.weight.mT)


def both_signs(states: Tensor) -> Tensor:
    """Concatenate the softmax of x and of -x over the channels: (..., D) to (..., 2 D)."""
    return torch.cat([states.softmax(-1), (-states).softmax(-1)], dim=-1).clamp(min=LEAST)


class Maps(nn.Module):
    """What is learnt in one layer: the maps of queries and of keys, and the gate of the linear branch.

    Parameters
    ----------
    heads, size : int
        Query heads, and their width D. Keys have as many maps as queries, whether or not heads share them.
    hidden : int
        Width of the hidden states, which the gate looks at.
    features : {"norm", "hedgehog"}
        Which feature map.
    """

    def __init__(self, heads: int, size: int, hidden: int, features: Features = "norm") -> None:
        super().__init__()
        kind = NormMap if features == "norm" else HedgehogMap
        self.heads, self.size = heads, size
        self.query, self.key = kind(heads, size), kind(heads, size)
        self.gate = nn.Linear(hidden, heads * size, bias=False)
        nn.init.ones_(self.gate.weight)

    def gates(self, hidden_states: Tensor) -> Tensor:
        """Return how much of each channel the linear branch may add, in (0, 1): (..., N, hidden) to (..., H, N, D)."""
        opened = self.gate(hidden_states.to(self.gate.weight.dtype)).sigmoid()
        return opened.unflatten(-1, (self.heads, self.size)).transpose(-2, -3)


def fresh_maps(layers: int, seed: int, features: Features = "norm", **sizes: int) -> list[Maps]:
    """Make untrained maps for so many layers; `sizes` are heads, size and hidden."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [Maps(**sizes, features=features) for _ in range(layers)]


def save_maps(folder: Path, name: str, maps: Mapping[int, Maps], mark: Tensor | None = None) -> None:
    """Write maps of layers to a folder, small: rows of int8 with scales, and of gates what they learnt.

    A gate starts at ones; its distance from there is written as a product of rank `RANK`.

    Parameters
    ----------
    folder : Path
        Holds ``config.json`` too, for `load_maps`.
    name : str
        Of the file.
    maps : mapping of int to Maps
        By layer.
    mark : Tensor, optional
        Mean input embedding of the model, (hidden,).
    """
    tensors: dict[str, Tensor] = {} if mark is None else {"mark": mark}
    for key, tensor in nn.ModuleList(maps.values()).state_dict().items():
        tensors |= _packed(key, tensor.detach().float().cpu())
    with written_whole(folder / f"{name}.safetensors") as stream:
        stream.write(save({key: tensor.contiguous() for key, tensor in tensors.items()}))


def _packed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    if key.endswith(".direction"):
        return {key: tensor.half()}
    if not key.endswith(_GATE):
        return _rows(key, tensor)
    left, size, right = torch.linalg.svd(tensor - 1, full_matrices=False)
    root = size[:RANK, None].sqrt()
    return _rows(key + _OUT, root * left.mT[:RANK]) | _rows(key + _INTO, root * right[:RANK])


def _rows(key: str, tensor: Tensor) -> dict[str, Tensor]:
    scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return {key: (tensor / scale).round().to(torch.int8), key + _SCALE: scale}


def _unpacked(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_packed` of all tensors of a file."""
    tensors = {
        key: tensor.float() * found.get(key + _SCALE, torch.ones(()))
        for key, tensor in found.items()
        if key != "mark" and not key.endswith(_SCALE)
    }
    for key in [key.removesuffix(_OUT) for key in tensors if key.endswith(_OUT)]:
        tensors[key] = 1 + tensors.pop(key + _OUT).mT @ tensors.pop(key + _INTO)
    return tensors


def load_maps(folder: Path, name: str = "model", features: Features = "norm") -> dict[int, Maps]:
    """Load trained maps by layer.

    Parameters
    ----------
    folder : Path
        As written by ``scripts/train_still.py``.
    name : str
        Of the file; others than ``model`` are those of controls.
    features : {"norm", "hedgehog"}
        Which map they belong to.

    Raises
    ------
    InputError
        The folder lacks its files.
    """
    config = config_of(folder, name)
    tensors = _unpacked(load_file(folder / f"{name}.safetensors"))
    sizes = {key: int(config[key]) for key in ("heads", "size", "hidden")}
    with torch.device("meta"):  # no random weights for what is read
        maps = nn.ModuleList(Maps(**sizes, features=features) for _ in config["layers"])
    maps.load_state_dict(tensors, assign=True)
    return {int(layer): each for layer, each in zip(config["layers"], maps, strict=True) if isinstance(each, Maps)}


def belongs_to(folder: Path) -> tuple[int, Tensor]:
    """Return by what maps know their model: how many layers it has, and its mean input embedding, (hidden,).

    Raises
    ------
    InputError
        The folder lacks its files.
    """
    layers = int(config_of(folder)["model_layers"])
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return layers, file.get_tensor("mark").float()


def config_of(folder: Path, name: str = "model") -> dict[str, Any]:
    """Read ``config.json`` of a folder that also holds the weights `name`.

    Raises
    ------
    InputError
        The folder lacks its files.
    """
    if not (folder / "config.json").is_file() or not (folder / f"{name}.safetensors").is_file():
        raise InputError(f"{folder} holds no feature maps (config.json, {name}.safetensors)")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
