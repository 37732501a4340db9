"""The network: a ViT that sees single frames, and a projection of frozen MiniLM vectors of captions.

The frames of a clip lie one after the other in the batch, so that blocks attend within a frame. Each frame is told its
moment by a vector that is added to all its tokens, and its class token is projected by a matrix that depends on the
moment (linearly in slow waves); the mean of these, which is the vector of the clip, would otherwise say nothing of the
order of frames. A reducer of `tokenary.reduce` that joins frames between two blocks makes of several frames one
sequence, a *segment*; the blocks behind then attend within it, and the mean is over segments at their moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenary.core.errors import InputError
from tokenary.models.bench_vlm.model import Block
from tokenary.models.cifar_vit.model import PlainBlock
from tokenary.models.minilm import WIDTH
from tokenary.models.video_text.clips import PATCH, SIDE

WAVES = 8  # that a moment is told in
SLOW = 3  # of these, the first of which is constant, on which the projection depends


@dataclass(frozen=True)
class VideoTextConfig:
    """Sizes.

    Parameters
    ----------
    side, patch : int
        Pixels of a frame and of a patch.
    width, layers, heads : int
        Of the frame encoder.
    space : int
        Dimensions that clips and captions share.
    hidden : int
        Of the projection of captions.
    """

    side: int = SIDE
    patch: int = PATCH
    width: int = 96
    layers: int = 5
    heads: int = 3
    space: int = 128
    hidden: int = 256

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.side // self.patch, self.side // self.patch

    def to_dict(self) -> dict[str, int]:
        """Return the fields."""
        return asdict(self)


def moments(clips: int, frames: int) -> Tensor:
    """Return when each frame of some clips is, in the middle of equal parts of 0 to 1: (clips, frames)."""
    return ((torch.arange(frames) + 0.5) / frames).expand(clips, -1)


def waves(moment: Tensor, count: int) -> Tensor:
    """Return cos(k pi t) of moments t (F,) for the first `count` k from 0: (F, count)."""
    return (math.pi * moment[:, None] * torch.arange(count, device=moment.device)).cos()


class FrameEncoder(nn.Module):
    """A plain pre-norm ViT over frames; token 0 is the class token, the patches follow row by row.

    Patches overlap: each is read from a square of twice its side, which holds a whole thing.
    """

    prefix = 1

    def __init__(self, config: VideoTextConfig) -> None:
        super().__init__()
        self.config, self.grid, width = config, config.grid, config.width
        self.patches = nn.Conv2d(3, width, 2 * config.patch, stride=config.patch, padding=config.patch // 2)
        self.mix = nn.Linear(width, width)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.empty(1 + config.grid[0] * config.grid[1], width))
        self.time = nn.Linear(WAVES, width)
        self.blocks = nn.ModuleList([PlainBlock(width, config.heads) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.positions, std=0.02)

    def embed(self, pixels: Tensor, moment: Tensor) -> Tensor:
        """Turn uint8 frames (F, S, S, 3) at their moments (F,) into the tokens (F, 1 + N, D) of the first block.

        Raises
        ------
        InputError
            The frames are of another shape.
        """
        side = self.config.side
        if pixels.shape[1:] != (side, side, 3):
            raise InputError(f"this network sees {side} x {side} RGB frames, not {tuple(pixels.shape[1:])}")
        x = pixels.permute(0, 3, 1, 2).to(self.positions.dtype) / 127.5 - 1  # (F, 3, S, S)
        x = self.mix(F.gelu(self.patches(x).flatten(2).mT))  # (F, N, D)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return x + self.positions + self.time(waves(moment, WAVES))[:, None]

    def forward(self, pixels: Tensor, moment: Tensor) -> Tensor:
        """Return the tokens behind the last block and norm."""
        x = self.embed(pixels, moment)
        for block in cast("Iterable[Block]", self.blocks):
            x = block(x)
        return self.norm(x)


class VideoText(nn.Module):
    """Clips and captions in one space, where a clip is near to the caption that is true of it.

    Attributes
    ----------
    vision : FrameEncoder
    project : nn.Linear
        From class tokens.
    text : nn.Sequential
        From MiniLM's vectors, scaled by `text_mean` and `text_spread`; two layers, as one cannot tell which of two ways
        comes first.
    scale : Parameter
        Logarithm of the factor on cosines (the inverse temperature).
    """

    text_mean: Tensor
    text_spread: Tensor

    def __init__(self, config: VideoTextConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = FrameEncoder(config)
        self.project = nn.Linear(SLOW * config.width, config.space)
        self.text = nn.Sequential(nn.Linear(WIDTH, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.space))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("text_mean", torch.zeros(WIDTH))
        self.register_buffer("text_spread", torch.ones(WIDTH))
        for module in self.vision.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def fit_scale(self, vectors: Tensor) -> None:
        """Set what captions' vectors are scaled by, from some of them (K, 384)."""
        self.text_mean.copy_(vectors.mean(0))
        self.text_spread.copy_(vectors.std(0).clamp_min(1e-3))  # some dimensions say nothing

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, D) of uint8 clips (B, T, S, S, 3) whose frames are evenly spaced."""
        moment = moments(*pixels.shape[:2])
        return self.clip_vectors(self.vision(pixels.flatten(0, 1), moment.flatten()), moment)

    def clip_vectors(self, tokens: Tensor, moment: Tensor) -> Tensor:
        """Return unit vectors (B, D) of what the frame encoder returns.

        Parameters
        ----------
        tokens : (B S, N, W) Tensor
            Of the frames of clips, or of segments of as many frames each.
        moment : (B, T) Tensor
            Of the frames.
        """
        segments = len(tokens) // len(moment)
        moment = moment.unflatten(1, (segments, -1)).mean(-1).flatten()  # (B S,)
        told = self.project((waves(moment, SLOW)[:, :, None] * tokens[:, :1]).flatten(1))
        return F.normalize(told.unflatten(0, (-1, segments)).float().mean(1), dim=-1)

    def encode_captions(self, vectors: Tensor) -> Tensor:
        """Return unit vectors (K, D) of captions, given MiniLM's (K, 384)."""
        return F.normalize(self.text((vectors - self.text_mean) / self.text_spread).float(), dim=-1)


def contrastive_loss(clips: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy in both directions over the cosines of unit vectors (B, D), times ``exp(scale)``."""
    logits, own = clips @ captions.mT * scale.exp(), torch.arange(len(clips), device=clips.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
