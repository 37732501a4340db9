"""TinyViT (Wu et al. 2022, arXiv 2207.10666) as MobileSAM uses it: the last merge keeps its stride, a neck follows.

A stage of convolutions and one of windowed attention bring 1024 x 1024 pixels down to 64 x 64 tokens; the eight blocks
of the last two stages, `TinyViT.blocks`, work on these. A block is pre-norm attention in windows with a bias for the
distance of two tokens, a 3 x 3 depthwise convolution, and an MLP. Windows that hang over the edge are filled up with
empty tokens, which take part as in the published network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenary.core.errors import InputError
from tokenary.core.token_map import TokenMap

#: Which tokens stand for which, asked before each of `TinyViT.blocks` with its number and the tokens (B, N, D).
Plan = Callable[[int, Tensor], TokenMap | None]
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class TinyViTConfig:
    """Sizes of the encoder; the defaults are MobileSAM's.

    Parameters
    ----------
    side : int
        Pixels of the square that a picture is padded to; a multiple of 16.
    widths, depths, heads, windows : tuple of int
        Of the four stages; the first is of convolutions and has no heads and no windows.
    out : int
        Channels behind the neck.
    """

    side: int = 1024
    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (0, 4, 5, 10)
    windows: tuple[int, int, int, int] = (0, 7, 14, 7)
    out: int = 256

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.side // 16, self.side // 16


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm."""

    def __init__(self, source: int, target: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(source, target, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(target))


class Convolutions(nn.Module):
    """An inverted bottleneck, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours."""
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Merge(nn.Module):
    """Between two stages: other channels, and with stride 2 a quarter of the places."""

    def __init__(self, source: int, target: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(source, target)
        self.conv2 = ConvNorm(target, target, 3, stride, groups=target)
        self.conv3 = ConvNorm(target, target)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Self-attention inside windows of the grid, with a learnt bias for every head and distance.

    Parameters
    ----------
    width, heads, window : int
    """

    index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.zeros(heads, window * window))
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        rows, columns = (places[:, None] - places).abs().unbind(-1)
        self.register_buffer("index", rows * window + columns, persistent=False)  # (W W, W W)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of normed tokens (B, N, D), each (B, H, N, D / H)."""
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return q, k, v

    def mix(
        self, states: Sequence[Tensor], empty: Sequence[Tensor], grid: tuple[int, int], seen: Tensor | None = None
    ) -> Tensor:
        """Attend inside windows.

        Parameters
        ----------
        states : three (B, H, N, D / H) Tensors
            Queries, keys and values of the whole grid.
        empty : three (1, H, 1, D / H) Tensors
            Those of an empty token, which fills windows up.
        grid : (int, int)
            Rows and columns.
        seen : (B, N) bool Tensor, optional
            Tokens that can be attended to.

        Returns
        -------
        (B, N, D) Tensor
        """
        q, k, v = (self._windows(x, fill, grid) for x, fill in zip(states, empty, strict=True))
        bias = self.biases[:, self.index].to(q.dtype)  # (H, W W, W W)
        if seen is not None:
            allowed = self._windows(seen[:, None, :, None], torch.ones_like(seen[:1, None, :1, None]), grid)
            bias = bias + torch.where(allowed.mT, 0.0, -1e4).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), -1, -1, -1))
        return self._grid(mixed, len(states[0]), grid)

    def _windows(self, x: Tensor, fill: Tensor, grid: tuple[int, int]) -> Tensor:
        """Cut (B, H, N, d) into (B windows, H, W W, d)."""
        (rows, columns), window = grid, self.window
        below, right = -rows % window, -columns % window
        x = x.unflatten(2, grid)
        if below or right:
            whole = fill[:, :, None].expand(len(x), x.shape[1], rows + below, columns + right, -1).clone()
            whole[:, :, :rows, :columns] = x
            x = whole
        x = x.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, H, r, W, c, W, d)
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    def _grid(self, x: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
        """Lay (B windows, H, W W, d) out as (B, N, D)."""
        (rows, columns), window = grid, self.window
        across, down = -(-columns // window), -(-rows // window)
        x = x.unflatten(2, (window, window)).unflatten(0, (count, down, across))  # (B, r, c, H, W, W, d)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)  # (B, R, C, D)
        return x[:, :rows, :columns].flatten(1, 2)


class WindowBlock(nn.Module):
    """A block of the later stages.

    Parameters
    ----------
    width, heads, window : int
    grid : (int, int)
        Rows and columns of its tokens.
    """

    def __init__(self, width: int, heads: int, window: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm1 = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window)
        self.convolution = ConvNorm(width, width, 3, groups=width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, map: TokenMap | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D).

        With a `map` (B, M, N) or (M, N), all that is done token by token (norms, projections, MLP: nine tenths of the
        work) is done on M tokens, and every token that one of them stands for takes its update. Keys and values are
        those of the M, each at the places it stands for; a token that nobody stands for is seen by none and keeps what
        it is.

        Raises
        ------
        InputError
            The tokens are not those of the whole grid: windows and convolution need all places.
        """
        if x.shape[1] != self.grid[0] * self.grid[1]:
            raise InputError(f"{x.shape[1]} tokens are not those of a grid of {self.grid[0]} x {self.grid[1]}")
        empty = self.attention.project(self.norm1(torch.zeros_like(x[:1, :1])))
        if map is None:
            states = self.attention.project(self.norm1(x))
            x = x + self.attention.out(self.attention.mix(states, empty, self.grid))
            x = self._convolved(x)
            return x + self._feed(x)
        back = map.pinv()
        shared = back[:, None] if back.batch_shape else back  # over heads
        states = self.attention.project(self.norm1(map.apply(x)))
        whole = [shared.apply(each) for each in states]
        seen = back.mask(torch.ones(map.shape[-2], dtype=torch.bool, device=x.device)).expand(len(x), -1)
        mixed = self.attention.mix(whole, empty, self.grid, seen)
        x = x + back.apply(self.attention.out(map.apply(mixed)))
        x = self._convolved(x)
        return x + back.apply(self._feed(map.apply(x)))

    def _convolved(self, x: Tensor) -> Tensor:
        return self.convolution(x.mT.unflatten(2, self.grid)).flatten(2).mT

    def _feed(self, x: Tensor) -> Tensor:
        return self.shrink(F.gelu(self.expand(self.norm2(x))))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """The encoder.

    Attributes
    ----------
    blocks : nn.ModuleList of WindowBlock
        Of the last two stages; from block ``depths[2]`` on tokens are wider.
    prefix : int
        Tokens before the patches: 0, there is no class token.
    grid : (int, int)
        Rows and columns of tokens.
    """

    prefix = 0

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        first, second, third, fourth = config.widths
        self.stem = nn.Sequential(ConvNorm(3, first // 2, 3, 2), nn.GELU(), ConvNorm(first // 2, first, 3, 2))
        self.convolutions = nn.Sequential(*(Convolutions(first) for _ in range(config.depths[0])))
        self.merges = nn.ModuleList([Merge(first, second, 2), Merge(second, third, 2), Merge(third, fourth, 1)])
        large = (2 * self.grid[0], 2 * self.grid[1])
        self.early = nn.ModuleList(
            WindowBlock(second, config.heads[1], config.windows[1], large) for _ in range(config.depths[1])
        )
        self.blocks = nn.ModuleList(
            WindowBlock(config.widths[stage], config.heads[stage], config.windows[stage], self.grid)
            for stage in (2, 3)
            for _ in range(config.depths[stage])
        )
        self.neck = nn.Sequential(
            nn.Conv2d(fourth, config.out, 1, bias=False),
            ChannelNorm(config.out, eps=1e-6),
            nn.Conv2d(config.out, config.out, 3, padding=1, bias=False),
            ChannelNorm(config.out, eps=1e-6),
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Bring pictures to the tokens (B, N, D) that enter the first of `blocks`.

        Parameters
        ----------
        pixels : (B, H, W, 3) uint8 Tensor
            No side longer than the network's; the rest is padded, right and below.

        Raises
        ------
        InputError
            The pictures are larger, or not RGB.
        """
        side = self.config.side
        if pixels.ndim != 4 or pixels.shape[3] != 3 or max(pixels.shape[1:3]) > side:
            raise InputError(f"this network sees RGB pictures of up to {side} x {side}, not {tuple(pixels.shape[1:])}")
        dtype = next(self.parameters()).dtype
        mean, std = (torch.tensor(values, device=pixels.device, dtype=dtype) for values in (_MEAN, _STD))
        x = ((pixels.to(dtype) - mean) / std).permute(0, 3, 1, 2)
        x = F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2]))
        x = self.merges[0](self.convolutions(self.stem(x)))
        grid, x = x.shape[2:], x.flatten(2).mT
        for block in self.early:
            x = block(x)
        return self.merges[1](x.mT.unflatten(2, grid)).flatten(2).mT

    def forward(self, pixels: Tensor, plan: Plan | None = None) -> Tensor:
        """Encode pictures.

        Parameters
        ----------
        pixels : (B, H, W, 3) uint8 Tensor
            As in `embed`.
        plan : callable, optional
            Given the number of a block and the tokens (B, N, D) in front of it, which of them stand for which there:
            a map, see `WindowBlock.forward`; or None for each for itself.

        Returns
        -------
        (B, out, rows, columns) Tensor
        """
        x = self.embed(pixels)
        for number, block in enumerate(self.blocks):
            if number == self.config.depths[2]:
                x = self.merges[2](x.mT.unflatten(2, self.grid)).flatten(2).mT
            map = plan(number, x) if plan is not None else None
            x = block(x) if map is None else block(x, map=map)
        return self.neck(x.mT.unflatten(2, self.grid))
