"""MobileSAM (Zhang et al. 2023, arXiv 2306.14289): a TinyViT encoder under SAM's prompt encoder and mask decoder.

``load()`` fetches the published weights (Apache-2.0) and gives a `MobileSam`; ``photographs()`` are real pictures with
points to ask about (scikit-image carries them); ``iou`` says how far two masks agree. `TinyViT` takes a plan that says
which image tokens stand for which others, and `MobileSam.segment` a map, so that reducers can act in both.
"""

from __future__ import annotations

from tokenary.models.mobile_sam.encoder import TinyViT, TinyViTConfig
from tokenary.models.mobile_sam.loading import available, load
from tokenary.models.mobile_sam.model import MobileSam, Segmentation, iou
from tokenary.models.mobile_sam.photographs import Photograph, photographs

__all__ = [
    "MobileSam",
    "Photograph",
    "Segmentation",
    "TinyViT",
    "TinyViTConfig",
    "available",
    "iou",
    "load",
    "photographs",
]
