"""A Llama whose logits are the same numbers on every machine, at every batch shape and number of threads.

Every sum that a processor may reorder is a sum of integers; everything else is single IEEE operations:

- weights are int8 with a scale a row; activations are 15-bit integers with a scale a token, as two int8 parts. The
  products are exact in int32, whichever kernel computes them (`exact_product` looks for one that is);
- keys and values are int8, queries and attention weights int16, bounded so that their products sum in int32;
- exp, the logistic function, cosine and sine come from `tables`.

An encoder may therefore read a whole lane at once where the decoder goes token by token, and both see the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenary.codec import kernels
from tokenary.codec.tables import exp_table, logistic_table, rotations
from tokenary.core.errors import UnsupportedModelError
from tokenary.hf.llama import llama_weights
from tokenary.models.lm import LM

Product = Callable[[Tensor], NDArray[np.float32]]
_REACH, _STEPS = 16, 512
_LIMIT = 1 << 24


@dataclass
class Linear:
    """A linear layer with int8 weights.

    Attributes
    ----------
    product : callable
        Maps int8 rows (2R, K) to their exact products (2R, N), float32.
    scales : float32 array, (N,)
        Of the rows of the weight.
    """

    product: Product
    scales: NDArray[np.float32]

    @classmethod
    def of(cls, *weights: Tensor) -> Linear:
        """Quantize weights (N, K), one below the other."""
        weight = torch.cat([w.detach().float().cpu() for w in weights])
        scales = weight.abs().amax(1).clamp_min(1e-20) / 127
        return cls(exact_product((weight / scales[:, None]).round().to(torch.int8)), scales.numpy())

    def __call__(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the products of high and low parts of rows (R, K), (2R, N), and the scales of the rows (R,)."""
        rows, width = x.shape
        planes, scales = np.empty((2 * rows, width), np.int8), np.empty(rows, np.float32)
        kernels.quantize_rows(x, planes, scales)
        return self.product(torch.from_numpy(planes)), scales


def exact_product(weight: Tensor) -> Product:
    """Return the fastest product with an int8 weight (N, K) that is exact on this machine.

    oneDNN's packed kernel is exact with VNNI or AMX, and saturates on older processors; `torch._int_mm` may share the
    fault. Single precision, the last, is exact everywhere: no row's products can sum past 2^24, else int64 is used.
    """
    width = weight.shape[1]
    small = int(weight.abs().sum(1, dtype=torch.int64).max()) * 127 < _LIMIT
    probe = torch.randint(-127, 128, (6, width), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    probe[0], probe[1] = 127, -127  # what saturating kernels get wrong
    probe[2] = 127 * weight[0].sign()
    expected = (probe.double() @ weight.double().T).numpy()
    for make in (_packed, _int_mm) if small else (_int_mm,):
        try:
            product = make(weight)
            if np.array_equal(product(probe), expected):
                return product
        except (RuntimeError, NotImplementedError, AttributeError):
            continue
    plain = (weight.float() if small else weight.double()).T.contiguous()
    return lambda x: (x.to(plain.dtype) @ plain).float().numpy()


def _packed(weight: Tensor) -> Product:
    packed = torch.ops.onednn.qlinear_prepack(weight, [32, weight.shape[1]])
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)

    def product(x: Tensor) -> NDArray[np.float32]:
        y = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.numpy()

    return product


def _int_mm(weight: Tensor) -> Product:
    return lambda x: torch._int_mm(x, weight.T).float().numpy()


@dataclass
class Block:
    """One transformer layer."""

    attention_norm: NDArray[np.float32]
    qkv: Linear
    out: Linear
    mlp_norm: NDArray[np.float32]
    gate_up: Linear
    down: Linear


class IntegerLlama:
    """The weights, quantized, without any state; threads may share it.

    Parameters
    ----------
    lm : LM
        A Llama with ordinary rotary positions and without biases.

    Raises
    ------
    UnsupportedModelError
        Another architecture.
    """

    name = "torch/int8-1"

    def __init__(self, lm: LM) -> None:
        weights = llama_weights(lm.model, lm.name)
        if weights.head_dim > 64:
            raise UnsupportedModelError(
                f"{lm.name}: heads of {weights.head_dim} dimensions, more than 64 are not exact"
            )
        self.theta, self.eps = weights.theta, weights.eps
        self.heads, self.kv_heads, self.dim = weights.heads, weights.kv_heads, weights.head_dim
        self.vocab_size = len(weights.head)
        self.embedding, self.norm = _array(weights.embedding), _array(weights.norm)
        self.head = Linear.of(weights.head)
        self.blocks = [
            Block(
                _array(block.attention_norm),
                Linear.of(block.q, block.k, block.v),
                Linear.of(block.o),
                _array(block.mlp_norm),
                Linear.of(block.gate, block.up),
                Linear.of(block.down),
            )
            for block in weights.blocks
        ]
        self._turns = rotations(self.theta, self.dim, 0, 4096)

    def turns(self, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine of at least so many positions."""
        have = len(self._turns[0])
        if have < positions:
            more = rotations(self.theta, self.dim, have, max(have, positions - have))
            self._turns = (np.concatenate([self._turns[0], more[0]]), np.concatenate([self._turns[1], more[1]]))
        return self._turns

    def open(self, lanes: int, window: int, drop: int, sinks: int = 0) -> IntegerLanes:
        """Start so many empty texts."""
        return IntegerLanes(self, lanes, window, drop, sinks)

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map normed hidden states (R, K) to logits (R, V)."""
        y, scales = self.head(hidden)
        out = np.empty((len(hidden), self.vocab_size), np.float32)
        kernels.dequantize(y, scales, self.head.scales, out, False)
        return out


class IntegerLanes:
    """Several texts that the model reads side by side, each with a cache of keys and values.

    Parameters
    ----------
    model : IntegerLlama
        The weights.
    lanes : int
        Texts.
    window : int
        Most tokens that a token sees, itself included.
    drop : int
        Tokens that are forgotten at once where the window is full. Rotary scores depend on distances alone, so nothing
        that stays is moved or computed again.
    sinks : int
        First tokens of a text that are never forgotten; attention weight that has nowhere else to go rests on them.
        Where they have left the window they stand right before it.
    """

    #: Whether logits are the same whatever else is read in the same pass.
    exact = True

    def __init__(self, model: IntegerLlama, lanes: int, window: int, drop: int, sinks: int = 0) -> None:
        self.model, self.window, self.drop = model, window, drop
        shape = (len(model.blocks), lanes, model.kv_heads, window + drop)
        self.keys = np.zeros((*shape, model.dim), np.int8)
        self.values = np.zeros((*shape[:-1], model.dim, shape[-1]), np.int8)
        self.key_scales, self.value_scales = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.sinks = np.zeros((2, *shape[:-1], sinks, model.dim), np.float32)  # keys, not rotated, and values
        self.length = [0] * lanes

    def read(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Read some tokens in each lane, maybe none; at most `drop`.

        Returns
        -------
        list of float32 array
            For each lane the normed hidden states (tokens, K) after each token.
        """
        lanes = np.array([lane for lane, ids in enumerate(tokens) for _ in ids], np.int64)
        positions = np.array([self.length[lane] + i for lane, ids in enumerate(tokens) for i in range(len(ids))])
        if not len(lanes):
            return [np.empty((0, len(self.model.norm)), np.float32) for _ in tokens]
        full = positions >= self.window
        starts = np.where(full, ((positions - self.window) // self.drop + 1) * self.drop, 0)
        ids = np.array([token for row in tokens for token in row])
        hidden = self._forward(ids, lanes, positions, starts)
        ends = np.cumsum([len(row) for row in tokens])[:-1]
        for lane, row in enumerate(tokens):
            self.length[lane] += len(row)
        return np.split(hidden, ends)

    def logits(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map states (R, K) to logits (R, V)."""
        return self.model.logits(states)

    def _forward(
        self, ids: NDArray[Any], lanes: NDArray[Any], positions: NDArray[Any], starts: NDArray[Any]
    ) -> NDArray[np.float32]:
        model = self.model
        x = model.embedding[ids]  # (R, K)
        normed = np.empty_like(x)
        cos, sin = model.turns(int(positions.max()) + 1)
        rows, table, logistic = len(ids), exp_table(16, 18), logistic_table(_REACH, _STEPS)
        qkv = np.empty((rows, (model.heads + 2 * model.kv_heads) * model.dim), np.float32)
        attended = np.empty((rows, model.heads * model.dim), np.float32)
        inner = np.empty((rows, len(model.blocks[0].gate_up.scales) // 2), np.float32)
        scaling = np.float32(1.0) / np.sqrt(np.float32(model.dim))
        for layer, block in enumerate(model.blocks):
            kernels.rms_norm(x, block.attention_norm, model.eps, normed)
            y, scales = block.qkv(normed)
            kernels.dequantize(y, scales, block.qkv.scales, qkv, False)
            caches = self.keys[layer], self.key_scales[layer], self.values[layer], self.value_scales[layer]
            sinks = self.sinks[0, layer], self.sinks[1, layer]
            kernels.attend(qkv, lanes, positions, starts, *caches, *sinks, cos, sin, scaling, table, attended)
            y, scales = block.out(attended)
            kernels.dequantize(y, scales, block.out.scales, x, True)
            kernels.rms_norm(x, block.mlp_norm, model.eps, normed)
            y, scales = block.gate_up(normed)
            kernels.gated(y, scales, block.gate_up.scales, logistic, np.float32(_REACH), np.float32(_STEPS), inner)
            y, scales = block.down(inner)
            kernels.dequantize(y, scales, block.down.scales, x, True)
        kernels.rms_norm(x, model.norm, model.eps, normed)
        return normed


def _array(weight: Any) -> NDArray[np.float32]:
    return weight.detach().float().cpu().contiguous().numpy()
