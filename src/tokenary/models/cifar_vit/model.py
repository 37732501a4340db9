"""The network: 64 patches through a convolutional stem, a class token, pre-norm blocks, a linear head.

The stem (two 3 x 3 convolutions of stride 2) stands in place of a linear patch embedding because it learns
in far fewer passes over the pictures (Xiao et al. 2021, arXiv 2106.14881); behind it nothing differs from a plain ViT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tokenary.core.errors import InputError
from tokenary.models.bench_vlm.model import Attention, Block


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the classifier.

    Parameters
    ----------
    side, patch : int
        Pixels of a picture and of a patch; the patch is a power of two.
    width, layers, heads : int
    classes : int
    """

    side: int = 32
    patch: int = 4
    width: int = 128
    layers: int = 6
    heads: int = 4
    classes: int = 10

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.side // self.patch, self.side // self.patch

    def to_dict(self) -> dict[str, int]:
        """Return the fields."""
        return asdict(self)


class PlainAttention(Attention):
    """Self-attention in plain products: at 65 tokens several times faster to train on a CPU than the fused kernel."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Attend; `sizes` (B, N) says how many patches each token stands for (proportional attention)."""
        q, k, v = self.project(x)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if sizes is not None:
            logits = logits + sizes.log().to(logits.dtype)[:, None, None, :]
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PlainBlock(Block):
    """A pre-norm transformer block around `PlainAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.attention = PlainAttention(width, heads)


class CifarViT(nn.Module):
    """A classifier of small pictures.

    Attributes
    ----------
    blocks : nn.ModuleList of PlainBlock
        What stands between `embed` and `classify`; token 0 is the class token, the patches follow row by row.
    prefix : int
        Tokens before the patches: 1.
    grid : (int, int)
        Rows and columns of patches.
    """

    prefix = 1

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        rows, columns = config.grid
        self.stem = _stem(config)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.empty(1 + rows * columns, config.width))
        blocks = [PlainBlock(config.width, config.heads) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in blocks:  # residual branches start small
            for last in (block.attention.out, block.shrink):
                nn.init.trunc_normal_(last.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn uint8 pictures (B, S, S, 3) into the tokens (B, 1 + N, D) that enter the first block.

        Raises
        ------
        InputError
            The pictures are of another shape.
        """
        side = self.config.side
        if pixels.shape[1:] != (side, side, 3):
            raise InputError(f"this network sees {side} x {side} RGB pictures, not {tuple(pixels.shape[1:])}")
        x = pixels.permute(0, 3, 1, 2).to(self.positions.dtype) / 127.5 - 1  # (B, 3, S, S)
        x = self.stem(x).flatten(2).mT  # (B, N, D)
        return torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.positions

    def classify(self, x: Tensor) -> Tensor:
        """Read the class token of the last block's output (B, M, D): logits (B, classes)."""
        return self.head(self.norm(x[:, 0]))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of uint8 pictures (B, S, S, 3)."""
        x = self.embed(pixels)
        for block in cast("Iterable[Block]", self.blocks):
            x = block(x)
        return self.classify(x)


def _stem(config: ViTConfig) -> nn.Sequential:
    """Make patches: as many convolutions of stride 2 as the patch has powers of two."""
    halvings, channels = config.patch.bit_length() - 1, 3
    layers: list[nn.Module] = []
    for level in reversed(range(halvings)):
        width = config.width >> level
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
        channels = width
    return nn.Sequential(*layers[:-1])


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Share of pictures (N, S, S, 3) uint8 whose label (N,) gets the largest logit."""
    model.eval()
    right = sum(
        int((model(pixels[start : start + batch]).argmax(-1) == labels[start : start + batch]).sum())
        for start in range(0, len(pixels), batch)
    )
    return right / len(pixels)
