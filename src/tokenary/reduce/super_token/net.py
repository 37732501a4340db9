"""The network of the paper: a convolutional stem, four stages of super token blocks, a convolutional head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokenary.core.errors import UnknownNameError
from tokenary.reduce.super_token.association import Borders
from tokenary.reduce.super_token.layer import SuperTokenAttention

LAYER_SCALE = 1e-6  # what scaled branches start with


@dataclass(frozen=True)
class SViTConfig:
    """Sizes of a network; one entry a stage.

    Parameters
    ----------
    widths, depths, heads : tuple of int
    cells : tuple of int
        Side of a cell; 1 is plain attention.
    scaled : tuple of bool
        Whether residual branches are scaled (layer scale).
    drop_path : float
        Chance that the last block's branches are dropped in training; it rises linearly from 0.
    classes, ratio, head : int
        Classes; width of the MLP over that of the stage; channels in front of the classifier.
    rounds : int
        Of the association.
    borders : {"mask", "zero"}
        See `associate`.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    cells: tuple[int, ...] = (8, 4, 1, 1)
    scaled: tuple[bool, ...] = (False, False, False, False)
    drop_path: float = 0.1
    classes: int = 1000
    ratio: int = 4
    head: int = 1024
    rounds: int = 1
    borders: Borders = "mask"


_LATE = (False, False, True, True)
#: The published sizes: 25, 52 and 95 million parameters.
SIZES = {
    "small": SViTConfig((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
    "base": SViTConfig((96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8), scaled=_LATE, drop_path=0.4),
    "large": SViTConfig((96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10), scaled=_LATE, drop_path=0.6),
}


class DropPath(nn.Module):
    """Drop a residual branch of a picture with some chance, in training; what stays is scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class ConvFFN(nn.Module):
    """Two 1 x 1 convolutions, between them a 3 x 3 one of each channel that is added."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.shrink = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = nn.functional.gelu(self.expand(x))
        return self.shrink(x + self.depthwise(x))


class SuperTokenBlock(nn.Module):
    """Position code, attention among super tokens behind a LayerNorm, ConvFFN behind a BatchNorm."""

    def __init__(self, config: SViTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width, side = config.widths[stage], config.cells[stage]
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = SuperTokenAttention(width, config.heads[stage], (side, side), config.rounds, config.borders)
        self.norm2 = nn.BatchNorm2d(width)
        self.ffn = ConvFFN(width, config.ratio * width)
        self.drop_path = DropPath(drop_path)
        scale = LAYER_SCALE * torch.ones(width, 1, 1)
        self.scales = nn.ParameterList([scale, scale.clone()] if config.scaled[stage] else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = x + self.position(x)
        grid = x.shape[2:]
        mixed = self.attention(self.norm1(x.flatten(2).mT), tuple(grid)).mT.unflatten(2, grid)
        x = x + self.drop_path(mixed * self.scales[0] if len(self.scales) else mixed)
        mixed = self.ffn(self.norm2(x))
        return x + self.drop_path(mixed * self.scales[1] if len(self.scales) else mixed)


class SViT(nn.Module):
    """A classifier of pictures.

    Parameters
    ----------
    config : SViTConfig or str
        Sizes, or the name of published ones.
    classes : int, optional
        Another number of classes.

    Raises
    ------
    UnknownNameError
        There is no such size.
    """

    def __init__(self, config: SViTConfig | str = "small", classes: int | None = None) -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in SIZES:
                raise UnknownNameError("SViT size", config, SIZES)
            config = SIZES[config]
        self.config = config = config if classes is None else replace(config, classes=classes)
        widths, total = config.widths, sum(config.depths)
        half = widths[0] // 2
        steps = [(3, half, 2), (half, half, 1), (half, widths[0], 2), (widths[0], widths[0], 1)]
        self.stem = nn.Sequential(
            *(layer for i, o, stride in steps for layer in (_halving(i, o, stride), nn.GELU(), nn.BatchNorm2d(o)))
        )
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            first = sum(config.depths[:stage])
            blocks = [
                SuperTokenBlock(config, stage, config.drop_path * (first + i) / max(1, total - 1)) for i in range(depth)
            ]
            into = [_halving(widths[stage - 1], widths[stage]), nn.BatchNorm2d(widths[stage])] if stage else []
            self.stages.append(nn.Sequential(*into, *blocks))
        self.neck = nn.Sequential(nn.Conv2d(widths[-1], config.head, 1), nn.BatchNorm2d(config.head), nn.SiLU())
        self.head = nn.Linear(config.head, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of pictures (B, 3, H, W)."""
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.neck(x).mean((2, 3)))


def _halving(inputs: int, outputs: int, stride: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
