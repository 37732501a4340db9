"""The network: 8 x 8 patches, four pre-norm encoder blocks, four decoder blocks with cross-attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenary.core.errors import InputError
from tokenary.models.bench_vlm.model import Attention, Block

PAD, BOS, EOS, UNKNOWN = range(4)
_EPS = 1e-6


@dataclass(frozen=True)
class OcrConfig:
    """Sizes of the network; the defaults are those of the published weights.

    Parameters
    ----------
    height, width, patch : int
        Pixels of a picture and of a patch.
    hidden, heads, encoder_layers, decoder_layers, intermediate : int
    max_length : int
        Longest formula, in letters.
    vocab : int
        Letters; the first four are padding, begin, end and unknown.
    """

    height: int = 128
    width: int = 512
    patch: int = 8
    hidden: int = 256
    heads: int = 8
    encoder_layers: int = 4
    decoder_layers: int = 4
    intermediate: int = 1024
    max_length: int = 512
    vocab: int = 166

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch


class Encoder(nn.Module):
    """The picture's side; no class token.

    Attributes
    ----------
    blocks : nn.ModuleList of Block
        Plain pre-norm blocks over the patches, row by row.
    prefix : int
        Tokens before the patches: 0.
    grid : (int, int)
        Rows and columns of patches.
    """

    prefix = 0

    def __init__(self, config: OcrConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        self.patch_embedding = nn.Linear(config.patch**2, config.hidden)
        self.positions = nn.Parameter(torch.empty(config.grid[0] * config.grid[1], config.hidden))
        self.embedding_norm = nn.LayerNorm(config.hidden, eps=_EPS)
        self.blocks = nn.ModuleList(
            _block(config.hidden, config.heads, config.intermediate) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden, eps=_EPS)
        nn.init.normal_(self.positions, std=0.05)

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn uint8 grey pictures (B, H, W) into the tokens (B, N, D) that enter the first block.

        Raises
        ------
        InputError
            The pictures are of another size; see `canvas`.
        """
        height, width, patch = self.config.height, self.config.width, self.config.patch
        if pixels.shape[1:] != (height, width):
            raise InputError(f"this network sees grey pictures of {height} x {width}, not {tuple(pixels.shape[1:])}")
        rows, columns = self.grid
        patches = pixels.unflatten(2, (columns, patch)).unflatten(1, (rows, patch)).transpose(2, 3)  # (B, r, c, p, p)
        x = self.patch_embedding(patches.flatten(3).flatten(1, 2).to(self.positions.dtype) / 255)
        return self.embedding_norm(x + self.positions)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 grey pictures (B, H, W): tokens (B, N, D)."""
        x = self.embed(pixels)
        for block in cast("Iterable[Block]", self.blocks):
            x = block(x)
        return self.norm(x)


class CrossAttention(nn.Module):
    """Letters (B, L, D) look at the tokens of the picture (B, M, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (B, H, M, D / H)."""
        keys, values = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Attend; `bias` (B, 1, 1, M) is added to the scaled products."""
        queries = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention over the letters so far, cross-attention, MLP; all pre-norm."""

    def __init__(self, width: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps=_EPS)
        self.cross = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.expand = nn.Linear(width, intermediate)
        self.shrink = nn.Linear(intermediate, width)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, memory: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take letters (B, L, D) behind the `past` ones; return their states, and the keys and values of all."""
        queries, keys, values = self.attention.project(self.norm1(x))
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
        x = x + self.attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.cross(self.cross_norm(x), *memory, bias)
        return x + self.shrink(F.gelu(self.expand(self.norm2(x)))), (keys, values)


class LatexOcr(nn.Module):
    """Reads formulas.

    Parameters
    ----------
    config : OcrConfig
    letters : sequence of str
        The vocabulary; the first four are padding, begin, end and unknown.

    Attributes
    ----------
    encoder : Encoder
    """

    def __init__(self, config: OcrConfig, letters: Sequence[str]) -> None:
        super().__init__()
        if len(letters) != config.vocab:
            raise InputError(f"{len(letters)} letters for a vocabulary of {config.vocab}")
        self.config, self.letters = config, tuple(letters)
        self.encoder = Encoder(config)
        self.token_embedding = nn.Embedding(config.vocab, config.hidden)
        self.positions = nn.Embedding(config.max_length, config.hidden)
        self.embedding_norm = nn.LayerNorm(config.hidden, eps=_EPS)
        self.blocks = nn.ModuleList(
            DecoderBlock(config.hidden, config.heads, config.intermediate) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden, eps=_EPS)
        self.head = nn.Linear(config.hidden, config.vocab)

    def forward(self, ids: Tensor, memory: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of the letter behind each of `ids` (B, L), which begin with BOS.

        Parameters
        ----------
        ids : (B, L) int64 Tensor
            The formula so far.
        memory : (B, M, D) Tensor
            What the encoder made of the picture, or what is left of it.
        sizes : (B, M) Tensor, optional
            How many patches each token stands for: cross-attention weighs it by that.
        """
        logits, _ = self._step(ids, [None] * len(self.blocks), self._memory(memory), _bias(memory, sizes))
        return logits

    @torch.inference_mode()
    def generate(
        self, memory: Tensor, sizes: Tensor | None = None, max_new_tokens: int | None = None
    ) -> list[list[int]]:
        """Spell greedily; letters behind EOS are left out.

        Parameters
        ----------
        memory : (B, M, D) Tensor
            As in `forward`.
        sizes : (B, M) Tensor, optional
            As in `forward`.
        max_new_tokens : int, optional
            By default as many as there are positions.
        """
        most = self.config.max_length - 1 if max_new_tokens is None else min(max_new_tokens, self.config.max_length - 1)
        bias, across = _bias(memory, sizes), self._memory(memory)
        past: list[Any] = [None] * len(self.blocks)
        ids = torch.full((len(memory), 1), BOS, device=memory.device)
        found: list[list[int]] = [[] for _ in range(len(memory))]
        running = set(range(len(memory)))
        for _ in range(most):
            logits, past = self._step(ids, past, across, bias)
            last = logits[:, -1]
            last[:, [PAD, BOS]] = float("-inf")
            ids = last.argmax(-1, keepdim=True)
            for row in sorted(running):
                letter = int(ids[row])
                if letter == EOS:
                    running.discard(row)
                else:
                    found[row].append(letter)
            if not running:
                break
        return found

    def text(self, ids: Iterable[int]) -> str:
        """Join letters; the unknown one is left out."""
        return "".join(self.letters[i] for i in ids if i > UNKNOWN)

    @torch.inference_mode()
    def read(self, pixels: Tensor, max_new_tokens: int | None = None) -> list[str]:
        """Read uint8 grey pictures (B, H, W), see `canvas`; some are never finished, so it is well to set a limit."""
        return [self.text(ids) for ids in self.generate(self.encoder(pixels), max_new_tokens=max_new_tokens)]

    def _memory(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [block.cross.project(memory) for block in cast("Iterable[DecoderBlock]", self.blocks)]

    def _step(
        self, ids: Tensor, past: Sequence[Any], across: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None
    ) -> tuple[Tensor, list[Any]]:
        start = 0 if past[0] is None else past[0][0].shape[2]
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.embedding_norm(self.token_embedding(ids) + self.positions(positions))
        kept = []
        for block, before, memory in zip(self.blocks, past, across, strict=True):
            x, now = block(x, before, memory, bias)
            kept.append(now)
        return self.head(self.norm(x)).float(), kept


def canvas(picture: NDArray[np.uint8], height: int = 128, width: int = 512) -> Tensor:
    """Fit a grey picture (h, w), dark on light, into (height, width): scaled to touch, centred, black around; uint8.

    Raises
    ------
    InputError
        The picture is not grey, or empty.
    """
    if picture.ndim != 2 or 0 in picture.shape:
        raise InputError(f"a grey picture of (height, width) is wanted, not one of shape {picture.shape}")
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = (max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale)))
    grey = torch.from_numpy(np.ascontiguousarray(picture))[None, None].float()
    scaled = F.interpolate(grey, size, mode="bilinear", antialias=True, align_corners=False)[0, 0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    out = torch.zeros(height, width, dtype=torch.uint8)
    out[top : top + size[0], left : left + size[1]] = scaled.round().clamp(0, 255).to(torch.uint8)
    return out


def _block(width: int, heads: int, intermediate: int) -> Block:
    block = Block(width, heads)
    block.expand, block.shrink = nn.Linear(width, intermediate), nn.Linear(intermediate, width)
    block.norm1.eps = block.norm2.eps = _EPS
    return block


def _bias(memory: Tensor, sizes: Tensor | None) -> Tensor | None:
    return None if sizes is None else sizes.log().to(memory.dtype)[:, None, None, :]
