"""The whole network: encoder here, prompt encoder and mask decoder from transformers' SAM."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenary.core.token_map import TokenMap
from tokenary.hf.sam import sam_heads
from tokenary.models.mobile_sam.encoder import Plan, TinyViT, TinyViTConfig


class Segmentation(NamedTuple):
    """What the mask decoder says.

    Attributes
    ----------
    logits : (B, P, 3, 4 rows, 4 columns) Tensor
        Three masks for each of P prompts, from the part to the whole; above 0 is inside.
    scores : (B, P, 3) Tensor
        How good each mask is, by the network's own estimate of its intersection over union.
    """

    logits: Tensor
    scores: Tensor


class MobileSam(nn.Module):
    """Masks for points.

    Parameters
    ----------
    config : TinyViTConfig
    heads, intermediate : int
        Of the mask decoder.

    Attributes
    ----------
    encoder : TinyViT
    """

    def __init__(self, config: TinyViTConfig, heads: int = 8, intermediate: int = 2048) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyViT(config)
        self.prompt_encoder, self.mask_decoder = sam_heads(config.side, config.out, heads, intermediate)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """Scale an RGB picture (h, w, 3) so that its longer side is the network's: (1, H, W, 3) uint8."""
        scale = self.config.side / max(picture.shape[:2])
        size = [int(length * scale + 0.5) for length in picture.shape[:2]]
        x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    @torch.inference_mode()
    def segment(
        self, embedding: Tensor, points: Tensor, labels: Tensor | None = None, map: TokenMap | None = None
    ) -> Segmentation:
        """Answer prompts about encoded pictures.

        Parameters
        ----------
        embedding : (B, D, rows, columns) Tensor
            What the encoder made.
        points : (B, P, K, 2) Tensor
            K points for each of P prompts: column and row, in pixels of the scaled picture.
        labels : (B, P, K) Tensor, optional
            1 inside, 0 outside what is asked for; by default all inside.
        map : TokenMap, optional
            (B, M, N) or (M, N): the decoder's transformer works on M image tokens, which go back to the places that
            they stand for before masks are drawn. A place that nobody stands for is zero.
        """
        labels = torch.ones(points.shape[:3], dtype=torch.int, device=points.device) if labels is None else labels
        sparse, dense = self.prompt_encoder(points, labels, None, None)
        with ExitStack() as stack:
            if map is not None:
                _reduce(self.mask_decoder.transformer, map, points.shape[1], stack)
            logits, scores = self.mask_decoder(embedding, self._positions(len(embedding)), sparse, dense, True)
        return Segmentation(logits, scores)

    @torch.inference_mode()
    def predict(
        self,
        picture: NDArray[np.uint8],
        points: Sequence[tuple[int, int]],
        plan: Plan | None = None,
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Cut out what is at each point.

        Parameters
        ----------
        picture : (h, w, 3) uint8 array
            RGB.
        points : sequence of (int, int)
            Column and row; each is a prompt of its own.
        plan : callable, optional
            Reduces inside the encoder, see `TinyViT.forward`.

        Returns
        -------
        masks : (P, 3, h, w) bool array
        scores : (P, 3) float array
        """
        pixels = self.prepare(picture).to(self.device)
        scale = torch.tensor([pixels.shape[2] / picture.shape[1], pixels.shape[1] / picture.shape[0]])
        prompts = (torch.tensor(points, dtype=torch.float32) * scale)[None, :, None].to(self.device)  # (1, P, 1, 2)
        found = self.segment(self.encoder(pixels, plan), prompts)
        side = self.config.side
        large = F.interpolate(found.logits[0], (side, side), mode="bilinear", align_corners=False)
        large = large[..., : pixels.shape[1], : pixels.shape[2]]
        fitted = F.interpolate(large, picture.shape[:2], mode="bilinear", align_corners=False)
        return (fitted > 0).cpu().numpy(), found.scores[0].float().cpu().numpy()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.prompt_encoder.no_mask_embed.weight.device

    def _positions(self, count: int) -> Tensor:
        """Encode the centres of all places: (B, D, rows, columns)."""
        embedding = self.prompt_encoder.shared_embedding
        rows, columns = ((torch.arange(n, device=self.device) + 0.5) / n for n in self.config.grid)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return embedding(torch.stack([x, y], dim=-1)).permute(2, 0, 1).expand(count, -1, -1, -1)


def _reduce(transformer: nn.Module, map: TokenMap, prompts: int, stack: ExitStack) -> None:
    """Let the decoder's transformer work on fewer image tokens while the stack is open."""
    if map.batch_shape and prompts > 1:
        map = map[torch.arange(map.batch_shape[0]).repeat_interleave(prompts)]  # pictures are repeated a prompt

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        fewer = {
            name: map.apply(kwargs[name].flatten(2).mT).mT[:, :, None]  # (B P, D, 1, M)
            for name in ("image_embeddings", "image_positional_embeddings")
        }
        return args, {**kwargs, **fewer}

    def after(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        letters, image = output  # image (B P, 1, M, D)
        return letters, map.pinv().apply(image[:, 0])[:, None]

    stack.callback(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(transformer.register_forward_hook(after).remove)


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0
