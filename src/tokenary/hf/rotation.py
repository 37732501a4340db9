"""How a model rotates queries and keys: which dimensions turn together, and how fast (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.errors import UnsupportedModelError

#: Kinds of RoPE whose frequencies do not depend on how long the text is.
FIXED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotation:
    """The rotation of a model, P pairs of dimensions.

    Parameters
    ----------
    pairs : Tensor
        Dimensions that turn together, from the first towards the second, (P, 2) int64; evenly spaced among the
        first 2 P.
    frequencies : Tensor
        Radians a position, (P,) float32.
    """

    pairs: Tensor
    frequencies: Tensor

    def __call__(self, states: Tensor, positions: Tensor) -> Tensor:
        """Turn states.

        Parameters
        ----------
        states : Tensor
            (..., D), as the model makes them at position 0.
        positions : Tensor
            Broadcastable to (...).
        """
        angles = positions[..., None].float() * self.frequencies.to(states.device)
        cos, sin = angles.cos(), angles.sin()
        first, second = (_as_slice(dims) for dims in self.pairs.unbind(1))
        one, other = states[..., first].float(), states[..., second].float()
        turned = torch.empty_like(states)
        turned[..., 2 * len(self.pairs) :] = states[..., 2 * len(self.pairs) :]  # what does not turn
        turned[..., first] = one * cos - other * sin
        turned[..., second] = other * cos + one * sin
        return turned


def rotation_of(model: PreTrainedModel) -> Rotation:
    """Read the rotation of a model that rotates all its layers alike, whatever the length of the text.

    Raises
    ------
    UnsupportedModelError
        If the model has no rotary positions, or others.
    """
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    kinds = _frequencies(model)
    if list(kinds) != ["inv_freq"] or not all(getattr(text, "no_rope_layers", None) or [True]):
        raise UnsupportedModelError(f"{name} has no rotary positions, or not the same in all layers")
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in FIXED:
        raise UnsupportedModelError(f"{name} rotates long texts otherwise than short ones ({kind})")
    return Rotation(rotated_pairs(model), kinds["inv_freq"].detach().float().cpu().clone())


def rotated_pairs(model: PreTrainedModel) -> Tensor:
    """Find which dimensions turn together, by turning unit vectors with the model's own function.

    Returns
    -------
    Tensor
        (P, 2) int64 in the order of their frequencies: (i, i + P) or (2 i, 2 i + 1), i < P.

    Raises
    ------
    UnsupportedModelError
        If the model has no such function, or it does not turn pairs.
    """
    turn, kinds = _turn(model), _frequencies(model)
    if turn is None or not kinds:
        raise UnsupportedModelError(f"{type(model).__name__} has no rotary positions")
    size = 2 * len(next(iter(kinds.values())))
    units = torch.eye(size)[None, None]  # (B, H, N, D): every vector at a position of its own
    turned = turn(units, units, torch.zeros(1, size, size), torch.ones(1, size, size))[0][0, 0]  # by a right angle
    first, second = (turned > 0.5).nonzero().unbind(1)
    layouts = [torch.arange(size).view(2, -1).T, torch.arange(size).view(-1, 2)]
    if len(first) != size // 2 or not any(torch.equal(torch.stack([first, second], 1), each) for each in layouts):
        raise UnsupportedModelError(f"{type(model).__name__} does not rotate pairs of dimensions")
    return torch.stack([first, second], dim=1)


def rotated(model: PreTrainedModel, states: Tensor, embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate queries or keys (B, H, N, D) by a pass's own position embeddings; as they are where a model has none."""
    turn = _turn(model)
    return states if turn is None or embeddings is None else turn(states, states, *embeddings)[0]


def _turn(model: PreTrainedModel) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the model's own function that rotates queries and keys."""
    return getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)


def _as_slice(dims: Tensor) -> slice:
    """Return evenly spaced dimensions as a slice, which needs no copy."""
    step = int(dims[1] - dims[0]) if len(dims) > 1 else 1
    return slice(int(dims[0]), int(dims[-1]) + 1, step)


def _frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the frequencies of a model by the name of their buffer: one, or one for each type of layer."""
    buffers = ((name.rpartition(".")[2], buffer) for name, buffer in model.named_buffers())
    return {name: buffer for name, buffer in buffers if name.endswith("inv_freq") and "original" not in name}
