"""What stands around the clusters: padded frames, the vector of a video, its loss, and a control that drops nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenary.core.errors import OptionError
from tokenary.reduce.encoder import Encoder


def segment_tokens(frames: Tensor, segment: int, patches: int) -> Tensor:
    """Return which tokens of joined frames are no padding: (B, T) bool to (B S, f patches), for ``valid=``.

    A segment without any valid frame keeps all: it counts in no video, and has to have tokens.
    """
    if frames.shape[1] % segment:
        raise OptionError("segment", segment, f"a divisor of {frames.shape[1]} frames")
    parts = frames.bool().unflatten(1, (-1, segment)).flatten(0, 1)  # (B S, f)
    parts = parts | ~parts.any(1, keepdim=True)
    return parts.repeat_interleave(patches, dim=1)


def video_vector(segments: Tensor, frames: Tensor) -> Tensor:
    """Return the mean of the class tokens (B, S, D) of valid segments, (B, D); one is valid if its last frame is.

    ``frames`` (B, T) bool says which frames are. A video without a valid segment has the mean of all.
    """
    last = frames.bool().unflatten(1, (segments.shape[1], -1))[..., -1]  # (B, S)
    last = (last | ~last.any(1, keepdim=True))[..., None].to(segments.dtype)
    return (segments * last).sum(1) / last.sum(1)


@contextlib.contextmanager
def token_shift(encoder: nn.Module, frames: int, share: float = 0.125) -> Iterator[None]:
    """Control: let frames see each other by moving channels, and drop nothing; inside a ``with`` block.

    In front of every attention the first `share` of the channels of each token come from the frame before, and the next
    `share` from the one behind; at the ends of a clip they are 0.

    Parameters
    ----------
    encoder : nn.Module
        See `tokenary.reduce.base`.
    frames : int
        Frames of a clip, which lie one after the other in the batch.
    share : float
        Between 0 and 0.5.
    """
    if not 0 < share <= 0.5:
        raise OptionError("share", share, "above 0 and at most 0.5")

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return shifted(output.unflatten(0, (-1, frames)), share).flatten(0, 1)

    with contextlib.ExitStack() as stack:
        for block in Encoder.of(encoder).blocks:
            norm = getattr(block, "norm1", None) or block.get_submodule("layernorm_before")
            stack.callback(norm.register_forward_hook(hook).remove)
        yield


def shifted(clips: Tensor, share: float) -> Tensor:
    """Move channels of clips (B, T, S, D) along the frames."""
    part = int(clips.shape[-1] * share)
    forth, back, rest = clips.split([part, part, clips.shape[-1] - 2 * part], dim=-1)
    none = torch.zeros_like(forth[:, :1])
    return torch.cat([torch.cat([none, forth[:, :-1]], 1), torch.cat([back[:, 1:], none], 1), rest], dim=-1)
