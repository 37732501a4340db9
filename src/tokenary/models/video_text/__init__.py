"""A small network that finds clips by captions, trained by this project (``scripts/train_video_text.py``).

`render` shows a `Story` of coloured shapes and words that move, `Story.caption` says it in words; many captions differ
from another in order alone. ``load()`` gives the network that ships; its frame encoder is a plain ViT, so that every
reducer of visual tokens fits. Captions are read by the frozen sentence encoder of `tokenary.models.minilm`.
"""

from __future__ import annotations

from tokenary.models.video_text.clips import Clip, panned, render
from tokenary.models.video_text.loading import load, save
from tokenary.models.video_text.model import VideoText, VideoTextConfig
from tokenary.models.video_text.retrieval import Gallery, gallery, ranks, similarity
from tokenary.models.video_text.stories import Step, Story, candidates

__all__ = [
    "Clip", "Gallery", "Step", "Story", "VideoText", "VideoTextConfig", "candidates", "gallery", "load",
    "panned", "ranks", "render", "save", "similarity",
]  # fmt: skip
