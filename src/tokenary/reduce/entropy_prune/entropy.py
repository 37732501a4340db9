"""Two entropies: of the heads of one token, and of all tokens of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenary.core.errors import OptionError
from tokenary.hf.hooks import decoder_layers, hidden_states_of

FLOOR = 1e-10  # of eigenvalues
WIDTH = 128  # of a head, at most


def head_gram(states: Tensor) -> Tensor:
    """Return how alike the heads of each token are: the small one of the two products of its centred matrix.

    Parameters
    ----------
    states : Tensor
        (..., H, d), a token's heads. Heads wider than 128 are averaged to 128 groups.

    Returns
    -------
    Tensor
        (..., H, H) float64, R R^T / H with R the heads less their mean. R^T R / H has the same eigenvalues above 0.
    """
    wide = states.double()
    if wide.shape[-1] > WIDTH:
        wide = F.adaptive_avg_pool1d(wide.flatten(0, -2)[:, None], WIDTH)[:, 0].view(*wide.shape[:-1], WIDTH)
    centred = wide - wide.mean(-2, keepdim=True)
    return centred @ centred.mT / centred.shape[-2]


def head_entropy(states: Tensor, normalise: Literal["none", "trace"] = "none") -> Tensor:
    """Return the spectral entropy of each token's heads.

    Parameters
    ----------
    states : Tensor
        (..., H, d), with H of 2 or more.
    normalise : {"none", "trace"}
        ``trace``: eigenvalues sum to 1, the von Neumann entropy, 0 to 1 (0 where all heads are the same). ``none``:
        they are taken as they are, so that the figure depends on norms, and falls with them where they are large.

    Returns
    -------
    Tensor
        (...) float64, -sum(l log l) / log H over the eigenvalues l of `head_gram`.
    """
    gram = head_gram(states)
    spectrum = torch.linalg.eigvalsh(gram)
    if normalise == "trace":
        spectrum = spectrum / gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).clamp_min(FLOOR)
    spectrum = spectrum.clamp_min(FLOOR)
    return -(spectrum * spectrum.log()).sum(-1) / math.log(states.shape[-2])


def layer_entropy(hidden_states: Tensor) -> Tensor:
    """Return the matrix entropy of the tokens of a layer.

    Parameters
    ----------
    hidden_states : Tensor
        (B, N, d), N of 2 or more. The mean token is taken off, then rows get length 1.

    Returns
    -------
    Tensor
        (B,) float64, of Z Z^T / trace, or of Z^T Z where that is smaller, over log(min(N, d)): 0 to 1.
    """
    rows = hidden_states.double()
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=-1)
    gram = rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows
    spectrum = torch.linalg.eigvalsh(gram)
    spectrum = (spectrum / spectrum.sum(-1, keepdim=True).clamp_min(FLOOR)).clamp_min(FLOOR)
    return -(spectrum * spectrum.log()).sum(-1) / math.log(gram.shape[-1])


def collapse(curve: Sequence[float]) -> int:
    """Return the Entropy Collapse Layer: of the first half, the one through which the entropy falls most.

    Parameters
    ----------
    curve : sequence of float
        L + 1 entropies, of what enters layer 0 and of what each layer returns.
    """
    if len(curve) < 2:
        raise OptionError("curve", list(curve), "an entropy in front of the layers and one behind each")
    half = max(1, (len(curve) - 1) // 2)
    return max(range(half), key=lambda layer: (curve[layer] - curve[layer + 1], -layer))


class EntropyCurve:
    """Measures `layer_entropy` of a span of the prompt behind every layer; inside a ``with`` block.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only language model.
    start, count : int
        The span, as image tokens of a `BenchVLM` (1 and their number), or a text's context.

    Attributes
    ----------
    curve : list of float
        L + 1 means over all prompts that were read in the block.
    layer : int
        The Entropy Collapse Layer.
    place : str
        Where to prune: right behind it, as ``decoder:2``.
    """

    def __init__(self, model: PreTrainedModel, start: int, count: int) -> None:
        if count < 2:
            raise OptionError("count", count, "2 tokens or more")
        self.layers, self.start, self.count = decoder_layers(model), start, count
        self._found: list[list[Tensor]] = [[] for _ in range(len(self.layers) + 1)]

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        first = self.layers[0].register_forward_pre_hook(self._before, with_kwargs=True)
        self._stack.callback(first.remove)
        for number, layer in enumerate(self.layers, 1):
            self._stack.callback(layer.register_forward_hook(self._behind(number)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _note(self, number: int, hidden: Tensor) -> None:
        stop = self.start + self.count
        if hidden.shape[1] >= stop:  # else a step of decoding
            self._found[number].append(layer_entropy(hidden[:, self.start : stop].detach()).cpu())

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._note(0, hidden_states_of(args, kwargs))

    def _behind(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._note(number, output if isinstance(output, Tensor) else output[0])

        return hook

    @property
    def curve(self) -> list[float]:
        """Means over prompts."""
        if not self._found[-1]:
            raise OptionError("curve", [], f"a prompt of {self.start + self.count} tokens or more, read in the block")
        return [float(torch.cat(each).mean()) for each in self._found]

    @property
    def layer(self) -> int:
        """The layer through which the entropy falls most, in the first half."""
        return collapse(self.curve)

    @property
    def place(self) -> str:
        """The first layer that needs fewer tokens."""
        return f"decoder:{self.layer + 1}"
